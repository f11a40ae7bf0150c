//! The digest of an image: its length and checksum, which show a later reader whether it has changed.

use std::num::NonZeroU64;
use std::ops::{ControlFlow, Range};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Advice, SeekFrom, fadvise};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::Error;
use super::sparse::Digger;
use crate::digest::{self, Reading, Watch, Worked};
use crate::offload::Progress;

/// How many bytes are written back at a time if nothing is read.
const SENT: usize = 4 << 20;
/// How many files can wait for write-back while others are read.
const WAITING: usize = 4;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    /// In bytes.
    pub length: u64,
    /// The BLAKE3 checksum of the file's bytes, in lower-case hexadecimal digits. Only files in a store have one.
    #[serde(default)]
    pub blake3: Option<String>,
}

impl FileDigest {
    /// Computes the digest of a durable file. Returns `None` if it is cancelled. Blocks.
    pub fn of(
        file: &OwnedFd,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Option<Self>, Error> {
        let failed = |errno| Error::io("read", "an image", errno);
        let run = Run::new(file, How::Digest).map_err(failed)?;
        let digests = go_through(&[run], |_| Ok(()), |_, errno| failed(errno), progress, cancel)?;
        Ok(digests.and_then(|mut digests| digests.pop()))
    }
}

/// How a file is processed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// Read it for its checksum.
    Digest,
    /// Read it for its checksum, and write each piece back after it was read.
    DigestAndWriteBack,
    /// Only write it back.
    WriteBack,
}

/// A file to process.
#[derive(Debug)]
pub(super) struct Run<'a> {
    file: &'a OwnedFd,
    how: How,
    length: u64,
    /// `None` if the content is not read.
    reading: Option<Reading<'a>>,
    /// A thread writes all of it back.
    sent: AtomicBool,
    /// The bytes up to this offset were written back before, and are skipped.
    clean: u64,
    /// Zeroes become holes.
    digs: bool,
    no_holes: AtomicBool,
}

impl<'a> Run<'a> {
    /// Covers all bytes that the file has now.
    pub(super) fn new(file: &'a OwnedFd, how: How) -> Result<Self, Errno> {
        // stat(2) does not report the size of a device.
        let length = rustix::fs::seek(file, SeekFrom::End(0))?;
        Ok(Self {
            file,
            how,
            length,
            reading: match how {
                How::Digest => Some(Reading::new(file, length)),
                How::DigestAndWriteBack => Some(Reading::backwards(file, length)),
                How::WriteBack => None,
            },
            sent: AtomicBool::new(false),
            clean: 0,
            digs: false,
            no_holes: AtomicBool::new(false),
        })
    }

    /// Makes holes of zeroes if the content is read.
    pub(super) fn digging(self) -> Self {
        Self { digs: true, ..self }
    }

    /// Most bytes before `end` were written back already.
    pub(super) fn clean_to(self, end: u64) -> Self {
        Self { clean: end, ..self }
    }

    /// Does one thread's part of the work. Each piece counts as progress.
    ///
    /// After write-back piece by piece, fsync waits only for the device's queue. So slow storage shows progress,
    /// which distinguishes it from storage that hangs. Write-back is advice to the kernel: without it the fsync takes
    /// longer. A piece is read before it is written back, because written pages leave the page cache.
    fn work(&self, progress: &Progress, cancel: &CancellationToken) -> Result<Worked, Errno> {
        let mut digger = Digger::new(self.file, &self.no_holes);
        match &self.reading {
            Some(reading) => reading.work(&mut Watcher {
                sent: (self.how == How::DigestAndWriteBack).then_some((self.file, self.clean)),
                digger: self.digs.then_some(&mut digger),
                progress,
                cancel,
            }),
            None if self.sent.swap(true, Ordering::Relaxed) => Ok(Worked::Done),
            None => {
                for start in (0..self.length).step_by(SENT) {
                    if cancel.is_cancelled() {
                        return Ok(Worked::Stopped);
                    }
                    let end = self.length.min(start + SENT as u64);
                    send(self.file, start..end);
                    progress.add(end - start);
                }
                Ok(Worked::Last)
            }
        }
    }

    fn digest(&self) -> Option<FileDigest> {
        let blake3 = match &self.reading {
            Some(reading) => Some(reading.digest()?.hex),
            None => None,
        };
        Some(FileDigest {
            length: self.length,
            blake3,
        })
    }
}

fn send(file: &OwnedFd, piece: Range<u64>) {
    if let Some(length) = NonZeroU64::new(piece.end - piece.start) {
        let _ = fadvise(file, piece.start, Some(length), Advice::DontNeed);
    }
}

