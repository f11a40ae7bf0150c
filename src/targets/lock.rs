//! QEMU's image locks: shows whether any QEMU on this host has a file or device open, and locks it against other
//! QEMUs.
//!
//! QEMU, `qemu-img` and `qemu-storage-daemon` set shared locks on single bytes of each image that they open (QEMU,
//! block/file-posix.c). Byte 100+n is a permission that they use, byte 200+n a permission that they do not share. The
//! locks belong to the open file description, so QEMU shares the locks of a descriptor that it received.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{Mode, OFlags};

use super::Opener;
use super::identity::{paths_of, sharing};
use super::look::{self, Session};
use crate::files::FileId;

/// The first byte of the used permissions, and the number of bytes to the last of the unshared ones.
const LOCK_BYTES: (i64, i64) = (100, 164);
/// The byte for not sharing the permission "consistent read". Every QEMU with a guest wants that permission. A QEMU
/// that writes a backup never locks or unlocks this byte, so the service's lock and QEMU's locks do not interfere.
const OURS: i64 = 200;

/// Keeps every other QEMU from opening a file or device until it is released or dropped.
#[derive(Debug)]
pub struct ImageLock(Arc<OwnedFd>);

impl ImageLock {
    /// Locks the file or device. Returns `None` if another process has a lock on it. On a file system without locks,
    /// QEMU takes none either, and the function finds none.
    pub fn take(file: &Arc<OwnedFd>) -> io::Result<Option<Self>> {
        let lock = Self(Arc::clone(file));
        match fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, OURS, 1))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(None),
            Err(errno) if is_without_locks(errno) => return Ok(Some(lock)),
            Err(errno) => return Err(errno.into()),
        }
        // Check after locking, so that of two concurrent callers each sees the other.
        Ok((!is_locked(file)?).then_some(lock))
    }

    /// Unlocks. The caller makes sure that QEMU has locks of its own.
    pub fn release(&self) {
        // If unlocking fails, closing the descriptor unlocks.
        let _ = fcntl(&self.0, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, OURS, 1)));
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        self.release();
    }
}

/// The reason why the service does not know whether an image is in use.
#[derive(Debug, thiserror::Error)]
pub enum NotKnown {
    #[error("{0}")]
    Locks(#[from] io::Error),
    #[error("{0}")]
    Look(#[from] look::Error),
}

impl From<NotKnown> for io::Error {
    fn from(error: NotKnown) -> Self {
        match error {
            NotKnown::Locks(error) => error,
            NotKnown::Look(error) => Self::other(error),
        }
    }
}

/// Whether a QEMU, `qemu-img` or `qemu-storage-daemon` has the file or device open, or a file or device that shares
/// bytes with it, such as the file of a loop device. Blocks.
///
/// A lock does not conflict with its own descriptor. A descriptor that a caller passed can be the locked one, so the
/// check also opens the file again. On devices, each node has its own locks, so the check also inspects processes.
/// For a file, the number of other processes' descriptors does not matter.
pub fn is_in_use(session: &mut Session<'_>, file: &OwnedFd) -> Result<bool, NotKnown> {
    if is_locked(file)? {
        return Ok(true);
    }
    if let Ok(again) = open_again(file)
        && is_locked(&again)?
    {
        return Ok(true);
    }
    let id = FileId::of(&rustix::fs::fstat(file).map_err(io::Error::from)?);
    let mut unseen = Vec::new();
    for other in sharing(id) {
        let paths = paths_of(id, other);
        let open = paths.iter().find_map(|path| open_to_look(path).ok());
        if let Some(open) = &open
            && is_locked(open)?
        {
            return Ok(true);
        }
        if matches!(other, FileId::Device(_)) || (open.is_none() && other != id) {
            unseen.push(other);
        }
    }
    Ok(!unseen.is_empty() && session.locker(&unseen)?.is_some())
}

/// Returns a process that has it open in that way, if the service finds one. Blocks.
pub fn user_of_image(session: &mut Session<'_>, file: &OwnedFd) -> Result<Option<Opener>, NotKnown> {
    let id = FileId::of(&rustix::fs::fstat(file).map_err(io::Error::from)?);
    Ok(session.locker(&sharing(id))?)
}

fn open_again(file: &OwnedFd) -> io::Result<OwnedFd> {
    open_to_look(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())))
}

