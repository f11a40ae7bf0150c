//! Opens directories so that none can be replaced on the way.
//!
//! Every component is opened from the one before it, and a symbolic link is refused anywhere in the path: so a
//! path is resolved once.

use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::Error;

/// Who may have a hand in the directories of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// Anybody: the caller named the path and was authorised for it.
    Named,
    /// Root and the service's user only: data is kept there for the administrator.
    Administrator,
}

/// Opens the directory at an absolute `path`.
pub fn open_directory(path: &Path, trust: Trust) -> Result<OwnedFd, Error> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut walked = PathBuf::from("/");
    let mut directory =
        rustix::fs::openat(CWD, "/", flags, Mode::empty()).map_err(|errno| Error::io("open", "/", errno))?;
    let mut components = path
        .components()
        .filter(|component| *component != Component::RootDir)
        .peekable();
    while let Some(component) = components.next() {
        walked.push(component);
        let shown = || walked.display().to_string();
        directory =
            rustix::fs::openat(&directory, component.as_os_str(), flags, Mode::empty()).map_err(|errno| {
                match errno {
                    Errno::NOENT => Error::NoDirectory { path: shown() },
                    Errno::NOTDIR => Error::NotADirectory { path: shown() },
                    errno => Error::io("open", &shown(), errno),
                }
            })?;
        let stat = rustix::fs::fstat(&directory).map_err(|errno| Error::io("stat", &shown(), errno))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {}
            FileType::Symlink => return Err(Error::SymbolicLink { path: shown() }),
            _ => return Err(Error::NotADirectory { path: shown() }),
        }
        if trust == Trust::Administrator {
            check_trust(&stat, components.peek().is_none())
                .map_err(|why| Error::Untrusted { path: shown(), why })?;
        }
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(&directory, ".", flags, Mode::empty())
        .map_err(|errno| Error::io("open", &path.display().to_string(), errno))
}

/// Whether only root and the service's user can change what is in a directory, or, in one with the sticky bit
/// that is not the `last`, what they own there.
pub fn check_trust(stat: &Stat, last: bool) -> Result<(), String> {
    let service = rustix::process::geteuid().as_raw();
    if stat.st_uid != 0 && stat.st_uid != service {
        return Err(format!("belongs to user {}", stat.st_uid));
    }
    let sticky = stat.st_mode & Mode::SVTX.bits() != 0;
    let writable = stat.st_mode & (Mode::WGRP | Mode::WOTH).bits() != 0;
    if writable && (last || !sticky) {
        return Err("can be written by its group or by all".into());
    }
    Ok(())
}
