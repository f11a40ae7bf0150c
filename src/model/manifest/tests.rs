//! Tests of writing, reading and refusing manifests.

use super::*;
use crate::model::MAX_DESCRIPTION_BYTES;
use serde_json::{Value, json};

const WRITTEN: &str = r#"{
  "version": 1,
  "id": "20261123T055937Z-10ebf9b0",
  "job": 7,
  "started-by": 1000,
  "domain": {
    "name": "web",
    "uuid": "6f8c2c5e-3d5f-4a55-9a3e-2f1f6d1c9a10"
  },
  "name": "before-upgrade",
  "description": "two lines\nof it",
  "kind": "full",
  "started": "2026-11-23T05:59:37.123456789Z",
  "instant": "2026-11-23T05:59:38Z",
  "quiesced": true,
  "disks": [
    {
      "name": "vda",
      "file": "vda.qcow2",
      "format": "qcow2",
      "virtual-size": 1073741824
    },
    {
      "name": "/machine/x",
      "file": "%2Fmachine%2Fx.raw",
      "format": "raw",
      "virtual-size": 18446744073709551615
    }
  ]
}
"#;

fn manifest() -> Manifest {
    let domain = Domain {
        name: "web".into(),
        uuid: Some("6f8c2c5e-3d5f-4a55-9a3e-2f1f6d1c9a10".parse().unwrap()),
        unknown: Unknown::new(),
    };
    let disk = |name: &str, file: &str, format, virtual_size| Disk {
        name: name.into(),
        file: file.into(),
        format,
        virtual_size,
        length: None,
        blake3: None,
        sha256: None,
        parent: None,
        bitmap: None,
        unknown: Unknown::new(),
    };
    let started = "2026-11-23T05:59:37.123456789Z".parse().unwrap();
    let instant = "2026-11-23T05:59:38Z".parse().unwrap();
    Manifest {
        name: Some("before-upgrade".into()),
        description: Some("two lines\nof it".into()),
        quiesced: true,
        disks: vec![
            disk("vda", "vda.qcow2", Format::Qcow2, 1 << 30),
            disk("/machine/x", "%2Fmachine%2Fx.raw", Format::Raw, u64::MAX),
        ],
        ..Manifest::new(
            Kind::Full,
            "20261123T055937Z-10ebf9b0".into(),
            7,
            1000,
            domain,
            started,
            instant,
        )
    }
}

/// Parses the manifest above with `value` at `pointer`, and returns the error.
fn refused(pointer: &str, value: Value) -> ManifestError {
    let mut json: Value = serde_json::from_str(WRITTEN).unwrap();
    *json.pointer_mut(pointer).unwrap() = value;
    Manifest::parse(json.to_string().as_bytes()).unwrap_err()
}

#[test]
fn the_encoding_is_stable_and_is_read_as_it_was_written() {
    assert_eq!(String::from_utf8(manifest().to_json().unwrap()).unwrap(), WRITTEN);
    assert_eq!(Manifest::parse(WRITTEN.as_bytes()).unwrap(), manifest());
}

#[test]
fn the_name_of_a_checkpoint_is_kept_and_reserved_names_are_refused() {
    let mut named = manifest();
    named.checkpoint = Some(Checkpoint {
        name: Some("monday".into()),
        description: Some("two lines\nof it".into()),
    });
    let json = named.to_json().unwrap();
    assert_eq!(Manifest::parse(&json).unwrap(), named);
    for name in ["full", "a/b", "20261123T055937Z-10ebf9b0"] {
        let json = String::from_utf8(json.clone()).unwrap().replace("monday", name);
        let error = Manifest::parse(json.as_bytes()).unwrap_err();
        assert!(matches!(error, ManifestError::Text { .. }), "{error}");
    }
}

