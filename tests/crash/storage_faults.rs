//! Storage that fails, fills up, is removed or hangs during a backup. `docs/failure-modes.md` documents the results
//! for users, together with tests in `refusals`, `job_outcomes` and `changes_during_backup`.

use std::process::Command;
use std::time::Duration;

use crate::common::System;
use crate::common::caller::{Caller, assert_completed, assert_failed};
use crate::common::clients::ROOT;
use crate::common::disk::Disk;
use crate::common::hanging::{Hanging, Operation};
use crate::common::process;
use crate::common::proxies::{JobProxy, Options, error_name, slowly};
use crate::common::proxy::Proxy;
use crate::common::storage::{Tmpfs, files_below};
use crate::common::vm::{Residue, Vm};
use crate::common::wait::{until_async, within};
use fuser::Errno;
use rustix::process::Signal;

const MIB: u64 = 1 << 20;
/// The timeout without progress.
const STALL: Duration = Duration::from_secs(3);
const OURS: &str = "org.example.Backup1.Error.";
const DOCUMENT: &str = "<domainbackup><store name='shaky'/></domainbackup>";

/// A VM `web`, and a store `shaky` on a file system that the test controls.
struct Scene {
    // Dropped after all others, which cannot end while it hangs.
    storage: Hanging,
    vm: Vm,
    caller: Caller,
    before: Residue,
    system: System,
}

impl Scene {
    /// The storage may hang for a few seconds, which is longer than a loaded host needs to make progress.
    async fn new() -> Self {
        let place = crate::common::test_directory();
        let path = place.path().join("shaky");
        let system = System::setup()
            .store("shaky", &path)
            .table("[deadlines]\nstall-seconds = 3")
            .start();
        let vm = system.configured(machine(&system, "web"));
        Self {
            storage: Hanging::mount_in(place, "shaky"),
            caller: Caller::new(&system).await,
            before: vm.residue(),
            vm,
            system,
        }
    }

    /// Starts a backup that stays in the middle until the test ends the disturbance.
    async fn begin(&self) -> JobProxy<'static> {
        let options = slowly(64 * MIB);
        let job = self.caller.start_with("web", DOCUMENT, &[], options).await;
        until_async("some progress", || async {
            (job.progress().await.unwrap() > 0.0).then_some(())
        })
        .await;
        job
    }

    async fn refused(&self) -> (String, String) {
        let refused = self.caller.try_start("web", DOCUMENT, &[], Options::new()).await;
        let error = refused.expect_err("the backup is refused");
        (error_name(&error), error.to_string())
    }

    /// Checks that no residue remains, at once or when the storage responds, and that the next backup there completes.
    async fn assert_as_before(&self) {
        until_async("nothing to be left", || async {
            let left = files_below(self.storage.path());
            (left.is_empty() && self.vm.residue() == self.before).then_some(())
        })
        .await;
        self.caller.complete("web", DOCUMENT).await;
        assert_eq!(self.vm.residue(), self.before);
        assert_eq!(files_below(self.storage.path()).len(), 4);
    }

    /// Checks that other callers are served while the storage hangs.
    async fn assert_others_are_served(&self) {
        assert!(self.storage.is_hanging());
        // Little data, because making it durable shows no progress.
        let disk = Disk::new("vda", 4 * MIB).fill(0, MIB, 0x11);
        let other = self
            .system
            .configured(self.system.vm("other").disk(disk).running());
        self.caller.complete("other", "").await;
        assert_eq!(other.residue().jobs, [""; 0]);
        assert_eq!(self.caller.manager.list_domains().await.unwrap().len(), 2);
        assert!(self.storage.is_hanging());
    }
}

fn machine(system: &System, name: &str) -> crate::common::vm::Builder {
    system
        .vm(name)
        .disk(Disk::new("vda", 256 * MIB).fill(0, 128 * MIB, 0x11))
        .disk(Disk::new("vdb", 32 * MIB).fill(0, 16 * MIB, 0x22))
        .running()
}

