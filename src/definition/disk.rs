//! `<disks>`: parses each disk, then checks all of them together.
//!
//! As in libvirt, everything but the name of a disk with `backup='no'` has no effect. Its elements and attributes must
//! be known, but their values are not checked.

use std::collections::HashMap;

use super::attribute::Attribute;
use super::grammar::{self, DISK};
use super::parse::{Seen, checkpoint, no_attributes, number, require, unknown_word, unsupported};
use super::target::{TargetKey, TargetKind, target};
use super::xml::{Tag, Xml};
use super::{BackupMode, DiskDefinition, Error, Feature, MAX_DISK_NAME_BYTES, MAX_DISKS, Position, Target};
use crate::model::{Compression, Format};

/// The disks of a document, and facts that other elements must agree with.
pub(super) struct Disks {
    pub list: Vec<DiskDefinition>,
    /// The position of the first `<target>` of a selected disk.
    pub first_target: Option<Position>,
}

pub(super) fn disks<'a>(xml: &mut Xml<'a>, tag: &Tag<'a>) -> Result<Disks, Error> {
    no_attributes(xml, tag)?;
    let mut list: Vec<DiskDefinition> = Vec::new();
    let mut names = HashMap::new();
    let mut targets: HashMap<TargetKey, (String, Position)> = HashMap::new();
    let mut first_target = None;

    while let Some(child) = xml.child(tag)? {
        if child.name != "disk" {
            return Err(xml.unknown_element(&child, tag, grammar::DISKS.child_names()));
        }
        if list.len() == MAX_DISKS {
            return Err(Error::TooManyDisks {
                at: xml.at(child.offset),
            });
        }
        let (disk, target_at) = disk(xml, &child)?;
        if let Some(first) = names.insert(disk.name.clone(), disk.at) {
            return Err(Error::DiskTwice {
                at: disk.at,
                disk: disk.name,
                first,
            });
        }
        if let (Some(target), Some(at)) = (&disk.target, target_at) {
            first_target = first_target.or(Some(at));
            if let Some((other, first)) = targets.insert(TargetKey::of(target), (disk.name.clone(), at)) {
                return Err(Error::TargetTwice {
                    at,
                    target: TargetKey::of(target).to_string(),
                    disk: other,
                    first,
                });
            }
        }
        list.push(disk);
    }

    let selected = || list.iter().filter(|disk| disk.backup);
    if selected().next().is_none() {
        return Err(Error::NoDiskSelected {
            at: xml.at(tag.offset),
        });
    }
    let with = selected().find(|disk| disk.target.is_some());
    let without = selected().find(|disk| disk.target.is_none());
    if let (Some(with), Some(without)) = (with, without) {
        return Err(Error::MixedTargets {
            at: without.at,
            disk: without.name.clone(),
            other: with.name.clone(),
            other_at: with.at,
        });
    }
    Ok(Disks { list, first_target })
}

fn disk<'a>(xml: &mut Xml<'a>, tag: &Tag<'a>) -> Result<(DiskDefinition, Option<Position>), Error> {
    let at = xml.at(tag.offset);
    let [
        name,
        backup,
        kind,
        backupmode,
        index,
        incremental,
        exportname,
        exportbitmap,
    ] = xml.attributes(tag, &DISK)?;
    let name = disk_name(xml, require(xml, name, tag, &DISK, "name")?)?;
    let selected = match &backup {
        None => true,
        Some(backup) => match &*backup.value {
            "yes" => true,
            "no" => false,
            _ => return Err(unknown_word(xml, &DISK, backup)),
        },
    };
    if !selected {
        children(xml, tag, None)?;
        return Ok((
            DiskDefinition {
                at,
                ..DiskDefinition::left_out(name)
            },
            None,
        ));
    }

    let mode = mode(xml, backupmode, incremental)?;
    for (attribute, what) in [(exportname, "'exportname'"), (exportbitmap, "'exportbitmap'")] {
        if let Some(attribute) = attribute {
            return Err(Error::PullOnly {
                at: xml.at(attribute.offset),
                what,
            });
        }
    }
    if let Some(index) = index {
        // libvirt writes `index` into its output and ignores it in its input.
        number(xml, &DISK, &index)?;
    }
    let kind = match &kind {
        None => TargetKind::File,
        Some(kind) => match TargetKind::ALL
            .into_iter()
            .find(|known| known.word() == kind.value)
        {
            Some(known) => known,
            None if kind.value == "network" => {
                return Err(unsupported(xml, kind.offset, Feature::NetworkTarget));
            }
            None => return Err(unknown_word(xml, &DISK, kind)),
        },
    };

    let children = children(xml, tag, Some(kind))?;
    if children.target.is_none() && kind != TargetKind::File {
        return Err(Error::MissingTarget {
            at,
            disk: name,
            kind: kind.word(),
            wanted: kind.attribute(),
        });
    }
    let (target, target_at) = children.target.unzip();
    let disk = DiskDefinition {
        name,
        at,
        backup: true,
        format: children.format,
        compress: children.compress,
        mode,
        target,
    };
    Ok((disk, target_at))
}

