//! Stores: places in which the service keeps backups under names that it chooses.
//!
//! [`Store`] is the interface that the service uses, and [`LocalDirectory`] its implementation for a directory. Knows
//! the layout of stores and their atomic changes. Must not know QEMU, jobs, the catalog or callers. All functions
//! block: call them off the runtime.
//!
//! Rules for each implementation; `contract.rs` tests them:
//! - A backup is published as a whole: until then [`Store::open`] does not return it.
//! - No removal or replacement has an effect while another handle holds a lock on the backup.
//! - If the process ends during a change, a later process completes or undoes the change ([`Entries::unfinished`]).
//!
//! Some operations return descriptors, because QEMU and `qemu-img` read and write through them:
//! [`OpenBackup::open_image`], [`Staging::create_image`], [`Staging::find_image`] and [`Replacement::create_image`]. An
//! implementation that has no files returns a descriptor of a file in local storage: to read, a copy or an export of
//! the object; to write, a file that [`Staging::publish`] or [`Replacement::put`] uploads.

mod dependencies;
mod error;
mod local;

#[cfg(test)]
mod contract;
#[cfg(test)]
pub(crate) mod memory;

use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::files::FileId;
use crate::model::{MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest};
use crate::offload::Progress;

pub use dependencies::{Dependencies, Unreadable, dependencies};
pub use error::{Error, kind_of};
pub use local::{LocalDirectory, ensure, store_around};

/// Opens a configured store. Only the administrator may control its directory.
pub fn open(location: &Path) -> Result<Box<dyn Store>, Error> {
    Ok(Box::new(LocalDirectory::open(location)?))
}

/// Opens a store that this process can read, with any location and owner.
pub fn open_users(location: &Path) -> Result<Box<dyn Store>, Error> {
    Ok(Box::new(LocalDirectory::open_users(location)?))
}

/// Returns the location of a file of a backup, for messages.
pub fn location_of(store: &Path, name: BackupName<'_>, file: &str) -> PathBuf {
    store.join(name.domain).join(name.id).join(file)
}

/// Identifies a backup in a store. Both parts are names of directories.
#[derive(Debug, Clone, Copy)]
pub struct BackupName<'a> {
    /// The domain's directory in the store.
    pub domain: &'a str,
    /// Unique in the store, and a valid file name.
    pub id: &'a str,
}

/// An open store. It stays the same store, even if another one gets its location.
pub trait Store: Debug + Send + Sync {
    /// The path or address, for messages.
    fn location(&self) -> &Path;

    /// Distinguishes this store from another one that has or gets the same location, such as an empty mount point.
    fn identity(&self) -> Result<String, Error>;

    /// Returns the directories of domains, sorted.
    fn domains(&self) -> Result<Vec<String>, Error>;

    /// Returns the entries of a domain's directory. Empty if it does not exist.
    fn entries(&self, domain: &str) -> Result<Entries, Error>;

