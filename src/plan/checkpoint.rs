//! Selects the disks of a checkpoint, and checks its name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{DiskPlan, Error};
use crate::config::Store;
use crate::definition::{CheckpointDefinition, Position};
use crate::domain::{Disk, DiskLookup, find_disk};
use crate::model::{Checkpoint, Format};

/// The checkpoint that a call requests with its backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckpointOption {
    /// No checkpoint.
    No,
    This(CheckpointDefinition),
}

/// A checkpoint of the domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Existing {
    pub id: String,
    /// The name, or the id if it has no name.
    pub name: String,
    pub has_backup: bool,
}

impl Existing {
    pub fn is_called(&self, name: &str) -> bool {
        self.id == name || self.name == name
    }
}

/// The reasons why a disk cannot have a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    #[error("it has no medium")]
    NoMedium,
    #[error("its image cannot store dirty bitmaps (qcow2 version 3 can)")]
    NoBitmaps,
    #[error("its backup is raw, so it cannot be a backing file")]
    RawTarget,
    #[error(
        "its image holds internal snapshots, and QEMU cannot revert to them while it has a dirty bitmap. To allow \
         it, set \
         'checkpoints = \"always\"' in the domain's file"
    )]
    InternalSnapshots,
    #[error("the store keeps none. Set 'checkpoints' in the configuration")]
    Store,
}

/// Decides which disks of a backup have a checkpoint. Returns the checkpoint's name and description if the call
/// requests one.
pub(super) fn of_backup(
    wanted: Option<&CheckpointOption>,
    store: Option<&Store>,
    disks: &[Disk],
    existing: &[Existing],
    planned: &mut [DiskPlan],
) -> Result<Option<Checkpoint>, Error> {
    let definition = match wanted {
        None => return Ok(None),
        Some(CheckpointOption::No) => {
            planned.iter_mut().for_each(|disk| disk.checkpoint = false);
            return Ok(None);
        }
        Some(CheckpointOption::This(definition)) => definition,
    };
    let store = store.ok_or(Error::CheckpointOutside)?;
    check_name(definition, existing)?;
    check_any(planned, disks, store)?;
    if let Some(listed) = listed(definition, disks)? {
        for disk in planned.iter_mut() {
            match listed.get(disk.name.as_str()) {
                Some((true, at)) => require(disk, disks, store, *at)?,
                Some((false, _)) | None => disk.checkpoint = false,
            }
        }
        let missing = |(name, (bitmap, at)): (&&str, &(bool, Position))| {
            let planned = planned.iter().any(|disk| disk.name == **name);
            (*bitmap && !planned).then(|| ((*name).to_owned(), *at))
        };
        if let Some((name, at)) = listed.iter().find_map(missing) {
            return Err(Error::CheckpointNotBackedUp { name, at });
        }
    }
    if !planned.iter().any(|disk| disk.checkpoint) {
        return Err(Error::NothingRecorded);
    }
    Ok(Some(Checkpoint {
        name: definition.name.clone(),
        description: definition.description.clone(),
    }))
}

fn require(planned: &DiskPlan, disks: &[Disk], store: &Store, at: Position) -> Result<(), Error> {
    if planned.checkpoint {
        return Ok(());
    }
    let (name, why) = (planned.name.clone(), obstacle(planned, disks, store));
    Err(Error::NoCheckpoint { name, at, why })
}

/// Fails if no disk can have a checkpoint. The error has the most specific reason.
fn check_any(planned: &[DiskPlan], disks: &[Disk], store: &Store) -> Result<(), Error> {
    if planned.iter().any(|disk| disk.checkpoint) {
        return Ok(());
    }
    let obstacles = planned.iter().map(|disk| (disk, obstacle(disk, disks, store)));
    match obstacles.max_by_key(|(_, why)| *why != Obstacle::NoBitmaps) {
        Some((disk, why)) => Err(Error::NoneRecorded {
            first: disk.name.clone(),
            why,
        }),
        None => Err(Error::NothingRecorded),
    }
}

/// The reason why this disk of a backup has no checkpoint.
fn obstacle(planned: &DiskPlan, disks: &[Disk], store: &Store) -> Obstacle {
    let keeps = disks
        .iter()
        .any(|disk| disk.name == planned.name && disk.keeps_bitmaps);
    match planned.format {
        _ if store.checkpoints == 0 => Obstacle::Store,
        _ if !keeps => Obstacle::NoBitmaps,
        Format::Raw => Obstacle::RawTarget,
        Format::Qcow2 => Obstacle::InternalSnapshots,
    }
}

