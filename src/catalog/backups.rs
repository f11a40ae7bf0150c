//! The records of backups in stores: what their manifests say, all in one place.

use rusqlite::{Connection, params};

use super::{Catalog, Error};

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

impl Catalog {
    /// All backups that are known, by store, domain and time.
    pub async fn backups(&self) -> Result<Vec<BackupRecord>, Error> {
        self.run(|connection| {
            let mut statement = connection
                .prepare("SELECT id, store, domain, manifest FROM backups ORDER BY store, domain, id")?;
            let rows = statement.query_map([], |row| {
                Ok(BackupRecord {
                    id: row.get(0)?,
                    store: row.get(1)?,
                    domain: row.get(2)?,
                    manifest: row.get(3)?,
                })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }
}
