//! Lists, creates and deletes the checkpoints of a domain.
//!
//! The bitmaps on the disks are authoritative; the catalog only adds their names and times. The catalog records a new
//! checkpoint as pending before QEMU creates its bitmaps. If the service ends in between, the next clean-up of the
//! domain's checkpoints removes them.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use super::chain::{checkpoint_name, checkpoints, earlier, own, prune_bitmaps, removal};
use super::directory::choose;
use super::manager::JobContext;
use super::record::domain_record;
use super::{Error, Jobs, Reservation};
use crate::catalog::{Begun, CheckpointRecord, Recorded};
use crate::clock;
use crate::config::Store;
use crate::definition::{CheckpointDefinition, CheckpointDisk, Position};
use crate::domain::{CheckpointPolicy, Disk, Domain, Link};
use crate::error;
use crate::plan::{self, ChosenStore, Existing, Past};
use crate::qmp::Done;
use crate::qmp::block::{BlockDirtyBitmapAdd, Transaction, TransactionAction};

/// The maximum number of checkpoints without a backup that a domain can have.
const MAX_WITHOUT_BACKUP: u32 = 64;
/// Only the newest checkpoints and bitmaps up to these limits are read. They protect the service against a malicious
/// guest's QEMU; real VMs have far fewer.
const MAX_CHECKPOINTS: usize = 1024;
const MAX_BITMAPS: usize = 16384;

/// An existing checkpoint of the domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The id in the names of its bitmaps. If the checkpoint has a backup, the backup has the same id.
    pub id: String,
    /// The name, or the id if it has no name.
    pub name: String,
    pub description: Option<String>,
    /// The point in time from which the bitmaps record writes.
    pub time: Timestamp,
    /// The store of its backup, if it has one.
    pub store: Option<String>,
    /// The present disks of the domain that have this checkpoint.
    pub disks: Vec<Record>,
}

/// The bitmap of a checkpoint on one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub disk: String,
    pub bitmap: String,
    /// The bitmap has recorded all writes.
    pub good: bool,
}

impl Checkpoint {
    fn existing(&self) -> Existing {
        Existing {
            id: self.id.clone(),
            name: self.name.clone(),
            has_backup: self.store.is_some(),
        }
    }

    fn is_called(&self, name: &str) -> bool {
        self.existing().is_called(name)
    }
}

/// Returns the checkpoint with this name (the newest if there are several), and the one before it.
pub fn named<'a>(
    checkpoints: &'a [Checkpoint],
    name: &str,
) -> Result<(&'a Checkpoint, Option<&'a Checkpoint>), Error> {
    let index = checkpoints
        .iter()
        .rposition(|checkpoint| checkpoint.is_called(name))
        .ok_or_else(|| Error::NoSuchCheckpoint {
            name: error::shown(name),
        })?;
    let before = index.checked_sub(1).and_then(|before| checkpoints.get(before));
    Ok((&checkpoints[index], before))
}

/// Returns the document of a checkpoint. It lists all disks of the domain.
pub fn definition(
    checkpoint: &Checkpoint,
    parent: Option<&Checkpoint>,
    disks: &[Disk],
) -> CheckpointDefinition {
    let disks = disks.iter().map(|disk| CheckpointDisk {
        name: disk.name.clone(),
        at: Position::default(),
        bitmap: checkpoint.disks.iter().any(|record| record.disk == disk.name),
    });
    CheckpointDefinition {
        name: Some(checkpoint.name.clone()),
        description: checkpoint.description.clone(),
        creation_time: u64::try_from(checkpoint.time.as_second()).ok(),
        parent: parent.map(|parent| parent.name.clone()),
        disks: Some(disks.collect()),
    }
}

