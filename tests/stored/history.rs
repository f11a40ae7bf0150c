//! The history of finished jobs, and the recovery of the catalog from the stores.

use std::os::unix::fs::{chown, symlink};
use std::path::{Path, PathBuf};

use crate::common::System;
use crate::common::authority::{Answer, Authority};
use crate::common::caller::{Caller, cancel};
use crate::common::clients::{OTHER_USER, ROOT, USER};
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::proxies::{DomainProxy, JobProxy, Options, error_name, slowly};
use crate::common::vm::Vm;
use crate::common::wait;
use serde_json::{Value, json};
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const DOCUMENT: &str = "<domainbackup><name>before-upgrade</name><description>a b</description>\
    <bandwidth unit='MiB'>500</bandwidth><disks>\
    <disk name='vda' type='file'><driver type='qcow2' compress='zstd'/></disk>\
    <disk name='vdb' backup='no'/></disks></domainbackup>";

fn machine(system: &System) -> Vm {
    // Full, because a store does not record how many bytes of a disk were copied.
    let disks = ["vda", "vdb"].map(|name| Disk::new(name, 4 * MIB).fill(0, 4 * MIB, 0x11));
    let [first, second] = disks;
    system.configured(system.vm("web").disk(first).disk(second).running())
}

fn all() -> Options<'static> {
    Options::from([("ended", Variant::from(true))])
}

/// Returns number, domain and state of every job that `caller` sees.
async fn listed(caller: &Caller, options: Options<'_>) -> Vec<(u32, String, String)> {
    let jobs = caller.manager.list_jobs_with(options).await.unwrap();
    jobs.into_iter()
        .map(|(id, _, domain, state)| (id, domain, state))
        .collect()
}

fn entry(id: u32, state: &str) -> (u32, String, String) {
    (id, "web".into(), state.into())
}

/// Changes the end of all jobs on record to a day ago.
fn a_day_passes(system: &System) {
    let catalog = rusqlite::Connection::open(system.dir().join("state/catalog.sqlite")).unwrap();
    let day: i64 = 24 * 3600 * 1_000_000;
    let changed = catalog.execute("UPDATE jobs SET end_time = end_time - ?1", [day]);
    assert!(changed.unwrap() > 0);
}

