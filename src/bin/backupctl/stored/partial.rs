//! A staging file that gets its name when it is complete.
//!
//! Before publication it has no name (open(2), `O_TMPFILE`), so a killed program leaves nothing. On file systems
//! without `O_TMPFILE` it has a hidden name and a lock. The next restore into the directory removes such files without
//! a lock.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, linkat, renameat_with};
use rustix::io::Errno;

use super::restore_target::Error;

/// A new file with mode 0600. Dropping it before publication removes it.
#[derive(Debug)]
pub struct Partial {
    pub file: File,
    /// The final name.
    path: PathBuf,
    /// The hidden name: before publication, or for the moment in which it replaces another file.
    hidden: PathBuf,
    is_named: bool,
}

impl Partial {
    /// Creates the staging file in the directory of `path`, for the backup `id`.
    pub fn create(path: &Path, id: &str) -> Result<Self, Error> {
        let hidden = hidden(path, id)?;
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let (file, is_named) = match rustix::fs::open(directory(path), flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => (File::from(file), false),
            // The kernel or file system lacks `O_TMPFILE`. If the directory is missing, the other way reports it.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOSYS | Errno::NOENT) => {
                (create_named(&hidden)?, true)
            }
            Err(errno) => return Err(Error::io("create a file beside", path)(errno.into())),
        };
        Ok(Self {
            file,
            path: path.to_owned(),
            hidden,
            is_named,
        })
    }

    /// Publishes the file durably. An existing file is replaced only with `replaces`.
    pub fn publish(&mut self, replaces: bool) -> Result<(), Error> {
        let named = match (self.is_named, replaces) {
            (false, false) => self.link(&self.path),
            (false, true) => self.link_hidden().and_then(|()| self.rename()),
            (true, false) => rename_new(&self.hidden, &self.path),
            (true, true) => self.rename(),
        };
        named.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Error::Exists {
                path: self.path.clone(),
            },
            _ => Error::io("rename the complete file to", &self.path)(error),
        })?;
        self.is_named = false;
        let directory = directory(&self.path);
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(Error::io("fsync the directory", directory))
    }

    fn rename(&self) -> io::Result<()> {
        fs::rename(&self.hidden, &self.path)
    }

    /// Links a file without name; fails if the name exists.
    fn link(&self, name: &Path) -> io::Result<()> {
        let file = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(linkat(CWD, file, CWD, name, AtFlags::SYMLINK_FOLLOW)?)
    }

    fn link_hidden(&mut self) -> io::Result<()> {
        if let Err(error) = self.link(&self.hidden) {
            if error.kind() != io::ErrorKind::AlreadyExists || !remove_abandoned(&self.hidden)? {
                return Err(error);
            }
            self.link(&self.hidden)?;
        }
        self.is_named = true;
        Ok(())
    }

    /// Removes the file. It has lost its name, or never had one.
    pub fn discard(&mut self) -> io::Result<()> {
        match std::mem::take(&mut self.is_named) {
            true => fs::remove_file(&self.hidden),
            false => Ok(()),
        }
    }
}

pub fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn hidden(path: &Path, id: &str) -> Result<PathBuf, Error> {
    let name = path.file_name().ok_or_else(|| Error::WrongType {
        path: path.to_owned(),
    })?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{id}.partial"));
    Ok(path.with_file_name(hidden))
}

/// Creates a file with the hidden name. Fails if another process does so at the same time.
fn create_named(hidden: &Path) -> Result<File, Error> {
    loop {
        let created = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(hidden);
        let file = match created {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                match remove_abandoned(hidden).map_err(Error::io("remove", hidden))? {
                    true => continue,
                    false => {
                        return Err(Error::Partial {
                            path: hidden.to_owned(),
                        });
                    }
                }
            }
            Err(error) => return Err(Error::io("create", hidden)(error)),
        };
        // On a file system without locks, the process that wants to remove it gets the error.
        let _ = file.try_lock();
        // Another process may have removed it as abandoned before it was locked.
        if file.metadata().map_err(Error::io("stat", hidden))?.nlink() > 0 {
            return Ok(file);
        }
    }
}

/// Removes the staging file of a program that has ended. Returns false if it is still being written.
fn remove_abandoned(hidden: &Path) -> io::Result<bool> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(hidden) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        file => file?,
    };
    if !file.metadata()?.is_file() || file.try_lock().is_err() {
        return Ok(false);
    }
    match fs::remove_file(hidden) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        removed => removed.map(|()| true),
    }
}

/// Renames, but fails if `to` exists.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Without RENAME_NOREPLACE, a hard link does not replace a file either.
        Err(Errno::INVAL | Errno::NOSYS) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abandoned_hidden_file_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let hidden = dir.path().join(".vda.raw.id.partial");
        let writing = create_named(&hidden).unwrap();
        assert!(matches!(create_named(&hidden), Err(Error::Partial { .. })));
        drop(writing);
        fs::write(&hidden, "abandoned").unwrap();
        let next = create_named(&hidden).unwrap();
        assert_eq!(next.metadata().unwrap().len(), 0);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_with_a_hidden_name_is_published_and_discarded_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vda.raw");
        let hidden = hidden(&path, "id").unwrap();
        let named = || Partial {
            file: create_named(&hidden).unwrap(),
            path: path.clone(),
            hidden: hidden.clone(),
            is_named: true,
        };
        named().discard().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        named().publish(false).unwrap();
        let mut second = named();
        assert!(matches!(second.publish(false), Err(Error::Exists { .. })));
        second.publish(true).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
