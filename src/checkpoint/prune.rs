//! Chooses the bitmaps to remove from a disk.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Backup, Owner, OwnerState, bitmaps, orphans};
use crate::config::Store;
use crate::domain::Disk;

/// How many bitmaps of unknown origin stay on each disk, for the service that created them. Those of a backup with an
/// unreadable copy are among them, because that copy may need its bitmap.
const MAX_UNKNOWN: usize = 16;

/// Returns the bitmaps of a disk that no later backup will start from. These belong to failed or removed backups, or
/// exceed the number that their store keeps. Inconsistent bitmaps are among them, because they also prevent resizing of
/// the disk; only those of checkpoints without a backup stay, until a caller deletes them. With `clear_backups`, those of all backups are among them, because the image has internal snapshots.
///
/// `owners` are the owners by id.
pub fn useless<'a>(
    disk: &'a Disk,
    clear_backups: bool,
    owners: &BTreeMap<&str, Owner>,
    stores: &BTreeMap<String, Store>,
) -> Vec<&'a str> {
    let mut found: Vec<(&str, &str)> = bitmaps(disk).collect();
    // The newest first: for checkpoints of unknown origin, only the name shows the age.
    found.sort_by_key(|(id, _)| Reverse(*id));
    let (bases, mut unknown) = (needed(&found, owners, stores), 0);
    let inconsistent = |name: &str| disk.bitmap(name).is_some_and(|bitmap| bitmap.inconsistent);
    found.retain(|(id, name)| match owners.get(id).map(|owner| &owner.state) {
        Some(OwnerState::Checkpoint(_)) => false,
        _ if inconsistent(name) => true,
        Some(OwnerState::Backups {
            has_unreadable: false,
            ..
        }) => clear_backups || !bases.contains(id),
        Some(OwnerState::Removed) => true,
        Some(OwnerState::Pending) => false,
        Some(OwnerState::Backups { .. } | OwnerState::Unknown) | None => {
            unknown += 1;
            unknown > MAX_UNKNOWN
        }
    });
    found
        .into_iter()
        .map(|(_, name)| name)
        .chain(orphans(disk))
        .collect()
}

