//! Finds processes that may write to a file or device that is to be overwritten.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::budget::has_ended;
use super::identity::{Behind, related, related_to};
use super::look::{descriptors, processes, program, user_of};
use crate::files::FileId;

/// How long a process must have a file open to count as its user. Programs that look for a free or changed device, such
/// as `losetup --find`, open each one for writing for a moment.
const PASSING: Duration = Duration::from_secs(1);
/// The time between two looks within [`PASSING`].
const STEP: Duration = Duration::from_millis(50);

/// A process that has a file or device open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opener {
    pub process: u32,
    /// The name of its program.
    pub name: String,
    /// The user of the process, if the process still exists.
    pub user: Option<u32>,
}

impl Opener {
    pub(super) fn of(process: u32) -> Self {
        Self {
            process,
            name: program(process),
            user: user_of(process),
        }
    }
}

impl fmt::Display for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}, {}", self.process, self.name)?;
        self.user.map_or(Ok(()), |user| write!(f, ", of user {user}"))
    }
}

/// Returns another process that has the file or device open for writing, or one that shares bytes with it. A process
/// that closes it within [`PASSING`] does not count. A QEMU also counts if it only reads. With `auto-read-only` it opens
/// a disk for writing only while its guest may write, so not while it waits for a migration.
///
/// Root sees every process of its PID namespace; others see their own. The function does not see mappings whose
/// descriptor is closed, descriptors in flight through a socket, or other hosts. Blocks.
pub fn opener(file: &OwnedFd) -> io::Result<Option<Opener>> {
    let shared = related(FileId::of(&rustix::fs::fstat(file)?));
    // If one partition of a disk is in use, the other partitions are free. So below a device, only its file counts.
    let touches = |open: FileId| {
        shared.contains(&open)
            || matches!(open, FileId::Device(_))
                && related_to(open, Behind::OfOthers(&shared))
                    .iter()
                    .any(|id| matches!(id, FileId::File { .. }) && shared.contains(id))
    };
    let mut found = Vec::new();
    for process in processes().filter(|process| *process != std::process::id()) {
        if opens(process, &touches)? {
            found.push(process);
        }
    }
    let end = Instant::now() + PASSING;
    while !found.is_empty() && Instant::now() < end {
        thread::sleep(STEP);
        let mut still = Vec::new();
        for process in found {
            if opens(process, &touches)? {
                still.push(process);
            }
        }
        found = still;
    }
    Ok(found.first().map(|process| Opener::of(*process)))
}

/// Whether a process has a file for which `touches` is true open for writing, or is a QEMU and has it open at all.
fn opens(process: u32, touches: &impl Fn(FileId) -> bool) -> io::Result<bool> {
    let is_hidden = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied || has_ended(error);
    let found = match descriptors(process) {
        Ok(found) => found,
        Err(error) if is_hidden(&error) => return Ok(false),
        Err(error) => return Err(error),
    };
    let reading = program(process).starts_with("qemu");
    for descriptor in found {
        // Check the access first: it is cheapest, and any user can open any file as a path only (O_PATH).
        let access = match descriptor.access() {
            Err(error) if is_hidden(&error) => continue,
            access => access?,
        };
        let counts = access.is_some_and(|access| reading || access != OFlags::RDONLY);
        if counts && descriptor.file().is_some_and(touches) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A process with the file as its standard output or input for that many seconds.
    fn sleeper(path: &Path, writes: bool, seconds: &str) -> Child {
        let file = std::fs::File::options().read(!writes).write(writes).open(path);
        let file = Stdio::from(file.unwrap());
        let mut command = Command::new("sleep");
        command.arg(seconds);
        match writes {
            true => command.stdout(file),
            false => command.stdin(file),
        };
        command.spawn().unwrap()
    }

    #[test]
    fn a_process_that_has_a_file_open_for_writing_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let passed = OwnedFd::from(file.reopen().unwrap());
        assert_eq!(opener(&passed).unwrap(), None, "its own descriptors do not count");
        let mut reader = sleeper(file.path(), false, "60");
        assert_eq!(opener(&passed).unwrap(), None);
        let mut writer = sleeper(file.path(), true, "60");
        let found = opener(&passed).unwrap().expect("it is open");
        assert_eq!(found.process, writer.id());
        for child in [&mut reader, &mut writer] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(opener(&passed).unwrap(), None);
    }

    #[test]
    fn a_process_that_opens_a_file_for_a_moment_is_not_its_user() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let passed = OwnedFd::from(file.reopen().unwrap());
        let mut passing = sleeper(file.path(), true, "0.2");
        assert_eq!(opener(&passed).unwrap(), None);
        passing.wait().unwrap();
    }
}
