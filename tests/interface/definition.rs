//! The `<domainbackup>` format. `tests/interface/definitions/valid` holds documents and how each is written back. `invalid`
//! holds documents and the error that refuses each (its kind, then its text). `checkpoint-valid` and
//! `checkpoint-invalid` do the same for `<domaincheckpoint>`.
//!
//! `UPDATE=1 cargo test --test tests definition::` rewrites the expectations; review the difference before you keep
//! it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use backupd::definition::{
    BackupMode, CheckpointDefinition, CheckpointRef, Definition, DiskDefinition, Error, MAX_BYTES, Position,
    Quiesce, StoreRef, Target, parse, parse_checkpoint,
};
use backupd::error::Kind;
use backupd::model::{Compression, Format, is_backup_id, is_checkpoint_name, is_valid_name};

#[test]
fn a_valid_document_is_written_back_as_expected() {
    for case in cases("valid", ".out.xml") {
        let definition = parse(&case.document).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let written = definition.to_xml();
        case.expect(&written);

        let again = parse(&written).unwrap_or_else(|error| panic!("{}, written: {error}", case.name));
        assert_eq!(meaning(again.clone()), meaning(definition), "{}", case.name);
        assert_eq!(again.to_xml(), written, "{}", case.name);
    }
}

#[test]
fn an_invalid_document_is_refused_with_kind_place_and_reason() {
    for case in cases("invalid", ".err") {
        let error = match parse(&case.document) {
            Ok(definition) => panic!("{} is accepted: {definition:?}", case.name),
            Err(error) => error,
        };
        case.expect(&format!("{:?}\n{error}\n", error.kind()));

        let carried = backupd::error::Error::from(error.clone());
        assert_eq!((carried.kind, carried.message), (error.kind(), error.to_string()));
    }
}

#[test]
fn a_valid_checkpoint_is_written_back_as_expected() {
    let meaning = |mut definition: CheckpointDefinition| {
        let disks = definition.disks.iter_mut().flatten();
        disks.for_each(|disk| disk.at = Position::default());
        definition
    };
    for case in cases("checkpoint-valid", ".out.xml") {
        let definition =
            parse_checkpoint(&case.document).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let written = definition.to_xml();
        case.expect(&written);

        let again =
            parse_checkpoint(&written).unwrap_or_else(|error| panic!("{}, written: {error}", case.name));
        assert_eq!(meaning(again.clone()), meaning(definition), "{}", case.name);
        assert_eq!(again.to_xml(), written, "{}", case.name);
    }
}

#[test]
fn an_invalid_checkpoint_is_refused_with_kind_place_and_reason() {
    for case in cases("checkpoint-invalid", ".err") {
        let error = match parse_checkpoint(&case.document) {
            Ok(definition) => panic!("{} is accepted: {definition:?}", case.name),
            Err(error) => error,
        };
        let text = error.to_string();
        assert!(
            text.len() < 400 && !text.contains(char::is_control),
            "{}: {text}",
            case.name
        );
        case.expect(&format!("{:?}\n{text}\n", error.kind()));
    }
}

#[test]
fn the_name_of_a_checkpoint_has_one_meaning() {
    for name in [
        "before-upgrade",
        "20261123",
        "Auto",
        "20261123T055907Z-10ebf9b0-0",
    ] {
        assert!(is_checkpoint_name(name), "{name}");
    }
    for name in ["auto", "full", "no", "", ".x", "a/b", "20261123T055907Z-10ebf9b0"] {
        assert!(!is_checkpoint_name(name), "{name}");
    }
    for id in [
        "20261123T055907Z-10ebf9b",
        "20261123T055907Z-10ebf9bg",
        "2026112xT055907Z-10ebf9b0",
        "20261123 055907Z-10ebf9b0",
        "20261123T055907-10ebf9b0",
        "",
    ] {
        assert!(!is_backup_id(id), "{id}");
    }
}

#[test]
fn an_error_text_stays_short_and_on_one_line() {
    for case in cases("invalid", ".err") {
        let text = parse(&case.document).unwrap_err().to_string();
        assert!(text.len() < 400, "{}: {text}", case.name);
        assert!(!text.contains(char::is_control), "{}: {text:?}", case.name);
    }
}

