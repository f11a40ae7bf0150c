//! The manifest of a backup, and its JSON encoding.
//!
//! Another host may have written the bytes, so they are not trusted: no value that [`Manifest::parse`] returns can name
//! a file outside the backup's directory. Pure: opens no file.

mod check;
mod error;
mod values;

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Algorithm, Digest, Format, Kind, Outside};
use crate::error::shown;
pub use error::ManifestError;
use values::Values;

/// Names of the records beside a backup's images.
pub const MANIFEST_NAME: &str = "manifest.json";
pub const DEFINITION_NAME: &str = "backup.xml";
/// An empty file beside the images. While it exists, the service does not delete the backup.
pub const PROTECTED_NAME: &str = "protected";
/// The longest manifest that is read, in bytes. A manifest with the maximum number of disks takes a fifth of it.
pub const MAX_MANIFEST_BYTES: usize = 1 << 20;
/// The most JSON values in a manifest that is read, because an unknown value of two bytes takes 32 bytes of memory. A
/// manifest with the maximum number of disks has a fifth of it.
pub const MAX_MANIFEST_VALUES: usize = 1 << 14;
/// Increases when the whole format changes. A single new feature that old readers must not ignore goes into `requires`.
const VERSION: u64 = 1;
/// The features in `requires` that this version supports.
const FEATURES: &[&str] = &[];
/// The highest sequence number. A 64-bit float still represents it exactly.
pub const MAX_SEQUENCE: u64 = 1 << 53;

/// A backup's record in its store.
///
/// Unknown fields of the manifest, its domain and its disks are optional fields of a newer version. They are kept when
/// the manifest is written again, so their values must not depend on the bytes of the images, which a merge replaces.
/// `requires` names fields without which a reader would misread the backup.
///
/// [`Checkpoint`] and [`Parent`] drop unknown fields. The proof covers the manifest as this version writes it, so a
/// newer manifest that has such fields counts as not proven, and the next backup is a full one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Manifest {
    version: u64,
    /// Features that a reader must support to interpret the manifest correctly.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    requires: Vec<String>,
    /// The backup's name in its store.
    pub id: String,
    /// The number that the job had in the service that ran it.
    pub job: u32,
    /// The user who started the job.
    pub started_by: u32,
    /// The service instance that created the backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Uuid>,
    /// The order of creation in the domain's directory: higher than that of all backups that existed then. Clocks can
    /// be wrong.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub sequence: u64,
    pub domain: Domain,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    pub kind: Kind,
    /// Time of the request, and point in time of the images; RFC 3339, UTC.
    pub started: Timestamp,
    pub instant: Timestamp,
    /// Whether the guest's file systems were frozen at that point in time.
    pub quiesced: bool,
    /// How long the file systems were frozen, in µs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_us: Option<u64>,
    /// The reason why the requested freeze failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesce_problem: Option<String>,
    /// Name and description of the checkpoint of this backup. Without a name, the checkpoint has the backup's id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Checkpoint>,
    /// Devices of the domain whose data is not in the backup.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_in_backup: Vec<Outside>,
    pub disks: Vec<Disk>,
    /// See [`Manifest::prove`]; lower-case hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<String>,
    #[serde(flatten)]
    unknown: Unknown,
}

/// Fields that this version does not know, by name.
pub type Unknown = serde_json::Map<String, serde_json::Value>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Domain {
    pub name: String,
    pub uuid: Option<Uuid>,
    #[serde(flatten)]
    pub unknown: Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Disk {
    pub name: String,
    /// Path relative to the manifest.
    pub file: String,
    pub format: Format,
    /// Size of the disk that the guest sees, in bytes.
    pub virtual_size: u64,
    /// Length of the file, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
    /// BLAKE3 digest of the file, in lower-case hexadecimal digits, as `b3sum` prints it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blake3: Option<String>,
    /// SHA-256 digest that an older version of the service recorded, as `sha256sum` prints it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The backing image, which holds the data that this image does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
    /// The dirty bitmap on the domain's disk that records changes since this backup's point in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<String>,
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl Disk {
    /// The digest of the image file.
    pub fn digest(&self) -> Option<Digest> {
        let of = |algorithm, hex: &Option<String>| {
            let hex = hex.clone()?;
            Some(Digest { algorithm, hex })
        };
        of(Algorithm::Blake3, &self.blake3).or_else(|| of(Algorithm::Sha256, &self.sha256))
    }

    /// Replaces the digest; `None` removes it.
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

/// Name and description of a checkpoint, as its creator chose them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Checkpoint {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// The image of an earlier backup of the same domain in the same store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Parent {
    /// The backup's id.
    pub backup: String,
    /// Path relative to the manifest of that backup.
    pub file: String,
}

impl Parent {
    /// The path in the dependent image's header, relative to the directory of the dependent.
    pub fn relative_path(&self) -> String {
        format!("../{}/{}", self.backup, self.file)
    }
}

/// The fields that every version of the manifest has.
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

    /// Creates a manifest without disks.
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
            unknown: Unknown::new(),
        }
    }

    /// Parses a manifest file. [`Manifest::to_json`] writes the result so that it parses to an equal value.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::TooLong { bytes: bytes.len() });
        }
        // Parsed separately and first, because the other fields of a newer manifest may be unknown.
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
        let Values(values) = read(bytes)?;
        if values > MAX_MANIFEST_VALUES {
            return Err(ManifestError::TooManyValues { values });
        }
        let manifest: Self = read(bytes)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Encodes the manifest as JSON.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut json = serde_json::to_vec_pretty(self)?;
        json.push(b'\n');
        Ok(json)
    }

    /// The direct bases, which this backup cannot be read without.
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

/// The parser's message can quote the file, so it is bounded.
fn one_line(message: &str) -> String {
    let printable = message
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c });
    printable.take(512).collect()
}

#[cfg(test)]
mod tests;
