//! Prints the table, and compares it with the targets.

use crate::gentle::{MOST, Phase, RATE};
use crate::increments::{Increment, SIZES};
use crate::latency::Latency;
use crate::memory::Memory;
use crate::methods::{Method, Sample};
use crate::pair::{Pair, Single};

/// The targets, all with fsync.
const MOST_TIMES_DD: f64 = 1.15;
const LEAST_TIMES_DEFAULTS: f64 = 1.5;
const MOST_TO_START: f64 = 0.030;
const MOST_RSS: u64 = 20 << 10;
/// The limit for the largest disk in comparison with the smallest.
const MOST_TIMES_SMALLEST: f64 = 1.15;
const MOST_UNCHANGED: f64 = 0.060;

/// All measurements.
pub struct Report<'a> {
    pub rounds: usize,
    pub samples: &'a [(Method, Sample)],
    pub latency: &'a Latency,
    /// Seconds of incremental backups of an unchanged disk.
    pub unchanged: &'a [f64],
    pub memory: &'a [(&'a str, Memory)],
    pub increments: &'a [Vec<Increment>; 3],
    /// Seconds.
    pub times: &'a [Pair],
    /// Bytes.
    pub sizes: &'a [Pair],
    /// Seconds.
    pub alone: &'a [Single],
}

/// The middle value, or the mean of the two middle ones.
fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// The row of one method in the table.
struct Row {
    copied: Option<f64>,
    durable: f64,
    least: f64,
    most: f64,
}

impl Row {
    fn of(samples: &[(Method, Sample)], method: Method) -> Self {
        let own = || {
            samples
                .iter()
                .filter(move |(other, _)| *other == method)
                .map(|(_, sample)| sample)
        };
        let copied = own().filter_map(|sample| sample.copied).collect::<Vec<_>>();
        let durable = || own().map(|sample| sample.durable);
        Self {
            copied: (!copied.is_empty()).then(|| median(copied)),
            durable: median(durable()),
            least: durable().fold(f64::INFINITY, f64::min),
            most: durable().fold(0.0, f64::max),
        }
    }
}

fn name(method: Method) -> &'static str {
    match method {
        Method::Dd => "dd bs=1M conv=fsync",
        Method::Service => "backupd, push to a store",
        Method::Convert => "qemu-img convert -W -m 8",
        Method::ByHand => "QMP by hand, QEMU's defaults",
    }
}

pub fn print(report: &Report) {
    let &Report {
        rounds,
        samples,
        latency,
        unchanged,
        memory,
        increments,
        times,
        sizes,
        alone,
    } = report;
    let row = |method| Row::of(samples, method);
    let [dd, service, convert, by_hand] = Method::ALL.map(row);
    println!("1 GiB of data in a 4 GiB qcow2 image, rounds: {rounds}, medians in seconds\n");
    println!(
        "{:<29} {:>9} {:>9} {:>15} {:>6} {:>9}",
        "", "no fsync", "fsync", "(from to)", "/ dd", "/ convert"
    );
    for (method, row) in Method::ALL.into_iter().zip([&dd, &service, &convert, &by_hand]) {
        println!(
            "{:<29} {:>9} {:>9.3} {:>15} {:>6.2} {:>9.2}",
            name(method),
            row.copied
                .map_or_else(|| "-".to_owned(), |copied| format!("{copied:.3}")),
            row.durable,
            format!("({:.2} {:.2})", row.least, row.most),
            row.durable / dd.durable,
            row.durable / convert.durable,
        );
    }

    let milliseconds = |seconds: f64| format!("{:.1} ms", seconds * 1000.0);
    let (start, polkit) = (
        median(latency.start.iter().copied()),
        median(latency.polkit.iter().copied()),
    );
    let own = latency
        .start
        .iter()
        .zip(&latency.polkit)
        .map(|(start, polkit)| start - polkit);
    let own = median(own);
    println!("\nsmall disk, {} backups, medians", latency.start.len());
    let line = |what: &str, value: String| println!("{what:<62} {value:>9}");
    line("CreateBackup to QEMU's transaction", milliseconds(start));
    line("  of that polkit", milliseconds(polkit));
    line("  without polkit", milliseconds(own));
    line(
        "QEMU's BLOCK_JOB_COMPLETED to Completed, store in memory",
        milliseconds(median(latency.signal.iter().copied())),
    );
    line(
        "the same, store on the device (5 fsyncs)",
        milliseconds(median(latency.signal_on_device.iter().copied())),
    );

    let mib = |kib: u64| kib as f64 / 1024.0;
    println!();
    for (when, memory) in memory {
        println!(
            "the service's memory, {when}: RSS {:.1} MiB (its own {:.1}, proportional {:.1})",
            mib(memory.rss),
            mib(memory.private),
            mib(memory.pss)
        );
    }

    let increments = print_increments(increments);
    let unchanged = median(unchanged.iter().copied());
    line("one of an unchanged disk of 64 MiB", milliseconds(unchanged));

    println!(
        "\n{:<48} {:>9} {:>9} {:>9}",
        "backupd / another tool, medians", "backupd", "other", "ratio"
    );
    let pairs = times.iter().map(|pair| (pair, 1.0, "s"));
    let pairs = pairs.chain(sizes.iter().map(|pair| (pair, f64::from(1 << 20), "MiB")));
    let ratios: Vec<(&Pair, f64)> = pairs
        .map(|(pair, unit, name)| {
            let [ours, others] = [&pair.ours, &pair.others].map(|of| median(of.iter().copied()));
            let shown = |value: f64| format!("{:.3} {name}", value / unit);
            println!(
                "{:<48} {:>9} {:>9} {:>9.2}",
                pair.what,
                shown(ours),
                shown(others),
                ours / others
            );
            (pair, ours / others)
        })
        .collect();

    println!("\ntargets, with fsync");
    let rss = memory
        .iter()
        .map(|(_, memory)| memory.rss)
        .max()
        .unwrap_or_default();
    let target = |what: &str, met: bool, value: String| {
        println!("{what:<62} {value:>9}  {}", if met { "met" } else { "missed" });
    };
    target(
        "at least as fast as qemu-img convert: time / convert <= 1",
        service.durable <= convert.durable,
        format!("{:.2}", service.durable / convert.durable),
    );
    target(
        &format!("time / dd <= {MOST_TIMES_DD}"),
        service.durable <= dd.durable * MOST_TIMES_DD,
        format!("{:.2}", service.durable / dd.durable),
    );
    target(
        &format!("at least {LEAST_TIMES_DEFAULTS} times as fast as QEMU's defaults"),
        by_hand.durable >= service.durable * LEAST_TIMES_DEFAULTS,
        format!("{:.2}", by_hand.durable / service.durable),
    );
    target(
        "call to transaction under 30 ms without polkit",
        own < MOST_TO_START,
        milliseconds(own),
    );
    target("RSS under 20 MiB", rss < MOST_RSS, format!("{:.1} MiB", mib(rss)));
    target(
        &format!("an increment of 64 GiB / one of 1 GiB <= {MOST_TIMES_SMALLEST}"),
        increments <= MOST_TIMES_SMALLEST,
        format!("{increments:.2}"),
    );
    target(
        "an increment of an unchanged disk within 60 ms",
        unchanged <= MOST_UNCHANGED,
        milliseconds(unchanged),
    );
    for (pair, ratio) in ratios {
        target(
            &format!("{} <= {:.2}", pair.what, pair.limit),
            ratio <= pair.limit,
            format!("{ratio:.2}"),
        );
    }
    for single in alone {
        let seconds = median(single.values.iter().copied());
        target(
            &format!("{} within {} s", single.what, single.limit),
            seconds <= single.limit,
            format!("{seconds:.3} s"),
        );
    }
}