/// Returns the backups that serve as bases for the next ones: for each directory, as many of the newest as the store
/// keeps checkpoints. A backup in several stores is needed if one of them needs it. Backups with an unreadable copy do
/// not count.
fn needed<'a>(
    found: &[(&'a str, &str)],
    owners: &'a BTreeMap<&str, Owner>,
    stores: &BTreeMap<String, Store>,
) -> BTreeSet<&'a str> {
    let mut backups: Vec<(&Backup, &str)> = Vec::new();
    for (id, _) in found {
        if let Some(OwnerState::Backups {
            backups: of,
            has_unreadable: false,
        }) = owners.get(id).map(|owner| &owner.state)
        {
            backups.extend(of.iter().map(|backup| (backup, *id)));
        }
    }
    let position = |backup: &Backup| (backup.sequence, backup.time);
    backups.sort_by_key(|(backup, id)| Reverse((position(backup), *id)));
    let (mut counts, mut needed) = (HashMap::<(&str, &str), usize>::new(), BTreeSet::new());
    for (backup, id) in backups {
        let count = counts.entry((&backup.store, &backup.directory)).or_default();
        *count += 1;
        // If a store is not configured at the moment, the service does not know how many checkpoints it keeps.
        if stores
            .get(&backup.store)
            .is_none_or(|store| *count <= store.checkpoints)
        {
            needed.insert(id);
        }
    }
    needed
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::checkpoint::{CheckpointRecord, bitmap_name, sentinel_name, with_sentinel};
    use crate::domain::Bitmap;

    fn id(second: u32) -> String {
        format!("20261123T0559{second:02}Z-10ebf9b0")
    }

    fn disk(seconds: &[u32]) -> Disk {
        let bitmap = |name: String| Bitmap {
            name,
            is_usable: true,
            inconsistent: false,
            dirty: 0,
        };
        let mut bitmaps: Vec<Bitmap> = seconds
            .iter()
            .map(|second| bitmap(bitmap_name(&id(*second), 0)))
            .collect();
        bitmaps.push(bitmap("somebody-elses".into()));
        bitmaps.push(bitmap("backupd-mine-0".into()));
        let mut disk = Disk::for_test("vda", "a", true, true);
        disk.bitmaps = bitmaps;
        disk
    }

    fn kept(seconds: &[u32], state: impl Fn(u32) -> OwnerState) -> Vec<u32> {
        let disk = disk(seconds);
        let ids: Vec<String> = seconds.iter().map(|second| id(*second)).collect();
        let owners = ids.iter().map(String::as_str);
        let owners = owners
            .zip(seconds.iter().map(|second| owner(state(*second))))
            .collect();
        let mut store = Store::at("/s".into());
        store.checkpoints = 2;
        let mut none = Store::at("/none".into());
        none.checkpoints = 0;
        let stores = BTreeMap::from([("s".to_owned(), store), ("none".to_owned(), none)]);
        let gone = useless(&disk, false, &owners, &stores);
        let stays = |second: &&u32| !gone.contains(&bitmap_name(&id(**second), 0).as_str());
        assert!(
            !gone
                .iter()
                .any(|name| name.contains("else") || name.contains("mine"))
        );
        seconds.iter().filter(stays).copied().collect()
    }

    fn owner(state: OwnerState) -> Owner {
        let is_of_domain = true;
        Owner { is_of_domain, state }
    }

    fn backup(sequence: u32, store: &str, directory: &str) -> Backup {
        Backup {
            store: store.into(),
            directory: directory.into(),
            sequence: sequence.into(),
            // The clock may have been wrong at any time.
            time: Timestamp::from_second(100 - i64::from(sequence)).unwrap(),
            checkpoint: None,
        }
    }

    fn backups(backups: impl IntoIterator<Item = Backup>) -> OwnerState {
        OwnerState::Backups {
            backups: backups.into_iter().collect(),
            has_unreadable: false,
        }
    }

    /// A checkpoint without a backup.
    fn alone() -> OwnerState {
        OwnerState::Checkpoint(CheckpointRecord {
            id: id(1),
            name: None,
            description: None,
            time: Timestamp::UNIX_EPOCH,
        })
    }

    #[test]
    fn a_checkpoint_of_a_backup_in_two_stores_stays_while_one_of_them_needs_it() {
        // The copy of the store keeps no checkpoint.
        let both = |second| backups([backup(second, "none", "web"), backup(second, "s", "web")]);
        assert_eq!(kept(&[1, 2, 3, 4], both), [3, 4]);
        let copied = |second| backups([backup(second, "none", "web")]);
        assert_eq!(kept(&[1, 2, 3, 4], copied), [0; 0]);
    }

    #[test]
    fn checkpoints_of_another_domain_do_not_count_for_this_one() {
        let two = |second| backups([backup(second, "s", if second < 3 { "web" } else { "copy" })]);
        assert_eq!(kept(&[1, 2, 3, 4], two), [1, 2, 3, 4]);
    }

    #[test]
    fn a_sentinel_is_removed_with_its_checkpoint_or_without_one() {
        let mut disk = disk(&[1, 2]);
        let names = [1, 2, 3].map(|second| bitmap_name(&id(second), 0));
        for name in [
            sentinel_name(&names[0]),
            sentinel_name(&names[2]),
            "mine-end".into(),
        ] {
            let bitmap = Bitmap {
                name,
                ..disk.bitmaps[0].clone()
            };
            disk.bitmaps.push(bitmap);
        }
        let ids = [id(1), id(2)];
        let owners = BTreeMap::from([
            (ids[0].as_str(), owner(OwnerState::Removed)),
            (ids[1].as_str(), owner(alone())),
        ]);
        let gone = useless(&disk, false, &owners, &BTreeMap::new());
        assert_eq!(gone, [names[0].as_str(), names[2].as_str()]);
        let removed = |name: &str| with_sentinel(&disk, name).collect::<Vec<_>>();
        assert_eq!(removed(&names[0]), [names[0].clone(), sentinel_name(&names[0])]);
        assert_eq!(removed(&names[1]), [names[1].clone()]);
        assert_eq!(removed(&names[2]), [sentinel_name(&names[2])]);
        assert!(bitmaps(&disk).all(|(_, name)| !name.ends_with("-end")));
    }

    #[test]
    fn with_internal_snapshots_only_explicit_checkpoints_stay() {
        let disk = disk(&[1, 2, 3]);
        let ids = [1, 2, 3].map(id);
        let states = [backups([backup(1, "s", "web")]), alone(), OwnerState::Pending];
        let owners = ids.iter().map(String::as_str).zip(states.map(owner)).collect();
        let stores = BTreeMap::from([("s".to_owned(), Store::at("/s".into()))]);
        assert_eq!(useless(&disk, true, &owners, &stores), [bitmap_name(&ids[0], 0)]);
        assert_eq!(useless(&disk, false, &owners, &stores), [""; 0]);
    }

    #[test]
    fn the_newest_of_each_store_stay_and_those_without_a_backup_go() {
        let there = |second: u32, store: &str| backups([backup(second, store, "web")]);
        assert_eq!(kept(&[1, 2, 3, 4], |second| there(second, "s")), [3, 4]);
        // Ordered by sequence number, not by name.
        assert_eq!(kept(&[1, 2, 3, 4], |second| there(9 - second, "s")), [1, 2]);
        let two_stores = |second| there(second, if second % 2 == 0 { "s" } else { "unconfigured" });
        assert_eq!(kept(&[1, 2, 3, 4, 6], two_stores), [1, 3, 4, 6]);
        let gone = |second| match second {
            1 => OwnerState::Pending,
            2 => OwnerState::Removed,
            _ => OwnerState::Unknown,
        };
        assert_eq!(kept(&[1, 2, 3], gone), [1, 3]);
        assert_eq!(kept(&[1, 2, 3, 4], |_| alone()), [1, 2, 3, 4]);
        let many: Vec<u32> = (0..20).collect();
        assert_eq!(kept(&many, |_| OwnerState::Unknown), many[4..]);
    }

    #[test]
    fn checkpoints_of_a_backup_with_an_unreadable_copy_stay_up_to_the_bound_for_unknown_ones() {
        let copied = |second, has_unreadable| OwnerState::Backups {
            backups: vec![backup(second, "none", "web")],
            has_unreadable,
        };
        // The store of the readable copy keeps no checkpoint, but the one of the other copy may.
        assert_eq!(kept(&[1, 2, 3], |second| copied(second, second == 2)), [2]);
        let many: Vec<u32> = (0..20).collect();
        assert_eq!(kept(&many, |second| copied(second, true)), many[4..]);
    }
}
