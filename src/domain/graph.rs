//! QEMU's block graph as its monitor reports it: drives, nodes, and the edges between nodes.
//!
//! Knows QEMU's replies; not which of the nodes is a disk of the guest. Every walk is a bounded loop, because a peer
//! can report a chain of any depth, or a cycle.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use super::disks::Bitmap;
use crate::qmp::block::{BlockDeviceInfo, BlockDirtyInfo, XDbgBlockGraph};

/// No VM has longer names. A peer that reports longer ones is not QEMU.
pub(super) const MAX_NAME: usize = 255;
const MAX_PATH: usize = 4096;
const MAX_BITMAP_NAME: usize = 1023;

/// Filters that pass the guest's data through unchanged, so the node below has the same content.
const FILTERS: [&str; 3] = ["throttle", "copy-on-read", "copy-before-write"];
/// The most filters to walk through. Every node on the way has the same content.
const MAX_FILTERS: usize = 64;

impl BlockDeviceInfo {
    /// Whether the image can keep dirty bitmaps (qcow2 from version 3 on, QEMU's docs/interop/qcow2).
    pub fn keeps_bitmaps(&self) -> bool {
        let specific = self.image.format_specific.as_ref();
        let version = specific.and_then(|specific| specific.data.compat.as_deref());
        self.drv == "qcow2" && version.is_some_and(|version| version != "0.10")
    }

    pub fn bitmaps(&self) -> Vec<Bitmap> {
        let named = |info: &BlockDirtyInfo| {
            let name = info.name.clone()?;
            Some(Bitmap {
                name,
                is_usable: info.recording && info.persistent && !info.inconsistent && !info.busy,
                inconsistent: info.inconsistent,
                dirty: info.count,
            })
        };
        let good = |bitmap: &Bitmap| (1..=MAX_BITMAP_NAME).contains(&bitmap.name.len());
        let bitmaps = self.dirty_bitmaps.iter().filter_map(named);
        bitmaps.filter(good).collect()
    }

    /// Whether the image has internal snapshots.
    pub fn has_snapshots(&self) -> bool {
        !self.image.snapshots.is_empty()
    }

    /// The file of the image. `None` if the image is encrypted or has internal snapshots, because then the file's
    /// content is not what the guest sees.
    pub fn source_file(&self) -> Option<PathBuf> {
        let plain = ["qcow2", "raw"].contains(&self.drv.as_str()) && !self.image.encrypted;
        (plain && !self.has_snapshots()).then(|| self.file.as_str().into())
    }

    fn is_filter(&self) -> bool {
        FILTERS.contains(&self.drv.as_str())
    }
}

/// The nodes and their children, by name. Lookups are fast, because a peer can report many nodes.
pub(super) struct Graph<'a> {
    nodes: HashMap<&'a str, &'a BlockDeviceInfo>,
    file: HashMap<&'a str, &'a str>,
    backing: HashMap<&'a str, &'a str>,
    data_file: HashMap<&'a str, &'a str>,
    /// QEMU reported the edges, so a node without an edge has no child.
    has_edges: bool,
}

impl<'a> Graph<'a> {
    /// Returns `None` if the peer reports values that no QEMU has. `edges` is `None` if QEMU cannot report them.
    pub fn of(nodes: &'a [BlockDeviceInfo], edges: Option<&'a XDbgBlockGraph>) -> Option<Self> {
        // Each disk copies the strings of its node.
        let too_long = |node: &BlockDeviceInfo| {
            node.file.len() > MAX_PATH || node.node_name.len() > MAX_NAME || node.drv.len() > MAX_NAME
        };
        if nodes.iter().any(too_long) {
            return None;
        }
        let children = |name: &str| edges.map_or_else(HashMap::new, |edges| children(edges, name));
        Some(Self {
            nodes: nodes.iter().map(|node| (node.node_name.as_str(), node)).collect(),
            file: children("file"),
            backing: children("backing"),
            data_file: children("data-file"),
            has_edges: edges.is_some(),
        })
    }

    pub fn node(&self, name: &str) -> Option<&'a BlockDeviceInfo> {
        self.nodes.get(name).copied()
    }

    /// The node below the filters on `root`.
    pub fn unfiltered(&self, root: &'a str) -> &'a str {
        let mut name = root;
        for _ in 0..MAX_FILTERS {
            let filter = self.node(name).is_some_and(BlockDeviceInfo::is_filter);
            match self
                .file
                .get(name)
                .filter(|below| filter && self.nodes.contains_key(**below))
            {
                Some(below) => name = below,
                None => break,
            }
        }
        name
    }

    /// Whether the image has a backing image, which may have data.
    pub fn has_backing(&self, node: &BlockDeviceInfo) -> bool {
        match self.has_edges {
            true => self.backing.contains_key(node.node_name.as_str()),
            // The image's header names a backing image, which need not be open.
            false => node.backing_file.is_some(),
        }
    }

    /// Whether QEMU decrypts this image or an image that it reads for it. A backup then has the guest's data
    /// unencrypted.
    pub fn is_encrypted(&self, node: &'a BlockDeviceInfo) -> bool {
        let (mut seen, mut next) = (HashSet::new(), vec![node]);
        while let Some(node) = next.pop() {
            if !seen.insert(node.node_name.as_str()) {
                continue;
            }
            if node.image.encrypted {
                return true;
            }
            for children in [&self.file, &self.backing, &self.data_file] {
                let child = children.get(node.node_name.as_str());
                next.extend(child.and_then(|child| self.node(child)));
            }
        }
        false
    }

    /// The bytes that an image and its backing chain use on the host. If QEMU cannot report the chain, of the image
    /// alone.
    pub fn allocated(&self, node: &'a BlockDeviceInfo) -> u64 {
        let mut sum = 0u64;
        let mut next = Some(node);
        for _ in 0..self.nodes.len() {
            let Some(node) = next else { break };
            let children = match node.is_filter() {
                true => &self.file,
                false => {
                    sum = sum.saturating_add(node.image.actual_size);
                    &self.backing
                }
            };
            let below = children.get(node.node_name.as_str());
            next = below.and_then(|below| self.node(below));
        }
        sum
    }
}

