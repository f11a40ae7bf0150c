//! The content of a store, for reading its backups again.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::store::{names_in, open_child};
use super::{Error, FileId};
use crate::path::{Trust, check_trust, open_directory};

/// A directory of a store: the store's own, which has one for each domain; a domain's, which has one for each backup; or a
/// backup's. Nothing in it is taken for what it is not: no symbolic link is followed, and no file but a regular one is read.
#[derive(Debug)]
pub struct Shelf {
    path: PathBuf,
    directory: OwnedFd,
    trust: Trust,
}

/// How a backup's directory is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Read, or built upon: as it is, for as long.
    Shared,
    /// Changed or removed.
    Exclusive,
}

/// A backup's directory that stays as it is, or is nobody else's, until this is dropped: `flock(2)` on the directory itself,
/// which counts between programs too and ends with them.
#[derive(Debug)]
#[must_use]
pub struct Held(#[expect(dead_code, reason = "closing it lets go")] OwnedFd);

impl Shelf {
    /// The store at `path`.
    pub fn of_store(path: &Path) -> Result<Self, Error> {
        Self::open(path, Trust::Administrator)
    }

    /// A store, whatever its place and owner, that this process can read.
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

    /// Keeps a backup's directory as it is, or for oneself. Says at once if others have it ([`Error::InUse`]).
    pub fn hold(&self, sharing: Sharing) -> Result<Held, Error> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(&self.directory, ".", flags, Mode::empty())
            .map_err(|errno| self.failed("open", errno))?;
        let operation = match sharing {
            Sharing::Shared => FlockOperation::NonBlockingLockShared,
            Sharing::Exclusive => FlockOperation::NonBlockingLockExclusive,
        };
        match rustix::fs::flock(&directory, operation) {
            Ok(()) => Ok(Held(directory)),
            Err(Errno::WOULDBLOCK) => Err(Error::InUse {
                path: self.path.display().to_string(),
            }),
            Err(errno) => Err(self.failed("lock", errno)),
        }
    }

    /// Opens a file of it to read, if it is a regular one.
    pub fn open_file(&self, name: &str) -> Result<OwnedFd, Error> {
        open_file(&self.directory, &self.path, name)
    }

    pub(super) fn into_descriptor(self) -> OwnedFd {
        self.directory
    }

    pub(super) fn descriptor(&self) -> &OwnedFd {
        &self.directory
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn id(&self) -> Result<FileId, Error> {
        let stat = rustix::fs::fstat(&self.directory).map_err(|errno| self.failed("stat", errno))?;
        Ok(FileId::of(&stat))
    }

    /// The names of what it holds, sorted, but for those that could not be ours.
    pub fn names(&self) -> Result<Vec<String>, Error> {
        let mut names = names_in(&self.directory).map_err(|errno| self.failed("read", errno))?;
        names.retain(|name| !name.contains('\u{fffd}'));
        names.sort();
        Ok(names)
    }

    /// What is below it under that name; nothing if that is no directory.
    pub fn below(&self, name: &str) -> Result<Option<Self>, Error> {
        let path = self.path.join(name);
        let failed = |action, errno| Error::io(action, &path.display().to_string(), errno);
        let directory = match open_child(&self.directory, name) {
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

    /// The content of a file, of which no more than one byte after `at_most` is read; and when it was written.
    pub fn read(&self, name: &str, at_most: usize) -> Result<(Vec<u8>, Timestamp), Error> {
        read_file(&self.directory, &self.path, name, at_most)
    }

    /// The length of a file, in bytes.
    pub fn file_size(&self, name: &str) -> Result<u64, Error> {
        Ok(look_at(&self.directory, &self.path, name)?
            .st_size
            .cast_unsigned())
    }

    fn failed(&self, action: &'static str, errno: Errno) -> Error {
        Error::io(action, &self.path.display().to_string(), errno)
    }
}

/// As [`Shelf::read`].
pub(super) fn read_file(
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

/// What is there, if it is a regular file: to open a device can do something.
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
    fn who_reads_a_backup_keeps_it_from_who_would_change_it() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("backup")).unwrap();
        let store = Shelf::of_users_store(directory.path()).unwrap();
        let backup = || store.below("backup").unwrap().unwrap();
        let (first, second) = (backup().hold(Sharing::Shared), backup().hold(Sharing::Shared));
        assert!(first.is_ok() && second.is_ok());
        assert!(matches!(
            backup().hold(Sharing::Exclusive),
            Err(Error::InUse { .. })
        ));
        drop((first, second));
        let only = backup().hold(Sharing::Exclusive).unwrap();
        assert!(matches!(backup().hold(Sharing::Shared), Err(Error::InUse { .. })));
        drop(only);
        assert!(backup().hold(Sharing::Shared).is_ok());
    }

    #[test]
    fn only_regular_files_are_opened() {
        let directory = tempfile::tempdir().unwrap();
        let store = Shelf::of_users_store(directory.path()).unwrap();
        std::fs::write(directory.path().join("image"), "x").unwrap();
        std::os::unix::fs::symlink("image", directory.path().join("link")).unwrap();
        std::fs::create_dir(directory.path().join("directory")).unwrap();
        assert!(store.open_file("image").is_ok());
        for other in ["link", "directory", "missing"] {
            assert!(store.open_file(other).is_err(), "{other}");
        }
    }
}
