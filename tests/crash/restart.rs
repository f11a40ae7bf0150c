//! A service that dies in the middle of a backup, and the next one, which resumes it.
//!
//! The service is killed, as if by SIGKILL, at every point between two steps of a backup. After a restart the backup
//! has an outcome, and the job's report, the store and QEMU agree with it.

use std::fmt::Write;
use std::path::Path;

use crate::common::System;
use crate::common::caller::{Caller, assert_completed, brief};
use crate::common::clients::{ROOT, USER};
use crate::common::daemon::Daemon;
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::proxies::{Options, slowly};
use crate::common::storage::{LoopDevice, files_below, identical};
use crate::common::vm::{Residue, Vm};
use crate::common::wait;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// A device on which a backup of the VM fits, and its content before.
const DEVICE: usize = 48 << 20;
const MARK: u8 = 0xa5;

/// A VM that continues while one service after the other dies.
struct Scene {
    system: System,
    vm: Vm,
    before: Residue,
}

/// The state after the service had started again.
struct Row {
    point: String,
    outcome: String,
    files: usize,
    signal: &'static str,
}

impl Scene {
    fn new() -> Self {
        let system = System::start();
        let vm = system.configured(
            system
                .vm("web")
                .disk(Disk::new("vda", 16 * MIB).fill(0, 4 * MIB, 0x11))
                .disk(Disk::new("vdb", 32 * MIB).raw().fill(0, 32 * MIB, 0x22))
                .running(),
        );
        Self {
            before: vm.residue(),
            system,
            vm,
        }
    }

    /// Starts a backup in a service that dies at `point`, cancels it if requested, and starts the service again.
    /// Returns a caller that has received signals since before the start.
    async fn die_and_start_again(&mut self, point: &str, document: &str, cancelled: bool) -> Caller {
        println!("dies at '{point}'");
        self.system.stop_daemon();
        self.system.start_dying_daemon(point);
        self.system.wait_for_domain("web");
        let caller = Caller::new(&self.system).await;
        // Slow enough that a backup is not over before it is cancelled.
        let options = slowly(if cancelled { 4 * MIB } else { 0 });
        let started = caller.try_start("web", document, &[], options).await;
        if cancelled && let Ok(path) = started {
            let job = caller.job(path).await;
            wait::until_async("the copying", || async {
                (job.state().await.unwrap() == "running").then_some(())
            })
            .await;
            // The service may die before it replies.
            let _ = job.cancel().await;
        }
        self.system.wait_for_death();
        let caller = Caller::new(&self.system).await;
        self.system.start_daemon();
        self.system.wait_for_domain("web");
        caller
    }

    /// Returns the outcome of the job of that number, and how a caller that asks again receives it.
    async fn outcome(
        &self,
        mut caller: Caller,
        (point, ended): (&str, bool),
        id: u32,
    ) -> (String, &'static str) {
        let path = caller.manager.get_job(id).await;
        let job = caller.job(path.expect("the job is known")).await;
        let (result, _, message) = wait::within("the end", job.wait()).await.unwrap();
        assert_eq!(job.state().await.unwrap(), result);
        assert_eq!(job.error_message().await.unwrap(), message);
        if ended {
            // The job had ended before, as the record shows; no signal is repeated.
            return (result, "answer");
        }
        let signals = caller.signals_until("JobEnded").await;
        let told = brief(&signals);
        let last = format!("JobEnded {id} {} {result}", job.inner().path());
        assert_eq!(told.last(), Some(&last), "after {point:?}");
        (result, "answer, signal")
    }

    /// Checks that everything agrees with `outcome`: QEMU has no residue, and the directory has the images, or
    /// nothing.
    fn assert_consistent(&self, point: &str, outcome: &str, directory: &Path, names: &[&str]) -> usize {
        assert_eq!(self.vm.residue(), self.before, "in QEMU, after {point:?}");
        let files = files_below(directory);
        let files: Vec<_> = files.iter().filter(|file| !file.is_empty()).collect();
        match outcome {
            "completed" => assert_eq!(files.len(), names.len(), "after {point:?}: {files:?}"),
            _ => assert!(files.is_empty(), "after {point:?}: {files:?}"),
        }
        files.len()
    }

