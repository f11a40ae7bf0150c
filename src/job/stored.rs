//! Jobs on stored backups: restoring one, verifying some, and exporting one to the caller.
//!
//! They run in the service's own processes, so they end with the service. After a restart an unfinished one counts as
//! failed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::backup::{self, discard};
use super::error::Stopped;
use super::manager::{Ending, Held, JobContext, Jobs};
use super::progress::Meter;
use super::record::{self, Residue};
use super::{DiskState, DiskStatus, Error, Job, Outcome, State, blocking, outcome, show_ended};
use crate::activity::Use;
use crate::catalog::{BackupKey, JobRecord};
use crate::clock;
use crate::domain::{Domain, Identity};
use crate::image::{self, Chain, Control, Export, Fault, Output, Progress, Survey, Verified};
use crate::plan::{Plan, Stored, Task};
use crate::quota::Share;
use crate::targets::Targets;

/// How often the status is updated.
const PROGRESS: Duration = Duration::from_millis(500);
/// How often an export is checked within its idle timeout.
const CHECKS_OF_IDLE: u32 = 16;

/// A permit to work on stored backups. Dropping it returns it.
#[must_use]
pub struct Turn {
    /// The shares of the quotas of jobs and of the caller's descriptors.
    _shares: (Share, Arc<Share>),
    /// Keeps the service from exiting, from being replaced by another version, and from stopping.
    _uses: [Use; 2],
    _token: TaskTrackerToken,
}

impl Held for Turn {}

/// The work of a job on a stored backup.
pub enum Work {
    /// Restores each disk of the chain into the target at the same index.
    Restore(Box<(Chain, Targets)>),
    Verify(Survey),
    Export(Box<Served>),
}

/// A backup that is exported until the client that started it has `left` the bus.
pub struct Served {
    pub export: Export,
    pub left: BoxFuture<'static, ()>,
}

impl Jobs {
    /// Counts work on stored backups as a job of this user.
    pub fn turn(&self, uid: u32, descriptors: Arc<Share>) -> Result<Turn, Error> {
        // Taken before the check, so that a concurrent stop waits for this work.
        let token = self.tasks.token();
        if self.context.stop.is_cancelled() {
            return Err(Error::Stopping);
        }
        Ok(Turn {
            _shares: (self.quota.take(uid, 1)?, descriptors),
            _uses: [self.context.activity.begin(), self.context.at_stake.begin()],
            _token: token,
        })
    }

    /// Starts the job and returns at once.
    pub fn start_stored(
        self: &Arc<Self>,
        turn: Turn,
        domain: Arc<Domain>,
        (plan, record): (Plan, JobRecord),
        work: Work,
    ) -> Arc<Job> {
        let job = Arc::new(Job::new(
            &record,
            domain,
            plan,
            self.context.catalog.clone(),
            false,
        ));
        if let Work::Verify(survey) = &work {
            let rows = survey.backups().map(|(location, bytes)| DiskStatus {
                name: location.id.clone(),
                state: DiskState::Preparing,
                total: bytes,
                done: 0,
                target: location.to_string(),
            });
            job.update(|status| status.disks = rows.collect());
        }
        if let Work::Export(served) = &work {
            let rows = served.export.chain().disks().iter().map(|disk| DiskStatus {
                name: disk.disk.clone(),
                state: DiskState::Running,
                total: 0,
                done: 0,
                target: String::new(),
            });
            job.update(|status| status.disks = rows.collect());
        }
        self.insert(job.clone());
        let (jobs, running) = (self.clone(), job.clone());
        self.tasks.spawn(async move {
            let ending = jobs.run_stored(&running, work, turn).await;
            jobs.after(&running, ending).await;
        });
        job
    }