#[test]
fn devices_that_are_not_in_the_backup_are_listed() {
    let mut lacking = manifest();
    lacking.not_in_backup = vec![Outside {
        name: "vdx".into(),
        kind: "vhost-user-blk-pci".into(),
    }];
    let json = lacking.to_json().unwrap();
    assert_eq!(Manifest::parse(&json).unwrap(), lacking);
    let json = String::from_utf8(json).unwrap().replace("vdx", "a\\u001bb");
    let error = Manifest::parse(json.as_bytes()).unwrap_err();
    assert!(matches!(error, ManifestError::Text { .. }), "{error}");
}

#[test]
fn absent_optional_fields_stay_absent() {
    let most = Manifest {
        frozen_us: Some(41_327),
        quiesce_problem: Some("the agent froze none".into()),
        ..manifest()
    };
    let json = most.to_json().unwrap();
    assert!(String::from_utf8_lossy(&json).contains("\"frozen-us\": 41327,\n"));
    assert_eq!(Manifest::parse(&json).unwrap(), most);
    let least = Manifest {
        name: None,
        description: None,
        domain: Domain {
            name: "web".into(),
            uuid: None,
            unknown: Unknown::new(),
        },
        ..manifest()
    };
    let json = least.to_json().unwrap();
    assert!(!String::from_utf8_lossy(&json).contains("description"));
    assert_eq!(Manifest::parse(&json).unwrap(), least);
}

#[test]
fn the_backing_file_belongs_to_another_backup() {
    let mut incremental = manifest();
    incremental.kind = Kind::Incremental;
    incremental.disks[0].length = Some(393_216);
    incremental.disks[0].blake3 = Some("0f".repeat(32));
    incremental.disks[0].bitmap = Some("backupd-20261123T055937Z-10ebf9b0-0".into());
    incremental.disks[0].parent = Some(Parent {
        backup: "20261122T055937Z-00000000".into(),
        file: "vda.qcow2".into(),
    });
    assert_eq!(
        Manifest::parse(&incremental.to_json().unwrap()).unwrap(),
        incremental
    );
    assert_eq!(
        incremental.parents().into_iter().collect::<Vec<_>>(),
        ["20261122T055937Z-00000000"]
    );
    let refused = |change: &dyn Fn(&mut Manifest)| {
        let mut changed = incremental.clone();
        change(&mut changed);
        Manifest::parse(&changed.to_json().unwrap()).unwrap_err()
    };
    let parent = |backup: &str, file: &str| {
        let parent = Parent {
            backup: backup.into(),
            file: file.into(),
        };
        refused(&|manifest| manifest.disks[0].parent = Some(parent.clone()))
    };
    for (backup, file) in [
        ("..", "vda.qcow2"),
        ("a/b", "x"),
        ("a", "../x"),
        ("a", MANIFEST_NAME),
        ("a", ""),
    ] {
        let error = parent(backup, file);
        assert!(
            matches!(error, ManifestError::Text { .. }),
            "{backup} {file}: {error}"
        );
    }
    let error = parent("20261123T055937Z-10ebf9b0", "vda.qcow2");
    assert!(error.to_string().contains("same backup"), "{error}");
    let error = refused(&|manifest| manifest.kind = Kind::Full);
    assert!(error.to_string().contains("full backup"), "{error}");
    let error = refused(&|manifest| manifest.disks[0].format = Format::Raw);
    assert!(error.to_string().contains("is raw"), "{error}");
    for hex in ["", "0f", &"0F".repeat(32), &"0g".repeat(32)] {
        let error = refused(&|manifest| manifest.disks[0].sha256 = Some(hex.into()));
        assert!(error.to_string().contains("SHA-256"), "{hex}: {error}");
        let error = refused(&|manifest| manifest.disks[0].blake3 = Some(hex.into()));
        assert!(error.to_string().contains("BLAKE3"), "{hex}: {error}");
    }
}

