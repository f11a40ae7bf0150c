//! Commands for dirty bitmaps. [`super::BlockDeviceInfo`] lists the bitmaps of a node.

use serde::Serialize;

use crate::qmp::Done;
use crate::qmp::command::command;

/// Adds a bitmap to a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BlockDirtyBitmapAdd {
    pub node: String,
    pub name: String,
    /// The bytes that one bit represents.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub granularity: Option<u64>,
    /// Whether the node's image stores it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persistent: Option<bool>,
    /// Whether it does not record writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disabled: Option<bool>,
}

command!(BlockDirtyBitmapAdd, "block-dirty-bitmap-add", Done);

/// A bitmap of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BlockDirtyBitmap {
    pub node: String,
    pub name: String,
}

/// Merges other bitmaps into the bitmap `target` of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BlockDirtyBitmapMerge {
    pub node: String,
    pub target: String,
    pub bitmaps: Vec<BlockDirtyBitmap>,
}
