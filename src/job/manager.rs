//! The table of the service's jobs: the running ones, one a domain, and the recently ended ones.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::{Notify, oneshot};
use tokio::task::{AbortHandle, JoinError, JoinHandle};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::bandwidth::{Bandwidth, Part};
use super::boot::BootId;
use super::busy::Busy;
use super::generation::Generations;
use super::objects::QemuObjects;
use super::queue::{Claim, Places, Queue, Ticket};
use super::queued::{Place, Requeued};
use super::record::{self, Residue, to_text};
use super::rescan::{self, Rescan};
use super::{Error, Job, backup, blocking, quiesce, watched};
use crate::activity::{Activity, Use};
use crate::catalog::{Catalog, EndedJob, JobRecord, JobState, NewJob, QUEUED, Starter};
use crate::clock;
use crate::config::{Config, Deadlines, Store};
use crate::domain::{Domain, Hold, Link, Registry};
use crate::error;
use crate::fault;
use crate::offload::Progress;
use crate::plan::{Plan, Task};
use crate::quota::{Quota, Share};
use crate::targets::Targets;

/// How long ended jobs stay in the table, and how many at most.
const KEEP: Duration = Duration::from_secs(600);
const KEEP_AT_MOST: u32 = 100;

pub(super) const ROOT: u32 = 0;

/// The reason why no backup of a domain can start now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Another backup runs or comes first.
    Taken,
    /// An ended job still has objects in QEMU. Its storage may hang, and a further command could freeze QEMU.
    Left { job: u32 },
}

impl Refused {
    pub fn of(self, domain: &Domain) -> Error {
        match self {
            Self::Taken => Error::Busy {
                domain: domain.name.clone(),
            },
            Self::Left { job } => Error::Left { job },
        }
    }
}

/// The dependencies that all jobs share.
pub(super) struct JobContext {
    pub domains: Arc<Registry>,
    pub catalog: Catalog,
    pub deadlines: Deadlines,
    /// The current boot of the host.
    pub boot: BootId,
    /// The number of ended jobs that the catalog keeps.
    pub history: u32,
    pub stores: BTreeMap<String, Store>,
    /// The service stops. QEMU continues to copy without it.
    pub stop: CancellationToken,
    /// Counts the work that must end before the service exits.
    pub activity: Activity,
    /// Counts the part of it that a restart of the service would abort, because it runs in the service's own processes.
    pub at_stake: Activity,
    pub generations: Generations,
    /// The bandwidth of the stores.
    pub bandwidth: Bandwidth,
}

/// How the service's work on a job ended.
pub(super) enum Ending {
    /// The job has ended. It keeps its part of a store's bandwidth while QEMU may still copy.
    Ended(Residue, Option<Part>),
    /// A later instance of the service resumes the job.
    Detached,
}

/// An ended job with residue that is not removed yet.
struct Uncleaned {
    job: Arc<Job>,
    residue: Residue,
    /// Dropping this returns the job's part of a store's bandwidth.
    _part: Option<DropGuard>,
}

pub(super) struct Table {
    /// The running and the waiting backups.
    pub queue: Queue,
    /// The tasks that wait for a place.
    pub waiting: HashMap<Ticket, oneshot::Sender<Place>>,
    /// The tickets of the running and the waiting jobs, by job id.
    pub tickets: HashMap<u32, Ticket>,
    pub busy: Busy,
    /// The residue to remove, by the unique name of the domain. One task for each domain removes it in order.
    cleanups: HashMap<String, VecDeque<Uncleaned>>,
    /// A task watches for crawling backups while others wait.
    pub(super) is_watched: bool,
    jobs: BTreeMap<u32, Arc<Job>>,
    /// The expiry timers of ended jobs. Each is removed together with its job.
    forgetting: HashMap<u32, AbortHandle>,
}

impl Table {
    /// Returns the ended job that still has objects in the QEMU of the domain with this unique name.
    fn left_in_qemu(&self, domain: &str) -> Option<u32> {
        let mut queue = self.cleanups.get(domain)?.iter();
        let left = queue.find(|uncleaned| uncleaned.residue.in_qemu)?;
        Some(left.job.id)
    }

