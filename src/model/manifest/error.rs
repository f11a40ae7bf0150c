//! Errors of manifests.

use super::{MAX_MANIFEST_BYTES, MAX_MANIFEST_VALUES, MAX_SEQUENCE, VERSION};

/// The reasons why bytes are not a valid manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("it has {bytes} bytes; the maximum is {MAX_MANIFEST_BYTES} bytes")]
    TooLong { bytes: usize },
    #[error("a newer backupd wrote it: its version is {found}, and this backupd supports up to {VERSION}")]
    Newer { found: u64 },
    #[error("its version {found} does not exist")]
    NoSuchVersion { found: u64 },
    #[error("it requires '{feature}', which this backupd does not support: a newer backupd wrote it")]
    Requires { feature: String },
    #[error(
        "it has {values} JSON values; the maximum is {MAX_MANIFEST_VALUES}. A newer backupd may be able to read it"
    )]
    TooManyValues { values: usize },
    #[error("its sequence number {found} is above {MAX_SEQUENCE}")]
    Sequence { found: u64 },
    #[error("{message}")]
    Syntax { message: String },
    #[error("'{value}' is not valid as {what}")]
    Text { what: &'static str, value: String },
    #[error("it lists no disk")]
    NoDisks,
    #[error("disk '{disk}' has as backing file {on}")]
    Parent { disk: String, on: &'static str },
    #[error("two disks have the {what} '{value}'")]
    SameDisk { what: &'static str, value: String },
}

impl ManifestError {
    /// Returns true if no version of the service can read it. False if a newer version may be able to.
    pub fn is_damage(&self) -> bool {
        !matches!(
            self,
            Self::Newer { .. } | Self::Requires { .. } | Self::TooManyValues { .. }
        )
    }
}