impl Jobs {
    /// Returns a store with the domain's directory in it. The result includes the earlier backups and checkpoints that
    /// a new backup into the store can start from.
    pub async fn choose_store<'a>(
        &self,
        domain: &Domain,
        disks: &[Disk],
        (name, store): (&'a str, &'a Store),
    ) -> Result<ChosenStore<'a>, Error> {
        // After a failure the backup cannot be incremental. If the store is not usable, the backup fails later with the
        // store's error.
        if let Err(error) = self.settle_store(name).await {
            tracing::warn!(store = name, %error, "cannot compare the store with the catalog");
        }
        let (directory, sequence) = choose(&self.context, domain, name, store).await?;
        let past = Past {
            earlier: earlier(&self.context, (name, store.path.clone()), &directory, domain).await?,
            checkpoints: existing(&self.checkpoints(domain, disks).await?),
            records_over_snapshots: domain.checkpoints == CheckpointPolicy::Always,
        };
        Ok(ChosenStore {
            name,
            store,
            directory,
            sequence,
            service: self.context.catalog.service(),
            past,
        })
    }

    /// Returns the checkpoints of a domain with these disks, the oldest first.
    pub async fn checkpoints(&self, domain: &Domain, disks: &[Disk]) -> Result<Vec<Checkpoint>, Error> {
        let found = on_disks(disks);
        let ids: Vec<String> = found.keys().map(|id| (*id).to_owned()).collect();
        let catalog = &self.context.catalog;
        let key = domain_record(domain.identity()).key();
        let recorded = catalog.recorded(key.clone(), ids).await?;
        Ok(joined(found, recorded, catalog.checkpoints(key).await?))
    }

    /// Creates a checkpoint without a backup, and returns its name. Atomic, even if the caller disconnects.
    pub async fn create_checkpoint(
        self: &Arc<Self>,
        reservation: Reservation,
        domain: Arc<Domain>,
        definition: CheckpointDefinition,
    ) -> error::Result<String> {
        let jobs = self.clone();
        self.to_the_end(async move {
            let _reservation = reservation;
            jobs.create(&domain, definition).await
        })
        .await
    }

    /// Deletes a checkpoint from the domain's disks. Its backup, if it has one, remains.
    pub async fn delete_checkpoint(
        self: &Arc<Self>,
        reservation: Reservation,
        domain: Arc<Domain>,
        name: String,
    ) -> error::Result<()> {
        let jobs = self.clone();
        self.to_the_end(async move {
            let _reservation = reservation;
            jobs.delete(&domain, &name).await
        })
        .await
    }

    /// Removes all bitmaps with names of this kind from the domain's disks, even if another backupd created them.
    /// Backups remain.
    pub async fn delete_checkpoints(
        self: &Arc<Self>,
        reservation: Reservation,
        domain: Arc<Domain>,
    ) -> error::Result<()> {
        let jobs = self.clone();
        self.to_the_end(async move {
            let _reservation = reservation;
            jobs.delete_all(&domain).await
        })
        .await
    }

    /// Completes `work` even if the caller disconnects or the service stops.
    async fn to_the_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = error::Result<T>> + Send + 'static,
    ) -> error::Result<T> {
        let done = self.tasks.spawn(work).await;
        done.map_err(|error| error::Error::new(error::Kind::Internal, error.to_string()))?
    }

    async fn create(&self, domain: &Domain, definition: CheckpointDefinition) -> error::Result<String> {
        let link = domain.link().await?;
        let snapshot = domain.refresh().await?;
        if let Some(migration) = snapshot.migration {
            return Err(Error::Migration(migration).into());
        }
        let existing = existing(&self.checkpoints(domain, &snapshot.disks).await?);
        let disks = plan::checkpoint(&definition, &snapshot.disks, &existing)?;
        let now = clock::now();
        let record = CheckpointRecord {
            id: Self::new_backup_id(now),
            name: definition.name,
            description: definition.description,
            time: now,
        };
        let (id, whose) = (record.id.clone(), domain_record(domain.identity()));
        let key = whose.key();
        let name = record.name.clone().unwrap_or_else(|| id.clone());
        let catalog = &self.context.catalog;
        let begun = catalog.begin_checkpoint(whose, record, MAX_WITHOUT_BACKUP);
        let too_many = |of, most| Err(Error::TooManyCheckpoints { of, most }.into());
        match begun.await.map_err(Error::from)? {
            Begun::Yes => {}
            Begun::TooMany { most } => return too_many("the domain has", most),
            Begun::TooManyOfOwner { most } => return too_many("the domains of its owner have", most),
        }
        let add = disks.iter().enumerate().map(|(index, disk)| {
            TransactionAction::BlockDirtyBitmapAdd(BlockDirtyBitmapAdd {
                node: disk.node.clone(),
                name: checkpoint_name(&id, index),
                granularity: None,
                persistent: Some(true),
                disabled: None,
            })
        });
        let made = transaction(&link, add.collect(), &self.context).await;
        let recorded = match &made {
            Ok(()) => catalog.checkpoint_made(key, id, clock::now()).await,
            // Unless QEMU refused the transaction, the bitmaps may exist. Without the record, `tidy` removes them.
            Err(_) => catalog.checkpoint_deleted(key, id).await,
        };
        let result = made.and(recorded.map_err(Error::from));
        tidy(&link, domain, &self.context).await;
        result?;
        tracing::info!(domain = domain.name, name, "checkpoint created");
        Ok(name)
    }

    async fn delete(&self, domain: &Domain, name: &str) -> error::Result<()> {
        let link = domain.link().await?;
        let disks = domain.refresh().await?.disks;
        let checkpoints = self.checkpoints(domain, &disks).await?;
        let (checkpoint, _) = named(&checkpoints, name)?;
        let records = checkpoint.disks.iter().filter_map(|record| {
            let disk = disks.iter().find(|disk| disk.name == record.disk)?;
            Some(removal(disk, &record.bitmap))
        });
        let remove: Vec<TransactionAction> = records.flatten().collect();
        if !remove.is_empty() {
            transaction(&link, remove, &self.context).await?;
        }
        let (key, id) = (domain_record(domain.identity()).key(), checkpoint.id.clone());
        let forgotten = self.context.catalog.checkpoint_deleted(key, id).await;
        forgotten.map_err(Error::from)?;
        tidy(&link, domain, &self.context).await;
        tracing::info!(domain = domain.name, name = checkpoint.name, "checkpoint deleted");
        Ok(())
    }
}

