//! Long runs: the service does not grow with the number of its backups and domains, and an idle service sleeps.
//!
//! Each test has a short form, which is the default. `make endurance` runs it at full length and prints the figures as
//! tables.

mod common;
#[path = "endurance/crowd.rs"]
mod crowd;
#[path = "endurance/sample.rs"]
mod sample;

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use common::caller::{Caller, cancel};
use common::disk::Disk;
use common::measure::{Activity, Footprint, descriptors, threads_named};
use common::proxies::{JobProxy, Options, error_name, slowly};
use common::proxy::Proxy;
use common::vm::Builder;
use common::wait;
use common::{Setup, System};
use crowd::Crowd;
use rusqlite::Connection;
use sample::{Sample, catalog_size, on_the_bus};
use serde_json::json;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The number of backups in a row at full length; `None` for the short form.
fn full() -> Option<usize> {
    let backups = std::env::var("BACKUPD_ENDURANCE").ok()?;
    let backups: usize = backups.parse().expect("BACKUPD_ENDURANCE is a number of backups");
    Some(backups.max(SHORT))
}

/// Makes the allocator return free memory at once (mallopt(3)), so that the memory of the service is what it uses.
fn frugal(setup: Setup) -> Setup {
    let tunables = [
        "malloc.arena_max=1",
        "malloc.tcache_count=0",
        // A small free chunk that is not merged keeps the memory before it.
        "malloc.mxfast=0",
        "malloc.mmap_threshold=4096",
        "malloc.trim_threshold=4096",
        "malloc.top_pad=0",
        // The stacks of ended threads.
        "pthread.stack_cache_size=0",
    ];
    let tunables = tunables.map(|tunable| format!("glibc.{tunable}"));
    setup.environment("GLIBC_TUNABLES", &tunables.join(":"))
}

/// How long the wakeups of the idle service are counted.
fn idle_time() -> Duration {
    Duration::from_secs(if full().is_some() { 60 } else { 5 })
}

/// Longer than the service collects events of a domain before it queries the domain.
const QUIET: Duration = Duration::from_millis(1500);

/// Waits until all work is done: no thread wakes up for a while.
async fn rest(pid: u32) {
    wait::until_async("the service to rest", async || {
        let before = Activity::of(pid);
        tokio::time::sleep(QUIET).await;
        (Activity::of(pid).wakeups_since(&before) == 0).then_some(())
    })
    .await;
}

/// The threads that run tasks, which never end.
const WORKERS: usize = 2;

/// Waits until all work is done and the threads for blocking calls have ended: tokio ends a thread 10 s after its last
/// call. Their number depends on how many calls coincide, and the stack of each takes 50 KiB or more.
async fn rest_without_idle_threads(pid: u32) {
    wait::until_async("idle threads to end", async || {
        (threads_named(pid, "tokio-rt-worker") == WORKERS).then_some(())
    })
    .await;
    rest(pid).await;
}

/// Returns how often the idle service wakes up during [`idle_time`].
async fn wakeups(pid: u32, what: &str) -> u64 {
    let before = Activity::of(pid);
    let time = idle_time();
    tokio::time::sleep(time).await;
    let after = Activity::of(pid);
    let wakeups = after.wakeups_since(&before);
    println!(
        "\n{what}: in {} s it woke up {wakeups} times, and took {} ms of processor time.",
        time.as_secs(),
        after.processor - before.processor
    );
    wakeups
}

// Backups in a row.

/// The number of finished jobs that the service remembers, and that the configuration keeps on record.
const REMEMBERED: usize = 100;
const HISTORY: usize = 60;
/// The number of backups after which no permanent data is added.
const WARM_UP: usize = 120;
const SHORT: usize = 200;
/// The number of backups between two checks for residue of the service.
const STEP: usize = 5;
/// The number of backups between two samples in the short form.
const SHORT_SAMPLES: usize = 40;
/// Variation that the allocator may add, in KiB. A backup keeps no memory, no matter how many there are: the records
/// are on disk, and the catalog's page cache is full after the warm-up.
const NOISE: u64 = 128;
/// The same for QEMU, and the memory in bytes that it may keep of a backup.
const QEMU_NOISE: u64 = 4096;
const QEMU_MOST_LEFT: u64 = 1536;

