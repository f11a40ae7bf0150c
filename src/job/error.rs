//! Errors of jobs: why a job could not start or did not complete.

use std::time::Duration;

use crate::domain::{Migration, OLDEST};
use crate::error::{Kind, is_no_space};
use crate::image::{self, Finding};
use crate::{catalog, qmp, quota, store, targets};

#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error(
        "domain '{domain}' is busy: a backup is queued or running, or its checkpoints are being changed. Wait for the \
         end, or cancel the backup"
    )]
    Busy { domain: String },
    #[error("job {id} has already ended: {outcome}")]
    Ended { id: u32, outcome: &'static str },
    #[error("the backup of job {id} is complete and is being published, so it can no longer be cancelled")]
    TooLate { id: u32 },
    #[error("job {id} is being recovered after a restart of the service. Try again in a moment")]
    Recovering { id: u32 },
    #[error("job {id} does not back up a disk '{disk}'")]
    NoSuchDisk { id: u32, disk: String },
    #[error("a rescan of the stores is already running. Try again after its end")]
    Rescanning,
    #[error("another store took the place of this one during the scan. Try again")]
    Exchanged,
    #[error(
        "QEMU still has objects of job {job}, which has ended. The service removes them as soon as QEMU and the \
         storage of its target answer"
    )]
    Left { job: u32 },
    #[error("the service is stopping")]
    Stopping,
    #[error("the host restarted while the backup was queued. Start the backup again")]
    HostRestartedBefore,
    #[error(
        "the service restarted while the backup was queued, which closed the files that the caller had passed. \
         Start the backup again"
    )]
    FilesGone,
    #[error("the domain's QEMU became unreachable while the backup was queued: {0}")]
    DomainGone(&'static str),
    #[error("the domain's disks changed while the backup was queued. Start the backup again")]
    OtherDisks,
    #[error(
        "cannot remove the incomplete images {targets}: the service's log has the reason. Check the storage, and start \
         the backup again"
    )]
    NotRemoved { targets: String },
    #[error("{0}")]
    NotStarted(crate::error::Error),
    #[error("{0}")]
    TooMany(#[from] quota::Exceeded),
    #[error(
        "the domain's QEMU cannot back up several disks in one transaction. Use version {} or later",
        OLDEST
    )]
    TooOld,
    #[error(
        "QEMU has no latency histograms, which 'max-latency' requires. Omit that option, or use QEMU 4.0 or later"
    )]
    NoHistograms,
    #[error("{}", migration_text(.0))]
    Migration(Migration),
    #[error("disk '{disk}': {source}")]
    Prepare { disk: String, source: qmp::Error },
    #[error("disk '{disk}': cannot pass its target to QEMU: {why}")]
    Descriptor { disk: String, why: String },
    #[error("disk '{disk}': another process writes to its target. Choose one that no other process has open")]
    ForeignHeader { disk: String },
    #[error("QEMU cannot start the backup: {0}")]
    Transaction(qmp::Error),
    #[error("disk '{disk}': {message}")]
    Copy { disk: String, message: String },
    #[error(
        "disk '{disk}': {message}. The file system of {target} is probably full: it has {free} bytes of free \
         space. Free some space, or choose another target"
    )]
    ProbablyFull {
        disk: String,
        message: String,
        target: String,
        free: u64,
    },
    #[error("job {id} was cancelled before the backup began")]
    CancelledBefore { id: u32 },
    #[error("the connection to QEMU was lost during the backup: {0}")]
    Lost(qmp::Error),
    #[error("QEMU did not close the targets: {0}")]
    Release(String),
    #[error(
        "the domain's QEMU no longer has the backup's block jobs: QEMU restarted, or another client dismissed them"
    )]
    Forgotten,
    #[error("QEMU ended before it had closed the images")]
    NotClosed,
    #[error("the host restarted before the images were durable. Start the backup again")]
    HostRestarted,
    #[error("the service ended while it prepared the backup. Start the backup again")]
    Interrupted,
    #[error("the domain's QEMU was unreachable after the restart of the service: {0}")]
    NotFound(String),
    #[error("{what} made no progress for {seconds} seconds ('stall-seconds' in the configuration)")]
    Stalled { what: &'static str, seconds: u64 },
    #[error("cannot read or write the catalog: {0}")]
    Catalog(String),
    #[error("cannot freeze the guest's file systems: {0}")]
    Quiesce(String),
    #[error("disk '{disk}' got another image during the preparation of its backup. Try again")]
    Changed { disk: String },
    #[error("disk '{disk}' shrank during the preparation of its backup. Try again")]
    Resized { disk: String },
    #[error("the domain's disks keep changing. Try again")]
    Unsettled,
    #[error("{0}")]
    Store(#[from] store::Error),
    #[error("{0}")]
    Target(#[from] targets::Error),
    #[error("cannot write the manifest of the backup: {0}")]
    Record(String),
    #[error("job {id} is not a backup, so it has no document")]
    NoDefinition { id: u32 },
    #[error("job {id} is not a backup, so its speed cannot be limited")]
    NoSpeed { id: u32 },
    #[error("{0}")]
    Image(Box<image::Error>),
    #[error("{first}{}", more(*.others))]
    Found { first: Box<Finding>, others: usize },
    #[error(
        "no client has read from the export for {seconds} seconds ('export-idle-seconds' in the configuration)"
    )]
    ExportIdle { seconds: u64 },
    #[error("the service restarted during the job. Start the job again")]
    NotResumed,
    #[error("disk '{disk}': QEMU cannot create its checkpoint: {source}")]
    Checkpoint { disk: String, source: qmp::Error },
    #[error("QEMU cannot change the bitmaps of the checkpoint: {0}")]
    Bitmaps(qmp::Error),
    #[error("{of} {most} checkpoints without a backup, which is the limit. Delete one")]
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
            Self::Store(error) => error.kind(),
            Self::Target(error) => error.kind(),
            Self::NoDefinition { .. } | Self::NoSpeed { .. } => Kind::Unsupported,
            Self::Image(error) => error.kind(),
            Self::Found { first, .. } => first.fault.kind(),
            Self::NotRemoved { .. } | Self::Record(_) | Self::Catalog(_) => Kind::Internal,
        }
    }

    /// Returns the error for `what` that made no progress for this long.
    pub fn stalled(what: &'static str, patience: Duration) -> Self {
        let seconds = patience.as_secs();
        Self::Stalled { what, seconds }
    }

    /// Returns whether QEMU, or the storage that it writes to, hangs. Asking QEMU to close the targets could then
    /// freeze the guest.
    pub(super) fn hangs(&self) -> bool {
        matches!(self, Self::Stalled { .. })
    }

    /// Returns the disk that the error is about, and the failed operation.
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

/// The reason why a backup that began is not published.
#[derive(Debug)]
pub(super) enum Stopped {
    Failed(Error),
    Cancelled,
    /// The service stops. QEMU continues, and a later instance of the service resumes the job.
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
        Migration::Left => "the domain was migrated to another host. Back it up there",
        Migration::Leaving | Migration::Coming => {
            "the domain is being migrated. Wait for the end of the migration"
        }
    }
}

impl From<Error> for crate::error::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}
