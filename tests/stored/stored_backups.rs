//! Stored backups through the service: restored into open files, exported, verified; and the state after the service
//! ends.

use std::fs::{self, File};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::caller::{Caller, assert_completed};
use crate::common::chain::{directories, id, increment, manifest, write_manifest};
use crate::common::clients::{ROOT, USER};
use crate::common::disk::{Disk, Kind};
use crate::common::polkit;
use crate::common::process;
use crate::common::proxies::{JobProxy, Options, assert_limit, error_name};
use crate::common::stand_in::{HANGS, IS_KILLED, STOPS_AND_FINDS_NOTHING, StandIn, go_on, wait_for_end};
use crate::common::storage::{files_below, identical};
use crate::common::vm::Vm;
use crate::common::wait;
use crate::common::{Setup, System};
use rustix::process::{Signal, kill_process};
use tempfile::TempDir;
use zbus::wire::{OwnedObjectPath, Variant};

const MIB: u64 = 1 << 20;
const INTERFACE: &str = "org.example.Backup1.Backup";

fn machine(system: &System) -> Vm {
    let disks = system
        .vm("web")
        .disk(Disk::new("vda", 16 * MIB).fill(MIB, 4 * MIB, 0x11))
        .disk(Disk::new("vdb", 4 * MIB).raw().fill(0, MIB, 0x22));
    system.configured(disks.running())
}

/// Makes a full backup and an incremental one, and changes only the digest in the manifest of the latter.
async fn chain(system: &System, root: &Caller) -> [PathBuf; 2] {
    root.complete("web", "").await;
    let [full] = directories(&system.store().join("web")).try_into().unwrap();
    let incremental = increment(&full, 1);
    root.manager.rescan(Options::new()).await.unwrap();
    [full, incremental]
}

async fn call<B: serde::Serialize + zbus::DynamicType>(
    caller: &Caller,
    backup: &Path,
    method: &str,
    body: &B,
) -> zbus::Result<zbus::Message> {
    let path = caller.manager.get_backup(&id(backup)).await?;
    let service = Some("org.example.Backup1");
    let called = caller
        .connection
        .call_method(service, &path, Some(INTERFACE), method, body);
    wait::within(method, called).await
}

async fn job(caller: &Caller, reply: zbus::Result<zbus::Message>) -> JobProxy<'static> {
    let reply = reply.unwrap();
    let (_, path): (u32, OwnedObjectPath) = reply.body().deserialize().unwrap();
    caller.job(path).await
}

fn new_file(path: &Path) -> File {
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap()
}

async fn restore(
    caller: &Caller,
    backup: &Path,
    targets: &[(&str, &File)],
    format: &str,
) -> zbus::Result<zbus::Message> {
    let targets: Vec<_> = targets
        .iter()
        .map(|(disk, file)| (*disk, zbus::Fd::from(*file)))
        .collect();
    let options = Options::from([("format", Variant::from(format))]);
    call(caller, backup, "Restore", &(targets, options)).await
}

