//! A domain's disks, from QEMU's block layer: the names that callers use, the node to read, and what is known
//! of its data.
//!
//! The name of a disk is the id of its device, else its drive's id, else its node's name.

use std::collections::HashMap;
use std::path::PathBuf;

use serde::Deserialize;

/// One drive of the guest. A drive without a medium has an empty `node`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub name: String,
    /// The node to read: the drive's root node without filters such as `throttle`, so that the guest's own limits
    /// do not slow a backup down. Empty without a medium.
    pub node: String,
    /// What the guest sees, in bytes.
    pub virtual_size: u64,
    /// What the image and its backing chain take on the host, in bytes; at most `virtual_size`. An estimate.
    pub allocated: u64,
    /// The file of its image, as its QEMU has it open, where what is in the file is what the guest sees: it isn't encrypted,
    /// and holds no internal snapshots.
    pub source: Option<PathBuf>,
    /// QEMU's name of the image format.
    pub format: String,
    pub writable: bool,
    /// Whether data may lie in a backing file below the image.
    pub has_backing: bool,
    /// Whether its image can keep dirty bitmaps (qcow2 from version 3 on, QEMU's docs/interop/qcow2).
    pub keeps_bitmaps: bool,
    /// The dirty bitmaps with a name that are on its image.
    pub bitmaps: Vec<Bitmap>,
    /// The other names by which it is found where they are unambiguous.
    aliases: Vec<String>,
}

/// A record of what was written to, from some instant on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    pub name: String,
    /// It records; is kept with the image; and nothing was written that it does not have.
    pub good: bool,
    /// Something was written that it does not have, as when QEMU died: it is of no use to anybody.
    pub inconsistent: bool,
    /// What was written to, in bytes.
    pub dirty: u64,
}

impl Disk {
    pub fn has_medium(&self) -> bool {
        !self.node.is_empty()
    }

    /// A disk as pure rules see it.
    #[cfg(test)]
    pub fn for_test(name: &str, alias: &str, writable: bool, medium: bool) -> Self {
        Self {
            name: name.into(),
            node: if medium {
                format!("node-{name}")
            } else {
                String::new()
            },
            virtual_size: 1 << 20,
            allocated: 1 << 16,
            source: None,
            format: "qcow2".into(),
            writable,
            has_backing: false,
            keeps_bitmaps: true,
            bitmaps: Vec::new(),
            aliases: vec![alias.into()],
        }
    }
}

/// Whom a name means.
#[derive(Debug, PartialEq, Eq)]
pub enum DiskLookup<'a> {
    Found(&'a Disk),
    Missing,
    /// Several disks answer to it.
    Ambiguous,
}

/// Finds a disk by its name, or by its device's id, drive's id or node's name where that is unambiguous.
pub fn find_disk<'a>(disks: &'a [Disk], name: &str) -> DiskLookup<'a> {
    if let Some(disk) = disks.iter().find(|disk| disk.name == name) {
        return DiskLookup::Found(disk);
    }
    let mut matches = disks
        .iter()
        .filter(|disk| disk.aliases.iter().any(|alias| alias == name));
    match (matches.next(), matches.next()) {
        (Some(disk), None) => DiskLookup::Found(disk),
        (Some(_), Some(_)) => DiskLookup::Ambiguous,
        (None, _) => DiskLookup::Missing,
    }
}

/// An entry of `query-block`.
#[derive(Debug, Deserialize)]
pub(super) struct BlockInfo {
    device: String,
    #[serde(default)]
    qdev: Option<String>,
    #[serde(default)]
    inserted: Option<Inserted>,
}

#[derive(Debug, Deserialize)]
struct Inserted {
    #[serde(rename = "node-name")]
    node_name: String,
    ro: bool,
}

