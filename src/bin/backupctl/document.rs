//! The `<domainbackup>` and `<domaincheckpoint>` documents: built from options, or read from a file.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// The service's limit of document length.
pub const MAX_DOCUMENT: u64 = 1024 * 1024;

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

/// The target of a disk's data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A file that the store chooses.
    Store,
    /// A file at this absolute path.
    File(String),
    /// A block device at this absolute path.
    Block(String),
    /// The open file with this index in the call.
    Fd(usize),
}

/// One `<disk>` of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub name: String,
    pub target: Target,
}

/// The content of a document. The default value is the empty document: all disks into the default store.
#[derive(Debug, Default)]
pub struct Request {
    pub store: Option<String>,
    /// The disks; empty for all writable disks.
    pub disks: Vec<Disk>,
    /// The format of the images.
    pub format: Option<&'static str>,
    /// The compression of the images.
    pub compress: Option<&'static str>,
}

impl Request {
    /// The document; empty if all values are defaults.
    pub fn document(&self) -> Result<String, Error> {
        if self.store.is_none() && self.disks.is_empty() {
            return Ok(String::new());
        }
        let mut text = String::from("<domainbackup>\n");
        if let Some(store) = &self.store {
            let store = attribute("the store's name", store)?;
            text.push_str(&format!("  <store name='{store}'/>\n"));
        }
        if !self.disks.is_empty() {
            text.push_str("  <disks>\n");
            for disk in &self.disks {
                self.disk(disk, &mut text)?;
            }
            text.push_str("  </disks>\n");
        }
        text.push_str("</domainbackup>\n");
        Ok(text)
    }

    fn disk(&self, disk: &Disk, text: &mut String) -> Result<(), Error> {
        let (kind, target) = match &disk.target {
            Target::Store => ("", String::new()),
            Target::File(path) => (
                " type='file'",
                format!("<target file='{}'/>", attribute("the path", path)?),
            ),
            Target::Block(path) => (
                " type='block'",
                format!("<target dev='{}'/>", attribute("the path", path)?),
            ),
            Target::Fd(index) => (" type='fd'", format!("<target fd='{index}'/>")),
        };
        let name = attribute("the disk's name", &disk.name)?;
        text.push_str(&format!(
            "    <disk name='{name}'{kind}>{}{target}</disk>\n",
            self.driver()
        ));
        Ok(())
    }

    fn driver(&self) -> String {
        let compress = match self.compress {
            Some(compress) => format!(" compress='{compress}'"),
            None => String::new(),
        };
        match (self.format, self.compress) {
            (None, None) => String::new(),
            // Only qcow2 supports compression.
            (format, _) => format!("<driver type='{}'{compress}/>", format.unwrap_or("qcow2")),
        }
    }
}

/// The document of a checkpoint; empty if all values are defaults.
pub fn checkpoint(name: Option<&str>, description: Option<&str>, disks: &[String]) -> Result<String, Error> {
    if name.is_none() && description.is_none() && disks.is_empty() {
        return Ok(String::new());
    }
    let mut text = String::from("<domaincheckpoint>\n");
    if let Some(name) = name {
        let name = attribute("the checkpoint's name", name)?;
        text.push_str(&format!("  <name>{name}</name>\n"));
    }
    if let Some(description) = description {
        let description = attribute("the description", description)?;
        text.push_str(&format!("  <description>{description}</description>\n"));
    }
    if !disks.is_empty() {
        text.push_str("  <disks>\n");
        for disk in disks {
            let disk = attribute("the disk's name", disk)?;
            text.push_str(&format!("    <disk name='{disk}' checkpoint='bitmap'/>\n"));
        }
        text.push_str("  </disks>\n");
    }
    text.push_str("</domaincheckpoint>\n");
    Ok(text)
}

/// Escapes `text` for an attribute in single quotes. Line breaks and tabs become references, because a parser replaces
/// literal ones by spaces.
fn attribute(what: &'static str, text: &str) -> Result<String, Error> {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '"' => escaped.push_str("&quot;"),
            '\t' | '\n' | '\r' => escaped.push_str(&format!("&#{};", c as u32)),
            '\0'..='\x1f' | '\u{fffe}' | '\u{ffff}' => {
                return Err(Error::Character {
                    what,
                    text: text.to_owned(),
                });
            }
            c => escaped.push(c),
        }
    }
    Ok(escaped)
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

    fn disk(name: &str, target: Target) -> Disk {
        Disk {
            name: name.into(),
            target,
        }
    }

    #[test]
    fn all_defaults_are_the_empty_document() {
        assert_eq!(Request::default().document().unwrap(), "");
    }

    #[test]
    fn a_store_alone_leaves_the_disks_to_the_service() {
        let request = Request {
            store: Some("nightly".into()),
            ..Request::default()
        };
        assert_eq!(
            request.document().unwrap(),
            "<domainbackup>\n  <store name='nightly'/>\n</domainbackup>\n"
        );
    }

    #[test]
    fn each_kind_of_target_has_its_form() {
        let request = Request {
            disks: vec![
                disk("vda", Target::File("/b/vda.raw".into())),
                disk("vdb", Target::Block("/dev/b".into())),
                disk("vdc", Target::Fd(0)),
                disk("vdd", Target::Store),
            ],
            format: Some("raw"),
            ..Request::default()
        };
        assert_eq!(
            request.document().unwrap(),
            "<domainbackup>\n  <disks>\n\
             \x20   <disk name='vda' type='file'><driver type='raw'/><target file='/b/vda.raw'/></disk>\n\
             \x20   <disk name='vdb' type='block'><driver type='raw'/><target dev='/dev/b'/></disk>\n\
             \x20   <disk name='vdc' type='fd'><driver type='raw'/><target fd='0'/></disk>\n\
             \x20   <disk name='vdd'><driver type='raw'/></disk>\n\
             \x20 </disks>\n</domainbackup>\n"
        );
    }

    #[test]
    fn compression_names_the_format_that_can_be_compressed() {
        let request = Request {
            disks: vec![disk("vda", Target::Store)],
            compress: Some("zstd"),
            ..Request::default()
        };
        assert!(
            request
                .document()
                .unwrap()
                .contains("<driver type='qcow2' compress='zstd'/>")
        );
    }

    #[test]
    fn names_are_escaped_and_read_back_the_same() {
        let name = "a&b<c>'d'\"e\"\n\tf\u{e9}]]>";
        let request = Request {
            disks: vec![disk(name, Target::File(format!("/{name}")))],
            ..Request::default()
        };
        let document = request.document().unwrap();
        let mut reader = quick_xml::Reader::from_str(&document);
        let mut values = Vec::new();
        loop {
            use quick_xml::events::Event;
            match reader.read_event().unwrap() {
                Event::Eof => break,
                Event::Start(tag) | Event::Empty(tag) => {
                    for attribute in tag.attributes() {
                        let raw = attribute.unwrap().value.into_owned();
                        values.push(quick_xml::escape::unescape(&raw).unwrap().into_owned());
                    }
                }
                _ => {}
            }
        }
        assert_eq!(values, [name, "file", &format!("/{name}")]);
    }

    #[test]
    fn characters_that_xml_cannot_represent_are_refused() {
        let request = Request {
            store: Some("a\x1bb".into()),
            ..Request::default()
        };
        assert!(matches!(request.document(), Err(Error::Character { .. })));
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