struct Watcher<'a, 'b> {
    sent: Option<(&'a OwnedFd, u64)>,
    digger: Option<&'a mut Digger<'b>>,
    progress: &'a Progress,
    cancel: &'a CancellationToken,
}

impl Watch for Watcher<'_, '_> {
    fn read(&mut self, offset: u64, bytes: &[u8]) -> ControlFlow<()> {
        if let Some(digger) = &mut self.digger {
            digger.read(offset, bytes);
        }
        self.progress.add(bytes.len() as u64);
        match self.cancel.is_cancelled() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    fn done(&mut self, piece: Range<u64>) {
        if let Some(digger) = &mut self.digger {
            digger.end(piece.end);
        }
        if let Some((file, clean)) = self.sent
            && piece.end > clean
        {
            send(file, piece);
        }
    }
}

/// Processes files one after another, each with all processors. `end` gets the index of each finished file while
/// others are read. `failed` makes the error of a file. Returns `None` if it is cancelled.
pub(super) fn go_through(
    runs: &[Run],
    end: impl Fn(usize) -> Result<(), Error> + Sync,
    failed: impl Fn(usize, Errno) -> Error + Sync,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<Option<Vec<FileDigest>>, Error> {
    let stop = cancel.child_token();
    let work = || {
        for (index, run) in runs.iter().enumerate() {
            match run.work(progress, &stop).map_err(|errno| failed(index, errno))? {
                Worked::Stopped => break,
                Worked::Done => {}
                Worked::Last => end(index)?,
            }
        }
        Ok::<_, Error>(())
    };
    let work = || {
        let worked = work();
        if worked.is_err() {
            // The result of the other threads is not needed.
            stop.cancel();
        }
        worked
    };
    digest::in_threads(threads(runs), work)?;
    if cancel.is_cancelled() {
        return Ok(None);
    }
    Ok(runs.iter().map(Run::digest).collect())
}

/// One thread per processor, and some that wait for the device, but not more than there are pieces.
fn threads(runs: &[Run]) -> usize {
    let waiting = runs.len().saturating_sub(1).min(WAITING - 1);
    let pieces = runs
        .iter()
        .map(|run| run.reading.as_ref().map_or(1, Reading::pieces));
    let computing = match runs.iter().any(|run| run.reading.is_some()) {
        true => digest::threads(),
        false => 1,
    };
    (computing + waiting).min(pieces.sum()).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &[u8]) -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, content).unwrap();
        file.into()
    }

    fn failed(_: usize, errno: Errno) -> Error {
        Error::io("read", "it", errno)
    }

    #[test]
    fn each_file_has_its_own_digest_and_ends_once() {
        let (large, small) = (vec![0x5a; (9 << 20) + 3], b"abc");
        let files = [file(&large), file(small), file(b""), file(&large)];
        let total: usize = 2 * large.len() + small.len();
        for how in [How::Digest, How::DigestAndWriteBack, How::WriteBack] {
            let runs: Vec<Run> = files.iter().map(|file| Run::new(file, how).unwrap()).collect();
            let ends = std::sync::Mutex::new(Vec::new());
            let (progress, cancel) = (Progress::default(), CancellationToken::new());
            let end = |index| {
                ends.lock().unwrap().push(index);
                Ok(())
            };
            let digests = go_through(&runs, end, failed, &progress, &cancel)
                .unwrap()
                .unwrap();
            let expected = [&large[..], small, b"", &large].map(|content| FileDigest {
                length: content.len() as u64,
                blake3: (how != How::WriteBack).then(|| blake3::hash(content).to_hex().to_string()),
            });
            assert_eq!(digests, expected);
            assert_eq!(progress.get().0, total as u64);
            let mut ends = ends.into_inner().unwrap();
            ends.sort_unstable();
            assert_eq!(ends, [0, 1, 2, 3]);
        }
    }

    #[test]
    fn an_error_at_the_end_of_one_file_is_the_error_of_all() {
        let files = [file(&vec![1; 9 << 20]), file(&vec![2; 9 << 20])];
        let runs = [0, 1].map(|index| Run::new(&files[index], How::Digest).unwrap());
        let (progress, cancel) = (Progress::default(), CancellationToken::new());
        let end = |index| match index {
            0 => Err(failed(index, Errno::IO)),
            _ => Ok(()),
        };
        go_through(&runs, end, failed, &progress, &cancel).unwrap_err();
        assert!(!cancel.is_cancelled());
    }

    #[test]
    fn a_cancelled_digest_returns_nothing() {
        let cancel = CancellationToken::new();
        cancel.cancel();
        let progress = Progress::default();
        assert_eq!(FileDigest::of(&file(b"abc"), &progress, &cancel).unwrap(), None);
    }
}
