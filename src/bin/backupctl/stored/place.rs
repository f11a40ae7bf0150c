//! The target of a restored disk: a file that gets its name when it is complete, or a block device.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use backupd::image;
use backupd::target::{self, FileId, Opener};
use rustix::fs::OFlags;

use super::partial::{Partial, directory};
use crate::output;

/// What a restore that did not end leaves of a device's beginning: nothing that has a header.
const WIPED_HEAD: usize = 1 << 20;

/// Why a disk cannot go where it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is there, and replacing it wasn't asked for.
    #[error("{} exists", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Another restore into the same file runs.
    #[error("{} is being written: another restore to there is running", path.display())]
    Partial {
        /// The file that another one has begun.
        path: PathBuf,
    },
    /// The kernel says that the device is used.
    #[error("{} is in use, as a file system or otherwise", path.display())]
    InUse {
        /// The device.
        path: PathBuf,
    },
    /// It is a directory or something stranger.
    #[error("{} is neither a regular file nor a block device", path.display())]
    WrongType {
        /// What it is not.
        path: PathBuf,
    },
    /// It is the disk of a VM, which runs; or another program works on it.
    #[error(
        "{} is open in QEMU, qemu-img or qemu-storage-daemon: shut that down, or choose another place",
        path.display()
    )]
    UsedByQemu {
        /// The file or device.
        path: PathBuf,
    },
    /// A process may write to it, with or without QEMU's locks.
    #[error(
        "{} is open in {} (process {}): end that, or choose another place",
        path.display(), opener.name, opener.process
    )]
    Open {
        /// The file or device.
        path: PathBuf,
        /// The process.
        opener: Opener,
    },
    /// It would be a file of a store, or replace one.
    #[error("{} is in the store or backup {}: choose a place outside of all stores", path.display(), store.display())]
    InStore {
        /// The file.
        path: PathBuf,
        /// The store's directory, or the backup's.
        store: PathBuf,
    },
    /// Each disk would replace or overwrite the other.
    #[error("disks '{first}' and '{second}' have the same target, {}", path.display())]
    SameTarget {
        /// A disk.
        first: String,
        /// A later one.
        second: String,
        /// Where both would go.
        path: PathBuf,
    },
    /// The system refuses something.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

impl Error {
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// An open place. Unless it is published, a new file is removed with it, and a device is wiped if this program wrote to it.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    kind: Kind,
    /// Content of a device may have been changed. What the service writes, the service wipes.
    written: AtomicBool,
}

#[derive(Debug)]
enum Kind {
    File {
        partial: Partial,
        /// What it replaces.
        old: Option<OwnedFd>,
    },
    Device {
        device: File,
        published: bool,
    },
}

impl Place {
    /// Opens a device, or makes a file that is to have that name. `id` is of the backup.
    pub fn open(path: &Path, id: &str, force: bool) -> Result<Self, Error> {
        // What a link leads to is replaced, not the link.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let there = match fs::symlink_metadata(&path) {
            Ok(there) if there.file_type().is_block_device() => return Self::device(path),
            Ok(there) if !there.is_file() => return Err(Error::WrongType { path }),
            Ok(_) if !force => return Err(Error::Exists { path }),
            Ok(there) => Some(there),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::io("look at", &path)(error)),
        };
        check_directory(&path)?;
        let old = there.as_ref().map(|_| open_old(&path)).transpose()?;
        let partial = Partial::create(&path, id)?;
        let place = Self {
            path,
            kind: Kind::File { partial, old },
            written: AtomicBool::new(false),
        };
        if let Some(there) = there {
            place.belong_as(&there)?;
        }
        Ok(place)
    }

    fn device(path: PathBuf) -> Result<Self, Error> {
        let flags = OFlags::EXCL | OFlags::NONBLOCK;
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.bits().cast_signed())
            .open(&path)
            .map_err(|error| match error.kind() {
                io::ErrorKind::ResourceBusy => Error::InUse { path: path.clone() },
                _ => Error::io("open", &path)(error),
            })?;
        check_unused(&path, device.as_fd())?;
        let stat = rustix::fs::fstat(&device).map_err(|errno| Error::io("look at", &path)(errno.into()))?;
        for directory in target::directories_behind(FileId::of(&stat)) {
            check_outside(&path, directory)?;
        }
        Ok(Self {
            path,
            kind: Kind::Device {
                device,
                published: false,
            },
            written: AtomicBool::new(false),
        })
    }

    fn file(&self) -> &File {
        match &self.kind {
            Kind::File { partial, .. } => &partial.file,
            Kind::Device { device, .. } => device,
        }
    }

    /// Gives the new file the owner and mode of the one that it replaces: who used that one can use this.
    fn belong_as(&self, there: &Metadata) -> Result<(), Error> {
        let file = self.file();
        let made = file.metadata().map_err(Error::io("look at", &self.path))?;
        if (made.uid(), made.gid()) != (there.uid(), there.gid()) {
            std::os::unix::fs::fchown(file, Some(there.uid()), Some(there.gid()))
                .map_err(Error::io("keep the owner of", &self.path))?;
        }
        file.set_permissions(Permissions::from_mode(there.mode() & 0o777))
            .map_err(Error::io("keep the mode of", &self.path))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn is_device(&self) -> bool {
        matches!(self.kind, Kind::Device { .. })
    }

    /// Bytes of a device; nothing of a file.
    pub fn device_size(&self) -> Result<Option<u64>, Error> {
        let Kind::Device { device, .. } = &self.kind else {
            return Ok(None);
        };
        let mut device = device;
        let found = device.seek(SeekFrom::End(0));
        found.map(Some).map_err(Error::io("measure", &self.path))
    }

    /// Bytes of a device behind the first `size`.
    pub fn bytes_behind(&self, size: u64) -> Result<u64, Error> {
        Ok(self.device_size()?.map_or(0, |found| found.saturating_sub(size)))
    }

    /// Whether earlier content may have been changed. It is set before each write.
    pub fn written(&self) -> &AtomicBool {
        &self.written
    }

    /// A descriptor to write to.
    pub fn descriptor(&self) -> Result<OwnedFd, Error> {
        let file = self.file().try_clone();
        file.map(OwnedFd::from)
            .map_err(Error::io("duplicate", &self.path))
    }

    /// Gives the file its name, durably; or leaves the device as it is now.
    pub fn publish(&mut self) -> Result<(), Error> {
        match &mut self.kind {
            Kind::File { partial, old } => {
                // A VM may have been started meanwhile.
                if let Some(old) = old {
                    check_unused(&self.path, old.as_fd())?;
                }
                partial.publish(old.is_some())
            }
            Kind::Device { published, .. } => {
                *published = true;
                Ok(())
            }
        }
    }
}