#[test]
fn positions_are_those_of_the_tags() {
    let text = "<domainbackup>\n  <disks>\n    <!-- äöü --><disk name='vda'/>\r\n\t<disk name='vdb'/>\n  \
                </disks>\n  <store name='s'/></domainbackup>";
    for text in [text.to_owned(), format!("\u{feff}{text}")] {
        let definition = parse(&text).unwrap();
        let at: Vec<(u32, u32)> = definition
            .disks
            .unwrap()
            .iter()
            .map(|disk| (disk.at.line, disk.at.column))
            .collect();
        assert_eq!(at, [(3, 17), (4, 2)]);
        assert_eq!(definition.store.unwrap().at, Position { line: 6, column: 3 });
    }
}

#[test]
fn a_document_is_measured_before_it_is_read() {
    let root = "<domainbackup/>";
    let largest = format!("{root}{}", " ".repeat(MAX_BYTES - root.len()));
    assert_eq!(parse(&largest), Ok(Definition::default()));
    assert_eq!(
        parse(&format!("{largest} ")),
        Err(Error::TooLarge { bytes: MAX_BYTES + 1 })
    );
    let garbage = "\0".repeat(MAX_BYTES + 1);
    assert_eq!(
        parse(&garbage).unwrap_err().to_string(),
        "the document has 1048577 bytes; at most 1048576 are allowed"
    );
}

#[test]
fn an_empty_text_is_not_a_document() {
    for text in ["", " ", "\n\t\r\n ", "\u{feff}", "\u{feff} \n"] {
        assert_eq!(parse(text), Err(Error::Empty), "{text:?}");
    }
    assert_eq!(Error::Empty.to_string(), "the document is empty");
}

#[test]
fn an_endless_depth_ends_at_the_first_element_that_has_no_place() {
    for (open, line) in [
        ("<a>", "line 1, column 1"),
        ("<domainbackup>", "line 1, column 15"),
        ("<domainbackup><disks>", "line 1, column 22"),
    ] {
        let text = open.repeat(MAX_BYTES / open.len());
        assert!(parse(&text).unwrap_err().to_string().starts_with(line));
    }
    let depth = "<disks>".repeat(100_000);
    assert!(parse(&format!("<domainbackup>{depth}")).is_err());
}

#[test]
fn every_beginning_of_a_document_is_refused() {
    let document = everything();
    for (end, _) in document.trim_end().char_indices() {
        assert!(parse(&document[..end]).is_err(), "{}", &document[..end]);
    }
}

