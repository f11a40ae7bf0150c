//! The handle of a job: its status, and the decisions that callers and the service make about it.
//!
//! A job can be cancelled until its result is published. Must not know how a job does its work.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::provisional::Provisional;
use super::speed::Speed;
use super::{DiskState, Displaced, Error, Outcome, State, Status};
use crate::catalog::{Catalog, JobRecord, QUEUED, Starter};
use crate::domain::{Domain, Identity};
use crate::fault;
use crate::plan::{Destination, JobSpec, Plan, RestorePlan};

/// How long a client counts as an observer after it read the status.
const ATTENTION: Duration = Duration::from_secs(5);
/// The maximum age of a shown status, and how long a reader waits for a newer one.
const FRESH: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_millis(300);

/// How far the end of a job is decided. A job can be cancelled until its images are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// The service recovers the job and does not know yet whether the backup is published.
    Recovering,
    Open,
    CancelRequested,
    Publishing,
    Published,
    /// Publishing took too long: the thread that publishes must undo its work.
    GivenUp,
}

/// A job that runs or has ended: a backup, or work on stored backups.
#[derive(Debug)]
pub struct Job {
    pub id: u32,
    /// The backup's name in a store.
    pub backup_id: String,
    /// Looked up again when the job leaves the queue.
    pub domain: Provisional<Arc<Domain>>,
    /// The UUID of the domain when the job started.
    pub(super) domain_uuid: Option<Uuid>,
    pub started_by: Starter,
    /// The record comes from a store. Its `started_by` is what the store says, and gives nobody a right.
    pub(super) imported: bool,
    /// The job ended before the service started, and comes from the history.
    pub(super) past: bool,
    pub start_time: Timestamp,
    /// For a queued backup, the plan is made again when the job leaves the queue.
    pub spec: Provisional<JobSpec>,
    pub(super) status: watch::Sender<Status>,
    pub(super) decision: Mutex<Decision>,
    pub(super) cancel: CancellationToken,
    /// When this instance of the service started the job. For a queued job: when it left the queue.
    pub(super) taken_up: Provisional<Instant>,
    /// The connection that started the job has left the bus, or belonged to an earlier instance of the service.
    pub(super) is_orphan: AtomicBool,
    pub(super) speed: Arc<Speed>,
    /// When a client last read the status, and when the service last queried QEMU.
    pub(super) looks: watch::Sender<Option<Instant>>,
    pub(super) asked: watch::Sender<Option<Instant>>,
    pub(super) catalog: Catalog,
}

impl Job {
    /// Creates a job that has not ended. `earlier`: an earlier instance of the service started it.
    pub(super) fn new(
        record: &JobRecord,
        domain: Arc<Domain>,
        spec: JobSpec,
        catalog: Catalog,
        earlier: bool,
    ) -> Self {
        let cancelled = record.cancel_requested;
        let mut status = Status::first(&spec, &record.backup_id);
        if record.step == QUEUED {
            status.state = State::Queued;
            status
                .disks
                .iter_mut()
                .for_each(|disk| disk.state = DiskState::Queued);
        }
        let cancel = CancellationToken::new();
        if cancelled {
            cancel.cancel();
        }
        Self {
            id: record.id,
            backup_id: record.backup_id.clone(),
            domain_uuid: record.domain.uuid,
            domain: domain.into(),
            started_by: record.started_by.clone(),
            imported: record.imported,
            past: false,
            start_time: record.start_time,
            status: watch::Sender::new(status),
            decision: Mutex::new(match cancelled {
                true => Decision::CancelRequested,
                false if earlier => Decision::Recovering,
                false => Decision::Open,
            }),
            cancel,
            taken_up: Instant::now().into(),
            is_orphan: AtomicBool::new(earlier),
            speed: Arc::new(Speed::new(record.speed)),
            looks: watch::Sender::new(None),
            asked: watch::Sender::new(None),
            catalog,
            spec: spec.into(),
        }
    }

    /// Returns whether this user started the job. The uid alone does not identify a user for ever, because it may
    /// belong to another user later.
    pub fn is_of(&self, user: &Starter) -> bool {
        if self.imported || self.past {
            return false;
        }
        let has_ended = self.status.borrow().outcome.is_some();
        self.started_by.is_same(user, has_ended)
    }

    /// Returns the plan of a backup.
    pub fn plan(&self) -> Option<&Arc<Plan>> {
        self.spec.plan()
    }

