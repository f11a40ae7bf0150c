//! Why a backup could not start or did not complete.

use std::time::Duration;

use crate::domain::{Migration, OLDEST};
use crate::error::{Kind, is_no_space};
use crate::image::{self, Finding};
use crate::{catalog, qmp, quota, target};

#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error(
        "a backup of domain '{domain}' is queued or under way, or work on its checkpoints: wait for its end, or cancel it"
    )]
    Busy { domain: String },
    #[error("job {id} has ended already: {outcome}")]
    Ended { id: u32, outcome: &'static str },
    #[error("the backup of job {id} is complete and is being published: it can no longer be cancelled")]
    TooLate { id: u32 },
    #[error("job {id} is being recovered after a restart of the service: try again in a moment")]
    Recovering { id: u32 },
    #[error("job {id} does not back up a disk '{disk}'")]
    NoSuchDisk { id: u32, disk: String },
    #[error("the stores are being looked through already: try again when that has ended")]
    Rescanning,
    #[error("the store was exchanged for another while it was being read")]
    Exchanged,
    #[error(
        "QEMU still has something of job {job}, which has ended: it is removed as soon as QEMU and the storage of its target answer"
    )]
    Left { job: u32 },
    #[error("the service is stopping")]
    Stopping,
    #[error("the host restarted while the backup was queued: start it again")]
    HostRestartedBefore,
    #[error(
        "the service was restarted while the backup was queued, and the caller's open files went with it: start it again"
    )]
    FilesGone,
    #[error("the domain's QEMU cannot be reached any more since the backup was queued: {0}")]
    DomainGone(&'static str),
    #[error("the domain's disks are others than when the backup was asked for: start it again")]
    OtherDisks,
    #[error("{0}")]
    NotStarted(crate::error::Error),
    #[error("{0}")]
    TooMany(#[from] quota::Exceeded),
    #[error(
        "the domain's QEMU cannot do grouped backups of its disks: version {} or later is needed",
        OLDEST
    )]
    TooOld,
    #[error(
        "QEMU cannot count the guest's writes by how long they take, which 'max-latency' needs: make the backup without it, or \
         use QEMU 4.0 or later"
    )]
    NoHistograms,
    #[error("{}", migration_text(.0))]
    Migration(Migration),
    #[error("disk '{disk}': {source}")]
    Prepare { disk: String, source: qmp::Error },
    #[error("disk '{disk}': cannot hand its target to QEMU: {why}")]
    Descriptor { disk: String, why: String },
    #[error("disk '{disk}': another process writes to its target: choose one that no other process has open")]
    ForeignHeader { disk: String },
    #[error("QEMU cannot start the backup: {0}")]
    Transaction(qmp::Error),
    #[error("disk '{disk}': {message}")]
    Copy { disk: String, message: String },
    #[error(
        "disk '{disk}': {message}. The reason is probably that the file system of {target} is full, because it has {free} bytes of \
         free space: free some, or choose another target"
    )]
    ProbablyFull {
        disk: String,
        message: String,
        target: String,
        free: u64,
    },
    #[error("job {id} was cancelled before the backup had begun")]
    CancelledBefore { id: u32 },
    #[error("the connection to QEMU was lost during the backup: {0}")]
    Lost(qmp::Error),
    #[error("QEMU did not let go of the targets: {0}")]
    Release(String),
    #[error(
        "the domain's QEMU does not know the backup any more: it was started again, or its block jobs were dismissed"
    )]
    Forgotten,
    #[error("QEMU ended before it had closed the images")]
    NotClosed,
    #[error("the host restarted before the images were durable: start the backup again")]
    HostRestarted,
    #[error("the service was ended while the backup was being prepared")]
    Interrupted,
    #[error("the domain's QEMU could not be reached when the service was started again: {0}")]
    NotFound(String),
    #[error("{what} made no progress for {seconds} seconds ('stall-seconds' in the configuration)")]
    Stalled { what: &'static str, seconds: u64 },
    #[error("the catalog cannot remember the backup: {0}")]
    Catalog(String),
    #[error("the guest's file systems cannot be frozen: {0}")]
    Quiesce(String),
    #[error("disk '{disk}' was given another image while its backup was being prepared: try again")]
    Changed { disk: String },
    #[error("disk '{disk}' was made smaller while its backup was being prepared: try again")]
    Resized { disk: String },
    #[error("the domain's disks keep changing: try again")]
    Unsettled,
    #[error("{0}")]
    Target(#[from] target::Error),
    #[error("the record of the backup cannot be written: {0}")]
    Record(String),
    #[error("job {id} makes no backup: it has no document")]
    NoDefinition { id: u32 },
    #[error("job {id} makes no backup: its speed cannot be limited")]
    NoSpeed { id: u32 },
    #[error("{0}")]
    Image(Box<image::Error>),
    #[error("{first}{}", more(*.others))]
    Found { first: Box<Finding>, others: usize },
    #[error(
        "nobody has read from the export for {seconds} seconds ('export-idle-seconds' in the configuration)"
    )]
    ExportIdle { seconds: u64 },
    #[error("the service was ended meanwhile, and this with it: start it again")]
    NotResumed,
    #[error("disk '{disk}': QEMU cannot make its checkpoint: {source}")]
    Checkpoint { disk: String, source: qmp::Error },
    #[error("QEMU cannot change the bitmaps of the checkpoint: {0}")]
    Bitmaps(qmp::Error),
    #[error("the domain has no checkpoint '{name}': 'backupctl checkpoints' lists them")]
    NoSuchCheckpoint { name: String },
    #[error("{of} {most} checkpoints without a backup, and can have no more: delete one")]
    TooManyCheckpoints { of: &'static str, most: u32 },
    #[error("QEMU did not answer for {seconds} seconds ('stall-seconds' in the configuration)")]
    NoAnswer { seconds: u64 },
}