/// An entry of `query-named-block-nodes`.
#[derive(Debug, Deserialize)]
pub(super) struct Node {
    #[serde(rename = "node-name", default)]
    name: String,
    drv: String,
    file: String,
    image: Image,
    #[serde(rename = "dirty-bitmaps", default)]
    bitmaps: Vec<BitmapInfo>,
}

/// Those without a name are somebody's block job's.
#[derive(Debug, Deserialize)]
struct BitmapInfo {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    count: u64,
    recording: bool,
    #[serde(default)]
    persistent: bool,
    #[serde(default)]
    inconsistent: bool,
    #[serde(default)]
    busy: bool,
}

#[derive(Debug, Deserialize)]
struct Image {
    #[serde(rename = "virtual-size")]
    virtual_size: u64,
    #[serde(rename = "actual-size", default)]
    actual_size: u64,
    #[serde(default)]
    encrypted: bool,
    #[serde(default)]
    snapshots: Vec<serde::de::IgnoredAny>,
    #[serde(rename = "backing-image", default)]
    backing: Option<Box<Image>>,
    #[serde(rename = "format-specific", default)]
    specific: Option<Specific>,
}

#[derive(Debug, Deserialize)]
struct Specific {
    #[serde(default)]
    data: SpecificData,
}

#[derive(Debug, Default, Deserialize)]
struct SpecificData {
    /// The version of a qcow2 image: "0.10" is 2, "1.1" is 3.
    #[serde(default)]
    compat: Option<String>,
}

/// The reply of `x-debug-query-block-graph`: the only command in all supported versions that tells the children
/// of a node. Unstable by name, so its absence is survived.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Graph {
    nodes: Vec<GraphNode>,
    edges: Vec<GraphEdge>,
}

#[derive(Debug, Deserialize)]
struct GraphNode {
    id: u64,
    name: String,
    /// Back ends and jobs are in the graph too, and may be called like a node.
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Debug, Deserialize)]
struct GraphEdge {
    parent: u64,
    child: u64,
    name: String,
}

/// The graph, to be asked often: a peer's can be large.
#[derive(Default)]
struct Children<'a> {
    /// By the name of the parent.
    file: HashMap<&'a str, &'a str>,
}

impl<'a> Children<'a> {
    fn of(graph: &'a Graph) -> Self {
        let names: HashMap<u64, &str> = graph
            .nodes
            .iter()
            .map(|node| (node.id, node.name.as_str()))
            .collect();
        let mut below = HashMap::new();
        for edge in graph.edges.iter().filter(|edge| edge.name == "file") {
            below.entry(edge.parent).or_insert(edge.child);
        }
        let mut file = HashMap::new();
        for node in graph.nodes.iter().filter(|node| node.kind == "block-driver") {
            if let Some(child) = below.get(&node.id).and_then(|child| names.get(child)) {
                file.entry(node.name.as_str()).or_insert(*child);
            }
        }
        Self { file }
    }
}

/// Filters that pass the guest's data through unchanged, so that the node below has the same content.
const FILTERS: [&str; 3] = ["throttle", "copy-on-read", "copy-before-write"];
/// So many of them are looked through. Whatever node is reached has the same content.
const MAX_FILTERS: usize = 64;

/// More disks, and longer names, than any machine has: a peer that says so is not QEMU.
const MAX_DISKS: usize = 256;
const MAX_NAME: usize = 255;
/// The same of nodes: every backup of everybody looks at the files of all of them.
const MAX_NODES: usize = 16384;
const MAX_PATH: usize = 4096;
/// The same of dirty bitmaps on an image; a qcow2 image has room for 65535 (QEMU's docs/interop/qcow2).
const MAX_BITMAPS: usize = 65535;
const MAX_BITMAP_NAME: usize = 1023;

