//! Chooses the base of a disk's new image, or the reason for a full one.
//!
//! The dirty bitmap on the disk decides: it has recorded all writes since the point in time of one earlier backup, and
//! only recorded writes can be copied incrementally. The disk's name does not matter. Pure: the caller has read the
//! earlier backups and the disk's bitmaps.

use serde::{Deserialize, Serialize};

use super::{Error, Existing, Past};
use crate::definition::Position;
use crate::domain::Disk;
use crate::model::{Kind, Parent};

/// The maximum number of images in a chain. Damage to any of them breaks the backup.
pub const MAX_IMAGES: u32 = 32;

/// Returns the name of a checkpoint's sentinel: a bitmap with only the disk's last granule set. QEMU clears it when the
/// disk shrinks, and growing does not restore it.
pub fn sentinel_name(checkpoint: &str) -> String {
    format!("{checkpoint}{SENTINEL}")
}

/// Returns the name of the checkpoint that a sentinel belongs to.
pub fn checkpoint_of_sentinel(name: &str) -> Option<&str> {
    name.strip_suffix(SENTINEL)
}

const SENTINEL: &str = "-end";

/// Fails if the disk was smaller than now at any time since a checkpoint, because QEMU then lost a part of its bitmap.
pub fn was_never_smaller(disk: &Disk, checkpoint: &str) -> Result<(), Why> {
    match disk.bitmap(&sentinel_name(checkpoint)) {
        _ if disk.virtual_size == 0 => Ok(()),
        None => Err(Why::NoBitmap),
        Some(sentinel) if sentinel.inconsistent => Err(Why::Inconsistent),
        Some(sentinel) if sentinel.dirty == 0 => Err(Why::Resized),
        Some(_) => Ok(()),
    }
}

/// An earlier backup of the domain in the store of the new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Earlier {
    pub id: String,
    /// The name of its checkpoint, if that differs from the id.
    pub checkpoint: Option<String>,
    /// This service wrote this exact manifest.
    pub proven: bool,
    pub disks: Vec<EarlierDisk>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EarlierDisk {
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
    Since {
        checkpoint: String,
        at: Position,
    },
}

/// The part of a disk to copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    Full { why: Why },
    Since(Base),
}

impl Mode {
    /// Returns libvirt's term if it has one.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Full { .. } => "full",
            Self::Since(Base { newest: true, .. }) => "incremental",
            Self::Since(_) => "differential",
        }
    }

    /// The backing image of the new one.
    pub fn parent(&self) -> Option<Parent> {
        match self {
            Self::Full { .. } => None,
            Self::Since(base) => Some(base.parent()),
        }
    }
}

impl Default for Mode {
    fn default() -> Self {
        Self::Full { why: Why::Requested }
    }
}

/// The backing image of a new one, and the bitmap of the data to copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Base {
    pub backup: String,
    pub file: String,
    pub bitmap: String,
    /// It is the newest backup.
    pub newest: bool,
}

impl Base {
    pub fn parent(&self) -> Parent {
        Parent {
            backup: self.backup.clone(),
            file: self.file.clone(),
        }
    }
}

/// The reason for a full copy of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// The call requested it.
    Requested,
    /// The caller chose the target, and only stores record earlier backups.
    Outside,
    /// The target is raw, so it cannot have a backing file.
    Raw,
    /// The store has no earlier backup of the domain.
    First,
    /// The disk's image cannot store dirty bitmaps.
    NoBitmaps,
    /// The disk has no bitmap since an earlier backup: it is new, or has another image.
    NoBitmap,
    /// Its image holds internal snapshots, and QEMU cannot revert to them while it has a persistent bitmap.
    InternalSnapshots,
    /// The bitmap is incomplete, as after a crash of its QEMU.
    Inconsistent,
    /// The disk has another size, or was smaller in between.
    Resized,
    /// An image of the earlier backup is damaged or missing.
    Damaged,
    /// Another service created the earlier backup, or its manifest was changed.
    NotProven,
    /// The chain would have too many images.
    ChainTooLong,
    /// The catalog no longer has the reason.
    Unknown,
    /// The checkpoint has no backup.
    NoBackup,
}

