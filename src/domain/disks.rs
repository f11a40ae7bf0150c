//! A domain's disks, from QEMU's block layer: the names that callers use, the node to read, and what is known
//! of its data.
//!
//! The name of a disk is the id of its device, else its drive's id, else its node's name.

use std::path::PathBuf;

use super::graph::{Graph, MAX_DISKS};
use super::outside::Devices;
use crate::qmp::block::{BlockDeviceInfo, BlockInfo};

/// One drive of the guest. A drive without a medium has an empty `node`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub name: String,
    /// QEMU's path of the guest's device; empty if it is longer than any should be.
    pub device: String,
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
    /// The type of its device, where QEMU passes the guest's commands through and sees nothing of what they write.
    pub passed_through: Option<&'static str>,
    /// Whether QEMU decrypts its image, or one below it (LUKS): a backup has what the guest sees, in plain text.
    pub encrypted: bool,
    /// Whether data may lie in a backing file below the image.
    pub has_backing: bool,
    /// Whether its image can keep dirty bitmaps (qcow2 from version 3 on, QEMU's docs/interop/qcow2).
    pub keeps_bitmaps: bool,
    /// Whether its image holds internal snapshots: QEMU reverts to none of them while the image has dirty bitmaps
    /// (`bdrv_snapshot_goto`).
    pub has_snapshots: bool,
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
    /// Why a request that names no disks leaves it out; nothing where it is backed up.
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

    /// A disk as pure rules see it.
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

const MAX_NAME: usize = 255;
const MAX_DEVICE: usize = 1024;

/// The disks of all drives; none if the peer claims what no QEMU does.
pub(super) fn disks(drives: Vec<BlockInfo>, graph: &Graph, devices: &Devices) -> Option<Vec<Disk>> {
    if drives.len() > MAX_DISKS {
        return None;
    }
    let mut disks: Vec<Disk> = Vec::new();
    for drive in drives {
        let Some(mut disk) = disk(drive, graph, devices) else {
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

fn disk(drive: BlockInfo, graph: &Graph, devices: &Devices) -> Option<Disk> {
    let device = drive.qdev.as_deref().and_then(device_id).map(str::to_owned);
    // A drive that no device uses is no disk of the guest.
    let qdev = drive.qdev?;
    let passed_through = devices.passed_through(&qdev);
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
        passed_through,
        encrypted: node.is_some_and(|node| graph.is_encrypted(node)),
        has_backing: node.is_some_and(|node| graph.has_backing(node)),
        keeps_bitmaps: writable && node.is_some_and(BlockDeviceInfo::keeps_bitmaps),
        has_snapshots: node.is_some_and(BlockDeviceInfo::has_snapshots),
        bitmaps: node.map(BlockDeviceInfo::bitmaps).unwrap_or_default(),
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
    fn a_disk_is_never_called_nothing() {
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
        let disks = disks(drives, &Graph::of(&[], None).unwrap(), &Devices::of([])).unwrap();
        let names: Vec<_> = disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["n", "d"]);
    }
}
