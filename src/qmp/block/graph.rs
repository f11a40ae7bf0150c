//! The block graph: drives, nodes, and the edges between nodes.

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::qmp::Bounded;
use crate::qmp::command::command;
use crate::qmp::list::objects;

/// The most drives. No VM has more: a peer that reports more is not QEMU. The same applies to the other limits.
pub(super) const MAX_DRIVES: usize = 256;
/// The most nodes. Every backup checks the files of all nodes of all domains.
const MAX_NODES: usize = 16384;
/// The most dirty bitmaps of an image. A qcow2 image has room for 65535 (QEMU's docs/interop/qcow2).
pub const MAX_BITMAPS: usize = 65535;
/// The most nodes and edges of the graph, which also has back ends and jobs.
const MAX_GRAPH: usize = 65536;

#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryBlock {}

command!(QueryBlock, "query-block", Bounded<BlockInfo, MAX_DRIVES>);

/// A drive.
#[derive(Debug, Default, Deserialize)]
pub struct BlockInfo {
    pub device: String,
    #[serde(default)]
    pub qdev: Option<String>,
    #[serde(default)]
    pub inserted: Option<Inserted>,
}

/// A drive's medium.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Inserted {
    pub node_name: String,
    pub ro: bool,
}

/// With `flat`, the reply lists each image once. Otherwise it lists all backing images again for each node, so its
/// size is quadratic in the depth of a chain.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryNamedBlockNodes {
    pub flat: bool,
}

command!(
    QueryNamedBlockNodes,
    "query-named-block-nodes",
    Bounded<BlockDeviceInfo, MAX_NODES>
);

/// A node.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockDeviceInfo {
    #[serde(default)]
    pub node_name: String,
    /// The driver's name.
    pub drv: String,
    pub file: String,
    pub image: ImageInfo,
    /// The backing file that the image's header names. It need not be open.
    #[serde(rename = "backing_file", default)]
    pub backing_file: Option<IgnoredAny>,
    #[serde(default, deserialize_with = "objects::<_, _, MAX_BITMAPS>")]
    pub dirty_bitmaps: Vec<BlockDirtyInfo>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// In bytes.
    pub virtual_size: u64,
    #[serde(default)]
    pub actual_size: u64,
    #[serde(default)]
    pub encrypted: bool,
    #[serde(default)]
    pub format_specific: Option<ImageInfoSpecific>,
    /// Internal snapshots. Absent if there are none.
    #[serde(default)]
    pub snapshots: Vec<IgnoredAny>,
}

impl ImageInfo {
    /// Whether the image stores its data in another file, which its header names.
    pub fn has_data_file(&self) -> bool {
        let specific = self.format_specific.as_ref();
        specific.is_some_and(|specific| specific.data.data_file.is_some())
    }
}

#[derive(Debug, Default, Deserialize)]
pub struct ImageInfoSpecific {
    #[serde(default)]
    pub data: ImageInfoSpecificData,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfoSpecificData {
    /// The version of a qcow2 image: "0.10" is 2, "1.1" is 3.
    #[serde(default)]
    pub compat: Option<String>,
    #[serde(default)]
    pub data_file: Option<IgnoredAny>,
}

/// A dirty bitmap of a node. A bitmap without a name belongs to a block job.
#[derive(Debug, Default, Deserialize)]
pub struct BlockDirtyInfo {
    #[serde(default)]
    pub name: Option<String>,
    /// The dirty bytes.
    #[serde(default)]
    pub count: u64,
    pub recording: bool,
    #[serde(default)]
    pub persistent: bool,
    #[serde(default)]
    pub inconsistent: bool,
    #[serde(default)]
    pub busy: bool,
}

/// The only command in all supported versions that lists the children of a node. QEMU may remove it.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct XDebugQueryBlockGraph {}

command!(XDebugQueryBlockGraph, "x-debug-query-block-graph", XDbgBlockGraph);

#[derive(Debug, Default, Deserialize)]
pub struct XDbgBlockGraph {
    #[serde(deserialize_with = "objects::<_, _, MAX_GRAPH>")]
    pub nodes: Vec<XDbgBlockGraphNode>,
    #[serde(deserialize_with = "objects::<_, _, MAX_GRAPH>")]
    pub edges: Vec<XDbgBlockGraphEdge>,
}

#[derive(Debug, Deserialize)]
pub struct XDbgBlockGraphNode {
    pub id: u64,
    pub name: String,
    /// The graph also has back ends and jobs, which may have the name of a node.
    #[serde(rename = "type")]
    pub kind: String,
}

#[derive(Debug, Deserialize)]
pub struct XDbgBlockGraphEdge {
    pub parent: u64,
    pub child: u64,
    pub name: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_node_with_unknown_fields_is_read_and_a_missing_field_is_named() {
        let nodes = json!([{
            "node-name": "n", "drv": "qcow2", "file": "/a.qcow2", "ro": false, "backing_file": "b.qcow2",
            "image": {
                "virtual-size": 7, "actual-size": 5, "filename": "/a.qcow2", "snapshots": [{ "id": "1" }],
                "format-specific": {
                    "type": "qcow2", "data": { "compat": "1.1", "data-file": "d", "lazy-refcounts": false },
                },
            },
            "dirty-bitmaps": [{ "count": 65536, "recording": true, "granularity": 65536 }],
        }]);
        let nodes: Vec<BlockDeviceInfo> = serde_json::from_value(nodes).unwrap();
        let [node] = nodes.as_slice() else {
            panic!("one node")
        };
        assert_eq!(
            (&*node.node_name, &*node.drv, &*node.file),
            ("n", "qcow2", "/a.qcow2")
        );
        assert!(node.backing_file.is_some());
        assert_eq!((node.image.virtual_size, node.image.actual_size), (7, 5));
        assert!(node.image.has_data_file() && node.image.snapshots.len() == 1);
        let specific = node.image.format_specific.as_ref().unwrap();
        assert_eq!(specific.data.compat.as_deref(), Some("1.1"));
        let [bitmap] = node.dirty_bitmaps.as_slice() else {
            panic!("one bitmap")
        };
        assert!(bitmap.recording && bitmap.count == 65536 && bitmap.name.is_none());

        let node = json!({ "drv": "raw", "file": "", "image": { "actual-size": 5 } });
        let error = serde_json::from_value::<BlockDeviceInfo>(node).unwrap_err();
        assert!(error.to_string().contains("virtual-size"), "{error}");
    }
}
