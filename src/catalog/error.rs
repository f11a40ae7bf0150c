//! Why the catalog cannot be used, and what to do about it.

use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "the catalog {path} is damaged ({why}). Wait for running backups, because a new catalog does not know them; then put back \
         a copy of it, or move it away to begin with an empty history. The service reads the backups in the stores again when it starts",
        path = path.display()
    )]
    Damaged { path: PathBuf, why: String },
    #[error(
        "the catalog {path} is of version {found}, which a newer backupd made; this one knows up to version {known}: \
         install the newer one again, or move the catalog away to begin with an empty history: the service reads the backups in \
         the stores again when it starts",
        path = path.display()
    )]
    Newer { path: PathBuf, found: i64, known: i64 },
    #[error("{path} is not a catalog of backupd's: move it away", path = path.display())]
    Foreign { path: PathBuf },
    #[error("the catalog {path} is in use: another backupd runs with the same state directory", path = path.display())]
    InUse { path: PathBuf },
    #[error("the catalog {path} cannot be {action}: {source}", path = path.display())]
    Io {
        path: PathBuf,
        action: &'static str,
        source: std::io::Error,
    },
    #[error(
        "the catalog cannot be written: no space left in the state directory ('state-directory' in the configuration)"
    )]
    Full,
    #[error("the catalog cannot be read or written: {0}")]
    Statement(String),
    #[error("the catalog's record of job {id} cannot be understood: {why}")]
    Record { id: u32, why: String },
}

impl Error {
    /// What a statement failed with while the catalog at `path` was being opened.
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
                action: "opened",
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
