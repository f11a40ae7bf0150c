//! The identity of a block device. Its number is not an identity, because the kernel reuses it for another disk after
//! a detach.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Stat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::identity::{DEVICES, directory_of};
use super::{Error, Target};
use crate::files::FileId;
use crate::path::{Trust, open_directory};
use crate::plan::{Plan, TargetPlan};

/// Identifies one disk, or one partition at its offset, as long as the host runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceId {
    number: u64,
    /// The kernel gives a unique number to each disk, and to each file that is attached to a loop device (Linux
    /// 5.15).
    diskseq: u64,
    /// The start of a partition. Another partition table can give its number to another part of the disk.
    start: Option<u64>,
    /// The process that attached an NBD device. The diskseq stays the same when another server is attached.
    attached_by: Option<u64>,
}

impl DeviceId {
    /// Returns `None` if the kernel has no `diskseq`, or no such device.
    fn of(number: u64) -> Option<Self> {
        Self::find(Path::new(DEVICES), number)
    }

    fn find(devices: &Path, number: u64) -> Option<Self> {
        let directory = directory_of(devices, number)?;
        let read = |name: &str| number_in(&directory.join(name));
        let (disk, start) = match directory.join("partition").exists() {
            true => (directory.parent()?, Some(read("start")?)),
            false => (&*directory, None),
        };
        Some(Self {
            number,
            diskseq: number_in(&disk.join("diskseq"))?,
            start,
            attached_by: number_in(&disk.join("pid")),
        })
    }

    pub(super) fn of_stat(stat: &Stat) -> Option<Self> {
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        is_device.then(|| Self::of(stat.st_rdev)).flatten()
    }
}

fn number_in(file: &Path) -> Option<u64> {
    std::fs::read_to_string(file).ok()?.trim_end().parse().ok()
}

/// The identity of a target in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetId {
    File {
        device: u64,
        inode: u64,
    },
    /// A device number, if the kernel does not identify the device.
    Device(u64),
    Disk(DeviceId),
}

impl TargetId {
    pub(super) fn of(target: &Target) -> Self {
        match (target.id, target.device) {
            (FileId::File { device, inode }, _) => Self::File { device, inode },
            (FileId::Device(_), Some(disk)) => Self::Disk(disk),
            (FileId::Device(number), None) => Self::Device(number),
        }
    }

    pub(super) fn file(self) -> FileId {
        match self {
            Self::File { device, inode } => FileId::File { device, inode },
            Self::Device(number) => FileId::Device(number),
            Self::Disk(disk) => FileId::Device(disk.number),
        }
    }

    /// Whether `target` has this identity.
    pub(super) fn is(self, target: &Target) -> bool {
        let is_disk = match self {
            Self::Disk(disk) => target.device == Some(disk),
            Self::File { .. } | Self::Device(_) => true,
        };
        is_disk && target.id == self.file()
    }
}

/// The devices that a caller named, as they were at the time of the call.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devices(BTreeMap<PathBuf, DeviceId>);

impl Devices {
    /// Stores the identity of the device at a path below `/dev`, where a lookup never hangs.
    pub fn add(&mut self, path: &Path) {
        if let Ok(stat) = look(path)
            && let Some(device) = DeviceId::of_stat(&stat)
        {
            self.0.insert(path.to_owned(), device);
        }
    }

    /// Fails if the opened device is another one. An open device keeps its number.
    pub(super) fn check(&self, path: &Path, target: &Target) -> Result<(), Error> {
        match self.0.get(path) {
            Some(then) if target.device != Some(*then) => Err(Error::DeviceExchanged {
                disk: target.disk.clone(),
                target: target.label.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// Fails if another device could replace a device of `plan` unnoticed. Blocks.
    pub fn check_known(&self, plan: &Plan) -> Result<(), Error> {
        for disk in &plan.disks {
            let TargetPlan::Block(path) = &disk.target else {
                continue;
            };
            if self.0.contains_key(path) {
                continue;
            }
            let (disk, target) = (disk.name.clone(), path.display().to_string());
            return Err(match look(path) {
                Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice => {
                    Error::Unidentified { disk, target }
                }
                Ok(_) => Error::WrongType {
                    disk,
                    target,
                    wanted: "a block device",
                },
                Err(Error::Io {
                    errno: Errno::NOENT, ..
                }) => Error::Missing { disk, target },
                Err(error) => error,
            });
        }
        Ok(())
    }
}

fn look(path: &Path) -> Result<Stat, Error> {
    let failed = |errno| Error::io("look up", &path.display().to_string(), errno);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(failed(Errno::INVAL));
    };
    let directory = open_directory(parent, Trust::Administrator)?;
    rustix::fs::statat(&directory, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rustix::fs::makedev;

    use super::*;

    fn set(directory: &Path, name: &str, value: &str) {
        fs::write(directory.join(name), format!("{value}\n")).unwrap();
    }

    #[test]
    fn another_disk_or_partition_with_the_same_number_is_noticed() {
        let sys = tempfile::tempdir().unwrap();
        let disk = sys.path().join("devices/sda");
        let part = disk.join("sda1");
        fs::create_dir_all(&part).unwrap();
        for (number, directory) in [("8:0", &disk), ("8:1", &part)] {
            std::os::unix::fs::symlink(directory, sys.path().join(number)).unwrap();
        }
        let whole = || DeviceId::find(sys.path(), makedev(8, 0));
        let first = || DeviceId::find(sys.path(), makedev(8, 1));
        assert_eq!(whole(), None, "an old kernel has no diskseq");
        set(&disk, "diskseq", "7");
        set(&part, "partition", "1");
        set(&part, "start", "2048");
        let (disk_then, part_then) = (whole().unwrap(), first().unwrap());
        assert_eq!((whole(), first()), (Some(disk_then), Some(part_then)));
        set(&part, "start", "4096");
        assert_eq!(whole(), Some(disk_then));
        assert_ne!(first(), Some(part_then));
        set(&part, "start", "2048");
        set(&disk, "pid", "100");
        assert_ne!(whole(), Some(disk_then), "an NBD device of another server");
        fs::remove_file(disk.join("pid")).unwrap();
        set(&disk, "diskseq", "8");
        assert_ne!(whole(), Some(disk_then));
        assert_ne!(first(), Some(part_then));
    }
}
