//! The records of backups in stores: what their manifests say, all in one place.

use rusqlite::{Connection, OptionalExtension, params};

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

/// What is known of a backup by its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It is in that store, with this manifest (JSON).
    There { store: String, manifest: String },
    /// Its job has not ended.
    UnderWay,
    /// It failed, or was removed.
    Gone,
    /// Nobody here ever heard of it.
    Unknown,
}

impl Catalog {
    /// The newest backups in a store's directory of a domain, at most so many, from the newest on.
    pub async fn newest_backups(
        &self,
        store: String,
        domain: String,
        at_most: u32,
    ) -> Result<Vec<BackupRecord>, Error> {
        self.run(move |connection| {
            let mut select = connection.prepare(
                "SELECT id, store, domain, manifest FROM backups WHERE store = ?1 AND domain = ?2 \
                 ORDER BY id DESC LIMIT ?3",
            )?;
            let rows = select.query_map(params![store, domain, at_most], |row| {
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

    /// How things stand with backups of these ids, in their order.
    pub async fn standings(&self, ids: Vec<String>) -> Result<Vec<Standing>, Error> {
        self.run(move |connection| {
            let mut stored = connection.prepare("SELECT store, manifest FROM backups WHERE id = ?1")?;
            let mut ended = connection.prepare("SELECT step = 'ended' FROM jobs WHERE backup_id = ?1")?;
            let standings = ids.iter().map(|id| {
                let there = stored.query_row([id], |row| {
                    let (store, manifest) = (row.get(0)?, row.get(1)?);
                    Ok(Standing::There { store, manifest })
                });
                if let Some(there) = there.optional()? {
                    return Ok(there);
                }
                let ended = ended.query_row([id], |row| row.get(0)).optional()?;
                Ok(match ended {
                    Some(true) => Standing::Gone,
                    Some(false) => Standing::UnderWay,
                    None => Standing::Unknown,
                })
            });
            standings.collect()
        })
        .await
    }
}

/// Takes a backup in, or what is known of it now.
pub(super) fn keep_backup(connection: &Connection, backup: &BackupRecord) -> rusqlite::Result<()> {
    let mut insert = connection
        .prepare("INSERT OR REPLACE INTO backups (id, store, domain, manifest) VALUES (?1, ?2, ?3, ?4)")?;
    insert.execute(params![backup.id, backup.store, backup.domain, backup.manifest])?;
    Ok(())
}
