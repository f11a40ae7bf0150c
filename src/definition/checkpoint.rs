//! The `<domaincheckpoint>` document, with libvirt's elements. XML syntax and names are those of a `<domainbackup>`.
//!
//! libvirt only writes `<creationTime>` and `<parent>`. A document that a client passes back may contain them; they
//! have no effect.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::disk::disk_name;
use super::grammar::{CHECKPOINT_DISK, CHECKPOINT_DISKS, DOMAINCHECKPOINT, PARENT};
use super::parse::{Seen, description, name, no_attributes, require, unknown_word, unsupported};
use super::xml::{Tag, Xml, trim};
use super::{Error, Feature, MAX_BYTES, MAX_DISKS, Position, write};
use crate::model::is_reserved;

/// A checkpoint as a caller describes it. `None` means that the document leaves it to the service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckpointDefinition {
    /// A name that passes [`is_checkpoint_name`](super::is_checkpoint_name).
    pub name: Option<String>,
    /// Free text, at most 4096 bytes.
    pub description: Option<String>,
    /// In seconds since 1970. Set by the service.
    pub creation_time: Option<u64>,
    /// The previous checkpoint. Set by the service.
    pub parent: Option<String>,
    /// The disks in the order of the document; at least one has a checkpoint.
    pub disks: Option<Vec<CheckpointDisk>>,
}

/// The entry of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointDisk {
    /// The name in the document; 1 to 255 bytes without control characters.
    pub name: String,
    /// The position of the `<disk>` tag.
    #[serde(skip)]
    pub at: Position,
    /// Whether the disk gets a bitmap at the checkpoint.
    pub bitmap: bool,
}

impl CheckpointDisk {
    /// A disk that gets a bitmap.
    pub fn recorded(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            at: Position::default(),
            bitmap: true,
        }
    }
}

impl CheckpointDefinition {
    /// The document, pretty-printed. [`parse_checkpoint`] of it returns the same value except for positions.
    pub fn to_xml(&self) -> String {
        write::checkpoint(self)
    }
}

/// Parses a document.
pub fn parse_checkpoint(text: &str) -> Result<CheckpointDefinition, Error> {
    if text.len() > MAX_BYTES {
        return Err(Error::TooLarge { bytes: text.len() });
    }
    let mut xml = Xml::new(text)?;
    let root = xml.root(DOMAINCHECKPOINT.name)?;
    no_attributes(&xml, &root)?;
    let mut definition = CheckpointDefinition::default();
    let mut seen = Seen::default();
    while let Some(tag) = xml.child(&root)? {
        seen.once(&xml, &DOMAINCHECKPOINT, &tag)?;
        match tag.name {
            "name" => definition.name = Some(own_name(&mut xml, &tag)?),
            "description" => definition.description = Some(description(&mut xml, &tag)?),
            "creationTime" => definition.creation_time = Some(creation_time(&mut xml, &tag)?),
            "parent" => definition.parent = Some(parent(&mut xml, &tag)?),
            "disks" => definition.disks = Some(disks(&mut xml, &tag)?),
            _ => return Err(xml.unknown_element(&tag, &root, DOMAINCHECKPOINT.child_names())),
        }
    }
    xml.finish()?;
    Ok(definition)
}

fn own_name<'a>(xml: &mut Xml<'a>, tag: &Tag<'a>) -> Result<String, Error> {
    let name = name(xml, tag, "the checkpoint")?;
    match is_reserved(&name) {
        true => Err(Error::ReservedName {
            at: xml.at(tag.offset),
            name,
        }),
        false => Ok(name),
    }
}

fn creation_time<'a>(xml: &mut Xml<'a>, tag: &Tag<'a>) -> Result<u64, Error> {
    no_attributes(xml, tag)?;
    let content = xml.content(tag)?;
    let value = trim(&content).to_owned();
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    match value.parse() {
        Ok(seconds) if digits => Ok(seconds),
        _ => Err(Error::CreationTime {
            at: xml.at(tag.offset),
            value,
        }),
    }
}

fn parent<'a>(xml: &mut Xml<'a>, tag: &Tag<'a>) -> Result<String, Error> {
    no_attributes(xml, tag)?;
    let mut parent = None;
    let mut seen = Seen::default();
    while let Some(child) = xml.child(tag)? {
        seen.once(xml, &PARENT, &child)?;
        match child.name {
            "name" => parent = Some(name(xml, &child, "a checkpoint")?),
            _ => return Err(xml.unknown_element(&child, tag, PARENT.child_names())),
        }
    }
    parent.ok_or_else(|| Error::MissingElement {
        at: xml.at(tag.offset),
        element: "parent",
        child: "name",
    })
}

fn disks<'a>(xml: &mut Xml<'a>, tag: &Tag<'a>) -> Result<Vec<CheckpointDisk>, Error> {
    no_attributes(xml, tag)?;
    let mut list: Vec<CheckpointDisk> = Vec::new();
    let mut names = HashMap::new();
    while let Some(child) = xml.child(tag)? {
        if child.name != "disk" {
            return Err(xml.unknown_element(&child, tag, CHECKPOINT_DISKS.child_names()));
        }
        if list.len() == MAX_DISKS {
            return Err(Error::TooManyDisks {
                at: xml.at(child.offset),
            });
        }
        let disk = disk(xml, &child)?;
        if let Some(first) = names.insert(disk.name.clone(), disk.at) {
            return Err(Error::DiskTwice {
                at: disk.at,
                disk: disk.name,
                first,
            });
        }
        list.push(disk);
    }
    if list.iter().any(|disk| disk.bitmap) {
        return Ok(list);
    }
    Err(Error::NoDiskRecorded {
        at: xml.at(tag.offset),
    })
}

fn disk<'a>(xml: &mut Xml<'a>, tag: &Tag<'a>) -> Result<CheckpointDisk, Error> {
    let at = xml.at(tag.offset);
    let [name, checkpoint, bitmap] = xml.attributes(tag, &CHECKPOINT_DISK)?;
    let name = disk_name(xml, require(xml, name, tag, &CHECKPOINT_DISK, "name")?)?;
    let recorded = match &checkpoint {
        None => true,
        Some(checkpoint) => match &*checkpoint.value {
            "bitmap" => true,
            "no" => false,
            _ => return Err(unknown_word(xml, &CHECKPOINT_DISK, checkpoint)),
        },
    };
    if let Some(bitmap) = bitmap {
        return Err(unsupported(xml, bitmap.offset, Feature::OwnBitmap));
    }
    xml.no_content(tag)?;
    Ok(CheckpointDisk {
        name,
        at,
        bitmap: recorded,
    })
}
