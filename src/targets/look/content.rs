//! Estimates how much of an image is data, from the file that QEMU has open. This is the only check that reads a
//! file.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::Error;

/// The number of pages to sample, evenly spread over an image's data.
const SAMPLES: u64 = 512;
const PAGE: u64 = 4096;
/// The most extents to read. Beyond them, the result is still a lower bound.
const MAX_EXTENTS: usize = 1 << 16;

/// Returns the least bytes that are data and not zeroes in the file that a process has open under that name. Returns
/// 0 if the process is not root's, has no such file open, or it is not a regular file. The function calls `at_work`
/// again and again, and stops at its error.
///
/// Only root's processes count, because other users' processes can have a file open on a file system of theirs (FUSE).
/// If its server never answers, a read never ends: not even SIGKILL ends the reader.
pub fn data_at_least(
    process: u32,
    file: &Path,
    at_work: impl FnMut() -> Result<(), Error>,
) -> Result<u64, Error> {
    if !is_roots(process) {
        return Ok(0);
    }
    open_source(process, file).map_or(Ok(0), |file| data_of(&file, at_work))
}

/// Whether all user ids of a process are root's. The owner of its directory in `/proc` does not show that: it is root
/// for each process that is not dumpable (proc(5)).
fn is_roots(process: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    users.is_some_and(|users| users.split_ascii_whitespace().all(|user| user == "0"))
}

/// Opens the file that QEMU has open under that name, even if the name leads to another file now.
fn open_source(process: u32, file: &Path) -> Option<OwnedFd> {
    let entries = std::fs::read_dir(format!("/proc/{process}/fd")).ok()?;
    let links = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let link = links
        .into_iter()
        .find(|link| std::fs::read_link(link).is_ok_and(|name| name == file))?;
    let is_regular = |stat: rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    // Opening a device can have effects.
    rustix::fs::stat(&link).ok().filter(|stat| is_regular(*stat))?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(&link, flags, Mode::empty()).ok()
}

/// Returns the least bytes of a file that are data and not zeroes. The estimate is too high once in a thousand times.
fn data_of(file: &OwnedFd, mut at_work: impl FnMut() -> Result<(), Error>) -> Result<u64, Error> {
    let Ok(extents) = extents(file, &mut at_work)? else {
        return Ok(0);
    };
    let total: u64 = extents.iter().map(|(_, length)| length).sum();
    let samples = SAMPLES.min(total / PAGE);
    if samples == 0 {
        return Ok(0);
    }
    let mut page = vec![0; PAGE as usize];
    let mut found = 0;
    let mut extents = extents.into_iter();
    let (mut extent, mut passed) = (extents.next(), 0);
    for sample in 0..samples {
        at_work()?;
        // The middle of the sample's part, in bytes of data.
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
    Ok(lower_bound(total, found, samples))
}

/// Returns the part of `total` that `found` of `samples` stand for, less three standard deviations.
fn lower_bound(total: u64, found: u64, samples: u64) -> u64 {
    let (found, samples) = (found as f64, samples as f64);
    let part = found / samples;
    let deviation = (part * (1.0 - part) / samples).sqrt();
    (total as f64 * (part - 3.0 * deviation).max(0.0)) as u64
}

/// The ranges of a file that have data: offsets and lengths, in bytes.
type Extents = Vec<(u64, u64)>;

fn extents(
    file: &OwnedFd,
    mut at_work: impl FnMut() -> Result<(), Error>,
) -> Result<Result<Extents, Errno>, Error> {
    let mut found = Vec::new();
    let mut position = 0;
    while found.len() < MAX_EXTENTS {
        at_work()?;
        let start = match rustix::fs::seek(file, SeekFrom::Data(position)) {
            Ok(start) => start,
            // There is no more data.
            Err(Errno::NXIO) => break,
            Err(errno) => return Ok(Err(errno)),
        };
        let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            Ok(end) => end,
            Err(errno) => return Ok(Err(errno)),
        };
        if end <= start {
            break;
        }
        found.push((start, end - start));
        position = end;
    }
    Ok(Ok(found))
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
    fn a_long_read_reports_that_it_is_at_work() {
        let file = file(&[(0, 1, MIB), (8 << 20, 2, MIB)]);
        let mut reports = 0;
        let count = || {
            reports += 1;
            Ok(())
        };
        data_of(&file, count).unwrap();
        assert!(reports >= SAMPLES.min(2 * MIB as u64 / PAGE), "{reports}");
        let stop = || Err(Error::Unable);
        assert!(matches!(data_of(&file, stop), Err(Error::Unable)));
    }

    #[test]
    fn zeroes_and_holes_do_not_count_as_data() {
        let data_of = |pieces: &[_]| data_of(&file(pieces), || Ok(())).unwrap();
        assert_eq!(data_of(&[]), 0);
        assert_eq!(data_of(&[(0, 0, 16 * MIB)]), 0);
        let data = data_of(&[(0, 1, 8 * MIB), (32 << 20, 2, 8 * MIB)]);
        assert_eq!(data, 16 * MIB as u64);
        // A quarter of the written bytes is not zero.
        let mixed = data_of(&[(0, 0, 24 * MIB), (40 << 20, 3, 8 * MIB)]);
        assert!((5..=8).contains(&(mixed >> 20)), "{mixed}");
    }
}