/// The disks of all drives; none if the peer claims what no QEMU does.
pub(super) fn disks(drives: Vec<BlockInfo>, nodes: &[Node], graph: &Graph) -> Option<Vec<Disk>> {
    let too_long = |node: &Node| node.file.len() > MAX_PATH;
    if drives.len() > MAX_DISKS || nodes.len() > MAX_NODES || nodes.iter().any(too_long) {
        return None;
    }
    let children = Children::of(graph);
    let nodes: HashMap<&str, &Node> = nodes.iter().map(|node| (node.name.as_str(), node)).collect();
    let mut disks: Vec<Disk> = Vec::new();
    for drive in drives {
        let Some(mut disk) = disk(drive, &nodes, &children) else {
            continue;
        };
        // The id of one disk's device can be that of another's drive.
        while disks.iter().any(|other| other.name == disk.name) && !disk.aliases.is_empty() {
            disk.name = disk.aliases.remove(0);
        }
        disks.push(disk);
    }
    let good = |name: &String| name.len() <= MAX_NAME && !name.contains(char::is_control);
    let named = |disk: &Disk| {
        let own = [&disk.name, &disk.node, &disk.format];
        own.into_iter().chain(&disk.aliases).all(good)
    };
    disks.iter().all(named).then_some(disks)
}

fn disk(drive: BlockInfo, nodes: &HashMap<&str, &Node>, children: &Children) -> Option<Disk> {
    let device = drive.qdev.as_deref().and_then(device_id).map(str::to_owned);
    // A drive that no device uses is no disk of the guest.
    drive.qdev.as_ref()?;
    let drive_id = Some(drive.device).filter(|id| !id.is_empty());
    let root = drive
        .inserted
        .as_ref()
        .map(|inserted| inserted.node_name.as_str());
    let source = root.map(|root| unfiltered(root, nodes, children));
    let node = source.and_then(|name| nodes.get(name));
    let mut names: Vec<String> = [
        device,
        drive_id,
        source.map(str::to_owned),
        root.map(str::to_owned),
    ]
    .into_iter()
    .flatten()
    .filter(|name| !name.is_empty())
    .collect();
    names.dedup();
    if names.is_empty() {
        return None;
    }
    let name = names.remove(0);
    let virtual_size = node.map_or(0, |node| node.image.virtual_size);
    let writable = drive.inserted.as_ref().is_some_and(|inserted| !inserted.ro);
    Some(Disk {
        name,
        node: source.unwrap_or_default().to_owned(),
        virtual_size,
        allocated: node.map_or(0, |node| allocated(&node.image)).min(virtual_size),
        source: node.and_then(|node| source_file(node)),
        format: node.map(|node| node.drv.clone()).unwrap_or_default(),
        writable,
        has_backing: node.is_some_and(|node| node.image.backing.is_some()),
        keeps_bitmaps: writable && node.is_some_and(|node| keeps_bitmaps(node)),
        bitmaps: node.map(|node| bitmaps(node)).unwrap_or_default(),
        aliases: names,
    })
}

/// `qdev` is an id, or a QOM path that has one in it only under `/machine/peripheral/`.
fn device_id(qdev: &str) -> Option<&str> {
    match qdev.strip_prefix('/') {
        None => Some(qdev),
        Some(path) => path.strip_prefix("machine/peripheral/")?.split('/').next(),
    }
}

fn unfiltered<'a>(root: &'a str, nodes: &HashMap<&'a str, &'a Node>, children: &Children<'a>) -> &'a str {
    let mut name = root;
    // A peer's graph could have a circle.
    for _ in 0..MAX_FILTERS {
        let filter = nodes
            .get(name)
            .is_some_and(|node| FILTERS.contains(&node.drv.as_str()));
        match children
            .file
            .get(name)
            .filter(|below| filter && nodes.contains_key(**below))
        {
            Some(below) => name = below,
            None => break,
        }
    }
    name
}

fn keeps_bitmaps(node: &Node) -> bool {
    let specific = node.image.specific.as_ref();
    let version = specific.and_then(|specific| specific.data.compat.as_deref());
    node.drv == "qcow2" && version.is_some_and(|version| version != "0.10")
}

