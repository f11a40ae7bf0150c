//! The jobs of the service: those that run, one a domain, and those that ended lately.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::conclude::End;
use super::error::Stopped;
use super::record::{self, Left, to_text};
use super::rescan::{self, Rescan};
use super::run::blocking;
use super::{Error, Job, recover, run};
use crate::activity::{Activity, Use};
use crate::catalog::{Catalog, EndedJob, JobRecord, NewJob, Step};
use crate::config::{Config, Deadlines, Store};
use crate::domain::{Domain, Hold, Identity, Link, Registry};
use crate::fault::{self, Point};
use crate::plan::{Plan, Task};
use crate::quota::{Quota, Share};
use crate::target::Targets;

/// How long an ended job can still be asked about, and how many at most.
const KEEP: Duration = Duration::from_secs(600);
const KEEP_AT_MOST: u32 = 100;

/// What every job works with.
pub(super) struct Setting {
    pub domains: Arc<Registry>,
    pub catalog: Catalog,
    pub deadlines: Deadlines,
    /// Ended jobs that the catalog keeps.
    pub history: u32,
    pub stores: BTreeMap<String, Store>,
    /// The service stops: what QEMU does goes on without it.
    pub stop: CancellationToken,
    /// Counts what the service must not leave before the end of.
    pub activity: Activity,
}

/// How the work on a job ended.
pub(super) enum Ending {
    Ended(Left),
    /// A later process of the service goes on with it.
    Left,
}

#[derive(Default)]
struct Table {
    /// Unique names of domains that have a backup under way or about to start. A domain that comes in place of another has
    /// its name, and may be the same machine.
    busy: HashSet<String>,
    jobs: BTreeMap<u32, Arc<Job>>,
    /// What will forget the ended ones in time; gone with them, so that nothing is left of one that is forgotten earlier.
    forgetting: HashMap<u32, AbortHandle>,
}

/// All jobs.
pub struct Jobs {
    table: Mutex<Table>,
    pub(super) quota: Quota,
    pub(super) setting: Setting,
    rescanning: tokio::sync::Mutex<()>,
    pub(super) tasks: TaskTracker,
}

