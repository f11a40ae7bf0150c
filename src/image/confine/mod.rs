//! The sandbox of the programs that read images: no capabilities, no files but those passed, no network, no other
//! processes.
//!
//! Others wrote the data that a program parses, so the program itself is not trusted and gets only the rights for this
//! task. The process confines itself and then executes the program (`tether`). The confinement is irrevocable.
//! docs/security.md has a table of the remaining rights for each kernel. Must not know images or QEMU.

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

/// The rights of one program. Its standard descriptors always stay open.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Grants {
    /// Files that the program reopens by their descriptor numbers.
    pub files: Vec<PassedFile>,
    /// Further descriptors that it inherits.
    pub others: Vec<RawFd>,
    /// The memory that it can fill, in bytes.
    pub memory: u64,
}

/// An open file that is passed to the program.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct PassedFile {
    pub number: RawFd,
    pub writable: bool,
}

impl PassedFile {
    /// The path by which the process reopens the file.
    fn path(self) -> String {
        format!("/proc/self/fd/{}", self.number)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot close descriptors: {0}")]
    Descriptors(io::Error),
    #[error("cannot set resource limits: {0}")]
    Limits(Errno),
    #[error("cannot drop capabilities: {0}")]
    Capabilities(Errno),
    #[error("cannot apply Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    #[error("cannot filter system calls: {0}")]
    Calls(#[from] seccompiler::Error),
}

/// Whether seccompiler supports this processor. `calls` exists only then.
const HAS_FILTER: bool = cfg!(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    target_arch = "riscv64"
));

/// Returns the reason why this machine cannot confine programs fully; `None` if it can.
pub fn is_incomplete() -> Option<&'static str> {
    if !files::is_supported() {
        Some(
            "the kernel has no Landlock: programs that read images have no capabilities, but can open other files of \
             the user that \
             runs them",
        )
    } else if !HAS_FILTER {
        Some("programs that read images can make any system call on this processor")
    } else {
        None
    }
}

/// Address space beyond the usable memory: programs, libraries, and the reservations of allocators for each thread.
const RESERVED: u64 = 16 << 30;

/// Confines this process irrevocably. It must have one thread, and may only execute `program` afterwards.
pub fn enter(grants: &Grants, program: &Path) -> Result<(), Error> {
    close_others(grants).map_err(Error::Descriptors)?;
    // If memory is short, the kernel kills this program rather than the service or a VM. If this fails, the limit
    // remains.
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
    // Last, because it refuses the calls above. Without Landlock, a program that writes no image may open no file for
    // writing. Then its images are not locked, see `files`.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
    calls::restrict(has_landlock || grants.files.iter().any(|file| file.writable))?;
    Ok(())
}

/// Closes descriptors that the service's parent may have left open.
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
        // The directory's own descriptor is closed already.
        let _ = nix::unistd::close(number);
    }
    Ok(())
}

/// Lowers a limit irrevocably. A lower one stays.
fn limit(resource: Resource, most: u64) -> Result<(), Errno> {
    let now = rustix::process::getrlimit(resource);
    let lower = |limit: Option<u64>| Some(limit.map_or(most, |limit| limit.min(most)));
    let limits = Rlimit {
        current: lower(now.current),
        maximum: lower(now.maximum),
    };
    rustix::process::setrlimit(resource, limits)
}
