//! What was backed up, for those who restore: the manifest beside the images of each backup in a store.
//!
//! A store can be read with the manifests alone, on a machine that never ran the service. Pure: the store writes it.

use serde::Serialize;

/// Names of the records that lie beside a backup's images.
pub const MANIFEST_NAME: &str = "manifest.json";
pub const DEFINITION_NAME: &str = "backup.xml";
/// Goes up when an older reader would misunderstand a newer manifest.
const VERSION: u32 = 1;

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Manifest<'a> {
    version: u32,
    pub id: &'a str,
    pub domain: Domain<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<&'a str>,
    pub kind: &'static str,
    /// When the call came, and the instant that the images show; RFC 3339, UTC.
    pub started: String,
    pub instant: String,
    /// Whether the guest's file systems were frozen at that instant.
    pub quiesced: bool,
    pub disks: Vec<Disk<'a>>,
}

#[derive(Debug, Serialize)]
pub struct Domain<'a> {
    pub name: &'a str,
    pub uuid: Option<uuid::Uuid>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Disk<'a> {
    pub name: &'a str,
    /// Relative to the manifest.
    pub file: &'a str,
    pub format: &'static str,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
}

impl<'a> Manifest<'a> {
    pub fn full(id: &'a str, domain: Domain<'a>, started: String, instant: String) -> Self {
        Self {
            version: VERSION,
            id,
            domain,
            name: None,
            description: None,
            kind: "full",
            started,
            instant,
            quiesced: false,
            disks: Vec::new(),
        }
    }

    /// The file's content.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut json = serde_json::to_vec_pretty(self)?;
        json.push(b'\n');
        Ok(json)
    }
}
