//! The state machine that runs a plan: one job a backup, from the targets' preparation in QEMU to their publication.
//!
//! Owns its objects in QEMU and leaves no residue. Every step that must survive is in the catalog before the next one
//! begins, so that a later process of the service can resume. Must not know permissions or signals.

mod backup;
mod bandwidth;
mod boot;
mod busy;
mod chain;
mod checkpoints;
mod directory;
mod displace;
mod error;
mod footprint;
mod generation;
mod guard;
mod latency;
mod manager;
mod mark;
mod outcome;
mod progress;
mod queue;
mod queued;
mod quiesce;
mod record;
mod release;
mod rescan;
mod running;
mod scan;
mod sentinel;
mod settled;
mod speed;
mod stall;
mod status;
mod stored;
mod track;
mod writeback;
mod zeroes;

pub use boot::current as current_boot;
pub use checkpoints::{Checkpoint, definition as checkpoint_definition, named};
pub use displace::Displaced;
pub use error::Error;
pub use guard::watch as watch_frozen_guest;
pub use latency::can_follow_latency;
pub use manager::{Jobs, Recovered, Reservation, Start};
pub use queue::Claim;
pub use queued::{Entered, InLine, Making, Planned, QueuedRequest, Requeued};
pub use rescan::Rescan;
pub use status::{DiskState, DiskStatus, Outcome, State, Status};
pub use stored::{Served, Turn, Work};

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use manager::Setting;
use outcome::{outcome, show_ended};
use settled::Settled;
use speed::Speed;

use crate::catalog::{Catalog, Starter};
use crate::domain::Domain;
use crate::fault;
use crate::offload::{self, Progress};
use crate::plan::{Destination, Plan, Task};

/// How long somebody who looked is taken to be looking.
const ATTENTION: Duration = Duration::from_secs(5);
/// How old what is shown may be, and how long what is newer is waited for.
const FRESH: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_millis(300);

/// How far a job's end is decided. Cancelling is possible up to the point where the images get their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    /// A process that recovers the job has not looked yet whether it is published.
    Recovering,
    Open,
    CancelRequested,
    Publishing,
    Published,
    /// It took too long: whatever comes of it is taken back.
    GivenUp,
}

/// One backup that is under way or has ended; or what is done with stored ones.
#[derive(Debug)]
pub struct Job {
    pub id: u32,
    /// The backup's name in a store.
    pub backup_id: String,
    /// Found anew when the job leaves the queue.
    pub domain: Settled<Arc<Domain>>,
    /// The domain's, as it was when the job started.
    domain_uuid: Option<Uuid>,
    /// The user that started it.
    pub started_by: Starter,
    /// It was found in a store: who started it is as the store says, and gives nobody a right.
    imported: bool,
    /// It ended long ago.
    past: bool,
    pub start_time: Timestamp,
    /// Made anew when the job leaves the queue.
    pub plan: Settled<Plan>,
    status: watch::Sender<Status>,
    decision: Mutex<Decision>,
    cancel: CancellationToken,
    /// By this process of the service; for a job that was queued, from when it left the queue.
    taken_up: Settled<Instant>,
    /// The connection that started it has left the bus, or was one of an earlier process's.
    is_orphan: AtomicBool,
    speed: Speed,
    /// When somebody looked last, and when QEMU was asked last.
    looks: watch::Sender<Option<Instant>>,
    asked: watch::Sender<Option<Instant>>,
    catalog: Catalog,
}

impl Job {
    /// Whether it is that user's own. A number alone is no identity for ever: another user may have it by now.
    pub fn is_of(&self, user: &Starter) -> bool {
        if self.imported || self.past {
            return false;
        }
        let has_ended = self.status.borrow().outcome.is_some();
        self.started_by.is_same(user, has_ended)
    }