impl Error {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Busy { .. }
            | Self::Left { .. }
            | Self::TooLate { .. }
            | Self::Recovering { .. }
            | Self::Rescanning
            | Self::Stopping
            | Self::Unsettled
            | Self::Changed { .. }
            | Self::Resized { .. }
            | Self::Interrupted
            | Self::HostRestartedBefore
            | Self::FilesGone
            | Self::OtherDisks
            | Self::NotResumed => Kind::Busy,
            Self::NotStarted(error) => error.kind,
            Self::Migration(Migration::Left) => Kind::DomainUnreachable,
            Self::Migration(Migration::Leaving | Migration::Coming) => Kind::Busy,
            Self::Ended { .. } => Kind::JobEnded,
            Self::NoSuchDisk { .. } => Kind::NoSuchDisk,
            Self::TooMany(_) => Kind::LimitsExceeded,
            Self::CancelledBefore { .. } => Kind::Cancelled,
            Self::TooOld | Self::NoHistograms => Kind::Unsupported,
            Self::NoSuchCheckpoint { .. } => Kind::NoSuchCheckpoint,
            Self::TooManyCheckpoints { .. } => Kind::LimitsExceeded,
            Self::Prepare { source, .. }
            | Self::Checkpoint { source, .. }
            | Self::Bitmaps(source)
            | Self::Transaction(source)
                if !source.is_refusal() =>
            {
                Kind::DomainUnreachable
            }
            Self::Copy { message, .. } if is_no_space(message) => Kind::NoSpace,
            Self::ProbablyFull { .. } => Kind::NoSpace,
            Self::Prepare { .. }
            | Self::Checkpoint { .. }
            | Self::Bitmaps(_)
            | Self::Descriptor { .. }
            | Self::ForeignHeader { .. }
            | Self::Transaction(_)
            | Self::Copy { .. }
            | Self::Release(_) => Kind::QemuError,
            Self::Quiesce(_) => Kind::QuiesceFailed,
            Self::Lost(_)
            | Self::NoAnswer { .. }
            | Self::Forgotten
            | Self::NotClosed
            | Self::DomainGone(_)
            | Self::HostRestarted
            | Self::NotFound(_) => Kind::DomainUnreachable,
            Self::Stalled { .. } | Self::ExportIdle { .. } => Kind::Stalled,
            Self::Exchanged => Kind::TargetInvalid,
            Self::Target(error) => error.kind(),
            Self::NoDefinition { .. } | Self::NoSpeed { .. } => Kind::Unsupported,
            Self::Image(error) => error.kind(),
            Self::Found { first, .. } => first.fault.kind(),
            Self::Record(_) | Self::Catalog(_) => Kind::Internal,
        }
    }

    /// What made no progress for so long.
    pub fn stalled(what: &'static str, patience: Duration) -> Self {
        let seconds = patience.as_secs();
        Self::Stalled { what, seconds }
    }

    /// Whether QEMU, or what it writes to, hangs: telling it to let go could freeze the guest.
    pub(super) fn hangs(&self) -> bool {
        matches!(self, Self::Stalled { .. })
    }

    /// The disk that it is about, where it is about one, and what was being done.
    pub(super) fn disk(&self) -> Option<(&str, &'static str)> {
        match self {
            Self::Prepare { disk, .. }
            | Self::Descriptor { disk, .. }
            | Self::Changed { disk }
            | Self::Resized { disk }
            | Self::Checkpoint { disk, .. }
            | Self::ForeignHeader { disk } => Some((disk, "prepare")),
            Self::Copy { disk, .. } | Self::ProbablyFull { disk, .. } => Some((disk, "copy")),
            Self::Image(error) => error.disk().map(|disk| (disk, "restore")),
            Self::Target(error) => error.disk().map(|disk| (disk, "publish")),
            _ => None,
        }
    }
}

/// Why a backup that began has no images, or none yet.
#[derive(Debug)]
pub(super) enum Stopped {
    Failed(Error),
    Cancelled,
    /// The service stops; QEMU goes on, and a later process with it.
    Detached,
}

impl From<qmp::Error> for Stopped {
    fn from(error: qmp::Error) -> Self {
        Self::Failed(Error::Lost(error))
    }
}

impl From<catalog::Error> for Error {
    fn from(error: catalog::Error) -> Self {
        Self::Catalog(error.to_string())
    }
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

fn more(count: usize) -> String {
    match count {
        0 => String::new(),
        count => format!("; and {count} more"),
    }
}

fn migration_text(migration: &Migration) -> &'static str {
    match migration {
        Migration::Left => "the domain was migrated away: back it up where it runs now",
        Migration::Leaving | Migration::Coming => "the domain is being migrated: wait for the end of that",
    }
}

impl From<Error> for crate::error::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}