/// Returns the disks for a checkpoint without a backup.
pub fn checkpoint<'a>(
    definition: &CheckpointDefinition,
    disks: &'a [Disk],
    existing: &[Existing],
) -> Result<Vec<&'a Disk>, Error> {
    check_name(definition, existing)?;
    let Some(listed) = listed(definition, disks)? else {
        let able: Vec<&Disk> = disks.iter().filter(|disk| disk.keeps_bitmaps).collect();
        return match able.is_empty() {
            true => Err(Error::NothingRecorded),
            false => Ok(able),
        };
    };
    let mut chosen = Vec::new();
    for disk in disks {
        let Some((true, at)) = listed.get(disk.name.as_str()) else {
            continue;
        };
        let why = match disk.has_medium() {
            true if disk.keeps_bitmaps => {
                chosen.push(disk);
                continue;
            }
            true => Obstacle::NoBitmaps,
            false => Obstacle::NoMedium,
        };
        let (name, at) = (disk.name.clone(), *at);
        return Err(Error::NoCheckpoint { name, at, why });
    }
    Ok(chosen)
}

fn check_name(definition: &CheckpointDefinition, existing: &[Existing]) -> Result<(), Error> {
    match &definition.name {
        Some(name) if existing.iter().any(|other| other.is_called(name)) => {
            Err(Error::CheckpointExists { name: name.clone() })
        }
        _ => Ok(()),
    }
}

/// The disks that a document lists, by name: whether each is to have a checkpoint, and the position of that request.
type Listed<'a> = BTreeMap<&'a str, (bool, Position)>;

/// Returns the domain's disks that a document lists.
fn listed<'a>(definition: &CheckpointDefinition, disks: &'a [Disk]) -> Result<Option<Listed<'a>>, Error> {
    let Some(asked) = &definition.disks else {
        return Ok(None);
    };
    let mut listed = BTreeMap::new();
    let mut first: BTreeMap<&str, &str> = BTreeMap::new();
    for asked in asked {
        let (name, at) = (asked.name.clone(), asked.at);
        let disk = match find_disk(disks, &asked.name) {
            DiskLookup::Found(disk) => disk,
            DiskLookup::Missing => return Err(Error::NoSuchDisk { name, at }),
            DiskLookup::Ambiguous => return Err(Error::AmbiguousDisk { name, at }),
        };
        if let Some(first) = first.insert(&disk.name, &asked.name) {
            let first = first.to_owned();
            return Err(Error::SameDisk { first, name, at });
        }
        listed.insert(disk.name.as_str(), (asked.bitmap, at));
    }
    Ok(Some(listed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::parse_checkpoint;
    use crate::error::Kind;

    fn disks() -> Vec<Disk> {
        let mut disks: Vec<Disk> = ["vda", "vdb", "raw"]
            .map(|name| Disk::for_test(name, &format!("drive-{name}"), true, true))
            .into();
        disks[2].keeps_bitmaps = false;
        let mut empty = Disk::for_test("cd0", "drive-cd", false, false);
        empty.keeps_bitmaps = false;
        disks.push(empty);
        disks
    }

    fn of(document: &str) -> Result<Vec<String>, (Kind, String)> {
        let existing = [Existing {
            id: "20261123T055907Z-10ebf9b0".into(),
            name: "c1".into(),
            has_backup: true,
        }];
        let definition = parse_checkpoint(document).unwrap();
        let disks = disks();
        let chosen = checkpoint(&definition, &disks, &existing);
        chosen
            .map(|disks| disks.iter().map(|disk| disk.name.clone()).collect())
            .map_err(|error| (error.kind(), error.to_string()))
    }

    fn with(disks: &str) -> String {
        format!("<domaincheckpoint><disks>{disks}</disks></domaincheckpoint>")
    }

    #[test]
    fn without_a_list_every_able_disk_gets_a_checkpoint() {
        assert_eq!(of("<domaincheckpoint/>"), Ok(vec!["vda".into(), "vdb".into()]));
        let one = with("<disk name='drive-vdb'/><disk name='vda' checkpoint='no'/>");
        assert_eq!(of(&one), Ok(vec!["vdb".into()]));
        assert_eq!(
            checkpoint(&CheckpointDefinition::default(), &disks()[2..], &[]),
            Err(Error::NothingRecorded)
        );
    }

    #[test]
    fn disks_that_cannot_have_a_checkpoint_are_refused_by_name() {
        for (disks, kind, text) in [
            ("<disk name='raw'/>", Kind::Unsupported, "'raw'"),
            ("<disk name='cd0'/>", Kind::Unsupported, "no medium"),
            ("<disk name='vdx'/>", Kind::NoSuchDisk, "'vdx'"),
            (
                "<disk name='vda'/><disk name='drive-vda'/>",
                Kind::InvalidDefinition,
                "same disk",
            ),
        ] {
            let (found, said) = of(&with(disks)).unwrap_err();
            assert_eq!(found, kind, "{said}");
            assert!(said.contains(text) && said.starts_with("line 1"), "{said}");
        }
    }

    #[test]
    fn a_name_is_used_once() {
        let named = |name: &str| {
            of(&format!(
                "<domaincheckpoint><name>{name}</name></domaincheckpoint>"
            ))
        };
        assert_eq!(named("c1").unwrap_err().0, Kind::InvalidDefinition);
        assert!(named("c2").is_ok());
    }
}
