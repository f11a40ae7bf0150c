//! Dirty bitmaps. Those of a node are in [`super::BlockDeviceInfo`].

use serde::Serialize;

use crate::qmp::Done;
use crate::qmp::command::command;

/// Adds a bitmap to a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BlockDirtyBitmapAdd {
    pub node: String,
    pub name: String,
    /// How many bytes one bit stands for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub granularity: Option<u64>,
    /// Whether the node's image keeps it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persistent: Option<bool>,
    /// Whether it records nothing.
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

/// Sets in the bitmap `target` of a node what is set in others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BlockDirtyBitmapMerge {
    pub node: String,
    pub target: String,
    pub bitmaps: Vec<BlockDirtyBitmap>,
}
