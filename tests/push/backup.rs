//! Successful backups: the contents and locations of the images, and the reports to the caller.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::common::System;
use crate::common::caller::{Caller, assert_completed, brief};
use crate::common::chain::{directories, id};
use crate::common::disk::Disk;
use crate::common::proxies::{Options, slowly};
use crate::common::storage::{LoopDevice, files_below, holds, identical};
use crate::common::vm::Vm;
use backupd::model::Manifest;
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;

/// Starts a VM `web` that has two disks with data.
fn web(system: &System) -> Vm {
    system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", 64 * MIB).fill(0, 16 * MIB, 0x11))
            .disk(Disk::new("vdb", 32 * MIB).raw().fill(8 * MIB, 4 * MIB, 0x22))
            // QEMU up to version 8 keeps passed descriptors while the VM is stopped.
            .running(),
    )
}

/// Returns the directory of the only backup of `domain` in a store.
fn only_backup(store: &Path, domain: &str) -> PathBuf {
    let mut entries = fs::read_dir(store.join(domain)).expect("the domain has backups");
    let path = entries.next().expect("there is a backup").unwrap().path();
    assert!(entries.next().is_none(), "there is one backup only");
    path
}

/// Checks that the digest of each image in the manifest equals that of `b3sum`.
fn assert_digests(backup: &Path) {
    let manifest = fs::read(backup.join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    for disk in manifest["disks"].as_array().unwrap() {
        let image = fs::read(backup.join(disk["file"].as_str().unwrap())).unwrap();
        assert_eq!(disk["length"], image.len(), "{disk}");
        assert_eq!(disk["blake3"], *blake3::hash(&image).to_hex(), "{disk}");
    }
}

fn document(disks: &str) -> String {
    format!("<domainbackup><disks>{disks}</disks></domainbackup>")
}

fn open(path: &Path) -> OwnedFd {
    fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
        .into()
}

#[tokio::test(flavor = "multi_thread")]
async fn all_disks_of_a_running_machine_are_copied_into_the_default_store() {
    let system = System::start();
    let mut vm = web(&system);
    let before = vm.residue();
    let mut caller = Caller::new(&system).await;

    let job = caller.start("web", "").await;
    let signals = caller.signals_until("JobEnded").await;
    let path = job.inner().path().as_str();
    assert_eq!(
        brief(&signals),
        [
            format!("JobStarted 1 {path}"),
            // The holes of a qcow2 image are not scanned; those of a raw image are.
            format!("BlockJobCompleted vda {}", 16 * MIB),
            format!("BlockJobCompleted vdb {}", 32 * MIB),
            "Completed completed".to_owned(),
            format!("JobEnded 1 {path} completed"),
        ]
    );
    assert_eq!(vm.residue(), before, "the service left residue in QEMU");

    let backup = only_backup(&system.store(), "web");
    assert_eq!(
        files_below(&backup),
        ["backup.xml", "manifest.json", "vda.qcow2", "vdb.qcow2"]
    );
    let id = backup.file_name().unwrap().to_str().unwrap();
    let written = fs::read(backup.join("manifest.json")).unwrap();
    let manifest = Manifest::parse(&written).unwrap();
    assert_eq!(manifest.to_json().unwrap(), written);
    assert_eq!(manifest.id, id);
    assert_eq!(manifest.job, 1);
    assert_eq!(manifest.started_by, rustix::process::getuid().as_raw());
    let manifest: serde_json::Value = serde_json::from_slice(&written).unwrap();
    assert_eq!(manifest["domain"]["name"], "web");
    assert_eq!(manifest["domain"]["uuid"], vm.uuid());
    assert_eq!(manifest["disks"][1]["file"], "vdb.qcow2");
    assert_eq!(manifest["disks"][1]["virtual-size"], 32 * MIB);
    let resolved = fs::read_to_string(backup.join("backup.xml")).unwrap();
    assert_eq!(resolved, job.get_definition().await.unwrap());
    assert!(resolved.contains("<store name='default'/>"), "{resolved}");

    vm.quit();
    for disk in ["vda", "vdb"] {
        let image = backup.join(format!("{disk}.qcow2"));
        assert!(
            identical(&image, "qcow2", vm.source_path(disk), vm.source_format(disk)),
            "{disk}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_after_the_point_in_time_are_not_in_the_images() {
    let system = System::start();
    let mut vm = web(&system);
    for disk in ["vda", "vdb"] {
        vm.flush(disk);
        let copy = system.dir().join(format!("{disk}.then"));
        fs::copy(vm.source_path(disk), copy).unwrap();
    }
    let caller = Caller::new(&system).await;
    let options = slowly(8 * MIB);
    let job = caller.start_with("web", "", &[], options).await;
    // QEMU runs the jobs, so the point in time has passed.
    for _ in 0..2 {
        vm.wait_event("JOB_STATUS_CHANGE", |data| {
            data["status"] == "running" && !data["id"].as_str().unwrap().ends_with("create")
        });
    }
    for round in 0..16 {
        vm.write("vda", round * 4 * MIB, MIB, 0xaa);
        vm.write("vdb", round * 2 * MIB, MIB, 0xbb);
    }
    assert_eq!(
        job.state().await.unwrap(),
        "running",
        "the writes came during the backup"
    );
    job.set_speed(0).await.unwrap();
    assert_completed(&job).await;
    vm.quit();
    let backup = only_backup(&system.store(), "web");
    for disk in ["vda", "vdb"] {
        let (image, format) = (backup.join(format!("{disk}.qcow2")), vm.source_format(disk));
        let then = system.dir().join(format!("{disk}.then"));
        assert!(identical(&image, "qcow2", &then, format), "{disk} is as it was");
        assert!(
            !identical(&image, "qcow2", vm.source_path(disk), format),
            "{disk} has changed since"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_listed_disks_are_copied_and_the_store_is_the_named_one() {
    let nightly = tempfile::tempdir().unwrap();
    let system = System::setup().store("nightly", nightly.path()).start();
    let mut vm = web(&system);
    let caller = Caller::new(&system).await;
    let text = "<domainbackup><name>before-upgrade</name><store name='nightly'/>
        <disks><disk name='vdb'><driver type='raw'/></disk><disk name='vda' backup='no'/></disks></domainbackup>";
    let job = caller.complete("web", text).await;
    let disks = job.disks().await.unwrap();
    assert_eq!(disks.len(), 1);
    let backup = only_backup(nightly.path(), "web");
    assert_eq!(files_below(&backup), ["backup.xml", "manifest.json", "vdb.raw"]);
    assert_eq!(Path::new(&disks[0].4), backup.join("vdb.raw"));
    let manifest = fs::read_to_string(backup.join("manifest.json")).unwrap();
    assert!(manifest.contains("\"name\": \"before-upgrade\""), "{manifest}");
    let definition = job.get_definition().await.unwrap();
    assert!(
        definition.contains("<disk name='vda' backup='no'/>"),
        "{definition}"
    );
    vm.quit();
    assert!(identical(
        &backup.join("vdb.raw"),
        "raw",
        vm.source_path("vdb"),
        "raw"
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_image_keeps_the_holes_of_its_source() {
    let system = System::start();
    let mut vm = system
        .vm("web")
        .disk(Disk::new("vda", 512 * MIB).fill(100 * MIB, MIB, 0x33))
        .disk(Disk::new("vdb", 512 * MIB).raw().fill(200 * MIB, MIB, 0x44))
        .start();
    system.domain_file("web", &vm);
    system.wait_for_domain("web");
    let caller = Caller::new(&system).await;
    let text =
        document("<disk name='vda'><driver type='raw'/></disk><disk name='vdb'><driver type='raw'/></disk>");
    caller.complete("web", &text).await;
    let backup = only_backup(&system.store(), "web");
    vm.quit();
    for disk in ["vda", "vdb"] {
        let image = backup.join(format!("{disk}.raw"));
        let metadata = fs::metadata(&image).unwrap();
        assert_eq!(metadata.len(), 512 * MIB);
        assert!(
            metadata.blocks() * 512 < 8 * MIB,
            "{disk}: {} blocks",
            metadata.blocks()
        );
        assert_eq!(metadata.mode() & 0o777, 0o600);
        assert!(identical(
            &image,
            "raw",
            vm.source_path(disk),
            vm.source_format(disk)
        ));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_holes_of_a_huge_disk_cost_neither_time_nor_space_nor_bandwidth() {
    const TIB: u64 = 1 << 40;
    let system = System::start();
    let data = [(0, 0x11), (9 * TIB + MIB / 2, 0x22), (16 * TIB - MIB / 16, 0x33)];
    let disk = Disk::new("vda", 16 * TIB);
    let disk = data.into_iter().fold(disk, |disk, (offset, pattern)| {
        disk.fill(offset, MIB / 16, pattern)
    });
    let mut vm = system.configured(system.vm("web").disk(disk).running());
    let mut caller = Caller::new(&system).await;
    // If holes counted, this would take half a year.
    let job = caller.start_with("web", "", &[], slowly(MIB)).await;
    assert_completed(&job).await;
    let signals = brief(&caller.signals_until("JobEnded").await);
    // One cluster of the image for each.
    assert!(
        signals.contains(&format!("BlockJobCompleted vda {}", 3 * MIB)),
        "{signals:?}"
    );
    let image = only_backup(&system.store(), "web").join("vda.qcow2");
    // Most of it is the L1 table.
    let taken = fs::metadata(&image).unwrap().blocks() * 512;
    assert!(taken < 32 * MIB, "{taken}");
    for (offset, pattern) in data {
        assert!(holds(&image, "qcow2", offset, MIB / 16, pattern), "{offset}");
    }
    vm.write("vda", 5 * TIB, MIB / 16, 0x44);
    vm.write("vda", 9 * TIB, MIB / 16, 0x55);
    assert_completed(&caller.start("web", "").await).await;
    vm.quit();
    let newest = directories(&system.store().join("web")).remove(1);
    assert!(identical(
        &newest.join("vda.qcow2"),
        "qcow2",
        vm.source_path("vda"),
        "qcow2"
    ));
    // A restored image is as small.
    let restored = system.dir().join("restored.qcow2");
    let disk = format!("vda={}", restored.display());
    let output = system
        .clients()
        .backupctl(0, &["restore", &id(&newest), "--disk", &disk]);
    assert_eq!(output.status, 0, "{}", output.stderr);
    let taken = fs::metadata(&restored).unwrap().blocks() * 512;
    assert!(taken < 8 * MIB, "{taken}");
    assert!(identical(&restored, "qcow2", vm.source_path("vda"), "qcow2"));
}

/// Copies disks of every format that QEMU writes into every kind of target.
#[tokio::test(flavor = "multi_thread")]
async fn allocated_clusters_are_copied_and_others_become_holes() {
    for format in ["qcow2", "qed", "vmdk", "vdi", "vhdx", "parallels"] {
        let system = System::start();
        let disk = Disk::new("vda", 64 * MIB).format(format).fill(5 * MIB, MIB, 0x11);
        let mut vm = system.configured(system.vm("web").disk(disk.fill(63 * MIB, MIB, 0x22)).running());
        let caller = Caller::new(&system).await;
        // The old content of the target is not in the backup.
        let old = system.dir().join("device");
        fs::write(&old, vec![0xff; 64 << 20]).unwrap();
        let device = LoopDevice::attach(&old, 64 * MIB);
        let mut images = Vec::new();
        for (format, target) in [("qcow2", None), ("raw", None), ("raw", Some(device.device()))] {
            let place = target.map_or(String::new(), |path| {
                format!("<target dev='{}'/>", path.display())
            });
            let kind = target.map_or("", |_| " type='block'");
            let text = format!("<disk name='vda'{kind}><driver type='{format}'/>{place}</disk>");
            let job = caller.complete("web", &document(&text)).await;
            images.push((PathBuf::from(&job.disks().await.unwrap()[0].4), format));
        }
        vm.quit();
        for (image, kind) in images {
            let source = vm.source_path("vda");
            assert!(
                identical(&image, kind, source, format),
                "{format} into {}",
                image.display()
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn data_below_an_overlay_is_copied_too() {
    let system = System::start();
    let dir = system.dir().join("chain");
    fs::create_dir(&dir).unwrap();
    let qemu_img = |arguments: &[&str]| {
        crate::common::process::run({
            let mut command = crate::common::process::bound("qemu-img");
            command.args(arguments);
            command
        })
        .expect_success()
    };
    let (base, top) = (dir.join("base.qcow2"), dir.join("top.qcow2"));
    let (base, top) = (base.to_str().unwrap(), top.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", base, "16M"]);
    let mut command = crate::common::process::bound("qemu-io");
    command.args(["-f", "qcow2", "-c", "write -P 0x55 0 4M", base]);
    crate::common::process::run(command).expect_success();
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top]);
    let mut vm = system
        .vm("web")
        .disk(Disk::new("vda", 16 * MIB).at(Path::new(top)))
        .start();
    vm.write("vda", 8 * MIB, MIB, 0x66);
    system.domain_file("web", &vm);
    system.wait_for_domain("web");
    let caller = Caller::new(&system).await;
    for format in ["qcow2", "raw"] {
        let text = document(&format!("<disk name='vda'><driver type='{format}'/></disk>"));
        let job = caller.complete("web", &text).await;
        let image = PathBuf::from(&job.disks().await.unwrap()[0].4);
        assert!(holds(&image, format, 0, 4 * MIB, 0x55), "{format}");
        assert!(holds(&image, format, 8 * MIB, MIB, 0x66), "{format}");
    }
    vm.quit();
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_images_hold_the_same_in_less() {
    let system = System::start();
    let mut vm = web(&system);
    let caller = Caller::new(&system).await;
    for compression in ["zstd", "zlib"] {
        let text = document(&format!(
            "<disk name='vda'><driver type='qcow2' compress='{compression}'/></disk>"
        ));
        let job = caller.complete("web", &text).await;
        let image = PathBuf::from(&job.disks().await.unwrap()[0].4);
        let taken = fs::metadata(&image).unwrap().blocks() * 512;
        assert!(taken < 8 * MIB, "16 MiB of one byte take less than {taken}");
        assert!(holds(&image, "qcow2", 0, 16 * MIB, 0x11));
        assert!(
            job.get_definition()
                .await
                .unwrap()
                .contains(&format!("compress='{compression}'"))
        );
    }
    vm.quit();
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_the_caller_names_appear_when_they_are_good() {
    let system = System::start();
    let mut vm = web(&system);
    let before = vm.residue();
    let caller = Caller::new(&system).await;
    let dir = system.dir().join("mine");
    fs::create_dir(&dir).unwrap();
    let text = document(&format!(
        "<disk name='vda' type='file'><target file='{0}/a.qcow2'/></disk>
         <disk name='vdb' type='file'><driver type='raw'/><target file='{0}/b.raw'/></disk>",
        dir.display()
    ));
    let job = caller.complete("web", &text).await;
    assert_eq!(files_below(&dir), ["a.qcow2", "b.raw"]);
    assert_eq!(files_below(&system.store()), [""; 0]);
    assert_eq!(
        job.disks().await.unwrap()[0].4,
        format!("{}/a.qcow2", dir.display())
    );
    assert_eq!(vm.residue(), before);
    vm.quit();
    assert!(identical(
        &dir.join("a.qcow2"),
        "qcow2",
        vm.source_path("vda"),
        "qcow2"
    ));
    assert!(identical(&dir.join("b.raw"), "raw", vm.source_path("vdb"), "raw"));
}

#[tokio::test(flavor = "multi_thread")]
async fn existing_files_are_written_into_where_the_caller_says_so() {
    let system = System::start();
    let mut vm = web(&system);
    let caller = Caller::new(&system).await;
    let (a, b) = (system.dir().join("a.qcow2"), system.dir().join("b.raw"));
    let mut command = crate::common::process::bound("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", a.to_str().unwrap(), "64M"]);
    crate::common::process::run(command).expect_success();
    fs::write(&b, vec![0xff; 32 << 20]).unwrap();
    let text = document(&format!(
        "<disk name='vda'><target file='{}'/></disk>
         <disk name='vdb'><driver type='raw'/><target file='{}'/></disk>",
        a.display(),
        b.display()
    ));
    let options = || Options::from([("reuse-external", Variant::from(true))]);
    let job = caller.start_with("web", &text, &[], options()).await;
    assert_completed(&job).await;
    // Backs up again into the existing files.
    let job = caller.start_with("web", &text, &[], options()).await;
    assert_completed(&job).await;
    vm.quit();
    assert!(identical(&a, "qcow2", vm.source_path("vda"), "qcow2"));
    assert!(identical(&b, "raw", vm.source_path("vdb"), "raw"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_callers_own_descriptors_are_written() {
    let system = System::start();
    let mut vm = web(&system);
    let before = vm.residue();
    let caller = Caller::new(&system).await;
    let (a, b) = (system.dir().join("own-a"), system.dir().join("own-b"));
    let text = document(
        "<disk name='vda' type='fd'><target fd='1'/></disk>
         <disk name='vdb' type='fd'><driver type='raw'/><target fd='0'/></disk>",
    );
    let job = caller
        .start_with("web", &text, &[open(&b), open(&a)], Options::new())
        .await;
    assert_completed(&job).await;
    assert_eq!(job.disks().await.unwrap()[0].4, "fd:1");
    assert_eq!(vm.residue(), before);
    vm.quit();
    assert!(identical(&a, "qcow2", vm.source_path("vda"), "qcow2"));
    assert!(identical(&b, "raw", vm.source_path("vdb"), "raw"));
}

#[tokio::test(flavor = "multi_thread")]
async fn block_devices_are_written_and_may_be_larger_than_the_disk() {
    let system = System::start();
    let mut vm = web(&system);
    let before = vm.residue();
    let caller = Caller::new(&system).await;
    let one = LoopDevice::attach(&system.dir().join("one.img"), 80 * MIB);
    let other = LoopDevice::attach(&system.dir().join("other.img"), 48 * MIB);
    let text = document(&format!(
        "<disk name='vda' type='block'><target dev='{}'/></disk>
         <disk name='vdb' type='block'><driver type='raw'/><target dev='{}'/></disk>",
        one.device().display(),
        other.device().display()
    ));
    caller.complete("web", &text).await;
    assert_eq!(vm.residue(), before);
    // Backs up into the caller's own descriptors.
    let text = document(
        "<disk name='vda' type='fd'><target fd='0'/></disk>
         <disk name='vdb' type='fd'><driver type='raw'/><target fd='1'/></disk>",
    );
    let files = [open(one.device()), open(other.device())];
    let job = caller.start_with("web", &text, &files, Options::new()).await;
    assert_completed(&job).await;
    vm.quit();
    assert!(identical(one.device(), "qcow2", vm.source_path("vda"), "qcow2"));
    let half = fs::File::open(other.device()).unwrap();
    let copy = system.dir().join("other.cut");
    let mut head = std::io::Read::take(half, 32 * MIB);
    std::io::copy(&mut head, &mut fs::File::create(&copy).unwrap()).unwrap();
    assert!(identical(&copy, "raw", vm.source_path("vdb"), "raw"));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_machines_are_backed_up_at_the_same_time() {
    let system = System::start();
    let mut machines: Vec<Vm> = ["one", "two"]
        .into_iter()
        .map(|name| {
            let disk = Disk::new("vda", 32 * MIB).fill(0, 8 * MIB, 0x77);
            system.configured(system.vm(name).disk(disk))
        })
        .collect();
    let caller = Caller::new(&system).await;
    let options = || slowly(MIB);
    let first = caller.start_with("one", "", &[], options()).await;
    let second = caller.start_with("two", "", &[], options()).await;
    for job in [&first, &second] {
        crate::common::wait::until_async("both to run", || async {
            (job.state().await.unwrap() == "running").then_some(())
        })
        .await;
    }
    assert_eq!(first.state().await.unwrap(), "running");
    for job in [&first, &second] {
        job.set_speed(0).await.unwrap();
    }
    assert_completed(&first).await;
    assert_completed(&second).await;
    for vm in &mut machines {
        vm.quit();
        let image = only_backup(&system.store(), vm.name()).join("vda.qcow2");
        assert!(identical(&image, "qcow2", vm.source_path("vda"), "qcow2"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backup_of_a_caller_that_leaves_at_once_is_made() {
    let system = System::start();
    let mut vm = web(&system);
    let caller = Caller::new(&system).await;
    let job = caller.start("web", "").await;
    let path = job.inner().path().to_owned();
    drop(job);
    caller.connection.close().await.unwrap();
    let late = Caller::new(&system).await;
    assert_completed(&late.job(path.into()).await).await;
    vm.quit();
    let image = only_backup(&system.store(), "web").join("vda.qcow2");
    assert!(identical(&image, "qcow2", vm.source_path("vda"), "qcow2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_rate_and_end_are_signalled_during_a_backup() {
    let system = System::start();
    let vm = web(&system);
    let caller = Caller::new(&system).await;
    let options = slowly(4 * MIB);
    let job = caller.start_with("web", "", &[], options).await;
    crate::common::wait::until_async("some progress", || async {
        let (rate, end) = (job.rate().await.unwrap(), job.expected_end_time().await.unwrap());
        (job.progress().await.unwrap() > 0.0 && rate > 0 && end > 0).then_some(())
    })
    .await;
    // The data of vda, and all of vdb, which is raw.
    assert_eq!(job.bytes().await.unwrap(), 48 * MIB);
    assert!(job.bytes_done().await.unwrap() < 48 * MIB);
    let jobs = caller.manager.list_jobs().await.unwrap();
    assert_eq!(
        (jobs[0].0, jobs[0].2.as_str(), jobs[0].3.as_str()),
        (1, "web", "running")
    );
    // The limit applies to all disks together.
    let speeds: Vec<u64> = vm
        .qmp("query-block-jobs", serde_json::json!({}))
        .as_array()
        .unwrap()
        .iter()
        .map(|job| job["speed"].as_u64().unwrap())
        .collect();
    assert_eq!(speeds, [2 * MIB, 2 * MIB]);
    job.set_speed(0).await.unwrap();
    assert_completed(&job).await;
    assert_eq!(job.progress().await.unwrap(), 1.0);
    assert_eq!(job.rate().await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn descriptors_that_a_stopped_machine_keeps_go_with_the_next_backup() {
    let system = System::start();
    let vm = system.configured(system.vm("web").disk(Disk::new("vda", 16 * MIB)));
    let before = vm.residue();
    let caller = Caller::new(&system).await;
    caller.complete("web", "").await;
    let stopped = vm.residue();
    assert_eq!(
        (&stopped.jobs, &stopped.nodes, &stopped.bitmaps),
        (&before.jobs, &before.nodes, &before.bitmaps)
    );
    vm.cont();
    caller.complete("web", "").await;
    assert_eq!(vm.residue(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_digest_is_of_the_published_file_though_the_guest_writes_all_the_time() {
    let system = System::start();
    let vm = system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", 256 * MIB).fill(0, 128 * MIB, 0x11))
            .disk(Disk::new("vdb", 64 * MIB).raw().fill(0, 64 * MIB, 0x22))
            .running(),
    );
    let caller = Caller::new(&system).await;
    let raw = document("<disk name='vdb' ><driver type='raw'/></disk><disk name='vda'/>");
    for document in [String::new(), raw] {
        // Slow enough for many early write-backs, while the guest's writes make QEMU copy areas out of order.
        let job = caller.start_with("web", &document, &[], slowly(64 * MIB)).await;
        let mut writes = 0;
        while job.state().await.unwrap() == "running" {
            let at = (writes * 37) % 128 * MIB;
            vm.write("vda", at, MIB, writes as u8);
            vm.write("vdb", at / 2, MIB / 2, writes as u8);
            writes += 1;
        }
        assert!(writes > 4, "the guest wrote {writes} times");
        assert_completed(&job).await;
        assert_digests(Path::new(&job.disks().await.unwrap()[0].4).parent().unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_is_mostly_empty_takes_little_of_the_store() {
    let system = System::start();
    let mut disk = Disk::new("vda", 256 * MIB);
    for part in 0..64 {
        disk = disk.fill(part * 4 * MIB, 64 << 10, part as u8 + 1);
    }
    let vm = system.configured(system.vm("web").disk(disk).running());
    let caller = Caller::new(&system).await;
    let job = caller.complete("web", "").await;
    let image = PathBuf::from(&job.disks().await.unwrap()[0].4);
    let taken = image.metadata().unwrap().blocks() * 512;
    // The data and the tables; a cluster is 1 MiB.
    assert!(taken < 8 * MIB, "{taken} bytes for 4 MiB of data");
    assert_digests(image.parent().unwrap());
    let mut vm = vm;
    vm.quit();
    assert!(identical(
        &image,
        "qcow2",
        vm.source_path("vda"),
        vm.source_format("vda")
    ));
}
