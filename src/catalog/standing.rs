//! The status of a backup or checkpoint, by its id alone.

use rusqlite::OptionalExtension;

use super::{Catalog, Error};

/// The status of a backup or checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// At least one backup exists. A copy of a store has the same ids.
    There(Vec<There>),
    /// A checkpoint without a backup.
    Alone,
    /// Its job has not ended.
    UnderWay,
    /// The job failed, or the backup or checkpoint was removed.
    Gone,
    /// The catalog has no record of this id.
    Unknown,
}

/// A backup in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct There {
    pub store: String,
    /// The directory's name in the store.
    pub directory: String,
    /// JSON.
    pub manifest: String,
}

impl Catalog {
    /// Returns the status of these ids in their order. `domain` is a [`super::DomainRecord::key`]. The caller prevents
    /// concurrent changes of the domain's checkpoints.
    pub async fn standings(&self, domain: String, ids: Vec<String>) -> Result<Vec<Standing>, Error> {
        self.run(move |connection| {
            let mut alone = connection.prepare(
                "SELECT state, domain = ?2 FROM checkpoints WHERE id = ?1 ORDER BY domain = ?2 DESC LIMIT 1",
            )?;
            let mut stored =
                connection.prepare("SELECT store, domain, manifest FROM backups WHERE id = ?1")?;
            let mut ended = connection.prepare("SELECT step = 'ended' FROM jobs WHERE backup_id = ?1")?;
            let standings = ids.iter().map(|id| {
                let state = alone.query_row([id, &domain], |row| {
                    Ok((row.get::<_, String>(0)?, row.get::<_, bool>(1)?))
                });
                if let Some((state, own)) = state.optional()? {
                    return Ok(match (state.as_str(), own) {
                        ("made", _) => Standing::Alone,
                        // The same VM may be known by another name, under which the checkpoint is being created right
                        // now.
                        ("making", false) => Standing::UnderWay,
                        _ => Standing::Gone,
                    });
                }
                let there = stored.query_map([id], |row| {
                    Ok(There {
                        store: row.get(0)?,
                        directory: row.get(1)?,
                        manifest: row.get(2)?,
                    })
                });
                let there = there?.collect::<Result<Vec<_>, _>>()?;
                if !there.is_empty() {
                    return Ok(Standing::There(there));
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
