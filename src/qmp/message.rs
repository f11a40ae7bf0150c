//! Parses one line from QEMU. Pure.
//!
//! A peer can send anything within a line's length. So the parser reads only the needed fields, and bounds everything
//! that it keeps. Large values stay text, because as JSON values they would take many times the memory.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Error, Result};

/// The longest event, in bytes. QEMU's own take a few hundred.
const MAX_EVENT: usize = 16 << 10;
/// The longest name and the longest data of a stored event, in bytes; a reader may lag behind many events. The events
/// that the service needs are shorter, and a query returns the same facts.
const MAX_EVENT_NAME: usize = 64;
const MAX_EVENT_DATA: usize = 4 << 10;
/// The longest error message of QEMU that is passed on, in characters. It can contain file names, which can be JSON.
const MAX_WORDS: usize = 8 << 10;

/// An event. Unknown names are kept, because newer QEMUs have more events.
#[derive(Debug, Clone)]
pub struct Event {
    pub name: String,
    /// Unparsed, because JSON values can take 16 times the memory.
    data: Option<Box<RawValue>>,
}

impl Event {
    #[cfg(test)]
    pub fn for_test(name: &str, data: &Value) -> Self {
        let data = serde_json::value::to_raw_value(data).expect("a value can be written");
        Self {
            name: name.to_owned(),
            data: Some(data),
        }
    }

    /// Returns the event's data as `T`, or `None` if it has another type or was too long to keep.
    pub(super) fn read<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_str(self.data.as_ref()?.get()).ok()
    }

    /// Returns the event's data, or null if there is none or it was too long to keep.
    pub fn data(&self) -> Value {
        self.read().unwrap_or_default()
    }
}

/// QEMU's error reply to a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub class: String,
    pub description: String,
}

/// Any line but the greeting.
#[derive(Debug)]
pub enum Message<'a> {
    Event(Event),
    Reply {
        /// The id of the command, or `None` if this client gives no such id.
        id: Option<u64>,
        /// Unparsed: the caller knows its type, and some replies are large.
        answer: std::result::Result<&'a RawValue, Refusal>,
    },
}

/// A valid line has one of the first three fields.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "return", borrow)]
    value: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    event: Option<String>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Words {
    class: String,
    desc: String,
}

impl<'a> Message<'a> {
    pub fn parse(line: &'a [u8]) -> Result<Self> {
        let Line {
            value,
            error,
            event,
            data,
            id,
        } = parse(line)?;
        if let Some(name) = event {
            if line.len() > MAX_EVENT {
                let why = format!("the event {} has {} bytes", head(&name, 64), line.len());
                return Err(Error::NotQmp(why));
            }
            let name = head(&name, MAX_EVENT_NAME);
            // Data that is nested too deeply is invalid.
            data.map(|data| parse::<Value>(data.get().as_bytes()))
                .transpose()?;
            let data = data.filter(|data| data.get().len() <= MAX_EVENT_DATA);
            let data = data.map(ToOwned::to_owned);
            return Ok(Self::Event(Event { name, data }));
        }
        let answer = match (error, value) {
            (Some(error), _) => Err(Refusal::parse(error)?),
            (None, Some(value)) => Ok(value),
            (None, None) => return Err(Error::NotQmp("a line is neither reply nor event".into())),
        };
        let id = id.and_then(|id| serde_json::from_str(id.get()).ok());
        Ok(Self::Reply { id, answer })
    }
}

impl Refusal {
    pub(super) fn new(class: &str, description: &str) -> Self {
        Self {
            class: head(class, MAX_WORDS),
            description: head(description, MAX_WORDS),
        }
    }

    pub(super) fn of(self, command: &str) -> Error {
        Error::Refused {
            command: command.to_owned(),
            class: self.class,
            description: self.description,
        }
    }

    fn parse(error: &RawValue) -> Result<Self> {
        let Words { class, desc } = parse(error.get().as_bytes())?;
        Ok(Self::new(&class, &desc))
    }
}

/// Reads QEMU's error message, and truncates it.
pub fn words<'de, D: Deserializer<'de>>(words: D) -> std::result::Result<Option<String>, D::Error> {
    let words = Option::<String>::deserialize(words)?;
    Ok(words.map(|words| head(&words, MAX_WORDS)))
}

pub(super) fn head(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

pub(super) fn parse<'a, T: Deserialize<'a>>(line: &'a [u8]) -> Result<T> {
    serde_json::from_slice(line).map_err(|error| {
        // serde_json quotes the whole unexpected value.
        let why = head(&error.to_string(), 512);
        Error::NotQmp(format!("a line is not a QMP message: {why}"))
    })
}
