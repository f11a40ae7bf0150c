//! Block jobs: started, listed, changed, and ended.

use serde::{Deserialize, Serialize};

use crate::qmp::command::command;
use crate::qmp::{Done, words};

/// Copies a node to another one, and from then on what is written to it.
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

/// Copies the images from `device` down to `base_node`, without the latter, into that.
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

/// Ends a block job. One that is ready completes without a switch to its target, unless it is forced.
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
    /// In bytes a second; 0 has no limit.
    pub speed: u64,
}

command!(BlockJobSetSpeed<'_>, "block-job-set-speed", Done);

/// What is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorSync {
    /// What the image has itself.
    Top,
    /// What is read from the node.
    Full,
    /// What is written from then on.
    None,
}

/// What a job does when it can't read or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// It fails.
    Report,
    Ignore,
    Enospc,
    Stop,
    Auto,
}

/// Ends a job that runs, also by force.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct JobCancel<'a> {
    pub id: &'a str,
}

command!(JobCancel<'_>, "job-cancel", Done);

/// Has QEMU forget a concluded job.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct JobDismiss<'a> {
    pub id: &'a str,
}

command!(JobDismiss<'_>, "job-dismiss", Done);

#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryJobs {}

command!(QueryJobs, "query-jobs", Vec<JobInfo>);

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
    /// It keeps up with what is written.
    Ready,
    Standby,
    /// Until the other jobs of its transaction have come as far.
    Waiting,
    Pending,
    Aborting,
    /// It has ended, and QEMU remembers it until it is dismissed.
    Concluded,
    Null,
    #[serde(other)]
    Unknown,
}
