//! The public state of a job.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Displaced;
use crate::error::Error;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It waits for its place among the backups that run; nothing of it exists.
    Queued,
    /// The targets are made ready in QEMU; nothing is copied yet.
    Preparing,
    Running,
    /// QEMU has ended; the data is made durable and gets its name, or is removed.
    Finishing,
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Completed,
    Failed(Error),
    Cancelled,
}

impl Outcome {
    /// The result word of the interface.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed(_) => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskState {
    Queued,
    Preparing,
    Running,
    /// All is copied; the other disks are waited for.
    Waiting,
    Finishing,
    Completed,
    Failed {
        /// `read`, `write`, or what else was tried.
        operation: String,
        message: String,
    },
    Cancelled,
}

impl DiskState {
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Finishing => "finishing",
            Self::Completed => "completed",
            Self::Failed { .. } => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    pub name: String,
    pub state: DiskState,
    /// Bytes to go through in all, and bytes gone through.
    pub total: u64,
    pub done: u64,
    /// Where the image is or will be, for people.
    pub target: String,
}

#[derive(Debug, Clone)]
pub struct Status {
    pub state: State,
    /// The point in time is past: what is written from now on is in no image.
    pub begun: bool,
    pub disks: Vec<DiskStatus>,
    /// Bytes a second, lately.
    pub rate: u64,
    /// When it will be done at this rate.
    pub expected_end: Option<Timestamp>,
    /// How long the guest's file systems were frozen, as far as is known.
    pub frozen: Duration,
    /// Why the guest was not quiesced, though that was to be tried.
    pub quiesce_problem: Option<String>,
    /// Why it was ended for another one, if it was.
    pub displaced: Option<Displaced>,
    /// Set once, with the last change.
    pub outcome: Option<Outcome>,
}

impl Status {
    pub fn state_word(&self) -> &'static str {
        match (&self.outcome, self.state) {
            (Some(outcome), _) => outcome.as_str(),
            (None, State::Queued) => "queued",
            (None, State::Preparing) => "preparing",
            (None, State::Running) => "running",
            (None, State::Finishing) => "finishing",
        }
    }

    pub fn bytes(&self) -> u64 {
        self.disks
            .iter()
            .fold(0, |sum, disk| sum.saturating_add(disk.total))
    }

    pub fn bytes_done(&self) -> u64 {
        self.disks
            .iter()
            .fold(0, |sum, disk| sum.saturating_add(disk.done))
    }

    /// For how many µs the guest's file systems were frozen.
    pub fn frozen_us(&self) -> u64 {
        u64::try_from(self.frozen.as_micros()).unwrap_or(u64::MAX)
    }

    /// 0 to 1.
    pub fn progress(&self) -> f64 {
        match self.bytes() {
            0 if self.outcome == Some(Outcome::Completed) => 1.0,
            0 => 0.0,
            bytes => (self.bytes_done() as f64 / bytes as f64).min(1.0),
        }
    }
}