/// Which file or device a path leads to, or would be a new file's.
#[derive(PartialEq)]
enum Entry {
    There(FileId),
    New {
        directory: Option<FileId>,
        name: Option<OsString>,
    },
}

impl Entry {
    fn of(path: &Path) -> Self {
        let at = |path: &Path| rustix::fs::stat(path).ok().map(|stat| FileId::of(&stat));
        match at(path) {
            Some(id) => Self::There(id),
            None => Self::New {
                directory: at(directory(path)),
                name: path.file_name().map(ToOwned::to_owned),
            },
        }
    }
}

/// Refuses places, with their disks, of which two are one, whatever their paths are.
pub fn check_distinct(places: &[(&str, PathBuf)]) -> Result<(), Error> {
    let mut known: Vec<(&str, Entry)> = Vec::new();
    for (disk, path) in places {
        let entry = Entry::of(path);
        if let Some((first, _)) = known.iter().find(|(_, other)| *other == entry) {
            return Err(Error::SameTarget {
                first: (*first).to_owned(),
                second: (*disk).to_owned(),
                path: path.clone(),
            });
        }
        known.push((disk, entry));
    }
    Ok(())
}

/// Nothing is made in a store, and nothing in it is replaced, whatever is forced.
fn check_directory(path: &Path) -> Result<(), Error> {
    let directory = directory(path);
    // One that is not there is reported when the file is made.
    let directory = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    check_outside(path, directory)
}

fn check_outside(path: &Path, directory: PathBuf) -> Result<(), Error> {
    let store =
        target::store_around(&directory).or_else(|| image::is_backup(&directory).then_some(directory));
    match store {
        None => Ok(()),
        Some(store) => Err(Error::InStore {
            path: path.to_owned(),
            store,
        }),
    }
}

/// Opens what is to be replaced, which no VM may use, whatever is forced.
fn open_old(path: &Path) -> Result<OwnedFd, Error> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let old = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(Error::io("find out whether a VM uses", path))?;
    check_unused(path, old.as_fd())?;
    Ok(old.into())
}

/// The same check as for the targets of a backup, and of all processes that this one may look into.
fn check_unused(path: &Path, file: BorrowedFd<'_>) -> Result<(), Error> {
    let failed = Error::io("find out whether a VM uses", path);
    let file = file.try_clone_to_owned();
    let used = file.and_then(|file| match target::is_in_use(&file)? {
        true => Ok(Some(Error::UsedByQemu {
            path: path.to_owned(),
        })),
        // A QEMU has no locks while it waits for a migration, after one, and with `locking=off`.
        false => Ok(target::opener(&file)?.map(|opener| Error::Open {
            path: path.to_owned(),
            opener,
        })),
    });
    used.map_err(failed)?.map_or(Ok(()), Err)
}

impl Drop for Place {
    fn drop(&mut self) {
        let cleared = match &mut self.kind {
            Kind::File { partial, .. } => partial.discard(),
            Kind::Device {
                device,
                published: false,
            } if self.written.load(Ordering::Relaxed) => device
                .write_all_at(&vec![0; WIPED_HEAD], 0)
                .and_then(|()| device.sync_all()),
            Kind::Device { .. } => Ok(()),
        };
        if let Err(error) = cleared {
            let path = output::escape(&self.path.display().to_string());
            output::complain(&format!(
                "backupctl: what was begun of {path} cannot be removed: {error}"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_its_name_when_it_is_published_and_no_earlier() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vda.raw");
        let mut place = Place::open(&path, "id", false).unwrap();
        assert!(!path.exists());
        place.publish().unwrap();
        drop(place);
        assert!(path.exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(matches!(
            Place::open(&path, "id", false),
            Err(Error::Exists { .. })
        ));
    }

    #[test]
    fn what_was_not_published_is_gone_and_what_it_would_have_replaced_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vda.raw");
        fs::write(&path, "mine").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        drop(Place::open(&path, "id", true).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        Place::open(&path, "id", true).unwrap().publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o640);
    }

    #[test]
    fn a_file_that_came_meanwhile_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vda.raw");
        let mut place = Place::open(&path, "id", false).unwrap();
        fs::write(&path, "mine").unwrap();
        assert!(matches!(place.publish(), Err(Error::Exists { .. })));
        drop(place);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
