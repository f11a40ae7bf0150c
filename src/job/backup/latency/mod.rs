//! Adapts the speed of a backup to the latency of the guest's writes: lowers it while they exceed the allowed latency.
//!
//! [`Window`] rates the recent writes of a disk, [`Controller`] derives a speed from that. Both are pure. Must not know the other limits of the speed.

mod controller;
mod window;

use std::time::{Duration, Instant};

use controller::Controller;
use window::Window;

use crate::job::qemu::{Histogram, QemuObjects, Reading, reading};
use crate::plan::Plan;
use crate::qmp;
use crate::qmp::block::BlockStats;

/// How often the service queries QEMU for the guest's writes.
const INTERVAL: Duration = Duration::from_millis(250);
/// How long the writes may be late at the lowest speed before the service logs it.
const HOPELESS: Duration = Duration::from_secs(60);

/// Follows the guest's writes to the disks of one backup.
#[derive(Debug)]
pub struct Latency {
    histogram: Histogram,
    controller: Controller,
    disks: Vec<Disk>,
    /// The time of the next query.
    due: Instant,
    /// The time of QEMU's last answer, and the bytes copied by then.
    before: Option<(Instant, u64)>,
    /// Since when the writes have been late at the lowest speed, and whether the service has logged it.
    slow_since: Option<Instant>,
    reported: bool,
}

#[derive(Debug)]
struct Disk {
    /// The QOM path of the guest's device.
    device: String,
    last: Option<Reading>,
    window: Window,
}

impl Latency {
    /// Returns `None` if the plan sets no limit. `histogram` is the job's.
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

    /// Returns the first speed of the backup in bytes a second; 0 if its plan sets no limit.
    pub fn first_limit(plan: &Plan) -> u64 {
        plan.max_latency
            .map_or(0, |_| Controller::new(plan.disks.len()).limit())
    }

    /// Returns the time of the next query.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Sets a latency histogram on each disk that has none. Histograms of other clients stay.
    pub async fn begin(&mut self, objects: &QemuObjects) -> qmp::Result<()> {
        let devices: Vec<&str> = self.disks.iter().map(|disk| disk.device.as_str()).collect();
        objects.set_histograms(&self.histogram, &devices).await
    }

    /// Postpones the query, because QEMU did not answer.
    pub fn skip(&mut self, now: Instant) {
        self.due = now + INTERVAL;
    }

    /// Evaluates QEMU's statistics of its devices, and the bytes copied by `now`. Returns the speed in bytes a second
    /// for all disks together.
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
            // Writes under the former speed do not show the effect of the new one.
            self.disks.iter_mut().for_each(|disk| disk.window.clear());
        }
        self.note(now, stepped.is_hopeless);
        self.controller.limit()
    }

    /// Logs once that the writes stay late even at the lowest speed.
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
                "the guest's writes exceed max-latency although the backup runs at its lowest speed"
            );
        }
    }
}
