//! Checks whether a target is in a store, where it could overwrite backups.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, statat};

use super::identity::{FileId, backing_files};
use super::mark::DIRECTORY;

/// Returns the store that contains a directory, found by the store's mark. A mark counts only if root or this
/// process's user owns it, because other users could otherwise block a shared directory with a mark. Blocks.
pub fn store_around(directory: &Path) -> Option<PathBuf> {
    let own = rustix::process::geteuid().as_raw();
    let is_store = |path: &&Path| {
        let mark = statat(CWD, path.join(DIRECTORY), AtFlags::SYMLINK_NOFOLLOW);
        mark.is_ok_and(|mark| {
            FileType::from_raw_mode(mark.st_mode) == FileType::Directory
                && (mark.st_uid == 0 || mark.st_uid == own)
        })
    };
    directory.ancestors().find(is_store).map(Path::to_owned)
}

/// Returns the directory of an open file, or the directory in which O_TMPFILE created it. `None` if this process
/// cannot see it.
pub fn directory_of(file: &OwnedFd) -> Option<PathBuf> {
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    path.is_absolute().then(|| path.parent().map(Path::to_owned))?
}

/// Returns the directories of the files behind a device, such as the file of a loop device.
pub fn directories_behind(device: FileId) -> Vec<PathBuf> {
    let files = backing_files(device).into_iter();
    files
        .filter_map(|file| file.parent().map(Path::to_owned))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_in_a_store_is_found_with_and_without_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let (store, backup) = (dir.path().join("store"), dir.path().join("store/web/id"));
        std::fs::create_dir_all(&backup).unwrap();
        let named: OwnedFd = std::fs::File::create(backup.join("vda.qcow2")).unwrap().into();
        let nameless: OwnedFd = tempfile::tempfile_in(&backup).unwrap().into();
        for file in [&named, &nameless] {
            let directory = directory_of(file).unwrap();
            assert_eq!(directory, backup);
            assert_eq!(store_around(&directory), None, "the store has no mark");
        }
        std::fs::create_dir(store.join(DIRECTORY)).unwrap();
        assert_eq!(store_around(&backup), Some(store));
        assert_eq!(store_around(dir.path()), None);
    }
}
