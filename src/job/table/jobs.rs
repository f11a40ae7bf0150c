//! The table of the service's jobs: the queued and the running ones, and the recently ended ones.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{Notify, oneshot};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::busy::Busy;
use super::queue::{Claim, Places, Queue, Ticket};
use crate::activity::{Activity, Use};
use crate::catalog::Catalog;
use crate::config::Config;
use crate::domain::{Domain, Registry};
use crate::job::bandwidth::Bandwidth;
use crate::job::boot::BootId;
use crate::job::context::{JobContext, watched};
use crate::job::ending::Uncleaned;
use crate::job::generation::Generations;
use crate::job::{Error, Job};
use crate::offload::Progress;
use crate::quota::Quota;

/// The reason why no backup of a domain can start now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::job) enum Refused {
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

pub(in crate::job) struct Table {
    /// The running and the waiting backups.
    pub queue: Queue,
    /// The tasks that wait for a place.
    pub waiting: HashMap<Ticket, oneshot::Sender<Place>>,
    /// The tickets of the running and the waiting jobs, by job id.
    pub tickets: HashMap<u32, Ticket>,
    pub busy: Busy,
    /// The residue to remove, by the unique name of the domain. One task for each domain removes it in order.
    pub cleanups: HashMap<String, VecDeque<Uncleaned>>,
    /// A task watches for crawling backups while others wait.
    pub(in crate::job) is_watched: bool,
    pub jobs: BTreeMap<u32, Arc<Job>>,
    /// The expiry timers of ended jobs. Each is removed together with its job.
    pub forgetting: HashMap<u32, AbortHandle>,
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
    pub(in crate::job) quota: Quota,
    /// Bytes that the records of queued jobs take in the catalog.
    pub(in crate::job) queued: Quota,
    pub(in crate::job) context: JobContext,
    /// Held by the caller that requested a rescan; a second request fails.
    pub(in crate::job) asked_to_rescan: tokio::sync::Mutex<()>,
    /// Serialises all rescans, including those that the service starts itself.
    pub(in crate::job) rescanning: tokio::sync::Mutex<()>,
    pub(in crate::job) tasks: TaskTracker,
    /// Queued backups no longer start, because the service is about to stop.
    pub(in crate::job) closed: CancellationToken,
    /// Signals that a domain is free, or that a job's residue in QEMU is removed.
    pub(in crate::job) freed: Notify,
}

/// The right to run: the domain, and a place. Dropping it frees both.
pub(in crate::job) struct Place {
    pub(in crate::job) jobs: Arc<Jobs>,
    /// `None` after a reservation has taken it over.
    pub(in crate::job) held: Option<(Ticket, Claim)>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some((ticket, claim)) = self.held.take() {
            let domain = std::iter::once(claim.domain.as_str());
            self.jobs.give_back(domain, claim.uid, Some(ticket));
        }
    }
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
        let on_connect: Weak<Self> = Arc::downgrade(&jobs);
        jobs.context.domains.set_on_connect(on_connect);
        jobs
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

    /// Returns a unique id for a backup or a checkpoint. Ids sort by time.
    pub(in crate::job) fn new_backup_id(now: Timestamp) -> String {
        let unique = uuid::Uuid::new_v4().simple().to_string();
        format!("{}-{}", now.strftime("%Y%m%dT%H%M%SZ"), &unique[..8])
    }

    /// Returns the ended job that still has objects in the QEMU of the domain with this unique name.
    pub(in crate::job) fn left_in_qemu(&self, domain: &str) -> Option<u32> {
        self.lock().left_in_qemu(domain)
    }

    /// Returns whether a job works on the domain or on its checkpoints.
    pub(in crate::job) fn is_busy(&self, domain: &Domain) -> bool {
        self.lock().busy.contains(&domain.unique_name())
    }

    /// Returns the running and the recently ended jobs by id.
    pub fn list(&self) -> Vec<Arc<Job>> {
        self.lock().jobs.values().cloned().collect()
    }

    /// Waits for the work that cannot be interrupted. QEMU continues to copy, and a later instance of the service
    /// resumes the jobs.
    pub async fn shut_down(&self) {
        self.closed.cancel();
        self.context.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    pub(in crate::job) fn insert(&self, job: Arc<Job>) {
        self.lock().jobs.insert(job.id, job);
    }

    pub(in crate::job) fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
