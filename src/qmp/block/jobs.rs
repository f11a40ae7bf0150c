//! Commands that start, list, change and end block jobs.

use serde::{Deserialize, Serialize};

use crate::qmp::command::command;
use crate::qmp::{Bounded, Done, words};

/// Copies a node to another node, and then each later write.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevMirror<'a> {
    pub job_id: &'a str,
    pub device: &'a str,
    pub target: &'a str,
    pub sync: MirrorSync,
    pub auto_dismiss: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_source_error: Option<OnError>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_target_error: Option<OnError>,
}

command!(BlockdevMirror<'_>, "blockdev-mirror", Done);

/// Copies the data of the images from `device` down to, but not including, `base_node` into `base_node`.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockCommit<'a> {
    pub job_id: &'a str,
    pub device: &'a str,
    pub base_node: &'a str,
    pub auto_dismiss: bool,
    pub on_error: OnError,
}

command!(BlockCommit<'_>, "block-commit", Done);

/// Cancels a block job. Without `force`, a ready job completes without switching to its target.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct BlockJobCancel<'a> {
    /// The job's id.
    pub device: &'a str,
    pub force: bool,
}

command!(BlockJobCancel<'_>, "block-job-cancel", Done);

#[derive(Debug, Clone, Copy, Serialize)]
pub struct BlockJobSetSpeed<'a> {
    /// The job's id.
    pub device: &'a str,
    /// In bytes per second. 0 means no limit.
    pub speed: u64,
}

command!(BlockJobSetSpeed<'_>, "block-job-set-speed", Done);

/// The data to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorSync {
    /// The data of the top image only.
    Top,
    /// All data that the node reads.
    Full,
    /// Only later writes.
    None,
}

/// The action of a job at an I/O error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// The job fails.
    Report,
    Ignore,
    Enospc,
    Stop,
    Auto,
}

/// Cancels a running job by force.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct JobCancel<'a> {
    pub id: &'a str,
}

command!(JobCancel<'_>, "job-cancel", Done);

/// Makes QEMU forget a concluded job.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct JobDismiss<'a> {
    pub id: &'a str,
}

command!(JobDismiss<'_>, "job-dismiss", Done);

#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryJobs {}

command!(QueryJobs, "query-jobs", Bounded<JobInfo, MAX_JOBS>);

/// The most jobs, with the concluded ones. A peer that reports more is not QEMU.
const MAX_JOBS: usize = 16384;

/// A job of any client.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    pub id: String,
    pub status: JobStatus,
    #[serde(default)]
    pub current_progress: u64,
    #[serde(default)]
    pub total_progress: u64,
    #[serde(default, deserialize_with = "words")]
    pub error: Option<String>,
}

/// See `JobStatus` of `qapi/job.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobStatus {
    Undefined,
    Created,
    Running,
    Paused,
    /// The job has copied everything and copies new writes.
    Ready,
    Standby,
    /// The job waits for the other jobs of its transaction.
    Waiting,
    Pending,
    Aborting,
    /// The job has ended. QEMU keeps it until a client dismisses it.
    Concluded,
    Null,
    #[serde(other)]
    Unknown,
}
