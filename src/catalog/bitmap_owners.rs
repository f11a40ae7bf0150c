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
        let (mut backups, mut of_domain, mut has_unreadable) = (Vec::new(), None, false);
        while let Some(row) = rows.next()? {
            let manifest: String = row.get(2)?;
            // An unreadable manifest must not prevent a backup, or hide the readable copies.
            let Ok(manifest) = Manifest::parse(manifest.as_bytes()) else {
                has_unreadable = true;
                continue;
            };
            // The rows of the domain come first.
            of_domain.get_or_insert(row.get(3)?);
            backups.push(Backup {
                store: row.get(0)?,
                directory: row.get(1)?,
                sequence: manifest.sequence,
                time: manifest.instant,
                checkpoint: manifest.checkpoint,
            });
        }
        Ok(match of_domain {
            Some(is_of_domain) => Some(Owner {
                is_of_domain,
                state: OwnerState::Backups {
                    backups,
                    has_unreadable,
                },
            }),
            None => has_unreadable.then_some(Owner::UNKNOWN),
        })
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::catalog::backups::keep_backup;
    use crate::catalog::{BackupRecord, DomainRecord};
    use crate::model::{self, Disk, Domain, Format, Kind, Unknown};

    const ID: &str = "20261123T055901Z-10ebf9b0";

    /// A domain without a UUID, configured by the administrator.
    fn domain(name: &str) -> DomainRecord {
        DomainRecord {
            name: name.into(),
            source: "configured".into(),
            owner: 0,
            owner_name: "root".into(),
            uuid: None,
        }
    }

    /// Records the backup of a domain in a store, with a checkpoint named after the store.
    async fn keep(catalog: &Catalog, of: &str, store: &str) {
        let now = Timestamp::UNIX_EPOCH;
        let whose = Domain {
            name: of.into(),
            uuid: None,
            unknown: Unknown::new(),
        };
        let mut manifest = Manifest::new(Kind::Full, ID.into(), 1, 0, whose, now, now);
        manifest.disks.push(Disk {
            name: "vda".into(),
            file: "vda.qcow2".into(),
            format: Format::Qcow2,
            virtual_size: 1 << 20,
            length: None,
            blake3: None,
            sha256: None,
            parent: None,
            bitmap: None,
            unknown: Unknown::new(),
        });
        manifest.checkpoint = Some(model::Checkpoint {
            name: Some(format!("in-{store}")),
            description: None,
        });
        let record = BackupRecord {
            id: ID.into(),
            store: store.into(),
            domain: of.into(),
            manifest: String::from_utf8(manifest.to_json().unwrap()).unwrap(),
            protected: false,
        };
        let whose = domain(of);
        let kept = catalog.run(move |connection| keep_backup(connection, &record, &whose));
        kept.await.unwrap();
    }

    async fn damage(catalog: &Catalog, store: &'static str) {
        let sql = "UPDATE backups SET manifest = '{}' WHERE store = ?1";
        catalog
            .change(sql, move |statement| statement.execute([store]))
            .await
            .unwrap();
    }

    /// Returns whether the owner is of the domain `web`, the names of its checkpoint in each copy, and whether there
    /// are unreadable copies.
    async fn owner(catalog: &Catalog) -> (bool, Vec<String>, bool) {
        let found = catalog.bitmap_owners(domain("web").key(), vec![ID.into()]).await;
        let Owner { is_of_domain, state } = found.unwrap().remove(0);
        let OwnerState::Backups {
            backups,
            has_unreadable,
        } = state
        else {
            panic!("{state:?}");
        };
        let names = backups.into_iter().map(|backup| backup.checkpoint?.name);
        (is_of_domain, names.flatten().collect(), has_unreadable)
    }

    #[tokio::test]
    async fn a_damaged_copy_does_not_hide_the_readable_ones() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&directory.path().join("c")).unwrap();
        let names = |stores: &[&str]| stores.iter().map(|store| format!("in-{store}")).collect();
        for store in ["a", "b", "c"] {
            keep(&catalog, "web", store).await;
        }
        keep(&catalog, "copy", "0").await;
        assert_eq!(owner(&catalog).await, (true, names(&["a", "b", "c", "0"]), false));
        damage(&catalog, "b").await;
        assert_eq!(owner(&catalog).await, (true, names(&["a", "c", "0"]), true));
        damage(&catalog, "a").await;
        assert_eq!(owner(&catalog).await, (true, names(&["c", "0"]), true));
        // The remaining copy is another domain's, whose names are not for callers of this one.
        damage(&catalog, "c").await;
        assert_eq!(owner(&catalog).await, (false, names(&["0"]), true));
        damage(&catalog, "0").await;
        let found = catalog.bitmap_owners(domain("web").key(), vec![ID.into()]).await;
        assert_eq!(found.unwrap(), [Owner::UNKNOWN]);
    }

    #[tokio::test]
    async fn a_damaged_copy_of_another_domain_does_not_hide_the_domains_own() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&directory.path().join("c")).unwrap();
        keep(&catalog, "web", "s").await;
        keep(&catalog, "copy", "another").await;
        damage(&catalog, "another").await;
        assert_eq!(owner(&catalog).await, (true, vec!["in-s".into()], true));
    }
}
