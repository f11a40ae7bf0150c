//! The manifest, to and from its bytes.
//!
//! The reader may be another host than the writer, and the bytes untrusted. So nothing that [`Manifest::parse`]
//! returns can lead out of the backup's own directory. Pure: opens no file.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{DEFINITION_NAME, MANIFEST_NAME, PROTECTED_NAME};
use crate::definition::{Format, MAX_DESCRIPTION_BYTES, is_checkpoint_name, is_valid_name};
use crate::digest::{Algorithm, Digest, is_hex};
use crate::domain::Outside;
use crate::error::shown;

/// The longest manifest that is looked at. One of the most disks that a domain can have takes a fifth of it.
pub const MAX_MANIFEST_BYTES: usize = 1 << 20;
/// Goes up when all of it is another. An older reader is kept from misunderstanding one thing by `requires`.
const VERSION: u64 = 1;
/// What a manifest may require of its reader, and this one knows.
const FEATURES: &[&str] = &[];
/// The highest number in the order of making.
pub const MAX_SEQUENCE: u64 = 1 << 53;
/// The longest name that a file, and so a backup, a domain or a disk, can have.
const MAX_NAME_BYTES: usize = 255;

/// Why some bytes are no manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("it has {bytes} bytes, where a manifest has at most {MAX_MANIFEST_BYTES}")]
    TooLong { bytes: usize },
    #[error("a newer backupd wrote it: its version is {found}, and this one reads up to {VERSION}")]
    Newer { found: u64 },
    #[error("it has version {found}, which no backupd ever wrote")]
    NoSuchVersion { found: u64 },
    #[error("it requires '{feature}', which this backupd does not know: a newer one wrote it")]
    Requires { feature: String },
    #[error("its number in the order of making, {found}, is above {MAX_SEQUENCE}")]
    Sequence { found: u64 },
    #[error("{message}")]
    Syntax { message: String },
    #[error("'{value}' cannot be {what}")]
    Text { what: &'static str, value: String },
    #[error("it lists no disk")]
    NoDisks,
    #[error("disk '{disk}' lies on {on}")]
    Parent { disk: String, on: &'static str },
    #[error("two disks have the {what} '{value}'")]
    SameDisk { what: &'static str, value: String },
}

impl ManifestError {
    /// Whether it is no manifest, of no service: a newer one would make no more of it.
    pub fn is_damage(&self) -> bool {
        !matches!(self, Self::Newer { .. } | Self::Requires { .. })
    }
}

/// What a backup holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// All that the disks held.
    Full,
    /// What changed since the newest backup that there was; a disk that had none before, whole.
    Incremental,
    /// What changed since an older one.
    Differential,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
            Self::Differential => "differential",
        }
    }
}

/// Fields that are not known here are optional ones of a newer service: they are not read, and not written again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Manifest {
    version: u64,
    /// What a reader must know to read it right.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    requires: Vec<String>,
    /// The backup's name in its store.
    pub id: String,
    /// The job that made it, by its number in the service that ran it.
    pub job: u32,
    /// The user that started it.
    pub started_by: u32,
    /// The service that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Uuid>,
    /// The order of making in the directory: above that of all backups that were there then. Clocks can go wrong.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub sequence: u64,
    pub domain: Domain,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    pub kind: Kind,
    /// When the call came, and the instant that the images show; RFC 3339, UTC.
    pub started: Timestamp,
    pub instant: Timestamp,
    /// Whether the guest's file systems were frozen at that instant.
    pub quiesced: bool,
    /// For how many µs they were frozen, where they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_us: Option<u64>,
    /// Why they were not, though that was to be tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesce_problem: Option<String>,
    /// What is said of the checkpoint that began with it; without a name it is called as the backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Checkpoint>,
    /// Devices of the domain whose data no backup could hold.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_in_backup: Vec<Outside>,
    pub disks: Vec<Disk>,
    /// See [`Manifest::prove`]; in lower-case hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Domain {
    pub name: String,
    pub uuid: Option<Uuid>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Disk {
    pub name: String,
    /// Relative to the manifest.
    pub file: String,
    pub format: Format,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// Bytes that the file has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
    /// Of the file, in lower-case hexadecimal digits, as `b3sum` prints it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blake3: Option<String>,
    /// The same as `sha256sum` prints it, where an older service recorded that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The backing image, which has the data that is not in this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
    /// The dirty bitmap on the domain's disk that has recorded from this backup's instant on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<String>,
}