/// Returns the state of each listed backup by id, and its problem.
async fn states(caller: &Caller) -> Vec<(String, String)> {
    let (backups, _) = caller.manager.list_backups(Options::new()).await.unwrap();
    backups.into_iter().map(|backup| (backup.9, backup.10)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_are_restored_into_open_files_from_every_kind_of_backup() {
    let system = System::start();
    let mut vm = machine(&system);
    let mut root = Caller::new(&system).await;
    let [_, incremental] = chain(&system, &root).await;
    let before = files_below(&system.store());
    let (vda, vdb) = (system.dir().join("vda"), system.dir().join("vdb"));
    let files = [new_file(&vda), new_file(&vdb)];
    root.signals_until("JobEnded").await;
    let restored = restore(
        &root,
        &incremental,
        &[("vdb", &files[1]), ("vda", &files[0])],
        "raw",
    )
    .await;
    let restored = job(&root, restored).await;
    assert_completed(&restored).await;
    assert_eq!(restored.mode().await.unwrap(), "restore");
    assert_eq!(restored.progress().await.unwrap(), 1.0);
    assert_eq!(restored.disks().await.unwrap()[0].0, "vdb");
    let names: Vec<_> = root
        .signals_until("JobEnded")
        .await
        .into_iter()
        .map(|signal| signal.name)
        .collect();
    assert_eq!(
        names,
        [
            "JobStarted",
            "BlockJobCompleted",
            "BlockJobCompleted",
            "Completed",
            "JobEnded"
        ]
    );
    for (error, refused) in [
        ("Unsupported", restored.get_definition().await.map(drop)),
        ("JobEnded", restored.cancel().await),
        ("Unsupported", restored.set_speed(1).await),
    ] {
        assert!(error_name(&refused.unwrap_err()).ends_with(error), "{error}");
    }
    let twice = restore(&root, &incremental, &[("vda", &files[0])], "raw")
        .await
        .unwrap_err();
    assert!(error_name(&twice).ends_with("TargetExists"), "{twice}");
    vm.quit();
    assert!(identical(&vda, "raw", vm.source_path("vda"), "qcow2"));
    assert!(identical(&vdb, "raw", vm.source_path("vdb"), "raw"));
    assert_eq!(files_below(&system.store()), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_disks_than_one_message_passes_are_restored_through_the_service() {
    let system = System::start();
    let mut machine = system.vm("web");
    for number in 0..20 {
        let disk = Disk::new(&format!("sd{number:02}"), MIB).kind(Kind::Scsi);
        machine = machine.disk(disk.fill(0, 64 << 10, number + 1));
    }
    let mut vm = system.configured(machine);
    let root = Caller::new(&system).await;
    root.complete("web", "").await;
    let [full] = directories(&system.store().join("web")).try_into().unwrap();
    let out = system.dir().join("out");
    fs::create_dir(&out).unwrap();
    let output = system.clients().backupctl(
        ROOT,
        &[
            "restore",
            &id(&full),
            "--to",
            out.to_str().unwrap(),
            "--format",
            "raw",
        ],
    );
    assert_eq!(output.status, 0, "{}", output.stderr);
    vm.quit();
    assert_eq!(files_below(&out).len(), 20);
    for number in 0..20 {
        let disk = format!("sd{number:02}");
        let restored = out.join(format!("{disk}.raw"));
        assert!(
            identical(&restored, "raw", vm.source_path(&disk), "qcow2"),
            "{disk}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_impossible_restore_is_refused_and_writes_nothing() {
    let system = System::setup()
        .rules(&polkit::allow(USER, &["backup.verify"]))
        .start();
    let vm = machine(&system);
    let root = Caller::new(&system).await;
    let [full, incremental] = chain(&system, &root).await;
    let path = system.dir().join("vda");
    let file = new_file(&path);
    let refused = async |caller: &Caller, targets: &[(&str, &File)], format, error: &str| {
        let refused = restore(caller, &incremental, targets, format).await.unwrap_err();
        assert!(error_name(&refused).ends_with(error), "{error}: {refused}");
    };
    refused(&root, &[], "raw", "InvalidArgs").await;
    refused(&root, &[("vda", &file)], "vmdk", "InvalidArgs").await;
    refused(&root, &[("vdz", &file)], "raw", "NoSuchDisk").await;
    let other = new_file(&system.dir().join("other"));
    refused(&root, &[("vda", &file), ("vda", &other)], "raw", "InvalidArgs").await;
    let read_only = File::open(&path).unwrap();
    refused(&root, &[("vda", &read_only)], "raw", "TargetInvalid").await;
    let source = File::options()
        .read(true)
        .write(true)
        .open(vm.source_path("vda"))
        .unwrap();
    refused(&root, &[("vda", &source)], "qcow2", "TargetInvalid").await;
    let user = Caller::of_user(&system, USER).await;
    refused(
        &user,
        &[("vda", &file)],
        "raw",
        "InteractiveAuthorizationRequired",
    )
    .await;
    fs::rename(full.join("vda.qcow2"), full.join("gone")).unwrap();
    refused(&root, &[("vda", &file)], "raw", "ChainBroken").await;
    fs::rename(system.store().join("web"), system.store().join("moved")).unwrap();
    refused(&root, &[("vda", &file)], "raw", "NoSuchBackup").await;
    assert_eq!(path.metadata().unwrap().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_reported_and_recorded_for_a_backup_and_its_dependents() {
    let system = System::start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    let [full, incremental] = chain(&system, &root).await;
    assert_completed(&job(&root, call(&root, &full, "Verify", &Options::new()).await).await).await;

    // Its manifest has the digest of other bytes.
    let verified = job(&root, call(&root, &incremental, "Verify", &Options::new()).await).await;
    let (result, name, message) = verified.wait().await.unwrap();
    assert_eq!(
        (result.as_str(), name.rsplit('.').next()),
        ("failed", Some("ChainBroken"))
    );
    assert!(message.contains("checksum"), "{message}");
    assert_eq!(verified.mode().await.unwrap(), "verify");
    let rows = verified.disks().await.unwrap();
    let row = |index: usize| (rows[index].0.as_str(), rows[index].1.as_str());
    assert_eq!(
        (row(0), row(1)),
        ((&*id(&full), "completed"), (&*id(&incremental), "failed"))
    );
    let [(good, _), (damaged, why)] = states(&root).await.try_into().unwrap();
    assert_eq!((good.as_str(), damaged.as_str()), ("complete", "damaged"));
    assert!(why.contains("checksum"), "{why}");

    // Every part of an image is shorter than its header states, and no length was recorded.
    let image = File::options().write(true).open(full.join("vda.qcow2")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&image, &[0xff; 8], 40).unwrap();
    let verified = job(&root, call(&root, &full, "Verify", &Options::new()).await).await;
    assert_eq!(verified.wait().await.unwrap().0, "failed");
    let found = states(&root).await;
    assert!(found.iter().all(|(state, _)| state == "damaged"), "{found:?}");
}

/// Starts a service that finds this program instead of QEMU's.
fn with_program(setup: Setup, name: &str, statements: &str) -> (System, StandIn, TempDir) {
    let place = crate::common::test_directory();
    let program = StandIn::new(place.path(), name, statements);
    let system = setup.environment("PATH", &program.path()).start();
    (system, program, place)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_backup_is_not_recorded_as_damaged() {
    let (system, killed, _place) = with_program(System::setup(), "qemu-img", IS_KILLED);
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    root.complete("web", "").await;
    let [full] = directories(&system.store().join("web")).try_into().unwrap();
    let verified = job(&root, call(&root, &full, "Verify", &Options::new()).await).await;
    let (result, name, message) = verified.wait().await.unwrap();
    assert_eq!(
        (result.as_str(), name.rsplit('.').next()),
        ("failed", Some("QemuError"))
    );
    assert!(message.contains("qemu-img cannot check its image"), "{message}");
    assert_eq!(verified.disks().await.unwrap()[0].1, "cancelled");
    let unchanged = [("complete".to_owned(), String::new())];
    assert_eq!(states(&root).await, unchanged);
    let mut command = Command::new(env!("CARGO_BIN_EXE_backupctl"));
    command
        .args(["verify", &id(&full)])
        .env("DBUS_SYSTEM_BUS_ADDRESS", system.bus().address());
    let output = process::run(command);
    assert_eq!(output.status, 1, "{}{}", output.stdout, output.stderr);
    assert!(output.stdout.contains("unknown"), "{}", output.stdout);
    // Damage that is found at the same time is reported and recorded all the same.
    let mut changed = manifest(&full);
    let sum = changed["disks"][0]["blake3"].as_str().unwrap().to_owned();
    changed["disks"][0]["blake3"] = "0f".repeat(32).into();
    write_manifest(&full, &changed);
    root.manager.rescan(Options::new()).await.unwrap();
    let verified = job(&root, call(&root, &full, "Verify", &Options::new()).await).await;
    assert!(verified.wait().await.unwrap().1.ends_with("ChainBroken"));
    assert_eq!(states(&root).await[0].0, "damaged");
    // The next verification counts.
    changed["disks"][0]["blake3"] = sum.into();
    write_manifest(&full, &changed);
    killed.remove();
    root.manager.rescan(Options::new()).await.unwrap();
    assert_completed(&job(&root, call(&root, &full, "Verify", &Options::new()).await).await).await;
    assert_eq!(states(&root).await, unchanged);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_served_for_reading_until_the_caller_leaves() {
    let system = System::setup().table("[limits]\njobs = 1\n").start();
    let mut vm = machine(&system);
    let root = Caller::new(&system).await;
    let [_, incremental] = chain(&system, &root).await;
    vm.quit();
    let path = system.dir().join("nbd");
    let listener = UnixListener::bind(&path).unwrap();
    let leaving = Caller::new(&system).await;
    let connected = UnixStream::connect(&path).unwrap();
    let body = ("vda", zbus::Fd::from(&connected), Options::new());
    let refused = call(&leaving, &incremental, "Export", &body).await.unwrap_err();
    assert!(error_name(&refused).ends_with("InvalidArgs"), "{refused}");
    drop((listener, connected));
    fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let body = ("", zbus::Fd::from(&listener), Options::new());
    let export = job(&root, call(&leaving, &incremental, "Export", &body).await).await;
    drop(listener);
    let number = export.id().await.unwrap();
    let listed = async || {
        let jobs = root.manager.list_jobs().await.unwrap().into_iter();
        jobs.filter(|job| job.0 == number)
            .map(|job| job.3)
            .collect::<Vec<_>>()
    };
    assert_eq!(listed().await, ["running"]);
    assert_eq!(export.mode().await.unwrap(), "export");
    assert_eq!(export.backup().await.unwrap(), id(&incremental));
    let disks = export.disks().await.unwrap().into_iter();
    assert_eq!(disks.map(|disk| disk.0).collect::<Vec<_>>(), ["vda", "vdb"]);
    for (disk, format) in [("vda", "qcow2"), ("vdb", "raw")] {
        let mut compare = Command::new("qemu-img");
        compare
            .args(["compare", "-f", "raw", "-F", format])
            .arg(format!("nbd+unix:///{disk}?socket={}", path.display()))
            .arg(vm.source_path(disk));
        process::run(compare).expect_success();
    }
    // It counts as a job.
    assert_limit("jobs", call(&root, &incremental, "Verify", &Options::new()).await);
    leaving.connection.close().await.unwrap();
    wait::until("the export to end", || {
        UnixStream::connect(&path).is_err().then_some(())
    });
    wait::until_async("its place to be free", async || {
        let started = call(&root, &incremental, "Verify", &Options::new()).await;
        started.is_ok().then_some(())
    })
    .await;
    assert_completed(&export).await;
    assert_eq!(listed().await, ["completed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_sees_and_ends_anybodys_export_which_keeps_a_backup_from_being_deleted() {
    let system = System::setup()
        .rules(&polkit::allow(USER, &["backup.restore", "domain.read"]))
        .start();
    let mut vm = machine(&system);
    let root = Caller::new(&system).await;
    let [_, incremental] = chain(&system, &root).await;
    vm.quit();
    let socket = system.dir().join("sockets");
    fs::create_dir(&socket).unwrap();
    std::os::unix::fs::chown(&socket, Some(USER), Some(USER)).unwrap();
    let socket = socket.join("nbd");
    let arguments = ["export", &id(&incremental), "--socket", socket.to_str().unwrap()];
    let mut export = system.clients().start_backupctl("export", USER, &arguments);
    let number = wait::until_async("the export to be listed", async || {
        let mut jobs = root.manager.list_jobs().await.unwrap().into_iter();
        jobs.find(|job| job.3 == "running").map(|job| job.0)
    })
    .await;
    let served = root.job(root.manager.get_job(number).await.unwrap()).await;
    assert_eq!(served.started_by_uid().await.unwrap(), USER);
    wait::until("it to be served", || UnixStream::connect(&socket).ok());
    let delete = async || call(&root, &incremental, "Delete", &Options::new()).await;
    let refused = delete().await.unwrap_err();
    assert!(error_name(&refused).ends_with("Busy"), "{refused}");
    served.cancel().await.unwrap();
    assert_eq!(served.wait().await.unwrap().0, "cancelled");
    assert!(UnixStream::connect(&socket).is_err());
    // The user gets the reason.
    assert_eq!(export.wait(), 3, "{}", export.log());
    delete().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_nobody_reads_from_ends() {
    let system = System::setup()
        .table("[deadlines]\nexport-idle-seconds = 1")
        .start();
    let mut vm = machine(&system);
    let root = Caller::new(&system).await;
    let [_, incremental] = chain(&system, &root).await;
    vm.quit();
    let path = system.dir().join("nbd");
    let listener = UnixListener::bind(&path).unwrap();
    let body = ("", zbus::Fd::from(&listener), Options::new());
    let export = job(&root, call(&root, &incremental, "Export", &body).await).await;
    // A connection without reads does not count as use.
    let _idle = UnixStream::connect(&path).unwrap();
    let (result, _, message) = wait::within("the end", export.wait()).await.unwrap();
    assert_eq!(result, "failed");
    assert!(message.contains("export-idle-seconds"), "{message}");
}

/// Starts a service whose restores hang at their start.
fn hanging() -> (System, StandIn, TempDir) {
    with_program(System::setup(), "qemu-storage-daemon", HANGS)
}

/// The limit applies to time without progress, not to the total time.
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_and_a_verification_whose_program_hangs_have_failed_as_stalled() {
    for (program, method) in [("qemu-storage-daemon", "Restore"), ("qemu-img", "Verify")] {
        let setup = System::setup().table("[deadlines]\nstall-seconds = 2");
        let (system, hanging, _place) = with_program(setup, program, HANGS);
        let _vm = machine(&system);
        let root = Caller::new(&system).await;
        root.complete("web", "").await;
        let [full] = directories(&system.store().join("web")).try_into().unwrap();
        let path = system.dir().join("vda");
        let target = new_file(&path);
        let reply = match method {
            "Restore" => restore(&root, &full, &[("vda", &target)], "raw").await,
            _ => call(&root, &full, method, &Options::new()).await,
        };
        let job = job(&root, reply).await;
        let child = hanging.wait_for_start();
        let (result, _, message) = wait::within("the end", job.wait()).await.unwrap();
        assert_eq!(result, "failed", "{method}");
        assert!(
            message.contains("made no progress for 2 seconds"),
            "{method}: {message}"
        );
        wait_for_end(child);
        assert_eq!(path.metadata().unwrap().len(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_cancelled_leaves_nothing_in_the_file() {
    let (system, hanging, _place) = hanging();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    let [full, _] = chain(&system, &root).await;
    let path = system.dir().join("vda");
    let target = new_file(&path);
    let restored = job(&root, restore(&root, &full, &[("vda", &target)], "raw").await).await;
    let child = hanging.wait_for_start();
    restored.cancel().await.unwrap();
    assert_eq!(restored.wait().await.unwrap().0, "cancelled");
    assert_eq!(path.metadata().unwrap().len(), 0);
    wait_for_end(child);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_the_service_did_not_survive_is_recorded_as_failed() {
    let (mut system, hanging, _place) = hanging();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    let [full, _] = chain(&system, &root).await;
    let target = new_file(&system.dir().join("vda"));
    let restored = job(&root, restore(&root, &full, &[("vda", &target)], "raw").await).await;
    let number = restored.id().await.unwrap();
    let child = hanging.wait_for_start();
    system.kill_daemon();
    // systemd ends it with the service.
    kill_process(child, Signal::KILL).unwrap();
    system.start_daemon();
    let root = Caller::new(&system).await;
    let restored = root.job(root.manager.get_job(number).await.unwrap()).await;
    let (result, _, message) = restored.wait().await.unwrap();
    assert_eq!(result, "failed");
    assert!(
        message.contains("the service restarted during the job"),
        "{message}"
    );
    assert_eq!(restored.mode().await.unwrap(), "restore");
    let jobs = root.manager.list_jobs().await.unwrap();
    assert!(
        jobs.iter().any(|job| job.0 == number && job.3 == "failed"),
        "{jobs:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn backupctl_passes_the_users_own_files_to_the_service() {
    let system = System::setup()
        .rules(&polkit::allow(USER, &["backup.restore", "backup.verify"]))
        .start();
    let mut vm = machine(&system);
    let root = Caller::new(&system).await;
    let [full, incremental] = chain(&system, &root).await;
    let out = system.dir().join("out");
    fs::create_dir(&out).unwrap();
    std::os::unix::fs::chown(&out, Some(USER), Some(USER)).unwrap();
    let run = |arguments: &[&str]| system.clients().backupctl(USER, arguments);
    let (full, incremental) = (id(&full), id(&incremental));
    let to = out.to_str().unwrap();
    let restored = run(&["restore", &incremental, "--to", to]);
    assert_eq!(restored.status, 0, "{}", restored.stderr);
    assert!(restored.stdout.contains("restored in"), "{}", restored.stdout);
    let again = run(&["restore", &incremental, "--to", to]);
    assert_eq!(
        (again.status, again.stderr.contains("--force")),
        (1, true),
        "{}",
        again.stderr
    );
    let disk = format!("vda={to}/vda.qcow2");
    let forced = run(&["restore", &full, "--disk", &disk, "--force", "--json"]);
    assert_eq!(forced.status, 0, "{}", forced.stderr);
    assert_eq!(files_below(&out), ["vda.qcow2", "vdb.qcow2"]);
    assert_eq!(
        std::os::unix::fs::MetadataExt::uid(&out.metadata().unwrap()),
        USER
    );

    let good = run(&["verify", &full]);
    assert_eq!(good.status, 0, "{}", good.stderr);
    assert!(
        good.stdout.contains(&format!("default/{full}: good")),
        "{}",
        good.stdout
    );
    // The manifest of the other backup has the digest of other bytes.
    let all = run(&["verify", "--all", "--json"]);
    assert_eq!(all.status, 5, "{}", all.stderr);
    assert!(
        all.stdout.contains("\"damaged\":1,") && all.stdout.contains("checksum"),
        "{}",
        all.stdout
    );
    let unknown = run(&["restore", "2001", "--to", to]);
    assert_eq!(
        (unknown.status, unknown.stderr.contains("no backup '2001'")),
        (1, true)
    );

    let socket = out.join("nbd");
    let arguments = [
        "export",
        &full,
        "--disk",
        "vdb",
        "--socket",
        socket.to_str().unwrap(),
    ];
    let mut export = system.clients().start_backupctl("export", USER, &arguments);
    let uri = wait::until("the disk to be served", || {
        export.stdout().strip_suffix('\n').map(str::to_owned)
    });
    vm.quit();
    for (file, format) in [(uri.as_str(), "raw"), (&format!("{to}/vda.qcow2"), "qcow2")] {
        let disk = if format == "raw" { "vdb" } else { "vda" };
        let mut compare = Command::new("qemu-img");
        compare
            .args(["compare", "-f", format, "-F", vm.source_format(disk), file])
            .arg(vm.source_path(disk));
        process::run(compare).expect_success();
    }
    export.signal(Signal::INT);
    assert_eq!(export.wait(), 0, "{}", export.log());
    assert!(!socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_backupctl_leaves_neither_a_job_nor_a_file() {
    let (system, hanging, _place) = hanging();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    let [full, _] = chain(&system, &root).await;
    let out = system.dir().join("out");
    fs::create_dir(&out).unwrap();
    let arguments = ["restore", &id(&full), "--to", out.to_str().unwrap()];
    let mut restore = system.clients().start_backupctl("restore", 0, &arguments);
    hanging.wait_for_start();
    assert_eq!(files_below(&out), [""; 0], "the files have names already");
    restore.signal(Signal::INT);
    assert_eq!(restore.wait(), 3, "{}", restore.log());
    assert_eq!(files_below(&out), [""; 0]);
    let jobs = root.manager.list_jobs().await.unwrap();
    assert_eq!(jobs.last().unwrap().3, "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_deleted_during_a_verification_is_reported_as_removed() {
    // The check of the first image takes until the others are deleted.
    let setup = System::setup();
    let (system, stopped, _place) = with_program(setup, "qemu-img", STOPS_AND_FINDS_NOTHING);
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    let mut ids: Vec<String> = Vec::new();
    for _ in 0..3 {
        root.complete("web", "").await;
        let made = directories(&system.store().join("web"));
        let new = made.iter().map(|path| id(path)).find(|id| !ids.contains(id));
        ids.push(new.unwrap());
    }
    let mut verify = system
        .clients()
        .start_backupctl("verify", ROOT, &["verify", "--all"]);
    let first = stopped.wait_for_stop();
    let gone = system
        .clients()
        .backupctl(ROOT, &["delete", "--with-dependents", &ids[1]]);
    stopped.remove();
    go_on(first);
    gone.expect_success();
    assert_eq!(verify.wait(), 0, "{}{}", verify.stdout(), verify.log());
    let said = verify.stdout();
    assert!(
        said.contains("1 good, 0 damaged, 0 unknown, 2 removed during the check"),
        "{said}"
    );
    for id in &ids[1..] {
        assert!(said.contains(&format!("{id}: removed")), "{said}");
    }
}
