//! Derives the outcome of a job and of its disks from the reason why it stopped.

use super::error::Stopped;
use super::handle::Decision;
use super::{DiskState, Error, Job, Outcome};
use crate::error;

/// Gives the job's outcome to all disks, except those that failed or completed before an unsuccessful end.
pub fn show_ended(job: &Job, outcome: &Outcome) {
    job.update(|status| {
        status.rate = 0;
        status.expected_end = None;
        for disk in &mut status.disks {
            match (outcome, &disk.state) {
                (Outcome::Completed, _) => disk.state = DiskState::Completed,
                (_, DiskState::Failed { .. } | DiskState::Completed) => {}
                _ => disk.state = DiskState::Cancelled,
            }
        }
    });
}

pub fn outcome(job: &Job, ended: Result<(), Stopped>) -> Outcome {
    match ended {
        Ok(()) => Outcome::Completed,
        Err(Stopped::Cancelled | Stopped::Detached) => Outcome::Cancelled,
        // The service has accepted the caller's cancellation, so it must report the job as cancelled.
        Err(Stopped::Failed(error)) if error.hangs() && *job.decision() == Decision::CancelRequested => {
            Outcome::Cancelled
        }
        Err(Stopped::Failed(error)) => {
            blame(job, &error);
            Outcome::Failed(error::Error::from(error))
        }
    }
}

/// Marks the disk that an error is about as failed, unless QEMU's verdict already did.
fn blame(job: &Job, error: &Error) {
    let Some((name, operation)) = error.disk() else {
        return;
    };
    job.update(|status| {
        let guilty = status.disks.iter_mut().find(|disk| disk.name == name);
        if let Some(disk) = guilty.filter(|disk| !matches!(disk.state, DiskState::Failed { .. })) {
            disk.state = DiskState::Failed {
                operation: operation.into(),
                message: error.to_string(),
            };
        }
    });
}