/// Returns the ratio of the largest disk's time to the smallest one's.
fn print_increments(increments: &[Vec<Increment>; 3]) -> f64 {
    println!("\n64 MiB changed since the last backup, medians");
    println!(
        "{:<29} {:>9} {:>9} {:>9} {:>9}",
        "", "seconds", "/ 1 GiB", "copied", "image"
    );
    let seconds = increments
        .each_ref()
        .map(|of| median(of.iter().map(|increment| increment.seconds)));
    for ((gib, of), taken) in SIZES.iter().zip(increments).zip(seconds) {
        let mib = |bytes: fn(&Increment) -> u64| {
            median(of.iter().map(|one| bytes(one) as f64)) / f64::from(1 << 20)
        };
        println!(
            "{:<29} {taken:>9.3} {:>9.2} {:>5.0} MiB {:>5.0} MiB",
            format!("a disk of {gib} GiB"),
            taken / seconds[0],
            mib(|one| one.copied),
            mib(|one| one.image),
        );
    }
    seconds[2] / seconds[0]
}

/// The value that 99 of 100 values do not exceed.
fn percentile_99(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values.get(last * 99 / 100).copied().unwrap_or(f64::NAN)
}

/// Prints the latencies of the guest's writes. The last phase has the option.
pub fn print_gentle(phases: &[Phase]) {
    let mib = f64::from(1 << 20);
    let rate = RATE as f64 / mib;
    println!(
        "\na guest that writes 4 KiB at a time, 250 a second at most; the target takes {rate} MiB/s (FUSE)\n"
    );
    println!(
        "{:<29} {:>7} {:>9} {:>9} {:>9} {:>8} {:>9}",
        "", "writes", "median", "p99", "longest", "seconds", "MiB/s"
    );
    let milliseconds = |seconds: f64| format!("{:.1} ms", seconds * 1000.0);
    let speed = |phase: &Phase| phase.backup.map(|(seconds, bytes)| bytes as f64 / mib / seconds);
    for phase in phases {
        println!(
            "{:<29} {:>7} {:>9} {:>9} {:>9} {:>8} {:>9}",
            phase.name,
            phase.writes.len(),
            milliseconds(median(phase.writes.iter().copied())),
            milliseconds(percentile_99(&phase.writes)),
            milliseconds(phase.writes.iter().copied().fold(0.0, f64::max)),
            phase
                .backup
                .map_or_else(String::new, |(seconds, _)| format!("{seconds:.1}")),
            speed(phase).map_or_else(String::new, |speed| format!("{speed:.1}")),
        );
    }
    let (Some(idle), Some(with)) = (phases.first(), phases.last()) else {
        return;
    };
    let (before, during) = (percentile_99(&idle.writes), percentile_99(&with.writes));
    let allowed = (2.0 * before).max(MOST as f64 / 1000.0);
    let part = speed(with).unwrap_or(f64::NAN) / rate;
    println!();
    for (what, met, value) in [
        (
            "p99 with max-latency <= 2 x that without a backup, or 10 ms",
            during <= allowed,
            milliseconds(during),
        ),
        (
            "speed with max-latency >= 0.8 of the target's throughput",
            part >= 0.8,
            format!("{part:.2}"),
        ),
    ] {
        println!("{what:<62} {value:>9}  {}", if met { "met" } else { "missed" });
    }
}
