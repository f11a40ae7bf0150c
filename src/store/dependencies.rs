//! The dependencies between the backups of a domain's directory, from their manifests.
//!
//! The catalog may be stale, and others may have written to the store: another host's service, a newer version, a user
//! with `cp`. So the service reads every manifest there before it removes or merges a backup.

use super::{BackupName, Error, OpenBackup, Store};
use crate::model::{MANIFEST_NAME, Manifest, ManifestError};
use crate::offload::Progress;

/// A backup and its bases, as its manifest names them.
#[derive(Debug)]
pub struct Dependencies {
    pub id: String,
    /// The location of the manifest, for messages.
    pub manifest: String,
    /// The ids of the direct bases.
    pub bases: Result<Vec<String>, Unreadable>,
    pub protected: bool,
}

/// The reasons why the bases of a backup are unknown.
#[derive(Debug, Clone)]
pub enum Unreadable {
    /// The manifest cannot be parsed.
    Manifest(ManifestError),
    /// The manifest cannot be read.
    Store(Error),
}

/// Reads every backup of a domain's directory that has, or may have, a manifest. Each counts as progress.
///
/// Backups in staging are not among them, because their jobs hold locks on the bases.
pub fn dependencies(
    store: &dyn Store,
    domain: &str,
    progress: &Progress,
) -> Result<Vec<Dependencies>, Error> {
    let mut found = Vec::new();
    for id in store.entries(domain)?.backups {
        let name = BackupName { domain, id: &id };
        let (bases, protected) = match store.open(name) {
            Ok(None) => continue,
            Ok(Some(backup)) => {
                let protected = backup.is_protected()?;
                match bases_of(&*backup) {
                    // No longer a backup; only the catalog may know its content.
                    Err(Unreadable::Store(error)) if error.is_absent() && !protected => continue,
                    Err(Unreadable::Store(error)) if error.is_absent() => (Ok(Vec::new()), protected),
                    bases => (bases, protected),
                }
            }
            Err(error) => (Err(Unreadable::Store(error)), false),
        };
        progress.add(1);
        let manifest = super::location_of(store.location(), name, MANIFEST_NAME);
        found.push(Dependencies {
            manifest: manifest.display().to_string(),
            id,
            bases,
            protected,
        });
    }
    Ok(found)
}

fn bases_of(backup: &dyn OpenBackup) -> Result<Vec<String>, Unreadable> {
    let (text, _) = backup.read_manifest().map_err(Unreadable::Store)?;
    let manifest = Manifest::parse(&text).map_err(Unreadable::Manifest)?;
    Ok(manifest.parents().into_iter().map(str::to_owned).collect())
}