fn bitmaps(node: &Node) -> Vec<Bitmap> {
    let named = |info: &BitmapInfo| {
        let name = info.name.clone()?;
        Some(Bitmap {
            name,
            good: info.recording && info.persistent && !info.inconsistent && !info.busy,
            inconsistent: info.inconsistent,
            dirty: info.count,
        })
    };
    let good = |bitmap: &Bitmap| (1..=MAX_BITMAP_NAME).contains(&bitmap.name.len());
    let bitmaps = node.bitmaps.iter().take(MAX_BITMAPS).filter_map(named);
    bitmaps.filter(good).collect()
}

fn source_file(node: &Node) -> Option<PathBuf> {
    let plain = ["qcow2", "raw"].contains(&node.drv.as_str()) && !node.image.encrypted;
    (plain && node.image.snapshots.is_empty()).then(|| node.file.as_str().into())
}

fn allocated(image: &Image) -> u64 {
    let chain = std::iter::successors(Some(image), |image| image.backing.as_deref());
    chain.fold(0, |sum, image| sum.saturating_add(image.actual_size))
}

/// Paths of the host's files and devices below the nodes, as QEMU was given them.
pub(super) fn host_files(nodes: &[Node]) -> Vec<PathBuf> {
    let protocol = |node: &&Node| matches!(node.drv.as_str(), "file" | "host_device" | "host_cdrom");
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

    #[test]
    fn a_name_wins_over_an_alias_and_a_shared_alias_is_ambiguous() {
        let disk = |name, alias| Disk::for_test(name, alias, true, true);
        let disks = [disk("vda", "drive0"), disk("drive0", "n"), disk("vdc", "n")];
        assert_eq!(find_disk(&disks, "drive0"), DiskLookup::Found(&disks[1]));
        assert_eq!(find_disk(&disks, "n"), DiskLookup::Ambiguous);
        assert_eq!(find_disk(&disks, "vdx"), DiskLookup::Missing);
    }

    #[test]
    fn only_a_peripheral_path_holds_a_device_id() {
        assert_eq!(device_id("vda"), Some("vda"));
        assert_eq!(device_id("/machine/peripheral/vda/virtio-backend"), Some("vda"));
        assert_eq!(
            device_id("/machine/peripheral-anon/device[0]/virtio-backend"),
            None
        );
        assert_eq!(device_id("/machine/unattached/device[16]"), None);
    }

    #[test]
    fn a_disk_is_never_called_nothing() {
        let drives = |drives| serde_json::from_value(drives).unwrap();
        let named = drives(serde_json::json!([
            { "device": "", "qdev": "" },
            { "device": "", "qdev": "/machine/peripheral/", "inserted": { "node-name": "n", "ro": false } },
            { "device": "d", "qdev": "" },
        ]));
        let disks = disks(named, &[], &Graph::default()).unwrap();
        let names: Vec<_> = disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["n", "d"]);
    }

    #[test]
    fn a_circle_of_filters_ends() {
        let node = |name: &str| Node {
            name: name.into(),
            drv: "throttle".into(),
            file: String::new(),
            image: Image {
                virtual_size: 0,
                actual_size: 0,
                encrypted: false,
                snapshots: Vec::new(),
                backing: None,
                specific: None,
            },
            bitmaps: Vec::new(),
        };
        let nodes = [node("a"), node("b")];
        let graph: Graph = serde_json::from_value(serde_json::json!({
            "nodes": [
                { "id": 1, "name": "a", "type": "block-driver" },
                { "id": 2, "name": "b", "type": "block-driver" },
            ],
            "edges": [{ "parent": 1, "child": 2, "name": "file" }, { "parent": 2, "child": 1, "name": "file" }],
        }))
        .unwrap();
        let by_name = nodes.iter().map(|node| (node.name.as_str(), node)).collect();
        assert_eq!(unfiltered("a", &by_name, &Children::of(&graph)), "a");
    }
}
