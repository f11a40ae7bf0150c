//! Errors of planning: disks, stores or options that do not exist or do not fit.

use crate::checkpoint;
use crate::definition::Position;
use crate::domain::DiskNameError;
use crate::error::Kind;
use crate::model::Outside;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Disk(#[from] DiskNameError),
    #[error("{0}")]
    Base(#[from] checkpoint::Error),
    #[error("{}disk '{name}' has no medium. Omit it", at.prefix())]
    NoMedium { name: String, at: Position },
    #[error(
        "{}disk '{name}' cannot be backed up: QEMU passes the guest's commands through to it ({kind}). Omit it",
        at.prefix()
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
    #[error("{}store '{name}' is not configured", at.prefix())]
    NoSuchStore { name: String, at: Position },
    #[error(
        "'reuse-external' applies only to targets that the caller names, because files in a store are always new"
    )]
    ReuseInStore,
    #[error("{}target fd='{index}': the call has {count} descriptors, numbered from 0", at.prefix())]
    NoSuchFile { index: u32, count: usize, at: Position },
    #[error("no disk uses descriptor {index} of the call. Omit it")]
    UnusedFile { index: usize },
    #[error("option 'checkpoint': {0}")]
    Checkpoint(checkpoint::Error),
    #[error("the document and the option '{what}' differ. Use one of them")]
    Disagreement { what: &'static str },
}

impl Error {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Disk(error) => error.kind(),
            Self::Base(error) | Self::Checkpoint(error) => error.kind(),
            Self::NoSuchStore { .. } => Kind::NoSuchStore,
            Self::PassedThrough { .. } | Self::NotInBackup(_) => Kind::Unsupported,
            Self::NoMedium { .. } | Self::NothingToBackUp | Self::NoSuchFile { .. } => {
                Kind::InvalidDefinition
            }
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
