//! Checks that backups still exist unchanged, without reading their images.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use tokio::time::Instant;

use super::Backups;
use crate::catalog::{self, Backup, BackupKey, BackupState, Looked};
use crate::model::{Disk, MANIFEST_NAME, MAX_MANIFEST_BYTES};
use crate::target::{self, Shelf};

/// How long a caller waits for the check. After that, the list shows the last known state.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// A backup to check.
struct Expected {
    key: BackupKey,
    text: String,
    disks: Vec<Disk>,
    /// The last known state.
    looked: Looked,
}

impl Backups {
    /// Checks the files of these backups. Returns true if a state differs from the last known one.
    pub(super) async fn look(&self, backups: &[Backup], deadline: Instant) -> Result<bool, catalog::Error> {
        let mut by_store: BTreeMap<&str, Vec<Expected>> = BTreeMap::new();
        for backup in backups {
            by_store.entry(&backup.key.store).or_default().push(Expected {
                key: backup.key.clone(),
                text: backup.text.clone(),
                disks: backup.manifest.disks.clone(),
                looked: backup.looked.clone(),
            });
        }
        let (mut found, mut changed) = (Vec::new(), false);
        for (name, expected) in by_store {
            // A store that was removed from the configuration cannot be checked.
            let Some(store) = self.stores.get(name) else {
                continue;
            };
            let Some(looking) = self.begin_look(name) else {
                continue;
            };
            let path = store.path.clone();
            let look = tokio::task::spawn_blocking(move || {
                let _looking = looking;
                look_through(&path, &expected)
            });
            // If the check takes longer, the next call repeats it.
            let Ok(Ok(looked)) = tokio::time::timeout_at(deadline, look).await else {
                continue;
            };
            if !looked.amiss {
                found.extend(looked.different);
                continue;
            }
            match self.read_again(name, deadline).await {
                Some(true) => changed = true,
                Some(false) => found.extend(looked.different),
                None => {}
            }
        }
        if found.is_empty() {
            return Ok(changed);
        }
        self.catalog.looked(found).await?;
        Ok(true)
    }

    /// Reads the store again if its generation is not the one in the catalog, because another service may have changed
    /// a backup legitimately. Returns true if the store was read again, false if not, and `None` if that takes longer
    /// than until `deadline`.
    async fn read_again(&self, store: &str, deadline: Instant) -> Option<bool> {
        let (jobs, stop, store) = (self.jobs.clone(), self.stop.clone(), store.to_owned());
        let needed = self.activity.begin();
        // Continues even if no caller waits.
        let reading = self.tasks.spawn(async move {
            let _needed = needed;
            stop.run_until_cancelled(jobs.settle_store(&store)).await
        });
        match tokio::time::timeout_at(deadline, reading).await {
            Ok(Ok(Some(Ok(read)))) => Some(read),
            // If the store cannot be compared with the catalog, the result of the check counts.
            Ok(Ok(Some(Err(_)))) => Some(false),
            Ok(Ok(None) | Err(_)) | Err(_) => None,
        }
    }
}

/// The result of checking a store.
#[derive(Default)]
struct Seen {
    /// A backup is not as it was when it was created.
    amiss: bool,
    /// Backups whose state differs from the last known one.
    different: Vec<(BackupKey, Looked)>,
}

/// Blocks.
fn look_through(path: &Path, expected: &[Expected]) -> Seen {
    let store = Shelf::of_store(path);
    let mut shelves: BTreeMap<&str, Result<Option<Shelf>, target::Error>> = BTreeMap::new();
    let mut seen = Seen::default();
    for backup in expected {
        let domain = &backup.key.domain;
        let shelf = shelves.entry(domain).or_insert_with(|| match &store {
            Ok(store) => store.below(domain),
            Err(target::Error::NoDirectory { .. }) => Ok(None),
            Err(error) => Err(error.clone()),
        });
        let looked = match shelf {
            Ok(Some(shelf)) => look_at(shelf, backup),
            Ok(None) => Ok(gone()),
            // The state of an unreachable backup is unknown.
            Err(_) => continue,
        };
        let Ok(looked) = looked else { continue };
        seen.amiss |= looked.is_some();
        if looked != backup.looked {
            seen.different.push((backup.key.clone(), looked));
        }
    }
    seen
}

fn gone() -> Looked {
    Some((BackupState::Missing, "its directory is missing".into()))
}

fn look_at(shelf: &Shelf, expected: &Expected) -> Result<Looked, target::Error> {
    let Some(backup) = shelf.below(&expected.key.id)? else {
        return Ok(gone());
    };
    if let Some(amiss) = images_amiss(&backup, &expected.disks)? {
        return Ok(Some(amiss));
    }
    let problem = match backup.read(MANIFEST_NAME, MAX_MANIFEST_BYTES) {
        Ok((bytes, _)) if bytes == expected.text.as_bytes() => return Ok(None),
        Ok(_) => format!("{MANIFEST_NAME} has changed. Run 'backupctl rescan' to read it again"),
        Err(error) if is_absent(&error) => format!("{MANIFEST_NAME} is missing"),
        Err(error) => return Err(error),
    };
    Ok(Some((BackupState::Damaged, problem)))
}

/// Returns the first fault of a backup's images that is visible without reading them.
pub(super) fn images_amiss(backup: &Shelf, disks: &[Disk]) -> Result<Looked, target::Error> {
    for Disk { file, length, .. } in disks {
        let size = match backup.file_size(file) {
            Ok(size) => size,
            Err(error) if is_absent(&error) => {
                return Ok(Some((BackupState::Missing, format!("{file} is missing"))));
            }
            Err(error) => return Err(error),
        };
        if let Some(length) = length.filter(|length| *length != size) {
            let problem = format!("{file} has {size} bytes instead of {length}");
            return Ok(Some((BackupState::Damaged, problem)));
        }
    }
    Ok(None)
}

pub(super) fn is_absent(error: &target::Error) -> bool {
    // A directory or device with the file's name (EINVAL) counts as absent too.
    let absent = |errno: &Errno| *errno == Errno::INVAL || errno.kind() == ErrorKind::NotFound;
    matches!(error, target::Error::Io { errno, .. } if absent(errno))
}
