//! A backup that waits for a place: its record, its start when it leaves the queue, and its recovery after a restart.
//!
//! A queued backup consists only of its record. The record contains the caller's request and its authorisation, and
//! never changes. The service reads everything else when the backup leaves the queue.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::driver::Driver;
use super::journal::QueuedRequest;
use super::state::{Evidence, Fact, Reached, State as Step};
use super::{journal, resume};
use crate::catalog::{JobRecord, NewJob, Starter};
use crate::domain::{Domain, Link};
use crate::error;
use crate::fault;
use crate::job::ending::Ending;
use crate::job::error::Stopped;
use crate::job::table::{Claim, InLine};
use crate::job::{Error, Job, Jobs, Reservation, record};
use crate::plan::{JobSpec, Plan};
use crate::quota::Share;
use crate::targets::{Bases, Targets};

/// A queued job of an earlier instance of the service.
pub struct Requeued {
    pub job: Arc<Job>,
    /// Provisional until the job leaves the queue.
    plan: Arc<Plan>,
    line: InLine,
    /// The quota that its record takes. `None` if the record exceeds limits that were lowered since.
    room: Option<Share>,
    /// An earlier instance queued it.
    from_record: bool,
}

/// The plan of a backup that leaves the queue.
pub struct Planned {
    pub domain: Arc<Domain>,
    pub link: Arc<Link>,
    pub plan: Arc<Plan>,
    /// Locks the bases until the targets hold them.
    pub held: Bases,
    /// Starts a thread that creates the targets.
    pub make: Box<dyn FnOnce(Arc<Plan>) -> BoxFuture<'static, Making> + Send>,
}

/// The thread that creates the targets.
pub struct Making(pub JoinHandle<error::Result<(Arc<Plan>, Targets)>>);

impl Jobs {
    /// Returns the request of a queued job. Only the catalog holds it, because it can be as large as a document.
    pub async fn queued_request(&self, id: u32) -> Result<QueuedRequest, Error> {
        let record = self.context.catalog.queued_job(id).await?;
        let (_, request) = journal::queued_request(&record)?;
        Ok(request)
    }

    /// Queues a backup. `plan` is provisional; `begin` makes the final plan when the backup leaves the queue.
    pub async fn queue<F>(
        self: &Arc<Self>,
        (line, domain, plan): (InLine, &Arc<Domain>, Arc<Plan>),
        started: (Starter, jiff::Timestamp),
        request: QueuedRequest,
        begin: impl FnOnce(Arc<Job>) -> F,
    ) -> Result<Arc<Job>, Error>
    where
        F: Future<Output = error::Result<Planned>> + Send + 'static,
    {
        let uid = started.0.uid;
        let state = journal::queued_to_record(request, self.context.boot)?;
        let spec = JobSpec::Backup(plan.clone());
        let new = Self::new_job(domain, &spec, started, state)?;
        let room = self.queued.take(uid, new.plan.len() + new.state.text.len())?;
        let record = self.record_queued(new).await?;
        // Nothing waits from here on, so the caller gets the job.
        let job = Job::new(&record, domain.clone(), spec, self.context.catalog.clone(), false);
        let job = Arc::new(job);
        self.insert(job.clone());
        self.start_queued(
            Requeued {
                job: job.clone(),
                plan,
                line,
                room: Some(room),
                from_record: false,
            },
            begin,
        );
        Ok(job)
    }

    /// Records a queued backup. If the call ends before it has the record, because the service stops, the record is
    /// removed: the caller gets an error, so the next instance must not make the backup.
    async fn record_queued(self: &Arc<Self>, new: NewJob) -> Result<JobRecord, Error> {
        let (sender, recorded) = oneshot::channel();
        let jobs = self.clone();
        self.tasks.spawn(async move {
            let (take, taken) = oneshot::channel();
            let record = jobs.take_in(new).await;
            let id = record.as_ref().ok().map(|record| record.id);
            // Without a receiver, this drops `take`.
            drop(sender.send(record.map(|record| (record, take))));
            if let (Some(id), Err(_)) = (id, taken.await) {
                jobs.withdraw(id).await;
            }
        });
        // The task always sends.
        let (record, take) = recorded.await.map_err(|_| Error::Stopping)??;
        match take.send(()) {
            Ok(()) => Ok(record),
            Err(()) => Err(Error::Stopping),
        }
    }

