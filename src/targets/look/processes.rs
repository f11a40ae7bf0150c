//! Reads the open files of other processes from `/proc`.

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::super::budget::{Budget, has_ended};
use super::super::lock::has_image_lock;
use super::{Error, FileId, Opener};

/// The most descriptors of one process to inspect. A QEMU has some hundreds.
const MOST_OF_PROCESS: usize = 16 << 10;
/// The most bytes of their names in total. Further files have no name in the answer.
const MOST_NAMES: usize = 1 << 20;

/// A file that a process has open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFile {
    /// The name under which it was opened, if the name is UTF-8.
    pub name: Option<String>,
    pub file: FileId,
}

/// Returns the open files of a process, or none if another user owns the process. A descriptor that is open as a path
/// only (`O_PATH`) does not count, because any user can open such a path. Fails if the process is hidden from this
/// one, or has too many descriptors. If a user is the owner, it ignores further descriptors instead: that user must not
/// block the backups of others.
pub fn open_files(process: u32, owner: Option<u32>) -> Result<Vec<OpenFile>, Error> {
    if owner.is_some_and(|owner| user_of(process) != Some(owner)) {
        return Ok(Vec::new());
    }
    let (mut files, mut names) = (Vec::new(), MOST_NAMES);
    let may = |error: io::Error| match error.kind() {
        ErrorKind::PermissionDenied => Err(Error::Hidden { process }),
        _ if has_ended(&error) => Ok(()),
        _ => Err(failed(process, &error)),
    };
    let found = match descriptors(process) {
        Ok(found) => found,
        Err(error) => return may(error).map(|()| files),
    };
    for (number, descriptor) in found.enumerate() {
        if number == MOST_OF_PROCESS {
            match owner {
                Some(_) => break,
                None => return Err(Error::TooMany { process }),
            }
        }
        let name = match descriptor.name() {
            Ok(Some(name)) => name,
            Ok(None) => continue,
            Err(error) => {
                may(error)?;
                continue;
            }
        };
        match descriptor.access() {
            Ok(Some(_)) => {}
            Ok(None) => continue,
            Err(error) => {
                may(error)?;
                continue;
            }
        }
        let Some(file) = descriptor.file() else { continue };
        let name = name.into_os_string().into_string().ok();
        let name = name.filter(|name| {
            let left = names.checked_sub(name.len());
            names = left.unwrap_or(names);
            left.is_some()
        });
        files.push(OpenFile { name, file });
    }
    Ok(files)
}

/// Returns a process that has QEMU's locks on one of these files, if this process may inspect it. The function calls
/// `at_work` again and again, and stops at its error.
pub fn locker(
    files: &[FileId],
    mut at_work: impl FnMut() -> Result<(), Error>,
) -> Result<Option<Opener>, Error> {
    let files: HashSet<FileId> = files.iter().copied().collect();
    let mut budget = Budget::new();
    for process in processes() {
        let payer = budget
            .payer_of(process)
            .map_err(|error| failed(process, &error))?;
        let Some(payer) = payer else { continue };
        // docs/security.md lists processes that the system hides even from this one.
        let is_skipped = |error: &io::Error| error.kind() == ErrorKind::PermissionDenied || has_ended(error);
        let found = match descriptors(process) {
            Ok(found) => found,
            Err(error) if is_skipped(&error) => continue,
            Err(error) => return Err(failed(process, &error)),
        };
        for descriptor in found {
            at_work()?;
            if !budget.take(payer) {
                break;
            }
            let locks = descriptor.locks_one_of(&files);
            match locks {
                Ok(true) => return Ok(Some(Opener::of(process))),
                Ok(false) => {}
                Err(error) if is_skipped(&error) => {}
                Err(error) => return Err(failed(process, &error)),
            }
        }
    }
    Ok(None)
}

fn failed(process: u32, error: &io::Error) -> Error {
    Error::Failed(format!(
        "cannot read the open files of process {process}: {error}"
    ))
}

/// Returns the owner of a process: its effective user, or root if it has changed its user or runs a set-user-ID
/// program.
pub fn user_of(process: u32) -> Option<u32> {
    let metadata = std::fs::metadata(format!("/proc/{process}")).ok()?;
    Some(metadata.uid())
}

/// Returns the file name of its program. If the kernel does not show it, returns the process's name, which the
/// process can change.
pub fn program(process: u32) -> String {
    let directory = Path::new("/proc").join(process.to_string());
    let program = std::fs::read_link(directory.join("exe")).ok();
    let program = program.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    program.unwrap_or_else(|| {
        let own = std::fs::read(directory.join("comm")).unwrap_or_default();
        String::from_utf8_lossy(&own).trim_end().to_owned()
    })
}

/// An open descriptor of a process.
pub struct Descriptor {
    /// Its links in `/proc/PID/fd` and `/proc/PID/fdinfo`.
    link: PathBuf,
    info: PathBuf,
}

impl Descriptor {
    /// Returns the name of the open file, or `None` for a socket, a pipe or the like.
    fn name(&self) -> io::Result<Option<PathBuf>> {
        let name = std::fs::read_link(&self.link)?;
        Ok(name.is_absolute().then_some(name))
    }

    fn info(&self) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&std::fs::read(&self.info)?).into_owned())
    }

    fn locks_one_of(&self, files: &HashSet<FileId>) -> io::Result<bool> {
        Ok(self.name()?.is_some()
            && self.file().is_some_and(|id| files.contains(&id))
            && has_image_lock(&self.info()?))
    }

    /// Also returns `None` if the file system hides the file from this process, as FUSE can do. No process writes a
    /// backup there.
    pub fn file(&self) -> Option<FileId> {
        FileId::at(&self.link)
    }

    /// Returns the access mode, from the octal value of `flags:` (proc_pid_fdinfo(5)), or `None` for a descriptor
    /// that is open as a path only.
    pub fn access(&self) -> io::Result<Option<OFlags>> {
        let info = self.info()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
        let flags = flags.ok_or_else(|| io::Error::other("fdinfo has no flags"))?;
        let flags = OFlags::from_bits_retain(flags);
        Ok((!flags.contains(OFlags::PATH)).then_some(flags & OFlags::RWMODE))
    }
}

pub fn descriptors(process: u32) -> io::Result<impl Iterator<Item = Descriptor>> {
    let directory = Path::new("/proc").join(process.to_string());
    let entries = std::fs::read_dir(directory.join("fd"))?;
    let info = directory.join("fdinfo");
    Ok(entries.filter_map(move |entry| {
        let entry = entry.ok()?;
        Some(Descriptor {
            info: info.join(entry.file_name()),
            link: entry.path(),
        })
    }))
}

/// Returns all visible processes.
pub fn processes() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}
