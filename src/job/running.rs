//! The running block jobs of a backup: their events, and commands to them.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::bandwidth::Part;
use super::error::Stopped;
use super::footprint::Footprint;
use super::latency::Latency;
use super::progress::{Meter, share};
use super::scan::Scan;
use super::stall::Stall;
use super::track::{Phase, Tracker, Verdict};
use super::{DiskState, Error, Job, State};
use crate::clock;
use crate::qmp::block::{BlockJobCancel, BlockJobSetSpeed, JobEvent, JobInfo, JobStatus};
use crate::qmp::{self, Command, Done, Events, EventsError};

/// How often the progress is asked for while somebody looks, and while nobody does.
const PROGRESS: Duration = Duration::from_millis(500);
const UNSEEN: Duration = Duration::from_secs(10);
/// How long QEMU may take to answer until it counts as silent; what it was told is not lost.
const ANSWER: Duration = Duration::from_secs(5);
/// How often it is checked at most whether the time without progress is over.
const CHECK: Duration = Duration::from_secs(1);

/// How QEMU answered a command for a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reply {
    Done,
    /// The job ended just now.
    Ended,
    /// QEMU does not answer. It will do it later.
    Silent,
}

/// The running jobs, and what is to be done while they run.
pub struct Running<'a> {
    job: &'a Job,
    footprint: &'a Footprint,
    tracker: Tracker,
    meter: Meter,
    scan: Scan,
    part: &'a Part,
    latency: Option<Latency>,
    /// Limit and number of running disks that QEMU knows; nothing if that is not known.
    shared: Option<(u64, usize)>,
    stall: Stall,
    /// Whether QEMU left the last question about the jobs unanswered.
    silent: bool,
    /// Whether it is certain that this QEMU has the jobs.
    found: bool,
}

impl<'a> Running<'a> {
    /// Jobs that were just started with this limit, in bytes a second, all disks together; or, without one, that QEMU may
    /// have from before. Nothing may move for `stall` at most.
    pub fn new(
        job: &'a Job,
        footprint: &'a Footprint,
        (speed, part): (Option<u64>, &'a Part),
        stall: Duration,
    ) -> Self {
        job.speed.set_latency(Latency::first_limit(&job.plan));
        let disks = job.plan.disks.iter().enumerate();
        let jobs = disks.map(|(index, disk)| (footprint.names.block_job(index), disk.virtual_size));
        Self {
            job,
            footprint,
            tracker: Tracker::new(jobs),
            meter: Meter::new(),
            scan: Scan::new(job),
            part,
            latency: Latency::of(&job.plan, footprint.histogram.clone()),
            shared: speed.map(|speed| (speed, job.plan.disks.len())),
            stall: Stall::new(stall, Instant::now()),
            silent: false,
            found: speed.is_some(),
        }
    }

    /// Follows the jobs until QEMU has concluded all of them, over every connection that it takes.
    pub async fn run(&mut self, mut events: Events, stop: &CancellationToken) -> Result<(), Stopped> {
        loop {
            let followed = stop.run_until_cancelled(self.follow(&mut events)).await;
            let lost = match followed.ok_or(Stopped::Detached)? {
                Err(Stopped::Failed(Error::Lost(lost @ qmp::Error::Closed(_)))) => lost,
                result => return result,
            };
            tracing::warn!(job = self.job.id, why = %lost, "the monitor was lost during a backup");
            match stop.run_until_cancelled(self.footprint.reconnect()).await {
                None => return Err(Stopped::Detached),
                Some(false) => return Err(Stopped::Failed(Error::Lost(lost))),
                Some(true) => {}
            }
            events = self.footprint.client().events();
            (self.shared, self.found) = (None, false);
            // A connection that is lost again and again is no progress.
            self.check_stall()?;
        }
    }

    /// Whether QEMU has all the jobs: it is the one that they were started in. Takes in how they stand.
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

    /// How the jobs stand; nothing if QEMU does not answer.
    async fn query(&mut self) -> Result<Option<Vec<JobInfo>>, Stopped> {
        let infos = match self.footprint.query_jobs_within(ANSWER).await {
            Err(qmp::Error::TimedOut { .. }) => None,
            infos => Some(infos?),
        };
        self.silent = infos.is_none();
        Ok(infos)
    }

    /// Whether there was progress since so many bytes were done. A job that another client has paused need not make any.
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
                    // Of a closed connection this says why it was closed.
                    Err(EventsError::Missed | EventsError::Closed) => self.ask(events).await?,
                },
                () = tokio::time::sleep_until((asked + pace).into()) => {
                    self.ask(events).await?;
                    asked = Instant::now();
                }
                // The time is checked below.
                () = tokio::time::sleep(left) => {}
                () = due(self.latency.as_ref()) => self.sample(events).await?,
                () = self.job.cancel.cancelled(), if !cancelled => {
                    cancelled = true;
                    self.cancel().await?;
                }
                // The senders are the job's own.
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

