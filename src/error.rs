//! The kinds of failure that callers see, and the value that carries a failure to them.
//!
//! Every module has its own error enum, keeps the facts in its fields and maps each variant to a [`Kind`]. `bus::error`
//! holds the only table from kinds to D-Bus error names. This module knows neither.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::text::excerpt;

/// The meaning of a failure for the caller. Each kind has one D-Bus error name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    NoSuchDomain,
    NoSuchDisk,
    NoSuchJob,
    NoSuchStore,
    NoSuchCheckpoint,
    /// A stored backup, or one of its bases, is damaged.
    ChainBroken,
    /// A disk has no base for an incremental backup.
    CannotIncrement,
    NoSuchBackup,
    // Records of jobs from an older version have the former name.
    #[serde(alias = "HasDescendants")]
    HasDependents,
    Protected,
    InvalidDefinition,
    Unsupported,
    TargetExists,
    TargetInvalid,
    NoSpace,
    Busy,
    DomainUnreachable,
    QemuError,
    /// Storage, or a program that reads it, made no progress.
    Stalled,
    /// The guest's file systems could not be frozen or thawed.
    QuiesceFailed,
    /// The job has ended, so it can no longer be changed.
    JobEnded,
    Cancelled,
    Internal,
    AccessDenied,
    InteractiveAuthorizationRequired,
    InvalidArgs,
    LimitsExceeded,
    UnknownObject,
    UnknownInterface,
    UnknownMethod,
    UnknownProperty,
    PropertyReadOnly,
}

/// A failure as the caller sees it: its kind, and a message with the object, the reason and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    pub kind: Kind,
    pub message: String,
}

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            // A D-Bus string cannot contain NUL, and QEMU wrote some of the messages.
            message: message.into().replace('\0', "\u{fffd}"),
        }
    }
}

/// The C library's messages for ENOSPC and EDQUOT. QEMU's job errors contain this text and no errno.
const NO_SPACE: [&str; 2] = ["No space left on device", "Disk quota exceeded"];

/// Returns true if QEMU's error message means that the storage is full.
pub fn is_no_space(text: &str) -> bool {
    NO_SPACE.iter().any(|known| text.contains(known))
}

/// Quotes a caller's input in a message: bounded, and with control characters escaped.
pub fn shown(text: &str) -> String {
    let head: String = text.chars().take(128).collect();
    excerpt(&head, usize::MAX)
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_former_name_of_a_kind_is_read() {
        for name in ["\"HasDescendants\"", "\"HasDependents\""] {
            assert_eq!(serde_json::from_str::<Kind>(name).unwrap(), Kind::HasDependents);
        }
    }
}