    fn assert_store_holds_the_disks(&mut self) {
        let store = self.system.store();
        let images = files_below(&store);
        let image = |name: &str| store.join(images.iter().find(|path| path.ends_with(name)).unwrap());
        let (vda, vdb) = (image("vda.qcow2"), image("vdb.qcow2"));
        self.assert_images_hold_the_disks(&[("vda", &vda), ("vdb", &vdb)]);
    }

    fn assert_images_hold_the_disks(&mut self, images: &[(&str, &Path)]) {
        self.vm.quit();
        for (disk, image) in images {
            let (source, format) = (self.vm.source_path(disk), self.vm.source_format(disk));
            assert!(identical(source, format, image, "qcow2"), "{}", image.display());
        }
    }
}

fn table(title: &str, rows: &[Row]) -> String {
    let mut text = format!(
        "\n{title}\n{:<26} {:<10} {:>5}  {}\n",
        "dies at", "outcome", "files", "end is"
    );
    for row in rows {
        writeln!(
            text,
            "{:<26} {:<10} {:>5}  {}",
            row.point, row.outcome, row.files, row.signal
        )
        .unwrap();
    }
    text
}

/// From this point on, QEMU has the backup.
const BEGUN: &str = "begun";

impl Scene {
    /// Returns all points at which the service can die during such a backup; from the cancel request on if it is
    /// cancelled.
    async fn points(&mut self, document: &str, cancelled: bool) -> Vec<String> {
        self.system.stop_daemon();
        self.system.start_recording_daemon();
        self.system.wait_for_domain("web");
        let caller = Caller::new(&self.system).await;
        let options = slowly(if cancelled { 4 * MIB } else { 0 });
        let job = caller.start_with("web", document, &[], options).await;
        if cancelled {
            wait::until_async("the copying", || async {
                (job.state().await.unwrap() == "running").then_some(())
            })
            .await;
            job.cancel().await.unwrap();
        }
        wait::within("the end", job.wait()).await.unwrap();
        let first = if cancelled { "cancel requested" } else { "recorded" };
        let points = self.system.passed_points(first);
        assert!(points.len() > if cancelled { 6 } else { 25 }, "{points:?}");
        points
    }
}

/// Once QEMU copies, the backup is not restarted.
fn expected(points: &[String], point: &str) -> &'static str {
    let place = |point: &str| points.iter().position(|known| known == point).unwrap();
    // A checkpoint uses transactions too. Without one, the only transaction starts the backup.
    let begins = point == "qmp transaction" && place(point) + 1 == place(BEGUN);
    match begins || place(point) >= place(BEGUN) {
        true => "completed",
        false => "failed",
    }
}

/// Whether the outcome was on record when the service died.
fn has_ended(points: &[String], point: &str) -> bool {
    let place = |point: &str| points.iter().position(|known| known == point).unwrap();
    place(point) >= place("before announce")
}

