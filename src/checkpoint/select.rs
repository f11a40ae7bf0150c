//! Selects the disks of a checkpoint, and checks its name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Checkpoint, Error};
use crate::config::Store;
use crate::definition::{CheckpointDefinition, Position};
use crate::domain::{Disk, find_disks};
use crate::model::{self, Format};

/// The checkpoint that a call requests with its backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckpointOption {
    /// No checkpoint.
    No,
    This(CheckpointDefinition),
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

/// A disk of a planned backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedDisk<'a> {
    pub disk: &'a Disk,
    /// The format of its image in the backup.
    pub format: Format,
    /// The disk gets a checkpoint.
    pub has_checkpoint: bool,
}

/// Decides which disks of a backup have a checkpoint: clears `has_checkpoint` of those that the request excludes.
/// Returns the checkpoint's name and description if the request has any. `disks` are all disks of the domain.
pub fn of_backup(
    requested: Option<&CheckpointOption>,
    store: Option<&Store>,
    disks: &[Disk],
    existing: &[Checkpoint],
    planned: &mut [PlannedDisk],
) -> Result<Option<model::Checkpoint>, Error> {
    let definition = match requested {
        None => return Ok(None),
        Some(CheckpointOption::No) => {
            planned.iter_mut().for_each(|disk| disk.has_checkpoint = false);
            return Ok(None);
        }
        Some(CheckpointOption::This(definition)) => definition,
    };
    let store = store.ok_or(Error::NoStore)?;
    check_name(definition, existing)?;
    check_any(planned, store)?;
    if let Some(listed) = listed(definition, disks)? {
        for disk in planned.iter_mut() {
            match listed.get(disk.disk.name.as_str()) {
                Some((true, at)) => require(disk, store, *at)?,
                Some((false, _)) | None => disk.has_checkpoint = false,
            }
        }
        let missing = |(name, (bitmap, at)): (&&str, &(bool, Position))| {
            let planned = planned.iter().any(|disk| disk.disk.name == **name);
            (*bitmap && !planned).then(|| ((*name).to_owned(), *at))
        };
        if let Some((name, at)) = listed.iter().find_map(missing) {
            return Err(Error::NotBackedUp { name, at });
        }
    }
    if !planned.iter().any(|disk| disk.has_checkpoint) {
        return Err(Error::NoDisk);
    }
    Ok(Some(model::Checkpoint {
        name: definition.name.clone(),
        description: definition.description.clone(),
    }))
}

fn require(planned: &PlannedDisk, store: &Store, at: Position) -> Result<(), Error> {
    if planned.has_checkpoint {
        return Ok(());
    }
    let (name, why) = (planned.disk.name.clone(), obstacle(planned, store));
    Err(Error::Impossible { name, at, why })
}

/// Fails if no disk can have a checkpoint. The error has the most specific reason.
fn check_any(planned: &[PlannedDisk], store: &Store) -> Result<(), Error> {
    if planned.iter().any(|disk| disk.has_checkpoint) {
        return Ok(());
    }
    let obstacles = planned.iter().map(|disk| (disk, obstacle(disk, store)));
    match obstacles.max_by_key(|(_, why)| *why != Obstacle::NoBitmaps) {
        Some((disk, why)) => Err(Error::NoDiskBecause {
            first: disk.disk.name.clone(),
            why,
        }),
        None => Err(Error::NoDisk),
    }
}

/// The reason why this disk of a backup has no checkpoint.
fn obstacle(planned: &PlannedDisk, store: &Store) -> Obstacle {
    match planned.format {
        _ if store.checkpoints == 0 => Obstacle::Store,
        _ if !planned.disk.keeps_bitmaps => Obstacle::NoBitmaps,
        Format::Raw => Obstacle::RawTarget,
        Format::Qcow2 => Obstacle::InternalSnapshots,
    }
}

/// Returns the disks for a checkpoint without a backup.
pub fn select<'a>(
    definition: &CheckpointDefinition,
    disks: &'a [Disk],
    existing: &[Checkpoint],
) -> Result<Vec<&'a Disk>, Error> {
    check_name(definition, existing)?;
    let Some(listed) = listed(definition, disks)? else {
        let able: Vec<&Disk> = disks.iter().filter(|disk| disk.keeps_bitmaps).collect();
        return match able.is_empty() {
            true => Err(Error::NoDisk),
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
        return Err(Error::Impossible { name, at, why });
    }
    Ok(chosen)
}

fn check_name(definition: &CheckpointDefinition, existing: &[Checkpoint]) -> Result<(), Error> {
    match &definition.name {
        Some(name) if existing.iter().any(|other| other.is_called(name)) => {
            Err(Error::Exists { name: name.clone() })
        }
        _ => Ok(()),
    }
}

/// The disks that a document lists, by name: whether each is to have a checkpoint, and the position of that request.
type Listed<'a> = BTreeMap<&'a str, (bool, Position)>;

/// Returns the domain's disks that a document lists.
fn listed<'a>(definition: &CheckpointDefinition, disks: &'a [Disk]) -> Result<Option<Listed<'a>>, Error> {
    let Some(entries) = &definition.disks else {
        return Ok(None);
    };
    let found = find_disks(disks, entries.iter().map(|entry| (entry.name.as_str(), entry.at)))?;
    let listed = found.into_iter().zip(entries);
    Ok(Some(
        listed
            .map(|(disk, entry)| (disk.name.as_str(), (entry.bitmap, entry.at)))
            .collect(),
    ))
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
        let existing = [Checkpoint::for_test(
            "20261123T055907Z-10ebf9b0",
            "c1",
            Some("default"),
        )];
        let definition = parse_checkpoint(document).unwrap();
        let disks = disks();
        let chosen = select(&definition, &disks, &existing);
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
            select(&CheckpointDefinition::default(), &disks()[2..], &[]),
            Err(Error::NoDisk)
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
