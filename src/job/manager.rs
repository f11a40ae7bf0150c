//! The jobs of the service: those that run, one a domain, and those that ended lately.

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
use super::footprint::Footprint;
use super::generation::Generations;
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
use crate::target::Targets;

/// How long an ended job can still be asked about, and how many at most.
const KEEP: Duration = Duration::from_secs(600);
const KEEP_AT_MOST: u32 = 100;

pub(super) const ROOT: u32 = 0;

/// Why a domain cannot be backed up now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Another backup is under way, or comes first.
    Taken,
    /// QEMU still has something of that job, which has ended: its storage may hang, and a further command could freeze QEMU.
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

/// What every job works with.
pub(super) struct Setting {
    pub domains: Arc<Registry>,
    pub catalog: Catalog,
    pub deadlines: Deadlines,
    /// The boot of the host in which this process runs.
    pub boot: BootId,
    /// Ended jobs that the catalog keeps.
    pub history: u32,
    pub stores: BTreeMap<String, Store>,
    /// The service stops: what QEMU does goes on without it.
    pub stop: CancellationToken,
    /// Counts what the service must not leave before the end of.
    pub activity: Activity,
    /// Of that, what a restart of the service would end: it runs in processes of the service's own.
    pub at_stake: Activity,
    pub generations: Generations,
    /// Of the stores.
    pub bandwidth: Bandwidth,
}

/// How the work on a job ended.
pub(super) enum Ending {
    /// With its part of a store's bandwidth, if QEMU may still copy.
    Ended(Residue, Option<Part>),
    /// A later process of the service resumes it.
    Detached,
}

/// A job that has ended and left something.
struct Leftover {
    job: Arc<Job>,
    residue: Residue,
    /// Its part of a store's bandwidth is given back when this is dropped.
    _part: Option<DropGuard>,
}

pub(super) struct Table {
    /// The backups that run and those that wait.
    pub queue: Queue,
    /// Those who wait for the places.
    pub waiting: HashMap<Ticket, oneshot::Sender<Place>>,
    /// Of the jobs that wait or run.
    pub tickets: HashMap<u32, Ticket>,
    pub busy: Busy,
    /// What is still to be removed of ended jobs, by the unique name of the domain: one task each works on it, in order.
    sweeps: HashMap<String, VecDeque<Leftover>>,
    /// A task looks for backups that crawl while others wait.
    pub(super) is_watched: bool,
    jobs: BTreeMap<u32, Arc<Job>>,
    /// What will forget the ended ones in time; gone with them, so that nothing is left of one that is forgotten earlier.
    forgetting: HashMap<u32, AbortHandle>,
}

impl Table {
    /// The ended job that QEMU still has something of, by the unique name of its domain.
    fn left_in_qemu(&self, domain: &str) -> Option<u32> {
        let mut leftovers = self.sweeps.get(domain)?.iter();
        let left = leftovers.find(|leftover| leftover.residue.in_qemu)?;
        Some(left.job.id)
    }

    /// Whether that user's work on a domain may be the next one.
    pub fn check_place(&self, domain: &str, uid: u32) -> Result<(), Refused> {
        match self.left_in_qemu(domain) {
            Some(job) => Err(Refused::Left { job }),
            None if self.busy.lets_in(domain, uid) => Ok(()),
            None => Err(Refused::Taken),
        }
    }
}

/// All jobs.
pub struct Jobs {
    table: Mutex<Table>,
    pub(super) quota: Quota,
    /// Bytes on record of the queued ones.
    pub(super) queued: Quota,
    pub(super) setting: Setting,
    /// Callers that have the stores read again: one at a time.
    asked_to_rescan: tokio::sync::Mutex<()>,
    /// One reads a store again at a time, also without being asked.
    pub(super) rescanning: tokio::sync::Mutex<()>,
    pub(super) tasks: TaskTracker,
    /// No queued backup starts any more: the service is about to stop.
    pub(super) closed: CancellationToken,
    /// A domain's place, or what was left of a job in QEMU, is free.
    pub(super) freed: Notify,
}

