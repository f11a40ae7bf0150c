//! Measures a nightly backup of all VMs of a host, and a host with idle VMs. It is a part of `make bench`.
//!
//! Each VM is a QEMU without a guest (`-S`) that has one small disk. All backups are requested at once, as timers do.
//! If so many QEMUs do not fit into memory, idle domains are peers in this process that send the replies of a real
//! QEMU.
//!
//! `BACKUPD_BENCH_VMS` is the number of VMs. `cargo bench --bench night -- idle` measures only the idle domains.

#[path = "../../tests/common/mod.rs"]
mod common;

mod idle;
mod machines;
mod run;

use std::time::Duration;

use common::System;
use run::Night;

/// A few VMs for comparison: the cost of one VM must not depend on their number.
const FEW: usize = 20;
const MANY: usize = 200;

/// The targets, for each VM.
const MOST_PROCESSOR: f64 = 25.0;
const MOST_COMMANDS: usize = 40;
/// The target of a host of idle domains.
const MOST_IDLE_RSS: u64 = 30 << 10;

fn many() -> usize {
    std::env::var("BACKUPD_BENCH_VMS").map_or(MANY, |count| {
        let count = count.parse().ok().filter(|count| *count > FEW);
        count.unwrap_or_else(|| panic!("BACKUPD_BENCH_VMS is a number, more than {FEW}"))
    })
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime is made");
    if std::env::args().any(|argument| argument == "idle") {
        return print_idle(&runtime.block_on(idle::measure()));
    }
    let mut nights = Vec::new();
    for count in [FEW, many()] {
        eprintln!("{count} VMs");
        let mut system = System::setup().start();
        let machines = machines::start(&mut system, count);
        for kind in ["full", "auto"] {
            nights.push(runtime.block_on(run::night(&mut system, &machines, kind)));
        }
    }
    eprintln!("idle domains");
    let idle = runtime.block_on(idle::measure());
    report(&nights, &idle);
}

fn report(nights: &[Night], idle: &idle::Idle) {
    println!("\na night's run: one disk of 64 MiB with 4 MiB of data each, all requested at once\n");
    println!(
        "{:<22} {:>8} {:>10} {:>12} {:>10} {:>9}",
        "", "seconds", "ms a VM", "CPU ms a VM", "commands", "RSS"
    );
    for night in nights {
        println!(
            "{:<22} {:>8.1} {:>10.1} {:>12.1} {:>10} {:>5.1} MiB",
            format!("{} VMs, {}", night.machines, night.kind),
            night.wall.as_secs_f64(),
            milliseconds(night.wall) / night.machines as f64,
            night.processor_each(),
            night.commands,
            night.rss as f64 / 1024.0,
        );
    }
    print_idle(idle);
    println!("\ntargets");
    let target = |what: &str, met: bool, value: String| {
        println!("{what:<62} {value:>9}  {}", if met { "met" } else { "missed" });
    };
    let (few, many) = (&nights[..2], &nights[2..]);
    let processor = many.iter().map(Night::processor_each).fold(0.0, f64::max);
    let commands = many.iter().map(|night| night.commands).max().unwrap_or_default();
    target(
        "CPU of the service <= 25 ms a VM",
        processor <= MOST_PROCESSOR,
        format!("{processor:.1} ms"),
    );
    target(
        "QMP commands <= 40 a VM",
        commands <= MOST_COMMANDS,
        commands.to_string(),
    );
    let constant = few
        .iter()
        .zip(many)
        .all(|(few, many)| many.commands <= few.commands);
    target(
        "no more of them for many VMs than for few",
        constant,
        String::new(),
    );
    target(
        "idle domains <= 30 MiB RSS",
        idle.rss <= MOST_IDLE_RSS,
        format!("{:.1} MiB", idle.rss as f64 / 1024.0),
    );
    target("and no wakeups", idle.wakeups == 0, idle.wakeups.to_string());
}

fn print_idle(idle: &idle::Idle) {
    println!(
        "\n{} idle domains: RSS {:.1} MiB, {} wakeups in {} s; started and connected in {:.1} s with {:.1} CPU ms each",
        idle.domains,
        idle.rss as f64 / 1024.0,
        idle.wakeups,
        idle.watched.as_secs(),
        idle.connected.as_secs_f64(),
        idle.processor as f64 / idle.domains as f64,
    );
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// In kibibytes.
fn rss(process: u32) -> u64 {
    let path = format!("/proc/{process}/status");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("{path} has no VmRSS"))
}
