//! Calls that want no reply: nothing becomes of them.

mod common;

use std::os::fd::AsFd;

use backupd::names::{BUS_NAME, JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH};
use common::System;
use common::caller::{Caller, assert_completed};
use common::disk::Disk;
use common::peer::{GREETING, Peer};
use common::proxies::{Options, slowly};
use common::storage::files_below;
use common::vm::Vm;
use serde::Serialize;
use serde_json::json;
use zbus::message::Flags;
use zbus::wire::DynamicType;

const MIB: u64 = 1 << 20;
/// At which a backup takes long enough to be spoken to.
const SPEED: u64 = 16 * MIB;

/// Sends such a call, and waits until the service has taken it up and gone on.
async fn call<B: Serialize + DynamicType>(
    caller: &Caller,
    path: &str,
    interface: &str,
    member: &str,
    body: &B,
) {
    let message = zbus::Message::method_call(path, member)
        .destination(BUS_NAME)
        .interface(interface)
        .with_flags(Flags::NO_REPLY_EXPECTED)
        .build(body)
        .unwrap();
    caller.connection.send(&message).await.unwrap();
    // Calls are taken up in their order, and these ask polkit as that one would.
    for _ in 0..3 {
        caller.manager.list_jobs().await.unwrap();
    }
}

fn machine(system: &System) -> Vm {
    system.configured(system.vm("web").disk(Disk::new("vda", 256 * MIB)).running())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_nobody_wants_to_hear_of_is_not_made() {
    let system = System::start();
    let vm = machine(&system);
    let before = vm.residue();
    let mut caller = Caller::new(&system).await;
    let domain = system.domain_path("web").unwrap();
    let files: Vec<zbus::Fd<'_>> = Vec::new();
    let body = ("web", "", files, Options::new());
    call(&caller, ROOT_PATH, MANAGER_INTERFACE, "CreateBackup", &body).await;
    let files: Vec<zbus::Fd<'_>> = Vec::new();
    let interface = "org.example.Backup1.Domain";
    call(
        &caller,
        &domain,
        interface,
        "CreateBackup",
        &("", files, Options::new()),
    )
    .await;
    assert_eq!(caller.manager.list_jobs().await.unwrap(), []);
    assert_eq!(files_below(&system.store()), [""; 0]);
    assert_eq!(vm.residue(), before);
    assert_eq!(caller.signals_so_far().await, []);
    // The domain is as free as the store is empty, and the first job is the first.
    let job = caller.complete("web", "").await;
    assert_eq!(job.id().await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_goes_on_as_it_was() {
    let system = System::start();
    let vm = machine(&system);
    let caller = Caller::new(&system).await;
    let options = slowly(SPEED);
    let job = caller.start_with("web", "", &[], options).await;
    let speed = || {
        let jobs = vm.qmp("query-block-jobs", json!({}));
        jobs.as_array()
            .unwrap()
            .iter()
            .map(|job| job["speed"].clone())
            .collect::<Vec<_>>()
    };
    common::wait::until("the backup", || (speed() == [SPEED]).then_some(()));
    let path = job.inner().path().to_string();
    call(&caller, &path, JOB_INTERFACE, "SetSpeed", &(2 * SPEED,)).await;
    call(&caller, &path, JOB_INTERFACE, "Cancel", &()).await;
    call(&caller, &path, JOB_INTERFACE, "CancelDisk", &("vda",)).await;
    assert_eq!(speed(), [SPEED]);
    job.set_speed(0).await.unwrap();
    assert_completed(&job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_is_not_taken_over_and_let_go_without_a_word() {
    let system = System::start();
    let caller = Caller::new(&system).await;
    let (ours, mut peer) = Peer::pair();
    // Whoever took it over would answer this.
    peer.say(GREETING).await;
    {
        let body = ("mine", zbus::Fd::from(ours.as_fd()), Options::new());
        call(&caller, ROOT_PATH, MANAGER_INTERFACE, "RegisterDomain", &body).await;
    }
    drop(ours);
    assert!(
        peer.try_receive().await.is_none(),
        "nobody is left at the other end"
    );
    assert_eq!(caller.manager.list_domains().await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_neither_begins_nor_ends() {
    let system = System::start();
    let _vm = machine(&system);
    let (mut plain, mut subscribed) = (Caller::new(&system).await, Caller::new(&system).await);
    subscribed.manager.subscribe().await.unwrap();
    call(&plain, ROOT_PATH, MANAGER_INTERFACE, "Subscribe", &()).await;
    call(&subscribed, ROOT_PATH, MANAGER_INTERFACE, "Unsubscribe", &()).await;
    Caller::new(&system).await.complete("web", "").await;
    let count = async |caller: &mut Caller| caller.signals_until("JobEnded").await.len();
    assert_eq!(count(&mut plain).await, 2);
    assert_eq!(count(&mut subscribed).await, 4);
}
