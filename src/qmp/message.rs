//! Parses one line of QEMU's. Pure.
//!
//! A peer may say anything within a line's length. So only what its kind of message needs is read, and what is kept or
//! passed on is bounded: a line that JSON's values would take many times over in memory stays the text that it is.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Error, Result};

/// The longest event, in bytes. QEMU's own take a few hundred.
const MAX_EVENT: usize = 16 << 10;
/// The longest name of an event, and the longest data that is kept, in bytes: of so many events as a reader may lag behind. What
/// somebody waits for is shorter, and told by a query too.
const MAX_EVENT_NAME: usize = 64;
const MAX_EVENT_DATA: usize = 4 << 10;
/// The longest message of QEMU's that is passed on, in characters. It can hold the names of files, which can be JSON themselves.
const MAX_WORDS: usize = 8 << 10;

/// An asynchronous message of QEMU's. Unknown names are kept: a newer QEMU has more of them.
#[derive(Debug, Clone)]
pub struct Event {
    pub name: String,
    /// As it came: as values it can take 16 times the memory.
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

    /// The event's data as `T`; nothing if it is something else, or longer than any event that is waited for.
    pub(super) fn read<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_str(self.data.as_ref()?.get()).ok()
    }

    /// The event's data; null if there is none, or more than any event that is waited for has.
    pub fn data(&self) -> Value {
        self.read().unwrap_or_default()
    }
}

/// QEMU's no to a command.
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
        /// That of the command; nothing where it is none that this client gives.
        id: Option<u64>,
        /// As it came: who asked knows what to read it as, and some are large.
        answer: std::result::Result<&'a RawValue, Refusal>,
    },
}

/// One of the first three is there.
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
            // What is nested without end is no event.
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

/// QEMU's message in a reply, up to the length that is passed on.
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
        // JSON's reader quotes what it did not want, whole.
        let why = head(&error.to_string(), 512);
        Error::NotQmp(format!("a line is no message: {why}"))
    })
}
