//! The records of checkpoints without a backup.

use jiff::Timestamp;
use rusqlite::{Connection, Row, ToSql, params};

use super::{Catalog, DomainRecord, Error};
use crate::checkpoint::CheckpointRecord;

/// How many deleted checkpoints stay on record for each domain, and for each user other than root.
const DELETED: u32 = 64;
/// How many other checkpoints a user other than root may have. The limit per domain does not suffice, because a user
/// can register any number of domains.
const OF_A_USER: u32 = 1024;

/// The result of recording a new checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewCheckpoint {
    Recorded,
    /// The domain has this number of checkpoints, which is the limit.
    DomainLimit {
        most: u32,
    },
    /// The domains of its owner have this number of checkpoints, which is the limit.
    OwnerLimit {
        most: u32,
    },
}

impl Catalog {
    /// Records a checkpoint before its creation, unless the domain has `most` already or its owner has too many. The
    /// caller creates one checkpoint of a domain at a time, so any other that is still in creation has failed.
    pub async fn begin_checkpoint(
        &self,
        whose: DomainRecord,
        checkpoint: CheckpointRecord,
        most: u32,
    ) -> Result<NewCheckpoint, Error> {
        self.run(move |connection| {
            let transaction = connection.transaction()?;
            let (domain, owner) = (whose.key(), (whose.owner, &whose.owner_name));
            let stale = "UPDATE checkpoints SET state = 'deleted' WHERE domain = ?1 AND state = 'making'";
            transaction.execute(stale, [&domain])?;
            let of_domain: (_, &[&dyn ToSql]) = ("domain = ?1", &[&domain]);
            let of_owner: (_, &[&dyn ToSql]) = ("owner = ?1 AND owner_name = ?2", &[&owner.0, &owner.1]);
            let is_root = owner.0 == 0;
            forget_deleted(&transaction, of_domain)?;
            if !is_root {
                forget_deleted(&transaction, of_owner)?;
            }
            let count = |(which, values): (&str, &[&dyn ToSql])| {
                let sql = format!("SELECT count(*) FROM checkpoints WHERE {which} AND state <> 'deleted'");
                transaction.query_row(&sql, values, |row| row.get::<_, u32>(0))
            };
            if count(of_domain)? >= most {
                return Ok(NewCheckpoint::DomainLimit { most });
            }
            if !is_root && count(of_owner)? >= OF_A_USER {
                return Ok(NewCheckpoint::OwnerLimit { most: OF_A_USER });
            }
            transaction.execute(
                "INSERT INTO checkpoints (domain, id, owner, owner_name, name, description, time, state) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 'making')",
                params![
                    domain,
                    checkpoint.id,
                    owner.0,
                    owner.1,
                    checkpoint.name,
                    checkpoint.description,
                    checkpoint.time.as_microsecond(),
                ],
            )?;
            transaction.commit()?;
            Ok(NewCheckpoint::Recorded)
        })
        .await
    }

    /// Records that the checkpoint's bitmaps are on the domain's disks and record changes since `time` at the latest.
    pub async fn checkpoint_made(&self, domain: String, id: String, time: Timestamp) -> Result<(), Error> {
        let sql = "UPDATE checkpoints SET state = 'made', time = ?3 WHERE domain = ?1 AND id = ?2";
        self.change(sql, move |update| {
            update.execute(params![domain, id, time.as_microsecond()])
        })
        .await
    }

    /// Records that the checkpoint's bitmaps are to be removed from all disks. Does nothing if it is not on record.
    pub async fn checkpoint_deleted(&self, domain: String, id: String) -> Result<(), Error> {
        let sql = "UPDATE checkpoints SET state = 'deleted' WHERE domain = ?1 AND id = ?2";
        self.change(sql, move |update| update.execute(params![domain, id]))
            .await
    }

    /// Returns the domain's checkpoints without a backup.
    pub async fn checkpoints(&self, domain: String) -> Result<Vec<CheckpointRecord>, Error> {
        self.run(move |connection| {
            let sql = "SELECT * FROM checkpoints WHERE domain = ?1 AND state = 'made'";
            let mut select = connection.prepare(sql)?;
            let mut rows = select.query([domain])?;
            let mut found = Vec::new();
            while let Some(row) = rows.next()? {
                found.push(read(row)?);
            }
            Ok(found)
        })
        .await
    }
}

