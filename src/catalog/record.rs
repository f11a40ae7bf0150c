//! What is remembered of a job.

use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

/// How far a job is. What a step promises is durable before the next thing is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Its places are being made; what was there before is as it was.
    Preparing,
    /// It is known which files the targets are, and they may be written to.
    Writing,
    /// QEMU may be copying.
    Starting,
    /// QEMU copies what the guest had at the instant.
    Running,
    /// What became of it in QEMU is known.
    Judged,
    /// All is copied, and QEMU has closed the images.
    Closed,
    Ended,
}

impl Step {
    const ALL: [Self; 7] = [
        Self::Preparing,
        Self::Writing,
        Self::Starting,
        Self::Running,
        Self::Judged,
        Self::Closed,
        Self::Ended,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Writing => "writing",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Judged => "judged",
            Self::Closed => "closed",
            Self::Ended => "ended",
        }
    }

    pub(super) fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|step| step.as_str() == word)
    }
}

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

/// A job that is about to begin.
#[derive(Debug, Clone)]
pub struct NewJob {
    pub backup_id: String,
    pub domain: DomainRecord,
    pub started_by: u32,
    pub start_time: Timestamp,
    /// JSON; whoever writes it reads it.
    pub plan: String,
    pub speed: u64,
}

/// When the images were taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instant {
    pub time: Timestamp,
    pub quiesced: bool,
}

/// A step that a job has come to, with what is to be remembered of it.
#[derive(Debug, Clone)]
pub enum Reached {
    /// JSON: which files the targets are.
    Writing {
        files: String,
    },
    /// The instant is not before that time.
    Starting {
        not_before: Timestamp,
        holds_poweroff: bool,
    },
    /// And how long the guest was frozen for it.
    Running {
        instant: Instant,
        frozen: Duration,
    },
    /// JSON.
    Judged {
        verdict: String,
        frozen: Duration,
    },
    Closed,
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
    pub step: Step,
    pub cancel_requested: bool,
    pub holds_poweroff: bool,
    pub files: Option<String>,
    pub instant: Option<Instant>,
    /// How long the guest was frozen, as far as is known.
    pub frozen: Duration,
    pub verdict: Option<String>,
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