    async fn run_stored(&self, job: &Arc<Job>, work: Work, turn: Turn) -> Ending {
        let context = &self.context;
        job.update(|status| status.state = State::Running);
        let cancel = job.cancel.child_token();
        let work = async {
            match work {
                Work::Restore(restored) => {
                    let (chain, targets) = *restored;
                    restore(job, &chain, targets, &cancel, context).await
                }
                Work::Verify(survey) => (verify(job, survey, &cancel, context).await, false),
                Work::Export(served) => (serve(*served, &cancel, context).await, false),
            }
        };
        tokio::pin!(work);
        let (judged, on_disk) = tokio::select! {
            judged = &mut work => judged,
            () = context.stop.cancelled() => {
                cancel.cancel();
                // Work that hangs ends with the process.
                match tokio::time::timeout(context.deadlines.stall(), work).await {
                    Ok((Ok(()), on_disk)) => (Ok(()), on_disk),
                    Ok((Err(_), on_disk)) => (Err(Error::Stopping.into()), on_disk),
                    Err(_) => (Err(Error::Stopping.into()), true),
                }
            }
        };
        let judged = match judged {
            Ok(()) if !(job.begin_publishing() && job.published()) => Err(Stopped::Cancelled),
            judged => judged,
        };
        let outcome = outcome(job, judged);
        tracing::info!(job = job.id, domain = job.domain.name, mode = job.plan.mode(), outcome = ?outcome, "job ended");
        show_ended(job, &outcome);
        // A later instance could not find the targets, because their descriptors end with this process.
        if on_disk {
            tracing::warn!(
                job = job.id,
                "the target may still contain a part of the restored data"
            );
        }
        record_end(job, context, &outcome).await;
        drop(turn);
        job.update(|status| status.outcome = Some(outcome));
        Ending::Ended(Residue::default(), None)
    }

    /// Ends a job that ended with an earlier instance of the service.
    pub(super) async fn end_lost(&self, record: &JobRecord, identity: Identity) -> Result<Arc<Job>, Error> {
        let domain = self.context.domains.identified_or_absent(identity);
        let plan = record::plan(record)?;
        let job = Arc::new(Job::new(record, domain, plan, self.context.catalog.clone(), true));
        let lost = match record.cancel_requested {
            true => Stopped::Cancelled,
            false => Error::NotResumed.into(),
        };
        let outcome = outcome(&job, Err(lost));
        show_ended(&job, &outcome);
        record_end(&job, &self.context, &outcome).await;
        job.update(|status| status.outcome = Some(outcome));
        self.insert(job.clone());
        Ok(job)
    }
}

/// If this fails, a later instance records the same outcome, because the record shows the job as unfinished.
async fn record_end(job: &Job, context: &JobContext, outcome: &Outcome) {
    let recorded = async {
        let ended = backup::State::Ended(backup::Ended::default());
        let ended = job.end_record(outcome, &ended, context.boot)?;
        Ok::<_, Error>(context.catalog.end(job.id, ended, None, context.history).await?)
    };
    if let Err(error) = recorded.await {
        tracing::error!(job = job.id, %error, "cannot record the outcome of a job");
    }
}

/// Restores all disks. Returns whether a partial target may remain.
async fn restore(
    job: &Arc<Job>,
    chain: &Chain,
    targets: Targets,
    cancel: &CancellationToken,
    context: &JobContext,
) -> (Result<(), Stopped>, bool) {
    let restored = restore_all(job, chain, &targets, cancel, context.deadlines.stall()).await;
    if restored.is_ok() {
        blocking(context, move || drop(targets.leave())).await;
        return (restored, false);
    }
    let left = discard(context, Some(targets), context.deadlines.stall()).await;
    (restored, left)
}

