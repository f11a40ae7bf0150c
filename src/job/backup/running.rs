//! The running block jobs of a backup: handles their events, and sends commands to them.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::latency::Latency;
use super::scan::Scan;
use super::stall::Stall;
use super::track::{Phase, Tracker, Verdict};
use crate::clock;
use crate::job::bandwidth::Part;
use crate::job::error::Stopped;
use crate::job::progress::{Meter, share};
use crate::job::qemu::QemuObjects;
use crate::job::{DiskState, Error, Job, State};
use crate::plan::Plan;
use crate::qmp::block::{BlockJobCancel, BlockJobSetSpeed, JobEvent, JobInfo, JobStatus};
use crate::qmp::{self, Command, Done, Events, EventsError};

/// How often the service queries the progress: with and without an observer.
const PROGRESS: Duration = Duration::from_millis(500);
const UNSEEN: Duration = Duration::from_secs(10);
/// The timeout of QEMU's answer. QEMU still executes a command that it answers late.
const ANSWER: Duration = Duration::from_secs(5);
/// The minimum interval between checks for a stall.
const CHECK: Duration = Duration::from_secs(1);

/// QEMU's answer to a command for a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reply {
    Done,
    /// The job has just ended.
    Ended,
    /// QEMU does not answer. It executes the command later.
    Silent,
}

/// The running jobs, and the work to do while they run.
pub struct Running<'a> {
    job: &'a Job,
    plan: &'a Plan,
    objects: &'a QemuObjects,
    tracker: Tracker,
    meter: Meter,
    scan: Scan,
    part: &'a Part,
    latency: Option<Latency>,
    /// The limit and the number of running disks that QEMU has confirmed; `None` if unknown.
    shared: Option<(u64, usize)>,
    stall: Stall,
    /// QEMU has not answered the last query of the jobs.
    silent: bool,
    /// This QEMU is known to have the jobs.
    found: bool,
}