    /// Starts the wait of a backup that is already recorded.
    pub fn start_queued<F>(self: &Arc<Self>, requeued: Requeued, begin: impl FnOnce(Arc<Job>) -> F)
    where
        F: Future<Output = error::Result<Planned>> + Send + 'static,
    {
        let job = requeued.job.clone();
        self.lock().tickets.insert(job.id, requeued.line.ticket);
        self.give_places();
        self.watch_crawling();
        tracing::info!(job = job.id, domain = job.domain.name, "backup queued");
        let (jobs, begin) = (self.clone(), begin(job.clone()));
        self.tasks.spawn(async move {
            let ending = jobs.run_queued(requeued, begin).await;
            jobs.after(&job, ending).await;
        });
    }

    async fn run_queued(
        self: &Arc<Self>,
        requeued: Requeued,
        begin: impl Future<Output = error::Result<Planned>>,
    ) -> Ending {
        let Requeued {
            job,
            plan,
            line,
            room,
            from_record,
        } = requeued;
        let job = &job;
        if from_record {
            match self.find_published(job, &plan).await {
                Ok(None) => {}
                Ok(Some(ending)) => return ending,
                // Files of it may remain.
                Err(error) => {
                    return self
                        .end_early((job, &plan), Step::Preparing, error.into(), None)
                        .await;
                }
            }
        }
        let planned = async {
            let mut reservation = line.reserve(&job.domain).await.ok_or(Stopped::Detached)?;
            fault::passed("left the queue");
            let planned = begin.await.map_err(Error::NotStarted)?;
            // The domain may have been renamed, and other jobs know it by its new name.
            reservation.try_add(&planned.domain)?;
            Ok::<_, Stopped>((reservation, planned))
        };
        let planned = tokio::select! {
            biased;
            () = self.closed.cancelled() => Err(Stopped::Detached),
            () = job.cancel.cancelled() => Err(Stopped::Cancelled),
            planned = planned => planned,
        };
        let (reservation, planned) = match planned {
            Ok(planned) => planned,
            Err(Stopped::Detached) => return Ending::Detached,
            Err(stopped) => return self.end_early((job, &plan), Step::Queued, stopped, None).await,
        };
        let Planned {
            domain,
            link,
            plan,
            held,
            make,
        } = planned;
        job.leave_queue(domain, plan.clone());
        if let Err(error) = self.record_start(job).await {
            return self
                .end_early((job, &plan), Step::Queued, error.into(), Some(reservation))
                .await;
        }
        drop(room);
        let Making(mut making) = make(plan.clone()).await;
        let made = self.made(&mut making).await;
        drop(tokio::task::spawn_blocking(move || drop(held)));
        match made {
            Some(Ok((_, targets))) => self.run((job, &plan), link, targets, reservation).await,
            Some(Err(error)) => {
                let stopped = Error::NotStarted(error).into();
                self.end_early((job, &plan), Step::Queued, stopped, Some(reservation))
                    .await
            }
            None => {
                self.abandon(making, reservation, None);
                let stopped = self.target_stalled().into();
                self.end_early((job, &plan), Step::Preparing, stopped, None).await
            }
        }
    }

