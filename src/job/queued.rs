//! Backups that wait for a place: how a backup joins and leaves the queue, and how it is recovered after a restart.
//!
//! A queued backup consists only of its record. The record contains the caller's request and its authorisation, and
//! never changes. The service reads everything else when the backup leaves the queue.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::backup::{self, Driver, Evidence, Fact, Reached, State as Step};
use super::error::Stopped;
use super::manager::{Ending, Jobs, Kept, ROOT, Refused, Reservation, Table};
use super::queue::{Claim, Ticket};
use super::record::{self, to_text};
use super::{Error, Job, State};
use crate::activity::Use;
use crate::catalog::{JobRecord, Starter};
use crate::domain::{Domain, Link};
use crate::error;
use crate::fault;
use crate::plan::{Destination, Options, Plan, Requested};
use crate::quota::Share;
use crate::targets::{Bases, Devices, Pinned, Targets};

/// The request for a queued backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct QueuedRequest {
    /// The document, with each disk under the name of its device.
    pub document: String,
    pub options: Options,
    /// The targets that the caller was authorised for.
    pub places: Vec<Requested>,
    pub pinned: Vec<Pinned>,
    pub devices: Devices,
    /// The targets are open files of the caller, which do not outlive this process.
    pub passes_files: bool,
}

/// A queued job of an earlier instance of the service.
pub struct Requeued {
    pub job: Arc<Job>,
    line: InLine,
    /// The quota that its record takes. `None` if the record exceeds limits that were lowered since.
    room: Option<Share>,
    /// An earlier instance queued it.
    from_record: bool,
}

/// The result of [`Jobs::enter`].
pub enum Entered {
    Now(Reservation),
    Later(InLine),
}

/// The right to run: the domain, and a place. Dropping it frees both.
pub(super) struct Place {
    jobs: Arc<Jobs>,
    /// `None` after a reservation has taken it over.
    held: Option<(Ticket, Claim)>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some((ticket, claim)) = self.held.take() {
            let domain = std::iter::once(claim.domain.as_str());
            self.jobs.give_back(domain, claim.uid, Some(ticket));
        }
    }
}

/// A backup in the queue. Dropping it removes the backup from the queue.
#[must_use]
pub struct InLine {
    jobs: Arc<Jobs>,
    ticket: Ticket,
    place: oneshot::Receiver<Place>,
    kept: Option<Kept>,
    /// Present if a restart of the service would abort the backup, because the service holds the caller's files.
    _at_stake: Option<Use>,
}

impl Drop for InLine {
    fn drop(&mut self) {
        let mut table = self.jobs.lock();
        // Otherwise the backup has got its place already.
        if table.queue.leave(self.ticket) {
            table.tickets.retain(|_, ticket| *ticket != self.ticket);
        }
        let waiting = table.waiting.remove(&self.ticket);
        drop(table);
        drop(waiting);
        // A waiting backup of root's may have blocked another user's backup of the same domain.
        self.jobs.give_places();
    }
}

impl InLine {
    /// Waits for the place.
    async fn reserve(mut self, domain: &Arc<Domain>) -> Option<Reservation> {
        let place = (&mut self.place).await.ok()?;
        self.into_reservation(place, domain)
    }

    fn into_reservation(mut self, mut place: Place, domain: &Arc<Domain>) -> Option<Reservation> {
        let kept = self.kept.take()?;
        let (ticket, claim) = place.held.take()?;
        let held = ((claim.domain, domain.hold()), claim.uid);
        Some(Reservation::new(self.jobs.clone(), held, Some(ticket), kept))
    }
}

/// The plan of a backup that leaves the queue.
pub struct Planned {
    pub domain: Arc<Domain>,
    pub link: Arc<Link>,
    pub plan: Plan,
    /// Locks the bases until the targets hold them.
    pub held: Bases,
    /// Starts a thread that creates the targets.
    pub make: Box<dyn FnOnce(Plan) -> BoxFuture<'static, Making> + Send>,
}

/// The thread that creates the targets.
pub struct Making(pub JoinHandle<error::Result<(Plan, Targets)>>);

impl Claim {
    /// `store` is the store of the targets, if they are in one.
    pub fn new(uid: u32, domain: &Domain, store: Option<&str>) -> Self {
        Self {
            uid,
            domain: domain.unique_name(),
            store: store.map(str::to_owned),
        }
    }

