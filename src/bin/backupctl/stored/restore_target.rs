//! The target of a restored disk: a file that gets its name when it is complete, or a block device.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use backupd::files::FileId;
use backupd::image;
use backupd::store;
use backupd::targets::{self, Look, Opener};
use rustix::fs::OFlags;

use super::partial::{Partial, directory};
use crate::output;

/// How much of a device's beginning an unfinished restore wipes: all image headers.
const WIPED_HEAD: usize = 1 << 20;

/// The error of a target.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file exists, and --force is not given.
    #[error("{} exists", path.display())]
    Exists { path: PathBuf },
    /// Another restore into the same file is running.
    #[error("another restore is writing {}", path.display())]
    Partial {
        /// The staging file of the other restore.
        path: PathBuf,
    },
    /// The kernel reports the device as busy.
    #[error("{} is in use, for example as a file system", path.display())]
    InUse { path: PathBuf },
    /// The target is a directory or another type of file.
    #[error("{} is neither a regular file nor a block device", path.display())]
    WrongType { path: PathBuf },
    /// A running VM or another QEMU program uses the target.
    #[error(
        "{} is open in QEMU, qemu-img or qemu-storage-daemon: shut it down, or choose another target",
        path.display()
    )]
    UsedByQemu { path: PathBuf },
    /// A process has the target open for writing, with or without QEMU's locks.
    #[error(
        "{} is open in {} (process {}): end that process, or choose another target",
        path.display(), opener.name, opener.process
    )]
    Open { path: PathBuf, opener: Opener },
    /// The target is in a store.
    #[error("{} is in the store or backup {}: choose a target outside of all stores", path.display(), store.display())]
    InStore {
        path: PathBuf,
        /// The store's directory, or the backup's.
        store: PathBuf,
    },
    /// Two disks have the same target.
    #[error("disks '{first}' and '{second}' have the same target, {}", path.display())]
    SameTarget {
        first: String,
        second: String,
        path: PathBuf,
    },
    /// The system reports an error.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl Error {
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// An open target. Dropping it before publication removes a new file, and wipes a device if this program has written to
/// it.
#[derive(Debug)]
pub struct RestoreTarget {
    path: PathBuf,
    kind: Kind,
    /// Whether this program may have changed the device. The service wipes after its own writes.
    written: AtomicBool,
}

#[derive(Debug)]
enum Kind {
    File {
        partial: Partial,
        /// The file to replace.
        old: Option<OwnedFd>,
    },
    Device {
        device: File,
        published: bool,
    },
}

