//! Resource use and wakeups of a process, as the kernel counts them.

use std::collections::HashMap;
use std::fs;
use std::str::FromStr;

/// Milliseconds of one unit of processor time (proc(5): USER_HZ, 100 a second).
const TICK: u64 = 10;

/// The resources of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Anonymous memory in KiB, without memory that is backed by files.
    pub memory: u64,
    pub descriptors: usize,
    pub threads: usize,
}

impl Footprint {
    #[track_caller]
    pub fn of(pid: u32) -> Self {
        let rollup = read(pid, "smaps_rollup");
        Self {
            memory: field(&rollup, "Anonymous:"),
            descriptors: descriptors(pid),
            threads: entries(pid, "task").len(),
        }
    }
}

/// Returns the number of open descriptors of a process.
#[track_caller]
pub fn descriptors(pid: u32) -> usize {
    entries(pid, "fd").len()
}

/// Returns the number of threads of a process with this name.
#[track_caller]
pub fn threads_named(pid: u32, name: &str) -> usize {
    let threads = entries(pid, "task").into_iter();
    // A thread that ends during the scan is not counted.
    let names =
        threads.filter_map(|thread| fs::read_to_string(format!("/proc/{pid}/task/{thread}/comm")).ok());
    names.filter(|found| found.trim_end() == name).count()
}

/// The activity of a process up to now.
#[derive(Debug, Clone)]
pub struct Activity {
    /// Milliseconds of processor time.
    pub processor: u64,
    /// By thread: the number of voluntary context switches, that is, how often it went to sleep.
    sleeps: HashMap<String, u64>,
}

impl Activity {
    #[track_caller]
    pub fn of(pid: u32) -> Self {
        let stat = read(pid, "stat");
        // The name before it can contain anything.
        let (_, rest) = stat.rsplit_once(')').expect("a process has a name");
        let fields: Vec<_> = rest.split_whitespace().collect();
        let ticks: u64 = parse::<u64>(fields[11]) + parse::<u64>(fields[12]);
        // A thread that ends during the scan is not counted.
        let sleeps = entries(pid, "task").into_iter().filter_map(|thread| {
            let status = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).ok()?;
            Some((thread, field(&status, "voluntary_ctxt_switches:")))
        });
        Self {
            processor: ticks * TICK,
            sleeps: sleeps.collect(),
        }
    }

    /// Returns how often a thread woke up and slept again since `before`, without threads that have ended.
    pub fn wakeups_since(&self, before: &Self) -> u64 {
        let since = |(thread, sleeps): (&String, &u64)| sleeps - before.sleeps.get(thread).unwrap_or(&0);
        self.sleeps.iter().map(since).sum()
    }
}

/// Returns the median.
#[track_caller]
pub fn median<T: Ord + Copy>(values: impl IntoIterator<Item = T>) -> T {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort();
    values[values.len() / 2]
}

#[track_caller]
fn read(pid: u32, file: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{file}")).expect("the process is there")
}

#[track_caller]
fn entries(pid: u32, directory: &str) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/{directory}")).expect("the process is there");
    let names = entries.map(|entry| entry.expect("an entry is read").file_name());
    names.map(|name| name.to_string_lossy().into_owned()).collect()
}

/// Returns the number after `name` at the beginning of a line.
#[track_caller]
fn field(text: &str, name: &str) -> u64 {
    let rest = text.lines().find_map(|line| line.strip_prefix(name));
    let rest = rest.unwrap_or_else(|| panic!("there is no {name} in {text}"));
    parse(rest.split_whitespace().next().unwrap_or_default())
}

#[track_caller]
fn parse<T: FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("not a number: {text}"))
}
