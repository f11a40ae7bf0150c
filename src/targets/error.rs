//! Errors of targets and stores.

use std::fmt;

use rustix::io::Errno;

use super::look;
use crate::error::Kind;
use crate::path;
use crate::store;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(
        "disk '{disk}': {target} exists already. Choose another name, remove it, or set 'reuse-external'"
    )]
    Exists { disk: String, target: String },
    #[error("disk '{disk}': {target} does not exist. With 'reuse-external' the target must exist")]
    Missing { disk: String, target: String },
    #[error("{path}: the directory does not exist. Create it first")]
    NoDirectory { path: String },
    #[error("{0}")]
    Path(path::Error),
    #[error(
        "{path}: {why}: users other than root could replace the files below it. Change its owner or mode"
    )]
    Untrusted { path: String, why: String },
    #[error("disk '{disk}': {target} is not {wanted}")]
    WrongType {
        disk: String,
        target: String,
        wanted: &'static str,
    },
    #[error("disk '{disk}': {target} has {size} bytes, but the disk has {wanted}")]
    WrongSize {
        disk: String,
        target: String,
        size: u64,
        wanted: u64,
    },
    #[error(
        "disk '{disk}': {target} is not a qcow2 image. Empty it, or create a qcow2 image of the disk's size"
    )]
    NotQcow2 { disk: String, target: String },
    #[error("disk '{disk}': {target} is a disk of a running domain{}", Known(domain.as_deref()))]
    IsSource {
        disk: String,
        target: String,
        /// The domain's name, if the caller may know it.
        domain: Option<String>,
    },
    #[error(
        "disk '{disk}': {target} is open in another QEMU, qemu-img or qemu-storage-daemon{}. End that process, or \
         choose another target",
        Known(by.as_deref())
    )]
    Locked {
        disk: String,
        target: String,
        /// The process, if the caller may know it and the service found it.
        by: Option<String>,
    },
    #[error("disk '{disk}': {target} is in the store {store}. Choose a path outside all stores")]
    InStore {
        disk: String,
        target: String,
        store: String,
    },
    #[error("disks '{first}' and '{second}' have the same target, {target}")]
    SameTarget {
        first: String,
        second: String,
        target: String,
    },
    #[error("disk '{disk}': {target} is open {mode}. Open it for reading and writing")]
    AccessMode {
        disk: String,
        target: String,
        mode: &'static str,
    },
    #[error(
        "disk '{disk}': {target} is a file without a name, which disappears when it is closed. Give it a name"
    )]
    Nameless { disk: String, target: String },
    #[error("disk '{disk}': {target} has other hard links. Use a file with only one name")]
    Linked { disk: String, target: String },
    #[error(
        "disk '{disk}': {target} cannot be published without the risk of replacing another file: its file system \
         supports neither RENAME_NOREPLACE nor hard links. Choose a directory on another file system, or pass an \
         open file"
    )]
    Unnameable { disk: String, target: String },
    #[error("disk '{disk}': {target} is in use by the system, as a file system or otherwise")]
    DeviceInUse { disk: String, target: String },
    #[error(
        "disk '{disk}': {target} is not the same device as when the backup was requested. Check the device, and \
         start the backup again"
    )]
    DeviceExchanged { disk: String, target: String },
    #[error(
        "disk '{disk}': a backup into {target} cannot start now, and cannot be queued: the kernel does not identify \
         the device (no 'diskseq' in /sys), so another device could replace it. Try again later"
    )]
    Unidentified { disk: String, target: String },
    #[error("{target} has {free} bytes of free space, but the backup needs at least {needed}")]
    NoSpace { target: String, needed: u64, free: u64 },
    #[error("disk '{disk}': another file replaced {target} during the backup")]
    Replaced { disk: String, target: String },
    #[error(
        "{target}: the file, device or directory is not the same as when the backup was requested. Start the backup \
         again"
    )]
    PlaceChanged { target: String },
    #[error("{target}: it did not exist when the backup was requested. Start the backup again")]
    PlaceAppeared { target: String },
    #[error("disk '{disk}': its target disappeared while the service restarted")]
    Gone { disk: String },
    #[error("disk '{disk}': its base, backup {backup}, was removed. Start the backup again")]
    NoParent { disk: String, backup: String },
    #[error("disk '{disk}': its base, backup {backup}, {why}")]
    Parent {
        disk: String,
        backup: String,
        why: &'static str,
    },
    #[error("{0}")]
    Store(store::Error),
    #[error("cannot find out whether other VMs use the target, so nothing is overwritten: {why}")]
    Unseen { why: String },
    #[error("the plan has no store")]
    NoStore,
    #[error("{}cannot {action} {target}: {errno}", OfDisk(disk.as_deref()))]
    Io {
        disk: Option<String>,
        action: &'static str,
        target: String,
        errno: Errno,
    },
}

