//! What was backed up, for those who restore: the manifest beside the images of each backup in a store.
//!
//! A store can be read with the manifests alone, on a machine that never ran the service. Pure: the store writes it.

mod manifest;

pub use manifest::{Disk, Domain, Kind, MAX_MANIFEST_BYTES, Manifest, ManifestError};

/// Names of the records that lie beside a backup's images.
pub const MANIFEST_NAME: &str = "manifest.json";
pub const DEFINITION_NAME: &str = "backup.xml";
