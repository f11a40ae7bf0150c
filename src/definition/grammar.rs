//! The grammar of the documents: a row for each element and attribute, with the words that it takes and its meaning.
//!
//! The parser finds attributes by these rows, the errors list their names and words, and the manual pages
//! domainbackup(5) and domaincheckpoint(5) consist of them. The meaning of a word is in the parser; a test compares.

/// An element.
#[derive(Debug)]
pub struct Element {
    pub name: &'static str,
    /// In the order in which the parser takes them.
    pub attributes: &'static [ElementAttribute],
    pub content: Content,
    /// Its meaning, as sentences for the manual.
    pub meaning: &'static str,
    /// Belongs to libvirt's pull mode or to its encryption, and is refused with an error that says so.
    pub is_refused: bool,
}

/// The content of an element.
#[derive(Debug)]
pub enum Content {
    Nothing,
    /// Text, with a placeholder for the manual.
    Text(&'static str),
    Children(&'static [&'static Element]),
}

/// An attribute of an element.
#[derive(Debug)]
pub struct ElementAttribute {
    pub name: &'static str,
    pub value: Value,
    pub is_required: bool,
    pub meaning: &'static str,
}

/// The values of an attribute.
#[derive(Debug)]
pub enum Value {
    /// One of these words.
    Words(&'static [&'static str]),
    /// Any other value, with a placeholder for the manual.
    Free(&'static str),
}

impl Element {
    /// The names of the children that it takes.
    pub fn child_names(&self) -> Vec<&'static str> {
        let taken = self.children().iter().filter(|child| !child.is_refused);
        taken.map(|child| child.name).collect()
    }

    pub fn attribute_names(&self) -> Vec<&'static str> {
        self.attributes.iter().map(|attribute| attribute.name).collect()
    }

    pub fn children(&self) -> &'static [&'static Element] {
        match self.content {
            Content::Children(children) => children,
            Content::Nothing | Content::Text(_) => &[],
        }
    }
}

impl ElementAttribute {
    /// The words that it takes; none if it takes other values.
    pub fn words(&self) -> &'static [&'static str] {
        match self.value {
            Value::Words(words) => words,
            Value::Free(_) => &[],
        }
    }
}

const fn element(name: &'static str, content: Content, meaning: &'static str) -> Element {
    Element {
        name,
        attributes: &[],
        content,
        meaning,
        is_refused: false,
    }
}

const fn refused(name: &'static str, meaning: &'static str) -> Element {
    Element {
        is_refused: true,
        ..element(name, Content::Nothing, meaning)
    }
}

const fn required(name: &'static str, value: Value, meaning: &'static str) -> ElementAttribute {
    ElementAttribute {
        name,
        value,
        is_required: true,
        meaning,
    }
}

const fn optional(name: &'static str, value: Value, meaning: &'static str) -> ElementAttribute {
    ElementAttribute {
        is_required: false,
        ..required(name, value, meaning)
    }
}

const PULL_MODE: &str = "Only for pull mode, which is refused.";

pub static DOMAINBACKUP: Element = Element {
    attributes: &[optional(
        "mode",
        Value::Words(&["push"]),
        "The service writes the images. The only mode.",
    )],
    ..element(
        "domainbackup",
        Content::Children(&[
            &NAME,
            &DESCRIPTION,
            &STORE,
            &BANDWIDTH,
            &QUIESCE,
            &INCREMENTAL,
            &DISKS,
            &SERVER,
        ]),
        "A backup. Without children it copies every writable disk into the default store.",
    )
};

static NAME: Element = element(
    "name",
    Content::Text("NAME"),
    "The name of the backup or checkpoint: at most 128 letters, digits and '_', '-', '.', the first not a '.'. A backup \
     without a name has only its id. The service chooses the name of a checkpoint without one.",
);

static DESCRIPTION: Element = element(
    "description",
    Content::Text("TEXT"),
    "Free text of at most 4096 bytes.",
);

pub(super) static STORE: Element = Element {
    attributes: &[required(
        "name",
        Value::Free("NAME"),
        "Its name in the configuration.",
    )],
    ..element(
        "store",
        Content::Nothing,
        "The store for the images. The service chooses the names of the files. Excludes <target>.",
    )
};

