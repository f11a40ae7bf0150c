//! Whether a backup fits into the free space of its targets. Only what certainly doesn't fit is refused.
//!
//! QEMU knows how much space an image takes. That is an upper bound: reserved space and zeroes take none in a backup. The
//! lower bound comes from the image's file: the part of it that the file system holds data for, as far as that isn't zeroes.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FileType, Mode as FileMode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::format::empty_image;
use super::{Error, Media, Target};
use crate::model::Format;
use crate::plan::{DiskPlan, Mode, Plan, Task};

/// So many pages of an image are looked at, evenly spread over its data.
const SAMPLES: u64 = 512;
const PAGE: u64 = 4096;
/// A file with more pieces of data than this is not followed to its end: what was found is a lower bound too.
const MAX_EXTENTS: usize = 1 << 16;

/// Space that a backup takes on one file system or device, in bytes.
#[derive(Debug, Default)]
struct Need {
    most: u64,
    disks: Vec<(usize, u64)>,
}

/// What the targets of a plan need, compared with what is free. `process` is the QEMU that has the disks open. Blocks.
pub fn check(targets: &[Target], plan: &Plan, process: Option<u32>) -> Result<(), Error> {
    let (disks, bounds) = (&plan.disks, Bounds { plan, process });
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
    process: Option<u32>,
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
        let data = self.process.zip(disk.source.as_deref());
        let data = data.and_then(|(process, file)| open_source(process, file));
        let data = data.map_or(0, |file| data_at_least(&file)).min(disk.virtual_size);
        match full {
            true => data,
            // What was written to may be zeroes now, but not more of it than there are zeroes.
            false => disk.estimate.saturating_sub(disk.virtual_size - data),
        }
    }
}

/// The file that a QEMU has open under that name: what it is, not what the name leads to now.
fn open_source(process: u32, file: &Path) -> Option<OwnedFd> {
    let entries = std::fs::read_dir(format!("/proc/{process}/fd")).ok()?;
    let links = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let link = links
        .into_iter()
        .find(|link| std::fs::read_link(link).is_ok_and(|name| name == file))?;
    let is_regular = |stat: rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    // Opening a device can do something.
    rustix::fs::stat(&link).ok().filter(|stat| is_regular(*stat))?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(&link, flags, FileMode::empty()).ok()
}

/// Bytes of a file that are data and not zeroes, at least; an estimate that is too high once in a thousand times.
fn data_at_least(file: &OwnedFd) -> u64 {
    let Ok(extents) = extents(file) else { return 0 };
    let total: u64 = extents.iter().map(|(_, length)| length).sum();
    let samples = SAMPLES.min(total / PAGE);
    if samples == 0 {
        return 0;
    }
    let mut page = vec![0; PAGE as usize];
    let mut found = 0;
    let mut extents = extents.into_iter();
    let (mut extent, mut passed) = (extents.next(), 0);
    for sample in 0..samples {
        // In the middle of its part, in bytes of data.
        let wanted = (total / samples).saturating_mul(sample) + total / samples / 2;
        while let Some((_, length)) = extent
            && passed + length <= wanted
        {
            passed += length;
            extent = extents.next();
        }
        let Some((start, _)) = extent else { break };
        let offset = (start + wanted - passed) / PAGE * PAGE;
        match rustix::io::pread(file, &mut page, offset) {
            Ok(count) if page.iter().take(count).any(|byte| *byte != 0) => found += 1,
            _ => {}
        }
    }
    lower_bound(total, found, samples)
}

/// What is left of `total` when `found` of `samples` fit, less three standard deviations.
fn lower_bound(total: u64, found: u64, samples: u64) -> u64 {
    let (found, samples) = (found as f64, samples as f64);
    let part = found / samples;
    let deviation = (part * (1.0 - part) / samples).sqrt();
    (total as f64 * (part - 3.0 * deviation).max(0.0)) as u64
}

/// Where a file has data: offsets and lengths.
fn extents(file: &OwnedFd) -> Result<Vec<(u64, u64)>, Errno> {
    let mut found = Vec::new();
    let mut position = 0;
    while found.len() < MAX_EXTENTS {
        let start = match rustix::fs::seek(file, SeekFrom::Data(position)) {
            Ok(start) => start,
            // No data after that.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        if end <= start {
            break;
        }
        found.push((start, end - start));
        position = end;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    const MIB: usize = 1 << 20;

    fn file(pieces: &[(u64, u8, usize)]) -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(64 * MIB as u64).unwrap();
        for (offset, byte, length) in pieces {
            file.seek(std::io::SeekFrom::Start(*offset)).unwrap();
            file.write_all(&vec![*byte; *length]).unwrap();
        }
        file.into()
    }

    #[test]
    fn zeroes_and_holes_are_no_data() {
        assert_eq!(data_at_least(&file(&[])), 0);
        assert_eq!(data_at_least(&file(&[(0, 0, 16 * MIB)])), 0);
        let data = data_at_least(&file(&[(0, 1, 8 * MIB), (32 << 20, 2, 8 * MIB)]));
        assert_eq!(data, 16 * MIB as u64);
        // A quarter of what is written.
        let mixed = data_at_least(&file(&[(0, 0, 24 * MIB), (40 << 20, 3, 8 * MIB)]));
        assert!((5..=8).contains(&(mixed >> 20)), "{mixed}");
    }
}
