//! Where a restored disk goes: a file that has its name only when it is complete, or a block device.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;

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
    /// Another restore into the same file runs, or one was killed.
    #[error(
        "{} exists: another restore to there is running, or one did not end; then remove it",
        path.display()
    )]
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
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// An open place. Unless it is published, what was begun is removed with it.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    file: File,
    kind: Kind,
    begun: bool,
}

#[derive(Debug)]
enum Kind {
    /// Written under this name first.
    File {
        partial: PathBuf,
        replaces: bool,
    },
    Device,
    Published,
}

impl Place {
    /// Opens a device, or makes a file beside the one that it will be. `id` is of the backup.
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
        let Some(name) = path.file_name() else {
            return Err(Error::WrongType { path });
        };
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{id}.partial"));
        let partial = path.with_file_name(hidden);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&partial)
            .map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => Error::Partial {
                    path: partial.clone(),
                },
                _ => Error::io("create", &partial)(error),
            })?;
        let place = Self {
            path,
            file,
            kind: Kind::File {
                partial,
                replaces: there.is_some(),
            },
            begun: false,
        };
        if let Some(there) = there {
            place.belong_as(&there)?;
        }
        Ok(place)
    }

    fn device(path: PathBuf) -> Result<Self, Error> {
        let flags = OFlags::EXCL | OFlags::NONBLOCK;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.bits().cast_signed())
            .open(&path)
            .map_err(|error| match error.kind() {
                io::ErrorKind::ResourceBusy => Error::InUse { path: path.clone() },
                _ => Error::io("open", &path)(error),
            })?;
        Ok(Self {
            path,
            file,
            kind: Kind::Device,
            begun: false,
        })
    }

    /// Gives the new file the owner and mode of the one that it replaces: who used that one can use this.
    fn belong_as(&self, there: &Metadata) -> Result<(), Error> {
        let made = self.file.metadata().map_err(Error::io("look at", &self.path))?;
        if (made.uid(), made.gid()) != (there.uid(), there.gid()) {
            std::os::unix::fs::fchown(&self.file, Some(there.uid()), Some(there.gid()))
                .map_err(Error::io("keep the owner of", &self.path))?;
        }
        self.file
            .set_permissions(Permissions::from_mode(there.mode() & 0o777))
            .map_err(Error::io("keep the mode of", &self.path))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn is_device(&self) -> bool {
        matches!(self.kind, Kind::Device)
    }

    /// A descriptor to write to. What is there is worth nothing from now on, until it is published.
    pub fn begin(&mut self) -> Result<OwnedFd, Error> {
        self.begun = true;
        let file = self.file.try_clone();
        file.map(OwnedFd::from)
            .map_err(Error::io("duplicate", &self.path))
    }

    /// Gives the file its name, durably.
    pub fn publish(&mut self) -> Result<(), Error> {
        if let Kind::File { partial, replaces } = &self.kind {
            let renamed = match replaces {
                true => fs::rename(partial, &self.path),
                false => rename_new(partial, &self.path),
            };
            renamed.map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => Error::Exists {
                    path: self.path.clone(),
                },
                _ => Error::io("give its name to", &self.path)(error),
            })?;
        }
        let file = std::mem::replace(&mut self.kind, Kind::Published);
        if let (Kind::File { .. }, Some(directory)) = (file, self.path.parent()) {
            let directory = match directory.as_os_str().is_empty() {
                true => Path::new("."),
                false => directory,
            };
            File::open(directory)
                .and_then(|directory| directory.sync_all())
                .map_err(Error::io("fsync the directory", directory))?;
        }
        Ok(())
    }
}

/// Renames to a name that nothing has.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system without that flag: a hard link does not replace anything either.
        Err(Errno::INVAL | Errno::NOSYS) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        result => Ok(result?),
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let cleared = match &self.kind {
            Kind::File { partial, .. } => fs::remove_file(partial),
            Kind::Device if self.begun => self
                .file
                .write_all_at(&vec![0; WIPED_HEAD], 0)
                .and_then(|()| self.file.sync_all()),
            Kind::Device | Kind::Published => Ok(()),
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
        assert!(matches!(
            Place::open(&path, "id", false),
            Err(Error::Partial { .. })
        ));
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
