//! A store: a directory of the administrator's in which the service chooses the files.
//!
//! `<store>/<domain>/<backup id>/` has the images, `manifest.json` and the resolved document. Until the backup is
//! complete the directory has a staging name, so that a directory with a backup's name is always a complete backup.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;

use super::identity::FileId;
use super::inventory::{Shelf, read_file};
use super::removal::{removed_name, sweep};
use super::{BackupName, Error, Publication, Target, mark, naming};
use crate::fault::{self, Point};
use crate::model::{MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, PROTECTED_NAME};
use crate::path::{self, Trust, check_trust, open_directory};

const DIRECTORY_MODE: Mode = Mode::RWXU;

/// The directory of a backup that is not good yet.
#[derive(Debug)]
pub struct Partial {
    /// Where the backup will be.
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
    /// It had its name when it was found.
    published: Option<Published>,
}

/// What a backup that was found under its final name says of itself.
#[derive(Debug, Clone)]
pub struct Published {
    pub manifest: Manifest,
    /// The manifest as it was written.
    pub text: String,
    /// Nobody removes it.
    pub protected: bool,
}

/// Creates the directory of the default store, at the start of the service: the administrator made the one above it.
pub fn ensure(path: &Path) -> Result<(), Error> {
    let shown = path.display().to_string();
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::NoDirectory { path: shown });
    };
    let parent = open_directory(parent, Trust::Administrator)?;
    make_directory(&parent, name).map_err(|errno| Error::io("create", &shown, errno))?;
    Ok(())
}

/// Whether it was made now.
fn make_directory<P: rustix::path::Arg>(parent: &OwnedFd, name: P) -> Result<bool, Errno> {
    match rustix::fs::mkdirat(parent, name, DIRECTORY_MODE) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(errno) => Err(errno),
    }
}