    pub(super) fn of(uid: u32, domain: &Domain, plan: &Plan) -> Self {
        match &plan.destination {
            Destination::Store { name, .. } => Self::new(uid, domain, Some(name)),
            Destination::Caller => Self::new(uid, domain, None),
        }
    }
}

impl Jobs {
    /// Occupies the domain and a place among the running backups, or else joins the queue. Fails at once if the domain
    /// accepts no further backup.
    pub fn enter(
        self: &Arc<Self>,
        domain: &Arc<Domain>,
        claim: Claim,
        descriptors: Arc<Share>,
        passes_files: bool,
    ) -> Result<Entered, Error> {
        // Taken before the check, so that a concurrent stop waits for this backup.
        let token = self.tasks.token();
        if self.context.stop.is_cancelled() {
            return Err(Error::Stopping);
        }
        let share = self.quota.take(claim.uid, 1)?;
        let kept = self.keep(Some((share, Some(descriptors))), token);
        let mut table = self.lock();
        // Checking and joining need the same lock, so that only one of two concurrent calls succeeds.
        let free = match table.queue.blocks(&claim.domain, claim.uid) {
            true => Err(Refused::Taken),
            false => table.check_place(&claim.domain, claim.uid),
        };
        free.map_err(|refused| refused.of(domain))?;
        let mut line = self.line_up(&mut table, claim, kept, passes_files);
        drop(table);
        self.give_places();
        match line.place.try_recv() {
            Ok(place) => {
                let reservation = line.into_reservation(place, domain);
                reservation.map(Entered::Now).ok_or(Error::Stopping)
            }
            Err(_) => {
                self.watch_crawling();
                Ok(Entered::Later(line))
            }
        }
    }

    fn line_up(self: &Arc<Self>, table: &mut Table, claim: Claim, kept: Kept, passes_files: bool) -> InLine {
        let (sender, place) = oneshot::channel();
        if claim.uid == ROOT {
            table.busy.is_here(&claim.domain);
        }
        let ticket = table.queue.join(claim);
        table.waiting.insert(ticket, sender);
        InLine {
            jobs: self.clone(),
            ticket,
            place,
            kept: Some(kept),
            _at_stake: passes_files.then(|| self.context.at_stake.begin()),
        }
    }

    /// Gives all free places to the next backups.
    pub(super) fn give_places(self: &Arc<Self>) {
        let mut given = Vec::new();
        let mut guard = self.lock();
        let Table {
            queue, busy, waiting, ..
        } = &mut *guard;
        while let Some((ticket, claim)) = queue.next(|claim| busy.is_free_for(&claim.domain, claim.uid)) {
            busy.begin(&claim.domain, claim.uid);
            let place = Place {
                jobs: self.clone(),
                held: Some((ticket, claim)),
            };
            given.push((waiting.remove(&ticket), place));
        }
        drop(guard);
        for (waiting, place) in given {
            // Dropping an unclaimed place takes the lock again, so the guard is dropped before.
            drop(waiting.map(|waiting| waiting.send(place)));
        }
    }

    /// Stops starting queued backups, and ends all waiting for their start: the service is about to stop.
    pub fn close_queue(&self) {
        self.closed.cancel();
    }

    /// Waits for [`Jobs::close_queue`].
    pub async fn queue_is_closed(&self) {
        self.closed.cancelled().await;
    }

    /// Returns the position of a job in the queue, from 1 on; 0 if it does not wait.
    pub fn position(&self, id: u32) -> u32 {
        let mut table = self.lock();
        let ticket = table.tickets.get(&id).copied();
        ticket
            .and_then(|ticket| table.queue.position(ticket))
            .unwrap_or(0)
    }

    /// Returns the request of a queued job. Only the catalog holds it, because it can be as large as a document.
    pub async fn queued_request(&self, id: u32) -> Result<QueuedRequest, Error> {
        let record = self.context.catalog.queued_job(id).await?;
        let (_, request) = record::queued_request(&record)?;
        Ok(request)
    }