/// Returns all properties of a job except the object of its domain, which is different after a restart.
async fn told(caller: &Caller, job: &JobProxy<'_>) -> Vec<String> {
    let properties = caller
        .properties(job.inner().path(), "org.example.Backup1.Job")
        .await;
    let mut told: Vec<_> = properties
        .into_iter()
        // A store does not record why a disk was copied as a whole.
        .filter(|(name, _)| name != "Domain" && name != "Increments")
        .map(|(name, value)| format!("{name} {value:?}"))
        .collect();
    told.sort();
    told.push(job.get_definition().await.unwrap());
    told.push(format!("{:?}", job.wait().await.unwrap()));
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_ended_long_ago_are_listed_on_request() {
    let rules = polkit::allow(USER, &["domain.backup"]) + &polkit::deny(OTHER_USER, &["domain.read"]);
    let mut system = System::setup().rules(&rules).start();
    let vm = machine(&system);
    let user = Caller::of_user(&system, USER).await;
    let first = user.complete("web", DOCUMENT).await;
    let before = told(&user, &first).await;
    let options = slowly(1);
    let second = user.start_with("web", "", &[], options).await;
    cancel(&second).await;
    drop((first, second));
    system.stop_daemon();
    a_day_passes(&system);
    system.start_daemon();
    system.wait_for_domain("web");
    let user = Caller::of_user(&system, USER).await;
    assert_eq!(listed(&user, Options::new()).await, []);
    assert_eq!(user.manager.list_jobs().await.unwrap(), []);
    let history = [entry(1, "completed"), entry(2, "cancelled")];
    assert_eq!(listed(&user, all()).await, history);
    let job = user.job(user.manager.get_job(1).await.unwrap()).await;
    assert_eq!(told(&user, &job).await, before);
    // Ten minutes after the end, the starter has the rights of any other user.
    let late = job.cancel().await.unwrap_err();
    assert!(
        error_name(&late).ends_with("InteractiveAuthorizationRequired"),
        "{late}"
    );
    let root = Caller::new(&system).await;
    let late = root
        .job(job.inner().path().to_owned().into())
        .await
        .cancel()
        .await;
    assert_eq!(
        error_name(&late.unwrap_err()),
        "org.example.Backup1.Error.JobEnded"
    );

    // The next one gets a new number and is listed once.
    user.complete_full("web", "").await;
    assert_eq!(listed(&user, Options::new()).await, [entry(3, "completed")]);
    let history = [history.as_slice(), &[entry(3, "completed")]].concat();
    assert_eq!(listed(&user, all()).await, history);

    // A caller without the read right for the domain does not see it, and one with the right does, after the domain is
    // gone too.
    drop(vm);
    std::fs::remove_file(system.dir().join("etc/domains.d/web.toml")).unwrap();
    system.wait_for_no_domain("web");
    let other = Caller::of_user(&system, OTHER_USER).await;
    assert_eq!(listed(&other, all()).await, []);
    let hidden = other.manager.get_job(1).await.unwrap_err();
    assert_eq!(error_name(&hidden), "org.example.Backup1.Error.NoSuchJob");
    let hidden = other.job(user.manager.get_job(1).await.unwrap()).await;
    let hidden = hidden.wait().await.unwrap_err();
    assert_eq!(error_name(&hidden), "org.freedesktop.DBus.Error.UnknownObject");
    let root = Caller::new(&system).await;
    assert_eq!(listed(&root, all()).await, history);

    let output = system
        .clients()
        .backupctl(USER, &["jobs", "--all"])
        .expect_success();
    assert_eq!(output.lines().count(), 4, "{output}");
    assert!(output.lines().nth(2).unwrap().contains("cancelled"), "{output}");
}

#[tokio::test(flavor = "multi_thread")]
async fn list_filters_match_the_listed_jobs() {
    let system = System::start();
    let caller = Caller::new(&system).await;
    for (key, value) in [("ended", Variant::from("yes")), ("endd", Variant::from(true))] {
        let refused = caller.manager.list_jobs_with(Options::from([(key, value)])).await;
        let refused = refused.unwrap_err();
        assert_eq!(error_name(&refused), "org.freedesktop.DBus.Error.InvalidArgs");
        assert!(refused.to_string().contains(key), "{refused}");
    }
}

/// Returns the directory of each backup, by time.
fn backups(system: &System) -> Vec<PathBuf> {
    let directory = system.store().join("web");
    let entries = std::fs::read_dir(directory).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Starts the service without its catalog and connects it to its domain.
fn forget_everything(system: &mut System) {
    start_anew(system);
    system.wait_for_domain("web");
}

/// Starts the service without its catalog.
fn start_anew(system: &mut System) {
    system.stop_daemon();
    for entry in std::fs::read_dir(system.dir().join("state")).unwrap() {
        let path = entry.unwrap().path();
        if path
            .file_name()
            .unwrap()
            .to_string_lossy()
            .starts_with("catalog.")
        {
            std::fs::remove_file(path).unwrap();
        }
    }
    system.start_daemon();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_catalog_is_rebuilt_from_the_stores() {
    let rules = polkit::allow(USER, &["domain.backup"]);
    let mut system = System::setup().rules(&rules).start();
    let _vm = machine(&system);
    let user = Caller::of_user(&system, USER).await;
    let options = slowly(1);
    let cancelled = user.start_with("web", "", &[], options).await;
    cancel(&cancelled).await;
    let (second, third) = (
        user.complete("web", DOCUMENT).await,
        Caller::new(&system).await.complete_full("web", "").await,
    );
    let before = [told(&user, &second).await, told(&user, &third).await];

    // The service does not scan a store without its mark at the start.
    std::fs::remove_dir_all(system.store().join(".backupd")).unwrap();
    forget_everything(&mut system);
    let root = Caller::new(&system).await;
    assert_eq!(listed(&root, all()).await, []);
    // A number that was assigned in between stays assigned.
    for _ in 0..2 {
        root.complete_full("web", "").await;
    }
    assert_eq!(root.manager.rescan(Options::new()).await.unwrap(), (4, vec![]));
    let history = [1, 2, 3, 4].map(|id| entry(id, "completed"));
    assert_eq!(listed(&root, all()).await, history);
    let user = Caller::of_user(&system, USER).await;
    for (before, (old, new)) in before.iter().zip([(2, 3), (3, 4)]) {
        let job = user.job(user.manager.get_job(new).await.unwrap()).await;
        let renumbered = before.iter().map(|line| match line.starts_with("Id ") {
            true => line.replace(&format!("({old})"), &format!("({new})")),
            false => line.clone(),
        });
        let (told, renumbered) = (told(&user, &job).await, renumbered.collect::<Vec<_>>());
        assert_eq!(told, renumbered);
    }

    // A second scan changes nothing, and the next job gets a new number.
    assert_eq!(root.manager.rescan(Options::new()).await.unwrap(), (4, vec![]));
    assert_eq!(listed(&root, all()).await, history);
    assert_eq!(root.complete_full("web", "").await.id().await.unwrap(), 5);
}

fn records(system: &System) -> Vec<String> {
    let path = system.dir().join("state/catalog.sqlite");
    let catalog = rusqlite::Connection::open(path).unwrap();
    let mut select = catalog.prepare("SELECT id FROM backups ORDER BY id").unwrap();
    let rows = select.query_map([], |row| row.get(0)).unwrap();
    rows.map(Result::unwrap).collect()
}

fn change_manifest(backup: &Path, change: impl FnOnce(&mut Value)) {
    let path = backup.join("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut manifest);
    std::fs::write(&path, manifest.to_string()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescan_reports_bad_backups_and_removes_missing_ones_from_the_catalog() {
    let mut system = System::start();
    let _vm = machine(&system);
    let caller = Caller::new(&system).await;
    for _ in 0..8 {
        caller.complete_full("web", "").await;
    }
    let backups = backups(&system);
    std::fs::remove_dir_all(&backups[0]).unwrap();
    std::fs::write(backups[1].join("manifest.json"), "{").unwrap();
    std::fs::remove_file(backups[2].join("vda.qcow2")).unwrap();
    change_manifest(&backups[3], |manifest| manifest["id"] = json!("another"));
    change_manifest(&backups[4], |manifest| {
        manifest["domain"]["name"] = json!("1000:db")
    });
    change_manifest(&backups[5], |manifest| manifest["version"] = json!(2));
    let domain = system.store().join("web");
    chown(&backups[7], Some(7), None).unwrap();
    // Entries that are not backups: a staging directory, a foreign file, a link, another directory.
    std::fs::create_dir(domain.join(".20261123T000000Z-00000000.partial")).unwrap();
    std::fs::write(domain.join("notes.txt"), "mine").unwrap();
    symlink(&backups[6], domain.join("linked")).unwrap();
    std::fs::create_dir(system.store().join("lost+found")).unwrap();

    let partial = domain.join(".20261123T000000Z-00000000.partial");
    let (found, problems) = caller.manager.rescan(Options::new()).await.unwrap();
    assert_eq!(found, 1, "{problems:#?}");
    let expected = [
        (&partial, "staging directory of an unknown job"),
        (&backups[1], "manifest.json: EOF"),
        (&backups[2], "vda.qcow2: No such file"),
        (&backups[3], "belongs to backup 'another'"),
        (&backups[4], "'1000:db' is not a valid name of a domain"),
        (&backups[5], "newer backupd"),
        (&backups[7], "belongs to user 7"),
    ];
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    for ((path, why), problem) in expected.into_iter().zip(&problems) {
        assert!(problem.starts_with(path.to_str().unwrap()), "{problem}");
        assert!(problem.contains(why), "{why:?} in {problem}");
    }
    let output = system.clients().backupctl(ROOT, &["rescan"]);
    assert_eq!(output.status, 1, "{output:?}");
    assert!(
        output.stdout.starts_with("There is 1 backup in the stores\n"),
        "{output:?}"
    );
    let output = system.clients().backupctl(USER, &["rescan", "--no-ask-password"]);
    assert_eq!(output.status, 4, "{output:?}");
    system.stop_daemon();
    // An existing backup is not missing, even if it is damaged.
    let names = backups[1..]
        .iter()
        .map(|path| path.file_name().unwrap().to_str().unwrap());
    let names: Vec<_> = names.collect();
    assert_eq!(records(&system), names);
    assert!(domain.join("notes.txt").exists());

    // An unreadable store is not an empty one.
    let aside = system.dir().join("aside");
    std::fs::rename(system.store(), &aside).unwrap();
    std::fs::write(system.store(), "").unwrap();
    system.start_daemon();
    let caller = Caller::new(&system).await;
    let (found, problems) = caller.manager.rescan(Options::new()).await.unwrap();
    assert_eq!((found, problems.len()), (0, 1), "{problems:#?}");
    // Neither is an unmounted one.
    std::fs::remove_file(system.store()).unwrap();
    std::fs::create_dir(system.store()).unwrap();
    let (found, problems) = caller.manager.rescan(Options::new()).await.unwrap();
    assert_eq!((found, problems.len()), (0, 1), "{problems:#?}");
    assert!(
        problems[0].contains("Check that the store is mounted"),
        "{problems:#?}"
    );
    system.stop_daemon();
    assert_eq!(records(&system), names);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescan_imports_no_bad_backup_and_ignores_running_ones() {
    let mut system = System::start();
    let vm = machine(&system);
    let caller = Caller::new(&system).await;
    let failed = caller.complete_full("web", "").await;
    system.stop_daemon();
    // Simulates a cancelled backup whose directory could not be removed.
    let sql = "UPDATE jobs SET result = 'cancelled'; DELETE FROM backups;";
    let catalog = rusqlite::Connection::open(system.dir().join("state/catalog.sqlite")).unwrap();
    catalog.execute_batch(sql).unwrap();
    drop((catalog, failed));
    system.start_daemon();
    system.wait_for_domain("web");
    let caller = Caller::new(&system).await;
    let options = slowly(1);
    let running = caller.start_with("web", "", &[], options).await;
    let (found, problems) = caller.manager.rescan(Options::new()).await.unwrap();
    assert_eq!((found, problems.len()), (0, 1), "{problems:#?}");
    let directory = backups(&system)
        .into_iter()
        .find(|path| !path.to_str().unwrap().contains("/."));
    let expected = format!("{}: its job 1 did not complete", directory.unwrap().display());
    assert!(problems[0].starts_with(&expected), "{problems:#?}");
    cancel(&running).await;
    system.stop_daemon();
    assert_eq!(records(&system), [""; 0]);
    drop(vm);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_from_another_host_grants_no_rights() {
    let rules = polkit::allow(USER, &["domain.backup", "service.register-domain"])
        + &polkit::deny(USER, &["domain.read"]);
    let mut system = System::setup().rules(&rules).start();
    let vm = machine(&system);
    let mine = system
        .vm("mine")
        .disk(Disk::new("vda", 4 * MIB))
        .running()
        .start();
    let user = Caller::of_user(&system, USER).await;
    user.complete_full("web", "").await;
    user.register("mine", mine.monitor_stream().into()).await.unwrap();
    user.complete("mine", "").await;
    let seen = listed(&user, all()).await;
    assert_eq!(seen.len(), 2, "the job that it started");
    drop((vm, mine));
    start_anew(&mut system);
    let root = Caller::new(&system).await;
    assert_eq!(root.manager.rescan(Options::new()).await.unwrap(), (2, vec![]));
    assert_eq!(listed(&root, all()).await.len(), 2);
    let user = Caller::of_user(&system, USER).await;
    assert_eq!(
        listed(&user, all()).await,
        [],
        "jobs of the former user of the uid are listed"
    );
    for id in [1, 2] {
        let hidden = user.manager.get_job(id).await.unwrap_err();
        assert_eq!(error_name(&hidden), "org.example.Backup1.Error.NoSuchJob");
    }
    // A caller with the right to read everything except users' own domains sees the other.
    system.set_rules("");
    let user = Caller::of_user(&system, USER).await;
    assert_eq!(listed(&user, all()).await, [entry(1, "completed")]);
}

/// Changes the catalog while the service is stopped.
fn change(system: &System, sql: &str) {
    let catalog = rusqlite::Connection::open(system.dir().join("state/catalog.sqlite")).unwrap();
    assert!(catalog.execute(sql, []).unwrap() > 0, "{sql}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_user_of_a_uid_has_no_rights_over_earlier_jobs() {
    let rules = polkit::allow(USER, &["domain.backup"]) + &polkit::deny(USER, &["domain.read"]);
    let mut system = System::setup().rules(&rules).start();
    let _vm = machine(&system);
    let user = Caller::of_user(&system, USER).await;
    let job = user.complete("web", "").await;
    let id = job.id().await.unwrap();
    let find = async |system: &System| {
        let user = Caller::of_user(system, USER).await;
        let found = user.manager.get_job(id).await.map(drop);
        let listed = listed(&user, all()).await.len();
        (found.map_err(|error| error_name(&error)), listed)
    };
    let missing = "org.example.Backup1.Error.NoSuchJob".to_owned();
    assert_eq!(find(&system).await, (Ok(()), 1));
    system.start_daemon();
    assert_eq!(find(&system).await, (Ok(()), 1), "it ended a moment ago");
    system.stop_daemon();
    change(&system, "UPDATE jobs SET started_by_name = 'somebody'");
    system.start_daemon();
    assert_eq!(find(&system).await, (Err(missing.clone()), 0));
    system.stop_daemon();
    let name = polkit::user_name(USER);
    change(&system, &format!("UPDATE jobs SET started_by_name = '{name}'"));
    system.start_daemon();
    assert_eq!(find(&system).await, (Ok(()), 1));
    system.stop_daemon();
    a_day_passes(&system);
    system.start_daemon();
    assert_eq!(
        find(&system).await,
        (Err(missing), 0),
        "only callers with the read right"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_user_of_a_uid_does_not_see_earlier_backups() {
    let rules = polkit::allow(USER, &["domain.backup", "service.register-domain"]);
    let mut system = System::setup().rules(&rules).start();
    let vm = system.vm("mine").disk(Disk::new("vda", MIB)).start();
    let user = Caller::of_user(&system, USER).await;
    user.register("mine", vm.monitor_stream().into()).await.unwrap();
    user.complete("mine", "").await;
    user.connection.close().await.unwrap();
    let listed = async |system: &System| {
        let user = Caller::of_user(system, USER).await;
        let backups = user.manager.list_backups(Options::new()).await.unwrap().0.len();
        (backups, listed(&user, all()).await.len())
    };
    system.start_daemon();
    assert_eq!(listed(&system).await, (1, 1));
    system.stop_daemon();
    change(&system, "UPDATE backups SET domain_owner_name = 'somebody'");
    change(
        &system,
        "UPDATE jobs SET domain_owner_name = 'somebody', started_by_name = 'somebody'",
    );
    system.start_daemon();
    assert_eq!(listed(&system).await, (0, 0));
}

/// Registers the VM and backs it up. Returns the kind of the backup, and the name of its directory in the store.
async fn back_up_own(system: &System, vm: &Vm) -> (Caller, String, String) {
    let user = Caller::of_user(system, USER).await;
    user.register("mine", vm.monitor_stream().into()).await.unwrap();
    let job = user.complete("mine", "").await;
    let image = PathBuf::from(&job.disks().await.unwrap()[0].4);
    let backup = image.parent().unwrap();
    let manifest = std::fs::read(backup.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let directory = backup.parent().unwrap().file_name().unwrap().to_str().unwrap();
    let kind = manifest["kind"].as_str().unwrap();
    (user, kind.to_owned(), directory.to_owned())
}

async fn own_domain(user: &Caller) -> DomainProxy<'static> {
    let path = user.manager.get_domain("mine").await.unwrap();
    DomainProxy::new(&user.connection, path).await.unwrap()
}

/// Returns how many backups a user sees, and whether the user sees what the checkpoint `kept` is. Its bitmap is on the
/// disk in any case.
async fn seen(user: &Caller) -> (usize, bool) {
    let backups = user.manager.list_backups(Options::new()).await.unwrap().0;
    let domain = own_domain(user).await;
    let checkpoints = domain.list_checkpoints(Options::new()).await.unwrap();
    let kept = checkpoints.iter().any(|checkpoint| checkpoint.0 == "kept");
    (backups.len(), kept)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_user_of_a_uid_continues_no_earlier_chain() {
    let rules = polkit::allow(
        USER,
        &["domain.backup", "service.register-domain", "domain.checkpoint"],
    );
    let mut system = System::setup().rules(&rules).start();
    let vm = system.vm("mine").disk(Disk::new("vda", MIB)).start();
    let own = format!("{USER}:mine");
    let (user, kind, directory) = back_up_own(&system, &vm).await;
    assert_eq!((&*kind, &directory), ("full", &own));
    let domain = own_domain(&user).await;
    let kept = "<domaincheckpoint><name>kept</name></domaincheckpoint>";
    domain.create_checkpoint(kept, Options::new()).await.unwrap();
    assert_eq!(seen(&user).await, (1, true));
    drop((user, domain));
    system.start_daemon();
    let (user, kind, directory) = back_up_own(&system, &vm).await;
    assert_eq!((&*kind, &directory), ("incremental", &own), "the same user");
    assert_eq!(seen(&user).await, (2, true));
    drop(user);
    system.stop_daemon();
    let another = |table: &str| {
        change(
            &system,
            &format!("UPDATE {table} SET domain_owner_name = 'somebody'"),
        )
    };
    ["backups", "jobs"].into_iter().for_each(another);
    change(
        &system,
        &format!(
            "UPDATE checkpoints SET owner_name = 'somebody', domain = replace(domain, ':{}:', ':somebody:')",
            polkit::user_name(USER)
        ),
    );
    system.start_daemon();
    let (user, kind, directory) = back_up_own(&system, &vm).await;
    assert_eq!(kind, "full");
    assert!(directory.starts_with(&format!("{own}-")), "{directory}");
    assert_eq!(seen(&user).await, (1, false));
    let job = user.complete("mine", "").await;
    let image = PathBuf::from(&job.disks().await.unwrap()[0].4);
    assert!(image.starts_with(system.store().join(directory)), "its own chain");
    assert_eq!(seen(&user).await, (2, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_without_a_name_leaves_nothing_for_the_next_user_of_the_uid() {
    let rules = polkit::allow(
        USER,
        &["domain.backup", "service.register-domain", "domain.checkpoint"],
    );
    let mut system = System::setup().rules(&rules).without_daemon().start();
    system.take_name(USER);
    system.start_daemon();
    let disk = Disk::new("vda", 4 * MIB).fill(0, 4 * MIB, 0x11);
    let vm = system.vm("mine").disk(disk).start();
    let user = Caller::of_user(&system, USER).await;
    user.register("mine", vm.monitor_stream().into()).await.unwrap();
    let domain = own_domain(&user).await;
    let root = Caller::new(&system).await;
    let unique = format!("{USER}:mine");
    let refused = [
        user.try_start("mine", "", &[], Options::new()).await.unwrap_err(),
        root.try_start(&unique, "", &[], Options::new())
            .await
            .unwrap_err(),
        domain
            .create_checkpoint("<domaincheckpoint/>", Options::new())
            .await
            .unwrap_err(),
    ];
    for refused in refused {
        assert_eq!(error_name(&refused), "org.example.Backup1.Error.Unsupported");
        assert!(refused.to_string().contains("Give the user a name"), "{refused}");
    }
    assert_eq!(crate::common::storage::files_below(&system.store()), [""; 0]);

    // A copy into the user's own file needs no record. Its running job is nobody else's, even after the registration.
    let file = system.dir().join("mine.qcow2");
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(file)
        .unwrap();
    let document = "<domainbackup><bandwidth unit='KiB'>64</bandwidth><disks><disk name='vda' type='fd'><target fd='0'/></disk>\
        </disks></domainbackup>";
    let job = user
        .start_with("mine", document, &[file.into()], Options::new())
        .await;
    let next = Caller::of_user(&system, USER).await;
    assert_eq!(
        listed(&next, Options::new()).await.len(),
        1,
        "as long as it is registered"
    );
    drop((job, domain));
    user.connection.close().await.unwrap();
    wait::until_async("the domain is removed", || async {
        next.manager.get_domain("mine").await.err()
    })
    .await;
    assert_eq!(listed(&next, all()).await, []);
    assert_eq!(listed(&root, Options::new()).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_without_a_name_uses_nothing_that_is_recorded_under_the_uid() {
    let rules = polkit::allow(
        USER,
        &["domain.backup", "service.register-domain", "domain.checkpoint"],
    );
    let mut system = System::setup().rules(&rules).start();
    let vm = system.vm("mine").disk(Disk::new("vda", MIB)).start();
    let (user, ..) = back_up_own(&system, &vm).await;
    let kept = "<domaincheckpoint><name>kept</name></domaincheckpoint>";
    let domain = own_domain(&user).await;
    domain.create_checkpoint(kept, Options::new()).await.unwrap();
    assert_eq!(seen(&user).await, (1, true));
    drop((user, domain));
    system.stop_daemon();
    // As a service before this rule recorded them.
    for table in ["backups", "jobs"] {
        change(
            &system,
            &format!("UPDATE {table} SET domain_owner_name = domain_owner"),
        );
    }
    let name = polkit::user_name(USER);
    change(
        &system,
        &format!(
            "UPDATE checkpoints SET owner_name = owner, domain = replace(domain, ':{name}:', ':' || owner || ':')"
        ),
    );
    system.take_name(USER);
    system.start_daemon();
    let user = Caller::of_user(&system, USER).await;
    user.register("mine", vm.monitor_stream().into()).await.unwrap();
    assert_eq!(seen(&user).await, (0, false));
    assert_eq!(listed(&user, all()).await, []);
    let root = Caller::new(&system).await;
    assert_eq!(
        root.manager.list_backups(Options::new()).await.unwrap().0.len(),
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_sends_few_polkit_requests_for_many_foreign_domains() {
    let mut system = System::setup().without_polkit().start();
    let authority = Authority::start(&system, |_| Answer::Yes).await;
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    root.complete("web", "").await;
    system.stop_daemon();
    change(
        &system,
        "WITH RECURSIVE number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < 400) \
         INSERT INTO jobs (backup_id, domain_name, domain_source, domain_owner, domain_owner_name, started_by, start_time, \
             plan, speed, step, state, end_time, result, disks, left_in_qemu, left_on_disk) \
         SELECT 'id-' || n, 'vm' || n, 'registered', 4000, 'mallory', 4000, 0, plan, 0, 'ended', state, n, 'completed', \
             disks, 0, 0 FROM number, jobs WHERE id = 1",
    );
    a_day_passes(&system);
    let see_foreign = "org.example.backup1.domain.see-foreign";
    authority
        .decide(move |action| {
            if action == see_foreign {
                Answer::No
            } else {
                Answer::Yes
            }
        })
        .await;
    system.start_daemon();
    let user = Caller::of_user(&system, USER).await;
    assert_eq!(listed(&user, all()).await.len(), 1);
    assert_eq!(authority.count(see_foreign), 1);
    // polkit is asked about each, because a rule may hide one by its name.
    authority.decide(|_| Answer::Yes).await;
    assert_eq!(listed(&user, all()).await.len(), 401);
}
