//! Block devices that the caller names by an absolute path.

use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::device::TargetId;
use super::{Error, Media, Publication, Target};
use crate::path::{Trust, open_directory};

/// Returns the device's own path if `path` is a symbolic link below `/dev`, as most names of devices are. Other links
/// are not followed: below `/dev`, a lookup never hangs, and only root can have created the link. Returns `None` if
/// the link leads nowhere.
pub fn device_path(path: &Path) -> Option<PathBuf> {
    if !path.starts_with("/dev") {
        return None;
    }
    open_directory(path.parent()?, Trust::Administrator).ok()?;
    std::fs::canonicalize(path).ok()
}

/// Finds a device that an earlier process of the service had open. QEMU may still hold it exclusively for that
/// backup.
pub fn find(disk: &str, path: &Path, id: TargetId) -> Result<Option<Target>, Error> {
    let label = path.display().to_string();
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(None);
    };
    let directory = open_directory(parent, Trust::Administrator)?;
    match rustix::fs::statat(&directory, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice => {}
        Ok(_) | Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(Error::io("look up", &label, errno)),
    }
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&directory, name, flags, Mode::empty())
        .map_err(|errno| Error::io("open", &label, errno))?;
    let target = Target::new(disk, label, file, Publication::InPlace)?;
    Ok(id.is(&target).then_some(target))
}

/// Opens a device exclusively: the kernel refuses a device that is mounted or otherwise in use. Follows no symbolic
/// link, because the caller was authorised for this path.
pub fn open(disk: &str, path: &Path) -> Result<Target, Error> {
    let label = path.display().to_string();
    let missing = |errno: Errno| match errno {
        Errno::NOENT => Error::Missing {
            disk: disk.to_owned(),
            target: label.clone(),
        },
        errno => Error::io("open", &label, errno),
    };
    let wrong_type = || Error::WrongType {
        disk: disk.to_owned(),
        target: label.clone(),
        wanted: "a block device",
    };
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(wrong_type());
    };
    let directory = open_directory(parent, Trust::Administrator)?;
    let stat =
        rustix::fs::statat(&directory, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).map_err(missing)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice {
        return Err(wrong_type());
    }
    let flags = OFlags::RDWR | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&directory, name, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::BUSY => Error::DeviceInUse {
            disk: disk.to_owned(),
            target: label.clone(),
        },
        errno => missing(errno),
    })?;
    let target = Target::new(disk, label.clone(), file, Publication::InPlace)?;
    match target.media {
        Media::Block => Ok(target),
        Media::Regular => Err(wrong_type()),
    }
}