/// The right to run the only backup of a domain; given back when it is dropped.
#[must_use]
pub struct Reservation {
    jobs: Arc<Jobs>,
    uid: u32,
    /// By their unique names: two where one was renamed while its backup waited, or between two processes of the service.
    domains: Vec<(String, Hold)>,
    /// Among the backups that run.
    ticket: Option<Ticket>,
    kept: Kept,
}

/// A user's shares of the jobs, and of the caller's descriptors that a backup writes to.
pub(super) type Shares = Arc<(Share, Option<Arc<Share>>)>;

/// What is counted from a call to the end of its backup.
pub(super) struct Kept {
    /// What a former process began counts for nobody.
    shares: Option<Shares>,
    /// The service does not leave before.
    _use: Use,
    /// The service does not stop before it is given back.
    _token: TaskTrackerToken,
}

impl Reservation {
    /// Of a domain that is the user's already.
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

    /// For work that may outlast the backup, on a thread that storage blocks.
    pub(super) fn shares(&self) -> Option<Shares> {
        self.kept.shares.clone()
    }

    /// Takes another domain's place too, whoever has it: it is the same VM, under the name that it has now.
    pub(super) fn add(&mut self, domain: &Arc<Domain>) {
        let name = domain.unique_name();
        if !self.has(&name) {
            self.jobs.lock().busy.begin(&name, self.uid);
            self.domains.push((name, domain.hold()));
        }
    }

