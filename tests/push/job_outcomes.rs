//! Backups that do not complete: cancelled, failed, or with QEMU gone. The reported outcome is true, and no residue
//! remains.

use std::fs;

use crate::common::System;
use crate::common::caller::{Caller, Signal, brief};
use crate::common::disk::Disk;
use crate::common::proxies::{JobProxy, Options, error_name, slowly};
use crate::common::storage::{Tmpfs, files_below};
use crate::common::vm::{Residue, Vm};
use crate::common::wait;
use serde_json::json;
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const OURS: &str = "org.example.Backup1.Error.";

/// A system with a VM `web` of two disks, the second of which is slow to read.
struct Scene {
    system: System,
    vm: Vm,
    caller: Caller,
    before: Residue,
}

impl Scene {
    /// QEMU reads `vdb` at `slow` bytes a second.
    async fn new(slow: u64) -> Self {
        let system = System::start();
        let vm = system.configured(
            system
                .vm("web")
                .disk(Disk::new("vda", 16 * MIB).fill(0, 8 * MIB, 0x11))
                .disk(Disk::new("vdb", 128 * MIB).fill(0, 128 * MIB, 0x22).slow(slow))
                .running(),
        );
        let caller = Caller::new(&system).await;
        Self {
            before: vm.residue(),
            system,
            vm,
            caller,
        }
    }

    /// Returns the last signals of a job, from the first disk's on.
    async fn ending(&mut self) -> Vec<Signal> {
        let mut signals = self.caller.signals_until("JobEnded").await;
        signals.retain(|signal| signal.name != "JobStarted");
        signals
    }

    async fn assert_cancelled(&mut self, job: &JobProxy<'_>) {
        let (result, name, _) = wait::within("the end", job.wait()).await.unwrap();
        assert_eq!((result.as_str(), name), ("cancelled", format!("{OURS}Cancelled")));
        let signals = self.ending().await;
        let path = job.inner().path().as_str();
        assert_eq!(
            brief(&signals),
            [
                "BlockJobCancelled vda".to_owned(),
                "BlockJobCancelled vdb".to_owned(),
                format!("Completed cancelled {OURS}Cancelled the job was cancelled"),
                format!("JobEnded {} {path} cancelled", job.id().await.unwrap()),
            ]
        );
        assert_eq!(job.state().await.unwrap(), "cancelled");
        self.assert_nothing_left();
    }

    fn assert_nothing_left(&self) {
        assert_eq!(self.vm.residue(), self.before, "in QEMU");
        assert_eq!(files_below(&self.system.store()), [""; 0], "in the store");
    }

