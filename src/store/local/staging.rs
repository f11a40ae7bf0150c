//! Staging: the directory of a backup before it has its final name; publishing and discarding it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::super::{Published, Staging};
use super::directory::{Directory, read_file};
use super::removal::{removed_name, sweep};
use super::{BackupName, Error};
use crate::fault::{self, Point};
use crate::files::{FileId, names_in, naming, open_below};
use crate::model::{MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, PROTECTED_NAME};
use crate::path::{self, Trust, check_trust, open_directory};

const DIRECTORY_MODE: Mode = Mode::RWXU;

/// The staging directory of a backup.
#[derive(Debug)]
pub struct StagingDirectory {
    /// The final path of the backup.
    path: PathBuf,
    store: OwnedFd,
    domain: OwnedFd,
    domain_name: String,
    domain_created: bool,
    directory: OwnedFd,
    partial: String,
    name: String,
    records: Vec<String>,
    renamed: bool,
    /// The content of a backup that had its final name when it was found.
    published: Option<Published>,
}

/// Creates the directory of the default store at the start of the service. Its parent directory is the
/// administrator's.
pub fn ensure(path: &Path) -> Result<(), Error> {
    let shown = path.display().to_string();
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::NoDirectory { path: shown });
    };
    let parent = open_directory(parent, Trust::Administrator)?;
    make_directory(&parent, name).map_err(|errno| Error::io("create", &shown, errno))?;
    Ok(())
}

