//! The errors of a document: facts in fields, and their texts.
//!
//! Each text begins with the position and quotes the wrong word. It names the correct word if that is known. [`Quoted`]
//! quotes callers' words, so that a text has bounded length and cannot break a log line.

use std::fmt;

use super::{MAX_BYTES, MAX_DISKS, Position};
use crate::error::Kind;
use crate::model::MAX_NAME_BYTES;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the document has {bytes} bytes; at most {MAX_BYTES} are allowed")]
    TooLarge { bytes: usize },
    #[error("the document is empty")]
    Empty,
    #[error("{at}: the document has no root element; it needs a <{wanted}>")]
    NoRoot { at: Position, wanted: &'static str },
    #[error("{at}: the root element is <{}>; it has to be <{wanted}>", Quoted(.name))]
    WrongRoot {
        at: Position,
        name: String,
        wanted: &'static str,
    },

    // XML itself
    #[error("{at}: {what}")]
    Malformed { at: Position, what: String },
    #[error("{at}: the character U+{:04X} is not allowed in XML", u32::from(*.character))]
    IllegalCharacter { at: Position, character: char },
    #[error("{at}: the encoding '{}' is not accepted; the document has to be UTF-8", Quoted(.encoding))]
    Encoding { at: Position, encoding: String },
    #[error("{at}: XML version '{}' is not accepted; it has to be '1.0'", Quoted(.version))]
    Version { at: Position, version: String },
    #[error("{at}: a document type declaration (<!DOCTYPE>) is not accepted; remove it")]
    Doctype { at: Position },
    #[error(
        "{at}: unknown entity '&{};'; there are &amp; &lt; &gt; &apos; &quot; and numbers like &#38; \
         (write a plain '&' as &amp;)", Quoted(.name)
    )]
    UnknownEntity { at: Position, name: String },
    #[error("{at}: '&{};' refers to a character that XML does not allow", Quoted(.reference))]
    BadReference { at: Position, reference: String },
    #[error("{at}: <{name}> is not closed before the document ends")]
    UnclosedElement { at: Position, name: String },
    #[error("{at}: </{}> found where </{expected}> was expected", Quoted(.found))]
    MismatchedEnd {
        at: Position,
        expected: String,
        found: String,
    },
    #[error("{at}: </{}> has no start tag", Quoted(.name))]
    UnmatchedEnd { at: Position, name: String },

    // Structure
    #[error(
        "{at}: '{}' uses namespaces, which are not supported; remove the prefix or the declaration", Quoted(.name)
    )]
    Namespaced { at: Position, name: String },
    #[error("{at}: unknown element <{}> in <{parent}>, which takes {}", Quoted(.name), Elements(.known))]
    UnknownElement {
        at: Position,
        name: String,
        parent: String,
        known: Vec<&'static str>,
    },
    #[error(
        "{at}: unknown attribute '{}' of <{element}>, which takes {}",
        Quoted(.name), Words(.known, "and")
    )]
    UnknownAttribute {
        at: Position,
        name: String,
        element: String,
        known: Vec<&'static str>,
    },
    #[error("{at}: a second <{name}> in <{parent}>; the first is at {first}")]
    DuplicateElement {
        at: Position,
        name: &'static str,
        parent: &'static str,
        first: Position,
    },
    #[error("{at}: a second attribute '{}' of <{element}>; the first is at {first}", Quoted(.name))]
    DuplicateAttribute {
        at: Position,
        name: String,
        element: String,
        first: Position,
    },
    #[error("{at}: <{element}> lacks its attribute '{attribute}'")]
    MissingAttribute {
        at: Position,
        element: &'static str,
        attribute: &'static str,
    },
    #[error("{at}: <{element}> lacks its <{child}>")]
    MissingElement {
        at: Position,
        element: &'static str,
        child: &'static str,
    },
    #[error("{at}: text '{}' directly in <{parent}>, which takes no text", Quoted(.text))]
    StrayText {
        at: Position,
        text: String,
        parent: String,
    },
    #[error("{at}: text '{}' outside the root element", Quoted(.text))]
    TextOutside { at: Position, text: String },
    #[error("{at}: a second root element <{}>; a document has one", Quoted(.name))]
    SecondRoot { at: Position, name: String },

    // Values
    #[error(
        "{at}: '{}' is not a value for '{attribute}' of <{element}>; use {}",
        Quoted(.word), Words(.known, "or")
    )]
    UnknownWord {
        at: Position,
        element: &'static str,
        attribute: &'static str,
        word: String,
        known: &'static [&'static str],
    },
    #[error(
        "{at}: '{}' is not a value for '{attribute}' of <{element}>; it has to be a number from 0 to {}",
        Quoted(.value), u32::MAX
    )]
    NotANumber {
        at: Position,
        element: &'static str,
        attribute: &'static str,
        value: String,
    },
    #[error(
        "{at}: '{}' is not a valid name for {what}; use 1 to {MAX_NAME_BYTES} \
         letters, digits, '_', '-' and '.', and do not begin with '.'", Quoted(.name)
    )]
    InvalidName {
        at: Position,
        what: &'static str,
        name: String,
    },
    #[error(
        "{at}: a checkpoint cannot have the name '{}'; 'auto', 'full', 'no' and names in the form of a backup id \
         are reserved", Quoted(.name)
    )]
    ReservedName { at: Position, name: String },
    #[error("{at}: the creation time '{}' is not a whole number of seconds since 1970", Quoted(.value))]
    CreationTime { at: Position, value: String },
    #[error("{at}: {what} has {bytes} bytes; at most {limit} are allowed")]
    TooLong {
        at: Position,
        what: &'static str,
        bytes: usize,
        limit: usize,
    },
    #[error("{at}: the bandwidth '{}' is not a whole number greater than 0", Quoted(.value))]
    Bandwidth { at: Position, value: String },
    #[error(
        "{at}: the bandwidth '{}' with unit '{}' is more than {} bytes a second",
        Quoted(.value), Quoted(.unit), u64::MAX
    )]
    BandwidthOverflow {
        at: Position,
        value: String,
        unit: String,
    },
    #[error("{at}: the name of a disk is empty")]
    EmptyDiskName { at: Position },
    #[error("{at}: the name of disk '{}' has a control character", Quoted(.name))]
    DiskNameControl { at: Position, name: String },
    #[error("{at}: the path '{}' {problem}", Quoted(.path))]
    Path {
        at: Position,
        path: String,
        problem: PathProblem,
    },

    // Contradictions
    #[error("{at}: {what} belongs to pull mode; this backup is a push")]
    PullOnly { at: Position, what: &'static str },
    #[error("{at}: 'incremental' contradicts backupmode='full'; remove one of the two")]
    IncrementalFull { at: Position },
    #[error("{at}: a raw image can't be compressed; use type='qcow2' or remove 'compress'")]
    CompressedRaw { at: Position },
    #[error("{at}: '{found}' does not apply to the target of a disk of type '{kind}'; use '{wanted}'")]
    TargetAttribute {
        at: Position,
        found: &'static str,
        wanted: &'static str,
        kind: &'static str,
    },
    #[error("{at}: disk '{}' is of type '{kind}' and needs a <target {wanted}='…'/>", Quoted(.disk))]
    MissingTarget {
        at: Position,
        disk: String,
        kind: &'static str,
        wanted: &'static str,
    },
    #[error("{at}: disk '{}' is listed twice; the first is at {first}", Quoted(.disk))]
    DiskTwice {
        at: Position,
        disk: String,
        first: Position,
    },
    #[error("{at}: the target '{}' is already used by disk '{}' ({first})", Quoted(.target), Quoted(.disk))]
    TargetTwice {
        at: Position,
        target: String,
        disk: String,
        first: Position,
    },
    #[error("{at}: more than {MAX_DISKS} disks")]
    TooManyDisks { at: Position },
    #[error(
        "{at}: no disk is selected: list a disk without backup='no', or remove <disks> to select every writable disk"
    )]
    NoDiskSelected { at: Position },
    #[error(
        "{at}: no disk has a checkpoint: list a disk without checkpoint='no', or remove <disks> to include every \
         disk that can have one"
    )]
    NoDiskRecorded { at: Position },
    #[error(
        "{at}: <target> contradicts <store> ({store}), because the service chooses the files in a store; remove one"
    )]
    StoreAndTarget { at: Position, store: Position },
    #[error(
        "{at}: disk '{}' has no target but disk '{}' has ({other_at}); give every disk a target, or none",
        Quoted(.disk), Quoted(.other)
    )]
    MixedTargets {
        at: Position,
        disk: String,
        other: String,
        other_at: Position,
    },

    #[error("{at}: {feature}")]
    Unsupported { at: Position, feature: Feature },
}