#[test]
fn a_newer_manifest_is_distinguished_from_a_damaged_one() {
    let newer = br#"{"version":2,"id":{"store":"x"},"chain":[],"disks":[]}"#;
    let error = Manifest::parse(newer).unwrap_err();
    assert_eq!(error, ManifestError::Newer { found: 2 });
    assert!(error.to_string().contains("newer backupd"), "{error}");
    assert_eq!(
        refused("/version", json!(0)),
        ManifestError::NoSuchVersion { found: 0 }
    );
    for broken in ["", "{}", "[]", "null", "{\"version\":\"1\"}", "{\"version\":-1}"] {
        let error = Manifest::parse(broken.as_bytes()).unwrap_err();
        assert!(matches!(error, ManifestError::Syntax { .. }), "{broken}: {error}");
    }
}

#[test]
fn unknown_fields_are_kept_unless_the_manifest_requires_them() {
    let newer = WRITTEN
        .replace("\"quiesced\"", "\"tpm\": { \"file\": \"tpm\" },\n  \"quiesced\"")
        .replace("\"name\": \"web\"", "\"name\": \"web\", \"title\": \"Web\"")
        .replace("\"format\": \"raw\"", "\"format\": \"raw\", \"serial\": 1");
    let read = Manifest::parse(newer.as_bytes()).unwrap();
    let known = |mut manifest: Manifest| {
        manifest.unknown.clear();
        manifest.domain.unknown.clear();
        manifest.disks.iter_mut().for_each(|disk| disk.unknown.clear());
        manifest
    };
    assert_eq!(known(read.clone()), manifest());
    let mut changed = read.clone();
    changed.kind = Kind::Full;
    changed.disks[0].length = Some(393_216);
    let written: Value = serde_json::from_slice(&changed.to_json().unwrap()).unwrap();
    assert_eq!(written["tpm"]["file"], "tpm");
    assert_eq!(written["domain"]["title"], "Web");
    assert_eq!(written["disks"][1]["serial"], 1);
    assert_eq!(Manifest::parse(&changed.to_json().unwrap()).unwrap(), changed);
    let none = newer.replace("\"job\": 7", "\"job\": 7, \"requires\": []");
    assert_eq!(Manifest::parse(none.as_bytes()).unwrap(), read);
    // Unknown content of such a manifest does not matter.
    let required = newer
        .replace("\"job\": 7", "\"requires\": [\"split-images\"]")
        .replace("\"disks\": [", "\"disks\": [ 7,");
    let error = Manifest::parse(required.as_bytes()).unwrap_err();
    let feature = "split-images".to_owned();
    assert_eq!(error, ManifestError::Requires { feature });
    assert!(error.to_string().contains("'split-images'"), "{error}");
}

#[test]
fn the_service_and_the_sequence_number_are_kept() {
    let made = Manifest {
        service: Some(Uuid::from_u128(7)),
        sequence: MAX_SEQUENCE,
        ..manifest()
    };
    let json = made.to_json().unwrap();
    assert_eq!(Manifest::parse(&json).unwrap(), made);
    let beyond = Manifest {
        sequence: MAX_SEQUENCE + 1,
        ..made
    };
    let error = Manifest::parse(&beyond.to_json().unwrap()).unwrap_err();
    let found = MAX_SEQUENCE + 1;
    assert_eq!(error, ManifestError::Sequence { found });
}

#[test]
fn the_error_names_a_missing_or_repeated_field() {
    let missing = WRITTEN.replace("  \"job\": 7,\n", "");
    let twice = WRITTEN.replace("\"job\": 7,", "\"job\": 7,\n  \"job\": 7,");
    let more = format!("{WRITTEN}{{}}");
    for (text, word) in [(missing, "`job`"), (twice, "`job`"), (more, "trailing")] {
        let error = Manifest::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("line"), "{error}");
    }
}