/// Creates a directory. Returns false if it exists already.
fn make_directory<P: rustix::path::Arg>(parent: &OwnedFd, name: P) -> Result<bool, Errno> {
    match rustix::fs::mkdirat(parent, name, DIRECTORY_MODE) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn partial_name(id: &str) -> String {
    format!(".{id}.partial")
}

/// Returns the backup of a staging directory.
pub fn staged_backup(name: &str) -> Option<&str> {
    name.strip_prefix('.')?.strip_suffix(".partial")
}

fn sync(directory: &OwnedFd, shown: &str) -> Result<(), Error> {
    rustix::fs::fsync(directory).map_err(|errno| Error::io("fsync the directory of", shown, errno))
}

/// Reads the manifest and the protection of a directory with its final name.
fn published(directory: &OwnedFd, path: &Path, id: &str) -> Result<Published, Error> {
    let wrong = |why: String| Error::NoManifest {
        path: path.display().to_string(),
        why,
    };
    let (bytes, _) = read_file(directory, path, MANIFEST_NAME, MAX_MANIFEST_BYTES)?;
    let manifest = Manifest::parse(&bytes).map_err(|error| wrong(error.to_string()))?;
    if manifest.id != id {
        return Err(wrong(format!("it has the manifest of '{}'", manifest.id)));
    }
    Ok(Published {
        manifest,
        text: String::from_utf8_lossy(&bytes).into_owned(),
        protected: rustix::fs::statat(directory, PROTECTED_NAME, AtFlags::SYMLINK_NOFOLLOW).is_ok(),
    })
}

impl StagingDirectory {
    /// Creates the staging directory.
    pub fn create(store: &Directory, backup: BackupName<'_>) -> Result<Self, Error> {
        let domain_path = store.path().join(backup.domain);
        let store = store.duplicate()?;
        let shown = domain_path.display().to_string();
        let domain_created =
            make_directory(&store, backup.domain).map_err(|errno| Error::io("create", &shown, errno))?;
        let made = Self::create_in(&store, domain_path, backup);
        match made {
            Ok((domain, directory, partial, path)) => Ok(Self {
                path,
                store,
                domain,
                domain_name: backup.domain.to_owned(),
                domain_created,
                directory,
                partial,
                name: backup.id.to_owned(),
                records: Vec::new(),
                renamed: false,
                published: None,
            }),
            Err(error) => {
                if domain_created {
                    // Removes the domain's directory only if it is empty.
                    let _ = rustix::fs::unlinkat(&store, backup.domain, AtFlags::REMOVEDIR);
                }
                Err(error)
            }
        }
    }

    fn create_in(
        store: &OwnedFd,
        domain_path: PathBuf,
        backup: BackupName,
    ) -> Result<(OwnedFd, OwnedFd, String, PathBuf), Error> {
        let shown = domain_path.display().to_string();
        let domain = open_below(store, backup.domain).map_err(|errno| match errno {
            Errno::LOOP | Errno::NOTDIR => path::Error::NotADirectory { path: shown.clone() }.into(),
            errno => Error::io("open", &shown, errno),
        })?;
        let stat = rustix::fs::fstat(&domain).map_err(|errno| Error::io("stat", &shown, errno))?;
        check_trust(&stat, true).map_err(|why| Error::Untrusted {
            path: shown.clone(),
            why,
        })?;
        let partial = partial_name(backup.id);
        let path = domain_path.join(backup.id);
        let shown = path.display().to_string();
        rustix::fs::mkdirat(&domain, &partial, DIRECTORY_MODE)
            .map_err(|errno| Error::io("create", &shown, errno))?;
        // The directory is empty. If the service cannot remove it either, the returned error shows the cause.
        let remove = |name: &str| {
            let _ = rustix::fs::unlinkat(&domain, name, AtFlags::REMOVEDIR);
        };
        let directory = open_below(&domain, &partial).map_err(|errno| {
            remove(&partial);
            Error::io("open", &shown, errno)
        })?;
        naming::try_naming(&domain, &partial, naming::rename_directory).map_err(|errno| {
            remove(&naming::trial_name(&partial));
            remove(&partial);
            Error::io("publish", &shown, errno)
        })?;
        sweep(&domain);
        Ok((domain, directory, partial, path))
    }

    /// Finds the directory of a backup that an earlier process created, under its staging or final name. `images` are
    /// the names of its files. Returns `None` if it does not exist. Fails if it has its final name without the
    /// backup's manifest, because it may then be another backup that others depend on.
    pub fn find(store: &Directory, backup: BackupName<'_>, images: &[&str]) -> Result<Option<Self>, Error> {
        let domain_path = store.path().join(backup.domain);
        let store = store.duplicate()?;
        let shown = domain_path.display().to_string();
        let domain = match open_below(&store, backup.domain) {
            Ok(domain) => domain,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP | Errno::NOTDIR) => return Err(path::Error::NotADirectory { path: shown }.into()),
            Err(errno) => return Err(Error::io("open", &shown, errno)),
        };
        let partial = partial_name(backup.id);
        // A process that ended during the trial may have left this name.
        let _ = rustix::fs::unlinkat(&domain, naming::trial_name(&partial), AtFlags::REMOVEDIR);
        let path = domain_path.join(backup.id);
        for (name, renamed) in [(backup.id, true), (partial.as_str(), false)] {
            let directory = match open_below(&domain, name) {
                Ok(directory) => directory,
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(Error::io("open", &path.display().to_string(), errno)),
            };
            let published = match renamed {
                true => Some(published(&directory, &path, backup.id)?),
                false => None,
            };
            let mut records = names_in(&directory)
                .map_err(|errno| Error::io("read", &path.display().to_string(), errno))?;
            records.retain(|name| !images.contains(&name.as_str()));
            return Ok(Some(Self {
                path,
                store,
                domain,
                domain_name: backup.domain.to_owned(),
                // An empty directory can be removed.
                domain_created: true,
                directory,
                partial: partial.clone(),
                name: backup.id.to_owned(),
                records,
                renamed,
                published,
            }));
        }
        Ok(None)
    }

    fn shown(&self, file: &str) -> String {
        self.path.join(file).display().to_string()
    }

    fn write_records(&mut self, records: &[(&str, &[u8])]) -> Result<(), Error> {
        for left in std::mem::take(&mut self.records) {
            rustix::fs::unlinkat(&self.directory, &left, AtFlags::empty())
                .map_err(|errno| Error::io("remove", &self.shown(&left), errno))?;
        }
        for (name, content) in records {
            let file = self.create_image(name)?;
            self.records.push((*name).to_owned());
            let mut file = std::fs::File::from(file);
            io::Write::write_all(&mut file, content)
                .and_then(|()| file.sync_all())
                .map_err(|error| {
                    Error::io(
                        "write",
                        &self.shown(name),
                        Errno::from_io_error(&error).unwrap_or(Errno::IO),
                    )
                })?;
        }
        Ok(())
    }
}

