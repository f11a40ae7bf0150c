//! Parses `<target>`: the target of one disk.

use std::fmt;
use std::path::PathBuf;

use super::attribute::Attribute;
use super::grammar::TARGET;
use super::parse::{number, require, unsupported};
use super::xml::{Tag, Xml};
use super::{Error, Feature, MAX_PATH_BYTES, PathProblem, Position, Target};

/// The `type` of a disk, which determines the attribute of its target.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum TargetKind {
    File,
    Block,
    Fd,
}

impl TargetKind {
    pub const ALL: [Self; 3] = [TargetKind::File, TargetKind::Block, TargetKind::Fd];
    pub const WORDS: &'static [&'static str] = &["file", "block", "fd"];
    /// The attributes of `<target>`, in the order of `ALL`.
    const ATTRIBUTES: &'static [&'static str] = &["file", "dev", "fd"];

    pub fn word(self) -> &'static str {
        Self::WORDS[self as usize]
    }

    pub fn attribute(self) -> &'static str {
        Self::ATTRIBUTES[self as usize]
    }
}

/// Without a `kind` the disk is not selected, so only the form of its target is checked.
pub(super) fn target<'a>(
    xml: &mut Xml<'a>,
    tag: &Tag<'a>,
    kind: Option<TargetKind>,
) -> Result<Option<(Target, Position)>, Error> {
    let at = xml.at(tag.offset);
    let attributes = xml.attributes(tag, &TARGET)?;
    let target = match kind {
        None => None,
        Some(kind) => Some((place(xml, tag, kind, attributes)?, at)),
    };
    match xml.child(tag)? {
        None => Ok(target),
        Some(child) => Err(match child.name {
            "seclabel" => unsupported(xml, child.offset, Feature::SecurityLabel),
            "encryption" => unsupported(xml, child.offset, Feature::Encryption),
            _ => xml.unknown_element(&child, tag, TARGET.child_names()),
        }),
    }
}

fn place(
    xml: &Xml<'_>,
    tag: &Tag<'_>,
    kind: TargetKind,
    attributes: [Option<Attribute<'_>>; 3],
) -> Result<Target, Error> {
    let mut wanted = None;
    for attribute in attributes.into_iter().flatten() {
        if attribute.row.name != kind.attribute() {
            return Err(Error::TargetAttribute {
                at: xml.at(attribute.offset),
                found: attribute.row.name,
                wanted: kind.attribute(),
                kind: kind.word(),
            });
        }
        wanted = Some(attribute);
    }
    let place = require(xml, wanted, tag, &TARGET, kind.attribute())?;
    Ok(match kind {
        TargetKind::File => Target::File(path(xml, place)?),
        TargetKind::Block => Target::Block(path(xml, place)?),
        TargetKind::Fd => Target::Fd(number(xml, &TARGET, &place)?),
    })
}

fn path(xml: &Xml<'_>, attribute: Attribute<'_>) -> Result<PathBuf, Error> {
    let at = xml.at(attribute.offset);
    let path = attribute.value.into_owned();
    if path.len() > MAX_PATH_BYTES {
        return Err(Error::TooLong {
            at,
            what: "the path",
            bytes: path.len(),
            limit: MAX_PATH_BYTES,
        });
    }
    let problem = if path.contains(char::is_control) {
        PathProblem::ControlCharacter
    } else if !path.starts_with('/') {
        PathProblem::Relative
    } else if path.ends_with('/') {
        PathProblem::TrailingSlash
    } else if path.split('/').any(|component| matches!(component, "." | "..")) {
        PathProblem::Dots
    } else {
        return Ok(PathBuf::from(path));
    };
    Err(Error::Path { at, path, problem })
}

/// The identity of a target, which two disks must not share. A path is the same for a file and a block device.
#[derive(PartialEq, Eq, Hash)]
pub(super) enum TargetKey {
    Path(PathBuf),
    Fd(u32),
}

impl TargetKey {
    pub fn of(target: &Target) -> Self {
        match target {
            Target::File(path) | Target::Block(path) => TargetKey::Path(path.clone()),
            Target::Fd(index) => TargetKey::Fd(*index),
        }
    }
}

impl fmt::Display for TargetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TargetKey::Path(path) => path.display().fmt(f),
            TargetKey::Fd(index) => write!(f, "fd {index}"),
        }
    }
}