    /// Finds a backup that was published although the job's record still says queued.
    async fn find_published(&self, job: &Arc<Job>, plan: &Arc<Plan>) -> Result<Option<Ending>, Error> {
        let found = resume::find_published((job, plan), &self.context).await;
        job.recovered(matches!(found, Ok(Some(_))));
        let Some(targets) = found? else {
            return Ok(None);
        };
        let mut driver = Driver::new(job, plan.clone(), &self.context);
        driver.targets = Some(targets);
        let evidence = Evidence {
            same_boot: true,
            cancel_requested: false,
            published: true,
            lost: None,
            qemu: Reached::Gone,
            disks: Vec::new(),
        };
        let fact = Fact::Resumed(evidence);
        Ok(Some(driver.drive(Step::Queued, fact, None).await))
    }

    /// Ends a backup that has no targets. With [`Step::Queued`] no file of it exists. With [`Step::Preparing`] files
    /// may exist, and the record makes the next instance of the service remove them.
    async fn end_early(
        &self,
        (job, plan): (&Arc<Job>, &Arc<Plan>),
        step: Step,
        stopped: Stopped,
        reservation: Option<Reservation>,
    ) -> Ending {
        let driver = Driver::new(job, plan.clone(), &self.context);
        let fact = Fact::Stopped(driver.verdict(stopped));
        driver.drive(step, fact, reservation).await
    }

    /// Records the final plan before the job creates anything.
    async fn record_start(&self, job: &Job) -> Result<(), Error> {
        let state = journal::to_record(&Step::Preparing, self.context.boot)?;
        let plan = record::spec_to_text(&job.spec)?;
        Ok(self.context.catalog.dequeued(job.id, plan, state).await?)
    }

    /// Resumes a queued job of an earlier instance, or ends it with the reason why it cannot continue.
    pub(in crate::job) fn recover_queued(
        self: &Arc<Self>,
        record: &JobRecord,
    ) -> Result<(Arc<Job>, Option<Requeued>), Error> {
        let (boot, request) = journal::queued_request(record)?;
        let passes_files = request.passes_files;
        drop(request);
        let identity = record::identity(record.id, &record.domain)?;
        let domain = self.context.domains.identified_or_absent(identity);
        let spec = record::spec(record)?;
        let Some(plan) = spec.plan().cloned() else {
            return Err(record::unreadable(record.id, "only a backup can be queued"));
        };
        let claim = Claim::of(record.started_by.uid, &domain, &plan);
        let job = Job::of_record(record, domain, spec, self.context.catalog.clone(), true);
        let job = Arc::new(job);
        self.insert(job.clone());
        let ended = match () {
            () if record.cancel_requested => Some(Stopped::Cancelled),
            () if boot != self.context.boot => Some(Error::HostRestartedBefore.into()),
            () if passes_files => Some(Error::FilesGone.into()),
            () => None,
        };
        if let Some(stopped) = ended {
            let (jobs, ended) = (self.clone(), job.clone());
            self.tasks.spawn(async move {
                let published = match stopped {
                    Stopped::Cancelled => Ok(None),
                    _ => jobs.find_published(&ended, &plan).await,
                };
                let ending = match published {
                    Ok(Some(ending)) => ending,
                    Ok(None) => jobs.end_early((&ended, &plan), Step::Queued, stopped, None).await,
                    // Files of it may remain. The reason in `stopped` is more useful than an error about the storage.
                    Err(_) => {
                        jobs.end_early((&ended, &plan), Step::Preparing, stopped, None)
                            .await
                    }
                };
                jobs.after(&ended, ending).await;
            });
            return Ok((job, None));
        }
        // The record was within the limits when the job joined. Other jobs may have taken the quota since.
        let share = self.quota.take(claim.uid, 1).ok();
        let bytes = record.plan.len() + record.state.len();
        let room = self.queued.take(claim.uid, bytes).ok();
        let kept = self.keep(share.map(|share| (share, None)), self.tasks.token());
        let line = self.line_up(&mut self.lock(), claim, kept, false);
        let requeued = Requeued {
            job: job.clone(),
            plan,
            line,
            room,
            from_record: true,
        };
        Ok((job, Some(requeued)))
    }
}
