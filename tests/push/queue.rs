//! Backups that wait for a free slot: their order, and their outcome while they wait.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::common::caller::{Caller, assert_completed, assert_failed, cancel};
use crate::common::clients::{OTHER_USER as OTHER, ROOT, USER};
use crate::common::disk::{Disk, Kind};
use crate::common::hanging::{Hanging, Limits, Operation};
use crate::common::proxies::{JobProxy, Options, assert_limit, error_name, slowly};
use crate::common::proxy::Proxy;
use crate::common::storage::LoopDevice;
use crate::common::vm::Vm;
use crate::common::{Setup, System, polkit, wait};
use fuser::Errno;
use rustix::process::Signal;
use serde_json::json;
use tokio::task::JoinHandle;
use zbus::wire::OwnedObjectPath;

const MIB: u64 = 1 << 20;

/// Returns a setup that allows so many running backups.
fn setup(places: usize) -> Setup {
    let rights = ["domain.getattr", "domain.read", "domain.backup", "domain.export"];
    let rules = [USER, OTHER].map(|uid| polkit::allow(uid, &rights));
    System::setup().rules(&rules.concat()).table(&format!(
        "[limits]\njobs-at-once = {places}\njobs-at-once-per-user = {places}"
    ))
}

/// Starts a VM whose backup, at the bandwidth of [`slowly`], takes longer than any test.
fn machine(system: &System, name: &str) -> Vm {
    let disk = Disk::new("vda", 64 * MIB).fill(0, 64 * MIB, 0x11);
    system.configured(system.vm(name).disk(disk).running())
}

/// A queued backup, and its waiting call.
struct Queued {
    job: JobProxy<'static>,
    call: JoinHandle<zbus::Result<(u32, OwnedObjectPath)>>,
}

async fn queue(caller: &Caller, domain: &str, document: &str, options: Options<'static>) -> Queued {
    queue_into(caller, domain, document, &[], options).await
}

async fn queue_into(
    caller: &Caller,
    domain: &str,
    document: &str,
    files: &[OwnedFd],
    options: Options<'static>,
) -> Queued {
    let known: Vec<u32> = ids(caller).await;
    let (manager, domain, document) = (caller.manager.clone(), domain.to_owned(), document.to_owned());
    let files: Vec<OwnedFd> = files.iter().map(|file| file.try_clone().unwrap()).collect();
    let call = tokio::spawn(async move {
        let files = files.iter().map(zbus::Fd::from).collect();
        manager.create_backup(&domain, &document, files, options).await
    });
    let path = wait::until_async("the job", async || {
        assert!(!call.is_finished(), "it waits");
        let jobs = caller.manager.list_jobs().await.unwrap();
        let new = jobs.into_iter().find(|(id, ..)| !known.contains(id));
        new.map(|(_, path, ..)| path)
    });
    let job = caller.job(path.await).await;
    assert_eq!(job.state().await.unwrap(), "queued");
    Queued { job, call }
}

async fn ids(caller: &Caller) -> Vec<u32> {
    let jobs = caller.manager.list_jobs().await.unwrap();
    jobs.into_iter().map(|(id, ..)| id).collect()
}

impl Queued {
    /// Checks that the call fails for that reason, or that the queued job whose object it returned does.
    async fn refused(&mut self, why: &str) {
        if let Err(refused) = wait::within("the call", &mut self.call).await.unwrap() {
            assert!(refused.to_string().contains(why), "{refused}");
        }
    }
}

async fn ended(queued: Queued) {
    wait::within("the call", queued.call).await.unwrap().unwrap();
    assert_completed(&queued.job).await;
}

