//! Renames and links, on file systems that lack some of them.
//!
//! NFS, sshfs and most FUSE file systems have no renaming that refuses to replace, or that exchanges; some have no hard links;
//! and some rename a file that is removed while a program has it open, instead of removing it.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Mode, RenameFlags};
use rustix::io::Errno;

use super::store::names_in;

/// Whether a file system said that it cannot rename like that.
pub fn is_without_flags(errno: Errno) -> bool {
    matches!(errno, Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP)
}

/// Whether a file system said that it has no hard links.
pub fn is_without_links(errno: Errno) -> bool {
    is_without_flags(errno) || matches!(errno, Errno::PERM | Errno::MLINK)
}

/// Renames a file within a directory; never over something.
pub fn rename_new(directory: &OwnedFd, old: &OsStr, new: &OsStr) -> Result<(), Errno> {
    match rustix::fs::renameat_with(directory, old, directory, new, RenameFlags::NOREPLACE) {
        // File systems without that flag can still link without replacing.
        Err(errno) if is_without_flags(errno) => {
            rustix::fs::linkat(directory, old, directory, new, AtFlags::empty())?;
            // Under both names it is published all the same.
            let _ = rustix::fs::unlinkat(directory, old, AtFlags::empty());
            Ok(())
        }
        result => result,
    }
}

/// Renames a directory within another one; never over something but an empty directory.
pub fn rename_directory(parent: &OwnedFd, old: &str, new: &str) -> Result<(), Errno> {
    match rustix::fs::renameat_with(parent, old, parent, new, RenameFlags::NOREPLACE) {
        // A file system without that flag still does not replace a directory that has something in it.
        Err(errno) if is_without_flags(errno) => rustix::fs::renameat(parent, old, parent, new),
        result => result,
    }
}

/// The second name that an entry has for a moment, while it is tried if it can have another one.
pub fn trial_name(entry: &str) -> String {
    format!("{entry}.try")
}

/// Whether an entry that is there can get another name, in the way in which it will get its own, and whether that can be made
/// durable. The entry has the name that it had.
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

/// What `statfs(2)` calls overlayfs.
const OVERLAYFS: i64 = 0x794c_7630;

/// Whether a directory with something in it can be renamed, as far as that shows without renaming it: `EXDEV` if not.
///
/// Without `redirect_dir`, overlayfs renames no directory of a lower layer. It looks for that before it looks at the new name, so
/// it refuses in another way to replace a directory that is not empty where it could rename.
pub fn check_movable(parent: &OwnedFd, entry: &str) -> Result<(), Errno> {
    if rustix::fs::fstatfs(parent)?.f_type != OVERLAYFS {
        return Ok(());
    }
    let full = trial_name(&format!(".{entry}"));
    let inside = format!("{full}/entry");
    let make = |name: &str| match rustix::fs::mkdirat(parent, name, Mode::RWXU) {
        // Of a process that ended while it tried.
        Err(Errno::EXIST) => Ok(()),
        made => made,
    };
    make(&full)?;
    make(&inside)?;
    let tried = match rustix::fs::renameat(parent, entry, parent, &full) {
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno),
        // No kernel replaces a directory that has something in it. If one does, the entry has its name again at least.
        Ok(()) => rustix::fs::renameat(parent, &full, parent, entry),
    };
    for name in [&inside, &full] {
        // If one stays, the next trial has use for it.
        let _ = rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR);
    }
    tried
}

/// Whether an entry is what the file system made of a file that was removed while a program had it open. It goes when that
/// program closes it; to remove it again would only rename it again.
fn is_held_open(name: &str) -> bool {
    name.starts_with(".nfs") || name.starts_with(".fuse_hidden")
}

/// Whether a directory has nothing in it but what goes by itself.
pub fn is_as_good_as_empty(directory: &OwnedFd) -> bool {
    names_in(directory).is_ok_and(|names| names.iter().all(|name| is_held_open(name)))
}

/// Takes such entries out of a list.
pub fn without_held_open(names: &mut Vec<String>) {
    names.retain(|name| !is_held_open(name));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_that_was_tried_has_its_name_and_no_other() {
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