async fn restore_all(
    job: &Job,
    chain: &Chain,
    targets: &Targets,
    cancel: &CancellationToken,
    stall: Duration,
) -> Result<(), Stopped> {
    let mut meter = Meter::new();
    // The storage daemon opens the targets again, and locks them itself.
    targets.unlock();
    for (index, (target, planned)) in targets.iter().zip(&job.plan.disks).enumerate() {
        let disk = chain.disks().iter().find(|disk| disk.disk == planned.name);
        let disk = disk.ok_or_else(|| Error::NoSuchDisk {
            id: job.id,
            disk: planned.name.clone(),
        })?;
        let descriptor = target.descriptor().map_err(|error| Error::Descriptor {
            disk: planned.name.clone(),
            why: error.to_string(),
        })?;
        let progress = Progress::default();
        let control = Control {
            progress: &progress,
            cancel,
            stall,
        };
        let output = Output {
            file: descriptor,
            format: planned.format,
            kept: false,
            written: target.written(),
        };
        let work = async { image::restore(&disk.open().await?, output, control).await };
        let show = |job: &Job| {
            let (done, total) = progress.get();
            job.update(|status| {
                let disk = &mut status.disks[index];
                disk.state = DiskState::Running;
                if total > 0 {
                    (disk.total, disk.done) = (total, done);
                }
            });
        };
        follow(job, &mut meter, show, work).await.map_err(stopped)?;
        job.update(|status| {
            let disk = &mut status.disks[index];
            (disk.state, disk.done) = (DiskState::Waiting, disk.total);
        });
    }
    Ok(())
}

/// Serves the export until the caller has left the bus, the job is cancelled, or the idle timeout has passed.
async fn serve(served: Served, cancel: &CancellationToken, context: &JobContext) -> Result<(), Stopped> {
    let Served { mut export, left } = served;
    let patience = context.deadlines.export_idle();
    let mut last_read = LastRead::new(export.bytes_read());
    let mut pace = tokio::time::interval(patience / CHECKS_OF_IDLE);
    tokio::pin!(left);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return Err(Stopped::Cancelled),
            () = &mut left => return Ok(()),
            error = export.ended() => return Err(stopped(error)),
            _ = pace.tick() => {
                if last_read.is_idle(export.bytes_read(), patience) {
                    let seconds = patience.as_secs();
                    return Err(Error::ExportIdle { seconds }.into());
                }
            }
        }
    }
}

/// The number of bytes read from an export, and when it last changed.
struct LastRead {
    read: Option<u64>,
    at: Instant,
}

impl LastRead {
    fn new(read: Option<u64>) -> Self {
        let at = Instant::now();
        Self { read, at }
    }

    /// Returns whether the idle timeout has passed since the last read. If reads are not counted, the export ends after
    /// that time, because it keeps a backup from being removed.
    fn is_idle(&mut self, read: Option<u64>, patience: Duration) -> bool {
        if read.is_some() && read != self.read {
            *self = Self::new(read);
        }
        self.at.elapsed() >= patience
    }
}

/// Verifies backups and records the results in the catalog.
async fn verify(
    job: &Job,
    survey: Survey,
    cancel: &CancellationToken,
    context: &JobContext,
) -> Result<(), Stopped> {
    let Task::Verify(Stored { store, .. }) = &job.plan.task else {
        return Err(Error::Interrupted.into());
    };
    let progress = Progress::default();
    let (sender, mut results) = tokio::sync::mpsc::unbounded_channel();
    let control = Control {
        progress: &progress,
        cancel,
        stall: context.deadlines.stall(),
    };
    let work = survey.verify(control, move |one: &Verified| {
        // The receiver below exists as long as this runs.
        let _ = sender.send(one.clone());
    });
    // The backups are read one after the other.
    let show = |job: &Job| {
        let (mut done, _) = progress.get();
        job.update(|status| {
            for row in &mut status.disks {
                let part = done.min(row.total);
                done -= part;
                row.done = part;
                if row.state == DiskState::Preparing && part > 0 {
                    row.state = DiskState::Running;
                }
            }
        });
    };
    let remember = async {
        while let Some(verified) = results.recv().await {
            remember_verified(job, store, &verified, context).await?;
        }
        Ok::<_, Error>(())
    };
    let mut meter = Meter::new();
    let (verified, remembered) = tokio::join!(follow(job, &mut meter, show, work), remember);
    let verified = verified.map_err(stopped)?;
    remembered?;
    let findings = verified.iter().flat_map(|one| &one.findings);
    let mut findings: Vec<_> = findings
        .filter(|finding| !matches!(finding.fault, Fault::LiesOnDamaged { .. }))
        .collect();
    // Damage is reported first, and decides the error of the job.
    findings.sort_by_key(|finding| !finding.fault.is_damage());
    match findings.split_first() {
        None => Ok(()),
        Some((first, others)) => Err(Error::Found {
            first: Box::new((*first).clone()),
            others: others.len(),
        }
        .into()),
    }
}