/// Returns the completed jobs, in the order in which they ended.
async fn completed(caller: &mut Caller, count: usize) -> Vec<u32> {
    let mut order = Vec::new();
    while order.len() < count {
        let signals = caller.signals_until("JobEnded").await;
        let last = signals.last().unwrap();
        if last.arguments[2].contains("completed") {
            order.push(last.arguments[0].parse().unwrap());
        }
    }
    order
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_without_a_free_slot_waits_and_shows_its_position() {
    let system = setup(1).start();
    let machines = ["a", "b", "c"].map(|name| machine(&system, name));
    let before = machines[1].residue();
    let mut root = Caller::new(&system).await;
    let running = root.start_with("a", "", &[], slowly(MIB)).await;
    let first = queue(&root, "b", "", Options::new()).await;
    let second = queue(&root, "c", "", Options::new()).await;
    for (queued, position) in [(&first, 1), (&second, 2)] {
        assert_eq!(queued.job.queue_position().await.unwrap(), position);
    }
    assert_eq!(running.queue_position().await.unwrap(), 0);
    let (one, two) = (first.job.id().await.unwrap(), second.job.id().await.unwrap());
    let listed = system.clients().backupctl(ROOT, &["jobs"]).expect_success();
    assert!(
        listed.contains("queued (1)") && listed.contains("queued (2)"),
        "{listed}"
    );
    let number = two.to_string();
    let shown = system
        .clients()
        .backupctl(ROOT, &["show", &number])
        .expect_success();
    assert!(shown.contains("queued (2)"), "{shown}");
    let json = system
        .clients()
        .backupctl(ROOT, &["--json", "show", &number])
        .expect_success();
    assert!(
        json.contains("\"queue_position\":2") || json.contains("\"queue_position\": 2"),
        "{json}"
    );
    // The backup has created nothing.
    assert_eq!(machines[1].residue(), before);
    assert!(!system.store().join("b").exists());
    running.cancel().await.unwrap();
    assert_eq!(completed(&mut root, 2).await, [one, two]);
    ended(first).await;
    ended(second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_take_turns_and_root_waits_for_none() {
    let system = setup(1).start();
    let _machines = ["a", "b", "c", "d", "e"].map(|name| machine(&system, name));
    let mut root = Caller::new(&system).await;
    let (user, other) = (
        Caller::of_user(&system, USER).await,
        Caller::of_user(&system, OTHER).await,
    );
    let running = user.start_with("a", "", &[], slowly(MIB)).await;
    let mut users = Vec::new();
    for domain in ["b", "c"] {
        users.push(queue(&user, domain, "", Options::new()).await);
    }
    let others = queue(&other, "d", "", Options::new()).await;
    assert_eq!(others.job.queue_position().await.unwrap(), 1);
    // Users have all slots, and a backup of root runs in addition.
    assert_completed(&root.start("e", "").await).await;
    // So does one of a domain for which a user's backup is queued.
    assert_completed(&root.start("b", "").await).await;
    let mut order = Vec::new();
    for queued in [&others, &users[0], &users[1]] {
        assert_eq!(queued.job.state().await.unwrap(), "queued");
        order.push(queued.job.id().await.unwrap());
    }
    completed(&mut root, 2).await;
    running.cancel().await.unwrap();
    assert_eq!(completed(&mut root, 3).await, order);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_has_one_queued_backup_and_that_of_root_comes_first() {
    let system = setup(1).start();
    let _machines = ["a", "b"].map(|name| machine(&system, name));
    let root = Caller::new(&system).await;
    let (user, other) = (
        Caller::of_user(&system, USER).await,
        Caller::of_user(&system, OTHER).await,
    );
    let running = root.start_with("a", "", &[], slowly(MIB)).await;
    let users = queue(&user, "b", "", Options::new()).await;
    for caller in [&user, &other] {
        let refused = caller.try_start("b", "", &[], Options::new()).await.unwrap_err();
        assert!(error_name(&refused).ends_with("Busy"), "{refused}");
    }
    let roots = queue(&root, "b", "", slowly(MIB)).await;
    let refused = root.try_start("b", "", &[], Options::new()).await.unwrap_err();
    assert!(error_name(&refused).ends_with("Busy"), "{refused}");
    running.cancel().await.unwrap();
    wait::within("the call", roots.call).await.unwrap().unwrap();
    assert_eq!(roots.job.state().await.unwrap(), "running");
    assert_eq!(users.job.state().await.unwrap(), "queued");
    roots.job.cancel().await.unwrap();
    ended(users).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queued_backup_that_is_cancelled_ends_at_once_and_touches_nothing() {
    let system = setup(1).start();
    let machines = ["a", "b"].map(|name| machine(&system, name));
    let before = machines[1].residue();
    let user = Caller::of_user(&system, USER).await;
    let running = user.start_with("a", "", &[], slowly(MIB)).await;
    let queued = queue(&user, "b", "", Options::new()).await;
    queued.job.cancel().await.unwrap();
    let (result, ..) = wait::within("the end", queued.job.wait()).await.unwrap();
    assert_eq!(result, "cancelled");
    let refused = wait::within("the call", queued.call).await.unwrap().unwrap_err();
    assert!(error_name(&refused).ends_with("Cancelled"), "{refused}");
    assert_eq!(running.state().await.unwrap(), "running");
    assert_eq!(machines[1].residue(), before);
    assert!(!system.store().join("b").exists());
    // The domain is free.
    let again = queue(&user, "b", "", Options::new()).await;
    cancel(&running).await;
    ended(again).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_beyond_the_queue_limits_are_refused() {
    let rules = polkit::allow(USER, &["domain.backup"]);
    let system = System::setup()
        .rules(&rules)
        .table("[limits]\njobs-per-user = 2\njobs = 3\njobs-at-once = 1\njobs-at-once-per-user = 1")
        .start();
    let _machines = ["a", "b", "c", "d"].map(|name| machine(&system, name));
    let (user, root) = (Caller::of_user(&system, USER).await, Caller::new(&system).await);
    let running = user.start_with("a", "", &[], slowly(MIB)).await;
    let queued = queue(&user, "b", "", Options::new()).await;
    assert_limit(
        "jobs-per-user",
        user.try_start("c", "", &[], Options::new()).await,
    );
    let roots = root.start_with("c", "", &[], slowly(MIB)).await;
    assert_limit("jobs", root.try_start("d", "", &[], Options::new()).await);
    cancel(&roots).await;
    cancel(&running).await;
    ended(queued).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_with_too_large_queued_requests_blocks_no_other_user() {
    let rules = [USER, OTHER].map(|uid| polkit::allow(uid, &["domain.backup"]));
    let mut system = System::setup()
        .rules(&rules.concat())
        .table(
            "[limits]\njobs-at-once = 1\njobs-at-once-per-user = 1\nqueued-bytes-per-user = 16384\nqueued-bytes = 65536",
        )
        .start();
    let _machines = ["a", "b", "c", "d", "e"].map(|name| machine(&system, name));
    let (user, other) = (
        Caller::of_user(&system, USER).await,
        Caller::of_user(&system, OTHER).await,
    );
    let root = Caller::new(&system).await;
    let running = root.start_with("a", "", &[], slowly(MIB)).await;
    // The name is in the request and in the plan.
    let document = format!(
        "<domainbackup><description>{}</description></domainbackup>",
        "x".repeat(4000)
    );
    let limit = "queued-bytes-per-user";
    let first = queue(&user, "b", &document, Options::new()).await;
    assert_limit(limit, user.try_start("c", &document, &[], Options::new()).await);
    assert_eq!(ids(&root).await.len(), 2, "the backup left residue");
    let others = queue(&other, "c", &document, Options::new()).await;
    let roots = queue(&root, "d", &document, Options::new()).await;
    // The service counts recorded jobs again.
    let ids = [&first, &others, &roots].map(|queued| queued.job.inner().path().to_owned());
    system.kill_daemon();
    system.start_daemon();
    system.wait_for_domain("e");
    assert_limit(limit, user.try_start("e", &document, &[], Options::new()).await);
    let [first, others, roots] = ids.map(|path| root.job(path.into()));
    let (first, others, roots) = (first.await, others.await, roots.await);
    first.cancel().await.unwrap();
    wait::within("the end", first.wait()).await.unwrap();
    let again = queue(&user, "e", &document, Options::new()).await;
    let running = root.job(running.inner().path().to_owned().into()).await;
    running.cancel().await.unwrap();
    ended(again).await;
    assert_completed(&others).await;
    assert_completed(&roots).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_is_checked_at_the_call_and_an_administrator_can_cancel_a_queued_backup() {
    let mut system = setup(1).start();
    let _machines = ["a", "b", "c"].map(|name| machine(&system, name));
    let (user, root) = (Caller::of_user(&system, USER).await, Caller::new(&system).await);
    let running = root.start_with("a", "", &[], slowly(MIB)).await;
    let runs = queue(&user, "b", "", Options::new()).await;
    let ends = queue(&user, "c", "", Options::new()).await;
    let number = ends.job.id().await.unwrap().to_string();
    let paths = [&running, &runs.job, &ends.job].map(|job| job.inner().path().to_owned());
    system.set_rules(&polkit::deny(
        USER,
        &["domain.getattr", "domain.read", "domain.backup"],
    ));
    user.connection.clone().close().await.unwrap();
    system.kill_daemon();
    system.start_daemon();
    let listed = system.clients().backupctl(ROOT, &["jobs"]).expect_success();
    assert!(
        listed.contains("queued (1)") && listed.contains("queued (2)"),
        "{listed}"
    );
    system
        .clients()
        .backupctl(ROOT, &["cancel", &number])
        .expect_success();
    let [running, runs, ends] = paths.map(|path| root.job(path.into()));
    let (running, runs, ends) = (running.await, runs.await, ends.await);
    let (result, ..) = wait::within("the end", ends.wait()).await.unwrap();
    assert_eq!(result, "cancelled");
    running.cancel().await.unwrap();
    assert_completed(&runs).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_has_its_own_slots_and_delays_no_other_store() {
    let setup = setup(8);
    let slow = crate::common::test_directory();
    let store = format!(
        "[store.slow]\npath = \"{}\"\njobs-at-once = 1",
        slow.path().display()
    );
    let system = setup.table(&store).start();
    let _machines = ["a", "b", "c"].map(|name| machine(&system, name));
    let user = Caller::of_user(&system, USER).await;
    let document = "<domainbackup><store name='slow'/></domainbackup>";
    let running = user.start_with("a", document, &[], slowly(MIB)).await;
    let queued = queue(&user, "b", document, Options::new()).await;
    assert_completed(&user.start("c", "").await).await;
    assert_eq!(queued.job.state().await.unwrap(), "queued");
    cancel(&running).await;
    ended(queued).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn queued_backups_survive_a_restart_except_those_into_open_files() {
    let mut system = setup(1).start();
    let _machines = ["a", "b", "c"].map(|name| machine(&system, name));
    let (user, root) = (Caller::of_user(&system, USER).await, Caller::new(&system).await);
    let running = user.start_with("a", "", &[], slowly(MIB)).await;
    let first = queue(&user, "b", "", Options::new()).await;
    let file = system.dir().join("file.qcow2");
    let file = fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(file)
        .unwrap();
    let document =
        "<domainbackup><disks><disk name='vda' type='fd'><target fd='0'/></disk></disks></domainbackup>";
    let second = queue_into(&user, "c", document, &[file.into()], Options::new()).await;
    let (one, two) = (first.job.id().await.unwrap(), second.job.id().await.unwrap());
    system.stop_daemon();
    // The call for a queued backup returns the job before the backup begins.
    wait::within("the call", first.call).await.unwrap().unwrap();
    system.start_daemon();
    let job = root.job(root.manager.get_job(two).await.unwrap()).await;
    let (result, _, message) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(result, "failed");
    assert!(message.contains("files that the caller had passed"), "{message}");
    let job = root.job(root.manager.get_job(one).await.unwrap()).await;
    assert_eq!(job.state().await.unwrap(), "queued");
    assert_eq!(job.queue_position().await.unwrap(), 1);
    assert_eq!(job.started_by_uid().await.unwrap(), USER);
    // Also if the service was not stopped.
    system.kill_daemon();
    system.start_daemon();
    assert_eq!(job.state().await.unwrap(), "queued");
    let path = running.inner().path().to_owned();
    root.job(path.into()).await.cancel().await.unwrap();
    assert_completed(&job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_whose_call_fails_because_the_service_stops_is_not_queued() {
    let mut system = setup(1).without_daemon().start();
    let state = Hanging::mount(&system.dir().join("state"), Limits::default());
    system.start_daemon();
    let _machines = ["a", "b"].map(|name| machine(&system, name));
    let root = Caller::new(&system).await;
    let running = root.start_with("a", "", &[], slowly(MIB)).await;
    let before = ids(&root).await;
    state.hang(Operation::Fsync);
    let manager = root.manager.clone();
    let call = tokio::spawn(async move { manager.create_backup("b", "", Vec::new(), Options::new()).await });
    wait::until("the record to be written", || state.is_hanging().then_some(()));
    system.daemon().process().signal(Signal::TERM);
    let refused = wait::within("the call", call).await.unwrap().unwrap_err();
    assert!(refused.to_string().contains("stopping"), "{refused}");
    state.heal();
    system.wait_for_death();
    system.start_daemon();
    assert_eq!(ids(&root).await, before);
    cancel(&running).await;
}

/// A stopped service, and a queued backup whose files exist, as if the catalog were an old copy.
struct Begun {
    _machines: [Vm; 2],
    queued: Queued,
    running: JobProxy<'static>,
    /// The staging directory of the queued backup, in the storage.
    partial: PathBuf,
    storage: Hanging,
    system: System,
}

impl Begun {
    async fn new() -> Self {
        let stall = "[deadlines]\nstall-seconds = 2";
        let mut system = setup(1).table(stall).without_daemon().start();
        let storage = Hanging::mount(&system.store(), Limits::default());
        system.start_daemon();
        let machines = ["a", "b"].map(|name| machine(&system, name));
        let root = Caller::new(&system).await;
        let document =
            "<domainbackup><disks><disk name='vda' type='file'><target file='@'/></disk></disks></domainbackup>"
                .replace('@', &system.dir().join("a.qcow2").display().to_string());
        let running = root.start_with("a", &document, &[], slowly(MIB)).await;
        let queued = queue(&root, "b", "", Options::new()).await;
        let number = queued.job.id().await.unwrap();
        system.kill_daemon();
        let catalog = rusqlite::Connection::open(system.dir().join("state/catalog.sqlite")).unwrap();
        let select = "SELECT backup_id FROM jobs WHERE id = ?1";
        let id: String = catalog.query_row(select, [number], |row| row.get(0)).unwrap();
        let partial = system.store().join("b").join(format!(".{id}.partial"));
        fs::create_dir_all(&partial).unwrap();
        fs::write(partial.join("vda.qcow2"), "").unwrap();
        Self {
            _machines: machines,
            queued,
            running,
            partial,
            storage,
            system,
        }
    }

    /// Kills the service, and checks that the next instance removes the files from the healed storage.
    fn assert_removed_later(&mut self) {
        assert!(self.partial.exists());
        self.system.daemon().process().signal(Signal::KILL);
        // A thread that waits for the storage dies when that answers.
        self.storage.heal();
        self.system.wait_for_death();
        assert!(self.partial.exists());
        self.system.start_daemon();
        let partial = &self.partial;
        wait::until("the removal", || (!partial.exists()).then_some(()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queued_backup_does_not_wait_for_storage_that_hangs_when_files_of_it_are_removed() {
    let mut begun = Begun::new().await;
    begun.storage.hang(Operation::Remove);
    begun.system.start_daemon();
    let why = "the storage made no progress for 2 seconds";
    assert_failed(&begun.queued.job, "Stalled", why).await;
    begun.assert_removed_later();
    cancel(&begun.running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queued_backup_whose_files_cannot_be_removed_fails_and_they_are_removed_later() {
    let mut begun = Begun::new().await;
    begun.storage.fail(Operation::Remove, Errno::EIO);
    begun.system.start_daemon();
    let store = begun.system.store().join("b");
    let why = format!("cannot remove the incomplete images {}", store.display());
    assert_failed(&begun.queued.job, "Internal", &why).await;
    begun.assert_removed_later();
    cancel(&begun.running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_a_queued_backup_that_a_host_restart_ended_are_removed_once_the_storage_answers() {
    let mut begun = Begun::new().await;
    begun.storage.hang(Operation::Remove);
    begun.system.start_daemon_in_another_boot();
    assert_failed(&begun.queued.job, "Busy", "host restarted").await;
    begun.assert_removed_later();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queued_backup_fails_after_a_host_restart() {
    let mut system = setup(1).start();
    let _machines = ["a", "b"].map(|name| machine(&system, name));
    let (user, root) = (Caller::of_user(&system, USER).await, Caller::new(&system).await);
    let _running = user.start_with("a", "", &[], slowly(MIB)).await;
    let queued = queue(&user, "b", "", Options::new()).await;
    let number = queued.job.id().await.unwrap();
    system.kill_daemon();
    system.start_daemon_in_another_boot();
    let job = root.job(root.manager.get_job(number).await.unwrap()).await;
    let (result, error, message) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(result, "failed");
    assert!(
        error.ends_with("Busy") && message.contains("host restarted"),
        "{message}"
    );
    assert!(!system.store().join("b").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queued_backup_runs_as_authorised_or_not_at_all() {
    let system = setup(1).start();
    let _machines = ["a", "c", "d"].map(|name| machine(&system, name));
    let disk = Disk::new("vda", MIB).kind(Kind::Scsi);
    let changed = system.configured(system.vm("b").disk(disk).running());
    let user = Caller::of_user(&system, USER).await;
    let running = user.start_with("a", "", &[], slowly(MIB)).await;
    let disks = queue(&user, "b", "", Options::new()).await;
    let (targets, again) = (system.dir().join("targets"), system.dir().join("again"));
    let into = |directory: &Path| {
        fs::create_dir(directory).unwrap();
        format!(
            "<domainbackup><disks><disk name='vda'><target file='{}/c.qcow2'/></disk></disks></domainbackup>",
            directory.display()
        )
    };
    let paths = queue(&user, "c", &into(&targets), Options::new()).await;
    let made_again = queue(&user, "d", &into(&again), Options::new()).await;
    let image = image(&system, "more.qcow2");
    let file = json!({ "driver": "file", "filename": image });
    changed.qmp(
        "blockdev-add",
        json!({ "driver": "qcow2", "node-name": "more", "file": file }),
    );
    let device = json!({ "driver": "scsi-hd", "id": "vdb", "drive": "more", "bus": "scsi.0" });
    changed.qmp("device_add", device);
    fs::rename(&targets, system.dir().join("kept")).unwrap();
    fs::create_dir(&targets).unwrap();
    // ext4 and XFS reuse the inode number of the previous file.
    fs::remove_dir(&again).unwrap();
    fs::create_dir(&again).unwrap();
    cancel(&running).await;
    for (mut queued, why) in [
        (disks, "disks changed"),
        (paths, "file, device or directory is not the same"),
        (made_again, "file, device or directory is not the same"),
    ] {
        queued.refused(why).await;
        let (result, _, message) = wait::within("the end", queued.job.wait()).await.unwrap();
        assert_eq!(result, "failed");
        assert!(message.contains(why), "{message}");
    }
    assert!(!system.store().join("b").exists());
    for directory in [targets, again] {
        assert_eq!(fs::read_dir(directory).unwrap().count(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queued_backup_writes_to_no_other_device_of_the_same_number() {
    let system = setup(1).start();
    let _a = machine(&system, "a");
    let _b = system.configured(
        system
            .vm("b")
            .disk(Disk::new("vda", 4 * MIB).fill(0, 4 * MIB, 0x22))
            .running(),
    );
    let root = Caller::new(&system).await;
    let (meant, other) = (system.dir().join("meant"), system.dir().join("other"));
    for (path, byte) in [(&meant, 0xaa), (&other, 0xbb)] {
        fs::write(path, vec![byte; 8 * MIB as usize]).unwrap();
    }
    let device = LoopDevice::attach(&meant, 0);
    let document = format!(
        "<domainbackup><disks><disk name='vda' type='block'><driver type='raw'/><target dev='{}'/></disk></disks></domainbackup>",
        device.device().display()
    );
    for exchanged in [false, true] {
        let running = root.start_with("a", "", &[], slowly(MIB)).await;
        let mut queued = queue(&root, "b", &document, Options::new()).await;
        if exchanged {
            device.exchange(&other);
        }
        cancel(&running).await;
        if !exchanged {
            ended(queued).await;
            assert!(
                fs::read(&meant).unwrap()[..4 * MIB as usize]
                    .iter()
                    .all(|byte| *byte == 0x22)
            );
            continue;
        }
        queued.refused("not the same device").await;
        let (result, error, message) = wait::within("the end", queued.job.wait()).await.unwrap();
        assert_eq!(result, "failed");
        assert!(
            error.ends_with("TargetInvalid") && message.contains("not the same device"),
            "{error}: {message}"
        );
        assert!(fs::read(&other).unwrap().iter().all(|byte| *byte == 0xbb));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_not_there_is_refused_at_once() {
    let system = setup(1).start();
    let _machines = ["a", "b"].map(|name| machine(&system, name));
    let root = Caller::new(&system).await;
    let _running = root.start_with("a", "", &[], slowly(MIB)).await;
    let document = "<domainbackup><disks><disk name='vda' type='block'><driver type='raw'/><target dev='/dev/no-such-device'/></disk></disks></domainbackup>";
    let refused = root
        .try_start("b", document, &[], Options::new())
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("does not exist"), "{refused}");
    assert_eq!(ids(&root).await.len(), 1);
}

fn image(system: &System, name: &str) -> String {
    let path = system.dir().join(name);
    let mut create = crate::common::process::bound("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M");
    crate::common::process::run(create).expect_success();
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_queries_no_other_domain() {
    let system = System::start();
    let machines = ["a", "b", "c"].map(|name| {
        let disk = Disk::new("vda", MIB).fill(0, MIB, 0x11);
        let vm = system.vm(name).disk(disk).running().start();
        let proxy = Proxy::start(&system.dir().join(format!("{name}.proxy")), &vm.monitor_path());
        system.write_domain_file(name, &format!("monitor = \"{}\"\n", proxy.path().display()));
        system.wait_for_domain(name);
        (vm, proxy)
    });
    let root = Caller::new(&system).await;
    // The first backup into the store, which creates it, is over too.
    for (_, proxy) in &machines {
        proxy.take_heard();
    }
    for document in ["", "<domainbackup><store name='default'/></domainbackup>"] {
        root.complete("a", document).await;
        let commands = machines[0].1.take_heard();
        assert!(commands.len() <= 36, "{}: {commands:?}", commands.len());
    }
    for (_, proxy) in &machines[1..] {
        assert_eq!(proxy.take_heard(), [""; 0]);
    }
}

/// A VM that is renamed while its backup waits for one of two slots.
async fn renamed(system: &System, user: &Caller) -> (Vm, [JobProxy<'static>; 2], Queued) {
    let uuid = "5c1d9d0e-0f3f-4b52-9d0a-0d6c3e1f7a11";
    let disk = Disk::new("vda", 64 * MIB).fill(0, 64 * MIB, 0x22);
    let vm = system.configured(system.vm("before").uuid(uuid).disk(disk).running());
    let running = [
        user.start_with("a", "", &[], slowly(MIB)).await,
        user.start_with("b", "", &[], slowly(MIB)).await,
    ];
    let queued = queue(user, "before", "", slowly(MIB)).await;
    system.remove_domain_file("before");
    system.domain_file("after", &vm);
    system.wait_for_domain("after");
    (vm, running, queued)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_renamed_during_a_queued_backup_has_one_backup_at_a_time() {
    let system = setup(2).start();
    let _machines = ["a", "b", "c"].map(|name| machine(&system, name));
    let user = Caller::of_user(&system, USER).await;
    let (_vm, [a, b], first) = renamed(&system, &user).await;
    let second = queue(&user, "after", "", Options::new()).await;
    cancel(&a).await;
    wait::within("the call", first.call).await.unwrap().unwrap();
    assert_eq!(first.job.state().await.unwrap(), "running");
    cancel(&b).await;
    // A slot is free, and the second backup would have got it first.
    assert_completed(&user.start("c", "").await).await;
    assert_eq!(second.job.state().await.unwrap(), "queued");
    cancel(&first.job).await;
    ended(second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queued_backup_fails_when_its_renamed_domain_has_another_backup() {
    let system = setup(2).start();
    let _machines = ["a", "b"].map(|name| machine(&system, name));
    let (user, root) = (Caller::of_user(&system, USER).await, Caller::new(&system).await);
    let (vm, running, queued) = renamed(&system, &user).await;
    let other = root.start_with("after", "", &[], slowly(MIB)).await;
    for job in running {
        cancel(&job).await;
    }
    let refused = wait::within("the call", queued.call).await.unwrap().unwrap_err();
    assert!(error_name(&refused).ends_with("Busy"), "{refused}");
    assert_eq!(other.state().await.unwrap(), "running");
    assert_eq!(vm.residue().jobs.len(), 1);
    cancel(&other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crawling_backup_delays_no_other_backup() {
    let system = setup(1).start();
    let _machines = ["slow", "next"].map(|name| machine(&system, name));
    let (user, other) = (
        Caller::of_user(&system, USER).await,
        Caller::of_user(&system, OTHER).await,
    );
    let slow = user.start_with("slow", "", &[], slowly(1)).await;
    let next = queue(&other, "next", "", Options::new()).await;
    assert_completed(&next.job).await;
    next.call.await.unwrap().unwrap();
    assert_eq!(slow.state().await.unwrap(), "running");
    cancel(&slow).await;
}
