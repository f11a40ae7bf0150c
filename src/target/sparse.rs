//! Punches holes into images, so that zeroes take no space.
//!
//! QEMU writes the zeroes of a raw source by reserving space for them (`FALLOC_FL_ZERO_RANGE`, without `BDRV_REQ_MAY_UNMAP`).
//! Knows files; not what is in them.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Advice, FallocateFlags, SeekFrom, fadvise, fallocate, fstat, seek};
use rustix::io::Errno;

/// The smallest hole, in bytes: what QEMU copies at a time into a raw image. Smaller ones would only break the file up.
const GRAIN: usize = 1 << 16;

/// Punches a hole wherever parts of a file that are read in order have zeroes.
#[derive(Debug)]
pub struct Digger<'a> {
    file: &'a OwnedFd,
    /// Where the zeroes that were read last begin, in bytes.
    zeroes: Option<u64>,
    /// The file system refused, and would again.
    refused: &'a AtomicBool,
}

impl<'a> Digger<'a> {
    /// `refused` is shared by all that dig in the file.
    pub fn new(file: &'a OwnedFd, refused: &'a AtomicBool) -> Self {
        Self {
            file,
            zeroes: None,
            refused,
        }
    }

    /// Takes what was read at `offset`, which follows what was read before. Only blocks of 64 KiB that begin at a multiple of that
    /// from `offset` count.
    pub fn read(&mut self, offset: u64, bytes: &[u8]) {
        for (at, grain) in (offset..).step_by(GRAIN).zip(bytes.chunks(GRAIN)) {
            match (is_zero(grain), self.zeroes) {
                (true, None) => self.zeroes = Some(at),
                (false, Some(start)) => {
                    self.punch(start, at);
                    self.zeroes = None;
                }
                _ => {}
            }
        }
    }

    /// Takes the end of the part that is read, which is at `end`.
    pub fn end(&mut self, end: u64) {
        if let Some(start) = self.zeroes.take() {
            self.punch(start, end);
        }
    }

    fn punch(&self, start: u64, end: u64) {
        if self.refused.load(Ordering::Relaxed) {
            return;
        }
        // A refusal costs space, not content.
        if let Err(errno) = punch(self.file, start, end)
            && !self.refused.swap(true, Ordering::Relaxed)
        {
            tracing::debug!(%errno, "an image cannot be made sparse");
        }
    }
}

/// Punches a hole over every range that the file system reports as one, of a durable file that the service has not read. The
/// content does not change.
pub fn dig(file: &OwnedFd) -> Result<(), Errno> {
    // SEEK_HOLE passes over reserved space that was read: its zeroes are in the page cache (ext4, XFS).
    fadvise(file, 0, None, Advice::DontNeed)?;
    let size = u64::try_from(fstat(file)?.st_size).unwrap_or(0);
    let mut position = 0;
    while position < size {
        let hole = seek(file, SeekFrom::Hole(position))?;
        let data = match seek(file, SeekFrom::Data(hole)) {
            Ok(data) => data,
            // No data after the hole.
            Err(Errno::NXIO) => size,
            Err(errno) => return Err(errno),
        };
        if hole < data {
            match punch(file, hole, data) {
                Ok(()) => {}
                // A file system that cannot: the image is good, and as large as it is.
                Err(Errno::OPNOTSUPP) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
        position = data.max(hole);
        if hole >= size {
            break;
        }
    }
    Ok(())
}

fn punch(file: &OwnedFd, start: u64, end: u64) -> Result<(), Errno> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::io::retry_on_intr(|| fallocate(file, hole, start, end - start))
}

fn is_zero(bytes: &[u8]) -> bool {
    // By words, because the compiler makes no vectors of a loop that may end at any byte.
    let words = bytes.chunks_exact(16);
    words.remainder().iter().all(|byte| *byte == 0) && words.into_iter().all(|word| word == [0; 16])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 8 << 20;
    const DATA: u64 = 3 << 20;

    /// A durable file of 8 MiB with all its space reserved, 1 MiB of data in it, and all of it read.
    fn reserved() -> OwnedFd {
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        fallocate(&file, FallocateFlags::empty(), 0, SIZE).unwrap();
        rustix::io::pwrite(&file, &[7; 1 << 20], DATA).unwrap();
        rustix::fs::fsync(&file).unwrap();
        read(&file);
        assert_eq!(taken(&file), SIZE);
        file
    }

    fn read(file: &OwnedFd) -> Vec<u8> {
        let mut content = vec![0; usize::try_from(SIZE).unwrap()];
        assert_eq!(
            rustix::io::pread(file, &mut content[..], 0).unwrap(),
            content.len()
        );
        content
    }

    fn taken(file: &OwnedFd) -> u64 {
        fstat(file).unwrap().st_blocks.cast_unsigned() * 512
    }

    #[test]
    fn reserved_space_becomes_a_hole_though_somebody_has_read_it() {
        let file = reserved();
        let content = read(&file);
        dig(&file).unwrap();
        assert_eq!(taken(&file), 1 << 20);
        assert!(read(&file) == content);
    }

    #[test]
    fn zeroes_that_are_read_become_a_hole_and_the_content_stays() {
        let file = reserved();
        // Zeroes that were written as data, and less than a grain of them, which stay.
        rustix::io::pwrite(&file, &[0; 1 << 18], DATA + (1 << 18)).unwrap();
        rustix::io::pwrite(&file, &[0; 1 << 10], DATA + (1 << 19)).unwrap();
        let content = read(&file);
        let refused = AtomicBool::new(false);
        let mut digger = Digger::new(&file, &refused);
        // In parts, the last one first.
        for part in (0..8_u64).rev() {
            let (start, end) = (part << 20, (part + 1) << 20);
            for offset in (start..end).step_by(1 << 18) {
                let at = usize::try_from(offset).unwrap();
                digger.read(offset, &content[at..at + (1 << 18)]);
            }
            digger.end(end);
        }
        assert!(!refused.load(Ordering::Relaxed));
        assert_eq!(taken(&file), (1 << 20) - (1 << 18));
        assert!(read(&file) == content);
    }

    #[test]
    fn a_byte_anywhere_is_no_zero() {
        for length in [0, 1, 15, 16, 17, 100] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {length}");
                bytes[at] = 0;
            }
        }
    }
}