impl Disk {
    /// Of its image's file.
    pub fn digest(&self) -> Option<Digest> {
        let of = |algorithm, hex: &Option<String>| {
            let hex = hex.clone()?;
            Some(Digest { algorithm, hex })
        };
        of(Algorithm::Blake3, &self.blake3).or_else(|| of(Algorithm::Sha256, &self.sha256))
    }

    /// Replaces it.
    pub fn set_digest(&mut self, digest: Option<Digest>) {
        (self.blake3, self.sha256) = match digest {
            None => (None, None),
            Some(digest) => match digest.algorithm {
                Algorithm::Blake3 => (Some(digest.hex), None),
                Algorithm::Sha256 => (None, Some(digest.hex)),
            },
        };
    }
}

/// What its maker says of a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Checkpoint {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// An image of an earlier backup of the same domain in the same store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Parent {
    /// The backup's id.
    pub backup: String,
    /// Relative to that backup's manifest.
    pub file: String,
}

impl Parent {
    /// Its name in the image's header: a path relative to the directory of the dependent.
    pub fn relative_path(&self) -> String {
        format!("../{}/{}", self.backup, self.file)
    }
}

/// What every version of the manifest has.
#[derive(Deserialize)]
struct Versioned {
    version: u64,
    #[serde(default)]
    requires: Vec<String>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Manifest {
    /// The names of the image files.
    pub fn images(&self) -> Vec<&str> {
        self.disks.iter().map(|disk| disk.file.as_str()).collect()
    }

    /// Of a backup without a disk yet.
    pub fn new(
        kind: Kind,
        id: String,
        job: u32,
        started_by: u32,
        domain: Domain,
        started: Timestamp,
        instant: Timestamp,
    ) -> Self {
        Self {
            version: VERSION,
            requires: Vec::new(),
            id,
            job,
            started_by,
            service: None,
            sequence: 0,
            domain,
            name: None,
            description: None,
            kind,
            started,
            instant,
            quiesced: false,
            frozen_us: None,
            quiesce_problem: None,
            checkpoint: None,
            not_in_backup: Vec::new(),
            disks: Vec::new(),
            proof: None,
        }
    }

    /// Reads a file's content. Whatever it gives, [`Manifest::to_json`] writes, and reads again as the same.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::TooLong { bytes: bytes.len() });
        }
        // By itself first: a newer manifest has fields, and values of fields, that nobody here knows.
        let Versioned {
            version: found,
            requires,
        } = read(bytes)?;
        match found {
            VERSION => {}
            0 => return Err(ManifestError::NoSuchVersion { found }),
            _ => return Err(ManifestError::Newer { found }),
        }
        let unknown = |feature: &&String| !FEATURES.contains(&feature.as_str());
        if let Some(feature) = requires.iter().find(unknown) {
            let feature = shown(feature);
            return Err(ManifestError::Requires { feature });
        }
        let manifest: Self = read(bytes)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The file's content.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut json = serde_json::to_vec_pretty(self)?;
        json.push(b'\n');
        Ok(json)
    }

    fn check(&self) -> Result<(), ManifestError> {
        require(is_file_name(&self.id), "a backup's id", &self.id)?;
        require(
            is_file_name(&self.domain.name),
            "a domain's name",
            &self.domain.name,
        )?;
        if let Some(name) = &self.name {
            require(is_valid_name(name), "a backup's name", name)?;
        }
        if let Some(description) = &self.description {
            require(is_description(description), "a description", description)?;
        }
        if let Some(why) = &self.quiesce_problem {
            require(is_description(why), "a reason", why)?;
        }
        if let Some(Checkpoint { name, description }) = &self.checkpoint {
            if let Some(name) = name {
                require(is_checkpoint_name(name), "a checkpoint's name", name)?;
            }
            if let Some(description) = description {
                require(is_description(description), "a description", description)?;
            }
        }
        if self.sequence > MAX_SEQUENCE {
            let found = self.sequence;
            return Err(ManifestError::Sequence { found });
        }
        for Outside { name, kind } in &self.not_in_backup {
            require(is_disk_name(name), "a device's name", name)?;
            require(is_disk_name(kind), "a device's type", kind)?;
        }
        if self.disks.is_empty() {
            return Err(ManifestError::NoDisks);
        }
        let (mut names, mut files) = (BTreeSet::new(), BTreeSet::new());
        for disk in &self.disks {
            let Disk { name, file, .. } = disk;
            require(is_disk_name(name), "a disk's name", name)?;
            require(is_image_name(file), "an image's file name", file)?;
            distinct(names.insert(name), "name", name)?;
            distinct(files.insert(file), "file", file)?;
            for (hex, what) in [
                (&disk.blake3, "a BLAKE3 digest"),
                (&disk.sha256, "a SHA-256 digest"),
            ] {
                if let Some(hex) = hex {
                    require(is_hex(hex), what, hex)?;
                }
            }
            if let Some(bitmap) = &disk.bitmap {
                require(is_bitmap_name(bitmap), "a bitmap's name", bitmap)?;
            }
            self.check_parent(disk)?;
        }
        Ok(())
    }

    fn check_parent(&self, disk: &Disk) -> Result<(), ManifestError> {
        let Some(parent) = &disk.parent else {
            return Ok(());
        };
        require(is_file_name(&parent.backup), "a backup's id", &parent.backup)?;
        require(is_image_name(&parent.file), "an image's file name", &parent.file)?;
        let wrong = |on| {
            Err(ManifestError::Parent {
                disk: shown(&disk.name),
                on,
            })
        };
        if parent.backup == self.id {
            return wrong("an image of the same backup");
        }
        match (disk.format, self.kind) {
            (Format::Raw, _) => wrong("another image, and is raw"),
            (_, Kind::Full) => wrong("another image, in a full backup"),
            _ => Ok(()),
        }
    }

    /// The bases of this one's images: it cannot be read without them.
    pub fn parents(&self) -> BTreeSet<&str> {
        let parents = self.disks.iter().filter_map(|disk| disk.parent.as_ref());
        parents.map(|parent| parent.backup.as_str()).collect()
    }
}