    /// Returns the last known status without waiting.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Returns a receiver of all changes. The last change sets the outcome.
    pub fn statuses(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// The document with all defaults filled in. Only a backup has one.
    pub fn definition(&self) -> Result<String, Error> {
        match self.plan() {
            Some(plan) => Ok(plan.definition().to_xml()),
            None => Err(Error::NoDefinition { id: self.id }),
        }
    }

    /// Requests cancellation of the whole backup and does not wait for its end. After `Ok` the job never ends as
    /// completed, even if the service restarts.
    pub async fn cancel(&self) -> Result<(), Error> {
        self.decide_to_cancel(None)?;
        self.record_cancel().await;
        Ok(())
    }

    /// Cancels the job in favour of another backup. An earlier cancellation keeps its own reason.
    pub(super) async fn cancel_because(&self, why: Displaced) -> Result<(), Error> {
        self.decide_to_cancel(Some(why))?;
        self.record_cancel().await;
        Ok(())
    }

    async fn record_cancel(&self) {
        if let Err(error) = self.catalog.cancel_requested(self.id).await {
            tracing::error!(job = self.id, %error, "cannot record the cancellation of the job");
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

    /// Requests cancellation because of one disk. This cancels the whole backup, because a backup is complete or does
    /// not exist.
    pub async fn cancel_disk(&self, disk: &str) -> Result<(), Error> {
        if !self.spec.has_disk(disk) {
            return Err(Error::NoSuchDisk {
                id: self.id,
                disk: disk.to_owned(),
            });
        }
        self.cancel().await
    }

    /// Changes the speed limit of the running backup: bytes a second for all disks together; 0 removes the limit.
    pub async fn set_speed(&self, bytes_per_second: u64) -> Result<(), Error> {
        if self.plan().is_none() {
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
            tracing::warn!(job = self.id, %error, "cannot record the job's speed limit");
        }
        Ok(())
    }

    /// Returns the id of the backup that the job creates in a store or reads from one; empty if the targets are not in
    /// a store.
    pub fn backup(&self) -> &str {
        match &*self.spec {
            JobSpec::Backup(plan) => match plan.destination {
                Destination::Store { .. } => &self.backup_id,
                Destination::Caller => "",
            },
            JobSpec::Restore(RestorePlan { stored, .. })
            | JobSpec::Verify(stored)
            | JobSpec::Export(stored) => &stored.id,
        }
    }

    /// Registers a client that receives every change.
    pub fn look_on(&self) {
        self.looks.send_replace(Some(Instant::now()));
    }

    /// Registers a client that reads the status, and waits shortly for a fresh one.
    pub async fn look(&self) {
        self.look_on();
        let fresh = |asked: &Option<Instant>| asked.is_some_and(|asked| asked.elapsed() < FRESH);
        if self.status.borrow().state == State::Running && self.status.borrow().outcome.is_none() {
            // A slow QEMU must not delay the reader.
            let _ = tokio::time::timeout(SOON, self.asked.subscribe().wait_for(fresh)).await;
        }
    }

    pub(super) fn is_looked_at(&self) -> bool {
        self.looks.borrow().is_some_and(|look| look.elapsed() < ATTENTION)
    }

    /// Waits at most `patience` until the backup has begun, that is, until its point in time has passed. Returns the
    /// job's error if the backup failed before.
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

    /// Waits for the end of the job. Cancel-safe.
    pub async fn wait(&self) -> Outcome {
        let mut statuses = self.statuses();
        let ended = statuses.wait_for(|status| status.outcome.is_some()).await;
        // The sender lives as long as this job.
        ended
            .ok()
            .and_then(|status| status.outcome.clone())
            .unwrap_or(Outcome::Cancelled)
    }

    pub(super) fn decision(&self) -> MutexGuard<'_, Decision> {
        self.decision.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the recovery: `published` says whether an earlier instance published the backup. Until then nobody could
    /// cancel it.
    pub(super) fn recovered(&self, published: bool) {
        let mut decision = self.decision();
        if *decision == Decision::Recovering {
            *decision = match published {
                true => Decision::Publishing,
                false => Decision::Open,
            };
        }
    }

    /// Forbids cancellation from now on. Returns false if the job was cancelled before.
    pub(super) fn begin_publishing(&self) -> bool {
        let mut decision = self.decision();
        let open = *decision == Decision::Open;
        if open {
            *decision = Decision::Publishing;
        }
        open
    }

    /// Called by the thread that publishes, when it has finished. Returns false if the job was given up before: that
    /// thread then undoes its work.
    pub(super) fn published(&self) -> bool {
        let mut decision = self.decision();
        let still = *decision == Decision::Publishing;
        if still {
            *decision = Decision::Published;
        }
        still
    }

    /// Called when the timeout of the publication has passed. Returns false if the backup was published just before.
    pub(super) fn give_up(&self) -> bool {
        let mut decision = self.decision();
        let open = *decision != Decision::Published;
        if open && *decision != Decision::CancelRequested {
            *decision = Decision::GivenUp;
        }
        open
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
    }

    /// Returns whether the job waits for a place.
    pub fn is_queued(&self) -> bool {
        let status = self.status.borrow();
        status.state == State::Queued && status.outcome.is_none()
    }

    /// Takes the job out of the queue, with a plan for the present domain and its disks.
    pub(super) fn leave_queue(&self, domain: Arc<Domain>, plan: Arc<Plan>) {
        let spec = JobSpec::Backup(plan);
        let disks = Status::first(&spec, &self.backup_id).disks;
        self.domain.finalise(domain);
        self.spec.finalise(spec);
        self.taken_up.finalise(Instant::now());
        self.update(|status| (status.state, status.disks) = (State::Preparing, disks));
    }

    /// Returns the identity of the VM with the recorded UUID. Another VM may have its former name now.
    pub fn identity(&self) -> Identity {
        Identity {
            uuid: self.domain_uuid,
            ..self.domain.identity()
        }
    }
}