impl RestoreTarget {
    /// Opens a device, or creates a staging file for the name. `id` is the id of the backup.
    pub fn open(path: &Path, id: &str, force: bool) -> Result<Self, Error> {
        // If the path is a symbolic link, its target is replaced.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let there = match fs::symlink_metadata(&path) {
            Ok(there) if there.file_type().is_block_device() => return Self::device(path),
            Ok(there) if !there.is_file() => return Err(Error::WrongType { path }),
            Ok(_) if !force => return Err(Error::Exists { path }),
            Ok(there) => Some(there),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::io("stat", &path)(error)),
        };
        check_directory(&path)?;
        let old = there.as_ref().map(|_| open_old(&path)).transpose()?;
        let partial = Partial::create(&path, id)?;
        let target = Self {
            path,
            kind: Kind::File { partial, old },
            written: AtomicBool::new(false),
        };
        if let Some(there) = there {
            target.copy_owner_and_mode(&there)?;
        }
        Ok(target)
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
        let stat = rustix::fs::fstat(&device).map_err(|errno| Error::io("stat", &path)(errno.into()))?;
        for directory in targets::directories_behind(FileId::of(&stat)) {
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

    /// Gives the new file the owner and mode of the replaced one, so that the same users can use it.
    fn copy_owner_and_mode(&self, there: &Metadata) -> Result<(), Error> {
        let file = self.file();
        let made = file.metadata().map_err(Error::io("stat", &self.path))?;
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

    /// The size of a device in bytes; `None` for a file.
    pub fn device_size(&self) -> Result<Option<u64>, Error> {
        let Kind::Device { device, .. } = &self.kind else {
            return Ok(None);
        };
        let mut device = device;
        let found = device.seek(SeekFrom::End(0));
        found.map(Some).map_err(Error::io("measure", &self.path))
    }

    /// Bytes of a device behind the first `size` bytes.
    pub fn bytes_behind(&self, size: u64) -> Result<u64, Error> {
        Ok(self.device_size()?.map_or(0, |found| found.saturating_sub(size)))
    }

    /// Whether existing content may have been changed. Set before each write.
    pub fn written(&self) -> &AtomicBool {
        &self.written
    }

    /// A descriptor to write to.
    pub fn descriptor(&self) -> Result<OwnedFd, Error> {
        let file = self.file().try_clone();
        file.map(OwnedFd::from)
            .map_err(Error::io("duplicate", &self.path))
    }

    /// Publishes the file durably. A device stays as it is.
    pub fn publish(&mut self) -> Result<(), Error> {
        match &mut self.kind {
            Kind::File { partial, old } => {
                // A VM may have been started in the meantime.
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

/// The identity of a file or device, existing or future.
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

/// Refuses two disks with the same target, even under different paths.
pub fn check_distinct(targets: &[(&str, PathBuf)]) -> Result<(), Error> {
    let mut known: Vec<(&str, Entry)> = Vec::new();
    for (disk, path) in targets {
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

/// Refuses targets in a store, even with --force.
fn check_directory(path: &Path) -> Result<(), Error> {
    let directory = directory(path);
    // If the directory does not exist, creating the file reports it.
    let directory = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    check_outside(path, directory)
}

fn check_outside(path: &Path, directory: PathBuf) -> Result<(), Error> {
    let store = store::store_around(&directory).or_else(|| image::is_backup(&directory).then_some(directory));
    match store {
        None => Ok(()),
        Some(store) => Err(Error::InStore {
            path: path.to_owned(),
            store,
        }),
    }
}

/// Opens the file to replace. A VM must not use it, even with --force.
fn open_old(path: &Path) -> Result<OwnedFd, Error> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let old = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(Error::io("check whether a VM uses", path))?;
    check_unused(path, old.as_fd())?;
    Ok(old.into())
}

/// The same check as for targets of backups, across all processes that this one may inspect.
fn check_unused(path: &Path, file: BorrowedFd<'_>) -> Result<(), Error> {
    let failed = Error::io("check whether a VM uses", path);
    let file = file.try_clone_to_owned();
    let used = file.and_then(
        |file| match targets::is_in_use(&mut Look::Own.session(), &file)? {
            true => Ok(Some(Error::UsedByQemu {
                path: path.to_owned(),
            })),
            // QEMU holds no locks with `locking=off`, and around a migration.
            false => Ok(targets::opener(&file)?.map(|opener| Error::Open {
                path: path.to_owned(),
                opener,
            })),
        },
    );
    used.map_err(failed)?.map_or(Ok(()), Err)
}

impl Drop for RestoreTarget {
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
                "backupctl: cannot discard the incomplete {path}: {error}"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gets_its_name_at_publication() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vda.raw");
        let mut target = RestoreTarget::open(&path, "id", false).unwrap();
        assert!(!path.exists());
        target.publish().unwrap();
        drop(target);
        assert!(path.exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(matches!(
            RestoreTarget::open(&path, "id", false),
            Err(Error::Exists { .. })
        ));
    }

    #[test]
    fn a_discarded_file_is_removed_and_the_old_one_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vda.raw");
        fs::write(&path, "mine").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        drop(RestoreTarget::open(&path, "id", true).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        RestoreTarget::open(&path, "id", true).unwrap().publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o640);
    }

    #[test]
    fn a_file_that_was_created_in_between_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vda.raw");
        let mut target = RestoreTarget::open(&path, "id", false).unwrap();
        fs::write(&path, "mine").unwrap();
        assert!(matches!(target.publish(), Err(Error::Exists { .. })));
        drop(target);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
