//! Replaces a backup's directory: the service creates a new directory under a hidden name beside it, and exchanges
//! the two atomically.
//!
//! If the file system cannot exchange, the backup's directory is moved aside first. If the process ends in between,
//! the complete directory is there under another name, and a later process restores its name.

use std::fs::File;
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;

use rustix::fs::{Advice, AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::super::{LockKind, OpenBackup, Replacement};
use super::directory::Directory;
use super::removal::removed_name;
use super::{BackupName, Error};
use crate::fault::{self, Point};
use crate::files::names_in;
use crate::files::naming;
use crate::offload::Progress;

/// How much is copied at a time, in bytes.
const PIECE: u64 = 1 << 20;

/// The directory that replaces a backup's directory. Drop does not remove it.
#[derive(Debug)]
pub struct DirectoryReplacement {
    domain: Directory,
    directory: Directory,
    id: String,
}

fn hidden_name(id: &str) -> String {
    format!(".{id}.merged")
}

/// The name of the backup's directory while it is moved aside.
fn aside_name(id: &str) -> String {
    format!(".{id}.replaced")
}

/// Returns the backup of a directory that was moved aside.
pub fn replaced_backup(name: &str) -> Option<&str> {
    name.strip_prefix('.')?.strip_suffix(".replaced")
}

impl DirectoryReplacement {
    /// Creates an empty directory. Blocks.
    pub fn create(store: &Directory, name: BackupName<'_>, progress: &Progress) -> Result<Self, Error> {
        clear(store, name, progress)?;
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

    fn copy(
        &self,
        current: &Directory,
        file: &str,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Option<()>, Error> {
        let from = File::from(current.open_image(file)?);
        let to = File::from(self.create_image(file)?);
        let copied = copy(&from, &to, progress, cancel);
        copied.map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            failed(&self.directory, "copy", file, errno)
        })
    }

    /// Puts it in place in two steps. Between them no directory has the backup's name, and [`settle`] can
    /// restore it.
    fn move_in(&self, hidden: &str) -> Result<(), Error> {
        let (domain, aside) = (self.domain.descriptor(), aside_name(&self.id));
        let rename = |old: &str, new: &str| {
            naming::rename_directory(domain, old, new)
                .map_err(|errno| failed(&self.domain, "rename", old, errno))
        };
        rename(&self.id, &aside)?;
        sync(&self.domain)?;
        fault::point(Point::MergeMovedAside);
        rename(hidden, &self.id).inspect_err(|_| {
            // If this fails too, the process that finishes the merge does it.
            let _ = rename(&aside, &self.id);
        })
    }

    fn current(&self) -> Result<Directory, Error> {
        let current = self.domain.below(&self.id)?;
        current.ok_or_else(|| failed(&self.domain, "open", &self.id, Errno::NOENT))
    }
}

impl Replacement for DirectoryReplacement {
    /// Creates a file in it, open for reading and writing.
    fn create_image(&self, file: &str) -> Result<OwnedFd, Error> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(self.directory.descriptor(), file, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| failed(&self.directory, "create", file, errno))
    }

    /// Takes over a file of the backup by a hard link. Without hard links, copies it, and each piece counts as
    /// progress. Returns `None` if it is cancelled.
    fn keep(&self, file: &str, progress: &Progress, cancel: &CancellationToken) -> Result<Option<()>, Error> {
        let current = self.current()?;
        let (from, to) = (current.descriptor(), self.directory.descriptor());
        match rustix::fs::linkat(from, file, to, file, AtFlags::empty()) {
            Err(errno) if naming::is_without_links(errno) => self.copy(&current, file, progress, cancel),
            result => result
                .map(Some)
                .map_err(|errno| failed(&self.directory, "link", file, errno)),
        }
    }

    /// Writes a file durably.
    fn write(&self, file: &str, content: &[u8]) -> Result<(), Error> {
        let mut written = File::from(self.create_image(file)?);
        std::io::Write::write_all(&mut written, content)
            .and_then(|()| written.sync_all())
            .map_err(|error| {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                failed(&self.directory, "write", file, errno)
            })
    }

    /// Puts it in the backup's place durably. Fails if another process uses the backup. Afterwards the old directory
    /// has the hidden name. Blocks.
    fn put(&self) -> Result<(), Error> {
        sync(&self.directory)?;
        let _lock = self.current()?.lock(LockKind::Exclusive)?;
        let (domain, hidden) = (self.domain.descriptor(), hidden_name(&self.id));
        match rustix::fs::renameat_with(domain, &hidden, domain, &self.id, RenameFlags::EXCHANGE) {
            Err(errno) if naming::is_without_flags(errno) => self.move_in(&hidden)?,
            result => result.map_err(|errno| failed(&self.domain, "exchange", &self.id, errno))?,
        }
        fault::point(Point::MergeExchanged);
        sync(&self.domain)
    }
}

