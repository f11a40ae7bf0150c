//! Punches holes into images, so that zeroes take no space.
//!
//! QEMU writes the zeroes of a raw source by reserving space (`FALLOC_FL_ZERO_RANGE`, without `BDRV_REQ_MAY_UNMAP`).
//!
//! Knows files; not their content.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Advice, FallocateFlags, SeekFrom, fadvise, fallocate, fstat, seek};
use rustix::io::Errno;

/// The smallest hole in bytes, which is QEMU's copy size for a raw image. Smaller holes would only fragment the file.
const GRAIN: usize = 1 << 16;

/// Punches holes where parts of a file, which the caller reads in order, are zeroes.
#[derive(Debug)]
pub struct Digger<'a> {
    file: &'a OwnedFd,
    /// The start of the latest run of zeroes, in bytes.
    zeroes: Option<u64>,
    /// The file system has refused to punch a hole, and would refuse again.
    refused: &'a AtomicBool,
}

impl<'a> Digger<'a> {
    /// All threads that punch holes in the file share `refused`.
    pub fn new(file: &'a OwnedFd, refused: &'a AtomicBool) -> Self {
        Self {
            file,
            zeroes: None,
            refused,
        }
    }

    /// Takes the bytes that the caller read at `offset`, directly after the previous ones. Counts blocks of 64 KiB,
    /// starting at `offset`.
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

    /// Ends the part, which is read up to `end`.
    pub fn end(&mut self, end: u64) {
        if let Some(start) = self.zeroes.take() {
            self.punch(start, end);
        }
    }

    fn punch(&self, start: u64, end: u64) {
        if self.refused.load(Ordering::Relaxed) {
            return;
        }
        // If the file system refuses, the image is larger, but correct.
        if let Err(errno) = punch(self.file, start, end)
            && !self.refused.swap(true, Ordering::Relaxed)
        {
            tracing::debug!(%errno, "cannot punch holes into an image");
        }
    }
}

/// Punches a hole into every range of a durable file that the file system reports as a hole. This frees reserved
/// space, and does not change the content. For files that the service has not read.
pub fn punch_holes(file: &OwnedFd) -> Result<(), Errno> {
    // SEEK_HOLE skips reserved space whose zeroes are in the page cache (ext4, XFS).
    fadvise(file, 0, None, Advice::DontNeed)?;
    let size = u64::try_from(fstat(file)?.st_size).unwrap_or(0);
    let mut position = 0;
    while position < size {
        let hole = seek(file, SeekFrom::Hole(position))?;
        let data = match seek(file, SeekFrom::Data(hole)) {
            Ok(data) => data,
            // There is no data after the hole.
            Err(Errno::NXIO) => size,
            Err(errno) => return Err(errno),
        };
        if hole < data {
            match punch(file, hole, data) {
                Ok(()) => {}
                // The file system cannot punch holes. The image is correct, but larger.
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
    // By words, because the compiler does not vectorise a loop that can end at any byte.
    let words = bytes.chunks_exact(16);
    words.remainder().iter().all(|byte| *byte == 0) && words.into_iter().all(|word| word == [0; 16])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 8 << 20;
    const DATA: u64 = 3 << 20;

    /// A durable file of 8 MiB with reserved space and 1 MiB of data, all in the page cache.
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
    fn reserved_space_becomes_a_hole_even_in_the_page_cache() {
        let file = reserved();
        let content = read(&file);
        punch_holes(&file).unwrap();
        assert_eq!(taken(&file), 1 << 20);
        assert!(read(&file) == content);
    }

    #[test]
    fn zeroes_that_are_read_become_a_hole_and_the_content_stays() {
        let file = reserved();
        // Zeroes that were written as data become a hole; zeroes of less than 64 KiB stay.
        rustix::io::pwrite(&file, &[0; 1 << 18], DATA + (1 << 18)).unwrap();
        rustix::io::pwrite(&file, &[0; 1 << 10], DATA + (1 << 19)).unwrap();
        let content = read(&file);
        let refused = AtomicBool::new(false);
        let mut digger = Digger::new(&file, &refused);
        // Read in parts, the last part first.
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
    fn a_single_nonzero_byte_is_found_anywhere() {
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
