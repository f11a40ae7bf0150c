//! Devices whose data a backup cannot include.

use serde::{Deserialize, Serialize};

/// A device whose data is not in the backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Outside {
    /// The device's id, or else its path in QEMU's object model.
    pub name: String,
    /// The device's type in QEMU's object model, such as `vhost-user-blk-pci`.
    #[serde(rename = "type")]
    pub kind: String,
}
