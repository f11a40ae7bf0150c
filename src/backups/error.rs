//! Errors of removing, merging and protecting backups.

use std::time::Duration;

use crate::error::Kind;
use crate::model::ManifestError;
use crate::{catalog, image, store, targets};

/// The number of ids that a message lists.
const MOST_NAMED: usize = 3;

#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error(
        "{} on backup {id}{}. Delete them first, delete all together ('with-dependents'), or make them independent \
         ('merge')",
        count(others.len() + hidden), named(.others)
    )]
    HasDependents {
        id: String,
        others: Vec<String>,
        /// The number of dependents that the caller may not see.
        hidden: usize,
    },
    #[error(
        "{} on backup {id} and {} not in the catalog ({}). Run 'backupctl rescan', then try again",
        depend(.others), are(.others), some(.others)
    )]
    NotOnRecord { id: String, others: Vec<String> },
    #[error(
        "cannot read {path}: {why}. The bases of this backup are unknown, so no good backup beside it is removed. \
         Repair the file, move its directory out of the store, or delete this backup first"
    )]
    Unreadable { path: String, why: ManifestError },
    #[error("backup {id} is protected. Run 'backupctl unprotect {id}' before you delete it")]
    Protected { id: String },
    #[error("cannot merge backup {id} because it is not complete: {problem}")]
    NotComplete { id: String, problem: String },
    #[error("disk '{disk}' of backup {id}: the merged image differs from its chain. The backup is unchanged")]
    NotTheSame { id: String, disk: String },
    #[error("{0}")]
    Image(#[from] image::Error),
    #[error("cannot write a manifest: {0}")]
    Manifest(String),
    #[error("job {job} uses backup {id} as its base. Wait until it ends, or cancel it")]
    BuiltUpon { id: String, job: u32 },
    #[error("backup '{0}' no longer exists")]
    Gone(String),
    #[error("store '{0}' is no longer configured")]
    NoStore(String),
    #[error("{0}")]
    Store(#[from] store::Error),
    #[error("{0}")]
    Target(#[from] targets::Error),
    #[error("the store made no progress for {seconds} seconds ('stall-seconds' in the configuration)")]
    Stalled { seconds: u64 },
    #[error("cannot compare the store '{store}' with the catalog: {source}")]
    Unsettled {
        store: String,
        source: Box<crate::error::Error>,
    },
    #[error("the service is stopping")]
    Stopping,
    #[error("cannot read the catalog of backups. See the service's log for the reason")]
    Catalog,
    #[error("{0}. Free some space, then try again")]
    CatalogFull(String),
    #[error("{source}. Already deleted: {}", some(.gone))]
    Partly { gone: Vec<String>, source: Box<Error> },
}

impl Error {
    pub fn kind(&self) -> Kind {
        match self {
            Self::HasDependents { .. } | Self::NotOnRecord { .. } => Kind::HasDependents,
            Self::Unreadable { why, .. } if why.is_damage() => Kind::ChainBroken,
            Self::Unreadable { .. } => Kind::Unsupported,
            Self::Protected { .. } => Kind::Protected,
            Self::Gone(_) => Kind::NoSuchBackup,
            Self::NoStore(_) => Kind::NoSuchStore,
            Self::Store(error) => error.kind(),
            Self::Target(error) => error.kind(),
            Self::Image(error) => error.kind(),
            Self::NotComplete { .. } => Kind::ChainBroken,
            Self::NotTheSame { .. } | Self::Manifest(_) => Kind::Internal,
            Self::Stalled { .. } => Kind::Stalled,
            Self::Stopping | Self::BuiltUpon { .. } => Kind::Busy,
            Self::Catalog => Kind::Internal,
            Self::CatalogFull(_) => Kind::NoSpace,
            Self::Unsettled { source, .. } => source.kind,
            Self::Partly { source, .. } => source.kind(),
        }
    }

    pub(super) fn stalled(patience: Duration) -> Self {
        Self::Stalled {
            seconds: patience.as_secs(),
        }
    }
}

/// Hides details of the catalog from callers.
impl From<catalog::Error> for Error {
    fn from(error: catalog::Error) -> Self {
        tracing::error!(%error, "cannot read the catalog of backups");
        match error {
            catalog::Error::Full => Self::CatalogFull(error.to_string()),
            _ => Self::Catalog,
        }
    }
}

impl From<Error> for crate::error::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

fn named(others: &[String]) -> String {
    match others {
        [] => String::new(),
        others => format!(" ({})", some(others)),
    }
}

fn count(others: usize) -> String {
    match others {
        1 => "1 other backup depends".into(),
        count => format!("{count} other backups depend"),
    }
}

fn depend(others: &[String]) -> String {
    match others.len() {
        1 => "1 backup in the store depends".into(),
        count => format!("{count} backups in the store depend"),
    }
}

fn are(others: &[String]) -> &'static str {
    match others.len() {
        1 => "is",
        _ => "are",
    }
}

fn some(ids: &[String]) -> String {
    let named = ids
        .iter()
        .take(MOST_NAMED)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    match ids.len() > MOST_NAMED {
        true => format!("{named}, …"),
        false => named,
    }
}
