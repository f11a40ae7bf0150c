//! Errors of targets.

use std::fmt;

use rustix::io::Errno;

use crate::error::Kind;
use crate::path;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(
        "disk '{disk}': {target} exists already: choose another name, remove it, or say 'reuse-external'"
    )]
    Exists { disk: String, target: String },
    #[error("disk '{disk}': {target} does not exist: with 'reuse-external' the target must be there")]
    Missing { disk: String, target: String },
    #[error("{path}: the directory does not exist: create it first")]
    NoDirectory { path: String },
    #[error("{0}")]
    Path(path::Error),
    #[error("{path}: {why}: others than root could exchange what lies below it")]
    Untrusted { path: String, why: String },
    #[error("disk '{disk}': {target} is not {wanted}")]
    WrongType {
        disk: String,
        target: String,
        wanted: &'static str,
    },
    #[error("disk '{disk}': {target} has {size} bytes where the disk has {wanted}")]
    WrongSize {
        disk: String,
        target: String,
        size: u64,
        wanted: u64,
    },
    #[error("disk '{disk}': {target} holds no qcow2 image: empty it, or make it one of the disk's size")]
    NotQcow2 { disk: String, target: String },
    #[error("disk '{disk}': {target} is a disk of a running domain{}", Known(domain.as_deref()))]
    IsSource {
        disk: String,
        target: String,
        /// Which one, where the caller may know.
        domain: Option<String>,
    },
    #[error(
        "disk '{disk}': {target} is open in another QEMU, qemu-img or qemu-storage-daemon{}: shut that down, or choose another target",
        Known(by.as_deref())
    )]
    Locked {
        disk: String,
        target: String,
        /// Who it is, where the caller may know and it can be found.
        by: Option<String>,
    },
    #[error("disk '{disk}': {target} is in the store {store}: choose a place outside of all stores")]
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
    #[error("disk '{disk}': {target} is open {mode}: open it for reading and writing")]
    AccessMode {
        disk: String,
        target: String,
        mode: &'static str,
    },
    #[error(
        "disk '{disk}': {target} is a file without a name, and would be gone when it is closed: give it one"
    )]
    Nameless { disk: String, target: String },
    #[error("disk '{disk}': {target} has other names beside this one (hard links): use a file of its own")]
    Linked { disk: String, target: String },
    #[error(
        "disk '{disk}': {target} can't be given its name without a risk of replacing another file: its file system can neither rename with RENAME_NOREPLACE nor make hard links. Choose a directory on another one, or pass an open file"
    )]
    Unnameable { disk: String, target: String },
    #[error("disk '{disk}': {target} is in use by the system, as a file system or otherwise")]
    DeviceInUse { disk: String, target: String },
    #[error(
        "disk '{disk}': {target} is another device than when the backup was asked for: check which one it is, and start the backup again"
    )]
    DeviceExchanged { disk: String, target: String },
    #[error(
        "disk '{disk}': there is no place for a backup into {target} now, and it cannot be queued: the kernel does not identify the device (no 'diskseq' in /sys), so another one could come in its place. Try again later"
    )]
    Unidentified { disk: String, target: String },
    #[error("{target} has {free} bytes of free space where the backup takes at least {needed}")]
    NoSpace { target: String, needed: u64, free: u64 },
    #[error("disk '{disk}': something else was put in place of {target} while it was being written")]
    Replaced { disk: String, target: String },
    #[error(
        "{target}: another file, device or directory is there than when the backup was asked for: start it again"
    )]
    PlaceChanged { target: String },
    #[error("disk '{disk}': its target is not there any more since the service was started again")]
    Gone { disk: String },
    #[error("disk '{disk}': its base, backup {backup}, was removed: start the backup again")]
    NoParent { disk: String, backup: String },
    #[error("disk '{disk}': its base, backup {backup}, {why}")]
    Parent {
        disk: String,
        backup: String,
        why: &'static str,
    },
    #[error("{path}: others are just reading, changing or building upon it: try again when they are done")]
    InUse { path: String },
    #[error("{path}: is not there: is its store mounted? 'backupctl rescan' forgets backups that are gone")]
    NotThere { path: String },
    #[error(
        "{path}: it has a backup's name, and its manifest does not vouch for it ({why}): it is left as it is. Check it, and remove it by hand if it is of no use"
    )]
    NotVouchedFor { path: String, why: String },
    #[error(
        "{path}: is not the store that was used before: its mark (.backupd/store) {}. Mount the store, or run 'backupctl rescan' to use what is there now",
        if *.is_marked { "is another one" } else { "is missing" }
    )]
    OtherStore { path: String, is_marked: bool },
    #[error(
        "{path}: none of the {backups} backups on record is there. Mount the store; or, to begin with an empty one, make the directory .backupd in it and run 'backupctl rescan'"
    )]
    NotMounted { path: String, backups: usize },
    #[error("{path}: is not the backup's, and would go with it: move it away")]
    NotTheBackups { path: String },
    #[error(
        "{path}: is in the lower layer of an overlay file system, which cannot rename a directory there: mount the overlay with 'redirect_dir=on', or delete the backup where the lower layer is the store"
    )]
    Immovable { path: String },
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
    /// A failure of the system's that is about no disk.
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

    /// Says whose target an error of the system is about.
    pub(super) fn of(mut self, name: &str) -> Self {
        if let Self::Io { disk, .. } = &mut self {
            *disk = Some(name.to_owned());
        }
        self
    }

    /// The disk that it is about, where it is about one.
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
            Self::Io { errno, .. } => match *errno {
                Errno::NOSPC | Errno::DQUOT => Kind::NoSpace,
                // The storage is at fault, not what the caller named.
                Errno::IO | Errno::NOMEM | Errno::MFILE | Errno::NFILE => Kind::Internal,
                _ => Kind::TargetInvalid,
            },
            Self::Parent { .. } => Kind::ChainBroken,
            Self::NoParent { .. } => Kind::CannotIncrement,
            Self::InUse { .. } | Self::Unidentified { .. } => Kind::Busy,
            Self::NoStore => Kind::Internal,
            Self::Missing { .. }
            | Self::NoDirectory { .. }
            | Self::Path(_)
            | Self::Untrusted { .. }
            | Self::WrongType { .. }
            | Self::WrongSize { .. }
            | Self::NotQcow2 { .. }
            | Self::Replaced { .. }
            | Self::PlaceChanged { .. }
            | Self::Gone { .. }
            | Self::NotTheBackups { .. }
            | Self::Immovable { .. }
            | Self::NotVouchedFor { .. }
            | Self::NotThere { .. }
            | Self::OtherStore { .. }
            | Self::NotMounted { .. }
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

/// The disk in front of a text, where it is known.
struct OfDisk<'a>(Option<&'a str>);

impl fmt::Display for OfDisk<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(disk) => write!(f, "disk '{disk}': "),
            None => Ok(()),
        }
    }
}

/// What is known, in parentheses behind a text.
struct Known<'a>(Option<&'a str>);

impl fmt::Display for Known<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(known) => write!(f, " ({known})"),
            None => Ok(()),
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