    /// Queues a backup. `plan` is provisional; `begin` makes the final plan when the backup leaves the queue.
    pub async fn queue<F>(
        self: &Arc<Self>,
        (line, domain, plan): (InLine, &Arc<Domain>, Plan),
        started: (Starter, jiff::Timestamp),
        request: QueuedRequest,
        begin: impl FnOnce(Arc<Job>) -> F,
    ) -> Result<Arc<Job>, Error>
    where
        F: Future<Output = error::Result<Planned>> + Send + 'static,
    {
        let uid = started.0.uid;
        let state = record::queued_journal(request, self.context.boot)?;
        let new = Self::new_job(domain, &plan, started, state)?;
        let room = self.queued.take(uid, new.plan.len() + new.state.text.len())?;
        let record = self.take_in(new).await?;
        let job = Job::new(&record, domain.clone(), plan, self.context.catalog.clone(), false);
        let job = Arc::new(job);
        self.insert(job.clone());
        self.start_queued(
            Requeued {
                job: job.clone(),
                line,
                room: Some(room),
                from_record: false,
            },
            begin,
        );
        Ok(job)
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
            line,
            room,
            from_record,
        } = requeued;
        let job = &job;
        if from_record {
            match self.find_published(job).await {
                Ok(None) => {}
                Ok(Some(ending)) => return ending,
                Err(stalled) => return self.end_early(job, Step::Queued, stalled.into(), None).await,
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
            Err(stopped) => return self.end_early(job, Step::Queued, stopped, None).await,
        };
        let Planned {
            domain,
            link,
            plan,
            held,
            make,
        } = planned;
        job.leave_queue(domain, plan);
        if let Err(error) = self.record_start(job).await {
            return self
                .end_early(job, Step::Queued, error.into(), Some(reservation))
                .await;
        }
        drop(room);
        let Making(mut making) = make(job.plan.clone()).await;
        let made = self.made(&mut making).await;
        drop(tokio::task::spawn_blocking(move || drop(held)));
        match made {
            Some(Ok((_, targets))) => self.run(job, link, targets, reservation).await,
            Some(Err(error)) => {
                let stopped = Error::NotStarted(error).into();
                self.end_early(job, Step::Queued, stopped, Some(reservation))
                    .await
            }
            None => {
                self.abandon(making, reservation, None);
                let stopped = self.target_stalled().into();
                self.end_early(job, Step::Preparing, stopped, None).await
            }
        }
    }

    /// Finds a backup that was published although the job's record still says queued.
    async fn find_published(&self, job: &Arc<Job>) -> Result<Option<Ending>, Error> {
        let found = backup::find_published(job, &self.context).await;
        job.recovered(matches!(found, Ok(Some(_))));
        let Some(targets) = found? else {
            return Ok(None);
        };
        let mut driver = Driver::new(job, &self.context);
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

    /// Ends a backup before it has targets. With [`Step::Queued`] it has created no file either.
    async fn end_early(
        &self,
        job: &Arc<Job>,
        step: Step,
        stopped: Stopped,
        reservation: Option<Reservation>,
    ) -> Ending {
        let driver = Driver::new(job, &self.context);
        let fact = Fact::Stopped(driver.verdict(stopped));
        driver.drive(step, fact, reservation).await
    }

    /// Records the final plan before the job creates anything.
    async fn record_start(&self, job: &Job) -> Result<(), Error> {
        let state = record::journal(&Step::Preparing, self.context.boot)?;
        let plan = to_text(&*job.plan)?;
        Ok(self.context.catalog.dequeued(job.id, plan, state).await?)
    }

    /// Resumes a queued job of an earlier instance, or ends it with the reason why it cannot continue.
    pub(super) fn recover_queued(
        self: &Arc<Self>,
        record: &JobRecord,
    ) -> Result<(Arc<Job>, Option<Requeued>), Error> {
        let (boot, request) = record::queued_request(record)?;
        let passes_files = request.passes_files;
        drop(request);
        let identity = record::identity(record.id, &record.domain)?;
        let domain = self.context.domains.identified_or_absent(identity);
        let plan = record::plan(record)?;
        let claim = Claim::of(record.started_by.uid, &domain, &plan);
        let job = Job::new(record, domain, plan, self.context.catalog.clone(), true);
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
                    _ => jobs.find_published(&ended).await,
                };
                let ending = match published {
                    Ok(Some(ending)) => ending,
                    // The job ends in any case. The reason in `stopped` is more useful than an error about hanging
                    // storage.
                    Ok(None) | Err(_) => jobs.end_early(&ended, Step::Queued, stopped, None).await,
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
            line,
            room,
            from_record: true,
        };
        Ok((job, Some(requeued)))
    }
}

impl Job {
    /// Returns whether the job waits for a place.
    pub fn is_queued(&self) -> bool {
        let status = self.status.borrow();
        status.state == State::Queued && status.outcome.is_none()
    }
}
