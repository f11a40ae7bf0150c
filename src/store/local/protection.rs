//! Protects a stored backup from removal: a file beside its manifest, which every service sees, even after a lost
//! catalog.

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::super::{LockKind, OpenBackup};
use super::Error;
use super::directory::Directory;
use crate::model::PROTECTED_NAME;

/// Sets or removes the protection of a backup durably. Blocks.
pub fn protect(backup: &Directory, protected: bool) -> Result<(), Error> {
    // Fails if another process is removing the backup.
    let _lock = backup.lock(LockKind::Shared)?;
    let failed = |action| {
        let path = backup.path().join(PROTECTED_NAME).display().to_string();
        move |errno| Error::io(action, &path, errno)
    };
    let directory = backup.descriptor();
    match protected {
        true => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(directory, PROTECTED_NAME, flags, Mode::RUSR | Mode::WUSR)
                .map_err(failed("create"))?;
            rustix::fs::fsync(&file).map_err(failed("fsync"))?;
        }
        false => match rustix::fs::unlinkat(directory, PROTECTED_NAME, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(failed("remove")(errno)),
        },
    }
    rustix::fs::fsync(directory).map_err(failed("fsync the directory of"))
}

/// Whether a backup is protected.
pub fn is_protected(backup: &Directory) -> Result<bool, Error> {
    match rustix::fs::statat(backup.descriptor(), PROTECTED_NAME, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => {
            let path = backup.path().join(PROTECTED_NAME).display().to_string();
            Err(Error::io("stat", &path, errno))
        }
    }
}