/// Maps the name of each parent to its child along the edge of that name.
fn children<'a>(edges: &'a XDbgBlockGraph, edge: &str) -> HashMap<&'a str, &'a str> {
    let drivers = || edges.nodes.iter().filter(|node| node.kind == "block-driver");
    let names: HashMap<u64, &str> = drivers().map(|node| (node.id, node.name.as_str())).collect();
    let mut below = HashMap::new();
    for edge in edges.edges.iter().filter(|found| found.name == edge) {
        below.entry(edge.parent).or_insert(edge.child);
    }
    let mut children = HashMap::new();
    for node in drivers() {
        if let Some(child) = below.get(&node.id).and_then(|child| names.get(child)) {
            children.entry(node.name.as_str()).or_insert(*child);
        }
    }
    children
}

/// Paths of the host's files and devices below the nodes, as QEMU opened them.
pub(super) fn host_files(nodes: &[BlockDeviceInfo]) -> Vec<PathBuf> {
    let protocol =
        |node: &&BlockDeviceInfo| matches!(node.drv.as_str(), "file" | "host_device" | "host_cdrom");
    let mut files: Vec<PathBuf> = nodes
        .iter()
        .filter(protocol)
        .map(|node| node.file.as_str().into())
        .collect();
    files.sort();
    files.dedup();
    files
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::de::IgnoredAny;

    use crate::qmp::block::{ImageInfo, XDbgBlockGraphEdge, XDbgBlockGraphNode};

    fn node(name: &str, driver: &str, actual_size: u64) -> BlockDeviceInfo {
        BlockDeviceInfo {
            node_name: name.into(),
            drv: driver.into(),
            image: ImageInfo {
                actual_size,
                ..ImageInfo::default()
            },
            ..BlockDeviceInfo::default()
        }
    }

    fn edges(nodes: &[&str], edges: &[(u64, u64, &str)]) -> XDbgBlockGraph {
        let nodes = (0..).zip(nodes).map(|(id, name)| XDbgBlockGraphNode {
            id,
            name: (*name).to_owned(),
            kind: "block-driver".to_owned(),
        });
        let edges = edges.iter().map(|(parent, child, name)| XDbgBlockGraphEdge {
            parent: *parent,
            child: *child,
            name: (*name).to_owned(),
        });
        XDbgBlockGraph {
            nodes: nodes.collect(),
            edges: edges.collect(),
        }
    }

    #[test]
    fn a_cycle_of_filters_ends() {
        let nodes = [node("a", "throttle", 0), node("b", "throttle", 0)];
        let edges = edges(&["a", "b"], &[(0, 1, "file"), (1, 0, "file")]);
        let graph = Graph::of(&nodes, Some(&edges)).unwrap();
        assert_eq!(graph.unfiltered("a"), "a");
    }

    #[test]
    fn an_image_is_encrypted_if_an_image_below_it_is() {
        let mut nodes = [
            node("top", "qcow2", 1),
            node("base", "qcow2", 2),
            node("luks", "luks", 2),
            node("plain", "file", 2),
        ];
        nodes[2].image.encrypted = true;
        let edges = edges(
            &["top", "base", "luks", "plain"],
            &[
                (0, 1, "backing"),
                (1, 2, "file"),
                (2, 3, "file"),
                (3, 0, "backing"),
            ],
        );
        let graph = Graph::of(&nodes, Some(&edges)).unwrap();
        assert!(graph.is_encrypted(&nodes[0]));
        nodes[2].image.encrypted = false;
        let graph = Graph::of(&nodes, Some(&edges)).unwrap();
        assert!(!graph.is_encrypted(&nodes[0]), "a cycle ends");
    }

    #[test]
    fn a_cycle_of_backing_images_ends() {
        let nodes = [node("a", "qcow2", 1), node("b", "qcow2", 2)];
        let edges = edges(&["a", "b"], &[(0, 1, "backing"), (1, 0, "backing")]);
        let graph = Graph::of(&nodes, Some(&edges)).unwrap();
        assert!(graph.has_backing(&nodes[0]));
        assert_eq!(graph.allocated(&nodes[0]), 3);
    }

    #[test]
    fn the_size_of_an_image_includes_its_backing_chain_without_filters() {
        let nodes = [
            node("top", "qcow2", 1),
            node("limit", "throttle", 64),
            node("middle", "qcow2", 2),
            node("base", "qcow2", 4),
            node("other", "qcow2", 32),
        ];
        let edges = edges(
            &["top", "limit", "middle", "base", "other"],
            &[(0, 1, "backing"), (1, 2, "file"), (2, 3, "backing")],
        );
        let graph = Graph::of(&nodes, Some(&edges)).unwrap();
        assert_eq!(graph.allocated(&nodes[0]), 7);
        assert!(graph.has_backing(&nodes[0]) && !graph.has_backing(&nodes[3]));
    }

    #[test]
    fn without_edges_the_header_shows_the_backing_image() {
        let mut nodes = [node("top", "qcow2", 1), node("base", "qcow2", 2)];
        nodes[0].backing_file = Some(IgnoredAny);
        let graph = Graph::of(&nodes, None).unwrap();
        assert!(graph.has_backing(&nodes[0]) && !graph.has_backing(&nodes[1]));
        assert_eq!(graph.allocated(&nodes[0]), 1);
    }
}
