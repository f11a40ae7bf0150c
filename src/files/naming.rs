//! Renames and links, on file systems that lack some of them.
//!
//! - NFS, sshfs and most FUSE file systems have no rename that refuses to replace, and none that exchanges.
//! - Some file systems have no hard links.
//! - Some rename a file that is unlinked while a program has it open, instead of removing it.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Mode, RenameFlags};
use rustix::io::Errno;

use super::names_in;

/// Whether the error means that the file system does not support the rename flags.
pub fn is_without_flags(errno: Errno) -> bool {
    matches!(errno, Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP)
}

/// Whether the error means that the file system has no hard links.
pub fn is_without_links(errno: Errno) -> bool {
    is_without_flags(errno) || matches!(errno, Errno::PERM | Errno::MLINK)
}

/// Renames a file within a directory. Never replaces a file.
pub fn rename_new(directory: &OwnedFd, old: &OsStr, new: &OsStr) -> Result<(), Errno> {
    match rustix::fs::renameat_with(directory, old, directory, new, RenameFlags::NOREPLACE) {
        // File systems without that flag can link without replacing.
        Err(errno) if is_without_flags(errno) => {
            rustix::fs::linkat(directory, old, directory, new, AtFlags::empty())?;
            // The file is published even if its old name stays.
            let _ = rustix::fs::unlinkat(directory, old, AtFlags::empty());
            Ok(())
        }
        result => result,
    }
}

/// Renames a directory within its parent. Never replaces an entry except an empty directory.
pub fn rename_directory(parent: &OwnedFd, old: &str, new: &str) -> Result<(), Errno> {
    match rustix::fs::renameat_with(parent, old, parent, new, RenameFlags::NOREPLACE) {
        // Even without that flag, rename(2) does not replace a directory that is not empty.
        Err(errno) if is_without_flags(errno) => rustix::fs::renameat(parent, old, parent, new),
        result => result,
    }
}

/// The second name that an entry has for a moment during the trial of renaming.
pub fn trial_name(entry: &str) -> String {
    format!("{entry}.try")
}

/// Tries whether an entry can be renamed in the way in which it is published later, and whether that can be made
/// durable. Afterwards the entry has its old name.
pub fn try_naming(
    directory: &OwnedFd,
    entry: &str,
    rename: impl Fn(&OwnedFd, &str, &str) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let trial = trial_name(entry);
    rename(directory, entry, &trial)?;
    rename(directory, &trial, entry)?;
    rustix::fs::fsync(directory)
}

/// The type of overlayfs in `statfs(2)`.
const OVERLAYFS: i64 = 0x794c_7630;

/// Checks whether a non-empty directory can be renamed, without renaming it. Fails with `EXDEV` if not.
///
/// Without `redirect_dir`, overlayfs cannot rename a directory of a lower layer. It checks that before it checks the
/// new name. So if a rename is possible, the refusal to replace a non-empty directory has another error.
pub fn check_movable(parent: &OwnedFd, entry: &str) -> Result<(), Errno> {
    if rustix::fs::fstatfs(parent)?.f_type != OVERLAYFS {
        return Ok(());
    }
    let full = trial_name(&format!(".{entry}"));
    let inside = format!("{full}/entry");
    let make = |name: &str| match rustix::fs::mkdirat(parent, name, Mode::RWXU) {
        // A process that ended during the trial may have left it.
        Err(Errno::EXIST) => Ok(()),
        made => made,
    };
    make(&full)?;
    make(&inside)?;
    let tried = match rustix::fs::renameat(parent, entry, parent, &full) {
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno),
        // No kernel replaces a non-empty directory. If one does, restore the entry's name.
        Ok(()) => rustix::fs::renameat(parent, &full, parent, entry),
    };
    for name in [&inside, &full] {
        // If one remains, the next trial uses it.
        let _ = rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR);
    }
    tried
}

/// Whether the entry is a removed file that a program has open, under the name that the file system gave it. It
/// disappears when that program closes it; removing it would only rename it again.
fn is_held_open(name: &str) -> bool {
    name.starts_with(".nfs") || name.starts_with(".fuse_hidden")
}

/// Whether a directory has only entries that disappear by themselves.
pub fn is_as_good_as_empty(directory: &OwnedFd) -> bool {
    names_in(directory).is_ok_and(|names| names.iter().all(|name| is_held_open(name)))
}

/// Removes such entries from a list.
pub fn without_held_open(names: &mut Vec<String>) {
    names.retain(|name| !is_held_open(name));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_only_its_own_name_after_the_trial() {
        let place = tempfile::tempdir().unwrap();
        std::fs::write(place.path().join("entry"), "").unwrap();
        let directory = OwnedFd::from(std::fs::File::open(place.path()).unwrap());
        let rename =
            |directory: &OwnedFd, old: &str, new: &str| rename_new(directory, old.as_ref(), new.as_ref());
        try_naming(&directory, "entry", rename).unwrap();
        assert_eq!(names_in(&directory).unwrap(), ["entry"]);
        let refuse = |_: &OwnedFd, _: &str, _: &str| Err(Errno::PERM);
        assert_eq!(try_naming(&directory, "entry", refuse), Err(Errno::PERM));
        assert_eq!(names_in(&directory).unwrap(), ["entry"]);
        assert!(!is_as_good_as_empty(&directory));
        std::fs::rename(place.path().join("entry"), place.path().join(".nfs0001")).unwrap();
        assert!(is_as_good_as_empty(&directory));
    }
}
