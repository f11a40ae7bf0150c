//! Locks the bases of a running backup until the backup is published.

use std::path::PathBuf;

use rustix::io::Errno;

use super::Error;
use super::inventory::{Held, Sharing, Shelf};
use crate::checkpoint::{Base, Mode};
use crate::plan::{Destination, Plan};

/// The locked bases of one backup. A removal looks for dependents in the catalog, so the locks last until the catalog
/// has the new backup.
#[derive(Debug, Default)]
#[must_use]
pub struct Parents(Vec<Parent>);

#[derive(Debug)]
struct Parent {
    disk: String,
    store: PathBuf,
    domain: String,
    base: Base,
    length: u64,
    /// While this lock is held, the base is not removed or replaced.
    _held: Held,
}

impl Parents {
    /// Locks all direct bases. Their own bases need no lock, because a backup with dependents is not removed.
    pub fn hold(plan: &Plan) -> Result<Self, Error> {
        let Destination::Store { path, directory, .. } = &plan.destination else {
            return Ok(Self::default());
        };
        let based = plan.disks.iter().filter_map(|disk| match &disk.mode {
            Mode::Incremental(base) => Some((disk.name.clone(), base.clone())),
            Mode::Full { .. } => None,
        });
        let held = based.map(|(disk, base)| {
            let shelf = find(path, directory.as_str(), &disk, &base)?;
            Ok(Parent {
                length: shelf.file_size(&base.file)?,
                _held: shelf.hold(Sharing::Shared)?,
                store: path.clone(),
                domain: directory.as_str().to_owned(),
                disk,
                base,
            })
        });
        held.collect::<Result<_, _>>().map(Self)
    }

    /// Checks that the bases are unchanged, because a program that ignores the locks can remove them.
    pub fn check(&self) -> Result<(), Error> {
        self.0.iter().try_for_each(|parent| {
            let Parent { disk, base, .. } = parent;
            let length =
                find(&parent.store, &parent.domain, disk, base).and_then(|shelf| shelf.file_size(&base.file));
            match length {
                Ok(length) if length == parent.length => Ok(()),
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

fn find(store: &std::path::Path, domain: &str, disk: &str, base: &Base) -> Result<Shelf, Error> {
    let shelf = Shelf::of_store(store)?.below(domain)?;
    let shelf = shelf
        .map(|shelf| shelf.below(&base.backup))
        .transpose()?
        .flatten();
    shelf.ok_or_else(|| gone(disk, base))
}

fn gone(disk: &str, base: &Base) -> Error {
    Error::NoParent {
        disk: disk.to_owned(),
        backup: base.backup.clone(),
    }
}