impl Jobs {
    async fn delete_all(&self, domain: &Domain) -> error::Result<()> {
        let link = domain.link().await?;
        let disks = domain.refresh().await?.disks;
        let remove: Vec<TransactionAction> = disks
            .iter()
            .flat_map(|disk| own(disk).flat_map(|name| removal(disk, name)))
            .collect();
        let count = remove.len();
        if !remove.is_empty() {
            transaction(&link, remove, &self.context).await?;
        }
        let (catalog, key) = (&self.context.catalog, domain_record(domain.identity()).key());
        for record in catalog.checkpoints(key.clone()).await.map_err(Error::from)? {
            let forgotten = catalog.checkpoint_deleted(key.clone(), record.id).await;
            forgotten.map_err(Error::from)?;
        }
        tracing::info!(domain = domain.name, bitmaps = count, "all checkpoints deleted");
        Ok(())
    }
}

fn existing(checkpoints: &[Checkpoint]) -> Vec<Existing> {
    checkpoints.iter().map(Checkpoint::existing).collect()
}

/// Runs all actions atomically, and on all disks at the same point in time.
async fn transaction(
    link: &Link,
    actions: Vec<TransactionAction>,
    context: &JobContext,
) -> Result<(), Error> {
    let patience = context.deadlines.stall();
    let done = link.client.execute(Transaction::of(actions));
    match tokio::time::timeout(patience, done).await {
        Ok(Ok(Done)) => Ok(()),
        Ok(Err(error)) => Err(Error::Bitmaps(error)),
        Err(_) => Err(Error::NoAnswer {
            seconds: patience.as_secs(),
        }),
    }
}

/// Removes useless bitmaps. If this fails, the next backup removes them.
async fn tidy(link: &Link, domain: &Domain, context: &JobContext) {
    let settled = tokio::time::timeout(context.deadlines.stall(), prune_bitmaps(link, domain, context));
    let why = match settled.await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "QEMU does not answer".to_owned(),
    };
    tracing::warn!(
        domain = domain.name,
        why,
        "cannot remove useless checkpoints; the next backup tries again"
    );
}