impl Error {
    /// A system error that concerns no disk.
    pub fn system(action: &'static str, target: &str, errno: Errno) -> Self {
        Self::io(action, target, errno)
    }

    pub(super) fn io(action: &'static str, target: &str, errno: Errno) -> Self {
        Self::Io {
            disk: None,
            action,
            target: target.to_owned(),
            errno,
        }
    }

    /// Adds the disk's name to a system error.
    pub(super) fn of(mut self, name: &str) -> Self {
        if let Self::Io { disk, .. } = &mut self {
            *disk = Some(name.to_owned());
        }
        self
    }

    /// Returns the disk that the error concerns, if any.
    pub fn disk(&self) -> Option<&str> {
        match self {
            Self::Exists { disk, .. }
            | Self::Missing { disk, .. }
            | Self::WrongType { disk, .. }
            | Self::WrongSize { disk, .. }
            | Self::NotQcow2 { disk, .. }
            | Self::Parent { disk, .. }
            | Self::NoParent { disk, .. }
            | Self::Replaced { disk, .. }
            | Self::Gone { disk }
            | Self::IsSource { disk, .. }
            | Self::Locked { disk, .. }
            | Self::InStore { disk, .. }
            | Self::AccessMode { disk, .. }
            | Self::Nameless { disk, .. }
            | Self::Linked { disk, .. }
            | Self::Unnameable { disk, .. }
            | Self::DeviceInUse { disk, .. }
            | Self::DeviceExchanged { disk, .. }
            | Self::Unidentified { disk, .. } => Some(disk),
            Self::Io { disk, .. } => disk.as_deref(),
            _ => None,
        }
    }

    pub fn kind(&self) -> Kind {
        match self {
            Self::Exists { .. } => Kind::TargetExists,
            Self::NoSpace { .. } => Kind::NoSpace,
            Self::Io { errno, .. } => store::kind_of(*errno),
            Self::Store(error) => error.kind(),
            Self::Parent { .. } => Kind::ChainBroken,
            Self::NoParent { .. } => Kind::CannotIncrement,
            Self::Unidentified { .. } => Kind::Busy,
            Self::NoStore | Self::Unseen { .. } => Kind::Internal,
            Self::Missing { .. }
            | Self::NoDirectory { .. }
            | Self::Path(_)
            | Self::Untrusted { .. }
            | Self::WrongType { .. }
            | Self::WrongSize { .. }
            | Self::NotQcow2 { .. }
            | Self::Replaced { .. }
            | Self::PlaceChanged { .. }
            | Self::PlaceAppeared { .. }
            | Self::Gone { .. }
            | Self::IsSource { .. }
            | Self::Locked { .. }
            | Self::InStore { .. }
            | Self::SameTarget { .. }
            | Self::AccessMode { .. }
            | Self::Nameless { .. }
            | Self::Linked { .. }
            | Self::Unnameable { .. }
            | Self::DeviceInUse { .. }
            | Self::DeviceExchanged { .. } => Kind::TargetInvalid,
        }
    }
}

/// Prefixes a text with the disk, if it is known.
struct OfDisk<'a>(Option<&'a str>);

impl fmt::Display for OfDisk<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(disk) => write!(f, "disk '{disk}': "),
            None => Ok(()),
        }
    }
}

/// Appends a known name in parentheses.
struct Known<'a>(Option<&'a str>);

impl fmt::Display for Known<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(known) => write!(f, " ({known})"),
            None => Ok(()),
        }
    }
}

impl From<look::Error> for Error {
    fn from(error: look::Error) -> Self {
        Self::Unseen {
            why: error.to_string(),
        }
    }
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::NoDirectory { path } => Self::NoDirectory { path },
            store::Error::Untrusted { path, why } => Self::Untrusted { path, why },
            store::Error::Path(error) => Self::Path(error),
            store::Error::Io { action, path, errno } => Self::io(action, &path, errno),
            error => Self::Store(error),
        }
    }
}

impl From<path::Error> for Error {
    fn from(error: path::Error) -> Self {
        match error {
            path::Error::NotThere { path } => Self::NoDirectory { path },
            path::Error::Untrusted { path, why } => Self::Untrusted { path, why },
            path::Error::Io { action, path, errno } => Self::io(action, &path, errno),
            error => Self::Path(error),
        }
    }
}

impl From<Error> for crate::error::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}
