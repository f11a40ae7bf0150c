//! Properties of each parser of untrusted input, for any bytes: it does not panic, its error texts are bounded, and an
//! accepted value survives a round trip through its text form.
//!
//! Shared by the fuzz targets and by the test that replays their corpora.

use std::fmt::Debug;
use std::path::Path;

use backupd::bus::options;
use backupd::config::{Config, DEFAULT_STORE};
use backupd::definition::{self, CheckpointDefinition, Definition, Position};
use backupd::domain::Content;
use backupd::model::{Format, Manifest, ManifestError};
use backupd::qcow2;
use backupd::qmp::{LineTooLong, Lines, Message};
use backupd::targets::look_protocol::{self, Answer, Question, Received};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zbus::DBusError;
use zbus::wire::serialized::{Context, Data};
use zbus::wire::{BE, LE};

/// The maximum length of an error text in bytes, because it reaches callers and lines of the log.
const MAX_TEXT: usize = 4 << 10;

/// QMP: the first byte chooses the maximum length of a line, the second the size of the pieces.
pub fn qmp(data: &[u8]) {
    let [limit, chunk, said @ ..] = data else { return };
    let (limit, chunk) = ((usize::from(*limit) + 1) * 16, usize::from(*chunk) + 1);
    let mut lines = Lines::new(limit);
    let mut got = Vec::new();
    let mut end = Ok(());
    'said: for part in said.chunks(chunk) {
        lines.push(part);
        loop {
            match lines.next_line() {
                Ok(Some(line)) => got.push(line),
                Ok(None) => break,
                Err(LineTooLong) => {
                    end = Err(LineTooLong);
                    break 'said;
                }
            }
        }
        lines.forget_taken();
        assert!(lines.held() <= limit + chunk, "it holds more than a line");
    }
    let mut expected: Vec<&[u8]> = said.split(|byte| *byte == b'\n').collect();
    let too_long = expected.iter().position(|line| line.len() > limit);
    // Input after the last newline is not a line yet.
    expected.truncate(too_long.unwrap_or(expected.len().saturating_sub(1)));
    assert_eq!(got, expected);
    assert_eq!(end.is_err(), too_long.is_some());
    got.iter().for_each(|line| message(line));
}

fn message(line: &[u8]) {
    let (id, answer) = match Message::parse(line) {
        Err(error) => return assert_bounded(&error),
        Ok(Message::Event(event)) => {
            let again = serde_json::json!({ "event": event.name, "data": event.data() }).to_string();
            let Ok(Message::Event(again)) = Message::parse(again.as_bytes()) else {
                panic!("an event that is said again is none: {again}");
            };
            // Without its data: a decimal number may be read as a slightly different one.
            assert_eq!(again.name, event.name);
            return;
        }
        Ok(Message::Reply { id, answer }) => (id, answer),
    };
    let id_written = id.map_or("null".to_owned(), |id| id.to_string());
    let answer_written = match &answer {
        Ok(value) => format!("\"return\":{}", value.get()),
        Err(refusal) => {
            let error = serde_json::json!({ "class": refusal.class, "desc": refusal.description });
            format!("\"error\":{error}")
        }
    };
    let written = format!("{{\"id\":{id_written},{answer_written}}}");
    let Ok(Message::Reply {
        id: id_again,
        answer: again,
    }) = Message::parse(written.as_bytes())
    else {
        panic!("a reply that is said again is none: {written}");
    };
    assert_eq!(id_again, id);
    match (again, answer) {
        (Ok(again), Ok(value)) => assert_eq!(again.get(), value.get()),
        (Err(again), Err(refusal)) => assert_eq!(again, refusal),
        (again, answer) => panic!("{again:?} and {answer:?}"),
    }
}

/// Frames between the service and its helper, in both directions.
pub fn helper(data: &[u8]) {
    frames::<Question>(data, look_protocol::MOST_QUESTION);
    frames::<Answer>(data, look_protocol::MOST_ANSWER);
}

fn frames<T: Debug + Serialize + DeserializeOwned>(mut data: &[u8], most: usize) {
    loop {
        let before = data.len();
        match look_protocol::receive::<T>(&mut data, most) {
            Err(error) => return assert_bounded(&error),
            Ok(Received::Working) => assert_eq!(before - data.len(), 8),
            // The receiver ends the connection.
            Ok(Received::OtherVersion) => return,
            Ok(Received::Message(message)) => {
                let mut written = Vec::new();
                look_protocol::send(&mut written, &message, most)
                    .expect("it was not longer when it was read");
                let again = look_protocol::receive::<T>(written.as_slice(), most);
                let Ok(Received::Message(again)) = again else {
                    panic!("a message that is sent again is none: {again:?}");
                };
                let value = |message: &T| serde_json::to_value(message).expect("it is JSON");
                assert_eq!(value(&again), value(&message));
            }
        }
    }
}

