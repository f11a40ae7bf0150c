//! Precedence of root: a user's backup that makes almost no progress does not block a backup of root.

use crate::common::System;
use crate::common::caller::{Caller, assert_completed};
use crate::common::clients::{OTHER_USER as OTHER, USER};
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::proxies::{JobProxy, Options, error_name};
use crate::common::vm::Vm;
use crate::common::wait;
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;

fn system(rights: &[&str]) -> System {
    let rules = polkit::allow(USER, rights) + &polkit::allow(OTHER, rights);
    System::setup().rules(&rules).start()
}

fn machine(system: &System) -> Vm {
    let disk = Disk::new("vda", 16 * MIB).fill(0, 16 * MIB, 0x11);
    system.configured(system.vm("web").disk(disk).running())
}

/// Starts a full backup that copies so many bytes a second.
async fn start(caller: &Caller, document: &str, rate: u64) -> JobProxy<'static> {
    let options = Options::from([
        ("bandwidth", Variant::from(rate)),
        ("incremental", Variant::from("full")),
    ]);
    caller.start_with("web", document, &[], options).await
}

async fn assert_busy(caller: &Caller) {
    let refused = caller
        .try_start("web", "", &[], Options::new())
        .await
        .unwrap_err();
    assert!(error_name(&refused).ends_with("Busy"), "{refused}");
}

async fn assert_displaced(job: &JobProxy<'_>, why: &str) {
    let (result, error, message) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(result, "cancelled");
    assert!(error.ends_with("Cancelled") && message.contains(why), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_root_cancels_a_users_that_is_almost_stopped() {
    let system = system(&["domain.read", "domain.backup"]);
    let vm = machine(&system);
    let (user, other) = (
        Caller::of_user(&system, USER).await,
        Caller::of_user(&system, OTHER).await,
    );
    let root = Caller::new(&system).await;
    let held = start(&user, "", 1).await;
    // Another user has no more rights than the first.
    assert_busy(&other).await;
    assert_completed(&root.start("web", "").await).await;
    assert_displaced(&held, "less than 1 MiB a second").await;
    assert_eq!(vm.checkpoints("vda").len(), 1, "the other backup left residue");
    // Root's backup is not cancelled for another one of root's.
    let slow = start(&root, "", 1).await;
    assert_busy(&root).await;
    slow.cancel().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_users_backup_that_copies_as_it_should_is_waited_for() {
    let system = system(&["domain.read", "domain.backup", "domain.export"]);
    let _vm = machine(&system);
    let (user, root) = (Caller::of_user(&system, USER).await, Caller::new(&system).await);
    let targets = system.dir().join("targets");
    std::fs::create_dir(&targets).unwrap();
    let document = format!(
        "<domainbackup><disks><disk name='vda'><target file='{}/a.qcow2'/></disk></disks></domainbackup>",
        targets.display()
    );
    let running = start(&user, &document, MIB).await;
    assert_busy(&root).await;
    // The user who started it no longer receives its end.
    let number = running.id().await.unwrap();
    let path = root.manager.get_job(number).await.unwrap();
    user.connection.close().await.unwrap();
    let root_starts = async || root.try_start("web", "", &[], Options::new()).await.ok();
    let next = wait::until_async("the slot to be free", root_starts).await;
    let ended = root.job(path).await;
    assert_displaced(&ended, "has left the bus").await;
    assert_completed(&root.job(next).await).await;
    assert!(!targets.join("a.qcow2").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn after_root_was_refused_no_other_user_comes_first() {
    let system = system(&["domain.read", "domain.backup"]);
    let _vm = machine(&system);
    let (user, root) = (Caller::of_user(&system, USER).await, Caller::new(&system).await);
    let running = start(&user, "", MIB).await;
    assert_busy(&root).await;
    running.cancel().await.unwrap();
    wait::within("the end", running.wait()).await.unwrap();
    assert_busy(&user).await;
    assert_completed(&root.start("web", "").await).await;
    assert_completed(&user.start("web", "").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_concurrent_calls_of_root_block_nobody_afterwards() {
    let system = system(&["domain.read", "domain.backup"]);
    let _vm = machine(&system);
    let user = Caller::of_user(&system, USER).await;
    let (one, other) = (Caller::new(&system).await, Caller::new(&system).await);
    let held = start(&user, "", 1).await;
    // The backup in the slot takes longer than the other one waits.
    let options = || Options::from([("bandwidth", Variant::from(MIB))]);
    let (first, second) = tokio::join!(
        one.try_start("web", "", &[], options()),
        other.try_start("web", "", &[], options())
    );
    assert_displaced(&held, "less than 1 MiB a second").await;
    assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
    let begun = one.job(first.or(second).unwrap()).await;
    begun.cancel().await.unwrap();
    wait::within("the end", begun.wait()).await.unwrap();
    assert_completed(&user.start("web", "").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_cancelled_by_its_starter_names_no_other_caller() {
    let system = system(&["domain.read", "domain.backup"]);
    let _vm = machine(&system);
    let (user, root) = (Caller::of_user(&system, USER).await, Caller::new(&system).await);
    let held = start(&user, "", 1).await;
    // The service has decided, and QEMU does not have the command yet.
    held.cancel().await.unwrap();
    let started = root.try_start("web", "", &[], Options::new()).await;
    let (result, _, message) = wait::within("the end", held.wait()).await.unwrap();
    assert_eq!(
        (result.as_str(), message.as_str()),
        ("cancelled", "the job was cancelled")
    );
    assert_completed(&root.job(started.unwrap()).await).await;
}