pub(super) fn open_child(parent: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

fn partial_name(id: &str) -> String {
    format!(".{id}.partial")
}

/// The backup whose directory has that name before it is good.
pub fn partial_backup(name: &str) -> Option<&str> {
    name.strip_prefix('.')?.strip_suffix(".partial")
}

/// What a directory holds.
pub(super) fn names_in(directory: &OwnedFd) -> Result<Vec<String>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

fn sync(directory: &OwnedFd, shown: &str) -> Result<(), Error> {
    rustix::fs::fsync(directory).map_err(|errno| Error::io("fsync the directory of", shown, errno))
}

/// The manifest of a directory that has its final name.
fn published(directory: &OwnedFd, path: &Path, id: &str) -> Result<Published, Error> {
    let wrong = |why: String| Error::NotVouchedFor {
        path: path.display().to_string(),
        why,
    };
    let (bytes, _) = read_file(directory, path, MANIFEST_NAME, MAX_MANIFEST_BYTES)?;
    let manifest = Manifest::parse(&bytes).map_err(|error| wrong(error.to_string()))?;
    if manifest.id != id {
        return Err(wrong(format!("it is that of '{}'", manifest.id)));
    }
    Ok(Published {
        manifest,
        text: String::from_utf8_lossy(&bytes).into_owned(),
        protected: rustix::fs::statat(directory, PROTECTED_NAME, AtFlags::SYMLINK_NOFOLLOW).is_ok(),
    })
}

impl Partial {
    /// Makes it, if the store has that mark.
    pub fn create(store_path: &Path, backup: BackupName, known: Option<&str>) -> Result<Self, Error> {
        let store = Shelf::of_store(store_path)?;
        if let Some(known) = known {
            mark::check_mark_of(&store, known)?;
        }
        let store = store.into_descriptor();
        let domain_path = store_path.join(backup.domain);
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
                    // Ours and empty, or no longer ours: then it stays.
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
        let domain = open_child(store, backup.domain).map_err(|errno| match errno {
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
        // Empty and ours: if it can't even be removed, the returned error is the cause.
        let remove = |name: &str| {
            let _ = rustix::fs::unlinkat(&domain, name, AtFlags::REMOVEDIR);
        };
        let directory = open_child(&domain, &partial).map_err(|errno| {
            remove(&partial);
            Error::io("open", &shown, errno)
        })?;
        naming::try_naming(&domain, &partial, naming::rename_directory).map_err(|errno| {
            remove(&naming::trial_name(&partial));
            remove(&partial);
            Error::io("give its name to", &shown, errno)
        })?;
        sweep(&domain);
        Ok((domain, directory, partial, path))
    }

    /// Finds the directory of a backup again that a former process made, under either of its names; `images` are the names
    /// of the files that it holds. Nothing if it is not there. Fails if it has its final name without a manifest that vouches
    /// for it: nobody knows then whether it is a backup that others depend on.
    pub fn find(store_path: &Path, backup: BackupName, images: &[&str]) -> Result<Option<Self>, Error> {
        let store = open_directory(store_path, Trust::Administrator)?;
        let domain_path = store_path.join(backup.domain);
        let shown = domain_path.display().to_string();
        let domain = match open_child(&store, backup.domain) {
            Ok(domain) => domain,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP | Errno::NOTDIR) => return Err(path::Error::NotADirectory { path: shown }.into()),
            Err(errno) => return Err(Error::io("open", &shown, errno)),
        };
        let partial = partial_name(backup.id);
        // From a process that ended while it was tried.
        let _ = rustix::fs::unlinkat(&domain, naming::trial_name(&partial), AtFlags::REMOVEDIR);
        let path = domain_path.join(backup.id);
        for (name, renamed) in [(backup.id, true), (partial.as_str(), false)] {
            let directory = match open_child(&domain, name) {
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
                // If it is empty, nobody needs it.
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

    /// What it says of itself, if it had its final name when it was found. Such a directory is a whole backup, whatever else is
    /// on record, so it is never renamed or removed here.
    pub fn published(&self) -> Option<&Published> {
        self.published.as_ref()
    }

    /// The image of that name, if it is there.
    pub fn find_file(&self, disk: &str, file_name: &str) -> Result<Option<Target>, Error> {
        let label = self.path.join(file_name).display().to_string();
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.directory, file_name, flags, Mode::empty()) {
            Ok(file) => {
                let publication = Publication::InStore {
                    file_name: file_name.to_owned(),
                };
                Target::new(disk, label, file, publication).map(Some)
            }
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(Error::io("open", &label, errno)),
        }
    }

    pub fn create_file(&self, disk: &str, file_name: &str) -> Result<Target, Error> {
        let label = self.path.join(file_name).display().to_string();
        let file = self.new_file(file_name, &label)?;
        let publication = Publication::InStore {
            file_name: file_name.to_owned(),
        };
        Target::new(disk, label, file, publication)
    }

    /// The image of the target's once more, as another open file; nothing if that can't be had.
    pub fn open_again(&self, target: &Target) -> Option<OwnedFd> {
        let Publication::InStore { file_name } = &target.publication else {
            return None;
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, file_name, flags, Mode::empty()).ok()?;
        let stat = rustix::fs::fstat(&file).ok()?;
        (FileId::of(&stat) == target.id).then_some(file)
    }

    pub fn remove_file(&self, file_name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(
            &self.directory,
            file_name,
            AtFlags::empty(),
        )?)
    }

    /// Writes the records, gives the directory its name, and makes all of that durable. What has its name already had its
    /// records before.
    pub fn publish(&mut self, records: &[(&str, &[u8])]) -> Result<(), Error> {
        let shown = self.path.display().to_string();
        if !self.renamed {
            self.write_records(records)?;
            sync(&self.directory, &shown)?;
            fault::point(Point::BeforeRename);
            naming::rename_directory(&self.domain, &self.partial, &self.name)
                .map_err(|errno| Error::io("give its name to", &shown, errno))?;
            self.renamed = true;
            fault::point(Point::Renamed);
        }
        sync(&self.domain, &shown)?;
        // Whoever made the domain's directory may not have come as far as this.
        sync(&self.store, &shown)
    }

    fn write_records(&mut self, records: &[(&str, &[u8])]) -> Result<(), Error> {
        for left in std::mem::take(&mut self.records) {
            rustix::fs::unlinkat(&self.directory, &left, AtFlags::empty())
                .map_err(|errno| Error::io("remove", &self.path.join(&left).display().to_string(), errno))?;
        }
        for (name, content) in records {
            let label = self.path.join(name).display().to_string();
            let file = self.new_file(name, &label)?;
            self.records.push((*name).to_owned());
            let mut file = std::fs::File::from(file);
            io::Write::write_all(&mut file, content)
                .and_then(|()| file.sync_all())
                .map_err(|error| {
                    Error::io("write", &label, Errno::from_io_error(&error).unwrap_or(Errno::IO))
                })?;
        }
        Ok(())
    }

    /// Takes the name back, if it was given.
    pub fn retract(&mut self) -> io::Result<()> {
        if self.renamed {
            rustix::fs::renameat(&self.domain, &self.name, &self.domain, &self.partial)?;
            self.renamed = false;
            rustix::fs::fsync(&self.domain)?;
        }
        Ok(())
    }

    /// Removes the directory; its images are gone already.
    pub fn discard(&self) -> io::Result<()> {
        for record in &self.records {
            self.remove_file(record)?;
        }
        let name = if self.renamed { &self.name } else { &self.partial };
        match rustix::fs::unlinkat(&self.domain, name, AtFlags::REMOVEDIR) {
            // QEMU has an image open still: the directory goes later.
            Err(Errno::NOTEMPTY | Errno::EXIST) if naming::is_as_good_as_empty(&self.directory) => {
                naming::rename_directory(&self.domain, name, &removed_name(&self.name))?;
            }
            result => result?,
        }
        if self.domain_created {
            match rustix::fs::unlinkat(&self.store, &self.domain_name, AtFlags::REMOVEDIR) {
                // Another backup of the same domain has come meanwhile.
                Ok(()) | Err(Errno::NOTEMPTY | Errno::EXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn new_file(&self, name: &str, label: &str) -> Result<OwnedFd, Error> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.directory, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| Error::io("create", label, errno))
    }
}
