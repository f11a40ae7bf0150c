//! What lies in a store, for whoever wants to know its backups again.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::path::{Trust, check_trust, open_directory};
use super::store::{names_in, open_child};
use super::{Error, FileId};

/// A directory of a store: the store's own, which has one for each domain; a domain's, which has one for each backup; or a
/// backup's. Nothing in it is taken for what it is not: no symbolic link is followed, and no file but a regular one is read.
#[derive(Debug)]
pub struct Shelf {
    path: PathBuf,
    directory: OwnedFd,
}

impl Shelf {
    /// The store at `path`.
    pub fn of_store(path: &Path) -> Result<Self, Error> {
        Ok(Self {
            path: path.to_owned(),
            directory: open_directory(path, Trust::Administrator)?,
        })
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
        let stat = rustix::fs::fstat(&directory).map_err(|errno| failed("stat", errno))?;
        check_trust(&stat, true).map_err(|why| Error::Untrusted {
            path: path.display().to_string(),
            why,
        })?;
        Ok(Some(Self { path, directory }))
    }

    /// The content of a file, of which no more than one byte after `at_most` is read; and when it was written.
    pub fn read(&self, name: &str, at_most: usize) -> Result<(Vec<u8>, Timestamp), Error> {
        let stat = self.look_at(name)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, name, flags, Mode::empty())
            .map_err(|errno| self.child_failed("open", name, errno))?;
        let mut content = Vec::new();
        let file = std::fs::File::from(file);
        std::io::Read::read_to_end(&mut std::io::Read::take(file, at_most as u64 + 1), &mut content)
            .map_err(|error| {
                self.child_failed("read", name, Errno::from_io_error(&error).unwrap_or(Errno::IO))
            })?;
        let time = Timestamp::from_second(stat.st_mtime).unwrap_or(Timestamp::UNIX_EPOCH);
        Ok((content, time))
    }

    /// The length of a file, in bytes.
    pub fn file_size(&self, name: &str) -> Result<u64, Error> {
        Ok(self.look_at(name)?.st_size.cast_unsigned())
    }

    /// What is there, if it is a regular file: to open a device can do something.
    fn look_at(&self, name: &str) -> Result<Stat, Error> {
        let stat = rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| self.child_failed("open", name, errno))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok(stat),
            _ => Err(self.child_failed("read", name, Errno::INVAL)),
        }
    }

    fn failed(&self, action: &'static str, errno: Errno) -> Error {
        Error::io(action, &self.path.display().to_string(), errno)
    }

    fn child_failed(&self, action: &'static str, name: &str, errno: Errno) -> Error {
        Error::io(action, &self.path.join(name).display().to_string(), errno)
    }
}
