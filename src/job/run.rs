//! One backup from its targets to its outcome.
//!
//! The order of the end is fixed: QEMU's verdict, QEMU lets go, the data is durable, it gets its name, the outcome is
//! told. Nothing is told earlier.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::MissedTickBehavior;

use super::footprint::{Footprint, Names};
use super::progress::{Meter, share};
use super::quiesce::{self, Frozen};
use super::track::{Phase, Tracker, Verdict};
use super::{DiskState, Error, Job, Outcome, Reservation, State};
use crate::catalog;
use crate::domain::Link;
use crate::error;
use crate::plan::{DiskPlan, Place};
use crate::qmp::{Events, EventsError};
use crate::target::{Media, Target, Targets};

/// How often the progress is asked for while the job runs.
const PROGRESS: Duration = Duration::from_millis(500);

/// What was copied, and of when.
struct Copied {
    instant: Timestamp,
    quiesced: bool,
}

/// Why nothing was.
enum Stopped {
    Failed(Error),
    Cancelled,
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Runs `job` to its end. Every place in `targets` is published or gone when this returns.
pub(super) async fn run(job: &Arc<Job>, link: Arc<Link>, targets: Targets, reservation: Reservation) {
    let names = Names::new(tag(&job.backup_id));
    let mut footprint = Footprint::new(job.domain.clone(), link, names);
    let (targets, begun) = begin(job, targets).await;
    let copied = match begun {
        Ok(()) => copy(job, &footprint, &targets).await,
        Err(stopped) => Err(stopped),
    };
    job.update(|status| {
        status.state = State::Finishing;
        status.rate = 0;
        status.expected_end = None;
        for disk in &mut status.disks {
            if matches!(
                disk.state,
                DiskState::Preparing | DiskState::Running | DiskState::Waiting
            ) {
                disk.state = DiskState::Finishing;
            }
        }
    });
    let released = footprint.release().await;
    let ended = match (copied, released) {
        (Ok(copied), Ok(())) => finish(job, targets, copied).await,
        (Ok(_), Err(error)) => discard(targets, Stopped::Failed(error)).await,
        (Err(stopped), released) => {
            if let Err(error) = released {
                tracing::error!(job = job.id, %error, "something of the backup may be left in QEMU");
            }
            discard(targets, stopped).await
        }
    };
    let outcome = match ended {
        Ok(()) => Outcome::Completed,
        Err(Stopped::Cancelled) => Outcome::Cancelled,
        Err(Stopped::Failed(error)) => {
            blame(job, &error);
            Outcome::Failed(error::Error::from(error))
        }
    };
    tracing::info!(job = job.id, domain = job.domain.name, outcome = ?outcome, "backup ended");
    // Before anybody hears of the end: who waits for it may start the next one at once.
    drop(reservation);
    job.update(|status| {
        for disk in &mut status.disks {
            match (&outcome, &disk.state) {
                (Outcome::Completed, _) => disk.state = DiskState::Completed,
                (_, DiskState::Failed { .. }) => {}
                _ => disk.state = DiskState::Cancelled,
            }
        }
        status.outcome = Some(outcome);
    });
}

/// The part of a backup's id that is unique by itself.
fn tag(backup_id: &str) -> &str {
    backup_id.rsplit('-').next().unwrap_or(backup_id)
}

/// Marks the disk that an error is about, unless QEMU's verdict did so before.
fn blame(job: &Job, error: &Error) {
    let Some((name, operation)) = error.disk() else {
        return;
    };
    job.update(|status| {
        let guilty = status.disks.iter_mut().find(|disk| disk.name == name);
        if let Some(disk) = guilty.filter(|disk| !matches!(disk.state, DiskState::Failed { .. })) {
            disk.state = DiskState::Failed {
                operation: operation.into(),
                message: error.to_string(),
            };
        }
    });
}

/// Empties existing targets, when all that can be known before says that the backup will be made.
async fn begin(job: &Arc<Job>, mut targets: Targets) -> (Targets, Result<(), Stopped>) {
    if let Err(error) = quiesce::check(&job.domain, job.plan.quiesce).await {
        return (targets, Err(error.into()));
    }
    let job = job.clone();
    blocking(move || {
        let begun = targets.begin(&job.plan).map_err(Error::Target);
        (targets, begun.map_err(Stopped::Failed))
    })
    .await
}

/// Prepares QEMU, starts the transaction and waits for its end.
async fn copy(job: &Job, footprint: &Footprint, targets: &Targets) -> Result<Copied, Stopped> {
    let prepare = async {
        for (index, (target, disk)) in targets.iter().zip(&job.plan.disks).enumerate() {
            footprint.open_target(index, target, disk).await?;
        }
        Ok::<_, Error>(())
    };
    // What was half made is removed by its name.
    match job.cancel.run_until_cancelled(prepare).await {
        Some(prepared) => prepared?,
        None => return Err(Stopped::Cancelled),
    }
    let speed = *job.speed.borrow();
    let running = job.plan.disks.len();
    let actions = targets.iter().zip(&job.plan.disks).enumerate();
    let actions = actions
        .map(|(index, (target, disk))| action(&footprint.names, index, target, disk, share(speed, running)));
    let transaction = json!({
        "actions": actions.collect::<Vec<_>>(),
        "properties": { "completion-mode": "grouped" },
    });
    if job.cancel.is_cancelled() {
        return Err(Stopped::Cancelled);
    }
    // From before the transaction: its jobs can end before its reply is read.
    let events = footprint.client().events();
    let frozen = Frozen::freeze(&job.domain, job.plan.quiesce).await?;
    targets.iter().for_each(Target::mark_written);
    let started = footprint.client().execute("transaction", transaction).await;
    let instant = Timestamp::now();
    let thawed = frozen.thaw(&job.domain, job.plan.quiesce).await;
    started.map_err(Error::Transaction)?;
    let quiesced = thawed?;
    check_sources(job, footprint).await?;
    job.update(|status| {
        status.state = State::Running;
        status
            .disks
            .iter_mut()
            .for_each(|disk| disk.state = DiskState::Running);
    });
    tracing::info!(job = job.id, domain = job.domain.name, "backup started");
    let mut watch = Watch::new(job, footprint, speed);
    watch.run(events).await.map_err(Error::Lost)?;
    watch.judge()?;
    Ok(Copied { instant, quiesced })
}

/// Whether what is being copied is what the guest writes to: a snapshot that another client made while the targets were
/// prepared has put a new image above it.
async fn check_sources(job: &Job, footprint: &Footprint) -> Result<(), Error> {
    let now = footprint.inspect().await.map_err(Error::Lost)?;
    for (index, planned) in job.plan.disks.iter().enumerate() {
        let disk = now.disks.iter().find(|disk| disk.name == planned.name);
        let own = |node: &str| node == planned.node || node == footprint.names.filter_node(index);
        if !disk.is_some_and(|disk| own(&disk.node)) {
            return Err(Error::Changed {
                disk: planned.name.clone(),
            });
        }
    }
    Ok(())
}

fn action(names: &Names, index: usize, target: &Target, disk: &DiskPlan, speed: u64) -> Value {
    let top = disk.only_allocated && target.media == Media::Regular;
    let mut data = json!({
        "job-id": names.block_job(index),
        "device": disk.node,
        "target": names.target_node(index),
        "filter-node-name": names.filter_node(index),
        "sync": if top { "top" } else { "full" },
        "speed": speed,
        "auto-dismiss": false,
        // Anything else than an error would stop the job, or let the guest's writes fail, or retry for ever.
        "on-source-error": "report",
        "on-target-error": "report",
    });
    if disk.compress.is_some() {
        data["compress"] = json!(true);
    }
    json!({ "type": "blockdev-backup", "data": data })
}

/// The running jobs, and what is to be done while they run.
struct Watch<'a> {
    job: &'a Job,
    footprint: &'a Footprint,
    tracker: Tracker,
    meter: Meter,
    /// Limit and number of running disks that QEMU knows.
    shared: (u64, usize),
}

