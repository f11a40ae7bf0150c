//! The running block jobs of a backup: what they tell, and what they are told.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::json;
use tokio::time::MissedTickBehavior;

use super::error::Stopped;
use super::footprint::Footprint;
use super::progress::{Meter, share};
use super::track::{Phase, Tracker, Verdict};
use super::{DiskState, Error, Job};
use crate::qmp::{self, Events, EventsError};

/// How often the progress is asked for while the job runs.
const PROGRESS: Duration = Duration::from_millis(500);

/// The running jobs, and what is to be done while they run.
pub struct Running<'a> {
    job: &'a Job,
    footprint: &'a Footprint,
    tracker: Tracker,
    meter: Meter,
    /// Limit and number of running disks that QEMU knows.
    shared: (u64, usize),
}

impl<'a> Running<'a> {
    pub fn new(job: &'a Job, footprint: &'a Footprint, speed: u64) -> Self {
        let disks = job.plan.disks.iter().enumerate();
        let jobs = disks.map(|(index, disk)| (footprint.names.block_job(index), disk.virtual_size));
        Self {
            job,
            footprint,
            tracker: Tracker::new(jobs),
            meter: Meter::new(),
            shared: (speed, job.plan.disks.len()),
        }
    }

    /// Follows the jobs until QEMU has concluded all of them.
    pub async fn run(&mut self, mut events: Events) -> qmp::Result<()> {
        let mut speeds = self.job.speed.subscribe();
        let mut progress = tokio::time::interval(PROGRESS);
        progress.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut cancelled = false;
        while !self.tracker.all_concluded() {
            tokio::select! {
                event = events.next() => match event {
                    Ok(event) => {
                        if !self.tracker.event(&event) {
                            continue;
                        }
                        self.show();
                    }
                    // Of a closed connection this says why it was closed.
                    Err(EventsError::Missed | EventsError::Closed) => self.ask(&mut events).await?,
                },
                _ = progress.tick() => self.ask(&mut events).await?,
                () = self.job.cancel.cancelled(), if !cancelled => {
                    cancelled = true;
                    self.cancel().await?;
                }
                // The sender is the job's own.
                Ok(()) = speeds.changed() => {}
            }
            let speed = *speeds.borrow_and_update();
            self.share(speed).await?;
        }
        Ok(())
    }

    async fn ask(&mut self, events: &mut Events) -> qmp::Result<()> {
        let infos = self.footprint.query_jobs().await?;
        // What QEMU said before it answered says more than the answer.
        while let Some(event) = events.next_now() {
            self.tracker.event(&event);
        }
        self.tracker.query(&infos);
        let done = self.tracker.jobs().iter().map(|job| job.done).sum();
        let rate = self.meter.measure(Instant::now(), done);
        let total: u64 = self.tracker.jobs().iter().map(|job| job.total).sum();
        let end = self
            .meter
            .expected_end(Timestamp::now(), total.saturating_sub(done));
        self.job.update(|status| {
            status.rate = rate;
            status.expected_end = end;
        });
        self.show();
        Ok(())
    }

    fn show(&self) {
        self.job.update(|status| {
            for (disk, tracked) in status.disks.iter_mut().zip(self.tracker.jobs()) {
                disk.done = tracked.done;
                disk.total = tracked.total;
                disk.state = match tracked.phase {
                    Phase::Running => DiskState::Running,
                    Phase::Waiting => DiskState::Waiting,
                    Phase::Concluded => DiskState::Finishing,
                };
            }
        });
    }

    /// Cancels one block job, and QEMU the others with it. One that has concluded already cannot be cancelled: the
    /// next one is tried.
    async fn cancel(&self) -> qmp::Result<()> {
        for tracked in self.tracker.jobs() {
            let arguments = json!({ "device": tracked.job, "force": true });
            match self
                .footprint
                .client()
                .execute("block-job-cancel", arguments)
                .await
            {
                Err(error) if error.is_refusal() => {}
                result => return result.map(drop),
            }
        }
        Ok(())
    }

    /// Divides the limit among the disks that still run, whenever one of the two changes.
    async fn share(&mut self, speed: u64) -> qmp::Result<()> {
        let running: Vec<_> = self
            .tracker
            .jobs()
            .iter()
            .filter(|job| job.phase == Phase::Running)
            .collect();
        if self.shared == (speed, running.len()) {
            return Ok(());
        }
        self.shared = (speed, running.len());
        for tracked in running {
            let arguments = json!({ "device": tracked.job, "speed": share(speed, self.shared.1) });
            match self
                .footprint
                .client()
                .execute("block-job-set-speed", arguments)
                .await
            {
                // It ended just now.
                Err(error) if error.is_refusal() => {}
                result => drop(result?),
            }
        }
        Ok(())
    }

    /// What QEMU made of the jobs, all together.
    pub fn judge(&self) -> Result<(), Stopped> {
        let verdicts = self.tracker.verdicts();
        let mut first = None;
        for (index, verdict) in verdicts.iter().enumerate() {
            if let Verdict::Failed { operation, message } = verdict {
                self.job.update(|status| {
                    status.disks[index].state = DiskState::Failed {
                        operation: operation.clone(),
                        message: message.clone(),
                    };
                });
                first = first.or(Some(Error::Copy {
                    disk: self.job.plan.disks[index].name.clone(),
                    message: message.clone(),
                }));
            }
        }
        match first {
            Some(error) => Err(Stopped::Failed(error)),
            None if verdicts.contains(&Verdict::Cancelled) => Err(Stopped::Cancelled),
            None => Ok(()),
        }
    }
}