pub(super) static BANDWIDTH: Element = Element {
    attributes: &[optional(
        "unit",
        Value::Words(&["bytes", "KB", "KiB", "MB", "MiB", "GB", "GiB", "TB", "TiB"]),
        "The unit of the number; bytes without it. KiB is 1024, KB is 1000. Also PB, PiB, EB and EiB, in any case. A \
         letter alone is the binary unit.",
    )],
    ..element(
        "bandwidth",
        Content::Text("NUMBER"),
        "The highest speed of all disks together, in bytes per second or the unit per second.",
    )
};

pub(super) static QUIESCE: Element = Element {
    attributes: &[required(
        "mode",
        Value::Words(super::Quiesce::WORDS),
        "Whether the guest's file systems are frozen at the point in time. If the guest cannot freeze, 'try' continues \
         without and 'require' fails.",
    )],
    ..element("quiesce", Content::Nothing, "The use of the guest agent.")
};

static INCREMENTAL: Element = element(
    "incremental",
    Content::Text("BACKUP"),
    "The base of all disks that name none themselves: the id of a backup in the store, or the name of its checkpoint.",
);

pub(super) static DISKS: Element = element(
    "disks",
    Content::Children(&[&DISK]),
    "The disks of the backup. Writable disks that are not listed are not copied. Either every selected disk has a \
     <target>, or none.",
);

static SERVER: Element = refused("server", PULL_MODE);

pub(super) static DISK: Element = Element {
    attributes: &[
        required(
            "name",
            Value::Free("DISK"),
            "The name of the disk, as 'backupctl domains --disks' prints it.",
        ),
        optional(
            "backup",
            Value::Words(&["yes", "no"]),
            "With 'no' the disk is not copied, and nothing else of its entry has an effect.",
        ),
        optional(
            "type",
            Value::Words(super::target::TargetKind::WORDS),
            "The kind of <target>; 'file' without it.",
        ),
        optional(
            "backupmode",
            Value::Words(&["full", "incremental"]),
            "The extent of the copy: the whole disk, or the changes since a base.",
        ),
        optional(
            "index",
            Value::Free("NUMBER"),
            "No effect. libvirt writes it into its documents.",
        ),
        optional(
            "incremental",
            Value::Free("BACKUP"),
            "The base of this disk. It makes the copy incremental.",
        ),
        optional("exportname", Value::Free("NAME"), PULL_MODE),
        optional("exportbitmap", Value::Free("NAME"), PULL_MODE),
    ],
    ..element(
        "disk",
        Content::Children(&[&DRIVER, &TARGET, &SCRATCH]),
        "One disk of the VM.",
    )
};

pub(super) static DRIVER: Element = Element {
    attributes: &[
        optional(
            "type",
            Value::Words(&["qcow2", "raw"]),
            "The format of the image; 'qcow2' without it.",
        ),
        optional(
            "compress",
            Value::Words(super::Compression::WORDS),
            "The compression of a qcow2 image. Without it the image is not compressed.",
        ),
    ],
    ..element("driver", Content::Nothing, "The image.")
};

pub(super) static TARGET: Element = Element {
    attributes: &[
        optional(
            "file",
            Value::Free("PATH"),
            "For a disk of type 'file': the absolute path of a new file. With the option 'reuse-external' it exists.",
        ),
        optional(
            "dev",
            Value::Free("PATH"),
            "For a disk of type 'block': the absolute path of a block device, which is overwritten.",
        ),
        optional(
            "fd",
            Value::Free("INDEX"),
            "For a disk of type 'fd': an index into the descriptors of the call, from 0.",
        ),
    ],
    ..element(
        "target",
        Content::Children(&[&SECLABEL, &ENCRYPTION]),
        "The target of the disk, with the attribute of its type. Without <target> the image goes into a store.",
    )
};

static SCRATCH: Element = refused("scratch", PULL_MODE);
static SECLABEL: Element = refused("seclabel", "Refused: the service sets no security labels.");
static ENCRYPTION: Element = refused("encryption", "Refused: the service does not encrypt images.");

pub static DOMAINCHECKPOINT: Element = element(
    "domaincheckpoint",
    Content::Children(&[&NAME, &DESCRIPTION, &CREATION_TIME, &PARENT, &CHECKPOINT_DISKS]),
    "A checkpoint. Without children it is on every disk that can have one.",
);

static CREATION_TIME: Element = element(
    "creationTime",
    Content::Text("SECONDS"),
    "The time of the checkpoint in seconds since 1970. The service writes it and ignores it in a caller's document.",
);

