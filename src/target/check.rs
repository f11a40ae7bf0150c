//! Checks of a target before its first byte is changed.

use rustix::io::Errno;

use super::lock::user_of_image;
use super::{Around, Error, ImageLock, Media, Opener, Publication, Target, inside, is_in_use};
use crate::model::Format;
use crate::plan::{DiskPlan, Place, Task};

/// qcow2's magic and where its header has the version and the virtual size, big-endian
/// (QEMU's `docs/interop/qcow2.txt`).
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";
const QCOW2_SIZE_OFFSET: usize = 24;

pub fn source(target: &Target, around: &Around) -> Result<(), Error> {
    // What was made just now is no source, though it may have the number of a file that somebody had open a moment ago.
    let was_there = matches!(target.publication, Publication::InPlace);
    match around.sources.holder(target.id).filter(|_| was_there) {
        None => Ok(()),
        Some(domain) => Err(Error::IsSource {
            disk: target.disk.clone(),
            target: target.label.clone(),
            domain: around.for_root.then(|| domain.to_owned()),
        }),
    }
}

/// What is in a store is the store's.
pub fn outside_stores(target: &Target) -> Result<(), Error> {
    if matches!(target.publication, Publication::InStore { .. }) {
        return Ok(());
    }
    let directories = match target.media {
        Media::Regular => Vec::from_iter(inside::directory_of(&target.file)),
        Media::Block => inside::directories_behind(target.id),
    };
    let store = directories
        .iter()
        .find_map(|directory| inside::store_around(directory));
    match store {
        None => Ok(()),
        Some(store) => Err(Error::InStore {
            disk: target.disk.clone(),
            target: target.label.clone(),
            store: store.display().to_string(),
        }),
    }
}

/// Checks that no QEMU has an existing target open, and keeps others out until this one has locks of its own. The service need
/// not know the other domain: a QEMU locks each image that it opens.
pub fn unused(targets: &mut [Target], around: &Around) -> Result<(), Error> {
    let mut there: Vec<_> = targets
        .iter_mut()
        .filter(|target| matches!(target.publication, Publication::InPlace))
        .collect();
    // All are looked at before the first is locked: a lock of our own would be found.
    if there.is_empty() {
        return Ok(());
    }
    for target in &there {
        let in_use = is_in_use(&target.file).map_err(|error| not_locked(target, &error))?;
        if in_use {
            return Err(locked(target, around));
        }
    }
    for target in &mut there {
        let lock = ImageLock::take(&target.file).map_err(|error| not_locked(target, &error))?;
        target.lock = Some(lock.ok_or_else(|| locked(target, around))?);
    }
    Ok(())
}

/// Root learns who it is, and can end that.
fn locked(target: &Target, around: &Around) -> Error {
    let process = match around.for_root {
        true => user_of_image(&target.file).ok().flatten(),
        false => None,
    };
    Error::Locked {
        by: process.map(|process| Opener::of(process).to_string()),
        disk: target.disk.clone(),
        target: target.label.clone(),
    }
}

fn not_locked(target: &Target, error: &std::io::Error) -> Error {
    let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
    Error::io("look for locks of QEMU on", &target.label, errno).of(&target.disk)
}

/// A file has one name. One that was opened by O_TMPFILE, or removed since, is gone with its last descriptor, and the backup
/// with it. One that the caller was authorised for by its path may be another's under another name; what the caller opened
/// itself, it was let write to. A restored disk may be nameless: the caller gives it a name when it is complete.
pub fn names(target: &Target, place: &Place, task: &Task) -> Result<(), Error> {
    if target.media == Media::Block {
        return Ok(());
    }
    let (disk, label) = (target.disk.clone(), target.label.clone());
    let stat = rustix::fs::fstat(&target.file).map_err(|errno| Error::io("stat", &label, errno))?;
    match (stat.st_nlink, place) {
        (0, _) if matches!(task, Task::Restore(_)) => Ok(()),
        (0, _) => Err(Error::Nameless { disk, target: label }),
        (2.., Place::File(_)) => Err(Error::Linked { disk, target: label }),
        _ => Ok(()),
    }
}

pub fn twice(target: &Target, all: &[Target]) -> Result<(), Error> {
    match all
        .iter()
        .find(|other| other.id == target.id && other.disk != target.disk)
    {
        Some(other) => Err(Error::SameTarget {
            first: target.disk.clone(),
            second: other.disk.clone(),
            target: target.label.clone(),
        }),
        None => Ok(()),
    }
}

/// Content that is there is replaced only if the caller said so and it is what the caller thinks it is.
pub fn content(target: &Target, disk: &DiskPlan, reuse: bool) -> Result<(), Error> {
    let size = size(target)?;
    match target.media {
        // Its size is compared with what the image takes.
        Media::Block => Ok(()),
        Media::Regular if !matches!(target.publication, Publication::InPlace) || size == 0 => Ok(()),
        Media::Regular if !reuse => Err(Error::Exists {
            disk: target.disk.clone(),
            target: target.label.clone(),
        }),
        Media::Regular => existing(target, disk, size),
    }
}

fn existing(target: &Target, disk: &DiskPlan, size: u64) -> Result<(), Error> {
    let size = match disk.format {
        Format::Raw => size,
        Format::Qcow2 => qcow2_virtual_size(target)?,
    };
    if size == disk.virtual_size {
        Ok(())
    } else {
        Err(wrong_size(disk, &target.label, size))
    }
}

pub fn wrong_size(disk: &DiskPlan, label: &str, size: u64) -> Error {
    Error::WrongSize {
        disk: disk.name.clone(),
        target: label.to_owned(),
        size,
        wanted: disk.virtual_size,
    }
}

fn qcow2_virtual_size(target: &Target) -> Result<u64, Error> {
    let mut header = [0; QCOW2_SIZE_OFFSET + 8];
    let count = rustix::io::pread(&target.file, &mut header, 0)
        .map_err(|errno| Error::io("read", &target.label, errno))?;
    if count < header.len() || !header.starts_with(QCOW2_MAGIC) {
        return Err(Error::NotQcow2 {
            disk: target.disk.clone(),
            target: target.label.clone(),
        });
    }
    let size = header[QCOW2_SIZE_OFFSET..]
        .iter()
        .fold(0, |size, byte| size << 8 | u64::from(*byte));
    Ok(size)
}

/// Size of what a target's descriptor is open on, in bytes; a device's too.
pub fn size(target: &Target) -> Result<u64, Error> {
    rustix::fs::seek(&target.file, rustix::fs::SeekFrom::End(0))
        .map_err(|errno| Error::io("find the size of", &target.label, errno))
}
