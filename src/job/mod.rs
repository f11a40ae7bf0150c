//! The state machine that runs a plan: one job a backup, from the targets' preparation in QEMU to their publication.
//!
//! Owns what it makes in QEMU and leaves nothing behind. Does not know who may do what, nor how callers hear of it.

mod error;
mod footprint;
mod manager;
mod progress;
mod quiesce;
mod run;
mod running;
mod status;
mod track;
mod writeback;

pub use error::Error;
pub use manager::{Jobs, Reservation, Start};
pub use status::{DiskState, DiskStatus, Outcome, State, Status};

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::domain::Domain;
use crate::plan::Plan;

/// How far a job's end is decided. Cancelling is possible up to the point where the images get their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    Open,
    CancelRequested,
    Publishing,
}

/// One backup that is under way or has ended.
#[derive(Debug)]
pub struct Job {
    pub id: u32,
    /// The backup's name in a store.
    pub backup_id: String,
    pub domain: Arc<Domain>,
    /// The user that started it.
    pub started_by: u32,
    pub start_time: Timestamp,
    pub plan: Plan,
    status: watch::Sender<Status>,
    decision: Mutex<Decision>,
    cancel: CancellationToken,
    /// Bytes a second, all disks together; 0 is unlimited.
    speed: watch::Sender<u64>,
}

impl Job {
    /// What is known now; answers at once.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Tells of every change. The last one has an outcome.
    pub fn statuses(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// The document with all defaults filled in.
    pub fn definition(&self) -> String {
        self.plan.definition().to_xml()
    }

    /// Asks for the end of the whole backup and returns at once. What was accepted here never ends as completed.
    pub fn cancel(&self) -> Result<(), Error> {
        let mut decision = self.decision();
        match (&self.status.borrow().outcome, *decision) {
            (Some(Outcome::Cancelled), _) | (None, Decision::CancelRequested) => Ok(()),
            (Some(outcome), _) => Err(Error::Ended {
                id: self.id,
                outcome: outcome.as_str(),
            }),
            (None, Decision::Publishing) => Err(Error::TooLate { id: self.id }),
            (None, Decision::Open) => {
                *decision = Decision::CancelRequested;
                self.cancel.cancel();
                Ok(())
            }
        }
    }

    /// Asks for the end of one disk's block job, and so of the whole backup: disks stand or fall together.
    pub fn cancel_disk(&self, disk: &str) -> Result<(), Error> {
        if !self.plan.disks.iter().any(|planned| planned.name == disk) {
            return Err(Error::NoSuchDisk {
                id: self.id,
                disk: disk.to_owned(),
            });
        }
        self.cancel()
    }

    /// Changes the limit of the running backup; `bytes_per_second` is for all disks together, 0 is unlimited.
    pub fn set_speed(&self, bytes_per_second: u64) -> Result<(), Error> {
        if let Some(outcome) = &self.status.borrow().outcome {
            return Err(Error::Ended {
                id: self.id,
                outcome: outcome.as_str(),
            });
        }
        self.speed.send_replace(bytes_per_second);
        Ok(())
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

    /// From here on it cannot be cancelled; false if it was before.
    fn begin_publishing(&self) -> bool {
        let mut decision = self.decision();
        let open = *decision == Decision::Open;
        if open {
            *decision = Decision::Publishing;
        }
        open
    }

    fn update(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
    }
}
