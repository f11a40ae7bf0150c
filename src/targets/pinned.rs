//! The identities of the files at the paths that a caller named, from the queueing of the backup until they are open.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Statx, StatxFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{Error, Publication, Target};
use crate::files::FileId;
use crate::path::{Trust, open_directory};
use crate::plan::{Plan, TargetPlan};

/// A path, and the file at it when the backup was queued.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Pinned {
    path: PathBuf,
    is_device: bool,
    directory: Inode,
    /// `None` if there was no file.
    file: Option<Inode>,
}

/// A file or directory, and its creation time, because ext4 and XFS reuse inode numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Inode {
    id: FileId,
    /// Seconds and nanoseconds, if the file system has them. `None` for a device, because its node can be created
    /// again.
    born: Option<(i64, u32)>,
}

const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

impl Inode {
    fn of_open(file: impl AsFd) -> Result<Self, Errno> {
        rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, WANTED).map(|stat| Self::of(&stat))
    }

    fn of(stat: &Statx) -> Self {
        let id = FileId::of_statx(stat);
        let is_known = matches!(id, FileId::File { .. }) && stat.stx_mask & StatxFlags::BTIME.bits() != 0;
        Self {
            id,
            born: is_known.then_some((stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec)),
        }
    }
}

/// Records the files at the paths of a plan, except paths in a store and descriptors. Blocks.
pub fn pin(plan: &Plan) -> Result<Vec<Pinned>, Error> {
    let paths = plan.disks.iter().filter_map(|disk| match &disk.target {
        TargetPlan::File(path) => Some((path, false)),
        TargetPlan::Block(path) => Some((path, true)),
        TargetPlan::InStore { .. } | TargetPlan::Descriptor(_) => None,
    });
    paths
        .map(|(path, is_device)| Pinned::at(path, is_device))
        .collect()
}

/// Fails unless the same files are at the paths. A file that appeared since is checked when it is opened. Blocks.
pub fn check_pinned(then: &[Pinned]) -> Result<(), Error> {
    for then in then {
        let now = Pinned::at(&then.path, then.is_device)?;
        if now.directory != then.directory || then.file.is_some() && now.file != then.file {
            return Err(then.changed());
        }
    }
    Ok(())
}

/// Checks a target that was opened or created at `path`, because the path may have changed after the previous check.
/// Blocks.
pub(super) fn check_opened(then: &[Pinned], path: &Path, target: &Target) -> Result<(), Error> {
    let failed = |errno| Error::io("look up", &target.label, errno);
    for then in then.iter().filter(|then| then.path == path) {
        let is_same = match &target.publication {
            Publication::Rename(partial) => {
                Inode::of_open(partial.directory()).map_err(failed)? == then.directory
            }
            Publication::InPlace => {
                let now = Inode::of_open(&target.file).map_err(failed)?;
                match then.file {
                    Some(then) => now == then,
                    None => return Err(then.appeared()),
                }
            }
            Publication::InStore { .. } => true,
        };
        if !is_same {
            return Err(then.changed());
        }
    }
    Ok(())
}

impl Pinned {
    fn appeared(&self) -> Error {
        Error::PlaceAppeared {
            target: self.path.display().to_string(),
        }
    }

    fn changed(&self) -> Error {
        Error::PlaceChanged {
            target: self.path.display().to_string(),
        }
    }

    fn at(path: &Path, is_device: bool) -> Result<Self, Error> {
        let label = path.display().to_string();
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::io("look up", &label, Errno::INVAL));
        };
        let trust = match is_device {
            true => Trust::Administrator,
            false => Trust::Named,
        };
        let directory = open_directory(parent, trust)?;
        let of_directory = Inode::of_open(&directory).map_err(|errno| Error::io("look up", &label, errno))?;
        let file = match rustix::fs::statx(&directory, name, AtFlags::SYMLINK_NOFOLLOW, WANTED) {
            Ok(stat) => Some(Inode::of(&stat)),
            Err(Errno::NOENT) => None,
            Err(errno) => return Err(Error::io("look up", &label, errno)),
        };
        Ok(Self {
            path: path.to_owned(),
            is_device,
            directory: of_directory,
            file,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::targets::file;

    #[test]
    fn a_path_that_changes_between_the_check_and_the_opening_is_noticed() {
        let above = tempfile::tempdir_in("/var/tmp").unwrap();
        let (path, new) = (above.path().join("a"), above.path().join("b"));
        fs::write(&path, "").unwrap();
        let then = [&path, &new].map(|path| Pinned::at(path, false).unwrap());
        let existing = file::open_existing("vda", &path).unwrap();
        check_opened(&then, &path, &existing).unwrap();
        assert!(
            check_opened(&then, &new, &{
                fs::write(&new, "").unwrap();
                file::open_existing("vda", &new).unwrap()
            })
            .is_err_and(|error| error.to_string().contains("did not exist"))
        );
        fs::remove_file(&new).unwrap();
        let made = file::create("vda", &new, "1", 0).unwrap();
        check_opened(&then, &new, &made).unwrap();

        // Simulates a reused inode number.
        let mut reused = then.clone();
        reused[0].file.as_mut().unwrap().born = Some((1, 1));
        reused[1].directory.born = Some((1, 1));
        assert!(check_opened(&reused, &path, &existing).is_err());
        assert!(check_opened(&reused, &new, &made).is_err());
        fs::rename(&path, above.path().join("kept")).unwrap();
        fs::write(&path, "").unwrap();
        let other = file::open_existing("vda", &path).unwrap();
        assert!(check_opened(&then, &path, &other).is_err());
    }

    #[test]
    fn a_recreated_file_is_another_even_with_the_same_number() {
        let above = tempfile::tempdir_in("/var/tmp").unwrap();
        let below = above.path().join("targets");
        let path = below.join("a");
        let make = || {
            fs::create_dir(&below).unwrap();
            fs::write(&path, "").unwrap();
            vec![Pinned::at(&path, false).unwrap()]
        };
        let then = make();
        check_pinned(&then).unwrap();
        let now = loop {
            fs::remove_dir_all(&below).unwrap();
            let now = make();
            // The kernel's clock for files advances only some hundred times a second.
            if now[0].directory.born != then[0].directory.born && now[0].file != then[0].file {
                break now;
            }
        };
        assert!(check_pinned(&then).is_err());
        // Simulates reused inode numbers.
        let (mut file, mut directory) = (now.clone(), now);
        file[0].file.as_mut().unwrap().born = then[0].file.unwrap().born;
        directory[0].directory.born = then[0].directory.born;
        assert!(check_pinned(&file).is_err() && check_pinned(&directory).is_err());
    }

    #[test]
    fn another_file_or_directory_at_the_path_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("targets");
        fs::create_dir(&below).unwrap();
        let path = below.join("a");
        let new = vec![Pinned::at(&path, false).unwrap()];
        check_pinned(&new).unwrap();
        fs::write(&path, "").unwrap();
        // Another check refuses it, with a better reason.
        check_pinned(&new).unwrap();
        let existing = vec![Pinned::at(&path, false).unwrap()];
        check_pinned(&existing).unwrap();
        fs::rename(&path, below.join("kept")).unwrap();
        assert!(check_pinned(&existing).is_err(), "the file was removed");
        fs::write(&path, "").unwrap();
        assert!(check_pinned(&existing).is_err(), "it is another file");
        fs::rename(&below, directory.path().join("kept")).unwrap();
        fs::create_dir(&below).unwrap();
        assert!(check_pinned(&new).is_err(), "it is another directory");
    }
}
