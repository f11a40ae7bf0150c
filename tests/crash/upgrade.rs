//! An upgrade restarts the service without interrupting work that a restart would lose, and loses no call.

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::System;
use crate::common::activation::{Activation, Systemd};
use crate::common::caller::{Caller, assert_completed};
use crate::common::chain::{directories, id};
use crate::common::disk::Disk;
use crate::common::hanging::{Hanging, Limits, Operation};
use crate::common::proxies::{JobProxy, ManagerProxy, Options, slowly};
use crate::common::vm::Vm;
use crate::common::wait;
use backupd::names::BUS_NAME;
use futures_util::future::join_all;
use rustix::process::{Pid, Signal, kill_process};
use zbus::wire::{OwnedObjectPath, Variant};

const MIB: u64 = 1 << 20;

/// Starts a service under the systemd stand-in, with a VM that it knows.
async fn supervised(bytes: u64) -> (System, Systemd, Vm, Caller) {
    let system = System::setup().on_demand(Activation::Systemd).start();
    let systemd = Systemd::start(&system, None).await;
    let vm = system
        .vm("web")
        .disk(Disk::new("vda", bytes).fill(0, bytes, 0x11))
        .start();
    system.domain_file("web", &vm);
    let root = Caller::new(&system).await;
    (system, systemd, vm, root)
}

fn service(system: &System) -> Pid {
    let owner = system.bus().name_owner(BUS_NAME).expect("the service is there");
    Pid::from_raw(owner as i32).unwrap()
}

/// Signals the service as the package does after an upgrade.
fn ask_to_make_room(service: Pid) {
    kill_process(service, Signal::USR1).unwrap();
}

fn backup(system: &System) -> PathBuf {
    let [full] = directories(&system.store().join("web")).try_into().unwrap();
    full
}

async fn call(
    caller: &Caller,
    backup: &Path,
    method: &str,
    body: &(impl serde::Serialize + zbus::DynamicType),
) -> (u32, JobProxy<'static>) {
    let object = caller.manager.get_backup(&id(backup)).await.unwrap();
    let interface = Some("org.example.Backup1.Backup");
    let connection = &caller.connection;
    let reply = connection
        .call_method(Some(BUS_NAME), &object, interface, method, body)
        .await;
    let (number, path): (u32, OwnedObjectPath) = reply.unwrap().body().deserialize().unwrap();
    (number, caller.job(path).await)
}

