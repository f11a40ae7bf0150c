//! Jobs on stored backups: their start, their end, and their end after a restart of the service.
//!
//! They run in the service's own processes, so they end with the service. After a restart an unfinished one counts as
//! failed.

use std::sync::Arc;

use tokio_util::task::task_tracker::TaskTrackerToken;

use super::backup::{Ended, State as Step};
use super::context::JobContext;
use super::ending::{Ending, Residue};
use super::error::Stopped;
use super::outcome::{outcome, show_ended};
use super::table::Held;
use super::{Error, Job, Jobs, Outcome, Served, State, export, restore, verify};
use crate::activity::Use;
use crate::catalog::JobRecord;
use crate::domain::{Domain, Identity};
use crate::image::{Chain, Survey};
use crate::plan::JobSpec;
use crate::quota::Share;
use crate::targets::Targets;

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
        (spec, record): (JobSpec, JobRecord),
        work: Work,
    ) -> Arc<Job> {
        let job = Arc::new(Job::new(
            &record,
            domain,
            spec,
            self.context.catalog.clone(),
            false,
        ));
        match &work {
            Work::Restore(_) => {}
            Work::Verify(survey) => job.update(|status| status.disks = verify::rows(survey)),
            Work::Export(served) => job.update(|status| status.disks = export::rows(served)),
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
                    restore::restore(job, &chain, targets, &cancel, context).await
                }
                Work::Verify(survey) => (verify::verify(job, survey, &cancel, context).await, false),
                Work::Export(served) => (export::serve(*served, &cancel, context).await, false),
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
        tracing::info!(job = job.id, domain = job.domain.name, mode = job.spec.mode(), outcome = ?outcome, "job ended");
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
    pub(super) async fn end_lost(
        &self,
        record: &JobRecord,
        spec: JobSpec,
        identity: Identity,
    ) -> Result<Arc<Job>, Error> {
        let domain = self.context.domains.identified_or_absent(identity);
        let job = Arc::new(Job::of_record(
            record,
            domain,
            spec,
            self.context.catalog.clone(),
            true,
        ));
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
        let ended = Step::Ended(Ended::default());
        let ended = job.end_record(outcome, &ended, context.boot)?;
        Ok::<_, Error>(context.catalog.end(job.id, ended, None, context.history).await?)
    };
    if let Err(error) = recorded.await {
        tracing::error!(job = job.id, %error, "cannot record the outcome of a job");
    }
}
