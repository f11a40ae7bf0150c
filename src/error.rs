//! The kinds of failure for callers, and the one value that carries a failure to one.
//!
//! Every module has its own error enum with the facts in its fields and says which [`Kind`] each variant is;
//! `bus::error` holds the one table from kinds to D-Bus error names. This module knows neither.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::text::excerpt;

/// What a failure means to the caller. One kind is one D-Bus error name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    NoSuchDomain,
    NoSuchDisk,
    NoSuchJob,
    NoSuchStore,
    NoSuchCheckpoint,
    /// A stored backup, or one of its bases, is damaged.
    ChainBroken,
    /// There is no base for an incremental backup of a disk.
    CannotIncrement,
    NoSuchBackup,
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
    /// The job has ended, so nothing can be changed about it.
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

/// A failure on its way to a caller: what it means, and a text that says what was wrong, where, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    pub kind: Kind,
    pub message: String,
}

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            // A string on the bus holds no NUL, and some of the text is QEMU's.
            message: message.into().replace('\0', "\u{fffd}"),
        }
    }
}

/// How the C library words ENOSPC and EDQUOT. QEMU's job errors carry this text and no number.
const NO_SPACE: [&str; 2] = ["No space left on device", "Disk quota exceeded"];

/// Whether QEMU's words for a failure mean that the storage is full.
pub fn is_no_space(text: &str) -> bool {
    NO_SPACE.iter().any(|known| text.contains(known))
}

/// What somebody typed, as a part of a text: bounded, and without control characters.
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