impl<'a> Watch<'a> {
    fn new(job: &'a Job, footprint: &'a Footprint, speed: u64) -> Self {
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
    async fn run(&mut self, mut events: Events) -> crate::qmp::Result<()> {
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

    async fn ask(&mut self, events: &mut Events) -> crate::qmp::Result<()> {
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
    async fn cancel(&self) -> crate::qmp::Result<()> {
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
    async fn share(&mut self, speed: u64) -> crate::qmp::Result<()> {
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
    fn judge(&self) -> Result<(), Stopped> {
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

/// Makes the data durable and gives it its name, unless the backup was cancelled up to that point.
async fn finish(job: &Arc<Job>, targets: Targets, copied: Copied) -> Result<(), Stopped> {
    let job = job.clone();
    blocking(move || {
        let synced = targets.sync();
        if !job.begin_publishing() {
            return Err(Stopped::Cancelled);
        }
        synced.map_err(Error::Target)?;
        let manifest = if targets.in_store() {
            manifest(&job, &copied)?
        } else {
            Vec::new()
        };
        let document = job.definition();
        let records = [
            (catalog::MANIFEST_NAME, manifest.as_slice()),
            (catalog::DEFINITION_NAME, document.as_bytes()),
        ];
        targets.publish(&records).map_err(Error::Target)?;
        Ok(())
    })
    .await
}

async fn discard(targets: Targets, stopped: Stopped) -> Result<(), Stopped> {
    blocking(move || targets.discard()).await;
    Err(stopped)
}

/// Runs what waits for a disk where it keeps nobody else waiting.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // Nobody cancels it, and the runtime outlives every job: it panicked.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

fn manifest(job: &Job, copied: &Copied) -> Result<Vec<u8>, Error> {
    let domain = catalog::Domain {
        name: &job.domain.name,
        uuid: job.domain.snapshot().uuid,
    };
    let (started, instant) = (job.start_time.to_string(), copied.instant.to_string());
    let mut manifest = catalog::Manifest::full(&job.backup_id, domain, started, instant);
    manifest.name = job.plan.name.as_deref();
    manifest.description = job.plan.description.as_deref();
    manifest.quiesced = copied.quiesced;
    let in_store = job.plan.disks.iter().filter_map(|disk| match &disk.place {
        Place::InStore { file_name } => Some((disk, file_name)),
        Place::File(_) | Place::Block(_) | Place::Descriptor(_) => None,
    });
    manifest.disks = in_store
        .map(|(disk, file)| catalog::Disk {
            name: &disk.name,
            file,
            format: disk.format.as_str(),
            virtual_size: disk.virtual_size,
        })
        .collect();
    manifest
        .to_json()
        .map_err(|error| Error::Record(error.to_string()))
}
