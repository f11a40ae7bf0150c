//! Chooses the base of a disk's new image, or the reason for a full one.
//!
//! The dirty bitmap on the disk decides: it has recorded all writes since the point in time of one earlier backup, and
//! only recorded writes can be copied incrementally. The disk's name does not matter. Pure: the caller has read the
//! earlier backups and the disk's bitmaps.

#[cfg(test)]
mod tests;

use super::{Base, Checkpoint, Error, FullReason, Mode, was_never_smaller};
use crate::definition::Position;
use crate::domain::Disk;

/// The maximum number of images in a chain. Damage to any of them breaks the backup.
pub const MAX_IMAGES: u32 = 32;

/// The domain's earlier backups and checkpoints, from which a new backup may start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Candidates {
    /// The domain's backups in the requested store, newest first.
    pub backups: Vec<Candidate>,
    pub checkpoints: Vec<Checkpoint>,
    /// The administrator allows checkpoints on disks whose images hold internal snapshots.
    pub allow_internal_snapshots: bool,
}

impl Candidates {
    /// Returns true if a backup may add a bitmap to the disk, provided that its image can store one.
    pub fn may_add_bitmap(&self, disk: &Disk) -> bool {
        self.allow_internal_snapshots || !disk.has_snapshots
    }
}

/// An earlier backup of the domain in the store of the new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub id: String,
    /// The name of its checkpoint, if that differs from the id.
    pub checkpoint: Option<String>,
    /// This service wrote this exact manifest.
    pub proven: bool,
    pub disks: Vec<CandidateImage>,
}

/// The image of one disk in an earlier backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CandidateImage {
    /// The image's file name in the backup's directory.
    pub file: String,
    pub virtual_size: u64,
    /// The bitmap that has recorded changes of the disk since this backup.
    pub bitmap: Option<String>,
    /// The number of images in the chain; `None` if one of them is damaged or missing.
    pub images: Option<u32>,
}

/// The kind of backup that a call requests for a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum BaseRequest {
    /// Incremental to the newest backup for which the disk has a bitmap, or else full.
    #[default]
    Auto,
    Full,
    /// Incremental to the newest backup for which the disk has a bitmap, or else an error.
    Newest,
    /// Incremental to this checkpoint, or else an error.
    Checkpoint {
        name: String,
        at: Position,
    },
}

/// Chooses for one disk. `refused` is a reason that excludes every base.
pub fn choose(
    disk: &Disk,
    candidates: &Candidates,
    wanted: &BaseRequest,
    refused: Option<FullReason>,
) -> Result<Mode, Error> {
    let backups = candidates.backups.as_slice();
    let found = match wanted {
        BaseRequest::Full => return Ok(Mode::default()),
        _ if refused.is_some() => Err(refused.unwrap_or(FullReason::Requested)),
        BaseRequest::Auto | BaseRequest::Newest => newest(disk, backups),
        BaseRequest::Checkpoint { name, at } => {
            let is_called =
                |backup: &Candidate| backup.id == *name || backup.checkpoint.as_ref() == Some(name);
            let has_no_backup = |other: &Checkpoint| other.is_called(name) && other.store.is_none();
            let mut called = backups.iter().filter(|backup| is_called(backup));
            // A backup of another service can have the same id or name.
            match called
                .clone()
                .find(|backup| backup.proven)
                .or_else(|| called.next())
            {
                Some(backup) => base(disk, backup, is_newest(backup, backups)),
                None if candidates.checkpoints.iter().any(has_no_backup) => Err(FullReason::NoBackup),
                None => {
                    let (name, at) = (name.clone(), *at);
                    return Err(Error::NoSuchBase { name, at });
                }
            }
        }
    };
    let found = found.map_err(|why| match why {
        FullReason::NoBitmap if !candidates.may_add_bitmap(disk) => FullReason::InternalSnapshots,
        why => why,
    });
    match (found, wanted) {
        (Ok(base), _) => Ok(Mode::Incremental(base)),
        (Err(why), BaseRequest::Auto) => Ok(Mode::Full { why }),
        (Err(why), BaseRequest::Checkpoint { name, at }) => Err(Error::CannotIncrement {
            disk: disk.name.clone(),
            since: format!("'{name}'"),
            why,
            at: *at,
        }),
        (Err(why), _) => Err(Error::CannotIncrement {
            disk: disk.name.clone(),
            since: "any earlier backup".into(),
            why,
            at: Position::default(),
        }),
    }
}

/// Returns the newest backup for which the disk has a bitmap.
fn newest(disk: &Disk, backups: &[Candidate]) -> Result<Base, FullReason> {
    let mut first = None;
    for backup in backups {
        match base(disk, backup, is_newest(backup, backups)) {
            Ok(base) => return Ok(base),
            // An older bitmap includes the same change of size. A chain that is too long ends with a full backup
            // instead of being continued from an older base.
            Err(why @ (FullReason::Resized | FullReason::ChainTooLong)) => return Err(why),
            Err(FullReason::NoBitmap) => {}
            Err(why) => {
                first.get_or_insert(why);
            }
        }
    }
    Err(match first {
        Some(why) => why,
        None if !disk.keeps_bitmaps => FullReason::NoBitmaps,
        None if backups.is_empty() => FullReason::First,
        None => FullReason::NoBitmap,
    })
}

/// Returns true if this is the newest backup that this service created.
fn is_newest(backup: &Candidate, backups: &[Candidate]) -> bool {
    let newest = backups.iter().find(|backup| backup.proven);
    newest.is_some_and(|newest| newest.id == backup.id)
}

/// Returns the base that an earlier backup provides for a disk.
fn base(disk: &Disk, backup: &Candidate, newest: bool) -> Result<Base, FullReason> {
    let images = backup.disks.iter().filter_map(|then| {
        let name = then.bitmap.as_ref()?;
        Some((then, disk.bitmap(name)?))
    });
    let Some((then, bitmap)) = images.into_iter().next() else {
        return Err(if disk.keeps_bitmaps {
            FullReason::NoBitmap
        } else {
            FullReason::NoBitmaps
        });
    };
    // Every reader of a backup of this service knows the name of its bitmap.
    if !backup.proven {
        return Err(FullReason::NotProven);
    }
    let count = then.images.ok_or(FullReason::Damaged)?;
    if !bitmap.is_usable {
        return Err(FullReason::Inconsistent);
    }
    if then.virtual_size != disk.virtual_size {
        return Err(FullReason::Resized);
    }
    was_never_smaller(disk, &bitmap.name)?;
    if count >= MAX_IMAGES {
        return Err(FullReason::ChainTooLong);
    }
    Ok(Base {
        backup: backup.id.clone(),
        file: then.file.clone(),
        bitmap: bitmap.name.clone(),
        is_newest: newest,
    })
}
