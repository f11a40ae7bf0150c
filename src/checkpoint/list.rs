//! The checkpoints of a domain: the bitmaps on its disks, with names and times from the catalog.

use std::collections::BTreeMap;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use super::{CheckpointRecord, Error, Owner, OwnerState, bitmaps};
use crate::definition::{CheckpointDefinition, CheckpointDisk, Position};
use crate::domain::Disk;
use crate::error::shown;

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
    pub disks: Vec<BitmapOnDisk>,
}

/// The bitmap of a checkpoint on one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapOnDisk {
    pub disk: String,
    pub bitmap: String,
    /// The bitmap has recorded all writes.
    pub is_consistent: bool,
}

impl Checkpoint {
    pub fn is_called(&self, name: &str) -> bool {
        self.id == name || self.name == name
    }

    #[cfg(test)]
    pub fn for_test(id: &str, name: &str, store: Option<&str>) -> Self {
        Self {
            id: id.into(),
            name: name.into(),
            description: None,
            time: Timestamp::UNIX_EPOCH,
            store: store.map(str::to_owned),
            disks: Vec::new(),
        }
    }
}

/// Returns the checkpoint with this name (the newest if there are several), and the one before it.
pub fn find<'a>(
    checkpoints: &'a [Checkpoint],
    name: &str,
) -> Result<(&'a Checkpoint, Option<&'a Checkpoint>), Error> {
    let index = checkpoints
        .iter()
        .rposition(|checkpoint| checkpoint.is_called(name))
        .ok_or_else(|| Error::NoSuchCheckpoint { name: shown(name) })?;
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

/// Returns the bitmaps of checkpoints on the disks, by the checkpoints' ids.
pub fn on_disks(disks: &[Disk]) -> BTreeMap<&str, Vec<BitmapOnDisk>> {
    let mut found: BTreeMap<&str, Vec<BitmapOnDisk>> = BTreeMap::new();
    for disk in disks {
        for (id, bitmap) in bitmaps(disk) {
            let is_consistent = disk.bitmap(bitmap).is_some_and(|found| !found.inconsistent);
            found.entry(id).or_default().push(BitmapOnDisk {
                disk: disk.name.clone(),
                bitmap: bitmap.to_owned(),
                is_consistent,
            });
        }
    }
    let bitmaps = |found: &BTreeMap<&str, Vec<BitmapOnDisk>>| found.values().map(Vec::len).sum::<usize>();
    let mut surplus = bitmaps(&found).saturating_sub(MAX_BITMAPS);
    while found.len() > MAX_CHECKPOINTS || surplus > 0 {
        let Some((_, oldest)) = found.pop_first() else {
            break;
        };
        surplus = surplus.saturating_sub(oldest.len());
    }
    found
}

/// Returns the checkpoints with these bitmaps, the oldest first. `owners` has the same order as `found`. `records` are
/// the checkpoints without a backup; those without any bitmap are listed too, so that a caller can delete them.
pub fn list(
    found: BTreeMap<&str, Vec<BitmapOnDisk>>,
    owners: Vec<Owner>,
    records: Vec<CheckpointRecord>,
) -> Vec<Checkpoint> {
    let missing = records
        .into_iter()
        .filter(|record| !found.contains_key(record.id.as_str()))
        .map(|record| of_record(record, Vec::new()));
    let mut checkpoints: Vec<Checkpoint> = missing.collect();
    let owned = found.into_iter().zip(owners);
    checkpoints.extend(owned.filter_map(|((id, disks), owner)| of_owner(id, owner, disks)));
    checkpoints.sort_by(|a, b| (a.time, &a.id).cmp(&(b.time, &b.id)));
    checkpoints
}

fn of_record(record: CheckpointRecord, disks: Vec<BitmapOnDisk>) -> Checkpoint {
    Checkpoint {
        name: record.name.unwrap_or_else(|| record.id.clone()),
        id: record.id,
        description: record.description,
        time: record.time,
        store: None,
        disks,
    }
}

/// Returns the checkpoint of this owner; `None` if it is pending or removed. Records of another domain have names that
/// are not for this domain's callers, so only the id is used then.
fn of_owner(id: &str, owner: Owner, disks: Vec<BitmapOnDisk>) -> Option<Checkpoint> {
    let state = match owner.is_of_domain {
        true => owner.state,
        false => OwnerState::Unknown,
    };
    match state {
        OwnerState::Checkpoint(record) => Some(of_record(record, disks)),
        // Those of the domain come first.
        OwnerState::Backups { backups, .. } => {
            let backup = backups.into_iter().next()?;
            let checkpoint = backup.checkpoint.unwrap_or_default();
            Some(Checkpoint {
                id: id.to_owned(),
                name: checkpoint.name.unwrap_or_else(|| id.to_owned()),
                description: checkpoint.description,
                time: backup.time,
                store: Some(backup.store),
                disks,
            })
        }
        OwnerState::Pending | OwnerState::Removed => None,
        OwnerState::Unknown => Some(Checkpoint {
            id: id.to_owned(),
            name: id.to_owned(),
            description: None,
            time: time_of(id),
            store: None,
            disks,
        }),
    }
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
    use crate::checkpoint::{Backup, bitmap_name};
    use crate::domain::Bitmap;
    use crate::model;

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
            is_usable: true,
            inconsistent: false,
            dirty: 0,
        };
        disk.bitmaps = ids.iter().map(|id| bitmap(bitmap_name(id, 0))).collect();
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

    fn own(state: OwnerState) -> Owner {
        let is_of_domain = true;
        Owner { is_of_domain, state }
    }

    fn backup(name: Option<&str>, second: i64) -> Owner {
        let checkpoint = name.map(|name| model::Checkpoint {
            name: Some(name.into()),
            description: None,
        });
        own(OwnerState::Backups {
            backups: vec![Backup {
                store: "default".into(),
                directory: "web".into(),
                sequence: 1,
                time: at(second),
                checkpoint,
            }],
            has_unreadable: false,
        })
    }

    #[test]
    fn checkpoints_come_from_the_disks_and_their_names_from_the_catalog() {
        let mut disks = [disk("vda", &IDS), disk("vdb", &IDS[..1])];
        disks[0].bitmaps[0].inconsistent = true;
        let recorded = vec![
            backup(Some("monday"), 1001),
            backup(None, 1002),
            own(OwnerState::Checkpoint(record(IDS[2], "alone", 1000))),
            own(OwnerState::Removed),
        ];
        let alone = vec![record(IDS[2], "alone", 1000), record("elsewhere", "gone", 999)];
        let found = list(on_disks(&disks), recorded, alone);
        let said: Vec<(&str, usize)> = found
            .iter()
            .map(|found| (found.name.as_str(), found.disks.len()))
            .collect();
        assert_eq!(said, [("gone", 0), ("alone", 1), ("monday", 2), (IDS[1], 1)]);
        assert_eq!(
            found[2]
                .disks
                .iter()
                .map(|record| record.is_consistent)
                .collect::<Vec<_>>(),
            [false, true]
        );

        let (monday, before) = find(&found, "monday").unwrap();
        assert_eq!(
            (monday.id.as_str(), before.unwrap().name.as_str()),
            (IDS[0], "alone")
        );
        assert_eq!(find(&found, IDS[0]).unwrap().0, monday);
        assert!(find(&found, "gone").unwrap().1.is_none());
        assert!(find(&found, IDS[3]).is_err());
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
        let found = list(on_disks(&disks), vec![Owner::UNKNOWN], Vec::new());
        assert_eq!(
            found[0].time,
            "2026-11-23T05:59:01Z".parse::<Timestamp>().unwrap()
        );
        assert_eq!((found[0].name.as_str(), &found[0].store), (IDS[0], &None));
        assert_eq!(time_of("20269923T055901Z-10ebf9b0"), Timestamp::UNIX_EPOCH);
    }

    #[test]
    fn records_of_another_domain_give_no_names() {
        let disks = [disk("vda", &IDS[..3])];
        let mut owners = [
            backup(Some("secret"), 1001),
            own(OwnerState::Checkpoint(record(IDS[1], "secret", 1002))),
            own(OwnerState::Pending),
        ];
        owners.iter_mut().for_each(|owner| owner.is_of_domain = false);
        let found = list(on_disks(&disks), owners.into(), Vec::new());
        let names: Vec<&str> = found.iter().map(|found| found.name.as_str()).collect();
        assert_eq!(names, &IDS[..3]);
        assert!(found.iter().all(|found| found.store.is_none()));
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
        let recorded = vec![backup(Some("m"), 2), backup(Some("m"), 1)];
        let found = list(on_disks(&disks), recorded, Vec::new());
        assert_eq!(find(&found, "m").unwrap().0.id, IDS[0]);
    }
}
