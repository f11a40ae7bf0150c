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
        Some(own) => read(&own),
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
    let own = store.below(OWN_DIRECTORY)?;
    let own = own.ok_or_else(|| failed(store, "open", OWN_DIRECTORY, Errno::NOTDIR))?;
    // Two services, even on two hosts, must not raise it at once: one would take the other's change for its own.
    let _locked = lock(&own)?;
    let before = read(&own)?;
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
    write(&own, &now, progress)?;
    Ok(Raised { before, now })
}

fn read(directory: &Directory) -> Result<String, Error> {
    match directory.read(FILE, MAX_BYTES) {
        Ok((bytes, _)) => Ok(String::from_utf8_lossy(&bytes).trim().to_owned()),
        Err(Error::Io {
            errno: Errno::NOENT, ..
        }) => Ok(String::new()),
        Err(error) => Err(error),
    }
}

fn write(directory: &Directory, generation: &str, progress: &Progress) -> Result<(), Error> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory.descriptor(), NEW_FILE, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|errno| failed(directory, "create", NEW_FILE, errno))?;
    let mut file = std::fs::File::from(file);
    std::io::Write::write_all(&mut file, format!("{generation}\n").as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            failed(directory, "write", NEW_FILE, errno)
        })?;
    progress.add(1);
    rustix::fs::renameat(directory.descriptor(), NEW_FILE, directory.descriptor(), FILE)
        .map_err(|errno| failed(directory, "rename", NEW_FILE, errno))?;
    sync(directory)
}

/// Locks the directory until the returned descriptor is dropped.
fn lock(directory: &Directory) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let locked = rustix::fs::openat(directory.descriptor(), ".", flags, Mode::empty())
        .map_err(|errno| failed(directory, "open", "", errno))?;
    rustix::fs::flock(&locked, FlockOperation::LockExclusive)
        .map_err(|errno| failed(directory, "lock", "", errno))?;
    Ok(locked)
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
