//! Looks up the file of a loop device without waiting for its storage.
//!
//! Any user can have a loop device on a file system of their own (FUSE), whose server need not answer.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use crate::files::FileId;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, makedev};
use rustix::io::Errno;

/// The kernel also fails a lookup without waiting if a rename happens at that moment.
const TRIES: usize = 8;
/// The most mounts to read. A host has some tens.
const MOST_MOUNTS: usize = 1 << 16;
/// File systems whose files have another device number than their mount.
const OWN_NUMBERS: [&str; 2] = ["btrfs", "overlay"];

/// Returns the file at `path`, which a loop device uses. If only the storage has the answer, the function calls
/// `is_wanted` with the device number, and waits for the storage only if that returns true.
///
/// The kernel caches the directories of an open file, so of each loop device's file. So a lookup finds the file
/// without an answer of the server, unless the file system wants to be asked each time.
pub fn look(path: &Path, is_wanted: impl Fn(u64) -> bool) -> Option<FileId> {
    match cached(path) {
        Ok(id) => Some(id),
        // The lookup would wait, or the kernel is older than Linux 5.12.
        Err(Errno::AGAIN | Errno::NOSYS | Errno::INVAL | Errno::PERM) => {
            let may_be = mount_of(path)
                .is_none_or(|(device, kind)| is_wanted(device) || OWN_NUMBERS.contains(&kind.as_str()));
            may_be.then(|| FileId::at(path)).flatten()
        }
        Err(_) => None,
    }
}

fn cached(path: &Path) -> Result<FileId, Errno> {
    let open = || {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::CACHED)
    };
    let opened = (1..TRIES)
        .map(|_| open())
        .find(|result| !matches!(result, Err(Errno::AGAIN)));
    let file = match opened {
        Some(result) => result?,
        None => open()?,
    };
    let known = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(&file, "", known, StatxFlags::BASIC_STATS)?;
    Ok(FileId::of_statx(&stat))
}

/// Returns the device number and the type of the file system of `path`, by its name alone (proc_pid_mountinfo(5)).
fn mount_of(path: &Path) -> Option<(u64, String)> {
    let mounts = BufReader::new(File::open("/proc/self/mountinfo").ok()?);
    let mut found: Option<(usize, u64, String)> = None;
    for line in mounts.lines().take(MOST_MOUNTS) {
        let line = line.ok()?;
        let Some((point, device, kind)) = mount(&line) else {
            continue;
        };
        // A later mount hides an earlier one.
        if path.starts_with(&point) && found.as_ref().is_none_or(|(length, ..)| point.len() >= *length) {
            found = Some((point.len(), device, kind.to_owned()));
        }
    }
    found.map(|(_, device, kind)| (device, kind))
}

/// Parses a line such as `36 35 98:0 / /mnt\040point rw,noatime master:1 - ext4 /dev/root rw` to mount point, device
/// number and type.
fn mount(line: &str) -> Option<(String, u64, &str)> {
    let (mount, system) = line.split_once(" - ")?;
    let mut words = mount.split(' ').skip(2);
    let (major, minor) = words.next()?.split_once(':')?;
    let device = makedev(major.parse().ok()?, minor.parse().ok()?);
    let mut point = words.nth(1)?.to_owned();
    for (escape, c) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        point = point.replace(escape, c);
    }
    Some((point, device, system.split(' ').next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_in_the_cache_is_found_without_asking() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let found = look(file.path(), |_| panic!("the lookup need not wait"));
        assert_eq!(found, FileId::at(file.path()));
        assert_eq!(look(Path::new("/nonexistent"), |_| true), None);
    }

    #[test]
    fn a_mount_is_found_by_the_longest_name() {
        let line = "36 35 98:5 / /mnt/a\\040b rw,noatime master:1 shared:2 - fuse.sshfs anna@host: rw";
        let device = makedev(98, 5);
        assert_eq!(mount(line), Some(("/mnt/a b".to_owned(), device, "fuse.sshfs")));
        let (device, _) = mount_of(Path::new("/proc/self/fd")).unwrap();
        let FileId::File { device: proc, .. } = FileId::at(Path::new("/proc/version")).unwrap() else {
            panic!()
        };
        assert_eq!(device, proc);
    }
}
