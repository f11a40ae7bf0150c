//! Removes a backup from its store atomically: renames its directory to a name that marks the removal, then removes
//! its files, then the directory.
//!
//! Removes only the backup's own files: the images that its manifest names, and its records. Follows no symbolic
//! link.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{AtFlags, FileType, Stat};
use rustix::io::Errno;

use super::super::{BackupLock, LockKind, OpenBackup, Removal};
use super::directory::Directory;
use super::{BackupName, Error};
use crate::fault::{self, Point};
use crate::files::names_in;
use crate::files::naming;
use crate::model::{DEFINITION_NAME, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, PROTECTED_NAME};
use crate::offload::Progress;

/// The unit of [`Stat::st_blocks`], in bytes.
const BLOCK: u64 = 512;

/// The files beside a backup's images. The manifest is the last, because it names the images.
const RECORDS: [&str; 3] = [DEFINITION_NAME, PROTECTED_NAME, MANIFEST_NAME];

/// A backup's directory that is to be removed, and that no other process uses.
#[derive(Debug)]
pub struct DirectoryRemoval {
    domain: Directory,
    directory: Directory,
    path: PathBuf,
    id: String,
    /// The directory has the name that marks the removal already.
    begun: bool,
    /// The files in it. The manifest is the last, because it names the others.
    files: Vec<String>,
    /// The bytes that the removal frees.
    space: u64,
    /// `None` for [`DirectoryRemoval::space_of`], which takes no lock.
    _lock: Option<BackupLock>,
}

/// The name of a backup's directory during its removal.
pub fn removed_name(id: &str) -> String {
    format!(".{id}.removed")
}

/// Returns the backup of a directory with the name of a removal.
pub fn removed_backup(name: &str) -> Option<&str> {
    name.strip_prefix('.')?.strip_suffix(".removed")
}

/// Removes the directories of removed backups that were not empty then, because a program had their files open.
/// Directories that still are not empty stay.
pub fn sweep(domain: &OwnedFd) {
    let names = names_in(domain).unwrap_or_default();
    for name in names.iter().filter(|name| removed_backup(name).is_some()) {
        let _ = rustix::fs::unlinkat(domain, name, AtFlags::REMOVEDIR);
    }
}

