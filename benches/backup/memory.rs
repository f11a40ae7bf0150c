//! Measures the memory of the service.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const STEP: Duration = Duration::from_millis(20);
/// The time after which an idle process has finished its remaining work.
const SETTLED: Duration = Duration::from_millis(500);

/// In kibibytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    /// Resident, including all memory shared with other programs, such as libraries.
    pub rss: u64,
    /// The part of it that no other process shares.
    pub private: u64,
    /// Resident, with a proportional part of shared memory.
    pub pss: u64,
}

impl Memory {
    fn of(process: u32) -> Self {
        let path = format!("/proc/{process}/smaps_rollup");
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            number.unwrap_or_else(|| panic!("{path} has no {name}"))
        };
        Self {
            rss: field("Rss:"),
            private: field("Private_Clean:") + field("Private_Dirty:"),
            pss: field("Pss:"),
        }
    }

    fn or_more(self, other: Self) -> Self {
        Self {
            rss: self.rss.max(other.rss),
            private: self.private.max(other.private),
            pss: self.pss.max(other.pss),
        }
    }
}

/// Returns the memory of a process after a short idle time.
pub fn settled(process: u32) -> Memory {
    std::thread::sleep(SETTLED);
    Memory::of(process)
}

/// Samples repeatedly until the maximum is requested.
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Memory>,
}

impl Watch {
    pub fn start(process: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut most = Memory::default();
            while !stopped.load(Ordering::Relaxed) {
                most = most.or_more(Memory::of(process));
                std::thread::sleep(STEP);
            }
            most
        });
        Self { stop, thread }
    }

    pub fn most(self) -> Memory {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the service was looked at")
    }
}
