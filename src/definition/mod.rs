//! The `<domainbackup>` and `<domaincheckpoint>` documents: what a caller asks for, as types, and the way from XML to them
//! and back.
//!
//! The language is libvirt's, with a few additions (`<name>`, `<description>`, `<store>`, `<bandwidth>`,
//! `<quiesce>`, disks of `type='fd'`, `compress`). What libvirt accepts for a push backup means the same here;
//! what is not done yet is refused as unsupported, by name.
//!
//! This module is pure. It may not open a file, ask a QEMU, or know D-Bus: whether a disk, a store or a file
//! exists is for those to say who come later. A [`Definition`] that [`parse`] returned is consistent in itself:
//! no disk twice, no target twice, targets for all disks or for none.

mod attribute;
mod checkpoint;
mod disk;
mod error;
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

/// The longest document that is looked at, in bytes. Checked before anything else.
pub const MAX_BYTES: usize = 1 << 20;

const MAX_DISKS: usize = 256;
const MAX_DISK_NAME_BYTES: usize = 255;
/// PATH_MAX counts the NUL that ends a path, which is not in the document.
const MAX_PATH_BYTES: usize = 4095;

/// A place in the document, both counted from 1; columns count characters, not bytes. 0:0 stands for
/// something that no document said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub line: u32,
    pub column: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

/// A backup as a caller describes it. `None` means that the document does not say; the default value says
/// nothing at all, which means: every writable disk, full, into the default store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Definition {
    /// A name that [`is_valid_name`].
    pub name: Option<String>,
    /// Free text, at most 4096 bytes.
    pub description: Option<String>,
    /// Where the service is to choose the files. Never together with a disk's target.
    pub store: Option<StoreRef>,
    /// Bytes a second, all disks together; never 0.
    pub bandwidth: Option<u64>,
    pub quiesce: Option<Quiesce>,
    /// What all disks are backed up since that say nothing else.
    pub incremental: Option<CheckpointRef>,
    /// The disks that the document lists, in its order; at least one of them is to be backed up.
    pub disks: Option<Vec<DiskDefinition>>,
}

impl Definition {
    /// The document that means this, pretty-printed. [`parse`] makes the same of it, positions aside.
    ///
    /// Characters that XML 1.0 can't carry at all (most control characters; no parsed document has them) become
    /// U+FFFD, as do the bytes of a path that are not UTF-8.
    pub fn to_xml(&self) -> String {
        write::definition(self)
    }
}

/// A store, by its name in the service's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreRef {
    pub name: String,
    pub at: Position,
}

/// A checkpoint, by its name: an instant since when it is known what changed on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointRef {
    pub name: String,
    pub at: Position,
}

/// How much of a disk is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupMode {
    Full,
    /// What changed since a checkpoint: this one, or that of the document as a whole or of the call.
    Incremental(Option<CheckpointRef>),
}

/// Whether the guest's file systems are frozen for the instant of the backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quiesce {
    /// As where nothing is said.
    No,
    /// If the guest agent can; else the backup is made without.
    Try,
    /// No backup without it.
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

/// What the document says about one disk. A disk that is left out (`backup` is false) has nothing but a name:
/// whatever else the document said about it has no effect, as in libvirt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskDefinition {
    /// As the document names it; 1 to 255 bytes without control characters.
    pub name: String,
    /// Of the `<disk>` tag.
    pub at: Position,
    pub backup: bool,
    pub format: Option<Format>,
    /// Only where the format is not raw.
    pub compress: Option<Compression>,
    pub mode: Option<BackupMode>,
    pub target: Option<Target>,
}

impl DiskDefinition {
    /// A disk that is to be backed up, with nothing else said about it.
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

    /// A disk that is left out.
    pub fn left_out(name: impl Into<String>) -> Self {
        Self {
            backup: false,
            ..Self::new(name)
        }
    }
}

/// Where one disk's data goes. Paths are absolute, free of `.`, `..` and control characters, and don't end in
/// a slash; nothing else is known of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    File(PathBuf),
    Block(PathBuf),
    /// An index into the descriptors that came with the document.
    Fd(u32),
}