    /// What is known now; answers at once.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Tells of every change. The last one has an outcome.
    pub fn statuses(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// The document with all defaults filled in. Only a backup has one.
    pub fn definition(&self) -> Result<String, Error> {
        match self.plan.task.stored() {
            None => Ok(self.plan.definition().to_xml()),
            Some(_) => Err(Error::NoDefinition { id: self.id }),
        }
    }

    /// Asks for the end of the whole backup and returns without waiting for it. What was accepted here never ends as
    /// completed, whatever becomes of the service.
    pub async fn cancel(&self) -> Result<(), Error> {
        self.decide_to_cancel(None)?;
        self.record_cancel().await;
        Ok(())
    }

    /// The same for another backup. If it is cancelled already, that is not why.
    pub(super) async fn cancel_because(&self, why: Displaced) -> Result<(), Error> {
        self.decide_to_cancel(Some(why))?;
        self.record_cancel().await;
        Ok(())
    }

    async fn record_cancel(&self) {
        if let Err(error) = self.catalog.cancel_requested(self.id).await {
            tracing::error!(job = self.id, %error, "that the job is cancelled is not on record");
        }
        fault::passed("cancel requested");
    }

    fn decide_to_cancel(&self, why: Option<Displaced>) -> Result<(), Error> {
        let mut decision = self.decision();
        let outcome = self.status.borrow().outcome.clone();
        match (&outcome, *decision) {
            (Some(Outcome::Cancelled), _) | (None, Decision::CancelRequested) => Ok(()),
            (Some(outcome), _) => Err(Error::Ended {
                id: self.id,
                outcome: outcome.as_str(),
            }),
            (None, Decision::Publishing | Decision::Published | Decision::GivenUp) => {
                Err(Error::TooLate { id: self.id })
            }
            (None, Decision::Recovering) => Err(Error::Recovering { id: self.id }),
            (None, Decision::Open) => {
                *decision = Decision::CancelRequested;
                if why.is_some() {
                    self.update(|status| status.displaced = why);
                }
                self.cancel.cancel();
                Ok(())
            }
        }
    }

    /// Asks for the end of one disk's block job, and so of the whole backup: disks stand or fall together.
    pub async fn cancel_disk(&self, disk: &str) -> Result<(), Error> {
        if !self.plan.disks.iter().any(|planned| planned.name == disk) {
            return Err(Error::NoSuchDisk {
                id: self.id,
                disk: disk.to_owned(),
            });
        }
        self.cancel().await
    }

    /// Changes the limit of the running backup; `bytes_per_second` is for all disks together, 0 is unlimited.
    pub async fn set_speed(&self, bytes_per_second: u64) -> Result<(), Error> {
        if self.plan.task != Task::Backup {
            return Err(Error::NoSpeed { id: self.id });
        }
        if let Some(outcome) = &self.status.borrow().outcome {
            return Err(Error::Ended {
                id: self.id,
                outcome: outcome.as_str(),
            });
        }
        self.speed.set_own(bytes_per_second);
        if let Err(error) = self.catalog.speed_set(self.id, bytes_per_second).await {
            tracing::warn!(job = self.id, %error, "the job's limit is not on record");
        }
        Ok(())
    }

    /// The id of the backup that it makes in a store, or reads from one; empty where it makes one elsewhere.
    pub fn backup(&self) -> &str {
        match (self.plan.task.stored(), &self.plan.destination) {
            (Some(stored), _) => &stored.id,
            (None, Destination::Store { .. }) => &self.backup_id,
            (None, Destination::Caller) => "",
        }
    }

    /// Takes notice of somebody who hears of every change.
    pub fn look_on(&self) {
        self.looks.send_replace(Some(Instant::now()));
    }

    /// Takes notice of somebody who looks, and sees to it that there is something to be seen.
    pub async fn look(&self) {
        self.look_on();
        let fresh = |asked: &Option<Instant>| asked.is_some_and(|asked| asked.elapsed() < FRESH);
        if self.status.borrow().state == State::Running && self.status.borrow().outcome.is_none() {
            // A QEMU that is slow to answer does not make who looks wait.
            let _ = tokio::time::timeout(SOON, self.asked.subscribe().wait_for(fresh)).await;
        }
    }

    fn is_looked_at(&self) -> bool {
        self.looks.borrow().is_some_and(|look| look.elapsed() < ATTENTION)
    }

    /// Waits until the backup has begun, that is, until its point in time is past; for at most `patience`. Fails with what
    /// prevented it.
    pub async fn begun(&self, patience: Duration) -> crate::error::Result<()> {
        let mut statuses = self.statuses();
        let begun = statuses.wait_for(|status| status.begun || status.outcome.is_some());
        let Ok(Ok(status)) = tokio::time::timeout(patience, begun).await else {
            return Ok(());
        };
        match &status.outcome {
            _ if status.begun => Ok(()),
            Some(Outcome::Failed(error)) => Err(error.clone()),
            Some(Outcome::Cancelled) => Err(Error::CancelledBefore { id: self.id }.into()),
            Some(Outcome::Completed) | None => Ok(()),
        }
    }

    /// Waits for the end. Cancel-safe.
    pub async fn wait(&self) -> Outcome {
        let mut statuses = self.statuses();
        let ended = statuses.wait_for(|status| status.outcome.is_some()).await;
        // The sender lives as long as this job.
        ended
            .ok()
            .and_then(|status| status.outcome.clone())
            .unwrap_or(Outcome::Cancelled)
    }

    fn decision(&self) -> MutexGuard<'_, Decision> {
        self.decision.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is known whether an earlier process published it; until then it could not be cancelled.
    fn recovered(&self, published: bool) {
        let mut decision = self.decision();
        if *decision == Decision::Recovering {
            *decision = match published {
                true => Decision::Publishing,
                false => Decision::Open,
            };
        }
    }

    /// From here on it cannot be cancelled; false if it was before.
    fn begin_publishing(&self) -> bool {
        let mut decision = self.decision();
        let open = *decision == Decision::Open;
        if open {
            *decision = Decision::Publishing;
        }
        open
    }

    /// The last word of what publishes: false if the job was given up meanwhile, and all is to be taken back.
    fn published(&self) -> bool {
        let mut decision = self.decision();
        let still = *decision == Decision::Publishing;
        if still {
            *decision = Decision::Published;
        }
        still
    }

    /// The last word of who waited for it: false if it was published just now.
    fn give_up(&self) -> bool {
        let mut decision = self.decision();
        let open = *decision != Decision::Published;
        if open && *decision != Decision::CancelRequested {
            *decision = Decision::GivenUp;
        }
        open
    }

    fn update(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
    }
}

/// Runs `work` on a thread that may wait for storage.
async fn blocking<T: Send + 'static>(setting: &Setting, work: impl FnOnce() -> T + Send + 'static) -> T {
    offload::blocking(&setting.activity, work).await
}

/// The same, for work that reports its progress: an error about `what` if it makes none.
async fn watched<T: Send + 'static>(
    setting: &Setting,
    what: &'static str,
    work: impl FnOnce(&Progress) -> T + Send + 'static,
) -> Result<T, Error> {
    let patience = setting.deadlines.stall();
    let done = offload::watched(&setting.activity, patience, work).await;
    done.ok_or_else(|| Error::stalled(what, patience))
}
