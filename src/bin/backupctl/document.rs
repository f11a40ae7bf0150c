//! The `<domainbackup>` and `<domaincheckpoint>` documents: built from options, or read from a file.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use backupd::definition::{
    CheckpointDefinition, CheckpointDisk, Definition, MAX_BYTES, Target, is_representable,
};

/// The service's limit of document length.
pub const MAX_DOCUMENT: u64 = MAX_BYTES as u64;

/// The error of a document.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the definition from {path}: {source}")]
    Read {
        /// The name of the file as the user gave it.
        path: String,
        source: io::Error,
    },
    /// The file is too long for the service.
    #[error("the definition in {path} is longer than 1 MiB")]
    TooLong {
        /// The name of the file as the user gave it.
        path: String,
    },
    /// The file is not text.
    #[error("the definition in {path} is not valid UTF-8")]
    NotUtf8 {
        /// The name of the file as the user gave it.
        path: String,
    },
    /// XML 1.0 cannot represent this character, not even as a reference.
    #[error("{what} \"{text}\" contains a character that XML cannot represent")]
    Character {
        /// The kind of text: the name of a disk, a path, …
        what: &'static str,
        text: String,
    },
}

/// The document of a backup; empty if all values are defaults.
pub fn backup(definition: &Definition) -> Result<String, Error> {
    if *definition == Definition::default() {
        return Ok(String::new());
    }
    if let Some(store) = &definition.store {
        representable("the store's name", &store.name)?;
    }
    for disk in definition.disks.iter().flatten() {
        representable("the disk's name", &disk.name)?;
        if let Some(Target::File(path) | Target::Block(path)) = &disk.target {
            representable("the path", &path.to_string_lossy())?;
        }
    }
    Ok(definition.to_xml())
}

/// The document of a checkpoint; empty if all values are defaults.
pub fn checkpoint(name: Option<&str>, description: Option<&str>, disks: &[String]) -> Result<String, Error> {
    let definition = CheckpointDefinition {
        name: name.map(str::to_owned),
        description: description.map(str::to_owned),
        disks: (!disks.is_empty()).then(|| disks.iter().map(CheckpointDisk::recorded).collect()),
        ..CheckpointDefinition::default()
    };
    if definition == CheckpointDefinition::default() {
        return Ok(String::new());
    }
    let texts = [("the checkpoint's name", name), ("the description", description)];
    for (what, text) in texts {
        representable(what, text.unwrap_or_default())?;
    }
    for disk in disks {
        representable("the disk's name", disk)?;
    }
    Ok(definition.to_xml())
}

fn representable(what: &'static str, text: &str) -> Result<(), Error> {
    match is_representable(text) {
        true => Ok(()),
        false => Err(Error::Character {
            what,
            text: text.to_owned(),
        }),
    }
}

/// Reads a document from a file, or from standard input if `path` is `-`.
pub fn read(path: &Path) -> Result<String, Error> {
    let (name, text) = if path == Path::new("-") {
        ("standard input".to_owned(), read_bounded(io::stdin().lock()))
    } else {
        (
            path.display().to_string(),
            File::open(path).and_then(read_bounded),
        )
    };
    match text {
        Ok(bytes) if bytes.len() as u64 > MAX_DOCUMENT => Err(Error::TooLong { path: name }),
        Ok(bytes) => String::from_utf8(bytes).map_err(|_| Error::NotUtf8 { path: name }),
        Err(source) => Err(Error::Read { path: name, source }),
    }
}

/// Reads at most one byte more than the limit, to detect a longer document without reading all of it.
fn read_bounded(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use backupd::definition::{DiskDefinition, Position, StoreRef, parse, parse_checkpoint};

    fn into(store: &str, disks: Vec<DiskDefinition>) -> Definition {
        Definition {
            store: Some(StoreRef {
                name: store.into(),
                at: Position::default(),
            }),
            disks: (!disks.is_empty()).then_some(disks),
            ..Definition::default()
        }
    }

    #[test]
    fn all_defaults_are_the_empty_document() {
        assert_eq!(backup(&Definition::default()).unwrap(), "");
        assert_eq!(checkpoint(None, None, &[]).unwrap(), "");
    }

    #[test]
    fn a_store_alone_leaves_the_disks_to_the_service() {
        let document = backup(&into("nightly", Vec::new())).unwrap();
        assert_eq!(
            document,
            "<domainbackup mode='push'>\n  <store name='nightly'/>\n</domainbackup>\n"
        );
    }

    #[test]
    fn names_are_read_back_by_the_service_as_they_are() {
        let description = "a&b<c>'d'\"e\"\n\tf\u{e9}]]>";
        let document = checkpoint(Some("before-upgrade"), Some(description), &["a&'\"".into()]).unwrap();
        let read = parse_checkpoint(&document).unwrap();
        assert_eq!(read.name.as_deref(), Some("before-upgrade"));
        assert_eq!(read.description.as_deref(), Some(description));
        assert_eq!(read.disks.unwrap()[0].name, "a&'\"");
    }

    #[test]
    fn each_kind_of_target_is_read_back_by_the_service_as_it_is() {
        let name = "a&b<c>'d'\"e\"\u{e9}]]>";
        for target in [
            Some(Target::File(format!("/{name}").into())),
            Some(Target::Block("/dev/b".into())),
            Some(Target::Fd(0)),
            None,
        ] {
            let disk = DiskDefinition {
                target,
                ..DiskDefinition::new(name)
            };
            let definition = Definition {
                disks: Some(vec![disk.clone()]),
                ..Definition::default()
            };
            let read = parse(&backup(&definition).unwrap()).unwrap().disks.unwrap();
            assert_eq!((&read[0].name, &read[0].target), (&disk.name, &disk.target));
        }
    }

    #[test]
    fn characters_that_xml_cannot_represent_are_refused() {
        let with_path = DiskDefinition {
            target: Some(Target::File("/a\x1bb".into())),
            ..DiskDefinition::new("vda")
        };
        for definition in [
            into("a\x1bb", Vec::new()),
            into("a", vec![DiskDefinition::new("v\x1b")]),
            into("a", vec![with_path]),
        ] {
            assert!(matches!(backup(&definition), Err(Error::Character { .. })));
        }
        let refused = checkpoint(None, Some("\u{ffff}"), &[]);
        assert!(matches!(refused, Err(Error::Character { .. })));
    }

    #[test]
    fn a_document_over_the_bound_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![b' '; MAX_DOCUMENT as usize]).unwrap();
        assert_eq!(read(file.path()).unwrap().len() as u64, MAX_DOCUMENT);
        std::fs::write(file.path(), vec![b' '; MAX_DOCUMENT as usize + 1]).unwrap();
        assert!(matches!(read(file.path()), Err(Error::TooLong { .. })));
        std::fs::write(file.path(), b"\xff").unwrap();
        assert!(matches!(read(file.path()), Err(Error::NotUtf8 { .. })));
        assert!(matches!(
            read(Path::new("/nonexistent/x")),
            Err(Error::Read { .. })
        ));
    }
}
