//! Opens files by paths that other users can change, without a race.
//!
//! Opens every component relative to the directory before it, so a path is resolved only once. Must not know what the
//! file is used for.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

/// The kernel follows as many (path_resolution(7)).
const MOST_LINKS: usize = 40;
/// The deepest path. Each directory of it stays open until the path is resolved.
const DEEPEST: usize = 256;

/// The users that are allowed to control the directories of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// Any user: the caller named the path and was authorised for it.
    Named,
    /// Only root and the service's user, because the administrator's data is kept there.
    Administrator,
}

/// Selects the symbolic links that are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    None,
    /// Links that only root and the service's user can create or change: they own all directories above.
    Administrators,
}

/// A path cannot be resolved, or must not be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{path}: does not exist")]
    NotThere { path: String },
    #[error("{path}: is not a directory")]
    NotADirectory { path: String },
    #[error("{path}: is a symbolic link. Name the directory that it points to")]
    SymbolicLink { path: String },
    #[error(
        "{link}: is a symbolic link, and {directory} {why}: users other than root could redirect it. Name the file \
         that it points to"
    )]
    UntrustedLink {
        link: String,
        directory: String,
        why: String,
    },
    #[error(
        "{path}: {why}: users other than root could replace the files below it. Change its owner or mode"
    )]
    Untrusted { path: String, why: String },
    #[error("{path}: leads through too many symbolic links or directories")]
    TooLong { path: String },
    #[error("cannot {action} {path}: {errno}")]
    Io {
        action: &'static str,
        path: String,
        errno: Errno,
    },
}

/// A file that a path resolves to.
#[derive(Debug)]
pub struct Found {
    /// Opened with `O_PATH`.
    pub file: OwnedFd,
    pub stat: Stat,
    /// The path without symbolic links.
    pub path: PathBuf,
}

/// A directory on the path that is being resolved.
struct Step {
    directory: OwnedFd,
    path: PathBuf,
    stat: Stat,
}

/// Opens the directory at an absolute `path` without symbolic links.
pub fn open_directory(path: &Path, trust: Trust) -> Result<OwnedFd, Error> {
    let found = find(path, trust, Links::None)?;
    if FileType::from_raw_mode(found.stat.st_mode) != FileType::Directory {
        return Err(Error::NotADirectory { path: shown(path) });
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(&found.file, ".", flags, Mode::empty()).map_err(io("open", path))
}

/// Resolves an absolute `path`. Checks `trust` for every directory on the way.
pub fn find(path: &Path, trust: Trust, links: Links) -> Result<Found, Error> {
    let mut steps = vec![open_root()?];
    let mut next: Vec<OsString> = backwards(path);
    let mut followed = 0;
    while let Some(name) = next.pop() {
        if name == ".." {
            steps.truncate((steps.len() - 1).max(1));
            continue;
        }
        let Some(above) = steps.last() else { break };
        let path = above.path.join(&name);
        let file = open_below(above, &name, &path)?;
        let stat = rustix::fs::fstat(&file).map_err(io("stat", &path))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                if trust == Trust::Administrator {
                    let path = shown(&path);
                    check_trust(&stat, next.is_empty()).map_err(|why| Error::Untrusted { path, why })?;
                }
                if steps.len() >= DEEPEST {
                    return Err(Error::TooLong { path: shown(&path) });
                }
                let directory = file;
                steps.push(Step {
                    directory,
                    path,
                    stat,
                });
            }
            FileType::Symlink if links == Links::None => {
                return Err(Error::SymbolicLink { path: shown(&path) });
            }
            FileType::Symlink => {
                check_link(&steps, &stat, &path)?;
                followed += 1;
                if followed > MOST_LINKS {
                    return Err(Error::TooLong { path: shown(&path) });
                }
                let target = rustix::fs::readlinkat(&file, "", Vec::new()).map_err(io("read", &path))?;
                let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                if target.is_absolute() {
                    steps.truncate(1);
                }
                next.extend(backwards(&target));
            }
            _ if next.is_empty() => return Ok(Found { file, stat, path }),
            _ => return Err(Error::NotADirectory { path: shown(&path) }),
        }
    }
    // The loop never removes the root.
    steps.pop().map_or_else(
        || Err(Error::NotThere { path: shown(path) }),
        |Step {
             directory,
             path,
             stat,
         }| {
            Ok(Found {
                file: directory,
                stat,
                path,
            })
        },
    )
}

