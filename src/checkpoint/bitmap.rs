//! The names of a checkpoint's bitmaps, and the bitmaps with such names on a disk.

use super::FullReason;
use crate::domain::Disk;
use crate::model::is_backup_id;

const PREFIX: &str = "backupd-";
const SENTINEL: &str = "-end";

/// Returns the name of the bitmap that records a disk's writes since the checkpoint with this id. `disk` is the disk's
/// index in the backup's plan, or in the request for the checkpoint.
pub fn bitmap_name(id: &str, disk: usize) -> String {
    format!("{PREFIX}{id}-{disk}")
}

/// Returns the id in the name of a checkpoint's bitmap; `None` for bitmaps of other programs, and for sentinels.
fn id_of(bitmap: &str) -> Option<&str> {
    let (id, disk) = bitmap.strip_prefix(PREFIX)?.rsplit_once('-')?;
    let is_number = !disk.is_empty() && disk.bytes().all(|byte| byte.is_ascii_digit());
    (is_number && is_backup_id(id)).then_some(id)
}

/// Returns the name of the sentinel of a checkpoint's bitmap: a bitmap with only the disk's last granule set. QEMU
/// clears it when the disk shrinks, and growing does not restore it.
pub fn sentinel_name(bitmap: &str) -> String {
    format!("{bitmap}{SENTINEL}")
}

/// Returns the name of the bitmap that a sentinel belongs to.
fn bitmap_of_sentinel(name: &str) -> Option<&str> {
    name.strip_suffix(SENTINEL)
}

/// Returns the checkpoints' bitmaps on a disk, as (id, bitmap's name).
pub fn bitmaps(disk: &Disk) -> impl Iterator<Item = (&str, &str)> {
    let names = disk.bitmaps.iter().map(|bitmap| bitmap.name.as_str());
    names.filter_map(|name| id_of(name).map(|id| (id, name)))
}

/// Returns the names of missing bitmaps of which only the sentinel remains on a disk.
pub fn orphans(disk: &Disk) -> impl Iterator<Item = &str> {
    let names = disk.bitmaps.iter().map(|bitmap| bitmap.name.as_str());
    let of = names.filter_map(bitmap_of_sentinel);
    of.filter(|name| id_of(name).is_some() && disk.bitmap(name).is_none())
}

/// Returns the names of the bitmaps of all checkpoints on a disk, including those of which only the sentinel remains.
pub fn all_bitmaps(disk: &Disk) -> impl Iterator<Item = &str> {
    bitmaps(disk).map(|(_, name)| name).chain(orphans(disk))
}

/// Returns the names of a checkpoint's bitmap and of its sentinel, as far as they exist on the disk. They are removed
/// together.
pub fn with_sentinel(disk: &Disk, bitmap: &str) -> impl Iterator<Item = String> {
    let names = [bitmap.to_owned(), sentinel_name(bitmap)];
    names.into_iter().filter(|name| disk.bitmap(name).is_some())
}

/// Fails if the disk was smaller than now at any time since a checkpoint, because QEMU then lost a part of its bitmap.
pub fn was_never_smaller(disk: &Disk, bitmap: &str) -> Result<(), FullReason> {
    match disk.bitmap(&sentinel_name(bitmap)) {
        _ if disk.virtual_size == 0 => Ok(()),
        None => Err(FullReason::NoBitmap),
        Some(sentinel) if sentinel.inconsistent => Err(FullReason::Inconsistent),
        Some(sentinel) if sentinel.dirty == 0 => Err(FullReason::Resized),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bitmaps_of_this_service_are_recognised() {
        let id = "20261123T055907Z-10ebf9b0";
        assert_eq!(id_of(&bitmap_name(id, 12)), Some(id));
        for name in [
            "backupd-20261123T055907Z-10ebf9b0",
            "backupd-20261123T055907Z-10ebf9b0-",
            "backupd-20261123T055907Z-10ebf9b0-x",
            "backupd-20261123T055907Z-10ebf9bg-0",
            "backupd-2026112xT055907Z-10ebf9b0-0",
            "backupd-tuesday-0",
            "libvirt-20261123T055907Z-10ebf9b0-0",
            "",
        ] {
            assert_eq!(id_of(name), None, "{name}");
        }
    }
}
