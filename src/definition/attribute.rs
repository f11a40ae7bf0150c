//! The attributes of a tag, and the XML declaration, which has the same syntax. As [`super::xml`], it knows XML and no
//! words of the language but those of [`super::grammar`].

use std::borrow::Cow;

use quick_xml::events::attributes::{AttrError, Attributes};

use super::Error;
use super::grammar::{self, Element, ElementAttribute};
use super::xml::{Tag, Xml, is_space};

/// An attribute with its parsed value: references resolved, white space normalised.
pub(super) struct Attribute<'a> {
    /// Its row in the grammar.
    pub row: &'static ElementAttribute,
    pub value: Cow<'a, str>,
    pub offset: usize,
}

impl<'a> Xml<'a> {
    /// The attributes of a tag, in the order of the element's rows.
    pub fn attributes<const N: usize>(
        &self,
        tag: &Tag<'a>,
        element: &'static Element,
    ) -> Result<[Option<Attribute<'a>>; N], Error> {
        debug_assert_eq!(N, element.attributes.len(), "<{}>", element.name);
        let mut found = [const { None }; N];
        for attribute in Attributes::new(tag.content, tag.name.len()) {
            let attribute = attribute.map_err(|error| self.bad_attribute(tag, &error))?;
            let key = attribute.key.into_inner();
            let offset = self.offset_of(key);
            if !self.text[..offset].ends_with(is_space) {
                return Err(self.malformed(offset, "white space is missing before an attribute"));
            }
            let mut rows = found.iter_mut().zip(element.attributes);
            let Some((place, row)) = rows.find(|(_, row)| row.name == key) else {
                return Err(self.unknown_attribute(offset, key, tag, element));
            };
            // Always borrowed, because the iterator returns slices of its input.
            let Cow::Borrowed(raw) = attribute.value else {
                return Err(self.malformed(offset, "unreadable attribute"));
            };
            *place = Some(Attribute {
                row,
                value: self.value(raw)?,
                offset,
            });
        }
        Ok(found)
    }

    /// Checks `<?xml …?>`.
    pub fn declaration(&self, tag: &Tag<'a>) -> Result<(), Error> {
        if tag.offset != self.base {
            return Err(self.malformed(
                tag.offset,
                "the XML declaration is not at the beginning of the document",
            ));
        }
        let [version, encoding, standalone] = self.attributes(tag, &grammar::DECLARATION)?;
        let Some(version) = version else {
            return Err(self.malformed(tag.offset, "the XML declaration lacks version='1.0'"));
        };
        if version.value != "1.0" {
            return Err(Error::Version {
                at: self.at(version.offset),
                version: version.value.into_owned(),
            });
        }
        if let Some(encoding) = encoding
            && !encoding.value.eq_ignore_ascii_case("UTF-8")
        {
            return Err(Error::Encoding {
                at: self.at(encoding.offset),
                encoding: encoding.value.into_owned(),
            });
        }
        match standalone {
            Some(standalone) if !matches!(&*standalone.value, "yes" | "no") => Err(self.malformed(
                standalone.offset,
                "'standalone' of the XML declaration is 'yes' or 'no'",
            )),
            _ => Ok(()),
        }
    }

    fn unknown_attribute(&self, offset: usize, key: &str, tag: &Tag<'_>, element: &'static Element) -> Error {
        let at = self.at(offset);
        let name = key.to_owned();
        if name == "xmlns" || name.contains(':') {
            return Error::Namespaced { at, name };
        }
        Error::UnknownAttribute {
            at,
            name,
            element: tag.name.to_owned(),
            known: element.attribute_names(),
        }
    }

    /// An attribute's value (XML 1.0, 3.3.3). quick-xml's `normalized_value` does not fit: it reports no position of a
    /// bad reference, and accepts characters that XML forbids.
    fn value(&self, raw: &'a str) -> Result<Cow<'a, str>, Error> {
        if !raw.contains(['&', '<', '\t', '\r', '\n']) {
            return Ok(Cow::Borrowed(raw));
        }
        let offset = self.offset_of(raw);
        let mut value = String::with_capacity(raw.len());
        let mut characters = raw.char_indices();
        while let Some((index, character)) = characters.next() {
            match character {
                '<' => {
                    return Err(self.malformed(
                        offset + index,
                        "'<' in an attribute value; write &lt;, or add the missing quote before it",
                    ));
                }
                '&' => {
                    let rest = characters.as_str();
                    let Some(end) = rest.find(';') else {
                        return Err(self.lone_ampersand(offset + index));
                    };
                    value.push(self.resolve(&rest[..end], offset + index)?);
                    characters.nth(rest[..end].chars().count());
                }
                // CR LF counts as one line break.
                '\r' if characters.as_str().starts_with('\n') => {}
                '\t' | '\r' | '\n' => value.push(' '),
                character => value.push(character),
            }
        }
        Ok(Cow::Owned(value))
    }

    fn bad_attribute(&self, tag: &Tag<'_>, error: &AttrError) -> Error {
        let base = self.offset_of(tag.content);
        let (end, what) = match *error {
            AttrError::Duplicated(second, first) => {
                let name = tag.content.get(second..).unwrap_or_default();
                let name = name.split(|c| is_space(c) || c == '=').next().unwrap_or(name);
                return Error::DuplicateAttribute {
                    first: self.at(base + first),
                    at: self.at(base + second),
                    name: name.to_owned(),
                    element: tag.name.to_owned(),
                };
            }
            AttrError::ExpectedEq(end) | AttrError::ExpectedValue(end) => {
                (end, "an attribute without a value; write name='value'")
            }
            AttrError::UnquotedValue(end) => (end, "an attribute's value without quotes around it"),
            AttrError::ExpectedQuote(end, _) => (end, "an attribute's value without its closing quote"),
        };
        // quick-xml reports the offset of the missing character. The attribute's name precedes it.
        let before = tag.content.get(..end).unwrap_or_default();
        let before = before.trim_end_matches(|c| is_space(c) || c == '=');
        let start = before.rfind(is_space).map_or(0, |space| space + 1);
        self.malformed(base + start, what)
    }
}
