//! Backups into a store share its bandwidth.

use serde_json::json;

use crate::common::caller::{Caller, assert_failed, cancel};
use crate::common::disk::Disk;
use crate::common::proxies::{JobProxy, Options, slowly};
use crate::common::proxy::{Hold, Proxy};
use crate::common::vm::Vm;
use crate::common::{System, test_directory, wait};
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const INTO: &str = "<domainbackup><store name='shared'/></domainbackup>";

/// Starts a VM behind a proxy.
fn machine(system: &System, name: &str, disks: &[&str]) -> (Vm, Proxy) {
    let disk = |disk: &&str| Disk::new(disk, 64 * MIB).fill(0, 64 * MIB, 0x11);
    let machine = system.vm(name).running();
    let machine = disks
        .iter()
        .map(disk)
        .fold(machine, |machine, disk| machine.disk(disk));
    let vm = machine.start();
    let proxy = Proxy::start(&system.dir().join(format!("{name}.proxy")), &vm.monitor_path());
    system.write_domain_file(name, &format!("monitor = \"{}\"\n", proxy.path().display()));
    system.wait_for_domain(name);
    (vm, proxy)
}

/// Returns the bandwidth of all block jobs of a VM together, as its QEMU reports it.
fn speed(vm: &Vm) -> u64 {
    let jobs = vm.qmp("query-block-jobs", json!({}));
    let speeds = jobs
        .as_array()
        .unwrap()
        .iter()
        .map(|job| job["speed"].as_u64().unwrap());
    speeds.sum()
}

async fn reaches(vm: &Vm, expected: u64) {
    wait::until_async(&format!("a speed of {expected}"), async || {
        (speed(vm) == expected).then_some(())
    })
    .await;
}

async fn full(caller: &Caller, domain: &str) -> JobProxy<'static> {
    let options = Options::from([("incremental", Variant::from("full"))]);
    caller.start_with(domain, INTO, &[], options).await
}

fn system(store: &tempfile::TempDir) -> System {
    limited(store, "4M", "")
}

