//! Faults of a stored backup, and other errors of reading one.

use rustix::io::Errno;

use super::chain::MAX_DEPTH;
use crate::error::{Kind, shown};
use crate::model::ManifestError;
use crate::qcow2::HeaderError;
use crate::store;

/// A fault of a backup or one of its images.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("it does not exist")]
    Missing,
    #[error("it was deleted before it could be verified")]
    Removed,
    #[error("{0}")]
    Unreadable(Box<store::Error>),
    #[error("its manifest is invalid: {0}")]
    Manifest(ManifestError),
    #[error("its manifest belongs to another backup, {}", shown(.found))]
    OtherId { found: String },
    #[error("its image {} is missing", shown(.file))]
    NoImage { file: String },
    #[error("it depends on {}/{}, which backup {} does not contain", shown(.backup), shown(.file), shown(.backup))]
    NoSuchParent { backup: String, file: String },
    #[error("its base {} is not in the store", shown(.backup))]
    NoParent { backup: String },
    #[error("it depends on itself")]
    Loop,
    #[error("its chain has more than {MAX_DEPTH} images")]
    TooDeep,
    #[error("its image has {found} bytes, but its manifest records {recorded} bytes")]
    Length { found: u64, recorded: u64 },
    #[error("its raw image has {found} bytes, but the disk has {virtual_size} bytes")]
    RawLength { found: u64, virtual_size: u64 },
    #[error("its image {0}")]
    Header(HeaderError),
    #[error("the checksum of its image differs from its manifest, so its content has changed")]
    Checksum,
    #[error("qemu-img finds {corruptions} corruptions and {errors} errors in its image")]
    Inconsistent { corruptions: u64, errors: u64 },
    #[error("qemu-img cannot check its image: {0}")]
    NotChecked(String),
    #[error("the header of its image was replaced while it was being read")]
    Exchanged,
    #[error("its base {} is damaged", shown(.backup))]
    LiesOnDamaged { backup: String },
}

impl Fault {
    /// Returns true if the fault proves that the backup has changed. False if the backup could not be read now or by
    /// this user: storage that does not respond, a program that was killed. Its state is then unknown, and a later
    /// check may find it good.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Unreadable(error) => match **error {
                // The path has no file or directory, or one of another type.
                store::Error::Io { errno, .. } => matches!(
                    errno,
                    Errno::NOENT | Errno::NOTDIR | Errno::ISDIR | Errno::LOOP | Errno::INVAL
                ),
                _ => false,
            },
            Self::Header(HeaderError::Io(_)) | Self::NotChecked(_) | Self::Removed => false,
            // qemu-img's own errors show as little about the image as errors of the system.
            Self::Inconsistent { corruptions, .. } => *corruptions > 0,
            _ => true,
        }
    }

    /// Returns the kind of error that a call reports for this fault.
    pub fn kind(&self) -> Kind {
        match self {
            fault if fault.is_damage() => Kind::ChainBroken,
            Self::Unreadable(error) => error.kind(),
            Self::NotChecked(_) | Self::Inconsistent { .. } => Kind::QemuError,
            Self::Removed => Kind::NoSuchBackup,
            _ => Kind::Internal,
        }
    }
}

impl From<store::Error> for Fault {
    fn from(error: store::Error) -> Self {
        Self::Unreadable(Box::new(error))
    }
}

/// A fault and its location.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub backup: String,
    /// `None` if the fault concerns the whole backup.
    pub disk: Option<String>,
    pub fault: Fault,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "backup {}", shown(&self.backup))?;
        if let Some(disk) = &self.disk {
            write!(f, ", disk '{}'", shown(disk))?;
        }
        write!(f, ": {}", self.fault)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("no backup '{}' in {}", shown(.wanted), shown(.store))]
    NoSuchBackup { wanted: String, store: String },
    #[error("'{}' matches {first} and {second}. Use a longer prefix", shown(.wanted))]
    Ambiguous {
        wanted: String,
        first: String,
        second: String,
    },
    #[error("backup {} has no disk '{}': it has {}", shown(.backup), shown(.disk), shown(.has))]
    NoSuchDisk {
        backup: String,
        disk: String,
        has: String,
    },
    #[error("{0}")]
    Damaged(Finding),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(
        "backup {}: serving these disks requires {images} open images, but the limit is {most}. Name one disk",
        shown(.backup)
    )]
    TooManyImages {
        backup: String,
        images: usize,
        most: usize,
    },
    #[error("{program} is not installed. Install it (on Debian, package {package})")]
    NotInstalled {
        program: &'static str,
        package: &'static str,
    },
    #[error("cannot start {program}: {why}")]
    NotStarted { program: &'static str, why: String },
    #[error("qemu-storage-daemon failed: {why}")]
    StorageDaemon { why: String },
    #[error("cannot copy disk '{}': {why}", shown(.disk))]
    Copy { disk: String, why: String },
    #[error("disk '{}': no space left on its target", shown(.disk))]
    NoSpace { disk: String },
    #[error("disk '{}': its target {why}", shown(.disk))]
    BadTarget { disk: String, why: String },
    #[error("{what} made no progress for {seconds} seconds ('stall-seconds' in the configuration)")]
    Stalled { what: &'static str, seconds: u64 },
    #[error("cancelled")]
    Cancelled,
    #[error("a task failed: {0}")]
    Task(String),
}

impl Error {
    pub(super) fn system(disk: &str, action: &str, errno: Errno) -> Self {
        let disk = disk.to_owned();
        match errno {
            Errno::NOSPC | Errno::DQUOT => Self::NoSpace { disk },
            errno => Self::BadTarget {
                disk,
                why: format!("cannot be {action}: {errno}"),
            },
        }
    }

    /// Adds the image to QEMU's message, because QEMU knows only descriptors.
    pub(super) fn about(self, backup: &str, disk: &str) -> Self {
        match self {
            Self::StorageDaemon { why } => Self::StorageDaemon {
                why: format!("backup {}, disk '{}': {why}", shown(backup), shown(disk)),
            },
            error => error,
        }
    }

    /// The disk that the error is about, if any.
    pub fn disk(&self) -> Option<&str> {
        match self {
            Self::Copy { disk, .. } | Self::NoSpace { disk } | Self::BadTarget { disk, .. } => Some(disk),
            Self::Damaged(finding) => finding.disk.as_deref(),
            _ => None,
        }
    }

    pub fn kind(&self) -> Kind {
        match self {
            Self::NoSuchDisk { .. } => Kind::NoSuchDisk,
            Self::NoSuchBackup { .. } => Kind::NoSuchBackup,
            Self::Ambiguous { .. } => Kind::InvalidArgs,
            Self::Store(error) => error.kind(),
            Self::Damaged(finding) => finding.fault.kind(),
            Self::TooManyImages { .. } => Kind::LimitsExceeded,
            Self::NotInstalled { .. } | Self::NotStarted { .. } => Kind::Unsupported,
            Self::StorageDaemon { .. } | Self::Copy { .. } => Kind::QemuError,
            Self::NoSpace { .. } => Kind::NoSpace,
            Self::BadTarget { .. } => Kind::TargetInvalid,
            Self::Stalled { .. } => Kind::Stalled,
            Self::Cancelled => Kind::Cancelled,
            Self::Task(_) => Kind::Internal,
        }
    }
}

impl From<Error> for crate::error::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}