    /// Asks how the jobs stand. That QEMU does not answer is nothing new.
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

    /// Takes in how the jobs stand. Returns that, and the bytes that were done before; nothing if QEMU does not answer.
    async fn ask_jobs(&mut self, events: &mut Events) -> Result<Option<(u64, Vec<JobInfo>)>, Stopped> {
        let Some(infos) = self.query().await? else {
            return Ok(None);
        };
        // What QEMU said before it answered says more than the answer.
        while let Some(event) = events.next_now() {
            if let Some(event) = JobEvent::of(&event) {
                self.tracker.event(&event);
            }
        }
        let before = self.tracker.done();
        self.tracker.query(&infos);
        Ok(Some((before, infos)))
    }

    /// Has QEMU count the guest's writes, if the speed depends on them.
    async fn begin_latency(&mut self) -> Result<(), Stopped> {
        let Some(latency) = &mut self.latency else {
            return Ok(());
        };
        match latency.begin(self.footprint).await {
            Err(closed @ qmp::Error::Closed(_)) => Err(closed.into()),
            Err(error) => {
                tracing::warn!(job = self.job.id, %error, "the speed follows the mean of the guest's writes only");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Sets the speed by how long the guest's writes take. What QEMU does not say changes nothing.
    async fn sample(&mut self, events: &mut Events) -> Result<(), Stopped> {
        let devices = match self.footprint.query_devices().await {
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

    /// Looks what QEMU copies, as long as it may be silent: to answer that, it reads from every image.
    async fn look(&mut self) -> Result<(), Stopped> {
        let (totals, left) = (self.totals(), self.stall.left(Instant::now()));
        let look = self.scan.look(self.job, self.footprint, totals);
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

    /// Cancels one block job, and QEMU the others with it. One that has concluded already cannot be cancelled: the
    /// next one is tried.
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

    /// Divides the limit among the disks that still run, whenever one of the two changes. Whether QEMU knows it.
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
                // The next turn of the loop repeats the command.
                self.shared = None;
                return Ok(false);
            }
        }
        self.stall.confirmed();
        Ok(true)
    }

    /// Sends a command for a job.
    async fn send(&self, command: impl Command<Reply = Done>) -> Result<Reply, Stopped> {
        let client = self.footprint.client();
        match tokio::time::timeout(ANSWER, client.execute(command)).await {
            Err(_) => Ok(Reply::Silent),
            Ok(Err(error)) if error.is_refusal() => Ok(Reply::Ended),
            Ok(result) => Ok(result.map(|Done| Reply::Done)?),
        }
    }

    fn totals(&self) -> Vec<u64> {
        self.tracker.jobs().iter().map(|job| job.total).collect()
    }

    /// Whether it is known that QEMU left out nothing but what the disks' own images do not have. The jobs have completed.
    pub fn is_proven(&self) -> bool {
        self.scan.is_proven(&self.totals())
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
            None if verdicts.contains(&Verdict::Unknown) && !self.job.cancel.is_cancelled() => {
                Err(Stopped::Failed(Error::Forgotten))
            }
            None if verdicts.iter().any(|verdict| *verdict != Verdict::Completed) => Err(Stopped::Cancelled),
            None => Ok(()),
        }
    }
}

/// Waits until QEMU is to be asked how long the guest's writes take; for ever if the speed does not depend on them.
async fn due(latency: Option<&Latency>) {
    match latency {
        Some(latency) => tokio::time::sleep_until(latency.due().into()).await,
        None => std::future::pending().await,
    }
}
