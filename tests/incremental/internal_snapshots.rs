//! Checkpoints can block operations on a disk: reverting to an internal snapshot, and resizing after a crash. These
//! tests show how the service removes the obstacles.

use std::process::Command;

use crate::common::caller::{Caller, assert_completed};
use crate::common::clients::ROOT;
use crate::common::proxies::{DomainProxy, Options, error_name};
use crate::common::recorded::{DISKS, Recorded, SIZE};
use crate::common::{process, wait};
use serde_json::json;
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;

fn take_snapshot(scene: &Recorded, disk: &str) {
    let device = scene.vm().node_name(disk);
    let snapshot = json!({ "device": device, "name": "s1" });
    scene.vm().qmp("blockdev-snapshot-internal-sync", snapshot);
}

/// Stops QEMU and reverts the disk to the snapshot with `qemu-img`.
#[track_caller]
fn revert(scene: &mut Recorded, disk: &str) {
    let image = scene.vm().source_path(disk).to_owned();
    scene.vm.take().unwrap().quit();
    let mut revert = Command::new("qemu-img");
    revert.args(["snapshot", "-a", "s1"]).arg(image);
    process::run(revert).expect_success();
}

async fn domain(scene: &Recorded) -> DomainProxy<'static> {
    let caller = Caller::new(&scene.system).await;
    let path = caller.manager.get_domain("web").await.unwrap();
    DomainProxy::new(&caller.connection, path).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_with_internal_snapshots_gets_no_checkpoint_and_can_be_reverted() {
    let mut scene = Recorded::new();
    take_snapshot(&scene, "vda");
    let at_the_snapshot = scene.now["vda"].clone();
    let (first, said) = scene.backup(Options::new()).await;
    assert_eq!(said, ["vda full first", "vdb full first"]);
    assert_eq!(scene.vm().checkpoints("vda"), [""; 0]);
    assert_eq!(scene.vm().checkpoints("vdb"), [format!("backupd-{first}-1")]);
    scene.write("vda", 0, MIB, 0x21);
    let (_, said) = scene.backup(Options::new()).await;
    assert_eq!(
        said,
        [
            "vda full internal-snapshots".to_owned(),
            format!("vdb incremental {first}")
        ]
    );
    revert(&mut scene, "vda");
    scene.boot();
    scene.now.insert("vda", at_the_snapshot);
    scene.backup(Options::new()).await;
    scene.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_removes_bitmaps_that_block_the_revert_to_a_newer_snapshot() {
    let mut scene = Recorded::new();
    let (first, _) = scene.backup(Options::new()).await;
    take_snapshot(&scene, "vda");
    scene.write("vda", 0, MIB, 0x21);
    let (second, said) = scene.backup(Options::new()).await;
    // The bitmap so far is valid for this backup.
    assert_eq!(said, DISKS.map(|disk| format!("{disk} incremental {first}")));
    assert_eq!(scene.vm().checkpoints("vda"), [""; 0]);
    assert_eq!(scene.vm().sentinels("vda"), [""; 0]);
    let mut both = [&first, &second].map(|id| format!("backupd-{id}-1"));
    // Ids of the same second have no order.
    both.sort();
    assert_eq!(scene.vm().checkpoints("vdb"), both);
    scene.check();
    revert(&mut scene, "vda");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_domains_file_can_ask_for_checkpoints_over_snapshots() {
    let mut scene = Recorded::new();
    let monitor = scene.vm().monitor_path();
    let file = format!("monitor = \"{}\"\ncheckpoints = \"always\"\n", monitor.display());
    let former = scene.system.domain_path("web").unwrap();
    scene.system.write_domain_file("web", &file);
    wait::until("the domain to be another", || {
        (scene.system.domain_path("web")? != former).then_some(())
    });
    scene.system.wait_for_domain("web");
    take_snapshot(&scene, "vda");
    let (first, _) = scene.backup(Options::new()).await;
    scene.write("vda", 0, MIB, 0x21);
    let (second, said) = scene.backup(Options::new()).await;
    assert_eq!(said, DISKS.map(|disk| format!("{disk} incremental {first}")));
    scene.assert_checkpoints(&[&first, &second]);
    scene.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn all_checkpoints_are_deleted_at_once_including_unknown_ones() {
    let mut scene = Recorded::new();
    scene.backup(Options::new()).await;
    let domain = domain(&scene).await;
    domain.create_checkpoint("", Options::new()).await.unwrap();
    // A bitmap of another service, and one of another tool.
    for name in ["backupd-20200101T000000Z-0123abcd-0", "backupd-mine"] {
        let node = scene.vm().node_name("vda");
        let bitmap = json!({ "node": node, "name": name, "persistent": true });
        scene.vm().qmp("block-dirty-bitmap-add", bitmap);
    }
    assert_eq!(domain.list_checkpoints(Options::new()).await.unwrap().len(), 3);
    let refused = domain.delete_checkpoint("x", Options::from([("all", Variant::from(true))]));
    assert_eq!(
        error_name(&refused.await.unwrap_err()),
        "org.freedesktop.DBus.Error.InvalidArgs"
    );
    let clients = scene.system.clients();
    let said = clients.backupctl(ROOT, &["checkpoint", "delete", "web", "--all"]);
    assert_eq!(said.expect_success(), "All checkpoints of web are deleted\n");
    assert_eq!(domain.list_checkpoints(Options::new()).await.unwrap(), []);
    for disk in DISKS {
        assert_eq!(scene.vm().checkpoints(disk), [""; 0], "{disk}");
        assert_eq!(scene.vm().sentinels(disk), [""; 0], "{disk}");
    }
    let residue = scene.vm().residue();
    assert!(
        residue.bitmaps.iter().any(|name| name.ends_with("/backupd-mine")),
        "{residue:?}"
    );
    // The backups stay, and the next one is full.
    let (_, said) = scene.backup(Options::new()).await;
    assert_eq!(said, DISKS.map(|disk| format!("{disk} full no-bitmap")));
    scene.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn useless_bitmaps_are_removed_when_the_domain_connects() {
    let mut scene = Recorded::new();
    scene.backup(Options::new()).await;
    scene.reboot();
    scene.write("vda", 0, MIB, 0x21);
    // After this the bitmaps are inconsistent, and QEMU resizes no disk with an inconsistent bitmap.
    scene.crash();
    for disk in DISKS {
        assert_eq!(scene.vm().checkpoints(disk), [""; 0], "{disk}");
        assert_eq!(scene.vm().sentinels(disk), [""; 0], "{disk}");
    }
    let resize = json!({ "node-name": scene.vm().node_name("vda"), "size": 2 * SIZE });
    scene.vm().qmp("block_resize", resize);
    scene.now.get_mut("vda").unwrap().resize(2 * SIZE as usize, 0);
    let caller = Caller::new(&scene.system).await;
    let job = caller.start("web", "").await;
    assert_completed(&job).await;
    let (_, said) = scene.record(&job).await;
    assert_eq!(said, DISKS.map(|disk| format!("{disk} full no-bitmap")));
    scene.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_no_disk_supports_is_refused_with_the_reason() {
    let scene = Recorded::new();
    for disk in DISKS {
        take_snapshot(&scene, disk);
    }
    let clients = scene.system.clients();
    let refused = clients.backupctl(ROOT, &["create", "web", "--checkpoint", "named"]);
    assert_eq!(refused.status, 1, "{}{}", refused.stdout, refused.stderr);
    assert!(
        refused.stderr.contains("its image holds internal snapshots"),
        "{}",
        refused.stderr
    );
}