    /// Waits until this disk of the job is in this state.
    async fn reaches(&self, job: &JobProxy<'_>, disk: usize, state: &str) {
        wait::until_async(&format!("disk {disk} to be {state}"), || async {
            (job.disks().await.unwrap()[disk].1 == state).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_cancelled_before_anything_is_copied() {
    let mut scene = Scene::new(32 * MIB).await;
    let job = scene.caller.start("web", "").await;
    job.cancel().await.unwrap();
    scene.assert_cancelled(&job).await;
    // A second call is not an error: the job is cancelled, as requested.
    job.cancel().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_cancelled_in_the_middle() {
    let mut scene = Scene::new(32 * MIB).await;
    let job = scene.caller.start("web", "").await;
    wait::until_async("some progress", || async {
        (job.progress().await.unwrap() > 0.05).then_some(())
    })
    .await;
    job.cancel().await.unwrap();
    scene.assert_cancelled(&job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_cancelled_when_one_of_two_disks_is_copied() {
    for disk in ["vda", "vdb"] {
        let mut scene = Scene::new(32 * MIB).await;
        let job = scene.caller.start("web", "").await;
        scene.reaches(&job, 0, "waiting").await;
        let error = job.cancel_disk("vdz").await.unwrap_err();
        assert_eq!(error_name(&error), format!("{OURS}NoSuchDisk"));
        job.cancel_disk(disk).await.unwrap();
        scene.assert_cancelled(&job).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_client_of_qemu_cancels_one_block_job() {
    for (disk, state) in [(1, "running"), (0, "waiting")] {
        let mut scene = Scene::new(32 * MIB).await;
        let job = scene.caller.start("web", "").await;
        scene.reaches(&job, disk, state).await;
        let jobs = scene.vm.residue().jobs;
        scene
            .vm
            .qmp("block-job-cancel", json!({ "device": jobs[disk], "force": true }));
        scene.assert_cancelled(&job).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_backup_cannot_be_cancelled_any_more() {
    let scene = Scene::new(1 << 30).await;
    let job = scene.caller.complete("web", "").await;
    let error = job.cancel().await.unwrap_err();
    assert_eq!(error_name(&error), format!("{OURS}JobEnded"));
    assert!(
        error.to_string().contains("has already ended: completed"),
        "{error}"
    );
    assert_eq!(files_below(&scene.system.store()).len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancellation_at_any_moment_has_the_reported_result() {
    // Cancelling races with every step of a short backup. A caller that got "yes" sees "cancelled", and only then no
    // file exists. A caller that got "no" finds the backup.
    let scene = Scene::new(1 << 30).await;
    for round in 0..24u64 {
        let job = scene.caller.start("web", "").await;
        for _ in 0..round * 3 {
            job.state().await.unwrap();
        }
        let accepted = job.cancel().await.is_ok();
        let (result, _, _) = wait::within("the end", job.wait()).await.unwrap();
        assert_eq!(accepted, result == "cancelled", "round {round}: {result}");
        let left = files_below(&scene.system.store());
        assert_eq!(left.is_empty(), accepted, "round {round}: {left:?}");
        assert_eq!(scene.vm.residue(), scene.before, "round {round}");
        if !accepted {
            fs::remove_dir_all(scene.system.store().join("web")).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_runs_full_fails_the_backup_and_both_disks_say_so() {
    let small = crate::common::test_directory();
    let full = Tmpfs::mount(&small.path().join("full"), 24 * MIB);
    let mut scene = Scene::new(32 * MIB).await;
    let document = format!(
        "<domainbackup><disks><disk name='vda'><target file='{0}/a.qcow2'/></disk>
         <disk name='vdb'><target file='{1}/b.qcow2'/></disk></disks></domainbackup>",
        small.path().display(),
        full.path().display(),
    );
    // Another process takes the space that was free at the start.
    let mount = |size: u64| {
        let mut command = crate::common::process::bound("mount");
        command
            .args(["-o", &format!("remount,size={size}")])
            .arg(full.path());
        crate::common::process::run(command).expect_success();
    };
    mount(256 * MIB);
    // Slow enough that the space is gone before it is needed.
    let slow = slowly(8 * MIB);
    let job = scene.caller.start_with("web", &document, &[], slow).await;
    scene.reaches(&job, 0, "waiting").await;
    mount(24 * MIB);
    let (result, name, message) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!((result.as_str(), name), ("failed", format!("{OURS}NoSpace")));
    assert_eq!(message, "disk 'vdb': No space left on device");
    let signals = brief(&scene.ending().await);
    assert_eq!(
        signals[..3],
        [
            "BlockJobCancelled vda".to_owned(),
            "BlockJobError vdb write No space left on device".to_owned(),
            format!("Completed failed {OURS}NoSpace disk 'vdb': No space left on device"),
        ]
    );
    let disks = job.disks().await.unwrap();
    assert_eq!((disks[0].1.as_str(), disks[0].5.as_str()), ("cancelled", ""));
    assert_eq!(
        (disks[1].1.as_str(), disks[1].5.as_str()),
        ("failed", "No space left on device")
    );
    scene.assert_nothing_left();
    assert_eq!(files_below(small.path()), [""; 0], "no partial file");
    // QEMU works as before.
    fs::remove_dir_all(scene.system.store()).ok();
}

#[tokio::test(flavor = "multi_thread")]
async fn existing_targets_of_a_failed_backup_do_not_look_like_images() {
    let mut scene = Scene::new(32 * MIB).await;
    let target = scene.system.dir().join("existing.qcow2");
    let mut command = crate::common::process::bound("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", target.to_str().unwrap(), "128M"]);
    crate::common::process::run(command).expect_success();
    let document = format!(
        "<domainbackup><disks><disk name='vdb'><target file='{}'/></disk></disks></domainbackup>",
        target.display()
    );
    let options = Options::from([("reuse-external", Variant::from(true))]);
    let job = scene.caller.start_with("web", &document, &[], options).await;
    scene.reaches(&job, 0, "running").await;
    job.cancel().await.unwrap();
    let (result, _, _) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(result, "cancelled");
    scene.ending().await;
    scene.assert_nothing_left();
    assert_eq!(fs::metadata(&target).unwrap().len(), 0);
}

/// A user with write access to the directory can replace the staged image by a link before it is published.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_whose_file_was_replaced_has_failed_and_what_took_its_place_stays() {
    let scene = Scene::new(32 * MIB).await;
    let directory = scene.system.dir().join("targets");
    fs::create_dir(&directory).unwrap();
    let (target, elsewhere) = (directory.join("a.qcow2"), scene.system.dir().join("elsewhere"));
    fs::write(&elsewhere, "mine").unwrap();
    let document = format!(
        "<domainbackup><disks><disk name='vdb'><target file='{}'/></disk></disks></domainbackup>",
        target.display()
    );
    let job = scene.caller.start("web", &document).await;
    scene.reaches(&job, 0, "running").await;
    let [partial] = files_below(&directory).try_into().unwrap();
    let partial: String = partial;
    let link = scene.system.dir().join("link");
    std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
    fs::rename(&link, directory.join(&partial)).unwrap();
    let (result, name, message) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(
        (&*result, name),
        ("failed", format!("{OURS}TargetInvalid")),
        "{message}"
    );
    assert!(message.contains("another file replaced"), "{message}");
    assert_eq!(fs::read_link(&target).unwrap(), elsewhere);
    assert_eq!(fs::read(&elsewhere).unwrap(), b"mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_cannot_be_read_fails_the_backup() {
    let system = System::start();
    let broken = system.dir().join("broken.raw");
    fs::write(&broken, vec![0x55; 8 << 20]).unwrap();
    let blockdev = json!({
        "driver": "raw", "node-name": "broken",
        "file": {
            "driver": "blkdebug",
            "image": { "driver": "file", "filename": broken },
            "inject-error": [{ "event": "none", "iotype": "read", "sector": 4096, "errno": 5, "once": false }],
        },
    });
    let vm = system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", 16 * MIB))
            .extra(&[
                "-blockdev",
                &blockdev.to_string(),
                "-device",
                "virtio-blk-pci,drive=broken,id=vdx",
            ])
            .running(),
    );
    let before = vm.residue();
    let mut caller = Caller::new(&system).await;
    let job = caller.start("web", "").await;
    let (result, name, message) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!((result.as_str(), name), ("failed", format!("{OURS}QemuError")));
    assert_eq!(message, "disk 'vdx': Input/output error");
    let signals = brief(&caller.signals_until("JobEnded").await);
    assert!(
        signals.contains(&"BlockJobError vdx read Input/output error".to_owned()),
        "{signals:?}"
    );
    assert_eq!(vm.residue(), before);
    assert_eq!(files_below(&system.store()), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_is_killed_in_the_middle() {
    let mut scene = Scene::new(32 * MIB).await;
    let job = scene.caller.start("web", "").await;
    scene.reaches(&job, 1, "running").await;
    scene.vm.kill();
    let (result, name, message) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(
        (result.as_str(), name),
        ("failed", format!("{OURS}DomainUnreachable"))
    );
    assert!(message.contains("connection to QEMU was lost"), "{message}");
    assert_eq!(files_below(&scene.system.store()), [""; 0]);
    let signals = brief(&scene.ending().await);
    assert_eq!(
        signals.last().unwrap().split(' ').next_back(),
        Some("failed"),
        "{signals:?}"
    );
    wait::until_async("the machine to be unreachable", || async {
        let domains = scene.caller.manager.list_domains().await.unwrap();
        (domains[0].3 == "unreachable").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_quits_in_the_middle() {
    let mut scene = Scene::new(32 * MIB).await;
    let job = scene.caller.start("web", "").await;
    scene.reaches(&job, 1, "running").await;
    scene.vm.quit();
    let (result, _, _) = wait::within("the end", job.wait()).await.unwrap();
    assert_ne!(result, "completed");
    assert_eq!(files_below(&scene.system.store()), [""; 0]);
}
