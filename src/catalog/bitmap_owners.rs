//! Looks up the owners of bitmaps by the ids in their names.

use rusqlite::{Connection, OptionalExtension, Statement};

use super::checkpoints::read;
use super::jobs::DOMAIN_KEY;
use super::{Catalog, Error};
use crate::checkpoint::{Backup, Owner, OwnerState};
use crate::model::Manifest;

impl Catalog {
    /// Returns the owners of the bitmaps with these ids on the disks of the domain with this
    /// [`super::DomainRecord::key`], in the order of the ids. A caller that removes bitmaps prevents concurrent changes
    /// of the domain's checkpoints.
    pub async fn bitmap_owners(&self, domain: String, ids: Vec<String>) -> Result<Vec<Owner>, Error> {
        self.run(move |connection| {
            let mut lookup = Lookup::new(connection)?;
            ids.iter().map(|id| lookup.owner(&domain, id)).collect()
        })
        .await
    }
}

/// The prepared statements of a lookup.
struct Lookup<'a> {
    checkpoint: Statement<'a>,
    backups: Statement<'a>,
    job: Statement<'a>,
}

impl<'a> Lookup<'a> {
    fn new(connection: &'a Connection) -> Result<Self, Error> {
        let of_domain = format!("{DOMAIN_KEY} = ?2 AS is_of_domain");
        Ok(Self {
            checkpoint: connection.prepare(
                "SELECT *, domain = ?2 AS is_of_domain FROM checkpoints WHERE id = ?1 ORDER BY is_of_domain DESC LIMIT 1",
            )?,
            backups: connection.prepare(&format!(
                "SELECT store, domain, manifest, {of_domain} FROM backups WHERE id = ?1 ORDER BY is_of_domain DESC, store"
            ))?,
            job: connection.prepare(&format!(
                "SELECT step = 'ended', {of_domain} FROM jobs WHERE backup_id = ?1"
            ))?,
        })
    }

    fn owner(&mut self, domain: &str, id: &str) -> Result<Owner, Error> {
        if let Some(owner) = self.checkpoint(domain, id)? {
            return Ok(owner);
        }
        if let Some(owner) = self.backups(domain, id)? {
            return Ok(owner);
        }
        let job = self
            .job
            .query_row([id, domain], |row| Ok((row.get(0)?, row.get(1)?)));
        Ok(match job.optional()? {
            Some((has_ended, is_of_domain)) => Owner {
                is_of_domain,
                state: match has_ended {
                    true => OwnerState::Removed,
                    false => OwnerState::Pending,
                },
            },
            None => Owner::UNKNOWN,
        })
    }

    /// Returns the owner if it is a checkpoint without a backup.
    fn checkpoint(&mut self, domain: &str, id: &str) -> Result<Option<Owner>, Error> {
        let mut rows = self.checkpoint.query([id, domain])?;
        let Some(row) = rows.next()? else {
            return Ok(None);
        };
        let is_of_domain: bool = row.get("is_of_domain")?;
        let state = match (row.get::<_, String>("state")?.as_str(), is_of_domain) {
            ("made", _) => OwnerState::Checkpoint(read(row)?),
            // The same VM may be known by another name, under which the checkpoint is being created right now.
            ("making", false) => OwnerState::Pending,
            // A domain's checkpoints are created one at a time, so the creation of this one has failed.
            _ => OwnerState::Removed,
        };
        Ok(Some(Owner { is_of_domain, state }))
    }

    /// Returns the owner if there are backups with this id.
    fn backups(&mut self, domain: &str, id: &str) -> Result<Option<Owner>, Error> {
        let mut rows = self.backups.query([id, domain])?;
        let (mut backups, mut of_domain) = (Vec::new(), None);
        while let Some(row) = rows.next()? {
            let is_of_domain: bool = row.get(3)?;
            of_domain.get_or_insert(is_of_domain);
            let manifest: String = row.get(2)?;
            // An unreadable manifest must not prevent a backup.
            let Ok(manifest) = Manifest::parse(manifest.as_bytes()) else {
                return Ok(Some(Owner::UNKNOWN));
            };
            backups.push(Backup {
                store: row.get(0)?,
                directory: row.get(1)?,
                sequence: manifest.sequence,
                time: manifest.instant,
                checkpoint: manifest.checkpoint,
            });
        }
        let state = OwnerState::Backups(backups);
        Ok(of_domain.map(|is_of_domain| Owner { is_of_domain, state }))
    }
}