/// Returns the bitmaps of checkpoints on the disks, by the checkpoints' ids.
fn on_disks(disks: &[Disk]) -> BTreeMap<&str, Vec<Record>> {
    let mut found: BTreeMap<&str, Vec<Record>> = BTreeMap::new();
    for disk in disks {
        for (id, bitmap) in checkpoints(disk) {
            let good = disk
                .bitmaps
                .iter()
                .any(|other| other.name == bitmap && !other.inconsistent);
            found.entry(id).or_default().push(Record {
                disk: disk.name.clone(),
                bitmap: bitmap.to_owned(),
                good,
            });
        }
    }
    let bitmaps = |found: &BTreeMap<&str, Vec<Record>>| found.values().map(Vec::len).sum::<usize>();
    let mut surplus = bitmaps(&found).saturating_sub(MAX_BITMAPS);
    while found.len() > MAX_CHECKPOINTS || surplus > 0 {
        let Some((_, oldest)) = found.pop_first() else {
            break;
        };
        surplus = surplus.saturating_sub(oldest.len());
    }
    found
}

/// Joins the bitmaps `found` with the catalog. `recorded` has the same order as `found`; `alone` are the recorded
/// checkpoints without a backup.
fn joined(
    found: BTreeMap<&str, Vec<Record>>,
    recorded: Vec<Recorded>,
    alone: Vec<CheckpointRecord>,
) -> Vec<Checkpoint> {
    let of_record = |record: CheckpointRecord, disks| Checkpoint {
        name: record.name.unwrap_or_else(|| record.id.clone()),
        id: record.id,
        description: record.description,
        time: record.time,
        store: None,
        disks,
    };
    // Checkpoints without any bitmap are listed too, so that the caller can delete their records.
    let missing = alone
        .into_iter()
        .filter(|record| !found.contains_key(record.id.as_str()))
        .map(|record| of_record(record, Vec::new()));
    let mut checkpoints: Vec<Checkpoint> = missing.collect();
    for ((id, disks), recorded) in found.into_iter().zip(recorded) {
        checkpoints.push(match recorded {
            Recorded::Alone(record) => of_record(record, disks),
            Recorded::Backup { store, manifest } => {
                let said = manifest.checkpoint.unwrap_or_default();
                Checkpoint {
                    id: id.to_owned(),
                    name: said.name.unwrap_or_else(|| id.to_owned()),
                    description: said.description,
                    time: manifest.instant,
                    store: Some(store),
                    disks,
                }
            }
            Recorded::Gone => continue,
            // Created by another backupd, or for another domain that used this image.
            Recorded::Unknown => Checkpoint {
                id: id.to_owned(),
                name: id.to_owned(),
                description: None,
                time: time_of(id),
                store: None,
                disks,
            },
        });
    }
    checkpoints.sort_by(|a, b| (a.time, &a.id).cmp(&(b.time, &b.id)));
    checkpoints
}