    /// Fails if this user's work on the domain cannot start now.
    pub fn check_place(&self, domain: &str, uid: u32) -> Result<(), Refused> {
        match self.left_in_qemu(domain) {
            Some(job) => Err(Refused::Left { job }),
            None if self.busy.is_free_for(domain, uid) => Ok(()),
            None => Err(Refused::Taken),
        }
    }
}

pub struct Jobs {
    table: Mutex<Table>,
    pub(super) quota: Quota,
    /// Bytes that the records of queued jobs take in the catalog.
    pub(super) queued: Quota,
    pub(super) context: JobContext,
    /// Held by the caller that requested a rescan; a second request fails.
    asked_to_rescan: tokio::sync::Mutex<()>,
    /// Serialises all rescans, including those that the service starts itself.
    pub(super) rescanning: tokio::sync::Mutex<()>,
    pub(super) tasks: TaskTracker,
    /// Queued backups no longer start, because the service is about to stop.
    pub(super) closed: CancellationToken,
    /// Signals that a domain is free, or that a job's residue in QEMU is removed.
    pub(super) freed: Notify,
}

/// The right to run the only backup of a domain. Dropping it frees the domain.
#[must_use]
pub struct Reservation {
    jobs: Arc<Jobs>,
    uid: u32,
    /// The domains' unique names. There are two if the domain was renamed while its backup waited, or between two
    /// instances of the service.
    domains: Vec<(String, Hold)>,
    /// The ticket among the running backups.
    ticket: Option<Ticket>,
    kept: Kept,
}

/// A user's shares of the quotas of jobs, and of the caller's descriptors that a backup writes to.
pub(super) type Shares = Arc<(Share, Option<Arc<Share>>)>;

/// The quotas and counters that a job occupies from the call to its end.
pub(super) struct Kept {
    /// `None` for a job that an earlier instance started: it does not count for the user's quota.
    shares: Option<Shares>,
    /// Keeps the service from exiting when idle.
    _use: Use,
    /// Keeps the service from stopping until the reservation is dropped.
    _token: TaskTrackerToken,
}

impl Reservation {
    /// Wraps a domain that this user already occupies.
    pub(super) fn new(
        jobs: Arc<Jobs>,
        (domain, uid): ((String, Hold), u32),
        ticket: Option<Ticket>,
        kept: Kept,
    ) -> Self {
        Self {
            jobs,
            uid,
            domains: vec![domain],
            ticket,
            kept,
        }
    }

    /// Returns the shares for work on a thread that storage may block for longer than the job runs.
    pub(super) fn shares(&self) -> Option<Shares> {
        self.kept.shares.clone()
    }

    /// Occupies another domain too, even if it is busy: it is the same VM under its present name.
    pub(super) fn add(&mut self, domain: &Arc<Domain>) {
        let name = domain.unique_name();
        if !self.has(&name) {
            self.jobs.lock().busy.begin(&name, self.uid);
            self.domains.push((name, domain.hold()));
        }
    }

    /// Occupies another domain too, unless other work on it runs or comes first.
    pub(super) fn try_add(&mut self, domain: &Arc<Domain>) -> Result<(), Error> {
        let name = domain.unique_name();
        if !self.has(&name) {
            self.jobs
                .take_place(&name, self.uid)
                .map_err(|refused| refused.of(domain))?;
            self.domains.push((name, domain.hold()));
        }
        Ok(())
    }

    fn has(&self, name: &str) -> bool {
        self.domains.iter().any(|(known, _)| known == name)
    }
}

/// The resources that a job holds during its preparation.
pub trait Held: Send + 'static {
    /// Frees the domain and the place for other jobs. The user's quota stays occupied.
    fn make_room(&mut self) {}
}

impl Held for Reservation {
    fn make_room(&mut self) {
        let domains: Vec<_> = self.domains.drain(..).collect();
        let names = domains.iter().map(|(domain, _hold)| domain.as_str());
        self.jobs.give_back(names, self.uid, self.ticket.take());
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.make_room();
    }
}

