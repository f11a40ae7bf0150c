//! A store's mark: a file that distinguishes the store from another directory at its path, such as an empty mount
//! point.

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::directory::Directory;
use super::{Error, OWN_DIRECTORY};
use crate::files::naming;

const FILE: &str = "store";
const MAX_BYTES: usize = 256;

/// Returns the mark, if the store has one.
pub fn of(store: &Directory) -> Result<Option<String>, Error> {
    match store.below(OWN_DIRECTORY)? {
        Some(own) => read(&own),
        None => Ok(None),
    }
}

/// Returns the mark, and creates one durably if there is none. The administrator prepares a store with a directory
/// `.backupd`.
pub fn make(store: &Directory, known: &[(String, String)]) -> Result<String, Error> {
    let own = match store.below(OWN_DIRECTORY)? {
        Some(own) => own,
        None if known.is_empty() || is_one_there(store, known)? => {
            match rustix::fs::mkdirat(store.descriptor(), OWN_DIRECTORY, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed(store, "create", OWN_DIRECTORY, errno)),
            }
            sync(store)?;
            let own = store.below(OWN_DIRECTORY)?;
            own.ok_or_else(|| failed(store, "open", OWN_DIRECTORY, Errno::NOTDIR))?
        }
        None => {
            return Err(Error::NotMounted {
                path: store.path().display().to_string(),
                backups: known.len(),
            });
        }
    };
    if let Some(mark) = read(&own)? {
        return Ok(mark);
    }
    write(&own, &uuid::Uuid::new_v4().to_string())?;
    // Another service may have created the mark first.
    read(&own)?.ok_or_else(|| failed(&own, "read", FILE, Errno::NOENT))
}

fn is_one_there(store: &Directory, known: &[(String, String)]) -> Result<bool, Error> {
    for (domain, id) in known {
        if let Some(domain) = store.below(domain)?
            && domain.below(id)?.is_some()
        {
            return Ok(true);
        }
    }
    Ok(false)
}

fn read(own: &Directory) -> Result<Option<String>, Error> {
    match own.read(FILE, MAX_BYTES) {
        Ok((bytes, _)) => {
            let mark = String::from_utf8_lossy(&bytes).trim().to_owned();
            Ok((!mark.is_empty()).then_some(mark))
        }
        Err(Error::Io {
            errno: Errno::NOENT, ..
        }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes the mark without replacing another one.
fn write(own: &Directory, mark: &str) -> Result<(), Error> {
    let new = format!("{FILE}.{}", uuid::Uuid::new_v4().simple());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(own.descriptor(), &new, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|errno| failed(own, "create", FILE, errno))?;
    let written = write_all(file, mark).map_err(|errno| failed(own, "write", FILE, errno));
    let named = written
        .and_then(|()| give_name(own.descriptor(), &new).map_err(|errno| failed(own, "write", FILE, errno)));
    // The file no longer has this name if it was renamed.
    let _ = rustix::fs::unlinkat(own.descriptor(), &new, AtFlags::empty());
    named?;
    sync(own)
}

fn write_all(file: OwnedFd, mark: &str) -> Result<(), Errno> {
    let mut file = std::fs::File::from(file);
    std::io::Write::write_all(&mut file, format!("{mark}\n").as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

fn give_name(directory: &OwnedFd, new: &str) -> Result<(), Errno> {
    match naming::rename_new(directory, new.as_ref(), FILE.as_ref()) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        // Without hard links a rename can replace another mark. If two services mark such a shared store at the same
        // moment, the service whose mark was replaced notices at its next check.
        Err(errno) if naming::is_without_links(errno) => {
            rustix::fs::renameat(directory, new, directory, FILE)
        }
        Err(errno) => Err(errno),
    }
}

fn sync(directory: &Directory) -> Result<(), Error> {
    rustix::fs::fsync(directory.descriptor()).map_err(|errno| failed(directory, "fsync", "", errno))
}

fn failed(directory: &Directory, action: &'static str, name: &str, errno: Errno) -> Error {
    Error::io(action, &directory.path().join(name).display().to_string(), errno)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::store::open;

    fn store() -> tempfile::TempDir {
        let store = tempfile::tempdir().unwrap();
        std::fs::set_permissions(store.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        store
    }

    #[test]
    fn a_mark_is_created_once_and_distinguishes_stores() {
        let (one, other) = (store(), store());
        let mark = open(one.path()).unwrap().make_mark(&[]).unwrap();
        assert_eq!(open(one.path()).unwrap().make_mark(&[]).unwrap(), mark);
        assert!(open(one.path()).unwrap().check_mark(&mark).is_ok());
        let unmarked = open(other.path()).unwrap().check_mark(&mark);
        assert!(
            matches!(unmarked, Err(Error::OtherStore { is_marked: false, .. })),
            "{unmarked:?}"
        );
        assert_ne!(open(other.path()).unwrap().make_mark(&[]).unwrap(), mark);
        let another = open(other.path()).unwrap().check_mark(&mark);
        assert!(
            matches!(another, Err(Error::OtherStore { is_marked: true, .. })),
            "{another:?}"
        );
    }

    #[test]
    fn a_directory_without_the_recorded_backups_is_marked_only_if_it_is_prepared() {
        let store = store();
        let known = [("web".to_owned(), "20260101T000000Z-00000000".to_owned())];
        let refused = open(store.path()).unwrap().make_mark(&known);
        assert!(
            matches!(refused, Err(Error::NotMounted { backups: 1, .. })),
            "{refused:?}"
        );
        assert_eq!(std::fs::read_dir(store.path()).unwrap().count(), 0);
        std::fs::create_dir(store.path().join(OWN_DIRECTORY)).unwrap();
        std::fs::set_permissions(
            store.path().join(OWN_DIRECTORY),
            std::fs::Permissions::from_mode(0o700),
        )
        .unwrap();
        assert!(open(store.path()).unwrap().make_mark(&known).is_ok());
    }
}
