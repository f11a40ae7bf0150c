//! Measures the speed of backups in comparison with other methods. `make bench` runs it and prints one table.
//!
//! Every method copies the same 1 GiB of data in the same run, and each round runs all methods in turn: on a device
//! with other users, only numbers of the same minutes are comparable. The result is a report, and a missed target is
//! not an error.
//!
//! Then it creates incremental backups of disks of several sizes with the same amount of changed data, restores,
//! verifies, merges and compresses, and backs up a huge disk without data. Each is compared with the tool that does the
//! same by hand.
//!
//! Then a guest writes during a backup into a slow target; `cargo bench --bench backup -- gentle` measures only that.
//!
//! `BACKUPD_BENCH_DIR` is the directory of the images (12 GiB, removed at the end), `BACKUPD_BENCH_ROUNDS` the number
//! of rounds.

#[path = "../../tests/common/mod.rs"]
mod common;

mod compression;
mod gentle;
mod hand;
mod holes;
mod increments;
mod latency;
mod memory;
mod methods;
mod pair;
mod qmp;
mod report;
mod stored;
mod workspace;

use common::System;
use common::caller::Caller;
use common::disk::Disk;
use common::storage::Tmpfs;
use methods::{Method, Sample};
use qmp::Monitor;
use report::Report;
use workspace::Workspace;

/// The names of the VMs in the service.
const LARGE: &str = "large";
const SMALL: &str = "small";
const HUGE: &str = "huge";
const SOFT: &str = "soft";
/// The stores' names: one on the device that is measured, one in memory.
const ON_DEVICE: &str = "device";
const IN_MEMORY: &str = "memory";
/// The disk of each VM.
const DISK: &str = "vda";

const SMALL_DISK: u64 = 64 << 20;
const MEMORY_STORE: u64 = 128 << 20;

fn rounds() -> usize {
    std::env::var("BACKUPD_BENCH_ROUNDS").map_or(5, |rounds| {
        rounds
            .parse()
            .ok()
            .filter(|rounds| *rounds > 0)
            .expect("BACKUPD_BENCH_ROUNDS is a number, 1 at least")
    })
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some(gentle::GUEST) => gentle::guest(),
        Some("gentle") => report::print_gentle(&runtime().block_on(gentle::measure())),
        _ => everything(),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime is made")
}

fn everything() {
    let rounds = rounds();
    let workspace = Workspace::create();
    let runtime = runtime();
    let memory_store = Tmpfs::mount(&workspace.path().join("memory"), MEMORY_STORE);
    let mut system = System::setup()
        .store(ON_DEVICE, &workspace.store())
        .store(IN_MEMORY, memory_store.path())
        .start();
    let hand_socket = system.dir().join("hand");
    let hand_server = format!("unix:{},server=on,wait=off", hand_socket.display());
    let large = system
        .vm(LARGE)
        .disk(Disk::new(DISK, workspace::IMAGE_SIZE).at(&workspace.source()))
        .extra(&["-qmp", &hand_server])
        .start();
    let small = system
        .vm(SMALL)
        .disk(Disk::new(DISK, SMALL_DISK).fill(0, 1 << 20, 0x5a))
        // An older QEMU keeps every descriptor of a stopped VM, so each backup would have more to clean up.
        .running()
        .start();
    for vm in [&large, &small] {
        system.domain_file(vm.name(), vm);
        system.wait_for_domain(vm.name());
    }
    let service = system.daemon().pid();
    let mut caller = runtime.block_on(Caller::new(&system));
    let mut monitor = Monitor::connect(&hand_socket);
    let idle = memory::settled(service);

    // The round that does not count warms the caches, measures the memory, and compares the copies with the original.
    let watched = memory::Watch::start(service);
    let mut measure = |method: Method, checked: bool| -> Sample {
        workspace.settle();
        let sample = match method {
            Method::Service => runtime.block_on(methods::service(&mut caller, &large)),
            Method::ByHand => hand::back_up(&mut monitor, &workspace),
            Method::Convert => methods::convert(&workspace),
            Method::Dd => methods::dd(&workspace),
        };
        if checked && method != Method::Dd {
            workspace.compare();
        }
        workspace.remove_targets();
        sample
    };
    measure(Method::Service, true);
    let busy = watched.most();
    for method in [Method::ByHand, Method::Convert, Method::Dd] {
        measure(method, true);
    }
    let mut samples = Vec::new();
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        let mut order = Method::ALL;
        // Varies the order, so that none always follows the same other one.
        order.rotate_left(round % Method::ALL.len());
        samples.extend(order.map(|method| (method, measure(method, false))));
    }
    eprintln!("small disks");
    let latency = runtime.block_on(latency::measure(&system, &mut caller, &small));
    let unchanged = runtime.block_on(increments::unchanged(&mut caller, &small, rounds));
    let increments = runtime.block_on(increments::measure(&system, &mut caller, rounds));
    eprintln!("stored backups");
    let mut times = runtime.block_on(stored::measure(&mut caller, &workspace, &large, rounds));
    drop((large, small));
    eprintln!("compression and holes");
    let compressed = compression::measure(&system, &mut caller, &workspace, rounds);
    let (compressed, mut sizes) = runtime.block_on(compressed);
    times.extend(compressed);
    let holes = runtime.block_on(holes::measure(&system, &mut caller, &workspace, rounds));
    times.extend(holes.times);
    sizes.extend(holes.sizes);
    report::print(&Report {
        rounds,
        samples: &samples,
        latency: &latency,
        unchanged: &unchanged,
        memory: &[("idle", idle), ("busy", busy)],
        increments: &increments,
        times: &times,
        sizes: &sizes,
        alone: &holes.alone,
    });
    report::print_gentle(&runtime.block_on(gentle::measure()));
}