/// The unfinished jobs of an earlier instance of the service.
#[derive(Default)]
pub struct Recovered {
    pub jobs: Vec<Arc<Job>>,
    /// The jobs among them that wait for a place.
    pub queued: Vec<Requeued>,
}

/// The parameters of [`Jobs::start`].
pub struct Start {
    pub reservation: Reservation,
    pub domain: Arc<Domain>,
    pub link: Arc<Link>,
    pub plan: Plan,
    pub targets: Targets,
    pub record: JobRecord,
}

impl Jobs {
    /// Creates an empty table: [`Jobs::recover`] fills it. `activity` counts the running jobs and the unfinished
    /// clean-up of ended ones.
    pub fn new(
        domains: Arc<Registry>,
        catalog: Catalog,
        config: &Config,
        boot: BootId,
        activity: Activity,
    ) -> Arc<Self> {
        let jobs = Arc::new(Self {
            quota: config.limits.of_jobs(),
            queued: config.limits.of_queued(),
            table: Mutex::new(Table {
                queue: Queue::new(Places::of(config)),
                waiting: HashMap::new(),
                tickets: HashMap::new(),
                busy: Busy::default(),
                cleanups: HashMap::new(),
                is_watched: false,
                jobs: BTreeMap::new(),
                forgetting: HashMap::new(),
            }),
            closed: CancellationToken::new(),
            asked_to_rescan: tokio::sync::Mutex::default(),
            rescanning: tokio::sync::Mutex::default(),
            context: JobContext {
                domains,
                generations: Generations::new(catalog.clone(), config, activity.clone()),
                catalog,
                deadlines: config.deadlines,
                boot,
                history: config.limits.history,
                bandwidth: Bandwidth::of(&config.stores),
                stores: config.stores.clone(),
                stop: CancellationToken::new(),
                activity,
                at_stake: Activity::default(),
            },
            tasks: TaskTracker::new(),
            freed: Notify::new(),
        });
        let greeter: Weak<Self> = Arc::downgrade(&jobs);
        jobs.context.domains.set_greeter(greeter);
        jobs
    }

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
            let journal = record::read_journal(&record);
            let is_of_boot = journal.as_ref().is_ok_and(|(boot, _)| *boot == self.context.boot);
            let of_state = journal.map(|(_, state)| Residue::of(&state));
            let residue = Residue {
                in_qemu: record.left_in_qemu,
                on_disk: record.left_on_disk,
                ..of_state.unwrap_or_default()
            };
            let job = Arc::new(self.ended(&record)?);
            // QEMU may still copy with the speed that it had.
            let may_copy = residue.in_qemu && is_of_boot && job.plan.task == Task::Backup;
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
        if record::plan(&record)?.task == Task::Backup {
            recovered.jobs.push(self.resume(record)?);
            return Ok(());
        }
        let identity = record::identity(record.id, &record.domain)?;
        let job = self.end_lost(&record, identity).await?;
        self.forget_later(job.id);
        recovered.jobs.push(job);
        Ok(())
    }

    fn ended(&self, record: &JobRecord) -> Result<Job, Error> {
        let identity = record::identity(record.id, &record.domain)?;
        let domain = self.context.domains.identified_or_absent(identity);
        Job::ended(record, domain, self.context.catalog.clone())
    }

    /// Queues the removal of an ended job's residue. One task for each domain removes it in order.
    fn clean_up(self: &Arc<Self>, uncleaned: Uncleaned) {
        if !uncleaned.residue.in_qemu && !uncleaned.residue.on_disk {
            return;
        }
        let domain = uncleaned.job.domain.unique_name();
        let mut table = self.lock();
        let queue = table.cleanups.entry(domain.clone()).or_default();
        queue.push_back(uncleaned);
        if queue.len() > 1 {
            return;
        }
        drop(table);
        let jobs = self.clone();
        self.tasks.spawn(async move {
            while let Some((job, residue)) = jobs.next_cleanup(&domain) {
                backup::clean_up(&job, residue, &jobs.context).await;
                if let Some(queue) = jobs.lock().cleanups.get_mut(&domain) {
                    queue.pop_front();
                }
                jobs.freed.notify_waiters();
            }
        });
    }

    /// Returns the first entry of the queue. It stays in the queue until its residue is removed.
    fn next_cleanup(&self, domain: &str) -> Option<(Arc<Job>, Residue)> {
        let mut table = self.lock();
        let next = table.cleanups.get(domain).and_then(|queue| queue.front());
        let next = next.map(|uncleaned| (uncleaned.job.clone(), uncleaned.residue));
        if next.is_none() || self.context.stop.is_cancelled() {
            table.cleanups.remove(domain);
            return None;
        }
        next
    }

    fn resume(self: &Arc<Self>, record: JobRecord) -> Result<Arc<Job>, Error> {
        let identity = record::identity(record.id, &record.domain)?;
        let domain = self.context.domains.identified_or_absent(identity);
        let plan = record::plan(&record)?;
        let journal = record::read_journal(&record)?;
        // The block jobs run already, so the backup counts even if no place is free.
        let claim = Claim::of(record.started_by.uid, &domain, &plan);
        let place = ((claim.domain.clone(), domain.hold()), claim.uid);
        let mut table = self.lock();
        table.busy.begin(&claim.domain, claim.uid);
        let ticket = table.queue.resume(claim);
        table.tickets.insert(record.id, ticket);
        drop(table);
        let kept = self.keep(None, self.tasks.token());
        let reservation = Reservation::new(self.clone(), place, Some(ticket), kept);
        let job = Arc::new(Job::new(
            &record,
            domain,
            plan,
            self.context.catalog.clone(),
            true,
        ));
        let (boot, state) = &journal;
        // The bandwidth must count this job before another backup begins.
        let part =
            (*boot == self.context.boot && state.may_copy()).then(|| self.context.bandwidth.resume(&job));
        let mut table = self.lock();
        table.jobs.insert(job.id, job.clone());
        drop(table);
        let (jobs, resumed) = (self.clone(), job.clone());
        self.tasks.spawn(async move {
            let has = (reservation, part);
            let ending = backup::resume(&job, &record, journal, has, &jobs.context).await;
            jobs.after(&job, ending).await;
        });
        Ok(resumed)
    }

    /// Records a new backup in the catalog. The caller has created no target yet.
    pub async fn begin(
        &self,
        domain: &Domain,
        plan: &Plan,
        started_by: Starter,
        start_time: Timestamp,
    ) -> Result<JobRecord, Error> {
        let state = record::journal(&backup::State::Preparing, self.context.boot)?;
        let new = Self::new_job(domain, plan, (started_by, start_time), state)?;
        self.take_in(new).await
    }

    pub(super) fn new_job(
        domain: &Domain,
        plan: &Plan,
        (started_by, start_time): (Starter, Timestamp),
        state: JobState,
    ) -> Result<NewJob, Error> {
        Ok(NewJob {
            backup_id: Self::new_backup_id(start_time),
            domain: record::domain_record(domain.identity()),
            started_by,
            start_time,
            plan: to_text(plan)?,
            speed: plan.bandwidth,
            state,
        })
    }

    pub(super) async fn take_in(&self, new: NewJob) -> Result<JobRecord, Error> {
        let record = self.context.catalog.begin(new).await?;
        fault::passed("recorded");
        Ok(record)
    }

    /// Removes the record of a job whose targets could not be created.
    async fn withdraw(&self, id: u32) {
        if let Err(error) = self.context.catalog.withdraw(id).await {
            tracing::warn!(job = id, %error, "cannot remove the record of a job that never began");
        }
    }

    /// Keeps the service from exiting while the caller holds the result.
    pub fn need_service(&self) -> Use {
        self.context.activity.begin()
    }

    /// Counts the work that a restart of the service would abort: restores, exports, verifications, merges, deletions.
    /// Backups survive a restart.
    pub fn at_stake(&self) -> &Activity {
        &self.context.at_stake
    }

    /// Runs work on a store that may block on its storage.
    pub async fn in_store<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Progress) -> T + Send + 'static,
    ) -> Result<T, Error> {
        watched(&self.context, "the store", work).await
    }

    /// How long the service waits for a domain that was connected before.
    pub fn reconnect_patience(&self) -> Duration {
        self.context.deadlines.reconnect()
    }

    /// How long the service waits without progress.
    pub fn patience(&self) -> Duration {
        self.context.deadlines.stall()
    }

    /// Waits for the targets of a recorded job, and keeps `held` until the targets exist or are discarded. If this
    /// fails, the record is withdrawn. That can happen later, because the thread that prepares the targets may hang.
    pub async fn prepared<H, T>(
        self: &Arc<Self>,
        id: u32,
        held: H,
        mut targets: JoinHandle<error::Result<T>>,
    ) -> error::Result<(H, T)>
    where
        H: Held,
        T: Send + 'static,
    {
        match self.made(&mut targets).await {
            Some(Ok(prepared)) => Ok((held, prepared)),
            Some(Err(error)) => {
                self.withdraw(id).await;
                Err(error)
            }
            None => {
                self.abandon(targets, held, Some(id));
                Err(self.target_stalled().into())
            }
        }
    }

    /// Abandons a thread that hangs while it prepares targets. When it continues, its targets are discarded, and then
    /// the record of the job `withdrawn` is removed.
    pub(super) fn abandon<T: Send + 'static>(
        self: &Arc<Self>,
        targets: JoinHandle<error::Result<T>>,
        mut held: impl Held,
        withdrawn: Option<u32>,
    ) {
        // The job has no objects in QEMU yet, so another job can start.
        held.make_room();
        let jobs = self.clone();
        self.tasks.spawn(async move {
            let discarded = async {
                // Dropping the targets can block on storage, too.
                if let Ok(made) = targets.await {
                    blocking(&jobs.context, move || drop(made)).await;
                }
                if let Some(id) = withdrawn {
                    jobs.withdraw(id).await;
                }
            };
            // If the service stops first, the next instance finds the record and removes it.
            jobs.context.stop.run_until_cancelled(discarded).await;
            drop(held);
        });
    }

    /// Returns the result of the thread that prepares the targets; `None` if it hangs.
    pub(super) async fn made<T>(
        &self,
        targets: &mut JoinHandle<error::Result<T>>,
    ) -> Option<error::Result<T>> {
        let failed = |error: JoinError| error::Error::new(error::Kind::Internal, error.to_string());
        let made = tokio::time::timeout(self.patience(), targets).await.ok()?;
        Some(made.map_err(failed).flatten())
    }

    pub(super) fn target_stalled(&self) -> Error {
        Error::stalled("the target", self.patience())
    }

    /// Returns a unique id for a backup or a checkpoint. Ids sort by time.
    pub(super) fn new_backup_id(now: Timestamp) -> String {
        let unique = uuid::Uuid::new_v4().simple().to_string();
        format!("{}-{}", now.strftime("%Y%m%dT%H%M%SZ"), &unique[..8])
    }

    /// Occupies the domain for a user, together with the descriptors that the caller passed. Fails at once if the
    /// domain is busy.
    pub fn reserve(
        self: &Arc<Self>,
        domain: &Arc<Domain>,
        uid: u32,
        descriptors: Arc<Share>,
    ) -> Result<Reservation, Error> {
        // Taken before the check, so that a concurrent stop waits for this job.
        let token = self.tasks.token();
        if self.context.stop.is_cancelled() {
            return Err(Error::Stopping);
        }
        let share = self.quota.take(uid, 1)?;
        self.take_place(&domain.unique_name(), uid)
            .map_err(|refused| refused.of(domain))?;
        let kept = self.keep(Some((share, Some(descriptors))), token);
        let place = ((domain.unique_name(), domain.hold()), uid);
        Ok(Reservation::new(self.clone(), place, None, kept))
    }

    pub(super) fn keep(&self, shares: Option<(Share, Option<Arc<Share>>)>, token: TaskTrackerToken) -> Kept {
        Kept {
            shares: shares.map(Arc::new),
            _use: self.context.activity.begin(),
            _token: token,
        }
    }

    /// Frees these domains, and the place of a backup that ran.
    pub(super) fn give_back<'a>(
        self: &Arc<Self>,
        domains: impl Iterator<Item = &'a str>,
        uid: u32,
        ticket: Option<Ticket>,
    ) {
        let mut table = self.lock();
        for domain in domains {
            table.busy.end(domain, uid);
        }
        if let Some(ended) = ticket {
            table.queue.end(ended);
            table.tickets.retain(|_, ticket| *ticket != ended);
        }
        drop(table);
        self.give_places();
        self.freed.notify_waiters();
    }

    fn take_place(&self, domain: &str, uid: u32) -> Result<(), Refused> {
        let mut table = self.lock();
        table.check_place(domain, uid)?;
        table.busy.begin(domain, uid);
        Ok(())
    }

    /// Returns the ended job that still has objects in the QEMU of the domain with this unique name.
    pub(super) fn left_in_qemu(&self, domain: &str) -> Option<u32> {
        self.lock().left_in_qemu(domain)
    }

    /// Returns whether a job works on the domain or on its checkpoints.
    pub(super) fn is_busy(&self, domain: &Domain) -> bool {
        self.lock().busy.contains(&domain.unique_name())
    }

    /// Starts the job and returns at once.
    pub fn start(self: &Arc<Self>, start: Start) -> Arc<Job> {
        let Start {
            reservation,
            domain,
            link,
            plan,
            targets,
            record,
        } = start;
        let job = Arc::new(Job::new(
            &record,
            domain,
            plan,
            self.context.catalog.clone(),
            false,
        ));
        let mut table = self.lock();
        table.jobs.insert(job.id, job.clone());
        if let Some(ticket) = reservation.ticket {
            table.tickets.insert(job.id, ticket);
        }
        drop(table);
        let (jobs, running) = (self.clone(), job.clone());
        self.tasks.spawn(async move {
            let ending = jobs.run(&running, link, targets, reservation).await;
            jobs.after(&running, ending).await;
        });
        job
    }

    pub(super) async fn run(
        &self,
        job: &Arc<Job>,
        link: Arc<Link>,
        targets: Targets,
        reservation: Reservation,
    ) -> Ending {
        let mut driver = backup::Driver::new(job, &self.context);
        driver.objects = Some(QemuObjects::of(job, job.domain.clone(), link, &self.context));
        let files = targets.files();
        driver.targets = Some(targets);
        // Fails before anything is changed.
        let fact = match quiesce::check(&job.domain, job.plan.quiesce).await {
            Ok(()) => backup::Fact::Prepared { files },
            Err(error) => backup::Fact::Stopped(driver.verdict(error.into())),
        };
        driver
            .drive(backup::State::Preparing, fact, Some(reservation))
            .await
    }

    /// Follows up when the service's work on a job has ended: expiry, and removal of residue.
    pub(super) async fn after(self: &Arc<Self>, job: &Arc<Job>, ending: Ending) {
        let is_queued = job.is_queued();
        let (residue, part) = match ending {
            Ending::Ended(residue, part) => (residue, part),
            Ending::Detached => {
                let (job, domain) = (job.id, &job.domain.name);
                match is_queued {
                    true => tracing::info!(job, domain, "the backup stays queued"),
                    false => tracing::info!(job, domain, "QEMU continues the backup without the service"),
                }
                return;
            }
        };
        self.forget_oldest();
        self.forget_later(job.id);
        // If the removal of files hangs, its own thread finishes it, or the next instance of the service does.
        let residue = Residue {
            on_disk: false,
            ..residue
        };
        self.clean_up(Uncleaned {
            job: job.clone(),
            residue,
            _part: part
                .filter(|_| residue.in_qemu)
                .and_then(Part::end)
                .map(|part| self.give_back_later(part)),
        });
    }

    /// Returns a part of a store's bandwidth when the guard is dropped, or after the stall timeout. Without the
    /// timeout, a copy that never stops would slow the others down for ever.
    fn give_back_later(&self, part: Part) -> DropGuard {
        let over = CancellationToken::new();
        let guard = over.clone().drop_guard();
        let (stop, patience) = (self.context.stop.clone(), self.patience());
        self.tasks.spawn(async move {
            let over = tokio::time::timeout(patience, over.cancelled());
            stop.run_until_cancelled(over).await;
            drop(part);
        });
        guard
    }

    /// Removes an ended job from the table after a while. The timer does not keep the service from stopping.
    fn forget_later(self: &Arc<Self>, id: u32) {
        let mut table = self.lock();
        // The table may have dropped this job already because it holds a limited number of ended jobs.
        if !table.jobs.contains_key(&id) {
            return;
        }
        let jobs = self.clone();
        let forgetting = self.tasks.spawn(async move {
            let stop = &jobs.context.stop;
            if stop.run_until_cancelled(tokio::time::sleep(KEEP)).await.is_some() {
                jobs.forget(id);
            }
        });
        table.forgetting.insert(id, forgetting.abort_handle());
    }

    /// Returns the job with this id, if it is in the table or in the history.
    pub async fn find(&self, id: u32) -> Result<Option<Arc<Job>>, Error> {
        if let Some(job) = self.lock().jobs.get(&id).cloned() {
            return Ok(Some(job));
        }
        let Some(record) = self.context.catalog.ended_job(id).await? else {
            return Ok(None);
        };
        let domain = record::identity(record.id, &record.domain)
            .map(|identity| self.context.domains.same_or_absent(identity))?;
        let mut job = Job::ended(&record, domain, self.context.catalog.clone())?;
        job.past = true;
        Ok(Some(Arc::new(job)))
    }

    /// Returns the running and the recently ended jobs by id.
    pub fn list(&self) -> Vec<Arc<Job>> {
        self.lock().jobs.values().cloned().collect()
    }

    /// Returns the jobs of the history by id, each with its domain. A domain that no longer exists is represented by a
    /// placeholder, the same one for all of its jobs.
    pub async fn history(&self) -> Result<Vec<(EndedJob, Arc<Domain>)>, Error> {
        let mut domains = HashMap::new();
        let mut jobs = Vec::new();
        for ended in self.context.catalog.history().await? {
            let domain = match domains.entry(ended.domain.clone()) {
                Entry::Occupied(entry) => Arc::clone(entry.get()),
                Entry::Vacant(entry) => match record::identity(ended.id, &ended.domain) {
                    Ok(identity) => Arc::clone(entry.insert(self.context.domains.same_or_absent(identity))),
                    Err(error) => {
                        tracing::error!(%error, "cannot read a job's record; the list omits the job");
                        continue;
                    }
                },
            };
            jobs.push((ended, domain));
        }
        Ok(jobs)
    }

    /// Reads all stores again and updates the catalog. Rescans run one at a time. With `adopt`, keep rules apply to all
    /// backups found, even if another service created them.
    pub async fn rescan(&self, adopt: bool) -> Result<Rescan, Error> {
        let _asked = self.asked_to_rescan.try_lock().map_err(|_| Error::Rescanning)?;
        let _turn = self.rescanning.lock().await;
        rescan::rescan(&self.context, adopt).await
    }

    /// Waits for the work that cannot be interrupted. QEMU continues to copy, and a later instance of the service
    /// resumes the jobs.
    pub async fn shut_down(&self) {
        self.closed.cancel();
        self.context.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    pub(super) fn insert(&self, job: Arc<Job>) {
        self.lock().jobs.insert(job.id, job);
    }

    fn forget_oldest(&self) {
        let ended: Vec<u32> = {
            let table = self.lock();
            let ended = table
                .jobs
                .values()
                .filter(|job| job.status.borrow().outcome.is_some());
            ended.map(|job| job.id).collect()
        };
        let surplus = ended.len().saturating_sub(KEEP_AT_MOST as usize);
        ended.into_iter().take(surplus).for_each(|id| self.forget(id));
    }

    fn forget(&self, id: u32) {
        let mut table = self.lock();
        table.jobs.remove(&id);
        if let Some(forgetting) = table.forgetting.remove(&id) {
            forgetting.abort();
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