/// The parser must not panic on a damaged document.
#[test]
fn a_damaged_document_is_read_or_refused() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let pieces = [
        "<",
        ">",
        "'",
        "\"",
        "&",
        ";",
        "/",
        "]]>",
        "<![CDATA[",
        "<!--",
        "-->",
        "<?",
        "?>",
        "<!D",
        "&#0;",
        "&#x1F4BE;",
        "\u{feff}",
        "\u{0}",
        "ä",
        "\r\n",
        "=",
        ":",
        "<disk>",
        "</disk>",
    ];
    let documents: Vec<String> = cases("valid", ".out.xml")
        .into_iter()
        .map(|case| case.document)
        .collect();
    let mut accepted = 0;
    for round in 0..6000 {
        let mut bytes = documents[round % documents.len()].clone().into_bytes();
        for _ in 0..=random.below(3) {
            let at = random.below(bytes.len());
            match random.below(4) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => drop(bytes.remove(at)),
                2 => drop(bytes.splice(at..at, pieces[random.below(pieces.len())].bytes())),
                _ => drop(bytes.drain(at..(at + random.below(40)).min(bytes.len()))),
            }
            if bytes.is_empty() {
                break;
            }
        }
        match parse(&String::from_utf8_lossy(&bytes)) {
            Ok(definition) => {
                accepted += 1;
                let again = parse(&definition.to_xml()).unwrap();
                assert_eq!(meaning(again), meaning(definition));
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    assert!(accepted > 100, "only {accepted} were read to the end");
}

#[test]
fn values_set_in_code_survive_a_round_trip_through_xml() {
    let awkward = "a & b < c > d 'e' \"f\" \t\r\n]]> \u{85}\u{7f} \u{2028} ä 💾";
    let disk = DiskDefinition {
        format: Some(Format::Qcow2),
        compress: Some(Compression::Zstd),
        target: Some(Target::File(PathBuf::from("/srv/a&b<c>'d' \"e\"/ä"))),
        ..DiskDefinition::new("v&<>'\"da")
    };
    let definition = Definition {
        name: Some("web-1.x".into()),
        description: Some(awkward.into()),
        store: None,
        bandwidth: Some(u64::MAX),
        quiesce: Some(Quiesce::Require),
        incremental: Some(CheckpointRef {
            name: "monday".into(),
            at: Position::default(),
        }),
        disks: Some(vec![disk]),
    };
    assert_eq!(meaning(parse(&definition.to_xml()).unwrap()), definition);

    let attribute = Definition {
        store: Some(StoreRef {
            name: "nightly".into(),
            at: Position::default(),
        }),
        disks: Some(vec![DiskDefinition::new("vda  vdb")]),
        ..Definition::default()
    };
    assert_eq!(meaning(parse(&attribute.to_xml()).unwrap()), attribute);
}

#[test]
fn characters_that_xml_cannot_carry_are_replaced() {
    let definition = Definition {
        description: Some("a\0b\u{1b}c\u{ffff}d".into()),
        ..Definition::default()
    };
    let again = parse(&definition.to_xml()).unwrap();
    assert_eq!(again.description.as_deref(), Some("a\u{fffd}b\u{fffd}c\u{fffd}d"));
}

#[test]
fn limits_are_met_exactly() {
    let in_root = |inner: &str| parse(&format!("<domainbackup>{inner}</domainbackup>"));
    let text = |error: Result<Definition, Error>| error.unwrap_err().to_string();

    let disks = |count: usize| {
        let disks: String = (0..count).map(|n| format!("<disk name='d{n}'/>")).collect();
        in_root(&format!("<disks>{disks}</disks>"))
    };
    assert_eq!(disks(256).unwrap().disks.unwrap().len(), 256);
    assert_eq!(text(disks(257)), "line 1, column 4776: more than 256 disks");

    let disk = |bytes: usize| in_root(&format!("<disks><disk name='{}'/></disks>", "d".repeat(bytes)));
    assert!(disk(255).is_ok());
    assert_eq!(
        text(disk(256)),
        "line 1, column 28: the name of a disk has 256 bytes; at most 255 are allowed"
    );

    let path = |bytes: usize| {
        let path = "p".repeat(bytes - 1);
        in_root(&format!(
            "<disks><disk name='a'><target file='/{path}'/></disk></disks>"
        ))
    };
    assert!(path(4095).is_ok());
    assert_eq!(
        text(path(4096)),
        "line 1, column 45: the path has 4096 bytes; at most 4095 are allowed"
    );

    let description = |bytes: usize| in_root(&format!("<description>{}</description>", "t".repeat(bytes)));
    assert!(description(4096).is_ok());
    assert_eq!(
        text(description(4097)),
        "line 1, column 15: the description has 4097 bytes; at most 4096 are allowed"
    );

    let name = |bytes: usize| in_root(&format!("<name>{}</name>", "n".repeat(bytes)));
    assert!(name(128).is_ok());
    assert!(matches!(name(129), Err(Error::InvalidName { .. })));
}

#[test]
fn every_unit_of_libvirt_counts() {
    let bandwidth = |unit: &str| {
        let text = format!("<domainbackup><bandwidth unit='{unit}'>3</bandwidth></domainbackup>");
        parse(&text).map(|definition| definition.bandwidth.unwrap())
    };
    for (units, scale) in [
        ("B b byte bytes", 1),
        ("KB kb", 1000),
        ("K k KiB kib", 1 << 10),
        ("MB", 1000_u64.pow(2)),
        ("M MiB", 1 << 20),
        ("GB", 1000_u64.pow(3)),
        ("G GiB", 1 << 30),
        ("TB", 1000_u64.pow(4)),
        ("T TiB", 1 << 40),
        ("PB", 1000_u64.pow(5)),
        ("P PiB", 1 << 50),
        ("EB", 1000_u64.pow(6)),
        ("E EiB", 1 << 60),
    ] {
        for unit in units.split(' ') {
            assert_eq!(bandwidth(unit), Ok(3 * scale), "{unit}");
        }
    }
    for unit in [
        "", " ", "bit", "KBs", "KiBs", "Ki", "i", "ä", "MiB/s", "ZiB", " MiB",
    ] {
        assert!(
            matches!(bandwidth(unit), Err(Error::UnknownWord { .. })),
            "{unit}"
        );
    }
}

#[test]
fn a_word_is_the_inverse_of_its_value() {
    for word in ["try", "require"] {
        assert_eq!(Quiesce::from_word(word).unwrap().as_str(), word);
    }
    for word in ["qcow2", "raw"] {
        assert_eq!(Format::from_word(word).unwrap().as_str(), word);
    }
    for word in ["zstd", "zlib"] {
        assert_eq!(Compression::from_word(word).unwrap().as_str(), word);
    }
    for word in ["", "Try", "QCOW2", "zstd "] {
        assert_eq!(Quiesce::from_word(word), None);
        assert_eq!(Format::from_word(word), None);
        assert_eq!(Compression::from_word(word), None);
    }
}

#[test]
fn a_name_is_safe_as_the_name_of_a_file() {
    for name in ["a", "-", "_", "0", "A-b_c.d", "web..1"] {
        assert!(is_valid_name(name), "{name}");
    }
    for name in ["", ".", "..", ".a", "a/b", "a b", "ä", "a\n", "a\0"] {
        assert!(!is_valid_name(name), "{name:?}");
    }
}

#[test]
fn unsupported_and_invalid_are_separate_errors() {
    let kind = |inner: &str| {
        let text = format!("<domainbackup>{inner}</domainbackup>");
        parse(&text).unwrap_err().kind()
    };
    assert_eq!(
        kind("<disks><disk name='a' type='network'/></disks>"),
        Kind::Unsupported
    );
    assert_eq!(kind("<incrementel>c1</incrementel>"), Kind::InvalidDefinition);
}

/// Returns a definition without its positions in the document.
fn meaning(mut definition: Definition) -> Definition {
    let store = definition.store.iter_mut().map(|store| &mut store.at);
    let disks = definition.disks.iter_mut().flatten().map(|disk| &mut disk.at);
    let incremental = definition.incremental.iter_mut().map(|since| &mut since.at);
    store
        .chain(disks)
        .chain(incremental)
        .for_each(|at| *at = Position::default());
    for disk in definition.disks.iter_mut().flatten() {
        if let Some(BackupMode::Incremental(Some(since))) = &mut disk.mode {
            since.at = Position::default();
        }
    }
    definition
}

/// Returns the one document with every element.
fn everything() -> String {
    fs::read_to_string(folder("valid").join("everything.xml")).unwrap()
}

struct Case {
    name: String,
    document: String,
    expectation: PathBuf,
}

impl Case {
    fn expect(&self, actual: &str) {
        if updating() {
            fs::write(&self.expectation, actual).unwrap();
        }
        let expected = fs::read_to_string(&self.expectation).unwrap();
        assert_eq!(
            actual,
            expected,
            "{} differs from {}",
            self.name,
            self.expectation.display()
        );
    }
}

fn updating() -> bool {
    std::env::var_os("UPDATE").is_some_and(|value| value == "1")
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/interface/definitions")
        .join(name)
}

/// Returns the documents of a folder with their expectation files; every file must have its partner.
fn cases(name: &str, suffix: &str) -> Vec<Case> {
    let files: BTreeSet<String> = fs::read_dir(folder(name))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let (expectations, documents): (Vec<&String>, Vec<&String>) =
        files.iter().partition(|file| file.ends_with(suffix));
    for expectation in expectations {
        let document = format!("{}.xml", expectation.trim_end_matches(suffix));
        assert!(
            files.contains(&document),
            "{name}/{expectation} has no {document}"
        );
    }
    let cases: Vec<Case> = documents
        .into_iter()
        .map(|document| {
            let stem = document
                .strip_suffix(".xml")
                .unwrap_or_else(|| panic!("{name}/{document} is not a case"));
            let expectation = format!("{stem}{suffix}");
            assert!(
                updating() || files.contains(&expectation),
                "{name}/{document} has no {expectation}"
            );
            Case {
                name: format!("{name}/{document}"),
                document: fs::read_to_string(folder(name).join(document)).unwrap(),
                expectation: folder(name).join(expectation),
            }
        })
        .collect();
    assert!(!cases.is_empty(), "{name} has no cases");
    cases
}

/// The same numbers in each run (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}
