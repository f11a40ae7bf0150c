//! Errors of the catalog, with their remedies.

use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "the catalog {path} is damaged ({why}). Wait for running backups, because a new catalog does not know them. \
         Then restore \
         a copy, or move it away to start with an empty history. The service reads the stores again when it starts",
        path = path.display()
    )]
    Damaged { path: PathBuf, why: String },
    #[error(
        "the catalog {path} has version {found} of a newer backupd, but this backupd supports up to version {known}. \
         Install the newer backupd again, or move the catalog away to start with an empty history. The service reads \
         the stores again when it starts",
        path = path.display()
    )]
    Newer { path: PathBuf, found: i64, known: i64 },
    #[error("{path} is not a catalog of backupd. Move it away", path = path.display())]
    Foreign { path: PathBuf },
    #[error(
        "the catalog {path} is in use by another backupd. Give each backupd its own state directory",
        path = path.display()
    )]
    InUse { path: PathBuf },
    #[error("cannot {action} the catalog {path}: {source}", path = path.display())]
    Io {
        path: PathBuf,
        action: &'static str,
        source: std::io::Error,
    },
    #[error(
        "cannot write the catalog: no space left in the state directory ('state-directory' in the configuration)"
    )]
    Full,
    #[error("cannot read or write the catalog: {0}")]
    Statement(String),
    #[error("cannot parse the catalog's record of job {id}: {why}")]
    Record { id: u32, why: String },
}

impl Error {
    /// Converts an error that occurred while the catalog at `path` was being opened.
    pub(super) fn opening(path: &Path, error: &rusqlite::Error) -> Self {
        let path = path.to_owned();
        match error.sqlite_error_code() {
            Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => Self::Damaged {
                path,
                why: error.to_string(),
            },
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::InUse { path },
            _ => Self::Io {
                path,
                action: "open",
                source: std::io::Error::other(error.to_string()),
            },
        }
    }
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::Full,
            _ => Self::Statement(error.to_string()),
        }
    }
}
