//! Files that the caller names by an absolute path.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{Error, Publication, Target};
use crate::fault::{self, Point};
use crate::files::{FileId, naming};
use crate::path::{Trust, open_directory};

/// A file under its staging name, and the final name that it gets.
#[derive(Debug)]
pub struct StagedFile {
    directory: OwnedFd,
    partial: String,
    name: OsString,
    renamed: bool,
}

/// Creates a new file that only the service can read, under a staging name beside its final name.
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
            // The file is empty. If the service cannot remove it either, the returned error shows the cause.
            let _ = rustix::fs::unlinkat(&directory, &name, AtFlags::empty());
        }
        return Err(match naming::is_without_links(errno) {
            true => Error::Unnameable {
                disk: disk.to_owned(),
                target: label,
            },
            false => Error::io("publish", &label, errno),
        });
    }
    let partial = StagedFile {
        directory,
        partial,
        name,
        renamed: false,
    };
    Target::new(disk, label, file, Publication::Rename(partial))
}

/// Finds a file that an earlier process created, under its staging or final name. Returns `None` if it does not
/// exist. If `id` is known, another file at that path does not count.
pub fn find(
    disk: &str,
    path: &Path,
    backup: &str,
    index: usize,
    id: Option<FileId>,
) -> Result<Option<Target>, Error> {
    let (directory, name) = parent(path)?;
    let partial = partial_name(backup, index);
    // A process that ended during the trial may have left this name.
    let _ = rustix::fs::unlinkat(&directory, naming::trial_name(&partial), AtFlags::empty());
    // The service records the file's identity before it publishes the file. So without `id` only the staging name is
    // possible. The file may have both names for a moment.
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
        let publication = Publication::Rename(StagedFile {
            directory,
            partial: partial.clone(),
            name: name.clone(),
            renamed,
        });
        return Target::new(disk, label, file, publication).map(Some);
    }
    Ok(None)
}

/// Opens regular files only: opening a FIFO or a device could block or have effects.
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

/// Opens an existing file for writing.
pub fn open_existing(disk: &str, path: &Path) -> Result<Target, Error> {
    let (directory, name) = parent(path)?;
    let label = path.display().to_string();
    let wrong_type = |label: String| Error::WrongType {
        disk: disk.to_owned(),
        target: label,
        wanted: "a regular file",
    };
    // Opening a FIFO or a device could block or have effects. So check the type before, and again after opening.
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

impl StagedFile {
    pub(super) fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    /// Gives the file its final name durably. Fails if another file has the name.
    pub fn publish(&mut self, id: FileId, disk: &str, label: &str) -> Result<(), Error> {
        if self.renamed {
            // On file systems without RENAME_NOREPLACE a rename is a link and an unlink, and an earlier process may
            // have ended in between.
            let _ = rustix::fs::unlinkat(&self.directory, &self.partial, AtFlags::empty());
        } else {
            self.rename(disk, label)?;
        }
        // Other users may be able to write to the directory.
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
                errno => Error::io("publish", label, errno),
            },
        )?;
        self.renamed = true;
        fault::point(Point::Renamed);
        Ok(())
    }

    /// Removes the file under its present name. Another file at that path stays.
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
