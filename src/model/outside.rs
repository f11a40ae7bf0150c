//! Devices whose data no backup can hold.

use serde::{Deserialize, Serialize};

/// A device of which a backup has nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Outside {
    /// Its id, else its path in QEMU's object model.
    pub name: String,
    /// Its type in QEMU's object model, such as `vhost-user-blk-pci`.
    #[serde(rename = "type")]
    pub kind: String,
}
