//! A domain's disks, from QEMU's block layer: the names that callers use, the node to read, and the properties of its
//! data.
//!
//! The name of a disk is the id of its device, else its drive's id, else its node's name.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::graph::{Graph, MAX_NAME};
use crate::definition::Position;
use crate::error::Kind;
use crate::qmp::block::{BlockDeviceInfo, BlockInfo, MAX_BITMAPS};

/// One drive of the guest. Without a medium, `node` is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub name: String,
    /// QEMU's path of the guest's device. Empty if it is longer than [`MAX_DEVICE`] bytes.
    pub device: String,
    /// The node to read: the drive's root node without filters such as `throttle`, so that the guest's own limits
    /// do not slow a backup down. Empty without a medium.
    pub node: String,
    /// The size that the guest sees, in bytes.
    pub virtual_size: u64,
    /// The bytes that the image and its backing chain use on the host, at most `virtual_size`. An estimate.
    pub allocated: u64,
    /// The file of the image, as QEMU has it open. `None` if the image is encrypted or has internal snapshots,
    /// because then the file's content is not what the guest sees.
    pub source: Option<PathBuf>,
    /// QEMU's name of the image format.
    pub format: String,
    pub writable: bool,
    /// The type of the device if QEMU passes the guest's SCSI commands through, so that QEMU does not see the guest's
    /// writes. [`disks`] does not know it.
    pub passed_through: Option<&'static str>,
    /// Whether QEMU decrypts the image or a backing image (LUKS). A backup has the guest's data in plain text.
    pub encrypted: bool,
    /// Whether the image has a backing file, which may have data.
    pub has_backing: bool,
    /// Whether the image can keep dirty bitmaps (qcow2 from version 3 on, QEMU's docs/interop/qcow2).
    pub keeps_bitmaps: bool,
    /// Whether the image has internal snapshots. QEMU cannot revert to them while the image has dirty bitmaps
    /// (`bdrv_snapshot_goto`).
    pub has_snapshots: bool,
    /// The named dirty bitmaps of the image.
    pub bitmaps: Vec<Bitmap>,
    /// Other names that find the disk while they are unambiguous.
    aliases: Vec<String>,
}

/// A dirty bitmap: it records writes from a point in time on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    pub name: String,
    /// The bitmap is recording, is persistent, has recorded every write, and no block job uses it.
    pub is_usable: bool,
    /// The bitmap has missed writes, for example because QEMU was killed. Nobody can use it.
    pub inconsistent: bool,
    /// The number of dirty bytes.
    pub dirty: u64,
}

impl Disk {
    /// Returns why a request that names no disks skips this disk, or `None` if it includes the disk.
    pub fn left_out(&self) -> Option<&'static str> {
        match self.passed_through {
            Some(kind) => Some(kind),
            None if !self.has_medium() => Some("no-medium"),
            None if !self.writable => Some("read-only"),
            None => None,
        }
    }

    pub fn has_medium(&self) -> bool {
        !self.node.is_empty()
    }

    pub fn bitmap(&self, name: &str) -> Option<&Bitmap> {
        self.bitmaps.iter().find(|bitmap| bitmap.name == name)
    }

    /// A disk for tests of the rules that need no QEMU.
    #[cfg(test)]
    pub fn for_test(name: &str, alias: &str, writable: bool, medium: bool) -> Self {
        Self {
            name: name.into(),
            device: format!("/machine/peripheral/{name}"),
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
            passed_through: None,
            encrypted: false,
            has_backing: false,
            keeps_bitmaps: true,
            has_snapshots: false,
            bitmaps: Vec::new(),
            aliases: vec![alias.into()],
        }
    }
}

/// The result of a search for a disk.
#[derive(Debug, PartialEq, Eq)]
pub enum DiskLookup<'a> {
    Found(&'a Disk),
    Missing,
    /// Several disks have this name.
    Ambiguous,
}

/// Finds a disk by its name, or by the id of its device or drive, or by its node's name, if that is unambiguous.
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