    /// The same, unless other work on the domain is under way, or comes first.
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

/// What is kept for a job that is being prepared.
pub trait Held: Send + 'static {
    /// Lets others have what the job would have been alone with; what counts for its user stays.
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

/// What an earlier process of the service left.
#[derive(Default)]
pub struct Recovered {
    pub jobs: Vec<Arc<Job>>,
    /// Those of them that wait for their places.
    pub queued: Vec<Requeued>,
}

/// All that a job needs to start.
pub struct Start {
    pub reservation: Reservation,
    pub domain: Arc<Domain>,
    pub link: Arc<Link>,
    pub plan: Plan,
    pub targets: Targets,
    pub record: JobRecord,
}

impl Jobs {
    /// The jobs of `domains`, none of them known yet: see [`Jobs::recover`].
    /// `activity` counts those that run, and what is still to be done of those that have ended.
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
                sweeps: HashMap::new(),
                is_watched: false,
                jobs: BTreeMap::new(),
                forgetting: HashMap::new(),
            }),
            closed: CancellationToken::new(),
            asked_to_rescan: tokio::sync::Mutex::default(),
            rescanning: tokio::sync::Mutex::default(),
            setting: Setting {
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
        jobs.setting.domains.set_greeter(greeter);
        jobs
    }

    /// Thaws what a former process of the service may have left frozen; does not wait for it. Before all else that is done.
    pub async fn thaw(self: &Arc<Self>) -> Result<(), Error> {
        for record in self.setting.catalog.unsettled().await?.into_iter().flatten() {
            let jobs = self.clone();
            self.tasks
                .spawn(async move { backup::thaw(record, &jobs.setting).await });
        }
        Ok(())
    }

    /// Takes up the jobs that an earlier process of the service left, which are returned, and those that ended lately. A job
    /// whose record cannot be read is logged, and stays as it is: a service of another version may be able to.
    pub async fn recover(self: &Arc<Self>) -> Result<Recovered, Error> {
        let keep = SignedDuration::try_from(KEEP).unwrap_or(SignedDuration::ZERO);
        let since = clock::now().checked_sub(keep).unwrap_or(Timestamp::MIN);
        for record in self.setting.catalog.ended_since(since, KEEP_AT_MOST).await? {
            match self.ended(&record) {
                Ok(job) => {
                    self.lock().jobs.insert(job.id, Arc::new(job));
                    self.forget_later(record.id);
                }
                Err(error) => tracing::error!(%error, "a job is left out of the list"),
            }
        }
        let mut resumed = Recovered::default();
        for record in self.setting.catalog.unsettled().await? {
            let recovered = match record {
                Ok(record) => self.recover_one(record, &mut resumed).await,
                Err(error) => Err(error.into()),
            };
            match recovered {
                Ok(()) => {}
                Err(error) => tracing::error!(%error, "a job is not recovered"),
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
            let of_state = record::read_journal(&record).map(|(_, state)| Residue::of(&state));
            let residue = Residue {
                in_qemu: record.left_in_qemu,
                on_disk: record.left_on_disk,
                ..of_state.unwrap_or_default()
            };
            let job = Arc::new(self.ended(&record)?);
            self.sweep(Leftover {
                job,
                residue,
                _part: None,
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
        let domain = self.setting.domains.identified_or_absent(identity);
        Job::ended(record, domain, self.setting.catalog.clone())
    }

    /// Has removed what may be left of an ended job. For one domain it is done in one task, in order.
    fn sweep(self: &Arc<Self>, leftover: Leftover) {
        if !leftover.residue.in_qemu && !leftover.residue.on_disk {
            return;
        }
        let domain = leftover.job.domain.unique_name();
        let mut table = self.lock();
        let queue = table.sweeps.entry(domain.clone()).or_default();
        queue.push_back(leftover);
        if queue.len() > 1 {
            return;
        }
        drop(table);
        let jobs = self.clone();
        self.tasks.spawn(async move {
            while let Some((job, residue)) = jobs.to_sweep(&domain) {
                backup::sweep(&job, residue, &jobs.setting).await;
                if let Some(queue) = jobs.lock().sweeps.get_mut(&domain) {
                    queue.pop_front();
                }
                jobs.freed.notify_waiters();
            }
        });
    }

    /// The next one; the first in the queue is being worked on.
    fn to_sweep(&self, domain: &str) -> Option<(Arc<Job>, Residue)> {
        let mut table = self.lock();
        let next = table.sweeps.get(domain).and_then(|queue| queue.front());
        let next = next.map(|leftover| (leftover.job.clone(), leftover.residue));
        if next.is_none() || self.setting.stop.is_cancelled() {
            table.sweeps.remove(domain);
            return None;
        }
        next
    }

    fn resume(self: &Arc<Self>, record: JobRecord) -> Result<Arc<Job>, Error> {
        let identity = record::identity(record.id, &record.domain)?;
        let domain = self.setting.domains.identified_or_absent(identity);
        let plan = record::plan(&record)?;
        let journal = record::read_journal(&record)?;
        // It runs, whether there is a place or not.
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
            self.setting.catalog.clone(),
            true,
        ));
        let (boot, state) = &journal;
        // Before another backup begins.
        let part =
            (*boot == self.setting.boot && state.may_copy()).then(|| self.setting.bandwidth.resume(&job));
        let mut table = self.lock();
        table.jobs.insert(job.id, job.clone());
        drop(table);
        let (jobs, resumed) = (self.clone(), job.clone());
        self.tasks.spawn(async move {
            let has = (reservation, part);
            let ending = backup::resume(&job, &record, journal, has, &jobs.setting).await;
            jobs.after(&job, ending).await;
        });
        Ok(resumed)
    }

    /// Takes a backup in that is about to be made. Nothing of it exists before.
    pub async fn begin(
        &self,
        domain: &Domain,
        plan: &Plan,
        started_by: Starter,
        start_time: Timestamp,
    ) -> Result<JobRecord, Error> {
        let state = record::journal(&backup::State::Preparing, self.setting.boot)?;
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
        let record = self.setting.catalog.begin(new).await?;
        fault::passed("recorded");
        Ok(record)
    }

    /// Forgets a job that came to nothing while its targets were being made.
    async fn withdraw(&self, id: u32) {
        if let Err(error) = self.setting.catalog.withdraw(id).await {
            tracing::warn!(job = id, %error, "a job that never began is still on record");
        }
    }

    /// Has the service stay for as long as the result is kept.
    pub fn need_service(&self) -> Use {
        self.setting.activity.begin()
    }

    /// Counts what a restart of the service would end: restores, exports, verifications, merges, deletions. Backups go on
    /// over a restart.
    pub fn at_stake(&self) -> &Activity {
        &self.setting.at_stake
    }

    /// Does something with a store that may wait for its storage.
    pub async fn in_store<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Progress) -> T + Send + 'static,
    ) -> Result<T, Error> {
        watched(&self.setting, "the store", work).await
    }

    /// How long a domain that was connected before is waited for.
    pub fn reconnect_patience(&self) -> Duration {
        self.setting.deadlines.reconnect()
    }

    /// How long what makes no progress is waited for.
    pub fn patience(&self) -> Duration {
        self.setting.deadlines.stall()
    }

    /// Waits for the targets of a job that is on record, and keeps what is `held` for it until they are there or gone. A job
    /// that comes to nothing here is withdrawn, if need be later: the thread that prepares the targets may hang.
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

    /// Leaves a thread that hangs while it prepares targets to itself: what it makes is discarded there. Then the record of the
    /// job is `withdrawn`, if that is not its end.
    pub(super) fn abandon<T: Send + 'static>(
        self: &Arc<Self>,
        targets: JoinHandle<error::Result<T>>,
        mut held: impl Held,
        withdrawn: Option<u32>,
    ) {
        // Nothing of it is in QEMU.
        held.make_room();
        let jobs = self.clone();
        self.tasks.spawn(async move {
            let discarded = async {
                // This can wait for storage, too.
                if let Ok(made) = targets.await {
                    blocking(&jobs.setting, move || drop(made)).await;
                }
                if let Some(id) = withdrawn {
                    jobs.withdraw(id).await;
                }
            };
            // Otherwise the next process finds the record, and does it.
            jobs.setting.stop.run_until_cancelled(discarded).await;
            drop(held);
        });
    }

    /// What the thread that prepares the targets came to; nothing if it hangs.
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

    /// A name for a backup, or a checkpoint, that sorts by time and that no other has.
    pub(super) fn new_backup_id(now: Timestamp) -> String {
        let unique = uuid::Uuid::new_v4().simple().to_string();
        format!("{}-{}", now.strftime("%Y%m%dT%H%M%SZ"), &unique[..8])
    }

    /// Takes the domain's only place, for a user and with the descriptors that it passed; says at once if it is taken.
    pub fn reserve(
        self: &Arc<Self>,
        domain: &Arc<Domain>,
        uid: u32,
        descriptors: Arc<Share>,
    ) -> Result<Reservation, Error> {
        // First, so that a stop that is not seen here waits for it.
        let token = self.tasks.token();
        if self.setting.stop.is_cancelled() {
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
            _use: self.setting.activity.begin(),
            _token: token,
        }
    }

    /// Lets others have these domains, and the place of a backup that ran.
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

    /// The ended job that QEMU still has something of, by the unique name of its domain.
    pub(super) fn left_in_qemu(&self, domain: &str) -> Option<u32> {
        self.lock().left_in_qemu(domain)
    }

    /// Whether a job works on the domain, or on its checkpoints.
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
            self.setting.catalog.clone(),
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
        let mut driver = backup::Driver::new(job, &self.setting);
        driver.footprint = Some(Footprint::of(job, job.domain.clone(), link, &self.setting));
        let files = targets.files();
        driver.targets = Some(targets);
        // Before anything is changed.
        let fact = match quiesce::check(&job.domain, job.plan.quiesce).await {
            Ok(()) => backup::Fact::Prepared { files },
            Err(error) => backup::Fact::Stopped(driver.verdict(error.into())),
        };
        driver
            .drive(backup::State::Preparing, fact, Some(reservation))
            .await
    }

    /// What is to be done when the work on a job has ended.
    pub(super) async fn after(self: &Arc<Self>, job: &Arc<Job>, ending: Ending) {
        let is_queued = job.is_queued();
        let (residue, part) = match ending {
            Ending::Ended(residue, part) => (residue, part),
            Ending::Detached => {
                let (job, domain) = (job.id, &job.domain.name);
                match is_queued {
                    true => tracing::info!(job, domain, "the backup stays queued"),
                    false => tracing::info!(job, domain, "the backup goes on without the service"),
                }
                return;
            }
        };
        self.forget_oldest();
        self.forget_later(job.id);
        // What hangs is removed by the thread that it hangs in, or by the next process.
        let residue = Residue {
            on_disk: false,
            ..residue
        };
        self.sweep(Leftover {
            job: job.clone(),
            residue,
            _part: part
                .filter(|_| residue.in_qemu)
                .map(|part| self.give_back_later(part)),
        });
    }

    /// Gives a part of a store's bandwidth back when the guard is dropped, or when QEMU has had the time in which everything
    /// must make progress: one that never stops must not slow the others down for ever.
    fn give_back_later(&self, part: Part) -> DropGuard {
        let over = CancellationToken::new();
        let guard = over.clone().drop_guard();
        let (stop, patience) = (self.setting.stop.clone(), self.patience());
        self.tasks.spawn(async move {
            let over = tokio::time::timeout(patience, over.cancelled());
            stop.run_until_cancelled(over).await;
            drop(part);
        });
        guard
    }

    /// An ended job is kept while somebody may ask for it, but it does not keep the service from stopping.
    fn forget_later(self: &Arc<Self>, id: u32) {
        let mut table = self.lock();
        // Others that ended meanwhile may have had it forgotten.
        if !table.jobs.contains_key(&id) {
            return;
        }
        let jobs = self.clone();
        let forgetting = self.tasks.spawn(async move {
            let stop = &jobs.setting.stop;
            if stop.run_until_cancelled(tokio::time::sleep(KEEP)).await.is_some() {
                jobs.forget(id);
            }
        });
        table.forgetting.insert(id, forgetting.abort_handle());
    }

    /// The job of that number, as long as the history goes back.
    pub async fn find(&self, id: u32) -> Result<Option<Arc<Job>>, Error> {
        if let Some(job) = self.lock().jobs.get(&id).cloned() {
            return Ok(Some(job));
        }
        let Some(record) = self.setting.catalog.ended_job(id).await? else {
            return Ok(None);
        };
        let domain = record::identity(record.id, &record.domain)
            .map(|identity| self.setting.domains.same_or_absent(identity))?;
        let mut job = Job::ended(&record, domain, self.setting.catalog.clone())?;
        job.past = true;
        Ok(Some(Arc::new(job)))
    }

    /// The jobs that run or ended lately, by number.
    pub fn list(&self) -> Vec<Arc<Job>> {
        self.lock().jobs.values().cloned().collect()
    }

    /// The jobs that have ended, by number, as long as the history goes back; and the domain of each, or what stands for it:
    /// the same one for all that are of the same.
    pub async fn history(&self) -> Result<Vec<(EndedJob, Arc<Domain>)>, Error> {
        let mut domains = HashMap::new();
        let mut jobs = Vec::new();
        for ended in self.setting.catalog.history().await? {
            let domain = match domains.entry(ended.domain.clone()) {
                Entry::Occupied(entry) => Arc::clone(entry.get()),
                Entry::Vacant(entry) => match record::identity(ended.id, &ended.domain) {
                    Ok(identity) => Arc::clone(entry.insert(self.setting.domains.same_or_absent(identity))),
                    Err(error) => {
                        tracing::error!(%error, "a job is left out of the list");
                        continue;
                    }
                },
            };
            jobs.push((ended, domain));
        }
        Ok(jobs)
    }

    /// Makes the records of the backups in the stores those that the stores have. One at a time.
    /// `adopt` has keep rules apply to all of them, whichever service made them.
    pub async fn rescan(&self, adopt: bool) -> Result<Rescan, Error> {
        let _asked = self.asked_to_rescan.try_lock().map_err(|_| Error::Rescanning)?;
        let _turn = self.rescanning.lock().await;
        rescan::rescan(&self.setting, adopt).await
    }

    /// Waits until what cannot be left has ended. What QEMU copies goes on there, and a later process of the service goes on
    /// with it.
    pub async fn shut_down(&self) {
        self.closed.cancel();
        self.setting.stop.cancel();
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