impl<'a> Running<'a> {
    /// `speed` is the limit with which this process started the jobs, in bytes a second for all disks together. It is
    /// `None` if an earlier instance started them. `stall` is the longest time without progress.
    pub fn new(
        (job, plan): (&'a Job, &'a Plan),
        objects: &'a QemuObjects,
        (speed, part): (Option<u64>, &'a Part),
        stall: Duration,
    ) -> Self {
        job.speed.set_latency(Latency::first_limit(plan));
        let disks = plan.disks.iter().enumerate();
        let jobs = disks.map(|(index, disk)| (objects.names.block_job(index), disk.virtual_size));
        Self {
            job,
            plan,
            objects,
            tracker: Tracker::new(jobs),
            meter: Meter::new(),
            scan: Scan::new(plan),
            part,
            latency: Latency::of(plan, objects.histogram.clone()),
            shared: speed.map(|speed| (speed, plan.disks.len())),
            stall: Stall::new(stall, Instant::now()),
            silent: false,
            found: speed.is_some(),
        }
    }

    /// Follows the jobs until QEMU has concluded all of them. Reconnects when the connection is lost.
    pub async fn run(&mut self, mut events: Events, stop: &CancellationToken) -> Result<(), Stopped> {
        loop {
            let followed = stop.run_until_cancelled(self.follow(&mut events)).await;
            let lost = match followed.ok_or(Stopped::Detached)? {
                Err(Stopped::Failed(Error::Lost(lost @ qmp::Error::Closed(_)))) => lost,
                result => return result,
            };
            tracing::warn!(job = self.job.id, why = %lost, "the monitor was lost during a backup");
            match stop.run_until_cancelled(self.objects.reconnect()).await {
                None => return Err(Stopped::Detached),
                Some(false) => return Err(Stopped::Failed(Error::Lost(lost))),
                Some(true) => {}
            }
            events = self.objects.client().events();
            (self.shared, self.found) = (None, false);
            // Reconnecting is not progress, so that a connection that is lost repeatedly cannot prevent the timeout.
            self.check_stall()?;
        }
    }

    /// Fails unless QEMU has all the jobs, that is, unless the jobs were started in this QEMU. Updates their progress.
    async fn find(&mut self) -> Result<(), Stopped> {
        let infos = loop {
            match self.query().await? {
                Some(infos) => break infos,
                None => self.check_stall()?,
            }
        };
        let known = |job: &str| infos.iter().any(|info| info.id == job);
        if !self.tracker.jobs().iter().all(|tracked| known(&tracked.job)) {
            return Err(Stopped::Failed(Error::Forgotten));
        }
        let before = self.tracker.done();
        self.tracker.query(&infos);
        self.take_progress(before, &infos);
        self.found = true;
        Ok(())
    }

    /// Queries the jobs; `None` if QEMU does not answer in time.
    async fn query(&mut self) -> Result<Option<Vec<JobInfo>>, Stopped> {
        let infos = match self.objects.query_jobs_within(ANSWER).await {
            Err(qmp::Error::TimedOut { .. }) => None,
            infos => Some(infos?),
        };
        self.silent = infos.is_none();
        Ok(infos)
    }

    /// Resets the stall timeout if more bytes are done than `before`. A job that another client has paused need not
    /// make progress.
    fn take_progress(&mut self, before: u64, infos: &[JobInfo]) {
        let ours = |id: &str| self.tracker.jobs().iter().any(|job| job.job == id);
        let paused = infos
            .iter()
            .any(|info| info.status == JobStatus::Paused && ours(&info.id));
        if self.tracker.done() != before || paused {
            self.stall.moved(Instant::now());
        }
    }

    async fn follow(&mut self, events: &mut Events) -> Result<(), Stopped> {
        if !self.found {
            self.find().await?;
        }
        let mut speeds = self.job.speed.subscribe();
        let mut looks = self.job.looks.subscribe();
        self.begin_latency().await?;
        let mut cancelled = false;
        let mut asked = Instant::now();
        self.show();
        while !self.tracker.all_concluded() {
            speeds.mark_unchanged();
            if !self.job.cancel.is_cancelled() {
                let speed = self.part.claim();
                if self.share(speed).await? {
                    self.part.confirm(speed);
                }
            }
            let pace = match self.job.is_looked_at() {
                true => PROGRESS,
                false if self.scan.is_open() => PROGRESS,
                false => UNSEEN.min(self.stall.limit()),
            };
            let left = self.stall.left(Instant::now()).max(CHECK);
            tokio::select! {
                event = events.next() => match event {
                    Ok(event) => {
                        if JobEvent::of(&event).is_some_and(|event| self.tracker.event(&event)) {
                            self.stall.moved(Instant::now());
                            self.show();
                        }
                    }
                    // If the connection is closed, the query returns the reason.
                    Err(EventsError::Missed | EventsError::Closed) => self.ask(events).await?,
                },
                () = tokio::time::sleep_until((asked + pace).into()) => {
                    self.ask(events).await?;
                    asked = Instant::now();
                }
                // `check_stall` below checks the time.
                () = tokio::time::sleep(left) => {}
                () = due(self.latency.as_ref()) => self.sample(events).await?,
                () = self.job.cancel.cancelled(), if !cancelled => {
                    cancelled = true;
                    self.cancel().await?;
                }
                // The job owns the senders, so they exist as long as this runs.
                Ok(()) = speeds.changed() => {}
                Ok(()) = looks.changed() => {}
            }
            self.check_stall()?;
        }
        Ok(())
    }

    fn check_stall(&mut self) -> Result<(), Stopped> {
        let now = Instant::now();
        if self.job.cancel.is_cancelled() {
            self.stall.cancel(now);
        }
        let known = self.shared.filter(|_| !self.silent);
        let pace = known.map(|(speed, disks)| share(speed, disks));
        match self.stall.check(now, pace) {
            Some((what, patience)) => Err(Stopped::Failed(Error::stalled(what, patience))),
            None => Ok(()),
        }
    }

    /// Queries the jobs and updates the status. If QEMU does not answer, nothing changes.
    async fn ask(&mut self, events: &mut Events) -> Result<(), Stopped> {
        let Some((before, infos)) = self.ask_jobs(events).await? else {
            return Ok(());
        };
        self.look().await?;
        self.take_progress(before, &infos);
        let done = self.tracker.done();
        let rate = self.meter.measure(Instant::now(), done);
        let end = self
            .meter
            .expected_end(clock::now(), self.tracker.total().saturating_sub(done));
        self.job.update(|status| {
            status.rate = rate;
            status.expected_end = end;
        });
        self.job.asked.send_replace(Some(Instant::now()));
        self.show();
        Ok(())
    }

    /// Queries the jobs. Returns the bytes done before, and the answer; `None` if QEMU does not answer in time.
    async fn ask_jobs(&mut self, events: &mut Events) -> Result<Option<(u64, Vec<JobInfo>)>, Stopped> {
        let Some(infos) = self.query().await? else {
            return Ok(None);
        };
        // Events that arrived before the answer have more details than the answer.
        while let Some(event) = events.next_now() {
            if let Some(event) = JobEvent::of(&event) {
                self.tracker.event(&event);
            }
        }
        let before = self.tracker.done();
        self.tracker.query(&infos);
        Ok(Some((before, infos)))
    }

    /// Sets latency histograms in QEMU if the speed depends on the guest's writes.
    async fn begin_latency(&mut self) -> Result<(), Stopped> {
        let Some(latency) = &mut self.latency else {
            return Ok(());
        };
        match latency.begin(self.objects).await {
            Err(closed @ qmp::Error::Closed(_)) => Err(closed.into()),
            Err(error) => {
                tracing::warn!(
                    job = self.job.id,
                    %error,
                    "cannot set latency histograms; the speed follows the mean latency of the guest's writes"
                );
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Adjusts the speed to the latency of the guest's writes. Without an answer from QEMU, nothing changes.
    async fn sample(&mut self, events: &mut Events) -> Result<(), Stopped> {
        let devices = match self.objects.query_devices().await {
            Err(closed @ qmp::Error::Closed(_)) => return Err(closed.into()),
            devices => devices.ok(),
        };
        let mut answered = false;
        if devices.is_some()
            && let Some((before, infos)) = self.ask_jobs(events).await?
        {
            self.take_progress(before, &infos);
            answered = true;
        }
        let done = self.tracker.done();
        let (Some(latency), now) = (&mut self.latency, Instant::now()) else {
            return Ok(());
        };
        match devices.filter(|_| answered) {
            Some(devices) => self.job.speed.set_latency(latency.step(now, &devices, done)),
            None => latency.skip(now),
        }
        Ok(())
    }

    /// Checks for snapshots, within the stall timeout. QEMU's answer can be late because QEMU reads from every image
    /// for it.
    async fn look(&mut self) -> Result<(), Stopped> {
        let (totals, left) = (self.totals(), self.stall.left(Instant::now()));
        let look = self.scan.look(self.plan, self.objects, totals);
        let look = tokio::time::timeout(left.max(ANSWER), look);
        match self.job.cancel.run_until_cancelled(look).await {
            Some(Ok(looked)) => looked,
            Some(Err(_)) | None => Ok(()),
        }
    }

    pub fn show_running(&self) {
        self.job.update(|status| {
            (status.state, status.begun) = (State::Running, true);
            status
                .disks
                .iter_mut()
                .for_each(|disk| disk.state = DiskState::Running);
        });
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

    /// Cancels one block job, and QEMU cancels the others with it. A concluded job cannot be cancelled, so the next one
    /// is tried.
    async fn cancel(&self) -> Result<(), Stopped> {
        for tracked in self.tracker.jobs() {
            let cancel = BlockJobCancel {
                device: &tracked.job,
                force: true,
            };
            if self.send(cancel).await? != Reply::Ended {
                break;
            }
        }
        Ok(())
    }

    /// Divides the limit among the disks that still run, whenever one of the two changes. Returns whether QEMU has
    /// confirmed it.
    async fn share(&mut self, speed: u64) -> Result<bool, Stopped> {
        let running: Vec<_> = self
            .tracker
            .jobs()
            .iter()
            .filter(|job| job.phase == Phase::Running)
            .collect();
        let known = self.shared.replace((speed, running.len()));
        if known.map(|(speed, disks)| share(speed, disks)) == Some(share(speed, running.len())) {
            return Ok(true);
        }
        self.stall.sends(Instant::now());
        for tracked in &running {
            let limit = BlockJobSetSpeed {
                device: &tracked.job,
                speed: share(speed, running.len()),
            };
            if self.send(limit).await? == Reply::Silent {
                // The loop in `follow` repeats the command.
                self.shared = None;
                return Ok(false);
            }
        }
        self.stall.confirmed();
        Ok(true)
    }

    /// Sends a command for a job.
    async fn send(&self, command: impl Command<Reply = Done>) -> Result<Reply, Stopped> {
        let client = self.objects.client();
        match tokio::time::timeout(ANSWER, client.execute(command)).await {
            Err(_) => Ok(Reply::Silent),
            Ok(Err(error)) if error.is_refusal() => Ok(Reply::Ended),
            Ok(result) => Ok(result.map(|Done| Reply::Done)?),
        }
    }

    fn totals(&self) -> Vec<u64> {
        self.tracker.jobs().iter().map(|job| job.total).collect()
    }

    /// Returns whether QEMU is known to have omitted only data that the disks' own images do not have. The caller has
    /// seen all jobs complete.
    pub fn is_proven(&self) -> bool {
        self.scan.is_proven(&self.totals())
    }

    /// Combines the results of all jobs.
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
                    disk: self.plan.disks[index].name.clone(),
                    message: message.clone(),
                }));
            }
        }
        match first {
            Some(error) => Err(Stopped::Failed(error)),
            None if verdicts.contains(&Verdict::Unknown) && !self.job.cancel.is_cancelled() => {
                Err(Stopped::Failed(Error::Forgotten))
            }
            None if verdicts.iter().any(|verdict| *verdict != Verdict::Completed) => Err(Stopped::Cancelled),
            None => Ok(()),
        }
    }
}

/// Waits until the next query of the guest's write latency is due; for ever if the speed does not depend on it.
async fn due(latency: Option<&Latency>) {
    match latency {
        Some(latency) => tokio::time::sleep_until(latency.due().into()).await,
        None => std::future::pending().await,
    }
}
