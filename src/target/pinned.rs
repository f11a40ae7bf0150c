//! The identity of the places that a caller named by path, from the call until the backup leaves the queue.

use std::path::{Path, PathBuf};

use rustix::fs::AtFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::Error;
use super::identity::FileId;
use crate::path::{Trust, open_directory};
use crate::plan::{Place, Plan};

/// A path, and what was there when it was authorised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Pinned {
    path: PathBuf,
    is_device: bool,
    directory: FileId,
    /// Nothing where there was no file.
    file: Option<FileId>,
}

/// Looks what is at the paths of a plan; none in a store, and none of descriptors. Blocks.
pub fn pin(plan: &Plan) -> Result<Vec<Pinned>, Error> {
    let paths = plan.disks.iter().filter_map(|disk| match &disk.place {
        Place::File(path) => Some((path, false)),
        Place::Block(path) => Some((path, true)),
        Place::InStore { .. } | Place::Descriptor(_) => None,
    });
    paths
        .map(|(path, is_device)| Pinned::at(path, is_device))
        .collect()
}

/// Fails unless the same is there as then. A file that has come since is refused, or not, when it is opened. Blocks.
pub fn check_pinned(then: &[Pinned]) -> Result<(), Error> {
    for then in then {
        let now = Pinned::at(&then.path, then.is_device)?;
        if now.directory != then.directory || then.file.is_some() && now.file != then.file {
            let target = then.path.display().to_string();
            return Err(Error::PlaceChanged { target });
        }
    }
    Ok(())
}

impl Pinned {
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
        let of_directory =
            rustix::fs::fstat(&directory).map_err(|errno| Error::io("look up", &label, errno))?;
        let file = match rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Some(FileId::of(&stat)),
            Err(Errno::NOENT) => None,
            Err(errno) => return Err(Error::io("look up", &label, errno)),
        };
        Ok(Self {
            path: path.to_owned(),
            is_device,
            directory: FileId::of(&of_directory),
            file,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn another_file_or_directory_at_the_path_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("targets");
        fs::create_dir(&below).unwrap();
        let path = below.join("a");
        let new = vec![Pinned::at(&path, false).unwrap()];
        check_pinned(&new).unwrap();
        fs::write(&path, "").unwrap();
        // It is refused elsewhere, with a better reason.
        check_pinned(&new).unwrap();
        let existing = vec![Pinned::at(&path, false).unwrap()];
        check_pinned(&existing).unwrap();
        fs::rename(&path, below.join("kept")).unwrap();
        assert!(check_pinned(&existing).is_err(), "it is gone");
        fs::write(&path, "").unwrap();
        assert!(check_pinned(&existing).is_err(), "it is another file");
        fs::rename(&below, directory.path().join("kept")).unwrap();
        fs::create_dir(&below).unwrap();
        assert!(check_pinned(&new).is_err(), "it is another directory");
    }
}
