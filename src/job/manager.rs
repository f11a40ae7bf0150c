//! The jobs of the service: those that run, one a domain, and those that ended lately.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{Decision, DiskState, DiskStatus, Error, Job, State, Status, run};
use crate::domain::{Domain, Hold, Link};
use crate::plan::Plan;
use crate::quota::{Quota, Share};
use crate::target::Targets;

/// How long an ended job can still be asked about, and how many at most.
const KEEP: Duration = Duration::from_secs(600);
const KEEP_AT_MOST: usize = 100;

#[derive(Default)]
struct Table {
    /// Unique names of domains that have a backup under way or about to start. A domain that comes in place of another has
    /// its name, and may be the same machine.
    busy: HashSet<String>,
    jobs: BTreeMap<u32, Arc<Job>>,
    last_id: u32,
}

/// All jobs.
pub struct Jobs {
    table: Mutex<Table>,
    quota: Quota,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// The right to run the only backup of a domain; given back when it is dropped.
#[must_use]
pub struct Reservation {
    jobs: Arc<Jobs>,
    domain: String,
    _hold: Hold,
    _share: Share,
    /// Counts the caller's descriptors that the backup writes to.
    _descriptors: Arc<Share>,
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
    pub started_by: u32,
    /// The names of this backup: see [`Jobs::new_backup_id`].
    pub backup_id: String,
    pub start_time: Timestamp,
}

impl Jobs {
    /// `quota` counts the backups under way.
    pub fn new(quota: Quota) -> Arc<Self> {
        Arc::new(Self {
            quota,
            table: Mutex::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// A name for a backup that sorts by time and that no other backup has.
    pub fn new_backup_id(now: Timestamp) -> String {
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
        if self.stop.is_cancelled() {
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
            _share: share,
            _descriptors: descriptors,
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
            started_by,
            backup_id,
            start_time,
        } = start;
        let mut table = self.lock();
        table.last_id += 1;
        let job = Arc::new(Job {
            id: table.last_id,
            backup_id,
            domain,
            started_by,
            start_time,
            status: watch::Sender::new(first_status(&plan, &targets)),
            decision: Mutex::new(Decision::Open),
            cancel: CancellationToken::new(),
            speed: watch::Sender::new(plan.bandwidth),
            plan,
        });
        table.jobs.insert(job.id, job.clone());
        drop(table);
        if self.stop.is_cancelled() {
            // It was on its way when the others were cancelled.
            let _ = job.cancel();
        }
        let (jobs, running) = (self.clone(), job.clone());
        self.tasks.spawn(async move {
            run::run(&running, link, targets, reservation).await;
            jobs.forget_oldest();
            // An ended job is kept while somebody may ask for it, but it does not keep the service from stopping.
            let kept = jobs.stop.run_until_cancelled(tokio::time::sleep(KEEP)).await;
            if kept.is_some() {
                jobs.forget(running.id);
            }
        });
        job
    }

    pub fn get(&self, id: u32) -> Option<Arc<Job>> {
        self.lock().jobs.get(&id).cloned()
    }

    /// All jobs, by number.
    pub fn list(&self) -> Vec<Arc<Job>> {
        self.lock().jobs.values().cloned().collect()
    }

    /// Cancels what runs and waits until it has ended.
    pub async fn shut_down(&self) {
        self.stop.cancel();
        for job in self.list() {
            // One that cannot be cancelled any more is about to end.
            let _ = job.cancel();
        }
        self.tasks.close();
        self.tasks.wait().await;
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
        let surplus = ended.len().saturating_sub(KEEP_AT_MOST);
        ended.into_iter().take(surplus).for_each(|id| self.forget(id));
    }

    fn forget(&self, id: u32) {
        self.lock().jobs.remove(&id);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn first_status(plan: &Plan, targets: &Targets) -> Status {
    let disks = plan
        .disks
        .iter()
        .zip(targets.iter())
        .map(|(disk, target)| DiskStatus {
            name: disk.name.clone(),
            state: DiskState::Preparing,
            total: disk.virtual_size,
            done: 0,
            target: target.label.clone(),
        });
    Status {
        state: State::Preparing,
        disks: disks.collect(),
        rate: 0,
        expected_end: None,
        outcome: None,
    }
}
