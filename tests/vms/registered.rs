//! Registered domains whose connection ends: no client can connect to them again, so the service does not wait for
//! them. These tests also check which other domains a backup queries.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::common::caller::{Caller, assert_completed};
use crate::common::disk::Disk;
use crate::common::peer::StandIn;
use crate::common::proxies::{JobProxy, Options, slowly};
use crate::common::vm::Vm;
use crate::common::{System, wait};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;

fn machine(system: &System, name: &str) -> Vm {
    let disk = Disk::new("vda", 8 * MIB).fill(0, 8 * MIB, 0x11);
    system.vm(name).disk(disk).start()
}

/// Starts a backup of a registered domain that stays in the middle.
async fn begin(caller: &Caller, name: &str, vm: &Vm) -> JobProxy<'static> {
    caller
        .register(name, vm.monitor_stream().into())
        .await
        .expect("it is registered");
    let job = caller.start_with(name, "", &[], slowly(MIB)).await;
    wait::until_async("the copying", || async {
        (job.state().await.unwrap() == "running").then_some(())
    })
    .await;
    job
}

async fn assert_failed(job: &JobProxy<'_>) {
    let (result, ..) = wait::within("the end of the backup", job.wait()).await.unwrap();
    assert_eq!(result, "failed");
}

/// Returns the number of jobs in the catalog, and how many of them may have residue in QEMU.
fn rows(state: &Path) -> (u32, u32) {
    let catalog = rusqlite::Connection::open(state.join("catalog.sqlite")).unwrap();
    let count = |condition: &str| {
        let query = format!("SELECT count(*) FROM jobs WHERE {condition}");
        catalog.query_row(&query, [], |row| row.get(0)).unwrap()
    };
    (count("1"), count("left_in_qemu"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registered_domain_that_ends_during_a_backup_leaves_no_open_job() {
    let mut system = System::start();
    let caller = Caller::new(&system).await;
    for round in 0..3 {
        let mut vm = machine(&system, &format!("mine{round}"));
        let job = begin(&caller, "mine", &vm).await;
        vm.kill();
        assert_failed(&job).await;
        wait::until("the domain to be removed", || {
            system.domain_path("mine").is_none().then_some(())
        });
    }
    // Nothing keeps the service from stopping either.
    assert_eq!(system.stop_daemon(), Some(0));
    assert_eq!(rows(&system.dir().join("state")), (3, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_service_does_not_wait_forever_for_a_registered_domain() {
    let mut system = System::setup()
        .table("[deadlines]\nreconnect-seconds = 1")
        .start();
    let caller = Caller::new(&system).await;
    let vm = machine(&system, "mine");
    let job = begin(&caller, "mine", &vm).await;
    let id = job.id().await.unwrap();
    system.daemon().process().signal(Signal::KILL);
    system.wait_for_death();
    system.start_daemon();
    let caller = Caller::new(&system).await;
    let path = caller.manager.get_job(id).await.unwrap();
    assert_failed(&caller.job(path).await).await;
    system.stop_daemon();
    assert_eq!(rows(&system.dir().join("state")), (1, 0));
}

fn open(path: &Path) -> OwnedFd {
    let opened = File::options().read(true).write(true).create_new(true).open(path);
    opened.unwrap().into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_asks_other_machines_only_where_it_could_write_into_their_disks() {
    let system = System::start();
    let caller = Caller::new(&system).await;
    let _vm = system.configured(system.vm("web").disk(Disk::new("vda", MIB)));
    let (socket, other) = StandIn::start();
    caller.register("other", socket).await.expect("it is registered");
    let before = other.commands();
    caller.complete("web", "").await;
    let new = system.dir().join("new.qcow2");
    let document = |target: &str| {
        format!("<domainbackup><disks><disk name='vda' {target}</disk></disks></domainbackup>")
    };
    let file = document(&format!("type='file'><target file='{}'/>", new.display()));
    caller.complete("web", &file).await;
    assert_eq!(other.commands(), before, "no domain has the new file open");
    let passed = open(&system.dir().join("passed.qcow2"));
    let document = document("type='fd'><target fd='0'/>");
    let job = caller
        .start_with("web", &document, &[passed], Options::new())
        .await;
    assert_completed(&job).await;
    assert!(
        other.commands() > before,
        "another domain may have the caller's file open"
    );
}