pub(super) static PARENT: Element = element(
    "parent",
    Content::Children(&[&NAME]),
    "The previous checkpoint. The service writes it and ignores it in a caller's document.",
);

pub(super) static CHECKPOINT_DISKS: Element = element(
    "disks",
    Content::Children(&[&CHECKPOINT_DISK]),
    "The disks with the checkpoint.",
);

pub(super) static CHECKPOINT_DISK: Element = Element {
    attributes: &[
        required(
            "name",
            Value::Free("DISK"),
            "The name of the disk, as 'backupctl domains --disks' prints it.",
        ),
        optional(
            "checkpoint",
            Value::Words(&["no", "bitmap"]),
            "Whether the disk gets the checkpoint; 'bitmap' without it.",
        ),
        optional(
            "bitmap",
            Value::Free("NAME"),
            "Refused: the service chooses the names of the bitmaps.",
        ),
    ],
    ..element("disk", Content::Nothing, "One disk of the VM.")
};

/// The XML declaration, which has the syntax of a tag.
pub(super) static DECLARATION: Element = Element {
    attributes: &[
        required("version", Value::Words(&["1.0"]), "The version of XML."),
        optional("encoding", Value::Words(&["UTF-8"]), "The encoding."),
        optional("standalone", Value::Words(&["yes", "no"]), "No effect."),
    ],
    ..element("?xml", Content::Nothing, "The XML declaration.")
};

/// An element without attributes, for the parser.
pub(super) static BARE: Element = element("", Content::Nothing, "");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::{Error, parse, parse_checkpoint};

    /// A value that any attribute or text accepts in form.
    const ANY: &str = "1";

    fn tag(element: &Element, given: &[(&str, &str)]) -> String {
        let attributes = given.iter().map(|(name, value)| format!(" {name}='{value}'"));
        format!("<{}{}>", element.name, attributes.collect::<String>())
    }

    /// Returns the required attributes of an element.
    fn needed(element: &Element) -> Vec<(&'static str, &'static str)> {
        let required = element.attributes.iter().filter(|row| row.is_required);
        required
            .map(|row| (row.name, row.words().first().copied().unwrap_or(ANY)))
            .collect()
    }

    /// Returns a document with one element, which has these attributes, below the elements that contain it.
    fn document(above: &[&Element], element: &Element, given: &[(&str, &str)]) -> String {
        let mut open: String = above
            .iter()
            .map(|element| tag(element, &needed(element)))
            .collect();
        open += &tag(element, given);
        if matches!(element.content, Content::Text(_)) {
            open += ANY;
        }
        let close = above.iter().chain([&element]).rev();
        open + &close
            .map(|element| format!("</{}>", element.name))
            .collect::<String>()
    }

    fn check(above: &[&'static Element], element: &'static Element, count: &mut usize) {
        let root = above.first().copied().unwrap_or(element);
        let error = |document: &str| match root.name {
            "domainbackup" => parse(document).err(),
            _ => parse_checkpoint(document).err(),
        };
        let needed = needed(element);
        for row in element.attributes {
            let mut without = needed.clone();
            without.retain(|(name, _)| *name != row.name);
            let document_without = document(above, element, &without);
            let missing = error(&document_without);
            let is_missing =
                matches!(&missing, Some(Error::MissingAttribute { attribute, .. }) if *attribute == row.name);
            assert!(is_missing || !row.is_required, "{document_without}: {missing:?}");
            let words = match row.words() {
                [] => &[ANY],
                words => words,
            };
            for word in words {
                *count += 1;
                let given = [&without[..], &[(row.name, *word)]].concat();
                let document = document(above, element, &given);
                let error = error(&document);
                let is_unknown = matches!(
                    error,
                    Some(
                        Error::UnknownWord { .. }
                            | Error::UnknownAttribute { .. }
                            | Error::UnknownElement { .. }
                    )
                );
                assert!(!is_unknown, "{document}: {error:?}");
            }
        }
        let plain = document(above, element, &needed);
        let unknown = matches!(error(&plain), Some(Error::UnknownElement { .. }));
        assert!(!unknown, "{plain}");
        for child in element.children() {
            check(&[above, &[element]].concat(), child, count);
        }
    }

    #[test]
    fn the_parser_takes_every_element_attribute_and_word_of_the_rows() {
        let mut count = 0;
        check(&[], &DOMAINBACKUP, &mut count);
        check(&[], &DOMAINCHECKPOINT, &mut count);
        assert!(count > 30, "{count} words");
    }
}
