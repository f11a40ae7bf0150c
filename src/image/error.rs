//! Faults of a stored backup, and other errors of reading one.

use rustix::io::Errno;

use super::chain::MAX_DEPTH;
use crate::error::{Kind, shown};
use crate::model::ManifestError;
use crate::qcow2::HeaderError;
use crate::target;

/// What is wrong with a backup or one of its images.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("it is not there")]
    Missing,
    #[error("it was removed before it could be looked at")]
    Removed,
    #[error("{0}")]
    Unreadable(Box<target::Error>),
    #[error("its manifest is no manifest: {0}")]
    Manifest(ManifestError),
    #[error("its manifest is that of another backup, {}", shown(.found))]
    OtherId { found: String },
    #[error("its image {} is not there", shown(.file))]
    NoImage { file: String },
    #[error("it lies on {}/{}, which backup {} does not have", shown(.backup), shown(.file), shown(.backup))]
    NoSuchParent { backup: String, file: String },
    #[error("it lies on backup {}, which is not there", shown(.backup))]
    NoParent { backup: String },
    #[error("it lies on itself")]
    Loop,
    #[error("it lies on more than {MAX_DEPTH} images, one on the other")]
    TooDeep,
    #[error("its image has {found} bytes where its manifest says {recorded}")]
    Length { found: u64, recorded: u64 },
    #[error("its raw image has {found} bytes where the disk has {virtual_size}")]
    RawLength { found: u64, virtual_size: u64 },
    #[error("its image {0}")]
    Header(HeaderError),
    #[error("its image does not have the checksum of its manifest: what is in it has changed")]
    Checksum,
    #[error("qemu-img finds {corruptions} corruptions and {errors} errors in its image")]
    Inconsistent { corruptions: u64, errors: u64 },
    #[error("qemu-img cannot check its image: {0}")]
    NotChecked(String),
    #[error("its image's header was exchanged while it was being read")]
    Exchanged,
    #[error("it lies on backup {}, which is damaged", shown(.backup))]
    LiesOnDamaged { backup: String },
}

impl Fault {
    /// Whether what is there shows that the backup is not what it was. False if it could not be looked at, now or by this user:
    /// storage that does not answer, a program that was killed. Then nothing is known, and another look may find it good.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Unreadable(error) => match **error {
                // What has the name of a file, or of a directory, is none; or nothing has it.
                target::Error::Io { errno, .. } => matches!(
                    errno,
                    Errno::NOENT | Errno::NOTDIR | Errno::ISDIR | Errno::LOOP | Errno::INVAL
                ),
                _ => false,
            },
            Self::Header(HeaderError::Io(_)) | Self::NotChecked(_) | Self::Removed => false,
            // An error of qemu-img's own says as little about the image as one of the system's.
            Self::Inconsistent { corruptions, .. } => *corruptions > 0,
            _ => true,
        }
    }

    /// What a call that found it fails with.
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

impl From<target::Error> for Fault {
    fn from(error: target::Error) -> Self {
        Self::Unreadable(Box::new(error))
    }
}

/// A fault, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub backup: String,
    /// Nothing where it is about the backup as a whole.
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
    #[error("no backup '{}' in {store}", shown(.wanted))]
    NoSuchBackup { wanted: String, store: String },
    #[error("'{}' can be {first} or {second}: say more of it", shown(.wanted))]
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
    Target(#[from] target::Error),
    #[error(
        "backup {}: serving these disks needs {images} images open at the same time, and {most} is the limit: name one disk",
        shown(.backup)
    )]
    TooManyImages {
        backup: String,
        images: usize,
        most: usize,
    },
    #[error("{program} is not installed: install it (on Debian, package {package})")]
    NotInstalled {
        program: &'static str,
        package: &'static str,
    },
    #[error("{program} cannot be started: {why}")]
    NotStarted { program: &'static str, why: String },
    #[error("qemu-storage-daemon failed: {why}")]
    Engine { why: String },
    #[error("disk '{}' cannot be copied: {why}", shown(.disk))]
    Copy { disk: String, why: String },
    #[error("disk '{}': no space left where it goes", shown(.disk))]
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

    /// Says which image QEMU's words are about: it knows none by a name.
    pub(super) fn about(self, backup: &str, disk: &str) -> Self {
        match self {
            Self::Engine { why } => Self::Engine {
                why: format!("backup {}, disk '{}': {why}", shown(backup), shown(disk)),
            },
            error => error,
        }
    }

    /// The disk that it is about, where it is about one.
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
            Self::Target(error) => error.kind(),
            Self::Damaged(finding) => finding.fault.kind(),
            Self::TooManyImages { .. } => Kind::LimitsExceeded,
            Self::NotInstalled { .. } | Self::NotStarted { .. } => Kind::Unsupported,
            Self::Engine { .. } | Self::Copy { .. } => Kind::QemuError,
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
