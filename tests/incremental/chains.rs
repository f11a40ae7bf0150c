//! Incremental backups: what each of them restores to, after other backups were removed or the service or QEMU was
//! killed.
//!
//! A test records every byte of a disk at the point in time of each backup. Only `qemu-img` reads the backups.

use std::process::Command;

use crate::common::caller::{Caller, assert_completed, assert_failed, cancel};
use crate::common::chain::digest;
use crate::common::proxies::{Options, error_name};
use crate::common::recorded::{DISKS, Recorded, SIZE, backup_id};
use crate::common::{System, process, wait};
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;

fn incremental(word: &str) -> Options<'_> {
    Options::from([("incremental", Variant::from(word))])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_under_deletion_is_skipped_unless_it_was_requested() {
    let mut scene = Recorded::new();
    let (full, _) = scene.backup(Options::new()).await;
    scene.write("vda", MIB, MIB / 2, 0x22);
    let (second, _) = scene.backup(Options::new()).await;
    // As a deletion locks it before it removes anything.
    let image = scene.image(&second, "vda");
    let going = std::fs::File::open(image.parent().unwrap()).unwrap();
    flock(&going, FlockOperation::LockExclusive).unwrap();
    let caller = Caller::new(&scene.system).await;
    let refused = caller
        .try_start("web", "", &[], incremental(&second))
        .await
        .unwrap_err();
    assert_eq!(error_name(&refused), "org.example.Backup1.Error.Busy");
    let (_, said) = scene.backup(Options::new()).await;
    assert!(!said.iter().any(|disk| disk.contains(&second)), "{said:?}");
    drop(going);
    let (_, said) = scene.backup(incremental("auto")).await;
    assert!(said.iter().all(|disk| disk.contains("incremental")), "{said:?}");
    assert!(scene.image(&full, "vda").exists());
    scene.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_backup_holds_only_changes_and_shows_the_whole_disk() {
    let mut scene = Recorded::new();
    let (full, said) = scene.backup(Options::new()).await;
    assert_eq!(said, ["vda full first", "vdb full first"]);
    scene.write("vda", MIB, MIB / 2, 0x22);
    scene.write_zeroes("vda", 0, MIB / 4);
    let (second, said) = scene.backup(Options::new()).await;
    let since = |id: &str| DISKS.map(|disk| format!("{disk} incremental {id}"));
    assert_eq!(said, since(&full));
    scene.reboot();
    scene.write("vda", 3 * MIB, MIB / 2, 0x33);
    scene.write("vdb", 0, 64 << 10, 0x44);
    let (third, said) = scene.backup(incremental("auto")).await;
    assert_eq!(said, since(&second));
    scene.write("vdb", 2 * MIB, 64 << 10, 0x55);
    let (fourth, said) = scene.backup(incremental(&full)).await;
    assert_eq!(said, DISKS.map(|disk| format!("{disk} differential {full}")));
    scene.check();
    scene.assert_checkpoints(&[&full, &second, &third, &fourth]);

    // An incremental image holds the changes and some metadata.
    let length = |id: &str, disk: &str| std::fs::metadata(scene.image(id, disk)).unwrap().len();
    assert!(length(&second, "vdb") < MIB / 2, "{}", length(&second, "vdb"));
    assert!(length(&third, "vdb") < MIB, "{}", length(&third, "vdb"));
    // Each manifest names its kind, its parent and its files.
    let manifest = scene.manifest(&third);
    assert_eq!(manifest["kind"], "incremental");
    let disk = &manifest["disks"][1];
    assert_eq!(disk["parent"], json!({ "backup": second, "file": "vdb.qcow2" }));
    assert_eq!(disk["bitmap"], format!("backupd-{third}-1"));
    assert_eq!(disk["length"], length(&third, "vdb"));
    assert_eq!(disk["blake3"], digest(&scene.image(&third, "vdb")));
    assert_eq!(disk["sha256"], Value::Null);
    assert_eq!(scene.manifest(&full)["kind"], "full");
    assert_eq!(scene.manifest(&fourth)["kind"], "differential");
    // So does the header, so that every program finds the backing file.
    let mut info = Command::new("qemu-img");
    info.args(["info", "--output=json"])
        .arg(scene.image(&third, "vdb"));
    let info: Value = serde_json::from_str(&process::run(info).expect_success()).unwrap();
    assert_eq!(info["backing-filename"], format!("../{second}/vdb.qcow2"));
    assert_eq!(info["backing-filename-format"], "qcow2");
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_during_a_backup_are_in_the_next_one() {
    let mut scene = Recorded::new();
    scene.backup(Options::new()).await;
    scene.write("vda", 0, 2 * MIB, 0x21);
    let caller = Caller::new(&scene.system).await;
    let slow = Options::from([("bandwidth", Variant::from(MIB))]);
    let job = caller.start_with("web", "", &[], slow).await;
    wait::until_async("the copying", || async {
        (job.state().await.unwrap() == "running").then_some(())
    })
    .await;
    let at_the_instant = scene.now.clone();
    scene.write("vda", MIB, MIB, 0x22);
    scene.write("vdb", MIB, MIB, 0x23);
    job.set_speed(0).await.unwrap();
    assert_completed(&job).await;
    let (id, _) = scene.record(&job).await;
    scene.backups.insert(id, at_the_instant);
    scene.backup(Options::new()).await;
    scene.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_without_a_result_leaves_the_chain_unchanged() {
    let mut scene = Recorded::new();
    let (full, _) = scene.backup(Options::new()).await;
    scene.write("vda", MIB, MIB, 0x22);
    let before = scene.vm().residue();
    let caller = Caller::new(&scene.system).await;
    let slow = Options::from([("bandwidth", Variant::from(1u64))]);
    let job = caller.start_with("web", "", &[], slow).await;
    cancel(&job).await;
    assert_eq!(scene.vm().residue(), before);
    scene.assert_checkpoints(&[&full]);
    scene.write("vdb", MIB, MIB, 0x23);
    let (_, said) = scene.backup(Options::new()).await;
    assert_eq!(said, DISKS.map(|disk| format!("{disk} incremental {full}")));
    scene.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_chain_stays_good_at_each_point_where_the_service_dies() {
    let mut scene = Recorded::new();
    scene.backup(Options::new()).await;
    scene.system.stop_daemon();
    scene.system.start_recording_daemon();
    scene.system.wait_for_domain("web");
    let (mut newest, _) = scene.backup(Options::new()).await;
    let points = scene.system.passed_points("recorded");
    for (index, point) in points.iter().enumerate() {
        scene.write("vda", (index as u64 % 16) * (MIB / 4), 64 << 10, index as u8 + 1);
        scene.system.stop_daemon();
        scene.system.start_dying_daemon(point);
        scene.system.wait_for_domain("web");
        let caller = Caller::new(&scene.system).await;
        // The service may die before it replies.
        let _ = caller.try_start("web", "", &[], Options::new()).await;
        scene.system.wait_for_death();
        let at_the_instant = scene.now.clone();
        scene.write("vdb", (index as u64 % 16) * (MIB / 4), 64 << 10, index as u8 + 1);
        scene.system.start_daemon();
        scene.system.wait_for_domain("web");
        let caller = Caller::new(&scene.system).await;
        let jobs = caller.manager.list_jobs().await.unwrap();
        if let Some((_, path, _, _)) = jobs.last() {
            let job = caller.job(path.clone()).await;
            let (result, _, message) = wait::within("the end", job.wait()).await.unwrap();
            if result == "completed" && backup_id(&job).await != newest {
                let (id, said) = scene.record(&job).await;
                assert!(
                    said[0].ends_with(&format!("incremental {newest}")),
                    "{point:?}: {said:?}"
                );
                scene.backups.insert(id.clone(), at_the_instant);
                newest = id;
            } else {
                assert!(
                    result == "completed" || result == "failed",
                    "{point:?}: {result} {message}"
                );
            }
        }
        // The next backup continues from the last good one.
        let (id, said) = scene.backup(Options::new()).await;
        assert_eq!(
            said,
            DISKS.map(|disk| format!("{disk} incremental {newest}")),
            "{point:?}"
        );
        newest = id;
        let good: Vec<&str> = scene.backups.keys().map(String::as_str).collect();
        for checkpoint in scene.vm().checkpoints("vda") {
            assert!(
                good.iter().any(|id| checkpoint.contains(id)),
                "{point:?}: {checkpoint} belongs to no complete backup"
            );
        }
        assert!(scene.vm().checkpoints("vda").len() <= 4, "{point:?}");
        // So many images in a chain exceed the limit.
        if index % 8 == 7 {
            scene.check();
            newest = scene.backup(incremental("full")).await.0;
        }
    }
    scene.check();
    // The manifest decides, whichever service wrote it.
    let caller = Caller::new(&scene.system).await;
    let (listed, _) = caller.manager.list_backups(Options::new()).await.unwrap();
    let damaged = listed
        .iter()
        .filter(|backup| !format!("{backup:?}").contains("\"complete\""));
    assert_eq!(damaged.count(), 0, "{listed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_cannot_continue_starts_with_a_full_backup_and_its_reason() {
    let mut scene = Recorded::new();
    let (first, _) = scene.backup(Options::new()).await;
    // QEMU is killed: changes that it had not saved to the bitmap are unknown.
    scene.reboot();
    scene.write("vda", 0, MIB, 0x31);
    scene.crash();
    let (second, said) = scene.backup(Options::new()).await;
    // The service removed the inconsistent bitmap when the domain connected again.
    assert_eq!(said, ["vda full no-bitmap", "vdb full no-bitmap"]);
    // A disk of another size.
    let resize = json!({ "node-name": scene.vm().node_name("vdb"), "size": 2 * SIZE });
    scene.vm().qmp("block_resize", resize);
    scene.now.get_mut("vdb").unwrap().resize(2 * SIZE as usize, 0);
    let (third, said) = scene.backup(Options::new()).await;
    let since = |id: &str| format!("vda incremental {id}");
    assert_eq!(said, [since(&second), "vdb full resized".to_owned()]);
    assert_eq!(scene.manifest(&third)["kind"], "incremental");
    // Another image above it, as after an external snapshot.
    let overlay = scene.system.dir().join("overlay.qcow2");
    let snapshot = json!({ "node-name": scene.vm().node_name("vdb"), "snapshot-file": overlay, "format": "qcow2",
        "snapshot-node-name": "vdb-overlay" });
    scene.vm().qmp("blockdev-snapshot-sync", snapshot);
    scene.write("vdb", MIB, MIB, 0x32);
    let (fourth, said) = scene.backup(Options::new()).await;
    assert_eq!(said, [since(&third), "vdb full no-bitmap".to_owned()]);
    // From then on the chain continues as usual.
    scene.write("vdb", 3 * MIB, MIB, 0x33);
    let (_, said) = scene.backup(Options::new()).await;
    assert_eq!(said, DISKS.map(|disk| format!("{disk} incremental {fourth}")));
    scene.check();

    // With an explicit base it is an error, and nothing changes.
    let caller = Caller::new(&scene.system).await;
    let before = (scene.vm().checkpoints("vda"), scene.vm().residue());
    for (since, name, words) in [
        ("tuesday", "NoSuchCheckpoint", &["'tuesday'"][..]),
        (&first, "CannotIncrement", &[&first, "vda"]),
    ] {
        let refused = caller
            .try_start("web", "", &[], incremental(since))
            .await
            .unwrap_err();
        assert_eq!(
            error_name(&refused),
            format!("org.example.Backup1.Error.{name}"),
            "{refused}"
        );
        assert!(
            words.iter().all(|word| refused.to_string().contains(word)),
            "{refused}"
        );
    }
    assert_eq!((scene.vm().checkpoints("vda"), scene.vm().residue()), before);
    scene.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_image_is_never_used_as_a_base() {
    let mut scene = Recorded::new();
    let (first, _) = scene.backup(Options::new()).await;
    scene.write("vda", 0, MIB, 0x31);
    let (second, _) = scene.backup(Options::new()).await;
    // The first image is truncated: the second, which depends on it, is damaged too.
    let image = scene.image(&first, "vda");
    let whole = std::fs::read(&image).unwrap();
    std::fs::write(&image, &whole[..whole.len() - 1]).unwrap();
    let (third, said) = scene.backup(Options::new()).await;
    assert_eq!(
        said,
        ["vda full damaged".to_owned(), format!("vdb incremental {second}")]
    );
    std::fs::write(&image, &whole).unwrap();
    // An administrator removes the newest: the next backup continues from the one before.
    std::fs::remove_dir_all(scene.system.store().join("web").join(&third)).unwrap();
    scene.backups.remove(&third);
    scene.write("vda", MIB, MIB, 0x32);
    let (_, said) = scene.backup(Options::new()).await;
    assert_eq!(said, DISKS.map(|disk| format!("{disk} differential {second}")));
    scene.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_removed_during_a_backup_fails_it() {
    let mut scene = Recorded::new();
    let (first, _) = scene.backup(Options::new()).await;
    scene.write("vda", 0, 2 * MIB, 0x31);
    let caller = Caller::new(&scene.system).await;
    let slow = Options::from([("bandwidth", Variant::from(1u64))]);
    let job = caller.start_with("web", "", &[], slow).await;
    let directory = scene.system.store().join("web").join(&first);
    let aside = scene.system.dir().join("aside");
    std::fs::rename(&directory, &aside).unwrap();
    job.set_speed(0).await.unwrap();
    assert_failed(&job, "CannotIncrement", &first).await;
    std::fs::rename(&aside, &directory).unwrap();
    let (_, said) = scene.backup(Options::new()).await;
    assert_eq!(said, DISKS.map(|disk| format!("{disk} incremental {first}")));
    scene.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_are_limited_and_foreign_bitmaps_stay() {
    let mut scene = Recorded::with(System::setup().table("[store.none]\npath = \"/mnt\"\ncheckpoints = 0"));
    let node = scene.vm().node_name("vda");
    for name in ["libvirt-1", "backupd-mine"] {
        let arguments = json!({ "node": node, "name": name, "persistent": true });
        scene.vm().qmp("block-dirty-bitmap-add", arguments);
    }
    let before = scene.vm().residue();
    let mut ids = Vec::new();
    for pattern in 1..=6 {
        scene.write("vda", 0, MIB, pattern);
        ids.push(scene.backup(Options::new()).await.0);
    }
    let newest: Vec<&str> = ids[2..].iter().map(String::as_str).collect();
    scene.assert_checkpoints(&newest);
    assert_eq!(scene.vm().residue(), before);
    // A full backup that was requested can be a base too.
    let (full, said) = scene.backup(incremental("full")).await;
    assert_eq!(said, ["vda full requested", "vdb full requested"]);
    scene.write("vda", MIB, MIB, 0x99);
    let (_, said) = scene.backup(Options::new()).await;
    assert_eq!(said, DISKS.map(|disk| format!("{disk} incremental {full}")));
    scene.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_chooses_the_base_of_each_disk() {
    let mut scene = Recorded::new();
    let (first, _) = scene.backup(Options::new()).await;
    scene.write("vda", 0, MIB, 0x31);
    let (second, _) = scene.backup(Options::new()).await;
    scene.write("vda", MIB, MIB, 0x32);
    let caller = Caller::new(&scene.system).await;
    let document = format!(
        "<domainbackup><incremental>{first}</incremental><disks><disk name='vda'/>\
         <disk name='vdb' backupmode='full'/></disks></domainbackup>"
    );
    let job = caller.complete("web", &document).await;
    let (third, said) = scene.record(&job).await;
    assert_eq!(
        said,
        [
            format!("vda differential {first}"),
            "vdb full requested".to_owned()
        ]
    );
    let resolved = job.get_definition().await.unwrap();
    for words in [
        format!("<disk name='vda' backup='yes' backupmode='incremental' incremental='{first}'>"),
        "<disk name='vdb' backup='yes' backupmode='full'>".to_owned(),
    ] {
        assert!(resolved.contains(&words), "{resolved}");
    }
    // Each disk has its own base.
    let document = format!(
        "<domainbackup><disks><disk name='vda' incremental='{second}'/>\
         <disk name='vdb' backupmode='incremental'/></disks></domainbackup>"
    );
    let job = caller.complete("web", &document).await;
    let (_, said) = scene.record(&job).await;
    assert_eq!(
        said,
        [
            format!("vda differential {second}"),
            format!("vdb incremental {third}")
        ]
    );
    scene.check();
    // Contradictory documents, and bases without a store, are refused.
    let full = incremental("full");
    let refused = caller.try_start("web", &document, &[], full).await.unwrap_err();
    assert_eq!(
        error_name(&refused),
        "org.freedesktop.DBus.Error.InvalidArgs",
        "{refused}"
    );
    let outside = format!(
        "<domainbackup><incremental>{first}</incremental><disks><disk name='vda'>\
         <target file='{}/x.qcow2'/></disk></disks></domainbackup>",
        scene.system.dir().display()
    );
    let refused = caller
        .try_start("web", &outside, &[], Options::new())
        .await
        .unwrap_err();
    assert_eq!(
        error_name(&refused),
        "org.example.Backup1.Error.Unsupported",
        "{refused}"
    );
    let raw = "<domainbackup><disks><disk name='vda' backupmode='incremental'><driver type='raw'/></disk></disks>\
               </domainbackup>";
    let refused = caller
        .try_start("web", raw, &[], Options::new())
        .await
        .unwrap_err();
    assert_eq!(
        error_name(&refused),
        "org.example.Backup1.Error.CannotIncrement",
        "{refused}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_that_swap_names_continue_from_their_own_images() {
    let mut scene = Recorded::new();
    scene.write("vda", 0, MIB, 0xaa);
    scene.write("vdb", 0, MIB, 0xbb);
    let (first, _) = scene.backup(Options::new()).await;
    scene.vm.take().unwrap().quit();
    let image = |disk: &str| scene.system.dir().join("web").join(format!("{disk}.qcow2"));
    let aside = scene.system.dir().join("aside");
    for (from, to) in [
        (image("vda"), aside.clone()),
        (image("vdb"), image("vda")),
        (aside, image("vdb")),
    ] {
        std::fs::rename(from, to).unwrap();
    }
    let (a, b) = (scene.now["vda"].clone(), scene.now["vdb"].clone());
    scene.now = [("vda", b), ("vdb", a)].into();
    scene.boot();
    scene.write("vda", MIB, MIB, 0xcc);
    let (second, said) = scene.backup(Options::new()).await;
    assert_eq!(said, DISKS.map(|disk| format!("{disk} incremental {first}")));
    assert_eq!(scene.manifest(&second)["disks"][0]["parent"]["file"], "vdb.qcow2");
    scene.check();
}
