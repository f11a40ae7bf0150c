//! Errors of stores.

use rustix::io::Errno;

use crate::error::Kind;
use crate::path;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{path}: the directory does not exist. Create it first")]
    NoDirectory { path: String },
    #[error("{0}")]
    Path(path::Error),
    #[error(
        "{path}: {why}: users other than root could replace the files below it. Change its owner or mode"
    )]
    Untrusted { path: String, why: String },
    #[error("{path}: it is in use: another job or program reads, changes or builds on it. Try again later")]
    InUse { path: String },
    #[error("{path}: does not exist. Mount its store, or run 'backupctl rescan' to forget missing backups")]
    NotThere { path: String },
    #[error(
        "{path}: the directory has the name of a backup, but no valid manifest ({why}). The service does not \
         change it. Check it, and remove it if you do not need it"
    )]
    NoManifest { path: String, why: String },
    #[error(
        "{path}: is not the store that was used before: its mark (.backupd/store) {}. Mount the store, or run \
         'backupctl rescan' to use the present one",
        if *.is_marked { "differs" } else { "is missing" }
    )]
    OtherStore { path: String, is_marked: bool },
    #[error(
        "{path}: none of the {backups} recorded backups exists. Mount the store. To begin with an empty store, \
         create the directory .backupd in it and run 'backupctl rescan'"
    )]
    NotMounted { path: String, backups: usize },
    #[error("{path}: does not belong to the backup, and would be removed with it. Move it away")]
    ForeignFile { path: String },
    #[error(
        "{path}: is in the lower layer of an overlay file system, which cannot rename a directory there. Mount the \
         overlay with 'redirect_dir=on', or delete the backup from the lower layer itself"
    )]
    Immovable { path: String },
    #[error("cannot {action} {path}: {errno}")]
    Io {
        action: &'static str,
        path: String,
        errno: Errno,
    },
}

impl Error {
    pub(super) fn io(action: &'static str, path: &str, errno: Errno) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            errno,
        }
    }

    /// Whether a file or directory does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { errno, .. } if *errno == Errno::NOENT)
    }

    /// Whether no regular file has the name. A directory or device with that name counts as absent too.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Io { errno, .. } if *errno == Errno::NOENT || *errno == Errno::INVAL)
    }

    pub fn kind(&self) -> Kind {
        match self {
            Self::Io { errno, .. } => kind_of(*errno),
            Self::InUse { .. } => Kind::Busy,
            Self::NoDirectory { .. }
            | Self::Path(_)
            | Self::Untrusted { .. }
            | Self::NotThere { .. }
            | Self::NoManifest { .. }
            | Self::OtherStore { .. }
            | Self::NotMounted { .. }
            | Self::ForeignFile { .. }
            | Self::Immovable { .. } => Kind::TargetInvalid,
        }
    }
}

/// Returns the kind of a system error of storage.
pub fn kind_of(errno: Errno) -> Kind {
    match errno {
        Errno::NOSPC | Errno::DQUOT => Kind::NoSpace,
        // The storage or the service failed, not the caller's input.
        Errno::IO | Errno::NOMEM | Errno::MFILE | Errno::NFILE => Kind::Internal,
        _ => Kind::TargetInvalid,
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
