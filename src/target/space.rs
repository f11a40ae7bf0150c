//! Whether a backup fits into the free space of its targets. Only what certainly doesn't fit is refused.
//!
//! QEMU knows how much space an image takes. That is an upper bound: reserved space and zeroes take none in a backup. The
//! lower bound comes from the image's file: the part of it that the file system holds data for, as far as that isn't zeroes.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::format::empty_image;
use super::{Around, Error, Media, Target};
use crate::model::Format;
use crate::plan::{DiskPlan, Mode, Plan, Task};

/// Space that a backup takes on one file system or device, in bytes.
#[derive(Debug, Default)]
struct Need {
    most: u64,
    disks: Vec<(usize, u64)>,
}

/// What the targets of a plan need, compared with what is free. Blocks.
pub fn check(targets: &[Target], plan: &Plan, around: &Around) -> Result<(), Error> {
    let (disks, bounds) = (&plan.disks, Bounds { plan, around });
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
        // A compressed image takes less by an unknown amount.
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
    /// Returns what finds the free space of the file system that a file is on, in bytes, and blocks; nothing for a device.
    pub fn free_space(&self) -> Option<impl FnOnce() -> Result<u64, Errno> + Send + use<>> {
        let file = (self.media == Media::Regular).then(|| self.file.clone())?;
        Some(move || free_space(&file))
    }
}

fn free_space(file: &OwnedFd) -> Result<u64, Errno> {
    let system = rustix::fs::fstatvfs(file)?;
    Ok(system.f_bavail.saturating_mul(system.f_frsize))
}

/// Whether a device of `size` bytes, called `label`, takes the image of a disk, which needs `least` to `most` bytes as qcow2.
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
        // A compressed image takes less by an unknown amount.
        Format::Qcow2 if disk.compress.is_some() => Ok(()),
        Format::Qcow2 => compare(label, size, most, least),
    }
}

/// Whether a device of `size` bytes, called `label`, takes a restored disk.
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
    around: &'a Around,
}

impl Bounds<'_> {
    /// How long an image with so many bytes of data is. A device takes it with its tables, or not at all.
    fn in_device(&self, disk: &DiskPlan, data: u64) -> u64 {
        match self.plan.task {
            // What is known of a stored image is its length.
            Task::Restore(_) => data,
            _ => empty_image(disk, self.plan.copies_in_small_steps()).length_with(data),
        }
    }

    /// What a disk's image takes at least, in bytes; 0 where that can't be known.
    fn least(&self, disk: &DiskPlan) -> u64 {
        if matches!(self.plan.task, Task::Restore(_)) {
            // Stored images hold hardly any zeroes: QEMU finds them when it makes the images.
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
            // What was written to may be zeroes now, but not more of it than there are zeroes.
            false => disk.estimate.saturating_sub(disk.virtual_size - data),
        }
    }

    /// The bytes of the image's file that are data, as far as QEMU's open file shows them.
    fn data_at_least(&self, disk: &DiskPlan) -> u64 {
        let Some((process, file)) = self.around.process.zip(disk.source.as_deref()) else {
            return 0;
        };
        // Without it only a backup that fails later for want of space is begun.
        self.around
            .look
            .session()
            .data_at_least(process, file)
            .unwrap_or_else(|error| {
                tracing::warn!(disk = disk.name, %error, "the space that the backup takes is not known");
                0
            })
    }
}
