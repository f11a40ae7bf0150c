//! Well-formed XML with positions: quick-xml's events, and the checks of XML 1.0 that quick-xml leaves out (legal
//! characters, entities, white space between attributes, one root). Knows no element names.
//!
//! The callers follow a fixed grammar and refuse unknown elements, which bounds the depth of nesting.

use std::borrow::Cow;
use std::cell::Cell;

use quick_xml::Reader;
use quick_xml::errors::{Error as XmlError, IllFormedError, SyntaxError};
use quick_xml::escape::resolve_xml_entity;
use quick_xml::events::{BytesRef, Event};

use super::{Error, Position};

/// A start tag; `offset` is the offset of its `<`.
#[derive(Clone, Copy)]
pub(super) struct Tag<'a> {
    pub name: &'a str,
    pub offset: usize,
    pub content: &'a str,
}

enum Node<'a> {
    Open(Tag<'a>),
    Close,
    /// `plain` is false for text from a reference or a CDATA section. Outside the root, even white space from these is
    /// refused.
    Text {
        text: Cow<'a, str>,
        offset: usize,
        plain: bool,
    },
    End,
}

pub(super) struct Xml<'a> {
    pub text: &'a str,
    reader: Reader<&'a [u8]>,
    /// The offset of the reader's first byte in `text`.
    pub base: usize,
    /// The last computed position. Positions in ascending order need only one pass over the text.
    mark: Cell<(usize, Position)>,
}

/// quick-xml skips a leading byte order mark without counting it.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// Whether XML 1.0, 2.2 allows the character. A `char` is never a surrogate.
pub(super) fn is_legal(character: char) -> bool {
    !matches!(
        character,
        '\0'..='\u{8}' | '\u{b}' | '\u{c}' | '\u{e}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}'
    )
}

pub(super) fn is_space(character: char) -> bool {
    matches!(character, ' ' | '\t' | '\r' | '\n')
}

/// The text without leading and trailing XML white space.
pub(super) fn trim(text: &str) -> &str {
    text.trim_matches(is_space)
}

