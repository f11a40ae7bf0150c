//! A store in a directory of a local or mounted file system.
//!
//! `STORE/DOMAIN/ID/` has the images of a backup, its manifest and its document. While a backup is in staging, being
//! removed or moved aside, its directory has another name, which begins with a dot. So a directory with a backup's name
//! is always a complete backup.

mod directory;
mod generation;
mod mark;
mod protection;
mod removal;
mod replacement;
mod staging;

use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, statat};

use super::{
    BackupName, Entries, Error, OpenBackup, Operation, Raised, Removal, Replacement, Staging, Store,
    Unfinished,
};
use crate::offload::Progress;
use directory::Directory;

pub use staging::ensure;

/// The service's own directory in a store.
const OWN_DIRECTORY: &str = ".backupd";

/// An open store directory. It follows no symbolic link, and reads only regular files.
#[derive(Debug)]
pub struct LocalDirectory(Directory);

impl LocalDirectory {
    /// Opens a store that only the administrator controls.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Directory::of_store(path).map(Self)
    }

    /// Opens a store that this process can read, with any owner.
    pub fn open_users(path: &Path) -> Result<Self, Error> {
        Directory::of_users_store(path).map(Self)
    }

    fn backup(&self, name: BackupName<'_>) -> Result<Option<Directory>, Error> {
        match self.0.below(name.domain)? {
            Some(domain) => domain.below(name.id),
            None => Ok(None),
        }
    }
}

impl Store for LocalDirectory {
    fn location(&self) -> &Path {
        self.0.path()
    }

    fn identity(&self) -> Result<String, Error> {
        self.0.identity()
    }

    fn domains(&self) -> Result<Vec<String>, Error> {
        let mut names = self.0.names()?;
        names.retain(|name| !name.starts_with('.'));
        Ok(names)
    }

    fn entries(&self, domain: &str) -> Result<Entries, Error> {
        let mut entries = Entries::default();
        let Some(domain) = self.0.below(domain)? else {
            return Ok(entries);
        };
        for name in domain.names()? {
            if name.starts_with('.') {
                entries.unfinished.extend(unfinished(name));
            } else {
                entries.backups.push(name);
            }
        }
        Ok(entries)
    }

    fn open(&self, name: BackupName<'_>) -> Result<Option<Box<dyn OpenBackup>>, Error> {
        let backup = self.backup(name)?;
        Ok(backup.map(|backup| Box::new(backup) as Box<dyn OpenBackup>))
    }

    fn stage(&self, name: BackupName<'_>) -> Result<Box<dyn Staging>, Error> {
        Ok(Box::new(staging::StagingDirectory::create(&self.0, name)?))
    }

    fn find_staging(&self, name: BackupName<'_>, images: &[&str]) -> Result<Option<Box<dyn Staging>>, Error> {
        let found = staging::StagingDirectory::find(&self.0, name, images)?;
        Ok(found.map(|found| Box::new(found) as Box<dyn Staging>))
    }

    fn lock_for_removal(
        &self,
        name: BackupName<'_>,
        images: &[&str],
    ) -> Result<Option<Box<dyn Removal>>, Error> {
        let locked = removal::DirectoryRemoval::lock(&self.0, name, images)?;
        Ok(locked.map(|locked| Box::new(locked) as Box<dyn Removal>))
    }

    fn space_of(&self, name: BackupName<'_>, images: &[&str]) -> Result<Option<u64>, Error> {
        removal::DirectoryRemoval::space_of(&self.0, name, images)
    }

    fn finish_removal(&self, name: BackupName<'_>, progress: &Progress) -> Result<(), Error> {
        removal::finish(&self.0, name, progress)
    }

    fn replace(&self, name: BackupName<'_>, progress: &Progress) -> Result<Box<dyn Replacement>, Error> {
        let made = replacement::DirectoryReplacement::create(&self.0, name, progress)?;
        Ok(Box::new(made))
    }

    fn settle_replacement(&self, name: BackupName<'_>) -> Result<(), Error> {
        replacement::settle(&self.0, name)
    }

    fn clear_replacement(&self, name: BackupName<'_>, progress: &Progress) -> Result<(), Error> {
        replacement::clear(&self.0, name, progress)
    }

    fn protect(&self, name: BackupName<'_>, protected: bool) -> Result<(), Error> {
        let backup = self.backup(name)?.ok_or_else(|| Error::NotThere {
            path: self
                .location()
                .join(name.domain)
                .join(name.id)
                .display()
                .to_string(),
        })?;
        protection::protect(&backup, protected)
    }

    fn is_used(&self) -> Result<bool, Error> {
        Ok(self.0.below(OWN_DIRECTORY)?.is_some())
    }

    fn mark(&self) -> Result<Option<String>, Error> {
        mark::of(&self.0)
    }

    fn make_mark(&self, known: &[(String, String)]) -> Result<String, Error> {
        mark::make(&self.0, known)
    }

    fn generation(&self) -> Result<String, Error> {
        generation::of(&self.0)
    }

    fn raise_generation(&self, progress: &Progress) -> Result<Raised, Error> {
        generation::raise(&self.0, progress)
    }
}

/// Interprets a name that begins with a dot.
fn unfinished(entry: String) -> Option<Unfinished> {
    let (id, operation) = if let Some(id) = staging::staged_backup(&entry) {
        (id, Operation::Staging)
    } else if let Some(id) = removal::removed_backup(&entry) {
        (id, Operation::Removal)
    } else {
        (replacement::replaced_backup(&entry)?, Operation::Replacement)
    };
    let id = id.to_owned();
    Some(Unfinished { id, operation, entry })
}

/// Returns the local store that contains a directory, found by the service's directory in it. That counts only if root
/// or this process's user owns it, because other users could otherwise block a shared directory with one. Blocks.
pub fn store_around(directory: &Path) -> Option<PathBuf> {
    let own = rustix::process::geteuid().as_raw();
    let is_store = |path: &&Path| {
        let found = statat(CWD, path.join(OWN_DIRECTORY), AtFlags::SYMLINK_NOFOLLOW);
        found.is_ok_and(|found| {
            FileType::from_raw_mode(found.st_mode) == FileType::Directory
                && (found.st_uid == 0 || found.st_uid == own)
        })
    };
    directory.ancestors().find(is_store).map(Path::to_owned)
}