/// Parts of the language that the service does not support yet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Feature {
    #[error("mode='pull' is not supported; use mode='push'")]
    Pull,
    #[error("a network target is not supported; use type='file', 'block' or 'fd'")]
    NetworkTarget,
    #[error("<seclabel> is not supported; remove it: QEMU gets an open file and needs no right to its path")]
    SecurityLabel,
    #[error("an encrypted target (<encryption>) is not supported")]
    Encryption,
    #[error("bitmap='…' is not supported; remove it, because the service names its bitmaps")]
    OwnBitmap,
    #[error("driver type '{}' is not supported; use 'qcow2' or 'raw'", Quoted(.0))]
    DriverType(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathProblem {
    #[error("is not absolute; it has to begin with '/'")]
    Relative,
    #[error("has a control character")]
    ControlCharacter,
    #[error("ends in '/'; it has to name a file")]
    TrailingSlash,
    #[error("has a '.' or '..' component; write the path without")]
    Dots,
}

impl Error {
    pub fn kind(&self) -> Kind {
        match self {
            Error::Unsupported { .. } => Kind::Unsupported,
            _ => Kind::InvalidDefinition,
        }
    }
}

impl From<Error> for crate::error::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

/// A caller's word for a message: its first 64 characters, unprintable ones escaped.
struct Quoted<'a>(&'a str);

const QUOTED_CHARACTERS: usize = 64;

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut characters = self.0.chars();
        for character in characters.by_ref().take(QUOTED_CHARACTERS) {
            match character {
                '\'' | '"' => write!(f, "{character}")?,
                _ => write!(f, "{}", character.escape_debug())?,
            }
        }
        match characters.next() {
            Some(_) => f.write_str("…"),
            None => Ok(()),
        }
    }
}

/// `'a', 'b' and 'c'`.
struct Words<'a>(&'a [&'a str], &'a str);

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("none"),
            [word] => write!(f, "'{word}'"),
            [first @ .., last] => {
                let first: Vec<String> = first.iter().map(|word| format!("'{word}'")).collect();
                write!(f, "{} {} '{last}'", first.join(", "), self.1)
            }
        }
    }
}

/// `<a>, <b>`.
struct Elements<'a>(&'a [&'a str]);

impl fmt::Display for Elements<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        let elements: Vec<String> = self.0.iter().map(|name| format!("<{name}>")).collect();
        f.write_str(&elements.join(", "))
    }
}