impl Why {
    /// The name in the D-Bus interface.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Outside => "outside",
            Self::Raw => "raw",
            Self::First => "first",
            Self::NoBitmaps => "no-bitmaps",
            Self::NoBitmap => "no-bitmap",
            Self::InternalSnapshots => "internal-snapshots",
            Self::Inconsistent => "inconsistent",
            Self::Resized => "resized",
            Self::Damaged => "damaged",
            Self::NotProven => "not-proven",
            Self::ChainTooLong => "chain-too-long",
            Self::Unknown => "unknown",
            Self::NoBackup => "no-backup",
        }
    }

    /// The text for users.
    pub fn text(self) -> &'static str {
        match self {
            Self::Requested => "a full backup was requested",
            Self::Outside => "only stores record earlier backups",
            Self::Raw => "a raw image cannot have a backing file",
            Self::First => "the store has no earlier backup",
            Self::NoBitmaps => "its image cannot store dirty bitmaps (qcow2 version 3 can)",
            Self::NoBitmap => "it has no dirty bitmap since then",
            Self::InternalSnapshots => {
                "its image holds internal snapshots, and QEMU cannot revert to them while it has a dirty bitmap"
            }
            Self::Inconsistent => "its dirty bitmap is incomplete, as after a crash of its QEMU",
            Self::Resized => "its size has changed since then, even if it is the same again",
            Self::Damaged => "an image of the earlier backup is damaged or missing",
            Self::NotProven => "another service created the earlier backup, or its manifest was changed",
            Self::ChainTooLong => "its chain would have too many images",
            Self::Unknown => "the reason is no longer on record",
            Self::NoBackup => "the checkpoint was made without a backup, so there is no base",
        }
    }
}