/// libvirt's rule: a disk that names a checkpoint is backed up incrementally since that checkpoint.
fn mode(
    xml: &Xml<'_>,
    backupmode: Option<Attribute<'_>>,
    incremental: Option<Attribute<'_>>,
) -> Result<Option<BackupMode>, Error> {
    let full = match &backupmode {
        None => false,
        Some(mode) => match &*mode.value {
            "full" => true,
            "incremental" => false,
            _ => return Err(unknown_word(xml, &DISK, mode)),
        },
    };
    match (full, incremental) {
        (true, Some(incremental)) => Err(Error::IncrementalFull {
            at: xml.at(incremental.offset),
        }),
        (true, None) => Ok(Some(BackupMode::Full)),
        (false, Some(incremental)) => {
            let since = checkpoint(xml, &incremental.value, incremental.offset)?;
            Ok(Some(BackupMode::Incremental(Some(since))))
        }
        (false, None) => Ok(backupmode.map(|_| BackupMode::Incremental(None))),
    }
}

pub(super) fn disk_name(xml: &Xml<'_>, name: Attribute<'_>) -> Result<String, Error> {
    let at = xml.at(name.offset);
    let name = name.value.into_owned();
    match name.len() {
        0 => Err(Error::EmptyDiskName { at }),
        1..=MAX_DISK_NAME_BYTES if name.contains(char::is_control) => {
            Err(Error::DiskNameControl { at, name })
        }
        1..=MAX_DISK_NAME_BYTES => Ok(name),
        bytes => Err(Error::TooLong {
            at,
            what: "the name of a disk",
            bytes,
            limit: MAX_DISK_NAME_BYTES,
        }),
    }
}

#[derive(Default)]
struct Children {
    format: Option<Format>,
    compress: Option<Compression>,
    target: Option<(Target, Position)>,
}

/// Parses the children of a `<disk>`. Without a `kind` the disk is not selected, so their values are not checked.
fn children<'a>(xml: &mut Xml<'a>, disk: &Tag<'a>, kind: Option<TargetKind>) -> Result<Children, Error> {
    let mut children = Children::default();
    let mut seen = Seen::default();
    while let Some(tag) = xml.child(disk)? {
        seen.once(xml, &DISK, &tag)?;
        match (tag.name, kind) {
            ("driver", _) => {
                let [format, compress] = xml.attributes(&tag, &grammar::DRIVER)?;
                if kind.is_some() {
                    (children.format, children.compress) = driver(xml, format, compress)?;
                }
                xml.no_content(&tag)?;
            }
            ("target", _) | ("scratch", None) => children.target = target(xml, &tag, kind)?,
            ("scratch", Some(_)) => {
                return Err(Error::PullOnly {
                    at: xml.at(tag.offset),
                    what: "<scratch>",
                });
            }
            _ => return Err(xml.unknown_element(&tag, disk, DISK.child_names())),
        }
    }
    Ok(children)
}

fn driver(
    xml: &Xml<'_>,
    format: Option<Attribute<'_>>,
    compress: Option<Attribute<'_>>,
) -> Result<(Option<Format>, Option<Compression>), Error> {
    let format = match format {
        None => None,
        Some(word) => match Format::from_word(&word.value) {
            Some(format) => Some(format),
            None => {
                let feature = Feature::DriverType(word.value.into_owned());
                return Err(unsupported(xml, word.offset, feature));
            }
        },
    };
    let Some(word) = compress else {
        return Ok((format, None));
    };
    let Some(compress) = Compression::from_word(&word.value) else {
        return Err(unknown_word(xml, &grammar::DRIVER, &word));
    };
    if format == Some(Format::Raw) {
        return Err(Error::CompressedRaw {
            at: xml.at(word.offset),
        });
    }
    Ok((format, Some(compress)))
}
