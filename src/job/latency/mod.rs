//! The speed of a backup by how long the guest's writes take: it falls while they take longer than is allowed.
//!
//! [`Window`] says how long most of the recent writes of a disk took; [`Controller`] makes a speed of that; [`histograms`] asks
//! QEMU. The first two are pure. Must not know what else limits the speed.

mod controller;
mod histograms;
mod window;

pub use histograms::{Histogram, can_follow_latency};

use std::time::{Duration, Instant};

use controller::Controller;
use histograms::{Reading, reading};
use window::Window;

use super::footprint::Footprint;
use crate::plan::Plan;
use crate::qmp;
use crate::qmp::block::BlockStats;

/// How often QEMU is asked for the guest's writes.
const INTERVAL: Duration = Duration::from_millis(250);
/// For how long the writes may be slow at the lowest speed until the log says so.
const HOPELESS: Duration = Duration::from_secs(60);

/// Follows the guest's writes to the disks of one backup.
#[derive(Debug)]
pub struct Latency {
    histogram: Histogram,
    controller: Controller,
    disks: Vec<Disk>,
    /// When QEMU is to be asked next.
    due: Instant,
    /// When QEMU answered last, and how many bytes were copied by then.
    before: Option<(Instant, u64)>,
    /// Since when the writes are slow at the lowest speed, and whether the log says so.
    slow_since: Option<Instant>,
    reported: bool,
}

#[derive(Debug)]
struct Disk {
    /// QEMU's path of the guest's device.
    device: String,
    last: Option<Reading>,
    window: Window,
}

impl Latency {
    /// Nothing if the plan sets no limit. `histogram` is that of the job.
    pub fn of(plan: &Plan, histogram: Option<Histogram>) -> Option<Self> {
        let disks = plan.disks.iter().map(|disk| Disk {
            device: disk.device.clone(),
            last: None,
            window: Window::default(),
        });
        Some(Self {
            histogram: histogram?,
            controller: Controller::new(plan.disks.len()),
            disks: disks.collect(),
            due: Instant::now(),
            before: None,
            slow_since: None,
            reported: false,
        })
    }

    /// The speed with which the backup begins, in bytes a second; 0 if its plan sets no limit.
    pub fn first_limit(plan: &Plan) -> u64 {
        plan.max_latency
            .map_or(0, |_| Controller::new(plan.disks.len()).limit())
    }

    /// When QEMU is to be asked next.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Sets a histogram of the writes' latency on each disk that has none. A histogram of another client stays.
    pub async fn begin(&mut self, footprint: &Footprint) -> qmp::Result<()> {
        let devices: Vec<&str> = self.disks.iter().map(|disk| disk.device.as_str()).collect();
        footprint.set_histograms(&self.histogram, &devices).await
    }

    /// QEMU did not answer.
    pub fn skip(&mut self, now: Instant) {
        self.due = now + INTERVAL;
    }

    /// Takes in what QEMU says of its devices, and how many bytes were copied by `now`; returns the speed, in bytes a second, all
    /// disks together.
    pub fn step(&mut self, now: Instant, devices: &[BlockStats], copied: u64) -> u64 {
        self.due = now + INTERVAL;
        for disk in &mut self.disks {
            let found = devices.iter().find(|device| device.is(&disk.device));
            let read = found.map(|device| reading(device, &self.histogram));
            let counts = disk.last.as_ref().zip(read.as_ref());
            let counts = counts.and_then(|(last, read)| read.since(last, self.histogram.most()));
            disk.window.push(counts.unwrap_or_default());
            disk.last = read.or(disk.last.take());
        }
        let Some((before, had)) = self.before.replace((now, copied)) else {
            return self.controller.limit();
        };
        let level = self.disks.iter().filter_map(|disk| disk.window.level()).max();
        let elapsed = now.saturating_duration_since(before);
        let stepped = self.controller.step(elapsed, level, copied.saturating_sub(had));
        if stepped.lowered {
            // What was written under the former speed says nothing about this one.
            self.disks.iter_mut().for_each(|disk| disk.window.clear());
        }
        self.note(now, stepped.is_hopeless);
        self.controller.limit()
    }

    /// Whether the log is to say that the backup is not what makes the writes slow.
    fn note(&mut self, now: Instant, is_hopeless: bool) {
        if !is_hopeless {
            self.slow_since = None;
            return;
        }
        let since = *self.slow_since.get_or_insert(now);
        if !self.reported && now.saturating_duration_since(since) >= HOPELESS {
            self.reported = true;
            tracing::warn!(
                most_ms = self.histogram.most().as_millis(),
                "the guest's writes take longer than max-latency though the backup is as slow as it gets"
            );
        }
    }
}
