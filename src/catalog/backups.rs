//! The records of backups in stores: what their manifests say, all in one place.

use rusqlite::{Connection, params};

/// A backup in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupRecord {
    pub id: String,
    pub store: String,
    /// The directory's name in the store.
    pub domain: String,
    /// JSON.
    pub manifest: String,
}

/// Takes a backup in, or what is known of it now.
pub(super) fn keep_backup(connection: &Connection, backup: &BackupRecord) -> rusqlite::Result<()> {
    let mut insert = connection
        .prepare("INSERT OR REPLACE INTO backups (id, store, domain, manifest) VALUES (?1, ?2, ?3, ?4)")?;
    insert.execute(params![backup.id, backup.store, backup.domain, backup.manifest])?;
    Ok(())
}
