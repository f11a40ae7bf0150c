//! The public state of a job.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::plan::JobSpec;
use crate::targets;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The job waits for a place. It has created nothing but its record.
    Queued,
    /// The service prepares the targets in QEMU. QEMU copies nothing yet.
    Preparing,
    Running,
    /// QEMU has finished. The service makes the data durable and publishes it, or removes it.
    Finishing,
}

/// The reason why a backup was cancelled in favour of another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Displaced {
    Slow,
    /// The connection that started it has left the bus, and its target is not in a store.
    Orphan,
}

impl fmt::Display for Displaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("root started a backup of the domain, and this one ")?;
        f.write_str(match self {
            Self::Slow => "copied less than 1 MiB a second, or would have taken longer than a day",
            Self::Orphan => "was started by a client that has left the bus",
        })
    }
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
    /// Returns the result as the D-Bus interface names it.
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
    /// The disk is copied; other disks are still being copied.
    Waiting,
    Finishing,
    Completed,
    Failed {
        /// `read`, `write`, or another failed operation.
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
    /// Bytes to process in total, and bytes processed.
    pub total: u64,
    pub done: u64,
    /// The present or future path of the image, for display.
    pub target: String,
}

#[derive(Debug, Clone)]
pub struct Status {
    pub state: State,
    /// The point in time has passed: the images do not show later writes.
    pub begun: bool,
    pub disks: Vec<DiskStatus>,
    /// The recent speed in bytes a second.
    pub rate: u64,
    /// When the job will end at this rate.
    pub expected_end: Option<Timestamp>,
    /// How long the guest's file systems were frozen, as far as the service knows.
    pub frozen: Duration,
    /// Why quiescing the guest failed, if the request made it optional.
    pub quiesce_problem: Option<String>,
    /// Why the job was cancelled in favour of another one.
    pub displaced: Option<Displaced>,
    /// Set once, with the last change.
    pub outcome: Option<Outcome>,
}

impl Status {
    /// Returns the status before the job begins.
    pub(super) fn first(spec: &JobSpec, backup_id: &str) -> Self {
        Self {
            state: State::Preparing,
            begun: false,
            disks: first_disks(spec, backup_id),
            rate: 0,
            expected_end: None,
            frozen: Duration::ZERO,
            quiesce_problem: None,
            displaced: None,
            outcome: None,
        }
    }

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

    /// Returns how long the guest's file systems were frozen, in µs.
    pub fn frozen_us(&self) -> u64 {
        u64::try_from(self.frozen.as_micros()).unwrap_or(u64::MAX)
    }

    /// Returns the progress from 0 to 1.
    pub fn progress(&self) -> f64 {
        match self.bytes() {
            0 if self.outcome == Some(Outcome::Completed) => 1.0,
            0 => 0.0,
            bytes => (self.bytes_done() as f64 / bytes as f64).min(1.0),
        }
    }
}

/// Returns the status of each disk before the job begins. Jobs that read stored backups add theirs when they start.
fn first_disks(spec: &JobSpec, backup_id: &str) -> Vec<DiskStatus> {
    let preparing = |name: &str, total: u64, target: String| DiskStatus {
        name: name.to_owned(),
        state: DiskState::Preparing,
        total,
        done: 0,
        target,
    };
    match spec {
        JobSpec::Backup(plan) => {
            let disks = plan.disks.iter();
            let label = |disk| targets::label(plan, disk, backup_id);
            disks
                .map(|disk| preparing(&disk.name, disk.virtual_size, label(disk)))
                .collect()
        }
        JobSpec::Restore(restore) => {
            let disks = restore.disks.iter().enumerate();
            disks
                .map(|(index, disk)| preparing(&disk.name, disk.virtual_size, format!("fd:{index}")))
                .collect()
        }
        JobSpec::Verify(_) | JobSpec::Export(_) => Vec::new(),
    }
}