impl Staging for StagingDirectory {
    fn location_of(&self, file: &str) -> PathBuf {
        self.path.join(file)
    }

    fn create_image(&self, file: &str) -> Result<OwnedFd, Error> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.directory, file, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| Error::io("create", &self.shown(file), errno))
    }

    fn find_image(&self, file: &str) -> Result<Option<OwnedFd>, Error> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.directory, file, flags, Mode::empty()) {
            Ok(file) => Ok(Some(file)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(Error::io("open", &self.shown(file), errno)),
        }
    }

    fn open_again(&self, file: &str, id: FileId) -> Option<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, file, flags, Mode::empty()).ok()?;
        let stat = rustix::fs::fstat(&file).ok()?;
        (FileId::of(&stat) == id).then_some(file)
    }

    fn remove_image(&self, file: &str) -> Result<(), Error> {
        rustix::fs::unlinkat(&self.directory, file, AtFlags::empty())
            .map_err(|errno| Error::io("remove", &self.shown(file), errno))
    }

    /// Writes the records, renames the directory to its final name, and makes all of that durable. A directory with
    /// its final name has its records already.
    fn publish(&mut self, records: &[(&str, &[u8])]) -> Result<(), Error> {
        let shown = self.path.display().to_string();
        if !self.renamed {
            self.write_records(records)?;
            sync(&self.directory, &shown)?;
            fault::point(Point::BeforeRename);
            naming::rename_directory(&self.domain, &self.partial, &self.name)
                .map_err(|errno| Error::io("publish", &shown, errno))?;
            self.renamed = true;
            fault::point(Point::Renamed);
        }
        sync(&self.domain, &shown)?;
        // The process that created the domain's directory may have ended before it synced the store.
        sync(&self.store, &shown)
    }

    /// Renames a published directory to its staging name again.
    fn retract(&mut self) -> Result<(), Error> {
        if self.renamed {
            let shown = self.path.display().to_string();
            rustix::fs::renameat(&self.domain, &self.name, &self.domain, &self.partial)
                .map_err(|errno| Error::io("rename", &shown, errno))?;
            self.renamed = false;
            sync(&self.domain, &shown)?;
        }
        Ok(())
    }

    /// Removes the directory.
    fn discard(&self) -> Result<(), Error> {
        for record in &self.records {
            self.remove_image(record)?;
        }
        let name = if self.renamed { &self.name } else { &self.partial };
        let removed = match rustix::fs::unlinkat(&self.domain, name, AtFlags::REMOVEDIR) {
            // QEMU still has an image open, so the directory gets the name of a removal and is removed later.
            Err(Errno::NOTEMPTY | Errno::EXIST) if naming::is_as_good_as_empty(&self.directory) => {
                naming::rename_directory(&self.domain, name, &removed_name(&self.name))
            }
            removed => removed,
        };
        let failed = |errno| Error::io("remove", &self.path.display().to_string(), errno);
        removed.map_err(failed)?;
        if self.domain_created {
            match rustix::fs::unlinkat(&self.store, &self.domain_name, AtFlags::REMOVEDIR) {
                // Another backup of the domain was created since.
                Ok(()) | Err(Errno::NOTEMPTY | Errno::EXIST) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        Ok(())
    }

    fn published(&self) -> Option<&Published> {
        self.published.as_ref()
    }
}
