//! Errors of manifests.

use super::{MAX_MANIFEST_BYTES, MAX_SEQUENCE, VERSION};

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
