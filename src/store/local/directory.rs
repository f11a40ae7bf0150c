//! A directory of a store, open for reading.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::super::{BackupLock, LockKind, OpenBackup};
use super::{Error, protection};
use crate::files::{names_in, open_below};
use crate::path::{Trust, check_trust, open_directory};

/// A directory of a store: the store itself (one directory per domain), a domain's directory (one per backup), or a
/// backup's. It follows no symbolic link, and reads only regular files.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    directory: OwnedFd,
    trust: Trust,
}

impl Directory {
    /// Opens the store at `path`.
    pub fn of_store(path: &Path) -> Result<Self, Error> {
        Self::open(path, Trust::Administrator)
    }

    /// Opens a store that this process can read, with any path and owner.
    pub fn of_users_store(path: &Path) -> Result<Self, Error> {
        Self::open(path, Trust::Named)
    }

    fn open(path: &Path, trust: Trust) -> Result<Self, Error> {
        Ok(Self {
            path: path.to_owned(),
            directory: open_directory(path, trust)?,
            trust,
        })
    }

    pub fn descriptor(&self) -> &OwnedFd {
        &self.directory
    }

    /// Duplicates the descriptor.
    pub fn duplicate(&self) -> Result<OwnedFd, Error> {
        rustix::io::fcntl_dupfd_cloexec(&self.directory, 3).map_err(|errno| self.failed("open", errno))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns its device and inode, which stay the same if it is renamed.
    pub fn identity(&self) -> Result<String, Error> {
        let stat = rustix::fs::fstat(&self.directory).map_err(|errno| self.failed("stat", errno))?;
        Ok(format!("{}:{}", stat.st_dev, stat.st_ino))
    }

    /// Returns the names of its entries, sorted. Names that the service would not create are left out.
    pub fn names(&self) -> Result<Vec<String>, Error> {
        let mut names = names_in(&self.directory).map_err(|errno| self.failed("read", errno))?;
        names.retain(|name| !name.contains('\u{fffd}'));
        names.sort();
        Ok(names)
    }

    /// Opens the directory of that name in it. Returns `None` if there is no such directory.
    pub fn below(&self, name: &str) -> Result<Option<Self>, Error> {
        let path = self.path.join(name);
        let failed = |action, errno| Error::io(action, &path.display().to_string(), errno);
        let directory = match open_below(&self.directory, name) {
            Ok(directory) => directory,
            Err(Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(failed("open", errno)),
        };
        if self.trust == Trust::Administrator {
            let stat = rustix::fs::fstat(&directory).map_err(|errno| failed("stat", errno))?;
            check_trust(&stat, true).map_err(|why| Error::Untrusted {
                path: path.display().to_string(),
                why,
            })?;
        }
        Ok(Some(Self {
            path,
            directory,
            trust: self.trust,
        }))
    }

    /// Returns the content of a file, at most `at_most` + 1 bytes, and the file's modification time.
    pub fn read(&self, name: &str, at_most: usize) -> Result<(Vec<u8>, Timestamp), Error> {
        read_file(&self.directory, &self.path, name, at_most)
    }

    fn failed(&self, action: &'static str, errno: Errno) -> Error {
        Error::io(action, &self.path.display().to_string(), errno)
    }
}

impl OpenBackup for Directory {
    fn location(&self) -> &Path {
        &self.path
    }

    fn read(&self, file: &str, at_most: usize) -> Result<(Vec<u8>, Timestamp), Error> {
        read_file(&self.directory, &self.path, file, at_most)
    }

    fn size_of(&self, file: &str) -> Result<u64, Error> {
        let stat = look_at(&self.directory, &self.path, file)?;
        Ok(stat.st_size.cast_unsigned())
    }

    fn open_image(&self, file: &str) -> Result<OwnedFd, Error> {
        open_file(&self.directory, &self.path, file)
    }

    fn is_protected(&self) -> Result<bool, Error> {
        protection::is_protected(self)
    }

    /// `flock(2)` on the directory itself works between programs, and ends with them.
    fn lock(&self, kind: LockKind) -> Result<BackupLock, Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(&self.directory, ".", flags, Mode::empty())
            .map_err(|errno| self.failed("open", errno))?;
        let operation = match kind {
            LockKind::Shared => FlockOperation::NonBlockingLockShared,
            LockKind::Exclusive => FlockOperation::NonBlockingLockExclusive,
        };
        match rustix::fs::flock(&directory, operation) {
            Ok(()) => Ok(BackupLock(Box::new(directory))),
            Err(Errno::WOULDBLOCK) => Err(Error::InUse {
                path: self.path.display().to_string(),
            }),
            Err(errno) => Err(self.failed("lock", errno)),
        }
    }
}

/// As [`Directory::read`].
pub fn read_file(
    directory: &OwnedFd,
    path: &Path,
    name: &str,
    at_most: usize,
) -> Result<(Vec<u8>, Timestamp), Error> {
    let stat = look_at(directory, path, name)?;
    let file = std::fs::File::from(open_file(directory, path, name)?);
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(file, at_most as u64 + 1), &mut content).map_err(
        |error| {
            child_failed(
                path,
                "read",
                name,
                Errno::from_io_error(&error).unwrap_or(Errno::IO),
            )
        },
    )?;
    let time = Timestamp::from_second(stat.st_mtime).unwrap_or(Timestamp::UNIX_EPOCH);
    Ok((content, time))
}

fn open_file(directory: &OwnedFd, path: &Path, name: &str) -> Result<OwnedFd, Error> {
    look_at(directory, path, name)?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, name, flags, Mode::empty())
        .map_err(|errno| child_failed(path, "open", name, errno))?;
    let stat = rustix::fs::fstat(&file).map_err(|errno| child_failed(path, "stat", name, errno))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(file),
        _ => Err(child_failed(path, "read", name, Errno::INVAL)),
    }
}

/// Returns the status of a regular file. Other types fail, because opening a device can have effects.
fn look_at(directory: &OwnedFd, path: &Path, name: &str) -> Result<Stat, Error> {
    let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|errno| child_failed(path, "open", name, errno))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(stat),
        _ => Err(child_failed(path, "read", name, Errno::INVAL)),
    }
}

fn child_failed(path: &Path, action: &'static str, name: &str, errno: Errno) -> Error {
    Error::io(action, &path.join(name).display().to_string(), errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_locks_a_backup_against_changes() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("backup")).unwrap();
        let store = Directory::of_users_store(directory.path()).unwrap();
        let backup = || store.below("backup").unwrap().unwrap();
        let (first, second) = (backup().lock(LockKind::Shared), backup().lock(LockKind::Shared));
        assert!(first.is_ok() && second.is_ok());
        assert!(matches!(
            backup().lock(LockKind::Exclusive),
            Err(Error::InUse { .. })
        ));
        drop((first, second));
        let only = backup().lock(LockKind::Exclusive).unwrap();
        assert!(matches!(
            backup().lock(LockKind::Shared),
            Err(Error::InUse { .. })
        ));
        drop(only);
        assert!(backup().lock(LockKind::Shared).is_ok());
    }

    #[test]
    fn only_regular_files_are_opened() {
        let directory = tempfile::tempdir().unwrap();
        let store = Directory::of_users_store(directory.path()).unwrap();
        std::fs::write(directory.path().join("image"), "x").unwrap();
        std::os::unix::fs::symlink("image", directory.path().join("link")).unwrap();
        std::fs::create_dir(directory.path().join("directory")).unwrap();
        assert!(store.open_image("image").is_ok());
        for other in ["link", "directory", "missing"] {
            assert!(store.open_image(other).is_err(), "{other}");
        }
    }
}