/// Only the good disk.
const GOOD: &str = "<domainbackup><disks><disk name='good'/></disks></domainbackup>";

/// Returns a VM with a small disk, and one that cannot be read.
fn machine(system: &System) -> Builder {
    let image = system.dir().join("bad.raw");
    fs::write(&image, vec![0x55; MIB as usize]).unwrap();
    let bad = json!({
        "driver": "raw", "node-name": "bad-node",
        "file": {
            "driver": "blkdebug",
            "image": { "driver": "file", "filename": image },
            "inject-error": [{ "event": "none", "iotype": "read", "sector": 128, "errno": 5, "once": false }],
        },
    });
    let disk = Disk::new("good", 16 * MIB).fill(0, 4 * MIB, 0x11);
    let extra = [
        "-blockdev",
        &bad.to_string(),
        "-device",
        "virtio-blk-pci,drive=bad-node,id=bad",
    ];
    system.vm("web").disk(disk).extra(&extra).running()
}

/// Makes one backup over a connection of its own, as scripts do; most succeed. Returns whether it did.
async fn back_up(system: &System, index: usize) -> bool {
    let caller = Caller::new(system).await;
    let completed = match index % 10 {
        3 => {
            let job = caller.start("web", "").await;
            let (result, _, _) = wait::within("the end", job.wait()).await.unwrap();
            assert_eq!(result, "failed");
            false
        }
        5 => {
            let slowly = slowly(MIB);
            let job = caller.start_with("web", GOOD, &[], slowly).await;
            running(&job).await;
            cancel(&job).await;
            false
        }
        7 => {
            let document = GOOD.replace("<disks>", "<store name='nowhere'/><disks>");
            let refused = caller.try_start("web", &document, &[], Options::new()).await;
            let error = error_name(&refused.unwrap_err());
            assert_eq!(error, "org.example.Backup1.Error.NoSuchStore");
            false
        }
        _ => {
            caller.complete("web", GOOD).await;
            true
        }
    };
    caller.connection.close().await.unwrap();
    // Later rounds do not need the backup, which would fill the disk.
    let _ = fs::remove_dir_all(system.store().join("web"));
    completed
}

