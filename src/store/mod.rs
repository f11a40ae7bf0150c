//! Stores: directories of the administrator in which the service chooses the file names.
//!
//! `STORE/DOMAIN/ID/` has the images of a backup, its manifest and its document. Until the backup is complete, its
//! directory has a staging name. So a directory with a backup's name is always a complete backup.
//!
//! Knows the layout of a store and its atomic changes. Must not know QEMU, jobs, the catalog or callers. All functions
//! block: call them off the runtime.

mod directory;
mod error;
mod generation;
mod mark;
mod protection;
mod removal;
mod replacement;
mod staging;

use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, statat};

pub use directory::{BackupLock, Directory, LockKind};
pub use error::{Error, kind_of};
pub use generation::{Raised, generation, raise_generation};
pub use mark::{check_mark, check_mark_of, make_mark};
pub use protection::protect;
pub use removal::{Removal, finish_removal, removed_backup, removed_name};
pub use replacement::{Replacement, replaced_backup};
pub use staging::{Published, Staging, ensure, staged_backup};

/// The service's own directory in a store.
pub const OWN_DIRECTORY: &str = ".backupd";

/// Identifies a backup in a store. Both parts are names of directories.
#[derive(Debug, Clone, Copy)]
pub struct BackupName<'a> {
    /// The domain's directory in the store.
    pub domain: &'a str,
    /// Unique in the store, and a valid file name.
    pub id: &'a str,
}

/// Returns the store that contains a directory, found by the service's directory in it. That counts only if root or
/// this process's user owns it, because other users could otherwise block a shared directory with one. Blocks.
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
