//! Reads the backups of a store directly, without the service, with the rights of the process.

use std::collections::BTreeMap;
use std::path::Path;

use super::probe::image_fault;
use crate::catalog::{self, BackupState, Link};
use crate::model::{MANIFEST_NAME, Manifest};
use crate::store::{self, BackupName, OpenBackup, Store};

/// A backup as its store describes it.
#[derive(Debug)]
pub struct Stored {
    pub manifest: Manifest,
    pub state: BackupState,
    /// The fault for users; empty if there is none.
    pub problem: String,
    /// Must not be removed.
    pub protected: bool,
}

/// The content of a store.
#[derive(Debug, Default)]
pub struct Inventory {
    /// Sorted by the domains' directories, then by sequence number.
    pub backups: Vec<Stored>,
    /// Directories that are not valid backups, with the reason.
    pub problems: Vec<String>,
}

/// Reads a store at any path and with any owner. Blocks.
pub fn read_store(path: &Path) -> Result<Inventory, store::Error> {
    let store = store::open_users(path)?;
    let mut inventory = Inventory::default();
    for domain in store.domains()? {
        match read_domain(&*store, &domain, &mut inventory.problems) {
            Ok(backups) => inventory.backups.extend(backups),
            Err(error) => inventory.problems.push(error.to_string()),
        }
    }
    Ok(inventory)
}

fn read_domain(
    store: &dyn Store,
    domain: &str,
    problems: &mut Vec<String>,
) -> Result<Vec<Stored>, store::Error> {
    let mut backups = Vec::new();
    for id in store.entries(domain)?.backups {
        let Some(backup) = store.open(BackupName { domain, id: &id })? else {
            continue;
        };
        match read_backup(&*backup, &id) {
            Ok(stored) => backups.push(stored),
            Err(why) => problems.push(format!("{}: {why}", backup.location().display())),
        }
    }
    // By sequence number, because an id has a resolution of one second.
    backups.sort_by(|one, other| {
        let place = |stored: &Stored| (stored.manifest.sequence, stored.manifest.id.clone());
        place(one).cmp(&place(other))
    });
    let links: Vec<Link> = backups.iter().map(link).collect();
    let broken: BTreeMap<&str, String> = catalog::broken(&links);
    for backup in &mut backups {
        if backup.state == BackupState::Complete
            && let Some(problem) = broken.get(backup.manifest.id.as_str())
        {
            backup.state = BackupState::Damaged;
            backup.problem.clone_from(problem);
        }
    }
    Ok(backups)
}

fn read_backup(backup: &dyn OpenBackup, id: &str) -> Result<Stored, String> {
    let text = |error: store::Error| error.to_string();
    let (bytes, _) = backup.read_manifest().map_err(text)?;
    let manifest = Manifest::parse(&bytes).map_err(|error| format!("{MANIFEST_NAME}: {error}"))?;
    if manifest.id != id {
        return Err(format!("{MANIFEST_NAME} belongs to backup '{}'", manifest.id));
    }
    let fault = image_fault(backup, &manifest.disks).map_err(text)?;
    let (state, problem) = fault.unwrap_or((BackupState::Complete, String::new()));
    Ok(Stored {
        manifest,
        state,
        problem,
        protected: backup.is_protected().map_err(text)?,
    })
}

fn link(backup: &Stored) -> Link {
    let parents = backup.manifest.parents();
    Link {
        id: backup.manifest.id.clone(),
        parents: parents.into_iter().map(str::to_owned).collect(),
        own_state: backup.state,
        broken: String::new(),
    }
}