fn empty(directory: &Path) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        // The file with the identity of the store stays.
        if path.ends_with(".backupd") {
            continue;
        }
        match path.is_dir() {
            true => std::fs::remove_dir_all(path).unwrap(),
            false => std::fs::remove_file(path).unwrap(),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_into_a_store_survives_a_death_at_every_point() {
    let mut scene = Scene::new();
    let points = scene.points("", false).await;
    let store = scene.system.store();
    empty(&store);
    let mut rows = Vec::new();
    for (point, id) in points.iter().zip(2..) {
        let caller = scene.die_and_start_again(point, "", false).await;
        let (outcome, signal) = scene
            .outcome(caller, (point, has_ended(&points, point)), id)
            .await;
        assert_eq!(outcome, expected(&points, point), "after {point:?}");
        let files = scene.assert_consistent(
            point,
            &outcome,
            &store,
            &["backup.xml", "manifest.json", "vda.qcow2", "vdb.qcow2"],
        );
        rows.push(Row {
            point: point.clone(),
            outcome,
            files,
            signal,
        });
        empty(&store);
    }
    println!("{}", table("A backup into a store", &rows));
    let caller = Caller::new(&scene.system).await;
    caller.complete("web", "").await;
    scene.assert_store_holds_the_disks();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_backup_is_complete() {
    for point in [
        BEGUN,
        "before follow",
        "after close-images",
        "after seal",
        "BeforeRename",
    ] {
        let mut scene = Scene::new();
        let caller = scene.die_and_start_again(point, "", false).await;
        let (outcome, _) = scene.outcome(caller, (point, false), 1).await;
        assert_eq!(outcome, "completed", "after {point:?}");
        scene.assert_store_holds_the_disks();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_into_files_survives_a_death_at_every_point() {
    let mut scene = Scene::new();
    let directory = scene.system.dir().join("files");
    std::fs::create_dir(&directory).unwrap();
    let disk = |name: &str| {
        let path = directory.join(format!("{name}.qcow2"));
        format!(
            "<disk name='{name}' type='file'><target file='{}'/></disk>",
            path.display()
        )
    };
    let document = format!(
        "<domainbackup><disks>{}{}</disks></domainbackup>",
        disk("vda"),
        disk("vdb")
    );
    let points = scene.points(&document, false).await;
    empty(&directory);
    let mut rows = Vec::new();
    for (point, id) in points.iter().zip(2..) {
        let caller = scene.die_and_start_again(point, &document, false).await;
        let (outcome, signal) = scene
            .outcome(caller, (point, has_ended(&points, point)), id)
            .await;
        assert_eq!(outcome, expected(&points, point), "after {point:?}");
        let files = scene.assert_consistent(point, &outcome, &directory, &["vda.qcow2", "vdb.qcow2"]);
        rows.push(Row {
            point: point.clone(),
            outcome,
            files,
            signal,
        });
        empty(&directory);
    }
    println!("{}", table("A backup into files of the caller's", &rows));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_backup_stays_cancelled_after_a_death_at_every_point() {
    let mut scene = Scene::new();
    let points = scene.points("", true).await;
    let mut rows = Vec::new();
    for (point, id) in points.iter().zip(2..) {
        let caller = scene.die_and_start_again(point, "", true).await;
        let (outcome, signal) = scene
            .outcome(caller, (point, has_ended(&points, point)), id)
            .await;
        assert_eq!(outcome, "cancelled", "after {point:?}");
        let store = scene.system.store();
        let files = scene.assert_consistent(point, &outcome, &store, &[]);
        rows.push(Row {
            point: point.clone(),
            outcome,
            files,
            signal,
        });
    }
    println!("{}", table("A backup that is cancelled", &rows));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_job_record_does_not_block_the_start() {
    for (column, value) in [
        ("state", r#"{"version":99}"#),
        ("plan", "no plan"),
        ("domain_uuid", "no UUID"),
    ] {
        let mut scene = Scene::new();
        let vm = scene.system.vm("other").disk(Disk::new("vda", MIB)).running();
        let _other = scene.system.configured(vm);
        scene.system.stop_daemon();
        scene.system.start_dying_daemon("before follow");
        scene.system.wait_for_domain("web");
        let caller = Caller::new(&scene.system).await;
        let _ = caller.try_start("web", "", &[], Options::new()).await;
        scene.system.wait_for_death();
        let catalog = scene.system.dir().join("state/catalog.sqlite");
        let catalog = rusqlite::Connection::open(catalog).unwrap();
        let changed = catalog.execute(&format!("UPDATE jobs SET {column} = ?1 WHERE id = 1"), [value]);
        assert_eq!(changed.unwrap(), 1);
        drop(catalog);
        scene.system.start_daemon();
        scene.system.wait_for_domain("other");
        let caller = Caller::new(&scene.system).await;
        caller.complete("other", "").await;
        assert!(scene.system.daemon().log().contains("cannot recover a job"));
        // A service that can read it finds it unchanged.
        scene.system.stop_daemon();
        let catalog = rusqlite::Connection::open(scene.system.dir().join("state/catalog.sqlite")).unwrap();
        let found: String = catalog
            .query_row(&format!("SELECT {column} FROM jobs WHERE id = 1"), [], |row| {
                row.get(0)
            })
            .unwrap();
        assert_eq!(found, value);
    }
}

/// Starts a slow backup of an undisturbed VM.
async fn slow_backup(scene: &Scene) -> u32 {
    let caller = Caller::new(&scene.system).await;
    let options = slowly(2 * MIB);
    let job = caller.start_with("web", "", &[], options).await;
    wait::until_async("some progress", || async {
        (job.progress().await.unwrap() > 0.0).then_some(())
    })
    .await;
    job.id().await.unwrap()
}

/// Lets the recovered backup continue at full speed until it completes.
async fn ends_well(mut scene: Scene, id: u32) {
    scene.system.wait_for_domain("web");
    let caller = Caller::new(&scene.system).await;
    let job = caller
        .job(caller.manager.get_job(id).await.expect("the job is known"))
        .await;
    assert_eq!(job.state().await.unwrap(), "running");
    assert!(job.progress().await.unwrap() > 0.0);
    let again = caller
        .try_start("web", "", &[], Options::new())
        .await
        .unwrap_err();
    assert!(again.to_string().contains("is busy"), "{again}");
    job.set_speed(0).await.unwrap();
    let (result, _, message) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!((result.as_str(), message.as_str()), ("completed", ""));
    assert_eq!(scene.vm.residue(), scene.before);
    scene.assert_store_holds_the_disks();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_continues_after_the_service_is_killed_and_restarted() {
    let mut scene = Scene::new();
    let id = slow_backup(&scene).await;
    scene.system.kill_daemon();
    scene.system.start_daemon();
    ends_well(scene, id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_continues_after_the_service_is_stopped_and_restarted() {
    let mut scene = Scene::new();
    let id = slow_backup(&scene).await;
    assert_eq!(scene.system.stop_daemon(), Some(0));
    assert_eq!(scene.vm.residue().jobs.len(), 2, "QEMU continues");
    scene.system.start_daemon();
    ends_well(scene, id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_machine_that_is_registered_again_goes_on() {
    let rules = polkit::allow(USER, &["service.register-domain", "domain.backup"]);
    let mut system = System::setup().rules(&rules).start();
    let disk = Disk::new("vda", 32 * MIB).fill(0, 16 * MIB, 0x11);
    let mut vm = system.vm("mine").disk(disk).running().start();
    let before = vm.residue();
    let user = Caller::of_user(&system, USER).await;
    user.register("mine", vm.monitor_stream().into()).await.unwrap();
    let options = slowly(MIB);
    let job = user.start_with("mine", "", &[], options).await;
    wait::until_async("some progress", || async {
        (job.progress().await.unwrap() > 0.0).then_some(())
    })
    .await;
    let target = job.disks().await.unwrap().remove(0).4;
    system.kill_daemon();
    system.start_daemon();
    let user = Caller::of_user(&system, USER).await;
    user.register("mine", vm.monitor_stream().into()).await.unwrap();
    let job = user.job(user.manager.get_job(1).await.unwrap()).await;
    job.set_speed(0).await.unwrap();
    assert_completed(&job).await;
    assert_eq!(vm.residue(), before);
    vm.quit();
    assert!(identical(
        vm.source_path("vda"),
        "qcow2",
        Path::new(&target),
        "qcow2"
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_into_an_open_file_fails_with_the_service_and_leaves_no_header() {
    for (format, is_device) in [("qcow2", false), ("raw", false), ("qcow2", true), ("raw", true)] {
        let mut scene = Scene::new();
        let mut path = scene.system.dir().join("mine");
        std::fs::write(&path, "").unwrap();
        let device = is_device.then(|| {
            std::fs::write(&path, vec![MARK; DEVICE]).unwrap();
            LoopDevice::attach(&path, DEVICE as u64)
        });
        if let Some(device) = &device {
            path = device.device().to_owned();
        }
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let document = format!(
            "<domainbackup><disks><disk name='vdb' type='fd'><driver type='{format}'/><target fd='0'/></disk></disks></domainbackup>"
        );
        let caller = Caller::new(&scene.system).await;
        let options = slowly(2 * MIB);
        let job = caller.start_with("web", &document, &[file.into()], options).await;
        wait::until_async("some progress", || async {
            (job.progress().await.unwrap() > 0.0).then_some(())
        })
        .await;
        scene.system.kill_daemon();
        let (result, _, message) = found_out(&mut scene, 1).await;
        assert_eq!(result, "failed");
        assert!(
            message.contains("disappeared while the service restarted"),
            "{message}"
        );
        let left = std::fs::read(&path).unwrap();
        match is_device {
            true => assert!(left[..MIB as usize].iter().all(|byte| *byte == 0), "{format}"),
            false => assert!(left.is_empty(), "{format}"),
        }
        assert_eq!(scene.vm.residue(), scene.before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_replaced_a_target_is_not_touched() {
    for (exchanged, rebooted) in [(false, false), (true, false), (false, true)] {
        let mut scene = Scene::new();
        let (meant, other) = (scene.system.dir().join("meant"), scene.system.dir().join("other"));
        for path in [&meant, &other] {
            std::fs::write(path, vec![MARK; DEVICE]).unwrap();
        }
        let device = LoopDevice::attach(&meant, 0);
        let document = format!(
            "<domainbackup><disks><disk name='vdb' type='block'><driver type='raw'/><target dev='{}'/></disk></disks></domainbackup>",
            device.device().display()
        );
        let caller = Caller::new(&scene.system).await;
        let job = caller.start_with("web", &document, &[], slowly(2 * MIB)).await;
        wait::until_async("some progress", || async {
            (job.progress().await.unwrap() > 0.0).then_some(())
        })
        .await;
        scene.system.kill_daemon();
        scene.vm.kill();
        if exchanged {
            device.exchange(&other);
        }
        if rebooted {
            scene.system.enter_another_boot();
        }
        let (result, _, message) = found_out(&mut scene, 1).await;
        assert_eq!(result, "failed", "{message}");
        let is_wiped = std::fs::read(&meant).unwrap()[..MIB as usize]
            .iter()
            .all(|byte| *byte == 0);
        assert_eq!(is_wiped, !exchanged && !rebooted, "{exchanged} {rebooted}");
        assert!(std::fs::read(&other).unwrap().iter().all(|byte| *byte == MARK));
    }
}

/// Returns the next service's report about a job that ended while no service ran.
async fn found_out(scene: &mut Scene, id: u32) -> (String, String, String) {
    scene.system.start_daemon();
    let caller = Caller::new(&scene.system).await;
    let job = caller
        .job(caller.manager.get_job(id).await.expect("the job is known"))
        .await;
    wait::within("the end", job.wait()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_ended_while_the_service_was_down_has_its_true_outcome() {
    for cancelled in [false, true] {
        let mut scene = Scene::new();
        let id = slow_backup(&scene).await;
        scene.system.kill_daemon();
        for job in scene.vm.residue().jobs {
            match cancelled {
                true => scene
                    .vm
                    .try_qmp("block-job-cancel", json!({ "device": job, "force": true })),
                false => scene
                    .vm
                    .try_qmp("block-job-set-speed", json!({ "device": job, "speed": 0 })),
            }
            .ok();
        }
        wait::until("the block jobs to conclude", || {
            let jobs = scene.vm.qmp("query-jobs", json!({}));
            let mut jobs = jobs.as_array().unwrap().iter();
            jobs.all(|job| job["status"] == "concluded").then_some(())
        });
        let (result, _, _) = found_out(&mut scene, id).await;
        assert_eq!(result, if cancelled { "cancelled" } else { "completed" });
        assert_eq!(scene.vm.residue(), scene.before);
        let files = if cancelled { 0 } else { 4 };
        assert_eq!(
            files_below(&scene.system.store())
                .iter()
                .filter(|it| !it.is_empty())
                .count(),
            files
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_whose_qemu_ended_during_the_restart_fails() {
    let mut scene = Scene::new();
    let id = slow_backup(&scene).await;
    scene.system.kill_daemon();
    scene.vm.kill();
    let (result, name, message) = found_out(&mut scene, id).await;
    assert_eq!(
        (result.as_str(), name.as_str()),
        ("failed", "org.example.Backup1.Error.DomainUnreachable")
    );
    assert!(message.contains("it has ended"), "{message}");
    assert!(files_below(&scene.system.store()).iter().all(String::is_empty));
}

#[tokio::test(flavor = "multi_thread")]
async fn recently_finished_jobs_have_the_same_properties_after_a_restart() {
    let mut scene = Scene::new();
    let caller = Caller::new(&scene.system).await;
    let job = caller.complete("web", "").await;
    let (path, disks) = (job.inner().path().to_owned(), job.disks().await.unwrap());
    let definition = job.get_definition().await.unwrap();
    scene.system.kill_daemon();
    scene.system.start_daemon();
    let caller = Caller::new(&scene.system).await;
    let again = caller.manager.get_job(1).await.unwrap();
    assert_eq!(again.as_str(), path.as_str());
    let job = caller.job(again).await;
    assert_eq!(job.wait().await.unwrap().0, "completed");
    assert_eq!(job.disks().await.unwrap(), disks);
    assert_eq!(job.get_definition().await.unwrap(), definition);
    assert_eq!(job.progress().await.unwrap(), 1.0);
    assert_eq!(caller.manager.list_jobs().await.unwrap().len(), 1);
    // The next one has another number.
    scene.system.wait_for_domain("web");
    assert_eq!(caller.complete("web", "").await.id().await.unwrap(), 2);
}

#[test]
fn an_unreadable_catalog_stops_the_service_with_advice() {
    let mut system = System::start();
    system.stop_daemon();
    let catalog = system.dir().join("state/catalog.sqlite");
    let good = std::fs::read(&catalog).unwrap();
    std::fs::write(&catalog, vec![0x5a; good.len()]).unwrap();
    let config = system.config_path();
    let mut daemon = Daemon::start_unready(system.bus(), system.dir(), &config);
    // systemd treats this exit status as final.
    assert_eq!(daemon.process().wait(), 78);
    let log = daemon.log();
    assert!(
        log.contains("is damaged") && log.contains("move it away"),
        "{log}"
    );
    assert_eq!(
        std::fs::read(&catalog).unwrap(),
        vec![0x5a; good.len()],
        "the target was replaced"
    );
    std::fs::write(&catalog, good).unwrap();
    system.start_daemon();
}

#[tokio::test(flavor = "multi_thread")]
async fn backupctl_reports_the_end_of_a_backup_whose_service_died_before_it_answered() {
    let mut scene = Scene::new();
    for (number, point, state) in [(1, "recorded", "failed"), (2, "begun", "completed")] {
        scene.system.stop_daemon();
        scene.system.start_dying_daemon(point);
        scene.system.wait_for_domain("web");
        let name = format!("create-{number}");
        let arguments = ["--json", "create", "web"];
        let mut create = scene.system.clients().start_backupctl(&name, ROOT, &arguments);
        scene.system.wait_for_death();
        wait::until("backupctl to miss the service", || {
            create.log().contains("has left the bus").then_some(())
        });
        scene.system.start_daemon();
        let status = create.wait();
        assert_eq!(
            status == 0,
            state == "completed",
            "{point}: {status}: {}",
            create.log()
        );
        let said = create.stdout();
        let last: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        assert_eq!(
            (&last["id"], &last["state"]),
            (&json!(number), &json!(state)),
            "{said}"
        );
        assert_eq!(scene.vm.residue(), scene.before);
    }
    scene.assert_store_holds_the_disks();
}
