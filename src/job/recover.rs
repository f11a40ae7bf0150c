//! Recovers the jobs of an earlier instance of the service, each by its kind.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::backup::{self, Requeued, journal};
use super::bandwidth::Part;
use super::ending::{Residue, Uncleaned};
use super::table::{KEEP, KEEP_AT_MOST};
use super::{Error, Job, Jobs, record};
use crate::catalog::{JobRecord, QUEUED};
use crate::clock;
use crate::plan::JobSpec;

/// The unfinished jobs of an earlier instance of the service.
#[derive(Default)]
pub struct Recovered {
    pub jobs: Vec<Arc<Job>>,
    /// The jobs among them that wait for a place.
    pub queued: Vec<Requeued>,
}

impl Jobs {
    /// Thaws guests that an earlier instance of the service may have left frozen, and does not wait for it. The caller
    /// calls this before anything else.
    pub async fn thaw(self: &Arc<Self>) -> Result<(), Error> {
        for record in self.context.catalog.unsettled().await?.into_iter().flatten() {
            let jobs = self.clone();
            self.tasks
                .spawn(async move { backup::thaw(record, &jobs.context).await });
        }
        Ok(())
    }

    /// Recovers the jobs of an earlier instance, and returns those that had not ended. If a record cannot be read, the
    /// service logs an error and leaves the record for another version of the service.
    pub async fn recover(self: &Arc<Self>) -> Result<Recovered, Error> {
        let keep = SignedDuration::try_from(KEEP).unwrap_or(SignedDuration::ZERO);
        let since = clock::now().checked_sub(keep).unwrap_or(Timestamp::MIN);
        for record in self.context.catalog.ended_since(since, KEEP_AT_MOST).await? {
            match self.ended(&record) {
                Ok(job) => {
                    self.lock().jobs.insert(job.id, Arc::new(job));
                    self.forget_later(record.id);
                }
                Err(error) => tracing::error!(%error, "cannot read a job's record; the list omits the job"),
            }
        }
        let mut resumed = Recovered::default();
        for record in self.context.catalog.unsettled().await? {
            let recovered = match record {
                Ok(record) => self.recover_one(record, &mut resumed).await,
                Err(error) => Err(error.into()),
            };
            match recovered {
                Ok(()) => {}
                Err(error) => tracing::error!(%error, "cannot recover a job"),
            }
        }
        Ok(resumed)
    }

    async fn recover_one(
        self: &Arc<Self>,
        record: JobRecord,
        recovered: &mut Recovered,
    ) -> Result<(), Error> {
        if record.has_ended() {
            let recorded = journal::read_state(&record);
            let could_copy = recorded
                .as_ref()
                .is_ok_and(|(boot, state)| *boot == self.context.boot && state.may_copy());
            let of_state = recorded.map(|(_, state)| state.residue());
            let residue = Residue {
                in_qemu: record.left_in_qemu,
                on_disk: record.left_on_disk,
                ..of_state.unwrap_or_default()
            };
            let job = Arc::new(self.ended(&record)?);
            // QEMU may still copy with the speed that it had.
            let may_copy = residue.in_qemu && could_copy && job.plan().is_some();
            let part = may_copy.then(|| self.context.bandwidth.resume(&job));
            let part = part.and_then(Part::end).map(|part| self.give_back_later(part));
            self.clean_up(Uncleaned {
                job,
                residue,
                _part: part,
            });
            return Ok(());
        }
        if record.step == QUEUED {
            let (job, requeued) = self.recover_queued(&record)?;
            recovered.jobs.push(job);
            recovered.queued.extend(requeued);
            return Ok(());
        }
        let job = match record::spec(&record)? {
            JobSpec::Backup(plan) => self.resume(record, plan)?,
            spec @ (JobSpec::Restore(_) | JobSpec::Verify(_) | JobSpec::Export(_)) => {
                let identity = record::identity(record.id, &record.domain)?;
                let job = self.end_lost(&record, spec, identity).await?;
                self.forget_later(job.id);
                job
            }
        };
        recovered.jobs.push(job);
        Ok(())
    }

    fn ended(&self, record: &JobRecord) -> Result<Job, Error> {
        let identity = record::identity(record.id, &record.domain)?;
        let domain = self.context.domains.identified_or_absent(identity);
        Job::ended(record, domain, self.context.catalog.clone())
    }
}