impl<'a> Xml<'a> {
    pub fn new(text: &'a str) -> Result<Self, Error> {
        let body = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text);
        let base = text.len() - body.len();
        // The reader gets no byte order mark, because it would skip it and shift its offsets.
        let marked = body.starts_with(BYTE_ORDER_MARK);
        let mut reader = Reader::from_str(if marked { "" } else { body });
        reader.config_mut().expand_empty_elements = true;
        reader.config_mut().check_comments = true;
        let start = Position { line: 1, column: 1 };
        let xml = Self {
            text,
            reader,
            base,
            mark: Cell::new((base, start)),
        };
        if marked {
            return Err(xml.malformed(base, "a second byte order mark"));
        }
        if trim(body).is_empty() {
            return Err(Error::Empty);
        }
        if let Some((offset, character)) = body.char_indices().find(|(_, character)| !is_legal(*character)) {
            return Err(Error::IllegalCharacter {
                at: xml.at(base + offset),
                character,
            });
        }
        Ok(xml)
    }

    /// The position of the character at a byte offset.
    pub fn at(&self, offset: usize) -> Position {
        let (mut from, mut position) = self.mark.get();
        if offset < from {
            (from, position) = (self.base, Position { line: 1, column: 1 });
        }
        let passed = self.text.get(from..offset).unwrap_or_default();
        for character in passed.chars() {
            match character {
                '\n' => {
                    position.line += 1;
                    position.column = 1;
                }
                _ => position.column += 1,
            }
        }
        self.mark.set((offset, position));
        position
    }

    /// The root's start tag, which must have this name.
    pub fn root(&mut self, wanted: &'static str) -> Result<Tag<'a>, Error> {
        let Some(root) = self.outside()? else {
            let at = self.at(self.offset());
            return Err(Error::NoRoot { at, wanted });
        };
        if root.name == wanted {
            return Ok(root);
        }
        Err(match self.unknown_element(&root, &root, Vec::new()) {
            Error::UnknownElement { at, name, .. } => Error::WrongRoot { at, name, wanted },
            malformed => malformed,
        })
    }

    /// Refuses content after the root element.
    pub fn finish(&mut self) -> Result<(), Error> {
        match self.outside()? {
            Some(tag) => Err(Error::SecondRoot {
                at: self.at(tag.offset),
                name: tag.name.to_owned(),
            }),
            None => Ok(()),
        }
    }

    fn outside(&mut self) -> Result<Option<Tag<'a>>, Error> {
        loop {
            match self.next()? {
                Node::Open(tag) => return Ok(Some(tag)),
                // The reader refuses an unmatched end tag itself.
                Node::Close | Node::End => return Ok(None),
                Node::Text { text, offset, plain } => {
                    let text = if plain { trim(&text) } else { &text };
                    if !text.is_empty() || !plain {
                        let at = self.at(self.skip_space(offset));
                        let text = text.to_owned();
                        return Err(Error::TextOutside { at, text });
                    }
                }
            }
        }
    }

    /// The next element in `parent`; `None` at its end tag. Text is refused.
    pub fn child(&mut self, parent: &Tag<'_>) -> Result<Option<Tag<'a>>, Error> {
        loop {
            match self.next()? {
                Node::Open(tag) => return Ok(Some(tag)),
                Node::Close => return Ok(None),
                Node::Text { text, offset, .. } if !trim(&text).is_empty() => {
                    return Err(Error::StrayText {
                        at: self.at(self.skip_space(offset)),
                        text: trim(&text).to_owned(),
                        parent: parent.name.to_owned(),
                    });
                }
                Node::Text { .. } => {}
                Node::End => return Err(self.unclosed(parent)),
            }
        }
    }

    /// Reads to the end of an element that takes no content.
    pub fn no_content(&mut self, tag: &Tag<'_>) -> Result<(), Error> {
        match self.child(tag)? {
            Some(child) => Err(self.unknown_element(&child, tag, Vec::new())),
            None => Ok(()),
        }
    }

    /// Reads to the end of an element that takes only text, and returns the text.
    pub fn content(&mut self, tag: &Tag<'_>) -> Result<String, Error> {
        let mut content = String::new();
        loop {
            match self.next()? {
                Node::Text { text, .. } => content.push_str(&text),
                Node::Close => return Ok(content),
                Node::Open(child) => return Err(self.unknown_element(&child, tag, Vec::new())),
                Node::End => return Err(self.unclosed(tag)),
            }
        }
    }

    /// The error for an element that its parent does not take.
    pub fn unknown_element(&self, tag: &Tag<'_>, parent: &Tag<'_>, known: Vec<&'static str>) -> Error {
        let at = self.at(tag.offset);
        let name = tag.name.to_owned();
        match name {
            _ if name.is_empty() => self.malformed(
                tag.offset,
                "'<' without an element's name; write a plain '<' as &lt;",
            ),
            _ if name.contains(':') => Error::Namespaced { at, name },
            _ => Error::UnknownElement {
                at,
                name,
                parent: parent.name.to_owned(),
                known,
            },
        }
    }

    /// The character that `&reference;` refers to.
    pub(super) fn resolve(&self, reference: &str, offset: usize) -> Result<char, Error> {
        let character = match BytesRef::new(reference).resolve_char_ref() {
            Ok(Some(character)) if is_legal(character) => Some(character),
            Ok(None) => match resolve_xml_entity(reference).and_then(|text| text.chars().next()) {
                Some(character) => Some(character),
                None => {
                    return Err(Error::UnknownEntity {
                        at: self.at(offset),
                        name: reference.to_owned(),
                    });
                }
            },
            Ok(Some(_)) | Err(_) => None,
        };
        character.ok_or_else(|| Error::BadReference {
            at: self.at(offset),
            reference: reference.to_owned(),
        })
    }

    fn offset(&self) -> usize {
        // Not truncated: it is at most the length of the text.
        self.base + self.reader.buffer_position() as usize
    }

    /// The offset of `piece`, a slice of the document.
    pub(super) fn offset_of(&self, piece: &str) -> usize {
        piece.as_ptr() as usize - self.text.as_ptr() as usize
    }

    fn skip_space(&self, offset: usize) -> usize {
        let rest = &self.text[offset..];
        offset + (rest.len() - rest.trim_start_matches(is_space).len())
    }

    fn next(&mut self) -> Result<Node<'a>, Error> {
        loop {
            let offset = self.offset();
            let rest = &self.text[offset..];
            // Checked before the reader parses the DOCTYPE, which may be large.
            if rest.starts_with("<!D") || rest.starts_with("<!d") {
                return Err(Error::Doctype { at: self.at(offset) });
            }
            let event = match self.reader.read_event() {
                Ok(event) => event,
                Err(error) => return Err(self.bad_xml(offset, error)),
            };
            match event {
                Event::Start(tag) | Event::Empty(tag) => {
                    let content = &rest[1..1 + tag.len()];
                    let name = &content[..tag.name().as_ref().len()];
                    return Ok(Node::Open(Tag {
                        name,
                        offset,
                        content,
                    }));
                }
                Event::End(_) => return Ok(Node::Close),
                Event::Text(text) => {
                    if let Some(index) = text.find("]]>") {
                        return Err(self.malformed(offset + index, "']]>' in text; write it as ]]&gt;"));
                    }
                    let text = text.xml10_content();
                    return Ok(Node::Text {
                        text,
                        offset,
                        plain: true,
                    });
                }
                Event::CData(text) => {
                    let text = text.xml10_content();
                    return Ok(Node::Text {
                        text,
                        offset,
                        plain: false,
                    });
                }
                Event::GeneralRef(reference) => {
                    let character = self.resolve(&reference, offset)?;
                    return Ok(Node::Text {
                        text: Cow::Owned(character.to_string()),
                        offset,
                        plain: false,
                    });
                }
                Event::Comment(_) => {}
                Event::PI(instruction) => match instruction.target() {
                    "" => {
                        return Err(
                            self.malformed(offset, "'<?' without the name of a processing instruction")
                        );
                    }
                    target if target.eq_ignore_ascii_case("xml") => {
                        return Err(self.malformed(offset, "write the XML declaration as <?xml …?>"));
                    }
                    _ => {}
                },
                Event::Decl(declaration) => {
                    let content = &rest[1..2 + declaration.len()];
                    self.declaration(&Tag {
                        name: &content[.."?xml".len()],
                        offset,
                        content,
                    })?;
                }
                Event::DocType(_) => return Err(Error::Doctype { at: self.at(offset) }),
                Event::Eof => return Ok(Node::End),
            }
        }
    }

    pub(super) fn malformed(&self, offset: usize, what: impl Into<String>) -> Error {
        Error::Malformed {
            at: self.at(offset),
            what: what.into(),
        }
    }

    pub(super) fn lone_ampersand(&self, offset: usize) -> Error {
        self.malformed(offset, "'&' without a closing ';'; write a plain '&' as &amp;")
    }

    fn unclosed(&self, tag: &Tag<'_>) -> Error {
        Error::UnclosedElement {
            at: self.at(tag.offset),
            name: tag.name.to_owned(),
        }
    }

    /// `offset` is the offset of the `<` or `&` that the reader could not parse.
    fn bad_xml(&self, offset: usize, error: XmlError) -> Error {
        let at = self.at(offset);
        match error {
            XmlError::IllFormed(IllFormedError::MismatchedEndTag { expected, found }) => {
                Error::MismatchedEnd { at, expected, found }
            }
            XmlError::IllFormed(IllFormedError::UnmatchedEndTag(name)) => Error::UnmatchedEnd { at, name },
            XmlError::IllFormed(IllFormedError::UnclosedReference) => self.lone_ampersand(offset),
            XmlError::IllFormed(IllFormedError::DoubleHyphenInComment) => {
                let comment = &self.text[offset + "<!--".len()..];
                let hyphens = comment.find("--").unwrap_or_default();
                self.malformed(offset + "<!--".len() + hyphens, "'--' in a comment")
            }
            XmlError::Syntax(SyntaxError::InvalidBangMarkup) => {
                self.malformed(offset, "'<!' begins neither a comment nor a CDATA section")
            }
            XmlError::Syntax(error) => self.malformed(offset, error.to_string()),
            error => self.malformed(offset, error.to_string()),
        }
    }
}
