//! Processes that may write into what is to be replaced or overwritten.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::identity::{FileId, processes, related};

/// A process that has a file or device open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opener {
    pub process: u32,
    /// Its program.
    pub name: String,
}

/// Another process that has open for writing what `file` is open on, or a device or file that shares bytes with it. A QEMU
/// counts also if it reads: with `auto-read-only` it opens a disk for writing only while its guest may write, so not while
/// it waits for a migration.
///
/// Root sees every process of its PID namespace, others see their own. Not seen are mappings whose descriptor is closed,
/// descriptors on their way through a socket, and other hosts. Blocks.
pub fn opener(file: &OwnedFd) -> io::Result<Option<Opener>> {
    let shared = related(FileId::of(&rustix::fs::fstat(file)?));
    // Of two partitions of one disk, either is free while the other is used: below a device, only its file counts.
    let touches = |open: FileId| {
        shared.contains(&open)
            || matches!(open, FileId::Device(_))
                && related(open)
                    .iter()
                    .any(|id| matches!(id, FileId::File { .. }) && shared.contains(id))
    };
    let mut others = processes().filter(|process| *process != std::process::id());
    let opens = |process: &u32| {
        let (directory, reading) = (process_directory(*process), name(*process).starts_with("qemu"));
        descriptors(*process).any(|number| {
            FileId::at(&directory.join("fd").join(&number)).is_some_and(touches)
                && may_write(&directory.join("fdinfo").join(&number), reading)
        })
    };
    let found = others.find(opens);
    Ok(found.map(|process| Opener {
        process,
        name: name(process),
    }))
}

fn process_directory(process: u32) -> PathBuf {
    Path::new("/proc").join(process.to_string())
}

/// The numbers of its open descriptors.
fn descriptors(process: u32) -> impl Iterator<Item = std::ffi::OsString> {
    let entries = std::fs::read_dir(process_directory(process).join("fd"));
    entries
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.file_name()))
}

/// The file name of its program; its own word, which it can change, where that is not shown.
fn name(process: u32) -> String {
    let directory = process_directory(process);
    let program = std::fs::read_link(directory.join("exe")).ok();
    let program = program.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    program.unwrap_or_else(|| {
        let own = std::fs::read_to_string(directory.join("comm"));
        own.unwrap_or_default().trim_end().to_owned()
    })
}

/// Whether a descriptor is open for writing, or `reading` counts too; from its line `flags:` (proc_pid_fdinfo(5)), in octal.
fn may_write(fdinfo: &Path, reading: bool) -> bool {
    let Ok(text) = std::fs::read_to_string(fdinfo) else {
        return false;
    };
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| {
        let flags = OFlags::from_bits_retain(flags);
        !flags.contains(OFlags::PATH) && (reading || flags & OFlags::RWMODE != OFlags::RDONLY)
    })
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A process with the file as its standard output or input.
    fn sleeper(path: &Path, writes: bool) -> Child {
        let file = std::fs::File::options().read(!writes).write(writes).open(path);
        let file = Stdio::from(file.unwrap());
        let mut command = Command::new("sleep");
        command.arg("60");
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
        let mut reader = sleeper(file.path(), false);
        assert_eq!(opener(&passed).unwrap(), None);
        let mut writer = sleeper(file.path(), true);
        let found = opener(&passed).unwrap().expect("it is open");
        assert_eq!(found.process, writer.id());
        for child in [&mut reader, &mut writer] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(opener(&passed).unwrap(), None);
    }
}
