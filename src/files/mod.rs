//! Files and directories: their identities, and renames that file systems support differently.
//!
//! Must not know what a file is used for.

pub mod naming;

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, Statx, StatxFlags, makedev};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Identifies a regular file or a device, independent of its links.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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

    pub fn of_statx(stat: &Statx) -> Self {
        match FileType::from_raw_mode(stat.stx_mode.into()) {
            FileType::BlockDevice => Self::Device(makedev(stat.stx_rdev_major, stat.stx_rdev_minor)),
            _ => Self::File {
                device: makedev(stat.stx_dev_major, stat.stx_dev_minor),
                inode: stat.stx_ino,
            },
        }
    }

    pub fn at(path: &Path) -> Option<Self> {
        Self::and_owner_at(path).map(|(id, _)| id)
    }

    /// Uses cached attributes, so that a network server that hangs does not block callers that have no file there.
    pub fn and_owner_at(path: &Path) -> Option<(Self, u32)> {
        let known = AtFlags::STATX_DONT_SYNC;
        let found = rustix::fs::statx(CWD, path, known, StatxFlags::BASIC_STATS).ok()?;
        Some((Self::of_statx(&found), found.stx_uid))
    }
}

/// Opens a directory in another one. Does not follow a symbolic link.
pub fn open_below(parent: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// Returns the names of a directory's entries.
pub fn names_in(directory: &OwnedFd) -> Result<Vec<String>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}