fn open_to_look(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Whether another open file description has one of QEMU's locks.
fn is_locked(file: impl AsFd) -> io::Result<bool> {
    let (first, count) = LOCK_BYTES;
    // Query for an exclusive lock, which conflicts with every lock.
    let mut found = range(libc::F_WRLCK, first, count);
    match fcntl(file, FcntlArg::F_OFD_GETLK(&mut found)) {
        Ok(_) => Ok(i32::from(found.l_type) != libc::F_UNLCK),
        Err(errno) if is_without_locks(errno) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn is_without_locks(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL
    )
}

fn range(kind: i32, first: i64, count: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: first,
        l_len: count,
        // fcntl(2) requires 0 for locks of an open file description.
        l_pid: 0,
    }
}

/// Whether a descriptor has one of QEMU's locks, from its `/proc/PID/fdinfo/FD`. A line has the form of
/// proc_pid_fdinfo(5): `lock: 1: OFDLCK ADVISORY  READ -1 fd:01:1234 100 100`.
pub fn has_image_lock(fdinfo: &str) -> bool {
    let (first, count) = LOCK_BYTES;
    let within = |line: &str| {
        let mut words = line.strip_prefix("lock:")?.split_ascii_whitespace().skip(1);
        // On a kernel without OFD locks, QEMU's locks belong to its process.
        words.next().filter(|kind| ["OFDLCK", "POSIX"].contains(kind))?;
        let start: i64 = words.nth(4)?.parse().ok()?;
        Some(start >= first && start < first + count)
    };
    fdinfo.lines().any(|line| within(line) == Some(true))
}

#[cfg(test)]
mod tests {
    use super::super::look::Look;
    use super::*;

    fn open(path: &std::path::Path) -> Arc<OwnedFd> {
        let file = std::fs::File::options().read(true).write(true).open(path);
        Arc::new(file.unwrap().into())
    }

    #[test]
    fn a_lock_keeps_others_out_until_it_is_released() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, other) = (open(file.path()), open(file.path()));
        let lock = ImageLock::take(&one).unwrap().expect("the file is not locked");
        assert!(ImageLock::take(&other).unwrap().is_none());
        assert!(is_in_use(&mut Look::Own.session(), &other).unwrap());
        lock.release();
        assert!(
            !is_in_use(&mut Look::Own.session(), &other).unwrap(),
            "a refused attempt leaves no lock"
        );
        drop(ImageLock::take(&other).unwrap().expect("it was released"));
        assert!(ImageLock::take(&one).unwrap().is_some(), "dropping releases");
    }

    #[test]
    fn a_descriptor_that_was_locked_itself_is_in_use() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let passed = open(file.path());
        let lock = ImageLock::take(&passed).unwrap();
        assert!(
            !is_locked(&passed).unwrap(),
            "a descriptor does not see its own lock"
        );
        assert!(is_in_use(&mut Look::Own.session(), &passed).unwrap());
        drop(lock);
        assert!(!is_in_use(&mut Look::Own.session(), &passed).unwrap());
    }

    #[test]
    fn only_locks_of_qemu_count() {
        let line = |kind, start| {
            format!("pos:\t0\nflags:\t02\nlock:\t1: {kind} ADVISORY  READ -1 fd:01:77 {start} {start}\n")
        };
        for start in [100, 101, 201] {
            assert!(has_image_lock(&line("OFDLCK", start)), "{start}");
        }
        assert!(!has_image_lock(&line("OFDLCK", 99)) && !has_image_lock(&line("FLOCK", 100)));
        assert!(!has_image_lock("pos:\t100\nflags:\t02\n"));
    }
}