// Errors.

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_error_during_the_copy_fails_the_backup() {
    // On either disk: it is random which one meets the error first.
    for (errno, error, text) in [
        (Errno::EIO, "QemuError", "': Input/output error"),
        (Errno::ENOSPC, "NoSpace", "': No space left on device"),
        (Errno::EDQUOT, "NoSpace", "': Disk quota exceeded"),
    ] {
        let scene = Scene::new().await;
        let job = scene.begin().await;
        scene.storage.fail(Operation::Write, errno);
        assert_failed(&job, error, text).await;
        scene.storage.heal();
        scene.assert_as_before().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn data_that_does_not_become_durable_is_no_backup() {
    for (errno, error, text) in [
        (Errno::EIO, "Internal", "cannot fsync"),
        (Errno::ENOSPC, "NoSpace", "No space left on device"),
        (Errno::EDQUOT, "NoSpace", "Disk quota exceeded"),
    ] {
        let scene = Scene::new().await;
        let job = scene.begin().await;
        scene.storage.fail(Operation::Fsync, errno);
        job.set_speed(0).await.unwrap();
        assert_failed(&job, error, text).await;
        scene.storage.heal();
        scene.assert_as_before().await;
    }
}

/// The storage reports an error once, to the write-back that is started early. The final fsync succeeds.
#[tokio::test(flavor = "multi_thread")]
async fn data_that_an_early_write_back_lost_is_no_backup() {
    let scene = Scene::new().await;
    let job = scene.begin().await;
    scene.storage.fail(Operation::Fsync, Errno::EIO);
    scene.storage.affected().await;
    scene.storage.heal();
    let progress = job.progress().await.unwrap();
    assert!(
        progress < 1.0,
        "QEMU still copied when the error came: {progress}"
    );
    job.set_speed(0).await.unwrap();
    assert_failed(&job, "Internal", "cannot fsync").await;
    scene.assert_as_before().await;
}

/// The storage reports an error once, to a write-back that runs when the service is stopped. The fsyncs of the next
/// service succeed.
#[tokio::test(flavor = "multi_thread")]
async fn data_that_a_write_back_lost_while_the_service_stopped_is_no_backup() {
    let mut scene = Scene::new().await;
    let job = scene.begin().await;
    let path = job.inner().path().to_owned();
    scene.storage.hang(Operation::Fsync);
    scene.storage.affected().await;
    scene.system.daemon().process().signal(Signal::TERM);
    let mut log = String::new();
    until_async("the service to detach from the backup", || {
        log = scene.system.daemon().log();
        let left = log.contains("leaving the backup to a later instance of the service");
        async move { left.then_some(()) }
    })
    .await;
    scene.storage.fail_held(Errno::EIO);
    scene.system.wait_for_death();
    scene.system.start_daemon();
    scene.system.wait_for_domain("web");
    scene.caller = Caller::new(&scene.system).await;
    let job = scene.caller.job(path.into()).await;
    assert_failed(&job, "Internal", "cannot fsync").await;
    scene.assert_as_before().await;
}

/// A raw image has its full length before anything is copied.
#[tokio::test(flavor = "multi_thread")]
async fn a_raw_image_is_written_back_again_and_again_while_it_is_copied() {
    let scene = Scene::new().await;
    let document = "<domainbackup><store name='shaky'/><disks>
        <disk name='vda'><driver type='raw'/></disk><disk name='vdb' backup='no'/></disks></domainbackup>";
    let options = slowly(32 * MIB);
    let job = scene.caller.start_with("web", document, &[], options).await;
    until_async("some progress", || async {
        (job.progress().await.unwrap() > 0.0).then_some(())
    })
    .await;
    // Only write-backs during the copy are counted: the preparation and the end have some too.
    scene
        .storage
        .slow_down(Operation::Fsync, Duration::from_millis(1));
    scene.storage.affected_often(4).await;
    let progress = job.progress().await.unwrap();
    assert!(progress < 1.0, "it was written back at the end: {progress}");
    job.set_speed(0).await.unwrap();
    assert_completed(&job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_over_quota_read_only_or_broken_is_refused_at_once() {
    for (errno, error, text) in [
        (Errno::EDQUOT, "NoSpace", "uota"),
        (Errno::EROFS, "TargetInvalid", "Read-only file system"),
        (Errno::EIO, "Internal", "cannot create"),
    ] {
        let scene = Scene::new().await;
        scene.storage.fail(Operation::Create, errno);
        let (name, message) = scene.refused().await;
        assert_eq!(name, format!("{OURS}{error}"), "{message}");
        assert!(message.contains(text), "{message}");
        scene.storage.heal();
        scene.assert_as_before().await;
    }
}

fn remount(path: &std::path::Path, options: &str) {
    let mut command = Command::new("mount");
    command.args(["-o", &format!("remount,{options}")]).arg(path);
    process::run(command).expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_read_only_or_has_no_inodes_left_is_refused_at_once() {
    let place = crate::common::test_directory();
    let store = Tmpfs::mount(&place.path().join("store"), 512 * MIB);
    let system = System::setup().store("shaky", store.path()).start();
    let vm = system.configured(machine(&system, "web"));
    let (caller, before) = (Caller::new(&system).await, vm.residue());
    for (options, undone, error, text) in [
        ("ro", "rw", "TargetInvalid", "Read-only file system"),
        // The root's inode and two more: none for a backup.
        (
            "nr_inodes=3",
            "nr_inodes=100",
            "NoSpace",
            "No space left on device",
        ),
    ] {
        remount(store.path(), options);
        let refused = caller.try_start("web", DOCUMENT, &[], Options::new()).await;
        let refused = refused.expect_err("the backup is refused");
        assert_eq!(error_name(&refused), format!("{OURS}{error}"), "{refused}");
        assert!(refused.to_string().contains(text), "{refused}");
        remount(store.path(), undone);
        let left = std::fs::read_dir(store.path()).unwrap();
        let mut left = left.map(|entry| entry.unwrap().file_name());
        assert!(left.all(|name| name == ".backupd"), "{options}");
    }
    caller.complete("web", DOCUMENT).await;
    assert_eq!(vm.residue(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_target_is_recognised_in_whatever_language_qemu_reports_it() {
    let place = crate::common::test_directory();
    let full = Tmpfs::mount(&place.path().join("full"), 256 * MIB);
    let system = System::start();
    let disk = Disk::new("vda", 64 * MIB).fill(0, 64 * MIB, 0x11);
    let vm = system.vm("web").disk(disk).running().start();
    let proxy = Proxy::start(&system.dir().join("proxy"), &vm.monitor_path());
    let german = "Auf dem Gerät ist kein Speicherplatz mehr verfügbar";
    proxy.translate("No space left on device", german);
    system.write_domain_file("web", &format!("monitor = \"{}\"\n", proxy.path().display()));
    system.wait_for_domain("web");
    let (caller, before) = (Caller::new(&system).await, vm.residue());
    let target = full.path().join("a.qcow2");
    let document = format!(
        "<domainbackup><disks><disk name='vda'><target file='{}'/></disk></disks></domainbackup>",
        target.display()
    );
    let job = caller.start_with("web", &document, &[], slowly(MIB)).await;
    std::fs::write(full.path().join("filler"), vec![1; 256 * MIB as usize]).unwrap_err();
    job.set_speed(0).await.unwrap();
    let why = format!(
        "disk 'vda': {german}. The file system of {} is probably full",
        target.display()
    );
    assert_failed(&job, "NoSpace", &why).await;
    assert_eq!(vm.residue(), before);
    assert!(!target.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_below_an_unmounted_mount_point_is_missing() {
    let place = crate::common::test_directory();
    let mount_point = place.path().join("disk");
    let path = mount_point.join("backups");
    let system = System::setup().store("shaky", &path).start();
    let vm = system.configured(machine(&system, "web"));
    let caller = Caller::new(&system).await;
    std::fs::create_dir(&mount_point).unwrap();
    let refused = caller.try_start("web", DOCUMENT, &[], Options::new()).await;
    let refused = refused.expect_err("the backup is refused");
    assert_eq!(error_name(&refused), format!("{OURS}TargetInvalid"), "{refused}");
    assert!(
        refused.to_string().contains("the directory does not exist"),
        "{refused}"
    );
    assert_eq!(std::fs::read_dir(&mount_point).unwrap().count(), 0);
    let disk = Tmpfs::mount(&mount_point, 512 * MIB);
    std::fs::create_dir(&path).unwrap();
    caller.complete("web", DOCUMENT).await;
    assert_eq!(files_below(disk.path()).len(), 4);
    drop(vm);
}

// Silence.

#[tokio::test(flavor = "multi_thread")]
async fn storage_that_hangs_during_the_copy_fails_its_backup_and_delays_no_other() {
    let scene = Scene::new().await;
    let job = scene.begin().await;
    scene.storage.hang(Operation::Any);
    scene.storage.affected().await;
    job.set_speed(0).await.unwrap();
    assert_failed(&job, "Stalled", "no progress").await;
    scene.assert_others_are_served().await;
    scene.storage.heal();
    scene.assert_as_before().await;
}

/// The commands of a further backup would make QEMU, and so the guest, wait for the write that hangs.
#[tokio::test(flavor = "multi_thread")]
async fn a_vm_whose_target_hangs_is_not_backed_up_elsewhere_and_goes_on() {
    let scene = Scene::new().await;
    let job = scene.begin().await;
    scene.storage.hang(Operation::Write);
    scene.storage.affected().await;
    job.set_speed(0).await.unwrap();
    assert_failed(&job, "Stalled", "no progress").await;
    for _ in 0..2 {
        let next = scene.caller.try_start("web", "", &[], Options::new());
        let refused = within("an answer", next).await.unwrap_err();
        assert_eq!(error_name(&refused), format!("{OURS}Busy"), "{refused}");
        assert!(
            refused.to_string().contains("still has objects of job"),
            "{refused}"
        );
        assert_ne!(scene.vm.residue(), scene.before, "QEMU answers");
    }
    assert!(scene.storage.is_hanging());
    scene.storage.heal();
    scene.assert_as_before().await;
    scene.caller.complete("web", "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_backup_that_is_cancelled_while_its_storage_hangs_ends_in_time() {
    let scene = Scene::new().await;
    // At this limit a chunk takes longer than a test waits.
    let options = slowly(MIB);
    let job = scene.caller.start_with("web", DOCUMENT, &[], options).await;
    scene.storage.hang(Operation::Any);
    scene.storage.affected().await;
    job.cancel().await.unwrap();
    let (result, _, _) = within("the end", job.wait()).await.unwrap();
    assert_ne!(result, "completed");
    scene.storage.heal();
    scene.assert_as_before().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn storage_that_hangs_during_fsync_fails_its_backup_in_time() {
    let scene = Scene::new().await;
    let job = scene.begin().await;
    scene.storage.hang(Operation::Fsync);
    job.set_speed(0).await.unwrap();
    assert_failed(&job, "Stalled", "no progress").await;
    scene.assert_others_are_served().await;
    scene.storage.heal();
    scene.assert_as_before().await;
}

/// Starts a backup whose images are read again at 2 MB/s for their digests.
async fn slow_end(scene: &Scene) -> JobProxy<'static> {
    scene
        .storage
        .slow_down(Operation::Read, Duration::from_millis(120));
    let document = "<domainbackup><store name='shaky'/><disks><disk name='vdb'/></disks></domainbackup>";
    let job = scene.caller.start("web", document).await;
    until_async("the images to be read", || async {
        (job.state().await.unwrap() == "finishing").then_some(())
    })
    .await;
    scene.storage.affected().await;
    job
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_storage_that_makes_progress_has_no_timeout() {
    let scene = Scene::new().await;
    let since = std::time::Instant::now();
    let job = slow_end(&scene).await;
    assert_completed(&job).await;
    let took = since.elapsed();
    assert!(took > 2 * STALL, "it took no longer than the limit: {took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_can_be_cancelled_while_its_images_become_durable() {
    let scene = Scene::new().await;
    let job = slow_end(&scene).await;
    job.cancel().await.unwrap();
    let (result, _, _) = within("the end", job.wait()).await.unwrap();
    assert_eq!(result, "cancelled");
    assert_eq!(files_below(scene.storage.path()), [""; 0]);
    assert_eq!(scene.vm.residue(), scene.before);
}

#[tokio::test(flavor = "multi_thread")]
async fn storage_that_hangs_before_anything_is_copied_refuses_the_backup_in_time() {
    let scene = Scene::new().await;
    scene.storage.hang(Operation::Any);
    let (name, message) = within("an answer", scene.refused()).await;
    assert_eq!(name, format!("{OURS}Stalled"), "{message}");
    assert!(message.contains("no progress"), "{message}");
    scene.assert_others_are_served().await;
    // QEMU has no residue of it, so the VM can be backed up elsewhere.
    scene.caller.complete("web", "").await;
    assert!(scene.storage.is_hanging());
    scene.storage.heal();
    until_async("the domain to be free for the next backup", || async {
        let next = scene.caller.try_start("web", DOCUMENT, &[], Options::new()).await;
        assert_completed(&scene.caller.job(next.ok()?).await).await;
        Some(())
    })
    .await;
    assert_eq!(files_below(scene.storage.path()).len(), 4);
    assert_eq!(scene.vm.residue(), scene.before);
}

// Existing backups.

/// Returns id and state of each.
async fn listed(caller: &Caller) -> Vec<(String, String)> {
    let listing = caller.manager.list_backups(Options::new());
    let (backups, _) = within("the list", listing).await.unwrap();
    backups.into_iter().map(|backup| (backup.1, backup.9)).collect()
}

async fn delete(caller: &Caller, id: &str) -> zbus::Result<zbus::Message> {
    let path = caller.manager.get_backup(id).await?;
    let (name, interface) = (Some("org.example.Backup1"), Some("org.example.Backup1.Backup"));
    let options = Options::new();
    let deleting = caller
        .connection
        .call_method(name, &path, interface, "Delete", &options);
    within("Delete", deleting).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_hangs_blocks_no_list_and_loses_no_backup() {
    let scene = Scene::new().await;
    let caller = &scene.caller;
    caller.complete("web", DOCUMENT).await;
    let before = listed(caller).await;
    assert_eq!((before.len(), before[0].1.as_str()), (1, "complete"));
    scene.storage.hang(Operation::Any);
    // The first call waits for the storage; the next ones do not, until it has responded.
    assert_eq!(listed(caller).await, before);
    assert!(scene.storage.is_hanging());
    let second = std::time::Instant::now();
    assert_eq!(listed(caller).await, before);
    assert!(
        second.elapsed() < backupd::backups::PATIENCE,
        "{:?}",
        second.elapsed()
    );
    let stays = delete(caller, &before[0].0).await.unwrap_err();
    assert_eq!(error_name(&stays), format!("{OURS}Stalled"));
    assert!(
        stays.to_string().contains("made no progress for 3 seconds"),
        "{stays}"
    );
    scene.assert_others_are_served().await;
    scene.storage.heal();
    until_async("the backup to be deleted", || async {
        delete(caller, &before[0].0).await.is_ok().then_some(())
    })
    .await;
    scene.assert_as_before().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_fails_halfway_is_resumed() {
    let scene = Scene::new().await;
    let caller = &scene.caller;
    caller.complete("web", DOCUMENT).await;
    let [(id, _)] = listed(caller).await.try_into().unwrap();
    scene.storage.fail(Operation::Fsync, Errno::EIO);
    let failed = delete(caller, &id).await.unwrap_err();
    assert!(failed.to_string().contains("cannot fsync"), "{failed}");
    assert_eq!(listed(caller).await, [(id.clone(), "missing".to_owned())]);
    scene.storage.heal();
    delete(caller, &id).await.unwrap();
    assert_eq!(listed(caller).await, []);
    scene.assert_as_before().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_deletion_that_makes_progress_has_no_timeout() {
    let scene = Scene::new().await;
    let caller = &scene.caller;
    caller.complete("web", DOCUMENT).await;
    let [(id, _)] = listed(caller).await.try_into().unwrap();
    scene
        .storage
        .slow_down(Operation::Remove, Duration::from_millis(1200));
    let since = std::time::Instant::now();
    delete(caller, &id).await.unwrap();
    let took = since.elapsed();
    assert!(took > STALL, "it took no longer than the limit: {took:?}");
    scene.storage.heal();
    assert_eq!(listed(caller).await, []);
    assert_eq!(files_below(scene.storage.path()), [""; 0]);
}

/// Previews the deletion of a backup.
async fn preview(caller: &Caller, id: &str) -> zbus::Result<zbus::Message> {
    let path = caller.manager.get_backup(id).await?;
    let options = Options::from([("dry-run", true.into()), ("with-dependents", true.into())]);
    let (name, interface) = (Some("org.example.Backup1"), Some("org.example.Backup1.Backup"));
    let asking = caller
        .connection
        .call_method(name, &path, interface, "Delete", &options);
    within("a preview", asking).await
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_for_slow_storage_is_not_a_stall() {
    let scene = Scene::new().await;
    let caller = &scene.caller;
    for _ in 0..3 {
        caller.complete_full("web", DOCUMENT).await;
    }
    let ids: Vec<String> = listed(caller).await.into_iter().map(|(id, _)| id).collect();
    let [first, second, stays] = ids.try_into().unwrap();
    // Each step is within the limit; a whole change of the store takes longer, and waiting calls take longer still.
    scene
        .storage
        .slow_down(Operation::Fsync, Duration::from_millis(1800));
    let since = std::time::Instant::now();
    // The calls of one connection would wait for each other.
    let deletes = [Caller::new(&scene.system).await, Caller::new(&scene.system).await];
    let asks = [(); 3].map(|()| Caller::new(&scene.system));
    let asks = futures_util::future::join_all(asks).await;
    let deleted = async { tokio::join!(delete(&deletes[0], &first), delete(&deletes[1], &second)) };
    tokio::pin!(deleted);
    let mut longest = Duration::ZERO;
    loop {
        let asked = std::time::Instant::now();
        let previews = futures_util::future::join_all(asks.iter().map(|asks| preview(asks, &stays)));
        let previews = tokio::select! {
            (one, other) = &mut deleted => {
                one.unwrap();
                other.unwrap();
                break;
            }
            previews = previews => previews,
        };
        for preview in previews {
            preview.unwrap();
        }
        longest = longest.max(asked.elapsed());
    }
    assert!(since.elapsed() > 2 * STALL, "{:?}", since.elapsed());
    assert!(
        longest > STALL,
        "no call waited longer than the limit: {longest:?}"
    );
    scene.storage.heal();
    let left: Vec<String> = listed(caller).await.into_iter().map(|(id, _)| id).collect();
    assert_eq!(left, [stays]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_temporarily_unreadable_backup_is_not_damaged() {
    let scene = Scene::new().await;
    let caller = &scene.caller;
    caller.complete("web", DOCUMENT).await;
    let before = listed(caller).await;
    let [(id, _)] = before.clone().try_into().unwrap();
    let verify = || scene.system.clients().backupctl(ROOT, &["verify", &id]);
    for (what, errno) in [
        (Operation::Read, Errno::EIO),
        (Operation::Read, Errno::ESTALE),
        (Operation::Any, Errno::EIO),
    ] {
        scene.storage.fail(what, errno);
        let looked = verify();
        let text = format!("{what:?} {errno:?}: {}{}", looked.stdout, looked.stderr);
        assert_eq!(looked.status, 1, "{text}");
        assert!(!text.contains("1 damaged"), "{text}");
        assert_eq!(listed(caller).await, before, "{text}");
        scene.storage.heal();
        assert_eq!(listed(caller).await, before, "{text}");
        let good = verify().expect_success();
        assert!(good.contains("1 good"), "{good}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_catalog_without_space_is_named_as_the_reason_and_loses_nothing() {
    let mut system = System::setup().without_daemon().start();
    let state = Tmpfs::mount(&system.dir().join("state"), 2 * MIB);
    system.start_daemon();
    let _vm = system.configured(system.vm("web").disk(Disk::new("vda", MIB)));
    let caller = Caller::new(&system).await;
    caller.complete("web", "").await;
    let (listed, _) = caller.manager.list_backups(Options::new()).await.unwrap();
    let id = listed[0].1.clone();
    // All the space, to the last byte.
    let fill = state.path().join("fill");
    std::fs::write(&fill, vec![1; 2 * MIB as usize]).unwrap_err();
    for arguments in [["delete", &id], ["protect", &id]] {
        let refused = system.clients().backupctl(ROOT, &arguments);
        assert_eq!(refused.status, 1, "{}", refused.stdout);
        assert!(
            refused.stderr.contains("no space left in the state directory"),
            "{}",
            refused.stderr
        );
    }
    assert!(system.store().join("web").join(&id).exists());
    std::fs::remove_file(&fill).unwrap();
    for arguments in [["protect", &id], ["unprotect", &id], ["delete", &id]] {
        system.clients().backupctl(ROOT, &arguments).expect_success();
    }
}
