//! Files that the caller names by an absolute path.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::identity::FileId;
use super::{Error, Publication, Target, naming};
use crate::fault::{self, Point};
use crate::path::{Trust, open_directory};

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
    let partial = partial_name(backup, index);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&directory, &partial, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|errno| Error::io("create a file for", &label, errno))?;
    let rename =
        |directory: &OwnedFd, old: &str, new: &str| naming::rename_new(directory, old.as_ref(), new.as_ref());
    if let Err(errno) = naming::try_naming(&directory, &partial, rename) {
        for name in [naming::trial_name(&partial), partial] {
            // Empty and ours: if it can't even be removed, the returned error is the cause.
            let _ = rustix::fs::unlinkat(&directory, &name, AtFlags::empty());
        }
        return Err(match naming::is_without_links(errno) {
            true => Error::Unnameable {
                disk: disk.to_owned(),
                target: label,
            },
            false => Error::io("give its name to", &label, errno),
        });
    }
    let partial = Partial {
        directory,
        partial,
        name,
        renamed: false,
    };
    Target::new(disk, label, file, Publication::Rename(partial))
}

/// Finds a file again that a former process made, under either of its names; nothing if it is not there. What somebody put
/// in its place is not it, where it is known which file it was.
pub fn find(
    disk: &str,
    path: &Path,
    backup: &str,
    index: usize,
    id: Option<FileId>,
) -> Result<Option<Target>, Error> {
    let (directory, name) = parent(path)?;
    let partial = partial_name(backup, index);
    // From a process that ended while it was tried.
    let _ = rustix::fs::unlinkat(&directory, naming::trial_name(&partial), AtFlags::empty());
    // Its own name was given to it after it was known which file it is. It may have both for a moment.
    let named = id.is_some().then_some((name.as_os_str(), true));
    let entries = named.into_iter().chain([(OsStr::new(&partial), false)]);
    for (entry, renamed) in entries {
        let label = path.display().to_string();
        let Some(file) = open_regular(&directory, entry, &label)? else {
            continue;
        };
        let stat = rustix::fs::fstat(&file).map_err(|errno| Error::io("stat", &label, errno))?;
        if id.is_some_and(|id| FileId::of(&stat) != id) {
            continue;
        }
        let directory = directory
            .try_clone()
            .map_err(|_| Error::io("open the directory of", &label, Errno::MFILE))?;
        let publication = Publication::Rename(Partial {
            directory,
            partial: partial.clone(),
            name: name.clone(),
            renamed,
        });
        return Target::new(disk, label, file, publication).map(Some);
    }
    Ok(None)
}

/// Opens what is a regular file, and never anything else: a FIFO or a device could block or act when it is opened.
fn open_regular(directory: &OwnedFd, name: &OsStr, label: &str) -> Result<Option<OwnedFd>, Error> {
    match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {}
        Ok(_) | Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(Error::io("look up", label, errno)),
    }
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::openat(directory, name, flags, Mode::empty()) {
        Ok(file) => Ok(Some(file)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(Error::io("open", label, errno)),
    }
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

fn partial_name(backup: &str, index: usize) -> String {
    format!(".backupd-{backup}-{index}.partial")
}

fn parent(path: &Path) -> Result<(OwnedFd, OsString), Error> {
    let shown = || path.display().to_string();
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::NoDirectory { path: shown() });
    };
    Ok((open_directory(parent, Trust::Named)?, name.to_owned()))
}

impl Partial {
    pub(super) fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    /// Gives the file its own name, if nobody took it meanwhile, and makes that durable.
    pub fn publish(&mut self, id: FileId, disk: &str, label: &str) -> Result<(), Error> {
        if self.renamed {
            // Where renaming is linking and unlinking, a former process may not have come to the latter.
            let _ = rustix::fs::unlinkat(&self.directory, &self.partial, AtFlags::empty());
        } else {
            self.rename(disk, label)?;
        }
        // Others may be able to write to the directory.
        let found = rustix::fs::statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        if !found.is_ok_and(|there| FileId::of(&there) == id) {
            return Err(Error::Replaced {
                disk: disk.to_owned(),
                target: label.to_owned(),
            });
        }
        rustix::fs::fsync(&self.directory).map_err(|errno| Error::io("fsync the directory of", label, errno))
    }

    fn rename(&mut self, disk: &str, label: &str) -> Result<(), Error> {
        fault::point(Point::BeforeRename);
        naming::rename_new(&self.directory, self.partial.as_ref(), &self.name).map_err(
            |errno| match errno {
                Errno::EXIST => Error::Exists {
                    disk: disk.to_owned(),
                    target: label.to_owned(),
                },
                errno => Error::io("give its name to", label, errno),
            },
        )?;
        self.renamed = true;
        fault::point(Point::Renamed);
        Ok(())
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
