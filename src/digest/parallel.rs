//! Computes BLAKE3 digests of files in several threads.

use std::num::NonZeroU64;
use std::ops::{ControlFlow, Range};
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::Builder;

use rustix::fs::{Advice, fadvise};
use rustix::io::Errno;

use super::{Digest, Part, Pieces};

/// Bytes per read: small enough to stay in a processor's cache until they are hashed.
const BUFFER: usize = 256 << 10;
/// More threads gain nothing because memory bandwidth is the limit.
const MOST_THREADS: usize = 32;

/// Returns the number of reading threads: the processors that this process may use, up to a maximum.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get().min(MOST_THREADS))
}

/// Runs `work` in at most `count` threads, including the current one, and waits for all. Returns the first error.
///
/// The kernel refuses a new thread with EAGAIN at the limit of the control group or user. Then the other threads do the
/// work.
pub fn in_threads<E: Send>(count: usize, work: impl Fn() -> Result<(), E> + Sync) -> Result<(), E> {
    std::thread::scope(|scope| {
        let spawn = |_| Builder::new().spawn_scoped(scope, &work).ok();
        let others: Vec<_> = (1..count).map_while(spawn).collect();
        let own = work();
        let others: Vec<_> = others
            .into_iter()
            .map(|thread| match thread.join() {
                Ok(worked) => worked,
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect();
        others.into_iter().fold(own, Result::and)
    })
}

/// A file whose digest is computed by every thread that calls [`Reading::work`].
#[derive(Debug)]
pub struct Reading<'a> {
    file: &'a OwnedFd,
    pieces: Pieces,
    backwards: bool,
    parts: Vec<OnceLock<Part>>,
    /// Counts of pieces that threads have taken, and of pieces that are not finished.
    taken: AtomicU64,
    unfinished: AtomicU64,
}

/// Observes the bytes that a thread reads.
pub trait Watch {
    /// A thread has read `bytes`; a break stops it.
    fn read(&mut self, offset: u64, bytes: &[u8]) -> ControlFlow<()>;
    /// A thread has read all of this piece.
    fn done(&mut self, piece: Range<u64>);
}

/// How a thread's work ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Worked {
    /// The watch stopped the thread.
    Stopped,
    /// Other threads may still read.
    Done,
    /// All pieces are read. Exactly one thread gets this result.
    Last,
}

impl<'a> Reading<'a> {
    /// The first `length` bytes of a file.
    pub fn new(file: &'a OwnedFd, length: u64) -> Self {
        let pieces = Pieces::of(length);
        Self {
            file,
            pieces,
            backwards: false,
            parts: (0..pieces.count()).map(|_| OnceLock::new()).collect(),
            taken: AtomicU64::new(0),
            unfinished: AtomicU64::new(pieces.count()),
        }
    }

    /// As [`Reading::new`], but from the end to the beginning. The end of a file that was just written is still in the
    /// page cache if the file is larger than memory, so reading it first saves device reads.
    pub fn backwards(file: &'a OwnedFd, length: u64) -> Self {
        Self {
            backwards: true,
            ..Self::new(file, length)
        }
    }

    /// How many pieces there are to read.
    pub fn pieces(&self) -> usize {
        self.parts.len()
    }

    /// Reads pieces until threads have taken all of them.
    pub fn work(&self, watch: &mut impl Watch) -> Result<Worked, Errno> {
        let mut buffer = Vec::new();
        let mut next = self.take();
        while let Some(index) = next {
            // The device reads the next piece while this one is hashed.
            next = self.take();
            buffer.resize(BUFFER, 0);
            match self.read(index, &mut buffer, watch)? {
                Worked::Done => {}
                ended => return Ok(ended),
            }
        }
        Ok(Worked::Done)
    }

    /// The digest, once a thread has finished the last piece.
    pub fn digest(&self) -> Option<Digest> {
        let parts: Option<Vec<Part>> = self.parts.iter().map(|part| part.get().copied()).collect();
        Some(self.pieces.join(&parts?))
    }

    fn take(&self) -> Option<u64> {
        let (count, taken) = (self.pieces.count(), self.taken.fetch_add(1, Ordering::Relaxed));
        if taken >= count {
            return None;
        }
        let index = match self.backwards {
            true => count - 1 - taken,
            false => taken,
        };
        let range = self.pieces.range(index);
        if let Some(length) = NonZeroU64::new(range.end - range.start) {
            // Only advice: if the kernel ignores it, each read waits for the device.
            let _ = fadvise(self.file, range.start, Some(length), Advice::WillNeed);
        }
        Some(index)
    }

    fn read(&self, index: u64, buffer: &mut [u8], watch: &mut impl Watch) -> Result<Worked, Errno> {
        let (mut hasher, range) = (self.pieces.hasher(index), self.pieces.range(index));
        let mut offset = range.start;
        while offset < range.end {
            let wanted = buffer.len().min((range.end - offset) as usize);
            let count =
                rustix::io::retry_on_intr(|| rustix::io::pread(self.file, &mut buffer[..wanted], offset))?;
            if count == 0 {
                // The file is shorter than before, so another process is truncating it.
                return Err(Errno::IO);
            }
            hasher.update(&buffer[..count]);
            if watch.read(offset, &buffer[..count]).is_break() {
                return Ok(Worked::Stopped);
            }
            offset += count as u64;
        }
        watch.done(range);
        // Only this thread has taken the piece.
        let _ = self.parts[index as usize].set(hasher.finish());
        Ok(match self.unfinished.fetch_sub(1, Ordering::AcqRel) {
            1 => Worked::Last,
            _ => Worked::Done,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    struct Count(u64, u64);

    impl Watch for Count {
        fn read(&mut self, _: u64, bytes: &[u8]) -> ControlFlow<()> {
            self.0 += bytes.len() as u64;
            ControlFlow::Continue(())
        }

        fn done(&mut self, piece: Range<u64>) {
            self.1 += piece.end - piece.start;
        }
    }

    #[test]
    fn several_threads_give_the_digest_of_one_and_exactly_one_is_the_last() {
        for length in [0, 1, 4 << 20, (17 << 20) + 12_345] {
            let bytes: Vec<u8> = (0..length).map(|at| (at >> 7) as u8 ^ at as u8).collect();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            let (file, length) = (OwnedFd::from(file), length as u64);
            for reading in [Reading::new(&file, length), Reading::backwards(&file, length)] {
                let work = || {
                    let mut count = Count(0, 0);
                    let last = reading.work(&mut count).unwrap();
                    assert_eq!(count.0, count.1);
                    (u64::from(last == Worked::Last), count.0)
                };
                let threads: Vec<(u64, u64)> = std::thread::scope(|scope| {
                    let threads: Vec<_> = (0..3).map(|_| scope.spawn(work)).collect();
                    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
                });
                assert_eq!(threads.iter().map(|(last, _)| last).sum::<u64>(), 1);
                assert_eq!(threads.iter().map(|(_, read)| read).sum::<u64>(), length);
                assert_eq!(reading.digest().unwrap().hex, *blake3::hash(&bytes).to_hex());
            }
        }
    }

    #[test]
    fn a_file_that_is_truncated_during_the_read_is_an_error() {
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        rustix::fs::ftruncate(&file, 1000).unwrap();
        let reading = Reading::new(&file, 1001);
        assert_eq!(reading.work(&mut Count(0, 0)), Err(Errno::IO));
        assert!(reading.digest().is_none());
    }
}