fn open_root() -> Result<Step, Error> {
    let path = Path::new("/");
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(io("open", path))?;
    let stat = rustix::fs::fstat(&directory).map_err(io("stat", path))?;
    Ok(Step {
        directory,
        path: path.to_owned(),
        stat,
    })
}

fn open_below(above: &Step, name: &OsString, path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(&above.directory, name, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::NOENT => Error::NotThere { path: shown(path) },
        Errno::NOTDIR => Error::NotADirectory { path: shown(path) },
        errno => io("open", path)(errno),
    })
}

/// Splits a path into names, last name first.
fn backwards(path: &Path) -> Vec<OsString> {
    let names = path
        .components()
        .rev()
        .filter(|component| matches!(component, Component::Normal(_) | Component::ParentDir));
    names.map(|name| name.as_os_str().to_owned()).collect()
}

/// Checks that only root and the service's user could have created this link, which is in the last of these
/// directories.
fn check_link(steps: &[Step], link: &Stat, path: &Path) -> Result<(), Error> {
    let Some((last, above)) = steps.split_last() else {
        return Ok(());
    };
    // In a sticky directory, users can create links but cannot change the links of others.
    let checks = above.iter().map(|step| (step, check_trust(&step.stat, false)));
    let checks = checks.chain([(last, check_trust(&last.stat, !is_administrators(link)))]);
    for (step, checked) in checks {
        checked.map_err(|why| Error::UntrustedLink {
            link: shown(path),
            directory: shown(&step.path),
            why,
        })?;
    }
    Ok(())
}

fn is_administrators(stat: &Stat) -> bool {
    [0, rustix::process::geteuid().as_raw()].contains(&stat.st_uid)
}

/// Checks that only root and the service's user can change the entries of a directory. In a sticky directory that is
/// not the `last`, it suffices that they own the entry.
pub fn check_trust(stat: &Stat, last: bool) -> Result<(), String> {
    if !is_administrators(stat) {
        return Err(format!("belongs to user {}", stat.st_uid));
    }
    let sticky = stat.st_mode & Mode::SVTX.bits() != 0;
    let writable = stat.st_mode & (Mode::WGRP | Mode::WOTH).bits() != 0;
    if writable && (last || !sticky) {
        return Err("can be written by its group or by all".into());
    }
    Ok(())
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(Errno) -> Error {
    let path = shown(path);
    move |errno| Error::Io { action, path, errno }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    fn follow(path: &Path) -> Result<PathBuf, Error> {
        find(path, Trust::Named, Links::Administrators).map(|found| found.path)
    }

    #[test]
    fn a_link_of_root_is_followed_unless_another_user_owns_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (place, link) = (dir.path().join("place"), dir.path().join("link"));
        fs::create_dir_all(place.join("below")).unwrap();
        fs::write(place.join("below/file"), "").unwrap();
        symlink("place/below/..", &link).unwrap();
        let real = fs::canonicalize(place.join("below/file")).unwrap();
        assert_eq!(follow(&link.join("below/file")), Ok(real.clone()));
        symlink(&real, place.join("absolute")).unwrap();
        assert_eq!(follow(&place.join("absolute")), Ok(real));
        let none = find(&link, Trust::Named, Links::None);
        assert!(matches!(none, Err(Error::SymbolicLink { .. })), "{none:?}");

        chown(&place, Some(65534), None).unwrap();
        let error = follow(&place.join("absolute")).unwrap_err().to_string();
        assert!(
            error.contains("place belongs to user 65534") && error.contains("absolute: is a symbolic link"),
            "{error}"
        );
        assert!(follow(&place.join("below/file")).is_ok(), "the path has no link");
    }

    #[test]
    fn a_link_in_a_sticky_directory_is_followed_only_if_root_owns_it() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "").unwrap();
        symlink(&file, &link).unwrap();
        for (mode, followed) in [(0o1777, true), (0o777, false), (0o770, false)] {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(follow(&link).is_ok(), followed, "{mode:o}");
        }
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        std::os::unix::fs::lchown(&link, Some(65534), None).unwrap();
        assert!(follow(&link).is_err());
    }

    #[test]
    fn a_loop_of_links_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        symlink("other", dir.path().join("one")).unwrap();
        symlink("one", dir.path().join("other")).unwrap();
        let error = follow(&dir.path().join("one")).unwrap_err();
        assert!(matches!(error, Error::TooLong { .. }), "{error}");
    }
}