/// Starts a system whose store has this bandwidth, with further configuration.
fn limited(store: &tempfile::TempDir, bandwidth: &str, more: &str) -> System {
    let path = store.path().display();
    let store = format!("[store.shared]\npath = \"{path}\"\nbandwidth = \"{bandwidth}\"\n{more}");
    System::setup().table(&store).start()
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_share_the_bandwidth_of_a_store_and_redistribute_unused_shares() {
    let store = test_directory();
    let system = system(&store);
    let (a, _to_a) = machine(&system, "a", &["vda", "vdb"]);
    let (b, _to_b) = machine(&system, "b", &["vda"]);
    let (c, _to_c) = machine(&system, "c", &["vda"]);
    let caller = Caller::new(&system).await;
    let first = full(&caller, "a").await;
    reaches(&a, 4 * MIB).await;
    let second = full(&caller, "b").await;
    reaches(&a, 2 * MIB).await;
    reaches(&b, 2 * MIB).await;
    // A backup leaves its unused share to the others, from its start or later.
    let third = caller.start_with("c", INTO, &[], slowly(MIB)).await;
    reaches(&c, MIB).await;
    reaches(&a, 3 * MIB / 2).await;
    reaches(&b, 3 * MIB / 2).await;
    second.set_speed(MIB).await.unwrap();
    reaches(&b, MIB).await;
    reaches(&a, 2 * MIB).await;
    // A limit above the share changes nothing.
    first.set_speed(100 * MIB).await.unwrap();
    third.set_speed(0).await.unwrap();
    reaches(&c, 3 * MIB / 2).await;
    reaches(&a, 3 * MIB / 2).await;
    cancel(&third).await;
    reaches(&a, 3 * MIB).await;
    cancel(&second).await;
    reaches(&a, 4 * MIB).await;
    // Other stores are not affected.
    let other = caller.start_with("b", "", &[], slowly(3 * MIB)).await;
    reaches(&b, 3 * MIB).await;
    assert_eq!(speed(&a), 4 * MIB);
    cancel(&other).await;
    cancel(&first).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_gets_a_share_only_after_another_released_it() {
    let store = test_directory();
    let system = system(&store);
    let (a, to_a) = machine(&system, "a", &["vda"]);
    let (b, _to_b) = machine(&system, "b", &["vda"]);
    let caller = Caller::new(&system).await;
    let first = full(&caller, "a").await;
    reaches(&a, 4 * MIB).await;
    let held = to_a.hold("block-job-set-speed", |_| true);
    let second = full(&caller, "b").await;
    held.reached();
    // As far as the service knows, the first backup uses everything. The second gets 1, because 0 means no limit.
    assert_eq!((speed(&a), speed(&b)), (4 * MIB, 1));
    held.pass();
    reaches(&a, 2 * MIB).await;
    reaches(&b, 2 * MIB).await;
    for job in [first, second] {
        cancel(&job).await;
    }
}

/// Runs two backups. The QEMU of the first does not confirm bandwidths; it fails and is not cancelled yet. It had the
/// whole bandwidth.
async fn unconfirmed(
    store: &tempfile::TempDir,
    patience: u32,
) -> (System, Vec<(Vm, Proxy)>, Hold, JobProxy<'static>) {
    let system = limited(store, "1M", &format!("[deadlines]\nstall-seconds = {patience}"));
    let machines = vec![machine(&system, "a", &["vda"]), machine(&system, "b", &["vda"])];
    let caller = Caller::new(&system).await;
    let first = full(&caller, "a").await;
    let (a, to_a) = &machines[0];
    reaches(a, MIB).await;
    // All other commands are answered, and the progress is true.
    to_a.lose("block-job-set-speed");
    let cancel = to_a.hold("job-cancel", |_| true);
    let second = full(&caller, "b").await;
    let why = format!("QEMU made no progress for {patience} seconds");
    assert_failed(&first, "Stalled", &why).await;
    (system, machines, cancel, second)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_backup_keeps_its_share_until_qemu_has_ended_it() {
    let store = test_directory();
    let (_system, machines, ended, second) = unconfirmed(&store, 10).await;
    let [(a, _), (b, _)] = &machines[..] else {
        unreachable!()
    };
    ended.reached();
    // Ended backups together count for at most half of the bandwidth.
    reaches(b, MIB / 2).await;
    assert_eq!(speed(a), MIB);
    ended.pass();
    reaches(b, MIB).await;
    cancel(&second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_failed_before_it_copied_gives_its_share_back_at_once() {
    let store = test_directory();
    let mut system = limited(&store, "4M", "[deadlines]\nstall-seconds = 600");
    let (a, _to_a) = machine(&system, "a", &["vda"]);
    let (_b, to_b) = machine(&system, "b", &["vda"]);
    let caller = Caller::new(&system).await;
    let first = full(&caller, "a").await;
    reaches(&a, 4 * MIB).await;
    let opening = to_b.hold("add-fd", |_| true);
    let _second = full(&caller, "b").await;
    opening.reached();
    reaches(&a, 2 * MIB).await;
    // The service cannot remove anything from this QEMU any more.
    opening.cut_for_good();
    reaches(&a, 4 * MIB).await;
    // The next instance knows it too.
    let (c, _to_c) = machine(&system, "c", &["vda"]);
    system.start_daemon();
    let third = full(&Caller::new(&system).await, "c").await;
    reaches(&c, 2 * MIB).await;
    reaches(&a, 2 * MIB).await;
    for job in [first, third] {
        cancel(&job).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_never_ends_a_failed_backup_loses_its_share() {
    let store = test_directory();
    let (_system, machines, _ended, second) = unconfirmed(&store, 5).await;
    reaches(&machines[1].0, MIB).await;
    assert_eq!(speed(&machines[0].0), MIB);
    cancel(&second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_backup_keeps_its_share_over_a_restart_until_qemu_has_ended_it() {
    let store = test_directory();
    let (mut system, machines, ended, second) = unconfirmed(&store, 10).await;
    let [(a, to_a), (b, _)] = &machines[..] else {
        unreachable!()
    };
    ended.reached();
    cancel(&second).await;
    let again = to_a.hold("job-cancel", |_| true);
    system.kill_daemon();
    ended.cut();
    system.start_daemon();
    system.wait_for_domain("b");
    again.reached();
    let caller = Caller::new(&system).await;
    let third = full(&caller, "b").await;
    reaches(b, MIB / 2).await;
    assert_eq!(speed(a), MIB);
    again.pass();
    reaches(b, MIB).await;
    cancel(&third).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_backup_gets_a_share_after_a_restart_that_another_may_still_use() {
    let store = test_directory();
    let mut system = system(&store);
    let (a, to_a) = machine(&system, "a", &["vda"]);
    let (b, _to_b) = machine(&system, "b", &["vda"]);
    let caller = Caller::new(&system).await;
    let first = full(&caller, "a").await;
    reaches(&a, 4 * MIB).await;
    system.kill_daemon();
    std::fs::remove_file(system.dir().join("etc/domains.d/a.toml")).unwrap();
    system.start_daemon();
    system.wait_for_domain("b");
    let caller = Caller::new(&system).await;
    let second = full(&caller, "b").await;
    assert_eq!((speed(&a), speed(&b)), (4 * MIB, 1));
    system.write_domain_file("a", &format!("monitor = \"{}\"\n", to_a.path().display()));
    for vm in [&a, &b] {
        reaches(vm, 2 * MIB).await;
    }
    let first = caller.job(first.inner().path().to_owned().into()).await;
    for job in [first, second] {
        cancel(&job).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_resumed_after_a_restart_keeps_its_share() {
    let store = test_directory();
    let mut system = system(&store);
    let (a, _to_a) = machine(&system, "a", &["vda"]);
    let (b, _to_b) = machine(&system, "b", &["vda"]);
    let caller = Caller::new(&system).await;
    let first = full(&caller, "a").await;
    let second = full(&caller, "b").await;
    for vm in [&a, &b] {
        reaches(vm, 2 * MIB).await;
    }
    system.kill_daemon();
    system.start_daemon();
    let caller = Caller::new(&system).await;
    let again = async |job: &JobProxy<'_>| caller.job(job.inner().path().to_owned().into()).await;
    let (first, second) = (again(&first).await, again(&second).await);
    wait::until_async("the first to be cancelled", async || first.cancel().await.ok()).await;
    reaches(&b, 4 * MIB).await;
    cancel(&second).await;
}