/// Finds the disks with these names of a document, in their order. Fails at the first name that has no disk, several,
/// or the same disk as an earlier name.
pub fn find_disks<'a, 'n>(
    disks: &'a [Disk],
    names: impl Iterator<Item = (&'n str, Position)>,
) -> Result<Vec<&'a Disk>, DiskNameError> {
    let mut first: BTreeMap<&str, &str> = BTreeMap::new();
    let found = names.map(|(name, at)| {
        let owned = || name.to_owned();
        let disk = match find_disk(disks, name) {
            DiskLookup::Found(disk) => disk,
            DiskLookup::Missing => return Err(DiskNameError::Missing { name: owned(), at }),
            DiskLookup::Ambiguous => return Err(DiskNameError::Ambiguous { name: owned(), at }),
        };
        match first.insert(&disk.name, name) {
            Some(first) => Err(DiskNameError::Twice {
                first: first.to_owned(),
                name: owned(),
                at,
            }),
            None => Ok(disk),
        }
    });
    found.collect()
}

/// A name in a document that does not find one disk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DiskNameError {
    #[error("{}the domain has no disk '{name}'", at.prefix())]
    Missing { name: String, at: Position },
    #[error("{}'{name}' denotes several disks. Use the id of the disk's device", at.prefix())]
    Ambiguous { name: String, at: Position },
    #[error("{}'{name}' is the same disk as '{first}'. List each disk once", at.prefix())]
    Twice {
        first: String,
        name: String,
        at: Position,
    },
}

impl DiskNameError {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Missing { .. } => Kind::NoSuchDisk,
            Self::Ambiguous { .. } | Self::Twice { .. } => Kind::InvalidDefinition,
        }
    }
}

const MAX_DEVICE: usize = 1024;

/// Returns the disks of all drives, or `None` if the peer reports values that no QEMU has.
pub(super) fn disks(drives: impl IntoIterator<Item = BlockInfo>, graph: &Graph) -> Option<Vec<Disk>> {
    let mut disks: Vec<Disk> = Vec::new();
    let mut bitmaps = 0;
    for drive in drives {
        let Some(mut disk) = disk(drive, graph) else {
            continue;
        };
        // Many drives can have the same node, and each disk copies its bitmaps.
        bitmaps += disk.bitmaps.len();
        if bitmaps > MAX_BITMAPS {
            return None;
        }
        // The device id of one disk can be the drive id of another disk.
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

fn disk(drive: BlockInfo, graph: &Graph) -> Option<Disk> {
    let device = drive.qdev.as_deref().and_then(device_id).map(str::to_owned);
    // If no device uses a drive, it is not a disk of the guest.
    let qdev = drive.qdev?;
    let drive_id = Some(drive.device).filter(|id| !id.is_empty());
    let root = drive
        .inserted
        .as_ref()
        .map(|inserted| inserted.node_name.as_str());
    let source = root.map(|root| graph.unfiltered(root));
    let node = source.and_then(|name| graph.node(name));
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
        device: Some(qdev)
            .filter(|path| path.len() <= MAX_DEVICE)
            .unwrap_or_default(),
        node: source.unwrap_or_default().to_owned(),
        virtual_size,
        allocated: node.map_or(0, |node| graph.allocated(node)).min(virtual_size),
        source: node.and_then(BlockDeviceInfo::source_file),
        format: node.map(|node| node.drv.clone()).unwrap_or_default(),
        writable,
        passed_through: None,
        encrypted: node.is_some_and(|node| graph.is_encrypted(node)),
        has_backing: node.is_some_and(|node| graph.has_backing(node)),
        keeps_bitmaps: writable && node.is_some_and(BlockDeviceInfo::keeps_bitmaps),
        has_snapshots: node.is_some_and(BlockDeviceInfo::has_snapshots),
        bitmaps: node.map(BlockDeviceInfo::bitmaps).unwrap_or_default(),
        aliases: names,
    })
}

/// `qdev` is an id or a QOM path. Only a path under `/machine/peripheral/` has an id in it.
fn device_id(qdev: &str) -> Option<&str> {
    match qdev.strip_prefix('/') {
        None => Some(qdev),
        Some(path) => path.strip_prefix("machine/peripheral/")?.split('/').next(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::block::Inserted;

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
    fn a_disk_never_has_an_empty_name() {
        let drive = |device: &str, qdev: &str, node: Option<&str>| BlockInfo {
            device: device.to_owned(),
            qdev: Some(qdev.to_owned()),
            inserted: node.map(|node_name| Inserted {
                node_name: node_name.to_owned(),
                ro: false,
            }),
        };
        let drives = vec![
            drive("", "", None),
            drive("", "/machine/peripheral/", Some("n")),
            drive("d", "", None),
        ];
        let disks = disks(drives, &Graph::of(&[], None).unwrap()).unwrap();
        let names: Vec<_> = disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["n", "d"]);
    }
}
