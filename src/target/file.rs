//! Files that the caller names by an absolute path.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::identity::FileId;
use super::path::{Trust, open_directory};
use super::{Error, Publication, Target};

/// A file under a name that says it is partial, and the name that it gets.
#[derive(Debug)]
pub struct Partial {
    directory: OwnedFd,
    partial: String,
    name: OsString,
    renamed: bool,
}

/// Creates a new file, readable by the service only, under a partial name beside its own.
pub fn create(disk: &str, path: &Path, backup: &str, index: usize) -> Result<Target, Error> {
    let (directory, name) = parent(path)?;
    let label = path.display().to_string();
    match rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => {}
        Ok(_) => {
            return Err(Error::Exists {
                disk: disk.to_owned(),
                target: label,
            });
        }
        Err(errno) => return Err(Error::io("look up", &label, errno)),
    }
    let partial = format!(".backupd-{backup}-{index}.partial");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&directory, &partial, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|errno| Error::io("create a file for", &label, errno))?;
    let partial = Partial {
        directory,
        partial,
        name,
        renamed: false,
    };
    Target::new(disk, label, file, Publication::Rename(partial))
}

/// Opens a file that is there, to be written into.
pub fn open_existing(disk: &str, path: &Path) -> Result<Target, Error> {
    let (directory, name) = parent(path)?;
    let label = path.display().to_string();
    let wrong_type = |label: String| Error::WrongType {
        disk: disk.to_owned(),
        target: label,
        wanted: "a regular file",
    };
    // A FIFO or a device could block or act when it is opened: look first, and look again at what was opened.
    match rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {}
        Ok(_) => return Err(wrong_type(label)),
        Err(Errno::NOENT) => {
            return Err(Error::Missing {
                disk: disk.to_owned(),
                target: label,
            });
        }
        Err(errno) => return Err(Error::io("look up", &label, errno)),
    }
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&directory, &name, flags, Mode::empty())
        .map_err(|errno| Error::io("open", &label, errno))?;
    let target = Target::new(disk, label, file, Publication::InPlace)?;
    match target.media {
        super::Media::Regular => Ok(target),
        super::Media::Block => Err(wrong_type(target.label.clone())),
    }
}

fn parent(path: &Path) -> Result<(OwnedFd, OsString), Error> {
    let shown = || path.display().to_string();
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::NoDirectory { path: shown() });
    };
    Ok((open_directory(parent, Trust::Named)?, name.to_owned()))
}

impl Partial {
    /// Gives the file its own name, if nobody took it meanwhile, and makes that durable.
    pub fn publish(&mut self, disk: &str, label: &str) -> Result<(), Error> {
        rename_new(&self.directory, &self.partial, &self.name).map_err(|errno| match errno {
            Errno::EXIST => Error::Exists {
                disk: disk.to_owned(),
                target: label.to_owned(),
            },
            errno => Error::io("give its name to", label, errno),
        })?;
        self.renamed = true;
        rustix::fs::fsync(&self.directory).map_err(|errno| Error::io("fsync the directory of", label, errno))
    }

    /// Removes the file, under the name that it has; what somebody put in its place stays.
    pub fn discard(&self, id: FileId) -> io::Result<()> {
        let name = if self.renamed {
            self.name.as_os_str()
        } else {
            OsStr::new(&self.partial)
        };
        let there = rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileId::of(&there) == id {
            rustix::fs::unlinkat(&self.directory, name, AtFlags::empty())?;
        }
        Ok(rustix::fs::fsync(&self.directory)?)
    }
}

/// Renames within a directory; never over something.
fn rename_new(directory: &OwnedFd, old: &str, new: &OsString) -> Result<(), Errno> {
    match rustix::fs::renameat_with(directory, old, directory, new, RenameFlags::NOREPLACE) {
        // File systems without that flag (NFS) can still link without replacing.
        Err(Errno::INVAL) => {
            rustix::fs::linkat(directory, old, directory, new, AtFlags::empty())?;
            // Under both names it is published all the same.
            let _ = rustix::fs::unlinkat(directory, old, AtFlags::empty());
            Ok(())
        }
        result => result,
    }
}
