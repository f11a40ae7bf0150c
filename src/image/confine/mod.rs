//! The sandbox of the programs that read images: no capability, no file but those passed, no network, no other process.
//!
//! What a program parses was written by others, so the program is taken for theirs: it has nothing that is not needed for
//! this one piece of work. The process confines itself and then executes the program (`tether`); nothing here can be undone.
//! docs/security.md has the table of what is left on which kernel. Must not know images or QEMU.

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
mod calls;
mod capabilities;
mod files;

use std::io;
use std::os::fd::RawFd;
use std::path::Path;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};
use serde::{Deserialize, Serialize};

/// What one program gets. Its standard descriptors stay open in any case.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Grants {
    /// Files that it opens again by the number of their descriptor.
    pub files: Vec<PassedFile>,
    /// Further descriptors that it inherits.
    pub others: Vec<RawFd>,
    /// How much memory it can fill, in bytes.
    pub memory: u64,
}

/// An open file that is passed.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct PassedFile {
    pub number: RawFd,
    pub writable: bool,
}

impl PassedFile {
    /// The name by which the process that has it opens it again.
    fn path(self) -> String {
        format!("/proc/self/fd/{}", self.number)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("its descriptors: {0}")]
    Descriptors(io::Error),
    #[error("its limits: {0}")]
    Limits(Errno),
    #[error("its capabilities: {0}")]
    Capabilities(Errno),
    #[error("Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    #[error("its system calls: {0}")]
    Calls(#[from] seccompiler::Error),
}

/// Whether the compiler of filters knows this processor: those for which there is `calls`.
const HAS_FILTER: bool = cfg!(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    target_arch = "riscv64"
));

/// Why programs that read images are confined less than they could be on this machine; nothing where they are confined.
pub fn is_incomplete() -> Option<&'static str> {
    if !files::is_supported() {
        Some(
            "the kernel has no Landlock: programs that read images have no capability, but could open other files of the user that \
             runs them",
        )
    } else if !HAS_FILTER {
        Some("programs that read images can make any system call on this processor")
    } else {
        None
    }
}

/// Address space beyond the memory that a program can fill: programs, libraries, and what allocators reserve for each thread.
const RESERVED: u64 = 16 << 30;

/// Confines this process, which must have one thread, for ever. All that is left to do is to execute `program`.
pub fn enter(grants: &Grants, program: &Path) -> Result<(), Error> {
    close_others(grants).map_err(Error::Descriptors)?;
    // If memory is short, a checker is lost rather than the service or a VM. Where this is not possible, the limit remains.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    for (resource, most) in [
        (Resource::Data, grants.memory),
        (Resource::As, grants.memory.saturating_add(RESERVED)),
        // A core file would hold the data of a VM.
        (Resource::Core, 0),
    ] {
        limit(resource, most).map_err(Error::Limits)?;
    }
    capabilities::drop_for(&grants.files).map_err(Error::Capabilities)?;
    rustix::thread::set_no_new_privs(true).map_err(Error::Capabilities)?;
    let has_landlock = files::restrict(&grants.files, program)?;
    // The last: it refuses the calls that all this took. Where Landlock keeps no file from being opened, one that writes nothing
    // opens none for writing: its images are not locked then, see `files`.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
    calls::restrict(has_landlock || grants.files.iter().any(|file| file.writable))?;
    Ok(())
}

/// Closes what the service's own parent may have left open.
fn close_others(grants: &Grants) -> io::Result<()> {
    let files = grants.files.iter().map(|file| file.number);
    let kept: Vec<RawFd> = files.chain(grants.others.iter().copied()).collect();
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        open.extend(
            entry?
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<RawFd>().ok()),
        );
    }
    for number in open
        .into_iter()
        .filter(|number| *number > 2 && !kept.contains(number))
    {
        // One of them was the directory's, which is closed already.
        let _ = nix::unistd::close(number);
    }
    Ok(())
}

/// Lowers a limit, for ever. A lower one stays.
fn limit(resource: Resource, most: u64) -> Result<(), Errno> {
    let now = rustix::process::getrlimit(resource);
    let lower = |limit: Option<u64>| Some(limit.map_or(most, |limit| limit.min(most)));
    let limits = Rlimit {
        current: lower(now.current),
        maximum: lower(now.maximum),
    };
    rustix::process::setrlimit(resource, limits)
}