fn read<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, ManifestError> {
    serde_json::from_slice(bytes).map_err(|error| ManifestError::Syntax {
        message: one_line(&error.to_string()),
    })
}

/// A parser's words can hold as much of the file as it likes.
fn one_line(message: &str) -> String {
    let printable = message
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c });
    printable.take(512).collect()
}

fn require(good: bool, what: &'static str, value: &str) -> Result<(), ManifestError> {
    good.then_some(()).ok_or_else(|| ManifestError::Text {
        what,
        value: shown(value),
    })
}

fn distinct(first: bool, what: &'static str, value: &str) -> Result<(), ManifestError> {
    first.then_some(()).ok_or_else(|| ManifestError::SameDisk {
        what,
        value: shown(value),
    })
}

/// Names one file in a directory, neither the directory nor one above it, and none that is hidden.
fn is_file_name(name: &str) -> bool {
    is_disk_name(name) && !name.starts_with('.') && !name.contains('/')
}

fn is_image_name(name: &str) -> bool {
    is_file_name(name) && ![MANIFEST_NAME, DEFINITION_NAME, PROTECTED_NAME].contains(&name)
}

/// Bitmaps in a qcow2 image have names of at most 1023 bytes (QEMU's docs/interop/qcow2).
fn is_bitmap_name(name: &str) -> bool {
    (1..=1023).contains(&name.len()) && !name.contains(char::is_control)
}

/// What QEMU calls a disk can hold a slash.
fn is_disk_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.contains(char::is_control)
}

fn is_description(text: &str) -> bool {
    text.len() <= MAX_DESCRIPTION_BYTES && is_text(text)
}

