//! Removes a backup from its store atomically: its directory is renamed to a name that marks the
//! removal, then its files are removed, then the directory.
//!
//! Only the backup's own files are removed: the images that its manifest names, and its records. No link is followed.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Stat};
use rustix::io::Errno;

use super::inventory::{Held, Sharing, Shelf};
use super::store::names_in;
use super::{BackupName, Error, naming};
use crate::fault::{self, Point};
use crate::model::{DEFINITION_NAME, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, PROTECTED_NAME};
use crate::offload::Progress;

/// What [`Stat::st_blocks`] counts in.
const BLOCK: u64 = 512;

/// What lies beside a backup's images; the manifest last, because it names these.
const RECORDS: [&str; 3] = [DEFINITION_NAME, PROTECTED_NAME, MANIFEST_NAME];

/// A backup's directory that no other process uses, and that is to be removed.
#[derive(Debug)]
pub struct Removal {
    domain: Shelf,
    directory: Shelf,
    path: PathBuf,
    id: String,
    /// It has the name already that says that it is being removed.
    begun: bool,
    /// What is in it. The manifest is the last: it names the others.
    files: Vec<String>,
    /// Bytes on the disk that are free when it is gone.
    space: u64,
    /// Nothing where one only looks.
    _held: Option<Held>,
}

/// What a backup's directory is called while it is being removed.
pub fn removed_name(id: &str) -> String {
    format!(".{id}.removed")
}

/// The backup whose directory has that name while it is being removed.
pub fn removed_backup(name: &str) -> Option<&str> {
    name.strip_prefix('.')?.strip_suffix(".removed")
}

/// Removes the directories of removed backups in a domain's directory that were not empty at the time, because a program had
/// files of theirs open. Those that still aren't empty stay.
pub fn sweep(domain: &OwnedFd) {
    let names = names_in(domain).unwrap_or_default();
    for name in names.iter().filter(|name| removed_backup(name).is_some()) {
        let _ = rustix::fs::unlinkat(domain, name, AtFlags::REMOVEDIR);
    }
}

