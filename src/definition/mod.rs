//! The `<domainbackup>` and `<domaincheckpoint>` documents: their types, parser and writer.
//!
//! The language is libvirt's with additions: `<name>`, `<description>`, `<store>`, `<bandwidth>`, `<quiesce>`, disks of
//! `type='fd'`, `compress`. A document that libvirt accepts for a push backup has the same meaning here. Unsupported
//! parts are refused by name.
//!
//! This module is pure: it opens no file, asks no QEMU and knows no D-Bus. Its callers check whether a disk, a store or
//! a file exists. A [`Definition`] from [`parse`] is consistent in itself: no disk twice, no target twice, targets for
//! all disks or for none.

mod attribute;
mod checkpoint;
mod disk;
mod error;
pub mod grammar;
mod parse;
mod target;
mod write;
mod xml;

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::model::{Compression, Format};
pub use checkpoint::{CheckpointDefinition, CheckpointDisk, parse_checkpoint};
pub use error::{Error, Feature, PathProblem};
pub use parse::parse;

/// The longest accepted document, in bytes. Checked first.
pub const MAX_BYTES: usize = 1 << 20;

const MAX_DISKS: usize = 256;
const MAX_DISK_NAME_BYTES: usize = 255;
/// PATH_MAX includes the terminating NUL, which a document does not contain.
const MAX_PATH_BYTES: usize = 4095;

/// Whether a document can contain this text (XML 1.0, 2.2).
pub fn is_representable(text: &str) -> bool {
    text.chars().all(xml::is_legal)
}

/// A position in the document. Lines and columns count from 1, columns in characters. 0:0 means that the value did not
/// come from a document.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub line: u32,
    pub column: u32,
}

impl Position {
    /// Returns the start of an error message: the position, or nothing if the value did not come from a document.
    pub fn prefix(self) -> String {
        match self == Self::default() {
            true => String::new(),
            false => format!("{self}: "),
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

/// A backup as a caller describes it. `None` leaves a choice to the service. The default value means: every writable
/// disk, full, into the default store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Definition {
    /// A name that passes [`is_valid_name`].
    pub name: Option<String>,
    /// Free text, at most 4096 bytes.
    pub description: Option<String>,
    /// The store for the images. Excludes targets of disks.
    pub store: Option<StoreRef>,
    /// Bytes per second for all disks together; never 0.
    pub bandwidth: Option<u64>,
    pub quiesce: Option<Quiesce>,
    /// The base of all disks that name none themselves.
    pub incremental: Option<CheckpointRef>,
    /// The disks in the order of the document; at least one is selected.
    pub disks: Option<Vec<DiskDefinition>>,
}

impl Definition {
    /// The document, pretty-printed. [`parse`] of it returns the same value except for positions.
    ///
    /// Characters that XML 1.0 cannot represent become U+FFFD. These are most control characters, which no parsed
    /// document contains. So do bytes of a path that are not UTF-8.
    pub fn to_xml(&self) -> String {
        write::definition(self)
    }
}

/// A store, by its name in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreRef {
    pub name: String,
    pub at: Position,
}

/// A checkpoint, by name: a point in time from which the changes of a disk are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointRef {
    pub name: String,
    pub at: Position,
}

/// The extent of a disk's copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupMode {
    Full,
    /// Copies the changes since this checkpoint, or else since that of the document or the call.
    Incremental(Option<CheckpointRef>),
}

/// Whether the guest's file systems are frozen at the point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quiesce {
    /// Not frozen. The default.
    No,
    /// Frozen if the guest agent is able to. The backup does not depend on it.
    Try,
    /// Frozen, or the backup fails.
    Require,
}

impl Quiesce {
    const WORDS: &'static [&'static str] = &["no", "try", "require"];

    pub fn as_str(self) -> &'static str {
        match self {
            Quiesce::No => "no",
            Quiesce::Try => "try",
            Quiesce::Require => "require",
        }
    }

    pub fn from_word(word: &str) -> Option<Self> {
        [Quiesce::No, Quiesce::Try, Quiesce::Require]
            .into_iter()
            .find(|quiesce| quiesce.as_str() == word)
    }
}

/// The entry of one disk. As in libvirt, a disk that is not selected (`backup` is false) has only a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskDefinition {
    /// The name in the document; 1 to 255 bytes without control characters.
    pub name: String,
    /// The position of the `<disk>` tag.
    pub at: Position,
    pub backup: bool,
    pub format: Option<Format>,
    /// Only if the format is not raw.
    pub compress: Option<Compression>,
    pub mode: Option<BackupMode>,
    pub target: Option<Target>,
}

impl DiskDefinition {
    /// A selected disk with default settings.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            at: Position::default(),
            backup: true,
            format: None,
            compress: None,
            mode: None,
            target: None,
        }
    }

    /// A disk that is not selected.
    pub fn left_out(name: impl Into<String>) -> Self {
        Self {
            backup: false,
            ..Self::new(name)
        }
    }
}

/// The target of one disk. Paths are absolute, without `.`, `..`, control characters and trailing slash; nothing else
/// is checked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    File(PathBuf),
    Block(PathBuf),
    /// An index into the descriptors of the call.
    Fd(u32),
}