/// Removes, durably, a replacement that was not put in place, or the replaced directory. Does nothing if there is
/// none. Each file counts as progress. Blocks.
pub fn clear(store: &Directory, name: BackupName<'_>, progress: &Progress) -> Result<(), Error> {
    settle(store, name)?;
    let domain = domain(store, name)?;
    for hidden in [hidden_name(name.id), aside_name(name.id)] {
        if let Some(directory) = domain.below(&hidden)? {
            remove(&domain, &directory, &hidden, name.id, progress)?;
        }
    }
    Ok(())
}

/// Restores, durably, the name of a directory that was moved aside for an unfinished replacement. Does nothing if
/// there is none. Blocks.
pub fn settle(store: &Directory, name: BackupName<'_>) -> Result<(), Error> {
    let Some(domain) = store.below(name.domain)? else {
        return Ok(());
    };
    let aside = aside_name(name.id);
    if domain.below(&aside)?.is_none() || domain.below(name.id)?.is_some() {
        return Ok(());
    }
    naming::rename_directory(domain.descriptor(), &aside, name.id)
        .map_err(|errno| failed(&domain, "rename", &aside, errno))?;
    sync(&domain)
}

fn remove(
    domain: &Directory,
    directory: &Directory,
    hidden: &str,
    id: &str,
    progress: &Progress,
) -> Result<(), Error> {
    let mut names = names_in(directory.descriptor()).map_err(|errno| failed(directory, "read", "", errno))?;
    naming::without_held_open(&mut names);
    for file in names {
        let stat = rustix::fs::statat(directory.descriptor(), &file, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| failed(directory, "stat", &file, errno))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::ForeignFile {
                path: directory.path().join(&file).display().to_string(),
            });
        }
        rustix::fs::unlinkat(directory.descriptor(), &file, AtFlags::empty())
            .map_err(|errno| failed(directory, "remove", &file, errno))?;
        progress.add(1);
    }
    match rustix::fs::unlinkat(domain.descriptor(), hidden, AtFlags::REMOVEDIR) {
        // A program still has an image open, so the directory gets the name of a removal and is removed later.
        Err(Errno::NOTEMPTY | Errno::EXIST) if naming::is_as_good_as_empty(directory.descriptor()) => {
            let later = removed_name(&format!("{id}-{}", uuid::Uuid::new_v4().simple()));
            naming::rename_directory(domain.descriptor(), hidden, &later)
        }
        result => result,
    }
    .map_err(|errno| failed(domain, "remove", hidden, errno))?;
    sync(domain)
}

/// Copies a file durably. Writes back piece by piece, so that the final fsync has less to wait for.
fn copy(
    from: &File,
    mut to: &File,
    progress: &Progress,
    cancel: &CancellationToken,
) -> io::Result<Option<()>> {
    let mut offset = 0;
    loop {
        if cancel.is_cancelled() {
            return Ok(None);
        }
        let Some(copied) = NonZeroU64::new(io::copy(&mut from.take(PIECE), &mut to)?) else {
            return to.sync_all().map(Some);
        };
        // Advice to the kernel: without it, the final fsync takes longer.
        let _ = rustix::fs::fadvise(to, offset, Some(copied), Advice::DontNeed);
        offset += copied.get();
        progress.add(copied.get());
    }
}

fn domain(store: &Directory, name: BackupName<'_>) -> Result<Directory, Error> {
    let domain = store.below(name.domain)?;
    domain.ok_or_else(|| failed(store, "open", name.domain, Errno::NOENT))
}

fn sync(directory: &Directory) -> Result<(), Error> {
    rustix::fs::fsync(directory.descriptor()).map_err(|errno| failed(directory, "fsync", "", errno))
}

fn failed(directory: &Directory, action: &'static str, name: &str, errno: Errno) -> Error {
    Error::io(action, &directory.path().join(name).display().to_string(), errno)
}