    /// Opens a published backup. Returns `None` if it does not exist.
    fn open(&self, name: BackupName<'_>) -> Result<Option<Box<dyn OpenBackup>>, Error>;

    /// Creates the staging area of a new backup. Fails if the store could not publish it later.
    fn stage(&self, name: BackupName<'_>) -> Result<Box<dyn Staging>, Error>;

    /// Finds the staging area that an earlier process created, or the published backup. `images` are the names of its
    /// images. Returns `None` if neither exists. Fails if the published backup has no valid manifest, because it may
    /// then be another backup that others depend on.
    fn find_staging(&self, name: BackupName<'_>, images: &[&str]) -> Result<Option<Box<dyn Staging>>, Error>;

    /// Locks a backup for its removal, also if the removal has begun. `images` are the files that its manifest names.
    /// Returns `None` if it does not exist. Fails with [`Error::NotThere`] if the domain has no directory, because the
    /// store may not be mounted. Fails with [`Error::InUse`] if another handle holds a lock, and with
    /// [`Error::ForeignFile`] if the removal would remove other files.
    fn lock_for_removal(
        &self,
        name: BackupName<'_>,
        images: &[&str],
    ) -> Result<Option<Box<dyn Removal>>, Error>;

    /// Returns the bytes that the removal would free, or `None` if the backup does not exist. Takes no lock. Fails as
    /// [`Self::lock_for_removal`].
    fn space_of(&self, name: BackupName<'_>, images: &[&str]) -> Result<Option<u64>, Error>;

    /// Completes a removal that an earlier process began. Does nothing if it has not begun, or if another process does
    /// it.
    fn finish_removal(&self, name: BackupName<'_>, progress: &Progress) -> Result<(), Error>;

    /// Begins the replacement of a backup. Each file counts as progress.
    fn replace(&self, name: BackupName<'_>, progress: &Progress) -> Result<Box<dyn Replacement>, Error>;

    /// Restores, durably, a backup that an unfinished replacement has hidden. Does nothing if there is none.
    fn settle_replacement(&self, name: BackupName<'_>) -> Result<(), Error>;

    /// Removes, durably, a replacement that was not put in place, or the replaced files. Does nothing if there are
    /// none. Each file counts as progress.
    fn clear_replacement(&self, name: BackupName<'_>, progress: &Progress) -> Result<(), Error>;

    /// Sets or removes the protection of a backup durably. The store has it, so that every service knows it, even
    /// after the catalog was lost.
    fn protect(&self, name: BackupName<'_>, protected: bool) -> Result<(), Error>;

    /// Whether a service has used the store.
    fn is_used(&self) -> Result<bool, Error>;

    /// Returns the store's mark, which distinguishes it from other stores, if it has one.
    fn mark(&self) -> Result<Option<String>, Error>;

    /// Returns the store's mark, and creates one durably if there is none.
    ///
    /// `known` are the recorded backups as (domain's directory, id). If none of them exists, this may not be the store.
    /// The function then fails, unless the administrator has prepared the store on purpose.
    fn make_mark(&self, known: &[(String, String)]) -> Result<String, Error>;

    /// Fails unless the store has that mark.
    fn check_mark(&self, known: &str) -> Result<(), Error> {
        match self.mark()? {
            Some(found) if found == known => Ok(()),
            found => Err(Error::OtherStore {
                path: self.location().display().to_string(),
                is_marked: found.is_some(),
            }),
        }
    }

    /// Returns the store's generation: a value that each service replaces with every change of the store, so that an
    /// outdated catalog is noticed. "" if no service has changed the store.
    fn generation(&self) -> Result<String, Error>;

    /// Gives the store its next generation durably. Each step counts as progress.
    fn raise_generation(&self, progress: &Progress) -> Result<Raised, Error>;
}

/// The entries of a domain's directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entries {
    /// The ids of published backups, sorted. [`Store::open`] may return `None` for one, if another program created it.
    pub backups: Vec<String>,
    pub unfinished: Vec<Unfinished>,
}

/// A change of a backup that did not end, or is under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfinished {
    pub id: String,
    pub operation: Operation,
    /// The name of its entry in the domain's directory, for messages.
    pub entry: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Staging,
    Removal,
    /// [`Store::settle_replacement`] restores the backup.
    Replacement,
}

/// A published backup, open for reading.
pub trait OpenBackup: Debug + Send + Sync {
    /// The path or address, for messages.
    fn location(&self) -> &Path;

    /// Returns the content of a file, at most `at_most` + 1 bytes, and the time at which it was written.
    fn read(&self, file: &str, at_most: usize) -> Result<(Vec<u8>, Timestamp), Error>;

    /// Returns the length of a file in bytes.
    fn size_of(&self, file: &str) -> Result<u64, Error>;

    /// Opens an image for reading.
    fn open_image(&self, file: &str) -> Result<OwnedFd, Error>;

    /// Whether the backup is protected from removal.
    fn is_protected(&self) -> Result<bool, Error>;

    /// Locks the backup. Does not wait: fails with [`Error::InUse`] if another holder conflicts.
    fn lock(&self, kind: LockKind) -> Result<BackupLock, Error>;

    /// Returns the text of the manifest, and the time at which it was written.
    fn read_manifest(&self) -> Result<(Vec<u8>, Timestamp), Error> {
        self.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    }
}

/// The mode of a lock on a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockKind {
    /// For reading the backup or building on it: it does not change.
    Shared,
    /// For changing or removing the backup.
    Exclusive,
}

/// A lock on a backup until it is dropped. It also works between programs, and ends with them.
#[derive(Debug)]
#[must_use]
pub struct BackupLock(#[expect(dead_code, reason = "dropping it unlocks")] Box<dyn Locked>);

/// A value that unlocks when it is dropped.
trait Locked: Debug + Send + Sync {}

impl<T: Debug + Send + Sync> Locked for T {}

/// A backup before it is published. Drop leaves it as it is, for a later process.
pub trait Staging: Debug + Send + Sync {
    /// The final path or address of a file, for messages.
    fn location_of(&self, file: &str) -> PathBuf;

    /// Creates an image, open for reading and writing.
    fn create_image(&self, file: &str) -> Result<OwnedFd, Error>;

    /// Opens an image for reading and writing, if it exists.
    fn find_image(&self, file: &str) -> Result<Option<OwnedFd>, Error>;

    /// Opens an image again for reading, as another open file description. Returns `None` if that fails, or if the
    /// image is not the file `id`.
    fn open_again(&self, file: &str, id: FileId) -> Option<OwnedFd>;

    fn remove_image(&self, file: &str) -> Result<(), Error>;

    /// Publishes the backup durably. `records` are the names and contents of the files beside the images, the manifest
    /// among them. The images are durable already. Does nothing if the backup is published.
    fn publish(&mut self, records: &[(&str, &[u8])]) -> Result<(), Error>;

    /// Withdraws a publication. [`Store::open`] no longer returns the backup.
    fn retract(&mut self) -> Result<(), Error>;

    /// Removes everything else. The caller has removed the images.
    fn discard(&self) -> Result<(), Error>;

    /// Returns the records if the backup was published when it was found. It is then complete, even if the catalog
    /// disagrees, so it must not be retracted or discarded.
    fn published(&self) -> Option<&Published>;
}

/// The records of a backup that was published when it was found.
#[derive(Debug, Clone)]
pub struct Published {
    pub manifest: Manifest,
    /// The text of the manifest.
    pub text: String,
    /// The backup is protected from removal.
    pub protected: bool,
}

/// A backup that is locked for its removal.
pub trait Removal: Debug + Send {
    /// Whether the removal has begun, so that it cannot be undone.
    fn is_begun(&self) -> bool;

    /// The bytes that the removal frees.
    fn space(&self) -> u64;

    /// Fails if the storage cannot remove the backup atomically.
    fn check_possible(&self) -> Result<(), Error>;

    /// Withdraws the backup durably: [`Store::open`] no longer returns it. Does nothing if the removal has begun.
    fn begin(&mut self, progress: &Progress) -> Result<(), Error>;

    /// Removes the files of a removal that has begun, and returns the freed bytes. Each file counts as progress.
    fn finish(self: Box<Self>, progress: &Progress) -> Result<u64, Error>;
}

/// Removes a locked backup durably, and returns the freed bytes.
pub fn remove(mut removal: Box<dyn Removal>, progress: &Progress) -> Result<u64, Error> {
    removal.begin(progress)?;
    removal.finish(progress)
}

/// The future content of a backup, beside the present one. Drop does not remove it; [`Store::clear_replacement`] does.
pub trait Replacement: Debug + Send + Sync {
    /// Creates an image, open for reading and writing.
    fn create_image(&self, file: &str) -> Result<OwnedFd, Error>;

    /// Takes over a file of the backup. Each copied piece counts as progress. Returns `None` if it is cancelled.
    fn keep(&self, file: &str, progress: &Progress, cancel: &CancellationToken) -> Result<Option<()>, Error>;

    /// Writes a file durably.
    fn write(&self, file: &str, content: &[u8]) -> Result<(), Error>;

    /// Puts it in the backup's place, durably and atomically. Fails with [`Error::InUse`] if another handle holds a
    /// lock on the backup.
    fn put(&self) -> Result<(), Error>;

    /// Takes over a small file.
    fn keep_record(&self, file: &str, progress: &Progress) -> Result<(), Error> {
        self.keep(file, progress, &CancellationToken::new()).map(drop)
    }

    /// Takes over a small file if the backup has it.
    fn keep_record_if_there(&self, file: &str, progress: &Progress) -> Result<(), Error> {
        match self.keep_record(file, progress) {
            Err(error) if error.is_not_found() => Ok(()),
            kept => kept,
        }
    }
}

/// A change of a store's generation. "" is the generation of a store that no service has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Raised {
    pub before: String,
    pub now: String,
}
