//! Errors of planning: disks, stores or options that do not exist or do not fit.

use std::fmt;

use super::{Obstacle, Why};
use crate::definition::Position;
use crate::error::Kind;
use crate::model::Outside;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{}the domain has no disk '{name}'", At(*at))]
    NoSuchDisk { name: String, at: Position },
    #[error("{}'{name}' denotes several disks. Use the id of the disk's device", At(*at))]
    AmbiguousDisk { name: String, at: Position },
    #[error("{}'{name}' is the same disk as '{first}'. List each disk once", At(*at))]
    SameDisk {
        first: String,
        name: String,
        at: Position,
    },
    #[error("{}disk '{name}' has no medium. Omit it", At(*at))]
    NoMedium { name: String, at: Position },
    #[error(
        "{}disk '{name}' cannot be backed up: QEMU passes the guest's commands through to it ({kind}). Omit it",
        At(*at)
    )]
    PassedThrough {
        name: String,
        kind: &'static str,
        at: Position,
    },
    #[error(
        "the backup would not include {}, because QEMU cannot read them. Back them up in another way, and omit the \
         option \
         'require-all-disks'",
        devices(.0)
    )]
    NotInBackup(Vec<Outside>),
    #[error("the domain has no writable disk with a medium. List the disks in the document")]
    NothingToBackUp,
    #[error("{}store '{name}' is not configured", At(*at))]
    NoSuchStore { name: String, at: Position },
    #[error(
        "'reuse-external' applies only to targets that the caller names, because files in a store are always new"
    )]
    ReuseInStore,
    #[error("{}target fd='{index}': the call has {count} descriptors, numbered from 0", At(*at))]
    NoSuchFile { index: u32, count: usize, at: Position },
    #[error("no disk uses descriptor {index} of the call. Omit it")]
    UnusedFile { index: usize },
    #[error("{}the store has no checkpoint '{name}' of this domain. 'backupctl backups' lists them", At(*at))]
    NoSuchCheckpoint { name: String, at: Position },
    #[error(
        "{}cannot back up the changes of disk '{disk}' since {since}: {}. Request a full backup, or 'auto'",
        At(*at), why.text()
    )]
    CannotIncrement {
        disk: String,
        since: String,
        why: Why,
        at: Position,
    },
    #[error("option 'checkpoint': {0}")]
    Checkpoint(Box<Self>),
    #[error(
        "only a backup into a store can create a checkpoint. Omit the option, or create the checkpoint separately"
    )]
    CheckpointOutside,
    #[error("the domain already has a checkpoint '{name}'. Choose another name, or delete it")]
    CheckpointExists { name: String },
    #[error("{}disk '{name}' is not backed up, so no later backup could start from its checkpoint", At(*at))]
    CheckpointNotBackedUp { name: String, at: Position },
    #[error("{}disk '{name}' cannot have a checkpoint: {why}", At(*at))]
    NoCheckpoint {
        name: String,
        at: Position,
        why: Obstacle,
    },
    #[error("none of the disks can have a checkpoint: it requires a writable qcow2 image of version 3")]
    NothingRecorded,
    #[error("none of the disks can have a checkpoint: disk '{first}': {why}")]
    NoneRecorded { first: String, why: Obstacle },
    #[error("the document and the option '{what}' differ. Use one of them")]
    Disagreement { what: &'static str },
}

impl Error {
    pub fn kind(&self) -> Kind {
        match self {
            Self::NoSuchDisk { .. } => Kind::NoSuchDisk,
            Self::NoSuchStore { .. } => Kind::NoSuchStore,
            Self::NoSuchCheckpoint { .. } => Kind::NoSuchCheckpoint,
            Self::CannotIncrement {
                why: Why::Outside, ..
            } => Kind::Unsupported,
            Self::CannotIncrement {
                why: Why::Damaged, ..
            } => Kind::ChainBroken,
            Self::CannotIncrement { .. } => Kind::CannotIncrement,
            Self::Checkpoint(error) => error.kind(),
            Self::PassedThrough { .. } | Self::NotInBackup(_) => Kind::Unsupported,
            Self::CheckpointOutside
            | Self::NoCheckpoint { .. }
            | Self::NothingRecorded
            | Self::NoneRecorded { .. } => Kind::Unsupported,
            Self::AmbiguousDisk { .. }
            | Self::SameDisk { .. }
            | Self::NoMedium { .. }
            | Self::NothingToBackUp
            | Self::CheckpointExists { .. }
            | Self::CheckpointNotBackedUp { .. }
            | Self::NoSuchFile { .. } => Kind::InvalidDefinition,
            Self::ReuseInStore | Self::UnusedFile { .. } | Self::Disagreement { .. } => Kind::InvalidArgs,
        }
    }
}

impl From<Error> for crate::error::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

/// Lists names and types of the first 16 devices.
fn devices(devices: &[Outside]) -> String {
    let shown = devices.iter().take(16);
    let mut text: Vec<String> = shown
        .map(|device| format!("'{}' ({})", device.name, device.kind))
        .collect();
    if devices.len() > text.len() {
        text.push(format!("{} more", devices.len() - text.len()));
    }
    text.join(", ")
}

/// Prints the position in the document before a message; nothing if the document does not contain the value.
struct At(Position);

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == Position::default() {
            return Ok(());
        }
        write!(f, "{}: ", self.0)
    }
}