/// Chooses for one disk. `refused` is a reason that excludes every base.
pub(super) fn choose(
    disk: &Disk,
    past: &Past,
    wanted: &BaseRequest,
    refused: Option<Why>,
) -> Result<Mode, Error> {
    let earlier = past.earlier.as_slice();
    let found = match wanted {
        BaseRequest::Full => return Ok(Mode::default()),
        _ if refused.is_some() => Err(refused.unwrap_or(Why::Requested)),
        BaseRequest::Auto | BaseRequest::Newest => newest(disk, earlier),
        BaseRequest::Since { checkpoint, at } => {
            let is_called =
                |backup: &Earlier| backup.id == *checkpoint || backup.checkpoint.as_ref() == Some(checkpoint);
            let alone = |other: &Existing| other.is_called(checkpoint) && !other.has_backup;
            let mut called = earlier.iter().filter(|backup| is_called(backup));
            // A backup of another service can have the same id or name.
            match called
                .clone()
                .find(|backup| backup.proven)
                .or_else(|| called.next())
            {
                Some(backup) => since(disk, backup, is_newest(backup, earlier)),
                None if past.checkpoints.iter().any(alone) => Err(Why::NoBackup),
                None => {
                    let (name, at) = (checkpoint.clone(), *at);
                    return Err(Error::NoSuchCheckpoint { name, at });
                }
            }
        }
    };
    let found = found.map_err(|why| match why {
        Why::NoBitmap if !past.may_record(disk) => Why::InternalSnapshots,
        why => why,
    });
    match (found, wanted) {
        (Ok(base), _) => Ok(Mode::Since(base)),
        (Err(why), BaseRequest::Auto) => Ok(Mode::Full { why }),
        (Err(why), BaseRequest::Since { checkpoint, at }) => Err(Error::CannotIncrement {
            disk: disk.name.clone(),
            since: format!("'{checkpoint}'"),
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
fn newest(disk: &Disk, earlier: &[Earlier]) -> Result<Base, Why> {
    let mut first = None;
    for backup in earlier {
        match since(disk, backup, is_newest(backup, earlier)) {
            Ok(base) => return Ok(base),
            // An older bitmap includes the same change of size. A chain that is too long ends with a full backup
            // instead of being continued from an older base.
            Err(why @ (Why::Resized | Why::ChainTooLong)) => return Err(why),
            Err(Why::NoBitmap) => {}
            Err(why) => {
                first.get_or_insert(why);
            }
        }
    }
    Err(match first {
        Some(why) => why,
        None if !disk.keeps_bitmaps => Why::NoBitmaps,
        None if earlier.is_empty() => Why::First,
        None => Why::NoBitmap,
    })
}

/// Returns true if this is the newest backup that this service created.
fn is_newest(backup: &Earlier, earlier: &[Earlier]) -> bool {
    let newest = earlier.iter().find(|earlier| earlier.proven);
    newest.is_some_and(|newest| newest.id == backup.id)
}

fn since(disk: &Disk, backup: &Earlier, newest: bool) -> Result<Base, Why> {
    let records = backup.disks.iter().filter_map(|then| {
        let name = then.bitmap.as_ref()?;
        let bitmap = disk.bitmaps.iter().find(|bitmap| bitmap.name == *name)?;
        Some((then, bitmap))
    });
    let Some((then, bitmap)) = records.into_iter().next() else {
        return Err(if disk.keeps_bitmaps {
            Why::NoBitmap
        } else {
            Why::NoBitmaps
        });
    };
    // Every reader of a backup of this service knows the name of its bitmap.
    if !backup.proven {
        return Err(Why::NotProven);
    }
    let images = then.images.ok_or(Why::Damaged)?;
    if !bitmap.good {
        return Err(Why::Inconsistent);
    }
    if then.virtual_size != disk.virtual_size {
        return Err(Why::Resized);
    }
    was_never_smaller(disk, &bitmap.name)?;
    if images >= MAX_IMAGES {
        return Err(Why::ChainTooLong);
    }
    Ok(Base {
        backup: backup.id.clone(),
        file: then.file.clone(),
        bitmap: bitmap.name.clone(),
        newest,
    })
}

/// Returns the kind of a backup whose disks have these modes.
pub fn kind<'a>(modes: impl Iterator<Item = &'a Mode>) -> Kind {
    let mut kind = Kind::Full;
    for mode in modes {
        match mode {
            Mode::Full { .. } => {}
            Mode::Since(Base { newest: true, .. }) if kind == Kind::Full => kind = Kind::Incremental,
            Mode::Since(Base { newest: true, .. }) => {}
            Mode::Since(_) => kind = Kind::Differential,
        }
    }
    kind
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Bitmap;

    fn disk(bitmaps: &[&str]) -> Disk {
        let bitmap = |name: String| Bitmap {
            name,
            good: true,
            inconsistent: false,
            dirty: 1 << 16,
        };
        let mut disk = Disk::for_test("vda", "a", true, true);
        let names = bitmaps.iter().map(|name| (*name).to_owned());
        let sentinels = bitmaps.iter().map(|name| sentinel_name(name));
        disk.bitmaps = names.chain(sentinels).map(bitmap).collect();
        disk
    }

    fn backup(id: &str, images: Option<u32>) -> Earlier {
        Earlier {
            id: id.into(),
            checkpoint: Some(format!("before-{id}")),
            proven: true,
            disks: vec![EarlierDisk {
                file: "vda.qcow2".into(),
                virtual_size: 1 << 20,
                bitmap: Some(format!("since-{id}")),
                images,
            }],
        }
    }

    fn past(earlier: &[Earlier]) -> Past {
        Past {
            earlier: earlier.to_vec(),
            checkpoints: vec![Existing {
                id: "alone-id".into(),
                name: "alone".into(),
                has_backup: false,
            }],
            records_over_snapshots: false,
        }
    }

    fn auto(disk: &Disk, earlier: &[Earlier]) -> Result<(String, bool), Why> {
        match choose(disk, &past(earlier), &BaseRequest::Auto, None).unwrap() {
            Mode::Full { why } => Err(why),
            Mode::Since(base) => Ok((base.backup, base.newest)),
        }
    }

    fn named(checkpoint: &str) -> BaseRequest {
        BaseRequest::Since {
            checkpoint: checkpoint.into(),
            at: Position::default(),
        }
    }

    #[test]
    fn the_newest_backup_with_a_bitmap_on_the_disk_is_the_base() {
        let earlier = [backup("c", Some(3)), backup("b", Some(2)), backup("a", Some(1))];
        assert_eq!(
            auto(&disk(&["since-a", "since-c", "since-b"]), &earlier),
            Ok(("c".into(), true))
        );
        assert_eq!(
            auto(&disk(&["since-a", "since-b"]), &earlier),
            Ok(("b".into(), false))
        );
        assert_eq!(auto(&disk(&["other"]), &earlier), Err(Why::NoBitmap));
        assert_eq!(auto(&disk(&[]), &[]), Err(Why::First));
    }

    #[test]
    fn a_renamed_disk_keeps_its_base() {
        let mut renamed = disk(&["since-a"]);
        renamed.name = "vdx".into();
        assert_eq!(auto(&renamed, &[backup("a", Some(1))]), Ok(("a".into(), true)));
    }

    #[test]
    fn a_backup_of_another_service_is_never_a_base() {
        let foreign = |id: &str, bitmap: &str| {
            let mut backup = backup(id, Some(1));
            backup.proven = false;
            backup.disks[0].bitmap = Some(bitmap.into());
            backup
        };
        let known = disk(&["since-a"]);
        let forged = foreign("z", "since-a");
        assert_eq!(
            auto(&known, &[forged.clone(), backup("a", Some(1))]),
            Ok(("a".into(), true))
        );
        assert_eq!(auto(&known, std::slice::from_ref(&forged)), Err(Why::NotProven));
        let same_name = foreign("a", "since-a");
        let earlier = past(&[same_name, backup("a", Some(1))]);
        let found = choose(&known, &earlier, &named("before-a"), None);
        assert!(
            matches!(found, Ok(Mode::Since(Base { newest: true, .. }))),
            "{found:?}"
        );
        let refused = choose(&known, &past(&[forged]), &named("z"), None);
        assert!(refused.is_err(), "{refused:?}");
    }

    #[test]
    fn a_damaged_base_is_skipped_and_another_size_makes_a_full_backup() {
        let both = disk(&["since-a", "since-b"]);
        assert_eq!(
            auto(&both, &[backup("b", None), backup("a", Some(1))]),
            Ok(("a".into(), false))
        );
        assert_eq!(auto(&both, &[backup("b", None)]), Err(Why::Damaged));
        let mut torn = both.clone();
        torn.bitmaps[1].good = false;
        assert_eq!(auto(&torn, &[backup("b", Some(2))]), Err(Why::Inconsistent));
        let mut grown = both.clone();
        grown.virtual_size += 1;
        assert_eq!(
            auto(&grown, &[backup("b", Some(2)), backup("a", Some(1))]),
            Err(Why::Resized)
        );
        let long = [backup("b", Some(MAX_IMAGES)), backup("a", Some(1))];
        assert_eq!(auto(&both, &long), Err(Why::ChainTooLong));
        let mut old = disk(&[]);
        old.keeps_bitmaps = false;
        assert_eq!(auto(&old, &[backup("a", Some(1))]), Err(Why::NoBitmaps));
    }

    #[test]
    fn a_disk_that_was_or_may_have_been_smaller_gets_a_full_backup() {
        let earlier = [backup("b", Some(2)), backup("a", Some(1))];
        let mut cut = disk(&["since-a", "since-b"]);
        cut.bitmaps[3].dirty = 0;
        assert_eq!(auto(&cut, &earlier), Err(Why::Resized));
        // An older checkpoint has its own sentinel.
        let mut unknown = disk(&["since-a", "since-b"]);
        unknown.bitmaps.remove(3);
        assert_eq!(auto(&unknown, &earlier), Ok(("a".into(), false)));
        unknown.bitmaps.remove(2);
        assert_eq!(auto(&unknown, &earlier), Err(Why::NoBitmap));
        let mut torn = disk(&["since-a"]);
        torn.bitmaps[1].inconsistent = true;
        assert_eq!(auto(&torn, &earlier), Err(Why::Inconsistent));
    }

    #[test]
    fn a_disk_without_a_bitmap_because_of_its_snapshots_gives_that_reason() {
        let mut snapshots = disk(&[]);
        snapshots.has_snapshots = true;
        let earlier = [backup("a", Some(1))];
        assert_eq!(auto(&snapshots, &[]), Err(Why::First));
        assert_eq!(auto(&snapshots, &earlier), Err(Why::InternalSnapshots));
        let mut always = past(&earlier);
        always.records_over_snapshots = true;
        let why = Why::NoBitmap;
        assert_eq!(
            choose(&snapshots, &always, &BaseRequest::Auto, None),
            Ok(Mode::Full { why })
        );
        snapshots.bitmaps = disk(&["since-a"]).bitmaps;
        assert_eq!(auto(&snapshots, &earlier), Ok(("a".into(), true)));
    }

    #[test]
    fn an_empty_disk_needs_no_sentinel() {
        let mut earlier = backup("a", Some(1));
        earlier.disks[0].virtual_size = 0;
        let mut empty = disk(&["since-a"]);
        (empty.virtual_size, empty.bitmaps) = (0, vec![empty.bitmaps[0].clone()]);
        assert_eq!(auto(&empty, &[earlier]), Ok(("a".into(), true)));
    }

    #[test]
    fn a_requested_base_is_used_or_the_backup_is_refused() {
        let earlier = past(&[backup("b", Some(2)), backup("a", Some(1))]);
        let both = disk(&["since-a", "since-b"]);
        for name in ["a", "before-a"] {
            let Ok(Mode::Since(base)) = choose(&both, &earlier, &named(name), None) else {
                panic!("the base exists");
            };
            assert_eq!((base.backup.as_str(), base.newest), ("a", false));
        }
        let error = choose(&both, &earlier, &named("x"), None).unwrap_err();
        assert_eq!(error.kind(), crate::error::Kind::NoSuchCheckpoint);
        for (disk, wanted, refused) in [
            (disk(&["since-b"]), named("a"), None),
            (disk(&[]), BaseRequest::Newest, None),
            (both.clone(), named("a"), Some(Why::Raw)),
            (both.clone(), named("alone"), None),
            (both.clone(), named("alone-id"), None),
        ] {
            let error = choose(&disk, &earlier, &wanted, refused).unwrap_err();
            assert_eq!(error.kind(), crate::error::Kind::CannotIncrement, "{error}");
        }
        assert_eq!(
            choose(&both, &earlier, &BaseRequest::Full, None),
            Ok(Mode::default())
        );
    }

    #[test]
    fn the_kind_of_a_backup_follows_from_its_disks() {
        let full = Mode::default();
        let since = |newest| {
            Mode::Since(Base {
                backup: "a".into(),
                file: "f".into(),
                bitmap: "m".into(),
                newest,
            })
        };
        assert_eq!(kind([&full, &full].into_iter()), Kind::Full);
        assert_eq!(kind([&full, &since(true)].into_iter()), Kind::Incremental);
        assert_eq!(
            kind([&since(false), &since(true)].into_iter()),
            Kind::Differential
        );
    }
}
