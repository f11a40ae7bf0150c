//! Which file a file is, whatever it is called; and which files the running domains have open.

use std::collections::HashSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Stat};

/// A regular file or a device, independent of links to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileId {
    File { device: u64, inode: u64 },
    Device(u64),
}

impl FileId {
    pub fn of(stat: &Stat) -> Self {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::BlockDevice => Self::Device(stat.st_rdev),
            _ => Self::File {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
        }
    }

    fn at(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(if metadata.file_type().is_block_device() {
            Self::Device(metadata.rdev())
        } else {
            Self::File {
                device: metadata.dev(),
                inode: metadata.ino(),
            }
        })
    }
}

/// A domain's QEMU and the files that it says it has open.
#[derive(Debug, Clone)]
pub struct Holder {
    pub process: Option<u32>,
    pub files: Vec<PathBuf>,
}

/// Files and devices that no backup may write into.
#[derive(Debug, Default)]
pub struct Sources(HashSet<FileId>);

impl Sources {
    /// Looks at what `holders` have open now.
    ///
    /// A path that means nothing here (a relative one, a passed descriptor, one of another mount namespace) is
    /// looked up among the process's open files instead.
    pub fn of<'a>(holders: impl IntoIterator<Item = &'a Holder>) -> Self {
        let mut ids = HashSet::new();
        for holder in holders {
            let mut unknown = false;
            for file in &holder.files {
                match FileId::at(file).filter(|_| file.is_absolute() && !file.starts_with("/dev/fdset")) {
                    Some(id) => drop(ids.insert(id)),
                    None => unknown = true,
                }
            }
            if let Some(process) = holder.process.filter(|_| unknown) {
                ids.extend(open_files(process));
            }
        }
        Self(ids)
    }

    pub(super) fn contains(&self, id: FileId) -> bool {
        self.0.contains(&id)
    }
}

fn open_files(process: u32) -> Vec<FileId> {
    let entries = std::fs::read_dir(format!("/proc/{process}/fd"))
        .into_iter()
        .flatten();
    entries
        .filter_map(|entry| FileId::at(&entry.ok()?.path()))
        .collect()
}
