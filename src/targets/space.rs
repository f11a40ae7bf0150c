//! Checks whether a backup fits into the free space of its targets. Refuses only a backup that certainly does not
//! fit.
//!
//! QEMU reports how much space an image uses. That is an upper bound: reserved space and zeroes use none in a backup.
//! The lower bound is the data in the image's file that is not zeroes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::format::empty_image;
use super::look::Session;
use super::{Around, Error, Media, Target};
use crate::checkpoint::Mode;
use crate::model::Format;
use crate::plan::{DiskPlan, Plan};

/// The space that a backup needs on one file system or device, in bytes.
#[derive(Debug, Default)]
struct Need {
    most: u64,
    disks: Vec<(usize, u64)>,
}

/// Compares the space that the targets of a plan need with the free space. Blocks.
pub fn check(targets: &[Target], plan: &Plan, around: &Around) -> Result<(), Error> {
    let bounds = Bounds {
        plan,
        process: around.process,
        is_restore: around.is_restore,
        session: RefCell::new(around.look.session()),
    };
    let disks = &plan.disks;
    let mut systems: HashMap<u64, Need> = HashMap::new();
    for (index, (target, disk)) in targets.iter().zip(disks).enumerate() {
        if target.media == Media::Block {
            let size = super::check::size(target)?;
            let least = || bounds.in_device(disk, bounds.least(disk));
            device(
                disk,
                &target.label,
                size,
                bounds.in_device(disk, disk.estimate),
                least,
            )?;
            continue;
        }
        // The size of a compressed image is unknown.
        if disk.compress.is_some() {
            continue;
        }
        let stat =
            rustix::fs::fstat(&target.file).map_err(|errno| Error::io("stat", &target.label, errno))?;
        let freed = u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
        let need = systems.entry(stat.st_dev).or_default();
        need.most = need.most.saturating_add(disk.estimate.saturating_sub(freed));
        need.disks.push((index, freed));
    }
    for need in systems.into_values() {
        let Some(target) = need.disks.first().and_then(|(index, _)| targets.get(*index)) else {
            continue;
        };
        let least = || {
            let needed = need.disks.iter().filter_map(|(index, freed)| {
                let disk = disks.get(*index)?;
                Some(bounds.least(disk).saturating_sub(*freed))
            });
            needed.fold(0, u64::saturating_add)
        };
        let free = free_space(&target.file)
            .map_err(|errno| Error::io("find the free space of", &target.label, errno))?;
        compare(&target.label, free, need.most, least)?;
    }
    Ok(())
}

impl Target {
    /// Returns a function that finds the free space of the target's file system in bytes, and blocks. `None` for a
    /// device.
    pub fn free_space(&self) -> Option<impl FnOnce() -> Result<u64, Errno> + Send + use<>> {
        let file = (self.media == Media::Regular).then(|| self.file.clone())?;
        Some(move || free_space(&file))
    }
}

fn free_space(file: &OwnedFd) -> Result<u64, Errno> {
    let system = rustix::fs::fstatvfs(file)?;
    Ok(system.f_bavail.saturating_mul(system.f_frsize))
}

/// Checks whether a disk's image fits on the device `label` of `size` bytes. As qcow2 it needs `least` to `most`
/// bytes.
fn device(
    disk: &DiskPlan,
    label: &str,
    size: u64,
    most: u64,
    least: impl FnOnce() -> u64,
) -> Result<(), Error> {
    match disk.format {
        Format::Raw if size < disk.virtual_size => Err(super::check::wrong_size(disk, label, size)),
        Format::Raw => Ok(()),
        // The size of a compressed image is unknown.
        Format::Qcow2 if disk.compress.is_some() => Ok(()),
        Format::Qcow2 => compare(label, size, most, least),
    }
}

/// Checks whether a restored disk fits on the device `label` of `size` bytes.
pub fn device_for_restore(disk: &DiskPlan, label: &str, size: u64) -> Result<(), Error> {
    device(disk, label, size, disk.estimate, || disk.estimate)
}

fn compare(label: &str, free: u64, most: u64, least: impl FnOnce() -> u64) -> Result<(), Error> {
    if free >= most {
        return Ok(());
    }
    let least = least();
    if free < least {
        return Err(Error::NoSpace {
            target: label.to_owned(),
            needed: least,
            free,
        });
    }
    tracing::warn!(
        target = label,
        free,
        least,
        most,
        "the backup may not fit into the free space"
    );
    Ok(())
}

struct Bounds<'a> {
    plan: &'a Plan,
    /// The VM's process.
    process: Option<u32>,
    is_restore: bool,
    /// One for all disks, so that a helper that hangs delays the check once.
    session: RefCell<Session<'a>>,
}

impl Bounds<'_> {
    /// Returns the length of an image with that many bytes of data. A device must also have room for the image's
    /// tables.
    fn in_device(&self, disk: &DiskPlan, data: u64) -> u64 {
        match self.is_restore {
            // For a stored image, only its length is known.
            true => data,
            false => empty_image(disk, self.plan.copies_in_small_steps()).length_with(data),
        }
    }

    /// Returns the least bytes that a disk's image needs, or 0 if that is unknown.
    fn least(&self, disk: &DiskPlan) -> u64 {
        if self.is_restore {
            // Stored images have hardly any zeroes, because QEMU skips them when it creates the images.
            return disk.estimate;
        }
        let full = matches!(disk.mode, Mode::Full { .. });
        if full && disk.format == Format::Raw && !disk.only_allocated {
            // QEMU reserves space for zeroes too.
            return disk.virtual_size;
        }
        let data = self.data_at_least(disk).min(disk.virtual_size);
        match full {
            true => data,
            // The changed parts may be zeroes now, but at most as many bytes as the disk has zeroes.
            false => disk.estimate.saturating_sub(disk.virtual_size - data),
        }
    }

    /// Returns the least bytes that are data in the image's file, as QEMU has it open.
    fn data_at_least(&self, disk: &DiskPlan) -> u64 {
        let Some((process, file)) = self.process.zip(disk.source.as_deref()) else {
            return 0;
        };
        // Without this number, a backup may begin that fails later for lack of space.
        self.session
            .borrow_mut()
            .data_at_least(process, file)
            .unwrap_or_else(|error| {
                tracing::warn!(disk = disk.name, %error, "cannot find out how much space the backup needs");
                0
            })
    }
}
