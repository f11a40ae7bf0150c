//! Checks a target before its first byte is changed.

use rustix::io::Errno;

use super::lock::{NotKnown, user_of_image};
use super::look::Session;
use super::{Around, Error, ImageLock, Media, Publication, Target, inside, is_in_use};
use crate::model::Format;
use crate::plan::{DiskPlan, TargetPlan};
use crate::store::store_around;

/// qcow2's magic and where its header has the version and the virtual size, big-endian
/// (QEMU's `docs/interop/qcow2.txt`).
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";
const QCOW2_SIZE_OFFSET: usize = 24;

pub fn source(target: &Target, around: &Around) -> Result<(), Error> {
    // A new file is not a source, though it may have the inode number of a file that a VM had open a moment ago.
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

/// Refuses a target inside a store, which only the service may write.
pub fn outside_stores(target: &Target) -> Result<(), Error> {
    if matches!(target.publication, Publication::InStore { .. }) {
        return Ok(());
    }
    let directories = match target.media {
        Media::Regular => Vec::from_iter(inside::directory_of(&target.file)),
        Media::Block => inside::directories_behind(target.id),
    };
    let store = directories.iter().find_map(|directory| store_around(directory));
    match store {
        None => Ok(()),
        Some(store) => Err(Error::InStore {
            disk: target.disk.clone(),
            target: target.label.clone(),
            store: store.display().to_string(),
        }),
    }
}

/// Checks that no QEMU has an existing target open, and locks it against others until this domain's QEMU has locks of
/// its own. The service need not know the other domain, because QEMU locks each image that it opens.
pub fn unused(targets: &mut [Target], around: &Around) -> Result<(), Error> {
    let mut there: Vec<_> = targets
        .iter_mut()
        .filter(|target| matches!(target.publication, Publication::InPlace))
        .collect();
    // Check all targets before the first lock: the check would find the service's own lock.
    if there.is_empty() {
        return Ok(());
    }
    let mut session = around.look.session();
    for target in &there {
        let in_use = is_in_use(&mut session, &target.file).map_err(|error| not_known(target, error))?;
        if in_use {
            return Err(locked(target, around, &mut session));
        }
    }
    for target in &mut there {
        let lock = ImageLock::take(&target.file).map_err(|error| not_locked(target, &error))?;
        target.lock = Some(lock.ok_or_else(|| locked(target, around, &mut session))?);
    }
    Ok(())
}

/// Only root gets the process, because only root can end it.
fn locked(target: &Target, around: &Around, session: &mut Session<'_>) -> Error {
    let process = match around.for_root {
        true => user_of_image(session, &target.file).ok().flatten(),
        false => None,
    };
    Error::Locked {
        by: process.map(|process| process.to_string()),
        disk: target.disk.clone(),
        target: target.label.clone(),
    }
}

fn not_known(target: &Target, error: NotKnown) -> Error {
    match error {
        NotKnown::Locks(error) => not_locked(target, &error),
        NotKnown::Look(error) => error.into(),
    }
}

fn not_locked(target: &Target, error: &std::io::Error) -> Error {
    let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
    Error::io("check for locks of QEMU on", &target.label, errno).of(&target.disk)
}

/// Checks that a file has exactly one name.
///
/// - A file without a name (O_TMPFILE, or unlinked) would disappear with its last descriptor. A restored disk may be
///   nameless, because the caller links it when it is complete.
/// - A file with several hard links may be another user's file under another name. This matters if the caller named a
///   path; a descriptor proves that the caller may write the file.
pub fn single_link(target: &Target, planned: &TargetPlan, is_restore: bool) -> Result<(), Error> {
    if target.media == Media::Block {
        return Ok(());
    }
    let (disk, label) = (target.disk.clone(), target.label.clone());
    let stat = rustix::fs::fstat(&target.file).map_err(|errno| Error::io("stat", &label, errno))?;
    match (stat.st_nlink, planned) {
        (0, _) if is_restore => Ok(()),
        (0, _) => Err(Error::Nameless { disk, target: label }),
        (2.., TargetPlan::File(_)) => Err(Error::Linked { disk, target: label }),
        _ => Ok(()),
    }
}

pub fn distinct(target: &Target, all: &[Target]) -> Result<(), Error> {
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

/// Checks that existing content may be replaced: the caller said so, and the file has the expected format and size.
pub fn content(target: &Target, disk: &DiskPlan, reuse: bool) -> Result<(), Error> {
    let size = size(target)?;
    match target.media {
        // Another check compares its size with the size of the image.
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

/// Returns the size of a target in bytes, even of a device.
pub fn size(target: &Target) -> Result<u64, Error> {
    rustix::fs::seek(&target.file, rustix::fs::SeekFrom::End(0))
        .map_err(|errno| Error::io("find the size of", &target.label, errno))
}