/// Returns the time in an id.
fn time_of(id: &str) -> Timestamp {
    let time = id.split_once("Z-").map_or(id, |(time, _)| time);
    DateTime::strptime("%Y%m%dT%H%M%S", time)
        .and_then(|time| time.to_zoned(TimeZone::UTC))
        .map_or(Timestamp::UNIX_EPOCH, |time| time.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Bitmap;
    use crate::model;
    use crate::model::{Kind, Manifest};

    const IDS: [&str; 4] = [
        "20261123T055901Z-10ebf9b0",
        "20261123T055902Z-10ebf9b0",
        "20261123T055903Z-10ebf9b0",
        "20261123T055904Z-10ebf9b0",
    ];

    fn disk(name: &str, ids: &[&str]) -> Disk {
        let mut disk = Disk::for_test(name, "a", true, true);
        let bitmap = |name: String| Bitmap {
            name,
            good: true,
            inconsistent: false,
            dirty: 0,
        };
        disk.bitmaps = ids.iter().map(|id| bitmap(checkpoint_name(id, 0))).collect();
        disk.bitmaps.push(bitmap("somebody-elses".into()));
        disk
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn record(id: &str, name: &str, second: i64) -> CheckpointRecord {
        CheckpointRecord {
            id: id.into(),
            name: Some(name.into()),
            description: None,
            time: at(second),
        }
    }

    fn backup(id: &str, name: Option<&str>, second: i64) -> Recorded {
        let domain = model::Domain {
            name: "web".into(),
            uuid: None,
            unknown: model::Unknown::new(),
        };
        let mut manifest = Manifest::new(Kind::Full, id.into(), 1, 0, domain, at(second), at(second));
        manifest.checkpoint = name.map(|name| model::Checkpoint {
            name: Some(name.into()),
            description: None,
        });
        Recorded::Backup {
            store: "default".into(),
            manifest: Box::new(manifest),
        }
    }

    #[test]
    fn checkpoints_come_from_the_disks_and_their_names_from_the_catalog() {
        let mut disks = [disk("vda", &IDS), disk("vdb", &IDS[..1])];
        disks[0].bitmaps[0].inconsistent = true;
        let recorded = vec![
            backup(IDS[0], Some("monday"), 1001),
            backup(IDS[1], None, 1002),
            Recorded::Alone(record(IDS[2], "alone", 1000)),
            Recorded::Gone,
        ];
        let alone = vec![record(IDS[2], "alone", 1000), record("elsewhere", "gone", 999)];
        let found = joined(on_disks(&disks), recorded, alone);
        let said: Vec<(&str, usize)> = found
            .iter()
            .map(|found| (found.name.as_str(), found.disks.len()))
            .collect();
        assert_eq!(said, [("gone", 0), ("alone", 1), ("monday", 2), (IDS[1], 1)]);
        assert_eq!(
            found[2]
                .disks
                .iter()
                .map(|record| record.good)
                .collect::<Vec<_>>(),
            [false, true]
        );

        let (monday, before) = named(&found, "monday").unwrap();
        assert_eq!(
            (monday.id.as_str(), before.unwrap().name.as_str()),
            (IDS[0], "alone")
        );
        assert_eq!(named(&found, IDS[0]).unwrap().0, monday);
        assert!(named(&found, "gone").unwrap().1.is_none());
        assert!(named(&found, IDS[3]).is_err());
        let document = definition(monday, before, &disks).to_xml();
        assert!(
            document.contains("<creationTime>1001</creationTime>"),
            "{document}"
        );
        assert!(
            document.contains("<disk name='vdb' checkpoint='bitmap'/>"),
            "{document}"
        );
    }

    #[test]
    fn an_unknown_checkpoint_has_the_time_in_its_id() {
        let disks = [disk("vda", &IDS[..1])];
        let found = joined(on_disks(&disks), vec![Recorded::Unknown], Vec::new());
        assert_eq!(
            found[0].time,
            "2026-11-23T05:59:01Z".parse::<Timestamp>().unwrap()
        );
        assert_eq!((found[0].name.as_str(), &found[0].store), (IDS[0], &None));
        assert_eq!(time_of("20269923T055901Z-10ebf9b0"), Timestamp::UNIX_EPOCH);
    }

    #[test]
    fn a_domain_with_very_many_bitmaps_costs_a_bounded_amount() {
        let ids: Vec<String> = (0..3000)
            .map(|second| format!("20261123T{second:06}Z-10ebf9b0"))
            .collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let one = [disk("vda", &ids)];
        let found = on_disks(&one);
        assert_eq!((found.len(), found.keys().last()), (MAX_CHECKPOINTS, ids.last()));
        let many: Vec<Disk> = (0..32).map(|index| disk(&format!("vd{index}"), &ids)).collect();
        let bitmaps: usize = on_disks(&many).values().map(Vec::len).sum();
        assert!(bitmaps <= MAX_BITMAPS && bitmaps > MAX_BITMAPS / 2, "{bitmaps}");
    }

    #[test]
    fn the_newest_of_several_checkpoints_with_one_name_is_used() {
        let disks = [disk("vda", &IDS[..2])];
        let recorded = vec![backup(IDS[0], Some("m"), 2), backup(IDS[1], Some("m"), 1)];
        let found = joined(on_disks(&disks), recorded, Vec::new());
        assert_eq!(named(&found, "m").unwrap().0.id, IDS[0]);
    }
}