/// What a document's text can hold.
fn is_text(text: &str) -> bool {
    !text.contains(|c: char| c < ' ' && !matches!(c, '\t' | '\n' | '\r'))
}

#[cfg(test)]
mod tests {
    use super::*;
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

    /// What is said of the manifest above with something else at `pointer`.
    fn refused(pointer: &str, value: Value) -> ManifestError {
        let mut json: Value = serde_json::from_str(WRITTEN).unwrap();
        *json.pointer_mut(pointer).unwrap() = value;
        Manifest::parse(json.to_string().as_bytes()).unwrap_err()
    }

    #[test]
    fn the_bytes_are_what_they_always_were_and_are_read_as_what_was_written() {
        assert_eq!(String::from_utf8(manifest().to_json().unwrap()).unwrap(), WRITTEN);
        assert_eq!(Manifest::parse(WRITTEN.as_bytes()).unwrap(), manifest());
    }

    #[test]
    fn what_a_checkpoint_is_called_is_kept_and_means_nothing_else() {
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
    fn what_is_not_in_the_backup_is_named() {
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
    fn what_need_not_be_said_is_read_as_not_said() {
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
            },
            ..manifest()
        };
        let json = least.to_json().unwrap();
        assert!(!String::from_utf8_lossy(&json).contains("description"));
        assert_eq!(Manifest::parse(&json).unwrap(), least);
    }

    #[test]
    fn what_an_image_lies_on_is_named_and_is_another_backups() {
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
    fn a_newer_manifest_is_told_from_a_broken_one() {
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
    fn fields_of_a_newer_service_are_ignored_unless_the_manifest_requires_them() {
        let newer = WRITTEN
            .replace("\"quiesced\"", "\"tpm\": { \"file\": \"tpm\" },\n  \"quiesced\"")
            .replace("\"name\": \"web\"", "\"name\": \"web\", \"title\": \"Web\"")
            .replace("\"format\": \"raw\"", "\"format\": \"raw\", \"serial\": 1");
        assert_eq!(Manifest::parse(newer.as_bytes()).unwrap(), manifest());
        let none = newer.replace("\"job\": 7", "\"job\": 7, \"requires\": []");
        assert_eq!(Manifest::parse(none.as_bytes()).unwrap(), manifest());
        // Whatever else such a manifest has.
        let required = newer
            .replace("\"job\": 7", "\"requires\": [\"split-images\"]")
            .replace("\"disks\": [", "\"disks\": [ 7,");
        let error = Manifest::parse(required.as_bytes()).unwrap_err();
        let feature = "split-images".to_owned();
        assert_eq!(error, ManifestError::Requires { feature });
        assert!(error.to_string().contains("'split-images'"), "{error}");
    }

    #[test]
    fn who_made_it_and_in_which_order_is_kept() {
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
    fn a_field_that_is_missing_or_twice_there_is_named() {
        let missing = WRITTEN.replace("  \"job\": 7,\n", "");
        let twice = WRITTEN.replace("\"job\": 7,", "\"job\": 7,\n  \"job\": 7,");
        let more = format!("{WRITTEN}{{}}");
        for (text, word) in [(missing, "`job`"), (twice, "`job`"), (more, "trailing")] {
            let error = Manifest::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("line"), "{error}");
        }
    }

    #[test]
    fn a_name_that_leads_out_of_the_directory_is_refused() {
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
    fn every_other_text_is_checked_for_what_it_may_be() {
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
    fn there_is_a_disk_and_no_two_are_alike() {
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
    fn what_is_too_long_is_not_looked_at() {
        let bytes = vec![b' '; MAX_MANIFEST_BYTES + 1];
        assert!(matches!(
            Manifest::parse(&bytes).unwrap_err(),
            ManifestError::TooLong { .. }
        ));
        let error = Manifest::parse(format!("{{\"{}\":1}}", "x\u{1b}".repeat(4000)).as_bytes()).unwrap_err();
        assert!(error.to_string().len() < 2048, "{error}");
    }
}