/// Resumes the removal of a backup that the catalog has no record of. Does nothing if it has not begun, or if another
/// process is removing it. Blocks.
pub fn finish_removal(store: &Path, name: BackupName, progress: &Progress) -> Result<(), Error> {
    let Some(domain) = Shelf::of_store(store)?.below(name.domain)? else {
        return Ok(());
    };
    let Some(directory) = domain.below(&removed_name(name.id))? else {
        return Ok(());
    };
    // It goes last: where it is not there, neither is anything that it would name.
    let manifest = directory.read(MANIFEST_NAME, MAX_MANIFEST_BYTES);
    let manifest = manifest.ok().and_then(|(bytes, _)| Manifest::parse(&bytes).ok());
    let images = manifest.as_ref().map(Manifest::images).unwrap_or_default();
    match Removal::hold(store, name, &images) {
        Ok(Some(removal)) if removal.is_begun() => removal.remove(progress).map(drop),
        Ok(_) | Err(Error::InUse { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

impl Removal {
    /// Takes the directory of a backup for oneself, under either of its names; nothing if it is not there. `images` are the
    /// files that its manifest names. Blocks.
    pub fn hold(store: &Path, name: BackupName, images: &[&str]) -> Result<Option<Self>, Error> {
        Self::find(store, name, images, true)
    }

    /// As [`Self::hold`], of one that is to be renamed: fails if its file system could not do that.
    pub fn hold_to_rename(store: &Path, name: BackupName, images: &[&str]) -> Result<Option<Self>, Error> {
        let held = Self::hold(store, name, images)?;
        let Some(removal) = held.as_ref().filter(|held| !held.begun) else {
            return Ok(held);
        };
        match naming::check_movable(removal.domain.descriptor(), &removal.id) {
            Ok(()) => Ok(held),
            Err(Errno::XDEV) => Err(Error::Immovable {
                path: removal.path.display().to_string(),
            }),
            Err(errno) => Err(removal.failed("rename", "", errno)),
        }
    }

    /// How many bytes would be free without it; nothing if it is not there. Takes no lock. Blocks.
    pub fn space_of(store: &Path, name: BackupName, images: &[&str]) -> Result<Option<u64>, Error> {
        let found = Self::find(store, name, images, false)?;
        Ok(found.map(|found| found.space))
    }

    fn find(store: &Path, name: BackupName, images: &[&str], hold: bool) -> Result<Option<Self>, Error> {
        let Some(domain) = Shelf::of_store(store)?.below(name.domain)? else {
            // The service never removes that: the whole store may be elsewhere.
            return Err(Error::NotThere {
                path: store.join(name.domain).display().to_string(),
            });
        };
        for (entry, begun) in [(removed_name(name.id), true), (name.id.to_owned(), false)] {
            let Some(directory) = domain.below(&entry)? else {
                continue;
            };
            let held = hold.then(|| directory.hold(Sharing::Exclusive)).transpose()?;
            let mut removal = Self {
                path: directory.path().to_owned(),
                domain,
                directory,
                id: name.id.to_owned(),
                begun,
                files: Vec::new(),
                space: 0,
                _held: held,
            };
            removal.take_stock(images)?;
            return Ok(Some(removal));
        }
        Ok(None)
    }

    /// Finds what is to go, all of which must be the backup's.
    fn take_stock(&mut self, images: &[&str]) -> Result<(), Error> {
        let mut names =
            names_in(self.directory.descriptor()).map_err(|errno| self.failed("read", "", errno))?;
        naming::without_held_open(&mut names);
        for name in &names {
            let known = images.contains(&name.as_str()) || RECORDS.contains(&name.as_str());
            let stat = match known {
                true => self.stat(name)?,
                false => None,
            };
            let Some(stat) = stat else {
                return Err(Error::NotTheBackups {
                    path: self.path.join(name).display().to_string(),
                });
            };
            if stat.st_nlink == 1 {
                self.space += stat.st_blocks.cast_unsigned() * BLOCK;
            }
        }
        let listed = images.iter().chain(&RECORDS);
        let there = listed.filter(|listed| names.iter().any(|name| name == **listed));
        self.files = there.map(|name| (*name).to_owned()).collect();
        Ok(())
    }

    /// Nothing if it is no regular file.
    fn stat(&self, name: &str) -> Result<Option<Stat>, Error> {
        let stat = rustix::fs::statat(self.directory.descriptor(), name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| self.failed("stat", name, errno))?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        Ok(regular.then_some(stat))
    }

    /// Whether it was begun before, so that there is no way back.
    pub fn is_begun(&self) -> bool {
        self.begun
    }

    /// Removes it, durably; gives the bytes that are free now. Each file counts as progress. Blocks.
    pub fn remove(self, progress: &Progress) -> Result<u64, Error> {
        let (domain, hidden) = (self.domain.descriptor(), removed_name(&self.id));
        let sync =
            || rustix::fs::fsync(domain).map_err(|errno| self.failed("fsync the directory of", "", errno));
        if !self.begun {
            naming::rename_directory(domain, &self.id, &hidden)
                .map_err(|errno| self.failed("rename", "", errno))?;
            sync()?;
            progress.add(1);
        }
        fault::point(Point::RemovalRenamed);
        for (index, name) in self.files.iter().enumerate() {
            rustix::fs::unlinkat(self.directory.descriptor(), name, AtFlags::empty())
                .map_err(|errno| self.failed("remove", name, errno))?;
            progress.add(1);
            if index == 0 {
                fault::point(Point::RemovalBegun);
            }
        }
        match rustix::fs::unlinkat(domain, &hidden, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            // A program has an image open still. Nothing of the backup is left; the directory goes later.
            Err(Errno::NOTEMPTY | Errno::EXIST)
                if naming::is_as_good_as_empty(self.directory.descriptor()) =>
            {
                tracing::info!(
                    directory = %self.path.display(),
                    "a removed backup's files are still open somewhere: their space is free when they are closed"
                );
            }
            Err(errno) => return Err(self.failed("remove", "", errno)),
        }
        progress.add(1);
        sweep(domain);
        sync()?;
        fault::point(Point::RemovalEmptied);
        Ok(self.space)
    }

    fn failed(&self, action: &'static str, name: &str, errno: Errno) -> Error {
        let path = match name {
            "" => self.path.clone(),
            name => self.path.join(name),
        };
        Error::io(action, &path.display().to_string(), errno)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// A store with a backup `a` of `web`; below `/root` or wherever only root and the service's user have a hand.
    fn store() -> tempfile::TempDir {
        let directory = tempfile::Builder::new().tempdir_in("/var/tmp").unwrap();
        let backup = directory.path().join("web/a");
        std::fs::create_dir_all(&backup).unwrap();
        for path in ["", "web", "web/a"] {
            let mode = std::fs::Permissions::from_mode(0o700);
            std::fs::set_permissions(directory.path().join(path), mode).unwrap();
        }
        for name in ["vda.qcow2", "backup.xml", "manifest.json"] {
            std::fs::write(backup.join(name), "x").unwrap();
        }
        directory
    }

    fn hold(store: &Path) -> Result<Option<Removal>, Error> {
        let name = BackupName {
            domain: "web",
            id: "a",
        };
        Removal::hold(store, name, &["vda.qcow2", "vdb.qcow2"])
    }

    #[test]
    fn a_backup_goes_as_a_whole_and_its_removal_can_be_resumed() {
        let store = store();
        let removal = hold(store.path()).unwrap().unwrap();
        assert!(!removal.is_begun());
        assert!(matches!(hold(store.path()), Err(Error::InUse { .. })));
        assert!(removal.remove(&Progress::default()).unwrap() > 0);
        assert!(hold(store.path()).unwrap().is_none());
        let hidden = store.path().join("web/.a.removed");
        std::fs::create_dir(&hidden).unwrap();
        std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o700)).unwrap();
        std::fs::write(hidden.join("manifest.json"), "x").unwrap();
        let removal = hold(store.path()).unwrap().unwrap();
        assert!(removal.is_begun());
        removal.remove(&Progress::default()).unwrap();
        assert_eq!(std::fs::read_dir(store.path().join("web")).unwrap().count(), 0);
        assert_eq!(removed_backup(".a.removed"), Some("a"));
        std::fs::remove_dir(store.path().join("web")).unwrap();
        assert!(matches!(hold(store.path()), Err(Error::NotThere { .. })));
    }

    #[test]
    fn what_is_not_the_backups_is_not_removed_and_neither_is_the_backup() {
        let store = store();
        let backup = store.path().join("web/a");
        let elsewhere = store.path().join("elsewhere");
        std::fs::write(&elsewhere, "mine").unwrap();
        let refused = |name: &str| {
            let error = hold(store.path()).unwrap_err();
            assert!(matches!(error, Error::NotTheBackups { .. }), "{error}");
            assert!(error.to_string().contains(name), "{error}");
            assert!(backup.join("manifest.json").exists());
        };
        std::fs::write(backup.join("notes.txt"), "mine").unwrap();
        refused("notes.txt");
        std::fs::remove_file(backup.join("notes.txt")).unwrap();
        symlink(&elsewhere, backup.join("vdb.qcow2")).unwrap();
        refused("vdb.qcow2");
        std::fs::remove_file(backup.join("vdb.qcow2")).unwrap();
        std::fs::create_dir(backup.join("vdb.qcow2")).unwrap();
        refused("vdb.qcow2");
        std::fs::remove_dir(backup.join("vdb.qcow2")).unwrap();
        // What has another name takes as much space as before.
        std::fs::hard_link(backup.join("vda.qcow2"), store.path().join("copy")).unwrap();
        let space = hold(store.path()).unwrap().unwrap().space;
        std::fs::remove_file(store.path().join("copy")).unwrap();
        assert!(hold(store.path()).unwrap().unwrap().space > space);
    }
}
