//! The manifest, to and from its bytes.
//!
//! The reader may be another host than the writer, and the bytes untrusted. So nothing that [`Manifest::parse`]
//! returns can lead out of the backup's own directory. Pure: opens no file.

mod check;
mod error;

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Algorithm, Digest, Format, Kind, Outside};
use crate::error::shown;
pub use error::ManifestError;

/// Names of the records that lie beside a backup's images.
pub const MANIFEST_NAME: &str = "manifest.json";
pub const DEFINITION_NAME: &str = "backup.xml";
/// A file beside them: as long as it is there, nobody removes the backup.
pub const PROTECTED_NAME: &str = "protected";
/// The longest manifest that is looked at. One of the most disks that a domain can have takes a fifth of it.
pub const MAX_MANIFEST_BYTES: usize = 1 << 20;
/// Goes up when all of it is another. An older reader is kept from misunderstanding one thing by `requires`.
const VERSION: u64 = 1;
/// Features that this reader knows.
const FEATURES: &[&str] = &[];
/// The highest number in the order of making.
pub const MAX_SEQUENCE: u64 = 1 << 53;

/// A backup's record in its store.
///
/// Unknown fields of the manifest, its domain and its disks are optional ones of a newer service. They are kept when the
/// manifest is written again, so their values must not depend on the bytes of the images, which merging replaces. A field
/// without which a reader would misread the backup is named in `requires`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Manifest {
    version: u64,
    /// Features that a reader must know.
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
    /// The dirty bitmap on the domain's disk that has recorded since this backup's point in time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<String>,
    #[serde(flatten)]
    pub unknown: Unknown,
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
            unknown: Unknown::new(),
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

#[cfg(test)]
mod tests;