/// Resumes the removal of a backup that is not in the catalog. Does nothing if the removal has not begun, or if
/// another process does it. Blocks.
pub fn finish(store: &Directory, name: BackupName<'_>, progress: &Progress) -> Result<(), Error> {
    let Some(domain) = store.below(name.domain)? else {
        return Ok(());
    };
    let Some(directory) = domain.below(&removed_name(name.id))? else {
        return Ok(());
    };
    // The manifest is removed last, so without it no image is left.
    let manifest = directory.read(MANIFEST_NAME, MAX_MANIFEST_BYTES);
    let manifest = manifest.ok().and_then(|(bytes, _)| Manifest::parse(&bytes).ok());
    let images = manifest.as_ref().map(Manifest::images).unwrap_or_default();
    match DirectoryRemoval::lock(store, name, &images) {
        Ok(Some(removal)) if removal.begun => Box::new(removal).finish(progress).map(drop),
        Ok(_) | Err(Error::InUse { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

impl DirectoryRemoval {
    /// Locks the directory of a backup exclusively, under either of its names. Returns `None` if it does not exist.
    /// `images` are the files that its manifest names. Blocks.
    pub fn lock(store: &Directory, name: BackupName<'_>, images: &[&str]) -> Result<Option<Self>, Error> {
        Self::find(store, name, images, true)
    }

    /// Returns the bytes that its removal would free, or `None` if it does not exist. Takes no lock. Blocks.
    pub fn space_of(store: &Directory, name: BackupName<'_>, images: &[&str]) -> Result<Option<u64>, Error> {
        let found = Self::find(store, name, images, false)?;
        Ok(found.map(|found| found.space))
    }

    fn find(
        store: &Directory,
        name: BackupName<'_>,
        images: &[&str],
        locked: bool,
    ) -> Result<Option<Self>, Error> {
        let Some(domain) = store.below(name.domain)? else {
            // The service never removes a domain's directory with backups, so the whole store may be missing.
            return Err(Error::NotThere {
                path: store.path().join(name.domain).display().to_string(),
            });
        };
        for (entry, begun) in [(removed_name(name.id), true), (name.id.to_owned(), false)] {
            let Some(directory) = domain.below(&entry)? else {
                continue;
            };
            let lock = locked.then(|| directory.lock(LockKind::Exclusive)).transpose()?;
            let mut removal = Self {
                path: directory.path().to_owned(),
                domain,
                directory,
                id: name.id.to_owned(),
                begun,
                files: Vec::new(),
                space: 0,
                _lock: lock,
            };
            removal.take_stock(images)?;
            return Ok(Some(removal));
        }
        Ok(None)
    }

    /// Lists the files to remove. Fails if one does not belong to the backup.
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
                return Err(Error::ForeignFile {
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

    /// Returns `None` if it is not a regular file.
    fn stat(&self, name: &str) -> Result<Option<Stat>, Error> {
        let stat = rustix::fs::statat(self.directory.descriptor(), name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| self.failed("stat", name, errno))?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        Ok(regular.then_some(stat))
    }

    fn sync_domain(&self) -> Result<(), Error> {
        rustix::fs::fsync(self.domain.descriptor())
            .map_err(|errno| self.failed("fsync the directory of", "", errno))
    }

    fn failed(&self, action: &'static str, name: &str, errno: Errno) -> Error {
        let path = match name {
            "" => self.path.clone(),
            name => self.path.join(name),
        };
        Error::io(action, &path.display().to_string(), errno)
    }
}

impl Removal for DirectoryRemoval {
    fn is_begun(&self) -> bool {
        self.begun
    }

    fn space(&self) -> u64 {
        self.space
    }

    fn check_possible(&self) -> Result<(), Error> {
        if self.begun {
            return Ok(());
        }
        match naming::check_movable(self.domain.descriptor(), &self.id) {
            Ok(()) => Ok(()),
            Err(Errno::XDEV) => Err(Error::Immovable {
                path: self.path.display().to_string(),
            }),
            Err(errno) => Err(self.failed("rename", "", errno)),
        }
    }

    /// Renames the directory.
    fn begin(&mut self, progress: &Progress) -> Result<(), Error> {
        if self.begun {
            return Ok(());
        }
        let (domain, hidden) = (self.domain.descriptor(), removed_name(&self.id));
        naming::rename_directory(domain, &self.id, &hidden)
            .map_err(|errno| self.failed("rename", "", errno))?;
        self.begun = true;
        self.sync_domain()?;
        progress.add(1);
        Ok(())
    }

    fn finish(self: Box<Self>, progress: &Progress) -> Result<u64, Error> {
        fault::point(Point::RemovalRenamed);
        for (index, name) in self.files.iter().enumerate() {
            rustix::fs::unlinkat(self.directory.descriptor(), name, AtFlags::empty())
                .map_err(|errno| self.failed("remove", name, errno))?;
            progress.add(1);
            if index == 0 {
                fault::point(Point::RemovalBegun);
            }
        }
        let domain = self.domain.descriptor();
        match rustix::fs::unlinkat(domain, removed_name(&self.id), AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            // A program still has an image open. Its directory is removed later.
            Err(Errno::NOTEMPTY | Errno::EXIST)
                if naming::is_as_good_as_empty(self.directory.descriptor()) =>
            {
                tracing::info!(
                    directory = %self.path.display(),
                    "another process has files of a removed backup open: their space is free when it closes them"
                );
            }
            Err(errno) => return Err(self.failed("remove", "", errno)),
        }
        progress.add(1);
        sweep(domain);
        self.sync_domain()?;
        fault::point(Point::RemovalEmptied);
        Ok(self.space)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::Path;

    use super::*;
    use crate::store::remove;

    /// A store with a backup `a` of `web`, in a directory that only root and the service's user can change.
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

    fn lock(store: &Path) -> Result<Option<Box<dyn Removal>>, Error> {
        let name = BackupName {
            domain: "web",
            id: "a",
        };
        crate::store::open(store)?.lock_for_removal(name, &["vda.qcow2", "vdb.qcow2"])
    }

    #[test]
    fn a_backup_is_removed_as_a_whole_and_its_removal_can_be_resumed() {
        let store = store();
        let removal = lock(store.path()).unwrap().unwrap();
        assert!(!removal.is_begun());
        assert!(matches!(lock(store.path()), Err(Error::InUse { .. })));
        assert!(remove(removal, &Progress::default()).unwrap() > 0);
        assert!(lock(store.path()).unwrap().is_none());
        let hidden = store.path().join("web/.a.removed");
        std::fs::create_dir(&hidden).unwrap();
        std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o700)).unwrap();
        std::fs::write(hidden.join("manifest.json"), "x").unwrap();
        let removal = lock(store.path()).unwrap().unwrap();
        assert!(removal.is_begun());
        remove(removal, &Progress::default()).unwrap();
        assert_eq!(std::fs::read_dir(store.path().join("web")).unwrap().count(), 0);
        assert_eq!(removed_backup(".a.removed"), Some("a"));
        std::fs::remove_dir(store.path().join("web")).unwrap();
        assert!(matches!(lock(store.path()), Err(Error::NotThere { .. })));
    }

    #[test]
    fn a_foreign_file_keeps_a_backup_from_being_removed() {
        let store = store();
        let backup = store.path().join("web/a");
        let elsewhere = store.path().join("elsewhere");
        std::fs::write(&elsewhere, "mine").unwrap();
        let refused = |name: &str| {
            let error = lock(store.path()).unwrap_err();
            assert!(matches!(error, Error::ForeignFile { .. }), "{error}");
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
        // A file with another hard link frees no space.
        std::fs::hard_link(backup.join("vda.qcow2"), store.path().join("copy")).unwrap();
        let space = lock(store.path()).unwrap().unwrap().space();
        std::fs::remove_file(store.path().join("copy")).unwrap();
        assert!(lock(store.path()).unwrap().unwrap().space() > space);
    }
}
