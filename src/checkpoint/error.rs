//! Errors of checkpoints: a base that a request cannot have, a name in use, or a disk that cannot have a checkpoint.

use super::{FullReason, Obstacle};
use crate::definition::Position;
use crate::domain::DiskNameError;
use crate::error::Kind;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Disk(#[from] DiskNameError),
    #[error("the domain has no checkpoint '{name}'. 'backupctl checkpoints' lists them")]
    NoSuchCheckpoint { name: String },
    #[error(
        "{}the store has no checkpoint '{name}' of this domain. 'backupctl backups' lists them",
        at.prefix()
    )]
    NoSuchBase { name: String, at: Position },
    #[error(
        "{}cannot back up the changes of disk '{disk}' since {since}: {}. Request a full backup, or 'auto'",
        at.prefix(), why.text()
    )]
    CannotIncrement {
        disk: String,
        since: String,
        why: FullReason,
        at: Position,
    },
    #[error(
        "only a backup into a store can create a checkpoint. Omit the option, or create the checkpoint separately"
    )]
    NoStore,
    #[error("the domain already has a checkpoint '{name}'. Choose another name, or delete it")]
    Exists { name: String },
    #[error("{}disk '{name}' is not backed up, so no later backup could start from its checkpoint", at.prefix())]
    NotBackedUp { name: String, at: Position },
    #[error("{}disk '{name}' cannot have a checkpoint: {why}", at.prefix())]
    Impossible {
        name: String,
        at: Position,
        why: Obstacle,
    },
    #[error("none of the disks can have a checkpoint: it requires a writable qcow2 image of version 3")]
    NoDisk,
    #[error("none of the disks can have a checkpoint: disk '{first}': {why}")]
    NoDiskBecause { first: String, why: Obstacle },
}

impl Error {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Disk(error) => error.kind(),
            Self::NoSuchCheckpoint { .. } | Self::NoSuchBase { .. } => Kind::NoSuchCheckpoint,
            Self::CannotIncrement {
                why: FullReason::Outside,
                ..
            } => Kind::Unsupported,
            Self::CannotIncrement {
                why: FullReason::Damaged,
                ..
            } => Kind::ChainBroken,
            Self::CannotIncrement { .. } => Kind::CannotIncrement,
            Self::NoStore | Self::Impossible { .. } | Self::NoDisk | Self::NoDiskBecause { .. } => {
                Kind::Unsupported
            }
            Self::Exists { .. } | Self::NotBackedUp { .. } => Kind::InvalidDefinition,
        }
    }
}

impl From<Error> for crate::error::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}
