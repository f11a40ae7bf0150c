//! Target files that the client opens, so that they belong to the caller and the caller's rights apply.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::output;

/// The limit of dbus-daemon for descriptors in a message.
pub const MAX_FILES: usize = 16;

/// The error of a file that cannot be passed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file exists, and --reuse-external is not given.
    #[error("{} exists", path.display())]
    Exists { path: PathBuf },
    /// The file cannot be opened or created.
    #[error("cannot open {}: {source}", path.display())]
    Open { path: PathBuf, source: io::Error },
    /// The bus passes fewer files.
    #[error(
        "the bus passes at most {MAX_FILES} files in one message (max_message_unix_fds), not {count}: \
         omit --own-files, so that the service creates them"
    )]
    TooMany {
        /// The number of requested files.
        count: usize,
    },
}

/// The open files of one backup. Dropping removes the created ones, unless [`OwnFiles::keep`] is called.
#[derive(Debug, Default)]
pub struct OwnFiles {
    files: Vec<OwnFile>,
}

#[derive(Debug)]
struct OwnFile {
    path: PathBuf,
    file: File,
    created: bool,
}

impl OwnFiles {
    /// Opens a file for each path: a new one with mode 0600, or with `reuse` an existing one.
    pub fn open<'a>(paths: impl IntoIterator<Item = &'a Path>, reuse: bool) -> Result<Self, Error> {
        // On an error, dropping `opened` removes the created files.
        let mut opened = Self::default();
        let paths: Vec<&Path> = paths.into_iter().collect();
        if paths.len() > MAX_FILES {
            return Err(Error::TooMany { count: paths.len() });
        }
        for path in paths {
            // The standard library sets O_CLOEXEC, and O_EXCL with `create_new`.
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(!reuse)
                .mode(0o600)
                .open(path)
                .map_err(|source| match source.kind() {
                    io::ErrorKind::AlreadyExists => Error::Exists { path: path.into() },
                    _ => Error::Open {
                        path: path.into(),
                        source,
                    },
                })?;
            opened.files.push(OwnFile {
                path: path.into(),
                file,
                created: !reuse,
            });
        }
        Ok(opened)
    }

    /// The open files, in the order of their paths.
    pub fn descriptors(&self) -> Vec<zbus::Fd<'_>> {
        self.files.iter().map(|own| zbus::Fd::from(&own.file)).collect()
    }

    /// Keeps the files: the backup completed, or QEMU may still write to them.
    pub fn keep(mut self) {
        self.files.clear();
    }
}

impl Drop for OwnFiles {
    fn drop(&mut self) {
        for own in self.files.iter().filter(|own| own.created) {
            if let Err(error) = remove(own) {
                let path = output::escape(&own.path.display().to_string());
                output::complain(&format!("backupctl: cannot remove {path}: {error}"));
            }
        }
    }
}

/// Removes a file if its path still leads to it; another process may have replaced it.
fn remove(own: &OwnFile) -> io::Result<()> {
    let ours = own.file.metadata()?;
    match fs::symlink_metadata(&own.path) {
        Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => fs::remove_file(&own.path),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_made_for_the_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let files = OwnFiles::open([path.as_path()], false).unwrap();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(files.descriptors().len(), 1);
        files.keep();
        assert!(path.exists());
    }

    #[test]
    fn an_unfinished_backup_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        drop(OwnFiles::open([path.as_path()], false).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn if_one_file_exists_all_new_ones_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&b, "mine").unwrap();
        let error = OwnFiles::open([a.as_path(), b.as_path()], false).unwrap_err();
        assert!(matches!(error, Error::Exists { path } if path == b));
        assert!(!a.exists());
        assert_eq!(fs::read(&b).unwrap(), b"mine");
    }

    #[test]
    fn a_reused_file_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        assert!(OwnFiles::open([path.as_path()], true).is_err());
        fs::write(&path, "mine").unwrap();
        drop(OwnFiles::open([path.as_path()], true).unwrap());
        assert!(path.exists());
    }

    #[test]
    fn a_file_that_replaced_an_own_file_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let files = OwnFiles::open([path.as_path()], false).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::write(&path, "other").unwrap();
        drop(files);
        assert_eq!(fs::read(&path).unwrap(), b"other");
    }
}
