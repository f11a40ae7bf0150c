//! Putting another directory in the place of a backup's: made beside it under a hidden name, and exchanged with it as a whole.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::inventory::{Sharing, Shelf};
use super::store::names_in;
use super::{BackupName, Error};
use crate::fault::{self, Point};

/// The directory that is to take a backup's place. Left where it is when it is dropped: [`Replacement::clear`] removes it.
#[derive(Debug)]
pub struct Replacement {
    domain: Shelf,
    directory: Shelf,
    id: String,
}

fn hidden_name(id: &str) -> String {
    format!(".{id}.merged")
}

impl Replacement {
    /// Makes it, empty. Blocks.
    pub fn create(store: &Path, name: BackupName) -> Result<Self, Error> {
        Self::clear(store, name)?;
        let domain = domain(store, name)?;
        let hidden = hidden_name(name.id);
        rustix::fs::mkdirat(domain.descriptor(), &hidden, Mode::RWXU)
            .map_err(|errno| failed(&domain, "create", &hidden, errno))?;
        let directory = domain.below(&hidden)?;
        let directory = directory.ok_or_else(|| failed(&domain, "open", &hidden, Errno::NOENT))?;
        Ok(Self {
            domain,
            directory,
            id: name.id.to_owned(),
        })
    }

    /// Removes one that was not put in place, or what was in that place before; durably. Nothing if there is none. Blocks.
    pub fn clear(store: &Path, name: BackupName) -> Result<(), Error> {
        let domain = domain(store, name)?;
        let hidden = hidden_name(name.id);
        let Some(directory) = domain.below(&hidden)? else {
            return Ok(());
        };
        let names =
            names_in(directory.descriptor()).map_err(|errno| failed(&directory, "read", "", errno))?;
        for file in names {
            let stat = rustix::fs::statat(directory.descriptor(), &file, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|errno| failed(&directory, "stat", &file, errno))?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                return Err(Error::NotTheBackups {
                    path: directory.path().join(&file).display().to_string(),
                });
            }
            rustix::fs::unlinkat(directory.descriptor(), &file, AtFlags::empty())
                .map_err(|errno| failed(&directory, "remove", &file, errno))?;
        }
        rustix::fs::unlinkat(domain.descriptor(), &hidden, AtFlags::REMOVEDIR)
            .map_err(|errno| failed(&domain, "remove", &hidden, errno))?;
        sync(&domain)
    }

    /// A new file of it, open for reading and writing.
    pub fn create_file(&self, file: &str) -> Result<OwnedFd, Error> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(self.directory.descriptor(), file, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| failed(&self.directory, "create", file, errno))
    }

    /// Has it hold a file that the backup has already.
    pub fn keep(&self, file: &str) -> Result<(), Error> {
        let current = self.current()?;
        rustix::fs::linkat(
            current.descriptor(),
            file,
            self.directory.descriptor(),
            file,
            AtFlags::empty(),
        )
        .map_err(|errno| failed(&self.directory, "link", file, errno))
    }

    /// Writes a file, durably.
    pub fn write(&self, file: &str, content: &[u8]) -> Result<(), Error> {
        let mut written = std::fs::File::from(self.create_file(file)?);
        std::io::Write::write_all(&mut written, content)
            .and_then(|()| written.sync_all())
            .map_err(|error| {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                failed(&self.directory, "write", file, errno)
            })
    }

    /// Puts it in the backup's place, durably, if nobody else uses that. What was there has the hidden name then. Blocks.
    pub fn put(&self) -> Result<(), Error> {
        sync(&self.directory)?;
        let _held = self.current()?.hold(Sharing::Exclusive)?;
        let (domain, hidden) = (self.domain.descriptor(), hidden_name(&self.id));
        rustix::fs::renameat_with(domain, &hidden, domain, &self.id, RenameFlags::EXCHANGE)
            .map_err(|errno| failed(&self.domain, "exchange", &self.id, errno))?;
        fault::point(Point::MergeExchanged);
        sync(&self.domain)
    }

    fn current(&self) -> Result<Shelf, Error> {
        let current = self.domain.below(&self.id)?;
        current.ok_or_else(|| failed(&self.domain, "open", &self.id, Errno::NOENT))
    }
}

fn domain(store: &Path, name: BackupName) -> Result<Shelf, Error> {
    let store = Shelf::of_store(store)?;
    let domain = store.below(name.domain)?;
    domain.ok_or_else(|| failed(&store, "open", name.domain, Errno::NOENT))
}

fn sync(shelf: &Shelf) -> Result<(), Error> {
    rustix::fs::fsync(shelf.descriptor()).map_err(|errno| failed(shelf, "fsync", "", errno))
}

fn failed(shelf: &Shelf, action: &'static str, name: &str, errno: Errno) -> Error {
    Error::io(action, &shelf.path().join(name).display().to_string(), errno)
}