#[test]
fn a_name_outside_the_directory_is_refused() {
    let long = "x".repeat(256);
    for bad in [
        "",
        ".",
        "..",
        "../up",
        "/etc/passwd",
        "a/b",
        ".hidden",
        "a\nb",
        "a\0b",
        &long,
    ] {
        for pointer in ["/id", "/domain/name", "/disks/0/file"] {
            let error = refused(pointer, json!(bad));
            assert!(matches!(error, ManifestError::Text { .. }), "{pointer}: {error}");
            assert!(!error.to_string().contains(char::is_control), "{error:?}");
        }
    }
    for record in [MANIFEST_NAME, DEFINITION_NAME] {
        let error = refused("/disks/0/file", json!(record));
        assert!(error.to_string().contains(record), "{error}");
    }
}

#[test]
fn every_other_text_is_checked() {
    for (pointer, bad) in [
        ("/name", "a b"),
        ("/name", ""),
        ("/description", "a\u{1}b"),
        ("/description", &"x".repeat(MAX_DESCRIPTION_BYTES + 1)),
        ("/disks/1/name", ""),
        ("/disks/1/name", "a\u{7f}"),
    ] {
        let error = refused(pointer, json!(bad));
        assert!(matches!(error, ManifestError::Text { .. }), "{pointer}: {error}");
    }
    for pointer in ["/started", "/instant", "/kind", "/domain/uuid", "/disks/0/format"] {
        let error = refused(pointer, json!("soon"));
        assert!(
            matches!(error, ManifestError::Syntax { .. }),
            "{pointer}: {error}"
        );
    }
}

#[test]
fn a_manifest_has_disks_and_no_two_have_a_name_or_file_in_common() {
    assert_eq!(refused("/disks", json!([])), ManifestError::NoDisks);
    for (pointer, value, what) in [
        ("/disks/1/name", "vda", "name"),
        ("/disks/1/file", "vda.qcow2", "file"),
    ] {
        let value = value.to_owned();
        assert_eq!(
            refused(pointer, json!(value)),
            ManifestError::SameDisk { what, value }
        );
    }
}

#[test]
fn a_manifest_that_is_too_long_is_not_parsed() {
    let bytes = vec![b' '; MAX_MANIFEST_BYTES + 1];
    assert!(matches!(
        Manifest::parse(&bytes).unwrap_err(),
        ManifestError::TooLong { .. }
    ));
    let error = Manifest::parse(format!("{{\"{}\":1}}", "x\u{1b}".repeat(4000)).as_bytes()).unwrap_err();
    assert!(error.to_string().len() < 2048, "{error}");
}

#[test]
fn a_manifest_with_too_many_values_is_not_stored_in_memory() {
    let values = |json: String| {
        let extended = WRITTEN.replace("\"quiesced\"", &format!("\"later\": {json},\n  \"quiesced\""));
        Manifest::parse(extended.as_bytes())
    };
    let room = MAX_MANIFEST_BYTES - 2 * WRITTEN.len();
    let list = format!("[{}0]", "0,".repeat(room / 2));
    let nested = format!("[{}0]", "[[]],".repeat(room / 5));
    let map = format!("{{{}\"\":0}}", "\"\":0,".repeat(room / 5));
    for hostile in [list, nested, map] {
        let error = values(hostile).unwrap_err();
        assert!(matches!(error, ManifestError::TooManyValues { .. }), "{error}");
        assert!(!error.is_damage());
    }
    values(format!("[{}0]", "0,".repeat(MAX_MANIFEST_VALUES / 2))).unwrap();
}

#[test]
fn a_manifest_with_the_maximum_number_of_disks_has_few_values() {
    let mut large = manifest();
    let disk = &large.disks[0];
    let disk = |number: usize| Disk {
        name: format!("vd{number}"),
        file: format!("vd{number}.qcow2"),
        length: Some(1),
        blake3: Some("0".repeat(64)),
        parent: Some(Parent {
            backup: "earlier".into(),
            file: "vda.qcow2".into(),
        }),
        bitmap: Some("b".into()),
        ..disk.clone()
    };
    large.disks = (0..256).map(disk).collect();
    let Values(values) = serde_json::from_slice(&large.to_json().unwrap()).unwrap();
    assert!(values < MAX_MANIFEST_VALUES / 4, "{values}");
}
