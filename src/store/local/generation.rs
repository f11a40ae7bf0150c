//! A store's generation: a value that each service changes with every change of the store, so that an outdated
//! catalog is noticed.

use std::os::fd::OwnedFd;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::directory::Directory;
use super::{Error, OWN_DIRECTORY, Raised};
use crate::offload::Progress;

const FILE: &str = "generation";
const NEW_FILE: &str = "generation.new";
const MAX_BYTES: usize = 256;

/// Returns the generation of a store.
pub fn of(store: &Directory) -> Result<String, Error> {
    match store.below(OWN_DIRECTORY)? {
        Some(shelf) => read(&shelf),
        None => Ok(String::new()),
    }
}

/// Gives a store its next generation durably. Each step counts as progress.
pub fn raise(store: &Directory, progress: &Progress) -> Result<Raised, Error> {
    match rustix::fs::mkdirat(store.descriptor(), OWN_DIRECTORY, Mode::RWXU) {
        Ok(()) => sync(store)?,
        Err(Errno::EXIST) => {}
        Err(errno) => return Err(failed(store, "create", OWN_DIRECTORY, errno)),
    }
    let shelf = store.below(OWN_DIRECTORY)?;
    let shelf = shelf.ok_or_else(|| failed(store, "open", OWN_DIRECTORY, Errno::NOTDIR))?;
    // Two services, even on two hosts, must not raise it at once: one would take the other's change for its own.
    let _locked = lock(&shelf)?;
    let before = read(&shelf)?;
    let number = before
        .split_whitespace()
        .next()
        .and_then(|word| word.parse().ok());
    // The random part distinguishes equal numbers of two services, for example in a copy of the store.
    let now = format!(
        "{} {}",
        number.unwrap_or(0_u64) + 1,
        uuid::Uuid::new_v4().simple()
    );
    progress.add(1);
    write(&shelf, &now, progress)?;
    Ok(Raised { before, now })
}

fn read(shelf: &Directory) -> Result<String, Error> {
    match shelf.read(FILE, MAX_BYTES) {
        Ok((bytes, _)) => Ok(String::from_utf8_lossy(&bytes).trim().to_owned()),
        Err(Error::Io {
            errno: Errno::NOENT, ..
        }) => Ok(String::new()),
        Err(error) => Err(error),
    }
}

fn write(shelf: &Directory, generation: &str, progress: &Progress) -> Result<(), Error> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(shelf.descriptor(), NEW_FILE, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|errno| failed(shelf, "create", NEW_FILE, errno))?;
    let mut file = std::fs::File::from(file);
    std::io::Write::write_all(&mut file, format!("{generation}\n").as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            failed(shelf, "write", NEW_FILE, errno)
        })?;
    progress.add(1);
    rustix::fs::renameat(shelf.descriptor(), NEW_FILE, shelf.descriptor(), FILE)
        .map_err(|errno| failed(shelf, "rename", NEW_FILE, errno))?;
    sync(shelf)
}

/// Locks the directory until the returned descriptor is dropped.
fn lock(shelf: &Directory) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(shelf.descriptor(), ".", flags, Mode::empty())
        .map_err(|errno| failed(shelf, "open", "", errno))?;
    rustix::fs::flock(&directory, FlockOperation::LockExclusive)
        .map_err(|errno| failed(shelf, "lock", "", errno))?;
    Ok(directory)
}

fn sync(shelf: &Directory) -> Result<(), Error> {
    rustix::fs::fsync(shelf.descriptor()).map_err(|errno| failed(shelf, "fsync", "", errno))
}

fn failed(shelf: &Directory, action: &'static str, name: &str, errno: Errno) -> Error {
    Error::io(action, &shelf.path().join(name).display().to_string(), errno)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn each_generation_is_unique_and_its_number_increases() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).unwrap();
        let store = Directory::of_store(path).unwrap();
        assert_eq!(of(&store).unwrap(), "");
        let first = raise(&store, &Progress::default()).unwrap();
        assert_eq!(
            (first.before.as_str(), of(&store).unwrap()),
            ("", first.now.clone())
        );
        let second = raise(&store, &Progress::default()).unwrap();
        assert_eq!(second.before, first.now);
        assert!(
            first.now.starts_with("1 ") && second.now.starts_with("2 "),
            "{second:?}"
        );
        // A copy that continues from here gets another generation.
        std::fs::write(path.join(".backupd/generation"), &first.now).unwrap();
        assert_ne!(raise(&store, &Progress::default()).unwrap().now, second.now);
        std::fs::write(path.join(".backupd/generation"), "nonsense").unwrap();
        assert!(raise(&store, &Progress::default()).unwrap().now.starts_with("1 "));
    }
}
