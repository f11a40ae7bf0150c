//! Parses the root element and its children, except `<disks>`. Knows the words of the language and the rules between
//! its parts; [`super::xml`] knows XML.

use super::attribute::Attribute;
use super::disk;
use super::grammar::{self, DOMAINBACKUP, Element};
use super::xml::{Tag, Xml, trim};
use super::{CheckpointRef, Definition, Error, Feature, MAX_BYTES, Quiesce, StoreRef};
use crate::model::{MAX_DESCRIPTION_BYTES, is_valid_name};

/// Parses a document. An empty document is an error here; the caller decides whether it means the defaults.
pub fn parse(text: &str) -> Result<Definition, Error> {
    if text.len() > MAX_BYTES {
        return Err(Error::TooLarge { bytes: text.len() });
    }
    let mut xml = Xml::new(text)?;
    let root = xml.root(DOMAINBACKUP.name)?;
    let definition = domainbackup(&mut xml, &root)?;
    xml.finish()?;
    Ok(definition)
}

fn domainbackup<'a>(xml: &mut Xml<'a>, root: &Tag<'a>) -> Result<Definition, Error> {
    let [mode] = xml.attributes(root, &DOMAINBACKUP)?;
    if let Some(mode) = mode {
        match &*mode.value {
            "push" => {}
            "pull" => return Err(unsupported(xml, mode.offset, Feature::Pull)),
            _ => return Err(unknown_word(xml, &DOMAINBACKUP, &mode)),
        }
    }

    let mut definition = Definition::default();
    let mut seen = Seen::default();
    let mut target = None;
    while let Some(tag) = xml.child(root)? {
        seen.once(xml, &DOMAINBACKUP, &tag)?;
        match tag.name {
            "name" => definition.name = Some(name(xml, &tag, "the backup")?),
            "description" => definition.description = Some(description(xml, &tag)?),
            "store" => definition.store = Some(store(xml, &tag)?),
            "bandwidth" => definition.bandwidth = Some(bandwidth(xml, &tag)?),
            "quiesce" => definition.quiesce = Some(quiesce(xml, &tag)?),
            "disks" => {
                let disks = disk::disks(xml, &tag)?;
                definition.disks = Some(disks.list);
                target = disks.first_target;
            }
            "incremental" => definition.incremental = Some(incremental(xml, &tag)?),
            "server" => {
                return Err(Error::PullOnly {
                    at: xml.at(tag.offset),
                    what: "<server>",
                });
            }
            _ => return Err(xml.unknown_element(&tag, root, DOMAINBACKUP.child_names())),
        }
    }
    if let (Some(store), Some(at)) = (&definition.store, target) {
        return Err(Error::StoreAndTarget { at, store: store.at });
    }
    Ok(definition)
}

pub(super) fn name<'a>(xml: &mut Xml<'a>, tag: &Tag<'a>, what: &'static str) -> Result<String, Error> {
    no_attributes(xml, tag)?;
    let name = xml.content(tag)?;
    if !is_valid_name(&name) {
        return Err(Error::InvalidName {
            at: xml.at(tag.offset),
            what,
            name,
        });
    }
    Ok(name)
}

fn incremental<'a>(xml: &mut Xml<'a>, tag: &Tag<'a>) -> Result<CheckpointRef, Error> {
    no_attributes(xml, tag)?;
    let content = xml.content(tag)?;
    checkpoint(xml, trim(&content), tag.offset)
}

/// The checkpoint that an attribute or element names.
pub(super) fn checkpoint(xml: &Xml<'_>, name: &str, offset: usize) -> Result<CheckpointRef, Error> {
    let (name, at) = (name.to_owned(), xml.at(offset));
    match is_valid_name(&name) {
        true => Ok(CheckpointRef { name, at }),
        false => Err(Error::InvalidName {
            at,
            what: "a checkpoint",
            name,
        }),
    }
}

pub(super) fn description<'a>(xml: &mut Xml<'a>, tag: &Tag<'a>) -> Result<String, Error> {
    no_attributes(xml, tag)?;
    let description = xml.content(tag)?;
    if description.len() > MAX_DESCRIPTION_BYTES {
        return Err(Error::TooLong {
            at: xml.at(tag.offset),
            what: "the description",
            bytes: description.len(),
            limit: MAX_DESCRIPTION_BYTES,
        });
    }
    Ok(description)
}

fn store<'a>(xml: &mut Xml<'a>, tag: &Tag<'a>) -> Result<StoreRef, Error> {
    let [name] = xml.attributes(tag, &grammar::STORE)?;
    let name = require(xml, name, tag, &grammar::STORE, "name")?;
    if !is_valid_name(&name.value) {
        return Err(Error::InvalidName {
            at: xml.at(name.offset),
            what: "a store",
            name: name.value.into_owned(),
        });
    }
    xml.no_content(tag)?;
    Ok(StoreRef {
        name: name.value.into_owned(),
        at: xml.at(tag.offset),
    })
}