/// Deletes the records of all deleted checkpoints that match the condition, except the newest.
fn forget_deleted(connection: &Connection, (which, values): (&str, &[&dyn ToSql])) -> Result<(), Error> {
    let deleted = format!("FROM checkpoints WHERE {which} AND state = 'deleted'");
    let newest = format!("SELECT rowid {deleted} ORDER BY id DESC LIMIT {DELETED}");
    connection.execute(&format!("DELETE {deleted} AND rowid NOT IN ({newest})"), values)?;
    Ok(())
}

pub(super) fn read(row: &Row) -> Result<CheckpointRecord, Error> {
    let id: String = row.get("id")?;
    let time = Timestamp::from_microsecond(row.get("time")?);
    let time = time.map_err(|_| Error::Statement(format!("the time of checkpoint {id}")))?;
    Ok(CheckpointRecord {
        id,
        name: row.get("name")?,
        description: row.get("description")?,
        time,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Owner, OwnerState};

    /// A domain without a UUID.
    fn web(source: &str, owner: u32, owner_name: &str) -> DomainRecord {
        DomainRecord {
            name: "web".into(),
            source: source.into(),
            owner,
            owner_name: owner_name.into(),
            uuid: None,
        }
    }

    fn record(second: u32) -> CheckpointRecord {
        CheckpointRecord {
            id: format!("20261123T0559{second:02}Z-10ebf9b0"),
            name: Some(format!("c{second}")),
            description: None,
            time: Timestamp::from_second(second.into()).unwrap(),
        }
    }

    #[tokio::test]
    async fn a_checkpoint_exists_from_creation_to_deletion_for_its_domain_only() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&directory.path().join("c")).unwrap();
        let id = record(1).id;
        let is_of_domain = true;
        let own = |state| Owner { is_of_domain, state };
        let said = async |name: &str| {
            let found = catalog.bitmap_owners(name.into(), vec![id.clone()]).await;
            found.unwrap().remove(0)
        };
        assert_eq!(said("web").await, Owner::UNKNOWN);
        let begun = catalog
            .begin_checkpoint(web("configured", 0, "root"), record(1), 2)
            .await;
        assert_eq!(begun.unwrap(), NewCheckpoint::Recorded);
        assert_eq!(said("web").await, own(OwnerState::Removed));
        assert_eq!(catalog.checkpoints("web".into()).await.unwrap(), []);
        let made = catalog.checkpoint_made("web".into(), id.clone(), record(1).time);
        made.await.unwrap();
        assert_eq!(said("web").await, own(OwnerState::Checkpoint(record(1))));
        let anothers = Owner {
            is_of_domain: false,
            state: OwnerState::Checkpoint(record(1)),
        };
        assert_eq!(said("db").await, anothers);
        assert_eq!(catalog.checkpoints("web".into()).await.unwrap(), [record(1)]);
        // A checkpoint of another domain is not deleted by its id.
        catalog.checkpoint_deleted("db".into(), id.clone()).await.unwrap();
        assert_eq!(said("web").await, own(OwnerState::Checkpoint(record(1))));
        catalog
            .checkpoint_deleted("web".into(), id.clone())
            .await
            .unwrap();
        assert_eq!(said("web").await, own(OwnerState::Removed));
    }

    #[tokio::test]
    async fn the_number_of_checkpoints_is_limited_and_failed_ones_do_not_count() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&directory.path().join("c")).unwrap();
        let whose = web("registered", 1000, "anna");
        let key = whose.key();
        let begin = async |second| {
            let begun = catalog.begin_checkpoint(whose.clone(), record(second), 2).await;
            begun.unwrap()
        };
        for second in [1, 2] {
            assert_eq!(begin(second).await, NewCheckpoint::Recorded);
            let made = catalog.checkpoint_made(key.clone(), record(second).id, record(second).time);
            made.await.unwrap();
        }
        assert_eq!(begin(3).await, NewCheckpoint::DomainLimit { most: 2 });
        catalog
            .checkpoint_deleted(key.clone(), record(1).id)
            .await
            .unwrap();
        assert_eq!(begin(3).await, NewCheckpoint::Recorded);
        // The creation of that checkpoint failed.
        assert_eq!(begin(4).await, NewCheckpoint::Recorded);
        // The next user of the uid has none of them.
        let next = web("registered", 1000, "bob");
        assert_eq!(catalog.checkpoints(next.key()).await.unwrap(), []);
        let begun = catalog.begin_checkpoint(next, record(5), 1).await;
        assert_eq!(begun.unwrap(), NewCheckpoint::Recorded);
    }
}
