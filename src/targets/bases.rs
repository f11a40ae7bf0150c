//! Locks the bases of a running backup until the backup is published.

use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::Error;
use crate::checkpoint::{Base, Mode};
use crate::plan::{Destination, Plan};
use crate::store::{self, BackupLock, BackupName, LockKind, OpenBackup};

/// The locked bases of one backup. A removal looks for dependents in the catalog, so the locks last until the catalog
/// has the new backup.
#[derive(Debug, Default)]
#[must_use]
pub struct Bases(Vec<LockedBase>);

#[derive(Debug)]
struct LockedBase {
    disk: String,
    store: PathBuf,
    domain: String,
    base: Base,
    length: u64,
    /// While this lock is held, the base is not removed or replaced.
    _lock: BackupLock,
}

impl Bases {
    /// Locks all direct bases. Their own bases need no lock, because a backup with dependents is not removed.
    pub fn lock(plan: &Plan) -> Result<Self, Error> {
        let Destination::Store { path, directory, .. } = &plan.destination else {
            return Ok(Self::default());
        };
        let based = plan.disks.iter().filter_map(|disk| match &disk.mode {
            Mode::Incremental(base) => Some((disk.name.clone(), base.clone())),
            Mode::Full { .. } => None,
        });
        let locked = based.map(|(disk, base)| {
            let backup = find(path, directory.as_str(), &disk, &base)?;
            Ok(LockedBase {
                length: backup.size_of(&base.file)?,
                _lock: backup.lock(LockKind::Shared)?,
                store: path.clone(),
                domain: directory.as_str().to_owned(),
                disk,
                base,
            })
        });
        locked.collect::<Result<_, _>>().map(Self)
    }

    /// Checks that the bases are unchanged, because a program that ignores the locks can remove them.
    pub fn check(&self) -> Result<(), Error> {
        self.0.iter().try_for_each(|locked| {
            let LockedBase { disk, base, .. } = locked;
            let backup = find(&locked.store, &locked.domain, disk, base);
            let length = backup.and_then(|backup| Ok(backup.size_of(&base.file)?));
            match length {
                Ok(length) if length == locked.length => Ok(()),
                Ok(_) => Err(Error::Parent {
                    disk: disk.to_owned(),
                    backup: base.backup.clone(),
                    why: "was changed or replaced",
                }),
                Err(Error::Io {
                    errno: Errno::NOENT, ..
                }) => Err(gone(disk, base)),
                // If the storage does not answer, the state of the base is unknown.
                Err(error) => Err(error),
            }
        })
    }
}

fn find(store: &Path, domain: &str, disk: &str, base: &Base) -> Result<Box<dyn OpenBackup>, Error> {
    let id = &base.backup;
    let backup = store::open(store)?.open(BackupName { domain, id })?;
    backup.ok_or_else(|| gone(disk, base))
}

fn gone(disk: &str, base: &Base) -> Error {
    Error::NoParent {
        disk: disk.to_owned(),
        backup: base.backup.clone(),
    }
}