fn quiesce<'a>(xml: &mut Xml<'a>, tag: &Tag<'a>) -> Result<Quiesce, Error> {
    let [mode] = xml.attributes(tag, &grammar::QUIESCE)?;
    let mode = require(xml, mode, tag, &grammar::QUIESCE, "mode")?;
    let Some(quiesce) = Quiesce::from_word(&mode.value) else {
        return Err(unknown_word(xml, &grammar::QUIESCE, &mode));
    };
    xml.no_content(tag)?;
    Ok(quiesce)
}

fn bandwidth<'a>(xml: &mut Xml<'a>, tag: &Tag<'a>) -> Result<u64, Error> {
    let [unit] = xml.attributes(tag, &grammar::BANDWIDTH)?;
    let scale = match &unit {
        None => 1,
        Some(unit) => match scale(&unit.value) {
            Some(scale) => scale,
            None => return Err(unknown_word(xml, &grammar::BANDWIDTH, unit)),
        },
    };
    let content = xml.content(tag)?;
    let at = xml.at(tag.offset);
    let value = trim(&content).to_owned();
    if !value.bytes().all(|byte| byte.is_ascii_digit()) || value.bytes().all(|byte| byte == b'0') {
        return Err(Error::Bandwidth { at, value });
    }
    // The value has only digits, so a parse error means overflow.
    let bytes = value.parse().ok().and_then(|value: u64| value.checked_mul(scale));
    bytes.ok_or_else(|| Error::BandwidthOverflow {
        at,
        value,
        unit: unit.map_or_else(|| "bytes".to_owned(), |unit| unit.value.into_owned()),
    })
}

/// libvirt's units (`virScaleInteger`), in any case. A letter alone means the binary unit.
fn scale(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_lowercase();
    if matches!(&*unit, "b" | "byte" | "bytes") {
        return Some(1);
    }
    let power = "kmgtpe".find(unit.chars().next()?)? as u32 + 1;
    match &unit[1..] {
        "" | "ib" => Some(1024_u64.pow(power)),
        "b" => Some(1000_u64.pow(power)),
        _ => None,
    }
}

/// The children that an element had so far, with their offsets.
#[derive(Default)]
pub(super) struct Seen(Vec<(&'static str, usize)>);

impl Seen {
    /// Refuses a second child of the same name, if the parent takes it.
    pub fn once(&mut self, xml: &Xml<'_>, parent: &'static Element, tag: &Tag<'_>) -> Result<(), Error> {
        let child = parent.children().iter().find(|child| child.name == tag.name);
        let Some(name) = child.map(|child| child.name) else {
            return Ok(());
        };
        if let Some((_, first)) = self.0.iter().find(|(word, _)| *word == name) {
            return Err(Error::DuplicateElement {
                first: xml.at(*first),
                at: xml.at(tag.offset),
                name,
                parent: parent.name,
            });
        }
        self.0.push((name, tag.offset));
        Ok(())
    }
}

/// Refuses attributes of an element that takes none.
pub(super) fn no_attributes<'a>(xml: &Xml<'a>, tag: &Tag<'a>) -> Result<(), Error> {
    let [] = xml.attributes(tag, &grammar::BARE)?;
    Ok(())
}

pub(super) fn unsupported(xml: &Xml<'_>, offset: usize, feature: Feature) -> Error {
    Error::Unsupported {
        at: xml.at(offset),
        feature,
    }
}

pub(super) fn unknown_word(xml: &Xml<'_>, element: &'static Element, attribute: &Attribute<'_>) -> Error {
    Error::UnknownWord {
        at: xml.at(attribute.offset),
        element: element.name,
        attribute: attribute.row.name,
        word: attribute.value.clone().into_owned(),
        known: attribute.row.words(),
    }
}

pub(super) fn require<'a>(
    xml: &Xml<'_>,
    attribute: Option<Attribute<'a>>,
    tag: &Tag<'_>,
    element: &'static Element,
    name: &'static str,
) -> Result<Attribute<'a>, Error> {
    attribute.ok_or_else(|| Error::MissingAttribute {
        at: xml.at(tag.offset),
        element: element.name,
        attribute: name,
    })
}

/// Accepts digits only; `u32::from_str` would accept a sign too.
pub(super) fn number(
    xml: &Xml<'_>,
    element: &'static Element,
    attribute: &Attribute<'_>,
) -> Result<u32, Error> {
    let digits = attribute.value.bytes().all(|byte| byte.is_ascii_digit());
    match attribute.value.parse() {
        Ok(number) if digits => Ok(number),
        _ => Err(Error::NotANumber {
            at: xml.at(attribute.offset),
            element: element.name,
            attribute: attribute.row.name,
            value: attribute.value.clone().into_owned(),
        }),
    }
}