async fn running(job: &JobProxy<'_>) {
    wait::until_async("the backup to run", async || {
        (job.state().await.unwrap() == "running").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_backups_in_a_row_leave_only_their_records() {
    let table = format!("[limits]\nhistory = {HISTORY}");
    let mut system = frugal(System::setup().table(&table)).start();
    let vm = system.configured(machine(&system));
    let (pid, before) = (system.daemon().pid(), vm.residue());
    let mut completed: i64 = 0;
    let total = full().unwrap_or(SHORT);
    let interval = full().map_or(SHORT_SAMPLES, |backups| backups / 10);
    let mut first = None;
    let mut samples = Vec::new();
    for backups in 1..=total {
        completed += i64::from(back_up(&system, backups).await);
        assert_eq!(vm.residue(), before, "after {backups}");
        if backups % STEP == 0 {
            let now = || (descriptors(pid), descriptors(vm.pid()));
            let rules = async || on_the_bus(&system, "MatchRules").await;
            match first {
                None => {
                    rest(pid).await;
                    first = Some((now(), rules().await));
                }
                // Delayed work is closed a moment later.
                Some((first_descriptors, first_rules)) => {
                    wait::until("descriptors to be closed", || {
                        (now() == first_descriptors).then_some(())
                    });
                    wait::until_async("match rules to be removed", async || {
                        (rules().await == first_rules).then_some(())
                    })
                    .await;
                }
            }
        }
        if backups >= WARM_UP && (backups % interval == 0 || backups == total) {
            rest_without_idle_threads(pid).await;
            samples.push(Sample::take(&mut system, &vm, backups).await);
        }
    }
    sample::print(&samples);

    let (earlier, later) = (&samples[0], &samples[samples.len() - 1]);
    let change = |of: fn(&Sample) -> u64| of(later).saturating_sub(of(earlier));
    let between = change(|sample| sample.backups as u64);
    let grown = change(|sample| sample.service.memory);
    println!("\n{between} backups have the service grow by {grown} KiB.");
    assert!(grown <= NOISE, "grown by {grown} KiB in {between} backups");
    assert!(change(|sample| sample.service.threads as u64) <= 2);
    let grown = change(|sample| sample.qemu.memory);
    assert!(
        grown <= QEMU_NOISE + between * QEMU_MOST_LEFT / KIB,
        "QEMU has grown by {grown} KiB"
    );

    // No message waits, and the service remembers as many jobs as it should.
    for queue in ["IncomingMessages", "OutgoingMessages"] {
        wait::until_async(queue, async || {
            (on_the_bus(&system, queue).await == 0).then_some(())
        })
        .await;
    }
    let caller = Caller::new(&system).await;
    assert_eq!(caller.manager.list_jobs().await.unwrap().len(), REMEMBERED);
    assert_eq!(system.stop_daemon(), Some(0));
    let catalog = Connection::open(system.dir().join("state/catalog.sqlite")).unwrap();
    let count = |table: &str| -> i64 {
        let query = format!("SELECT count(*) FROM {table}");
        catalog.query_row(&query, [], |row| row.get(0)).unwrap()
    };
    assert_eq!(count("jobs"), HISTORY as i64);
    assert_eq!(count("jobs WHERE left_in_qemu OR left_on_disk"), 0);
    assert_eq!(count("backups"), completed);
    println!(
        "{completed} records of backups and {HISTORY} of jobs take {} KiB.",
        catalog_size(&system) / KIB
    );
}

// Many domains.

const DOMAINS: usize = 200;
/// How often the idle service may wake up, because threads that are not needed any more end.
const MOST_WAKEUPS: u64 = 20;
/// Memory in KiB that later crowds may need beyond the first: remembered jobs, and more concurrent threads.
const MOST_CROWD_GROWTH: u64 = 2048;
/// The rounds at full length, and the VMs that each backs up.
const ROUNDS: usize = 20;
const MACHINES: usize = 10;
/// After these rounds, the service remembers as many jobs as it may, and each of them has all its checkpoints.
const FULL_AFTER: usize = REMEMBERED / MACHINES + CHECKPOINTS;
/// The default of `checkpoints` in docs/backupd.toml.
const CHECKPOINTS: usize = 4;
/// Memory in KiB that the rounds after those may add: the stacks of a few more threads.
const MOST_STEADY_GROWTH: u64 = 256;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_domains_that_come_and_go_leave_no_residue_and_idle_at_no_cost() {
    let mut system = frugal(System::setup()).start();
    let (rounds, machines) = if full().is_some() {
        (ROUNDS, MACHINES)
    } else {
        (3, 2)
    };
    let machines: Vec<_> = (0..machines)
        .map(|index| {
            let disk = Disk::new("vda", 16 * MIB).fill(0, MIB, 0x11);
            system
                .vm(&format!("machine-{index}"))
                .disk(disk)
                .running()
                .start()
        })
        .collect();
    let residues: HashMap<_, _> = machines.iter().map(|vm| (vm.name(), vm.residue())).collect();
    let pid = system.daemon().pid();
    let mut rows: Vec<(Footprint, Footprint)> = Vec::new();
    for round in 1..=rounds {
        let root = Caller::new(&system).await;
        let crowd = Crowd::register(&system, &machines, DOMAINS).await;
        assert_eq!(root.manager.list_domains().await.unwrap().len(), DOMAINS);
        crowd.back_up().await;
        rest(pid).await;
        let with = Footprint::of(pid);
        if round == 1 {
            let commands = crowd.commands();
            let wakeups = wakeups(pid, &format!("{DOMAINS} domains are connected")).await;
            assert_eq!(crowd.commands(), commands, "the idle service queries domains");
            assert!(wakeups <= MOST_WAKEUPS, "{wakeups} wakeups");
        }
        crowd.leave().await;
        wait::until_async("all domains to be gone", async || {
            root.manager
                .list_domains()
                .await
                .unwrap()
                .is_empty()
                .then_some(())
        })
        .await;
        // Removes the remembered read rights of the connection too.
        root.connection.close().await.unwrap();
        rest(pid).await;
        rows.push((with, Footprint::of(pid)));
        for vm in &machines {
            assert_eq!(vm.residue(), residues[vm.name()]);
            fs::remove_dir_all(system.store().join(format!("0:{}", vm.name()))).unwrap();
        }
    }
    println!(
        "\n| round | memory with {DOMAINS} domains | descriptors | memory without them | descriptors |\n\
         | --- | --- | --- | --- | --- |"
    );
    for (round, (with, without)) in (1..).zip(&rows) {
        println!(
            "| {round} | {} KiB | {} | {} KiB | {} |",
            with.memory, with.descriptors, without.memory, without.descriptors
        );
    }
    let ((first, base), (last, end)) = (rows[0], rows[rows.len() - 1]);
    if let Some((_, steady)) = rows.get(FULL_AFTER - 1) {
        let grown = end.memory.saturating_sub(steady.memory);
        assert!(
            grown <= MOST_STEADY_GROWTH,
            "grown by {grown} KiB after round {FULL_AFTER}"
        );
    }
    for (with, without) in rows {
        assert_eq!(without.descriptors, base.descriptors);
        // Its connection, and the thread that closes it.
        assert_eq!(with.descriptors, base.descriptors + 2 * DOMAINS);
    }
    // The allocator need not return the memory that it allocated last, so the test checks that the next domains fit
    // in.
    let grown = last.memory.saturating_sub(first.memory);
    assert!(grown <= MOST_CROWD_GROWTH, "grown by {grown} KiB");
}

// A domain without subscribers.

/// A little longer than a read of the properties counts as interest.
const ATTENTION: Duration = Duration::from_secs(6);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_without_subscribers_is_rarely_queried() {
    let mut system = System::start();
    let disk = Disk::new("vda", 128 * MIB).fill(0, 96 * MIB, 0x11);
    let vm = system.vm("web").disk(disk).running().start();
    let proxy = Proxy::start(&system.dir().join("proxy"), &vm.monitor_path());
    system.write_domain_file("web", &format!("monitor = \"{}\"\n", proxy.path().display()));
    system.wait_for_domain("web");
    let pid = system.daemon().pid();

    let caller = Caller::new(&system).await;
    let slowly = slowly(MIB);
    let job = caller.start_with("web", "", &[], slowly).await;
    running(&job).await;
    let path = job.inner().path().to_owned();
    caller.connection.close().await.unwrap();

    tokio::time::sleep(ATTENTION).await;
    proxy.take_heard();
    let time = idle_time();
    wakeups(pid, "A backup runs without subscribers").await;
    let heard = proxy.take_heard();
    println!("QEMU received {heard:?}.");
    assert!(heard.len() as u64 <= time.as_secs() / 10 + 1, "{heard:?}");

    // The progress could be queried all the time.
    let caller = Caller::new(&system).await;
    let job = caller.job(path.into()).await;
    assert_eq!(job.state().await.unwrap(), "running");
    wait::until("QEMU to be asked", || {
        proxy
            .take_heard()
            .contains(&"query-jobs".to_owned())
            .then_some(())
    });
    cancel(&job).await;
}