/// A `<domainbackup>` or `<domaincheckpoint>` document.
pub fn document(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    checkpoint(text);
    match definition::parse(text) {
        Err(error) => assert_bounded(&error),
        Ok(parsed) => {
            let parsed = without_positions(parsed);
            let written = parsed.to_xml();
            match definition::parse(&written) {
                Ok(again) => assert_eq!(without_positions(again), parsed, "{written}"),
                Err(error) => panic!("{error}: {written}"),
            }
        }
    }
}

fn checkpoint(text: &str) {
    let without_positions = |mut definition: CheckpointDefinition| {
        let disks = definition.disks.iter_mut().flatten();
        disks.for_each(|disk| disk.at = Position::default());
        definition
    };
    match definition::parse_checkpoint(text).map(without_positions) {
        Err(error) => assert_bounded(&error),
        Ok(parsed) => {
            let written = parsed.to_xml();
            match definition::parse_checkpoint(&written) {
                Ok(again) => assert_eq!(without_positions(again), parsed, "{written}"),
                Err(error) => panic!("{error}: {written}"),
            }
        }
    }
}

fn without_positions(mut definition: Definition) -> Definition {
    if let Some(store) = &mut definition.store {
        store.at = Position::default();
    }
    for disk in definition.disks.iter_mut().flatten() {
        disk.at = Position::default();
    }
    definition
}

/// The options of a call from a message's body: the first byte chooses the byte order.
pub fn options(data: &[u8]) {
    let [order, body @ ..] = data else { return };
    let context = Context::new(if order % 2 == 0 { LE } else { BE }, 0);
    match Data::new(body, context).deserialize::<options::Dictionary>() {
        Err(error) => assert_bounded(&error),
        Ok((dictionary, _)) => {
            let any = options::none(&dictionary);
            match options::backup(dictionary) {
                Ok(options) => assert!(any.is_err() || options == Default::default()),
                Err(error) => {
                    assert!(any.is_err());
                    assert_bounded(&error.description().unwrap_or_default());
                }
            }
        }
    }
}

/// A backup's manifest.
pub fn manifest(data: &[u8]) {
    let manifest = match Manifest::parse(data) {
        Ok(manifest) => manifest,
        Err(error) => {
            assert_bounded(&error);
            if let ManifestError::Newer { found } = error {
                assert!(found > 1);
            }
            return;
        }
    };
    let directory = Path::new("/store/domain");
    let images = manifest.disks.iter().map(|disk| &disk.file);
    for name in images.chain([&manifest.id, &manifest.domain.name]) {
        assert_eq!(directory.join(name).parent(), Some(directory), "{name}");
        assert!(!name.contains('\0') && !name.starts_with('.'), "{name}");
    }
    let written = manifest.to_json().expect("a manifest is JSON");
    let again = Manifest::parse(&written).expect("what is written can be read");
    assert_eq!(again, manifest);
    assert_eq!(again.to_json().expect("a manifest is JSON"), written);
}

/// An image's header: the first byte chooses whether it must have a backing file.
pub fn header(data: &[u8]) {
    let [has_backing, bytes @ ..] = data else { return };
    let expected = qcow2::Expected {
        virtual_size: 1 << 20,
        backing: (has_backing % 2 == 1).then(|| ("../a/vda.qcow2".to_owned(), Format::Qcow2)),
    };
    let image = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).expect("memory is a file");
    rustix::io::write(&image, bytes).expect("it is written to");
    match qcow2::check(&image, &expected) {
        Err(error) => assert_bounded(&error),
        Ok(()) => {
            // The header opens no other file: it has the expected size and backing file, and no external data file.
            assert_eq!(bytes[24..32], expected.virtual_size.to_be_bytes());
            let number = |at: usize| {
                bytes[at..at + 4]
                    .iter()
                    .fold(0, |number, byte| number << 8 | *byte as usize)
            };
            match &expected.backing {
                // Without a backing file, the length does not belong to a name.
                None => assert_eq!(bytes[8..16], [0; 8]),
                Some((name, _)) => assert_eq!(&bytes[number(12)..][..number(16)], name.as_bytes()),
            }
            assert!(number(4) == 2 || bytes[79] & 4 == 0);
        }
    }
}

/// The service's configuration, and a domain's file.
pub fn configuration(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(config) = Config::parse(text, Path::new("/etc/backupd/backupd.toml")) {
        assert!(config.stores.contains_key(DEFAULT_STORE));
        assert!(config.state_directory.is_absolute());
        assert!(config.domain_directories.iter().all(|path| path.is_absolute()));
        assert!(config.stores.values().all(|store| store.path.is_absolute()));
        for name in config.stores.keys() {
            assert!(!name.contains('/') && !name.starts_with('.'), "{name}");
        }
        assert!(config.limits.document_bytes <= definition::MAX_BYTES);
    }
    if let Ok(content) = Content::parse(text) {
        assert!(content.monitor.is_absolute());
        assert!(content.agent.is_none_or(|agent| agent.is_absolute()));
    }
}

fn assert_bounded(error: &impl std::fmt::Display) {
    let text = error.to_string();
    assert!(text.len() <= MAX_TEXT, "{} bytes: {text}", text.len());
}
