//! What became of a backup of which nothing but its id is known.

use rusqlite::OptionalExtension;

use super::{Catalog, Error};

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
