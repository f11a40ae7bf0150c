//! Errors of a request for disks, stores or options that do not exist.

use std::fmt;

use super::{Obstacle, Why};
use crate::definition::Position;
use crate::error::Kind;
use crate::model::Outside;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{}the domain has no disk '{name}'", At(*at))]
    NoSuchDisk { name: String, at: Position },
    #[error("{}several disks answer to '{name}': use the id of the disk's device", At(*at))]
    AmbiguousDisk { name: String, at: Position },
    #[error("{}'{name}' is the same disk as '{first}': list each disk once", At(*at))]
    SameDisk {
        first: String,
        name: String,
        at: Position,
    },
    #[error("{}disk '{name}' has no medium: leave it out", At(*at))]
    NoMedium { name: String, at: Position },
    #[error(
        "{}disk '{name}' cannot be backed up: QEMU passes the guest's commands to it through ({kind}). Leave it out",
        At(*at)
    )]
    PassedThrough {
        name: String,
        kind: &'static str,
        at: Position,
    },
    #[error(
        "not in the backup would be: {}. QEMU cannot read them: back them up in another way, and leave the option \
         'require-all-disks' out",
        devices(.0)
    )]
    NotInBackup(Vec<Outside>),
    #[error("the domain has no writable disk with a medium: name the disks in the document")]
    NothingToBackUp,
    #[error("{}no store '{name}' is configured", At(*at))]
    NoSuchStore { name: String, at: Position },
    #[error("'reuse-external' is for targets that the caller names: a store's files are always new")]
    ReuseInStore,
    #[error("{}target fd='{index}': the call came with {count} descriptors, counted from 0", At(*at))]
    NoSuchFile { index: u32, count: usize, at: Position },
    #[error("descriptor {index} of the call is used by no disk: leave it out")]
    UnusedFile { index: usize },
    #[error("{}the store has no checkpoint '{name}' of this domain: 'backupctl backups' lists them", At(*at))]
    NoSuchCheckpoint { name: String, at: Position },
    #[error(
        "{}disk '{disk}' cannot be backed up since {since}: {}; a full backup, or 'auto', can be made",
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
        "only a backup into a store begins a checkpoint: leave the option out, or make the checkpoint by itself"
    )]
    CheckpointOutside,
    #[error("the domain has a checkpoint '{name}' already: choose another name, or delete that one")]
    CheckpointExists { name: String },
    #[error("{}disk '{name}' is not backed up: its checkpoint would be none that a backup could go on from", At(*at))]
    CheckpointNotBackedUp { name: String, at: Position },
    #[error("{}disk '{name}' can have no checkpoint: {why}", At(*at))]
    NoCheckpoint {
        name: String,
        at: Position,
        why: Obstacle,
    },
    #[error("none of the disks can have a checkpoint: it takes a writable qcow2 image of version 3")]
    NothingRecorded,
    #[error("none of the disks can have a checkpoint: disk '{first}': {why}")]
    NoneRecorded { first: String, why: Obstacle },
    #[error("the document and the option '{what}' say different things")]
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

/// Names and types, as many as a reader takes in.
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

/// The place in the document in front of a text; nothing where the document did not say it.
struct At(Position);

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == Position::default() {
            return Ok(());
        }
        write!(f, "{}: ", self.0)
    }
}