async fn ended(systemd: &Systemd, times: usize) {
    wait::until_async("another service to be ready", async || {
        (systemd.said("READY=1") == times + 1).then_some(())
    })
    .await;
    assert_eq!(systemd.ends(), vec![75; times]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_completes_before_an_upgraded_service_starts() {
    let (system, systemd, _vm, root) = supervised(MIB).await;
    root.complete("web", "").await;
    let storage = Hanging::mount(&system.dir().join("slow"), Limits::default());
    let path = storage.path().join("vda");
    let target = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    let before = service(&system);
    storage.hang(Operation::Write);
    let targets = [("vda", zbus::Fd::from(&target))];
    let options = Options::from([("format", Variant::from("raw"))]);
    let full = backup(&system);
    let (number, restored) = call(&root, &full, "Restore", &(targets.as_slice(), options)).await;
    storage.affected().await;
    ask_to_make_room(before);
    // The old service serves until then, even after a second request.
    root.complete("web", "").await;
    ask_to_make_room(before);
    root.complete("web", "").await;
    assert_eq!((service(&system), systemd.ends()), (before, vec![]));
    storage.heal();
    let (result, _, message) = wait::within("the restore", restored.wait()).await.unwrap();
    assert_eq!(result, "completed", "{message}");
    assert_eq!(fs::read(&path).unwrap(), vec![0x11; MIB as usize]);
    ended(&systemd, 1).await;
    let known = root.job(root.manager.get_job(number).await.unwrap()).await;
    assert_eq!(known.state().await.unwrap(), "completed");
    assert_ne!(service(&system), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_continues_during_an_upgrade() {
    let (system, systemd, _vm, root) = supervised(64 * MIB).await;
    let job = root.start_with("web", "", &[], slowly(16 * MIB)).await;
    let number = job.id().await.unwrap();
    ask_to_make_room(service(&system));
    // The old service or the new one answers each call.
    while systemd.ends().is_empty() {
        root.manager.list_domains().await.unwrap();
    }
    ended(&systemd, 1).await;
    let job = root.job(root.manager.get_job(number).await.unwrap()).await;
    assert_completed(&job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_keeps_a_new_version_from_starting_for_a_bounded_time() {
    let system = System::setup()
        .table("[deadlines]\nupgrade-seconds = 1")
        .on_demand(Activation::Systemd)
        .start();
    let systemd = Systemd::start(&system, None).await;
    let vm = system.vm("web").disk(Disk::new("vda", MIB)).start();
    system.domain_file("web", &vm);
    let root = Caller::new(&system).await;
    root.complete("web", "").await;
    let listener = UnixListener::bind(system.dir().join("nbd")).unwrap();
    let body = ("", zbus::Fd::from(&listener), Options::new());
    let (number, export) = call(&root, &backup(&system), "Export", &body).await;
    assert_eq!(export.state().await.unwrap(), "running");
    ask_to_make_room(service(&system));
    ended(&systemd, 1).await;
    let known = root.job(root.manager.get_job(number).await.unwrap()).await;
    assert_eq!(known.state().await.unwrap(), "failed");
}

/// Verifications that begin at all moments of the exit: the service that began one finishes it.
#[tokio::test(flavor = "multi_thread")]
async fn work_that_starts_during_an_upgrade_is_not_lost() {
    const ROUNDS: usize = 12;
    const CALLERS: usize = 3;
    let (system, systemd, _vm, root) = supervised(MIB).await;
    root.complete("web", "").await;
    let full = backup(&system);
    let done = AtomicBool::new(false);
    let mut callers = Vec::new();
    for _ in 0..CALLERS {
        callers.push(ManagerProxy::new(&system.connect().await).await.unwrap());
    }
    let verifications = callers.iter().enumerate().map(async |(number, manager)| {
        let mut begun = Vec::new();
        let mut pause = number as u64;
        while !done.load(Ordering::Relaxed) {
            // A pause without work, between 1 and 40 ms.
            pause = pause * 7919 % 40 + 1;
            tokio::time::sleep(Duration::from_millis(pause)).await;
            let object = manager.get_backup(&id(&full)).await.unwrap();
            match verify(manager, &object).await {
                Ok((number, job)) => {
                    begun.push(number);
                    let job = JobProxy::new(manager.inner().connection(), job).await.unwrap();
                    // Fails if that service ends just then.
                    let _ = job.wait().await;
                }
                // Objects have other names in another process.
                Err(error) => assert!(error.to_string().contains("no such object"), "{error}"),
            }
        }
        begun
    });
    let restarts = async {
        for round in 1..=ROUNDS {
            let pause = Duration::from_micros((round * 7919 % 9000) as u64);
            tokio::time::sleep(pause).await;
            ask_to_make_room(tokio::task::block_in_place(|| service(&system)));
            ended(&systemd, round).await;
        }
        done.store(true, Ordering::Relaxed);
    };
    let (begun, ()) = tokio::join!(join_all(verifications), restarts);
    let begun = begun.concat();
    assert!(begun.len() > ROUNDS, "{begun:?}");
    for number in begun {
        let job = root.job(root.manager.get_job(number).await.unwrap()).await;
        let (result, _, message) = wait::within("the verification", job.wait()).await.unwrap();
        assert_eq!(result, "completed", "job {number}: {message}");
    }
}

async fn verify(
    manager: &ManagerProxy<'_>,
    backup: &OwnedObjectPath,
) -> zbus::Result<(u32, OwnedObjectPath)> {
    let connection = manager.inner().connection();
    let interface = Some("org.example.Backup1.Backup");
    let options = Options::new();
    let reply = connection
        .call_method(Some(BUS_NAME), backup, interface, "Verify", &options)
        .await?;
    reply.body().deserialize()
}
