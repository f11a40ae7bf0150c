//! Checks whether a target is in a store, where it could overwrite backups.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::identity::backing_files;
use crate::files::FileId;

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
    use crate::store::store_around;

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
        std::fs::create_dir(store.join(".backupd")).unwrap();
        assert_eq!(store_around(&backup), Some(store));
        assert_eq!(store_around(dir.path()), None);
    }
}