/// The right to run the only backup of a domain; given back when it is dropped.
#[must_use]
pub struct Reservation {
    jobs: Arc<Jobs>,
    domain: String,
    _hold: Hold,
    /// Of jobs, and of the caller's descriptors that the backup writes to. What a former process began counts for nobody.
    _shares: Option<(Share, Arc<Share>)>,
    /// The service does not leave while a backup runs.
    _use: Use,
    /// The service does not stop before it is given back.
    _token: TaskTrackerToken,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.jobs.lock().busy.remove(&self.domain);
    }
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
    pub fn new(domains: Arc<Registry>, catalog: Catalog, config: &Config, activity: Activity) -> Arc<Self> {
        Arc::new(Self {
            quota: config.limits.of_jobs(),
            table: Mutex::default(),
            rescanning: tokio::sync::Mutex::default(),
            setting: Setting {
                domains,
                catalog,
                deadlines: config.deadlines,
                history: config.limits.history,
                stores: config.stores.clone(),
                stop: CancellationToken::new(),
                activity,
            },
            tasks: TaskTracker::new(),
        })
    }

    /// Thaws what a former process of the service may have left frozen; does not wait for it. Before all else that is done.
    pub async fn thaw(self: &Arc<Self>) -> Result<(), Error> {
        for record in self.setting.catalog.unsettled().await? {
            let jobs = self.clone();
            self.tasks
                .spawn(async move { recover::thaw(record, &jobs.setting).await });
        }
        Ok(())
    }

    /// Takes up the jobs that a former process of the service left, which it gives, and those that ended lately.
    pub async fn recover(self: &Arc<Self>) -> Result<Vec<Arc<Job>>, Error> {
        let keep = SignedDuration::try_from(KEEP).unwrap_or(SignedDuration::ZERO);
        let since = Timestamp::now().checked_sub(keep).unwrap_or(Timestamp::MIN);
        for record in self.setting.catalog.ended_since(since, KEEP_AT_MOST).await? {
            let identity = record::identity(record.id, &record.domain)?;
            let job = Arc::new(self.ended(&record, identity)?);
            self.lock().jobs.insert(job.id, job.clone());
            self.forget_later(job.id);
        }
        let mut resumed = Vec::new();
        for record in self.setting.catalog.unsettled().await? {
            let identity = record::identity(record.id, &record.domain)?;
            match record.step {
                Step::Ended => self.sweep(record, identity)?,
                _ if record::plan(&record)?.task != Task::Backup => {
                    let job = self.end_lost(&record, identity).await?;
                    self.forget_later(job.id);
                    resumed.push(job);
                }
                _ => resumed.push(self.resume(record, identity)?),
            }
        }
        Ok(resumed)
    }

    fn ended(&self, record: &JobRecord, identity: Identity) -> Result<Job, Error> {
        let domain = self.setting.domains.identified_or_absent(identity);
        Job::ended(record, domain, self.setting.catalog.clone())
    }

    fn sweep(self: &Arc<Self>, record: JobRecord, identity: Identity) -> Result<(), Error> {
        let job = Arc::new(self.ended(&record, identity.clone())?);
        let left = Left {
            in_qemu: record.left_in_qemu,
            on_disk: record.left_on_disk,
            holds_poweroff: record.holds_poweroff,
        };
        let jobs = self.clone();
        self.tasks
            .spawn(async move { recover::sweep(record.id, identity, left, job, &jobs.setting).await });
        Ok(())
    }

    fn resume(self: &Arc<Self>, record: JobRecord, identity: Identity) -> Result<Arc<Job>, Error> {
        let domain = self.setting.domains.identified_or_absent(identity);
        let plan = record::plan(&record)?;
        let reservation = Reservation {
            jobs: self.clone(),
            domain: domain.unique_name(),
            _hold: domain.hold(),
            _shares: None,
            _use: self.setting.activity.begin(),
            _token: self.tasks.token(),
        };
        let job = Arc::new(Job::new(&record, domain, plan, self.setting.catalog.clone()));
        let mut table = self.lock();
        table.busy.insert(reservation.domain.clone());
        table.jobs.insert(job.id, job.clone());
        drop(table);
        let (jobs, resumed) = (self.clone(), job.clone());
        self.tasks.spawn(async move {
            let ending = recover::resume(&job, &record, reservation, &jobs.setting).await;
            jobs.after(&job, ending).await;
        });
        Ok(resumed)
    }

    /// Takes a backup in that is about to be made. Nothing of it exists before.
    pub async fn begin(
        &self,
        domain: &Domain,
        plan: &Plan,
        started_by: u32,
        start_time: Timestamp,
    ) -> Result<JobRecord, Error> {
        let new = NewJob {
            backup_id: Self::new_backup_id(start_time),
            domain: record::domain_record(domain.identity()),
            started_by,
            start_time,
            plan: to_text(plan)?,
            speed: plan.bandwidth,
        };
        let record = self.setting.catalog.begin(new).await?;
        fault::point(Point::Recorded);
        Ok(record)
    }

    /// Forgets a backup that came to nothing while its places were being made.
    pub async fn withdraw(&self, id: u32) {
        if let Err(error) = self.setting.catalog.withdraw(id).await {
            tracing::warn!(job = id, %error, "a job that never began is still on record");
        }
    }

    /// Has the service stay for as long as the result is kept.
    pub fn need_service(&self) -> Use {
        self.setting.activity.begin()
    }

    /// How long places may take to be made.
    pub fn patience(&self) -> Duration {
        self.setting.deadlines.stall()
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
        if !self.lock().busy.insert(domain.unique_name()) {
            return Err(Error::Busy {
                domain: domain.name.clone(),
            });
        }
        Ok(Reservation {
            jobs: self.clone(),
            domain: domain.unique_name(),
            _hold: domain.hold(),
            _shares: Some((share, descriptors)),
            _use: self.setting.activity.begin(),
            _token: token,
        })
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
        let job = Arc::new(Job::new(&record, domain, plan, self.setting.catalog.clone()));
        self.lock().jobs.insert(job.id, job.clone());
        let (jobs, running) = (self.clone(), job.clone());
        self.tasks.spawn(async move {
            let ending = jobs.run(&running, link, targets, reservation).await;
            jobs.after(&running, ending).await;
        });
        job
    }

    async fn run(
        &self,
        job: &Arc<Job>,
        link: Arc<Link>,
        targets: Targets,
        reservation: Reservation,
    ) -> Ending {
        let made = run::make(job, link, targets, &self.setting).await;
        if let Err(Stopped::Left) = made.judged {
            if let Some(targets) = made.targets {
                blocking(&self.setting, move || drop(targets.leave())).await;
            }
            return Ending::Left;
        }
        let end = End {
            job,
            setting: &self.setting,
            footprint: Some(made.footprint),
            targets: made.targets,
            step: Step::Preparing,
            unknown: false,
        };
        Ending::Ended(end.conclude(made.judged, reservation).await)
    }

    /// What is to be done when the work on a job has ended.
    pub(super) async fn after(self: &Arc<Self>, job: &Arc<Job>, ending: Ending) {
        let left = match ending {
            Ending::Ended(left) => left,
            Ending::Left => {
                tracing::info!(
                    job = job.id,
                    domain = job.domain.name,
                    "the backup goes on in QEMU"
                );
                return;
            }
        };
        self.forget_oldest();
        self.forget_later(job.id);
        // What hangs with who works on it, that one removes.
        let left = Left {
            on_disk: false,
            ..left
        };
        recover::sweep(job.id, job.domain.identity(), left, job.clone(), &self.setting).await;
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
        let job = Job::ended(&record, domain, self.setting.catalog.clone())?;
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
    pub async fn rescan(&self) -> Result<Rescan, Error> {
        let _turn = self.rescanning.try_lock().map_err(|_| Error::Rescanning)?;
        rescan::rescan(&self.setting).await
    }

    /// Waits until what cannot be left has ended. What QEMU copies goes on there, and a later process of the service goes on
    /// with it.
    pub async fn shut_down(&self) {
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

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