async fn remember_verified(
    job: &Job,
    store: &str,
    verified: &Verified,
    context: &JobContext,
) -> Result<(), Error> {
    let (location, findings) = (&verified.location, &verified.findings);
    let words = findings.iter().map(|finding| match &finding.disk {
        Some(disk) => format!("disk '{disk}': {}", finding.fault),
        None => finding.fault.to_string(),
    });
    let words = words.collect::<Vec<_>>().join("; ");
    job.update(|status| {
        let row = status.disks.iter_mut().find(|row| row.name == location.id);
        if let Some(row) = row {
            row.done = row.total;
            row.state = match (verified.is_good(), verified.is_damaged()) {
                (true, _) => DiskState::Completed,
                (_, true) => DiskState::Failed {
                    operation: "verify".to_owned(),
                    message: words,
                },
                // The result is neither good nor damaged.
                _ => DiskState::Cancelled,
            };
        }
    });
    // The catalog itself detects missing backups and damaged bases.
    let own = findings.iter().map(|finding| &finding.fault);
    let own: Vec<&Fault> = own
        .filter(|fault| !matches!(fault, Fault::LiesOnDamaged { .. }))
        .collect();
    let damage: Vec<String> = own
        .iter()
        .filter(|fault| fault.is_damage() && ***fault != Fault::Missing)
        .map(|fault| fault.to_string())
        .collect();
    if damage.is_empty() && !own.is_empty() {
        // The check found neither damage nor a good backup, so the backup stays due for verification.
        return Ok(());
    }
    let key = BackupKey {
        store: store.to_owned(),
        domain: location.domain.clone(),
        id: location.id.clone(),
    };
    let damage = (!damage.is_empty()).then(|| damage.join("; "));
    Ok(context.catalog.checked(key, damage).await?)
}

/// Updates the job's status until `work` has ended.
async fn follow<T>(job: &Job, meter: &mut Meter, show: impl Fn(&Job), work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    let mut pace = tokio::time::interval(PROGRESS);
    loop {
        tokio::select! {
            result = &mut work => {
                show(job);
                return result;
            }
            _ = pace.tick() => {
                show(job);
                let status = job.status();
                let rate = meter.measure(Instant::now(), status.bytes_done());
                let left = status.bytes().saturating_sub(status.bytes_done());
                let end = meter.expected_end(clock::now(), left);
                job.update(|status| (status.rate, status.expected_end) = (rate, end));
                job.asked.send_replace(Some(Instant::now()));
            }
        }
    }
}

fn stopped(error: image::Error) -> Stopped {
    match error {
        image::Error::Cancelled => Stopped::Cancelled,
        error => Stopped::Failed(Error::Image(Box::new(error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_becomes_idle_even_if_reads_are_not_counted() {
        let patience = Duration::from_secs(60);
        let mut last_read = LastRead::new(Some(7));
        let before = |last_read: &mut LastRead| last_read.at = Instant::now().checked_sub(patience).unwrap();
        before(&mut last_read);
        assert!(!last_read.is_idle(Some(8), patience), "it was read from");
        assert!(!last_read.is_idle(Some(8), patience));
        before(&mut last_read);
        assert!(last_read.is_idle(None, patience));
    }
}
