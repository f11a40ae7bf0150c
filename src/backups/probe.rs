//! Checks that backups still exist unchanged, without reading their images.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use super::Backups;
use super::remove::name;
use crate::catalog::{self, Backup, BackupKey, BackupState, ProbeResult};
use crate::model::{Disk, MANIFEST_NAME};
use crate::store::{self, OpenBackup, Store};

/// How long a caller waits for the check. After that, the list shows the last known state.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// A backup to check.
struct Expected {
    key: BackupKey,
    text: String,
    disks: Vec<Disk>,
    /// The last known state.
    probed: ProbeResult,
}

impl Backups {
    /// Checks the files of these backups. Returns true if a state differs from the last known one.
    pub(super) async fn probe(&self, backups: &[Backup], deadline: Instant) -> Result<bool, catalog::Error> {
        let mut by_store: BTreeMap<&str, Vec<Expected>> = BTreeMap::new();
        for backup in backups {
            by_store.entry(&backup.key.store).or_default().push(Expected {
                key: backup.key.clone(),
                text: backup.text.clone(),
                disks: backup.manifest.disks.clone(),
                probed: backup.probed.clone(),
            });
        }
        let (mut found, mut changed) = (Vec::new(), false);
        for (name, expected) in by_store {
            // A store that was removed from the configuration cannot be checked.
            let Some(store) = self.stores.get(name) else {
                continue;
            };
            let Some(slot) = self.begin_probe(name) else {
                continue;
            };
            let path = store.path.clone();
            let probe = tokio::task::spawn_blocking(move || {
                let _slot = slot;
                probe_store(&path, &expected)
            });
            // If the check takes longer, the next call repeats it.
            let Ok(Ok(probed)) = tokio::time::timeout_at(deadline, probe).await else {
                continue;
            };
            if !probed.faulty {
                found.extend(probed.different);
                continue;
            }
            match self.read_again(name, deadline).await {
                Some(true) => changed = true,
                Some(false) => found.extend(probed.different),
                None => {}
            }
        }
        if found.is_empty() {
            return Ok(changed);
        }
        self.catalog.record_probes(found).await?;
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
struct ProbeReport {
    /// A backup is not as it was when it was created.
    faulty: bool,
    /// Backups whose state differs from the last known one.
    different: Vec<(BackupKey, ProbeResult)>,
}

/// Blocks.
fn probe_store(path: &Path, expected: &[Expected]) -> ProbeReport {
    let store = store::open(path);
    let mut report = ProbeReport::default();
    for backup in expected {
        let probed = match &store {
            Ok(store) => probe_backup(&**store, backup),
            Err(store::Error::NoDirectory { .. }) => Ok(gone()),
            Err(_) => break,
        };
        // The state of an unreachable backup is unknown.
        let Ok(probed) = probed else { continue };
        report.faulty |= probed.is_some();
        if probed != backup.probed {
            report.different.push((backup.key.clone(), probed));
        }
    }
    report
}

fn gone() -> ProbeResult {
    Some((BackupState::Missing, "its directory is missing".into()))
}

fn probe_backup(store: &dyn Store, expected: &Expected) -> Result<ProbeResult, store::Error> {
    let Some(backup) = store.open(name(&expected.key))? else {
        return Ok(gone());
    };
    if let Some(fault) = image_fault(&*backup, &expected.disks)? {
        return Ok(Some(fault));
    }
    let problem = match backup.read_manifest() {
        Ok((bytes, _)) if bytes == expected.text.as_bytes() => return Ok(None),
        Ok(_) => format!("{MANIFEST_NAME} has changed. Run 'backupctl rescan' to read it again"),
        Err(error) if error.is_absent() => format!("{MANIFEST_NAME} is missing"),
        Err(error) => return Err(error),
    };
    Ok(Some((BackupState::Damaged, problem)))
}

/// Returns the first fault of a backup's images that is visible without reading them.
pub(super) fn image_fault(backup: &dyn OpenBackup, disks: &[Disk]) -> Result<ProbeResult, store::Error> {
    for Disk { file, length, .. } in disks {
        let size = match backup.size_of(file) {
            Ok(size) => size,
            Err(error) if error.is_absent() => {
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
