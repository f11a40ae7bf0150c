//! The record of a job.

use jiff::Timestamp;
use uuid::Uuid;

/// The step of a job that has ended; those before it are the job's own words.
pub(super) const ENDED: &str = "ended";

/// A domain, as it was when its backup began.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DomainRecord {
    pub name: String,
    /// `configured` or `registered`.
    pub source: String,
    pub owner: u32,
    pub owner_name: String,
    pub uuid: Option<Uuid>,
}

impl DomainRecord {
    /// Names the domain, whatever it is called: by its UUID, or by its name if it has none; among the configured ones or
    /// those of its owner. No domain has such a name.
    pub fn key(&self) -> String {
        let owner = match self.source == "configured" {
            true => String::new(),
            false => format!("{}:", self.owner),
        };
        match self.uuid {
            Some(uuid) => format!("{owner}:{uuid}"),
            None => format!("{owner}{}", self.name),
        }
    }
}

/// A job that is about to begin.
#[derive(Debug, Clone)]
pub struct NewJob {
    pub backup_id: String,
    pub domain: DomainRecord,
    pub started_by: u32,
    pub start_time: Timestamp,
    /// JSON, in a form that only its writer knows.
    pub plan: String,
    pub speed: u64,
    /// JSON; see [`JobState::text`].
    pub state: String,
}

/// How far a job is. What it says is durable before the next thing is done.
#[derive(Debug, Clone)]
pub struct JobState {
    /// One word.
    pub step: &'static str,
    /// JSON; the job reads what it wrote.
    pub text: String,
}

/// An outcome, and what may be left.
#[derive(Debug, Clone)]
pub struct Ended {
    pub time: Timestamp,
    /// `completed`, `failed` or `cancelled`.
    pub result: String,
    /// JSON.
    pub error: Option<String>,
    pub disks: String,
    /// JSON; see [`JobState::text`].
    pub state: String,
    pub left_in_qemu: bool,
    pub left_on_disk: bool,
}

/// All that is known of a job.
#[derive(Debug, Clone)]
pub struct JobRecord {
    pub id: u32,
    pub backup_id: String,
    pub domain: DomainRecord,
    pub started_by: u32,
    pub start_time: Timestamp,
    pub plan: String,
    pub speed: u64,
    /// One word, see [`JobState`].
    pub step: String,
    /// JSON; the job reads what it wrote.
    pub state: String,
    pub cancel_requested: bool,
    pub end_time: Option<Timestamp>,
    pub result: Option<String>,
    pub error: Option<String>,
    pub disks: Option<String>,
    pub left_in_qemu: bool,
    pub left_on_disk: bool,
    /// It was found in a store: who started it is as the store says, and gives nobody a right.
    pub imported: bool,
}

/// What may be left of an ended job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leftover {
    InQemu,
    OnDisk,
}

impl JobRecord {
    pub fn has_ended(&self) -> bool {
        self.step == ENDED
    }
}
