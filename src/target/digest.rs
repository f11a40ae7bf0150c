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

/// How much is sent to the device at a time, in bytes, where nothing is read.
const SENT: usize = 4 << 20;
/// How many files can wait for their device while others are read.
const WAITING: usize = 4;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    /// In bytes.
    pub length: u64,
    /// BLAKE3 of the file's bytes, in lower-case hexadecimal digits; of files in a store.
    #[serde(default)]
    pub blake3: Option<String>,
}

impl FileDigest {
    /// Of a file that is durable already. Nothing if it is cancelled. Blocks.
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

/// How a file is gone through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// For its checksum.
    Digest,
    /// For its checksum, while what was read is sent to the device.
    DigestAndWriteBack,
    /// Only sent to the device.
    WriteBack,
}

/// A file that is gone through.
#[derive(Debug)]
pub(super) struct Run<'a> {
    file: &'a OwnedFd,
    how: How,
    length: u64,
    /// Nothing where the content is not read.
    reading: Option<Reading<'a>>,
    /// A thread sends all of it to the device.
    sent: AtomicBool,
    /// What was written back before, up to there: it need not be sent.
    clean: u64,
    /// Its zeroes become holes.
    digs: bool,
    no_holes: AtomicBool,
}

impl<'a> Run<'a> {
    /// Of all bytes that the file has now.
    pub(super) fn new(file: &'a OwnedFd, how: How) -> Result<Self, Errno> {
        // A device has a size, too, but not one that stat(2) knows.
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

    /// Zeroes become holes where the content is read.
    pub(super) fn digging(self) -> Self {
        Self { digs: true, ..self }
    }

    /// Most of what is before `end` was written back already.
    pub(super) fn clean_to(self, end: u64) -> Self {
        Self { clean: end, ..self }
    }

    /// One thread's part of it; each piece counts as progress.
    ///
    /// Writing back piece by piece leaves an fsync afterwards with no more to wait for than the device's queue, so that slow
    /// storage shows progress and is distinguished from storage that hangs. It is advice: where the kernel does not take it, the
    /// fsync takes longer. A piece is read before it is sent, because what is written back leaves the memory.
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

/// Goes through files, with all processors on each file in turn. `end` gets the index of each file that was gone through, while
/// others are read; `failed` makes an error of one's. Nothing if it is cancelled.
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
            // The other threads' work is in vain.
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

/// As many as there are processors, and some that wait for the device, but no more than there are pieces.
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
    fn each_file_has_its_own_digest_and_comes_to_its_end_once() {
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
    fn a_cancelled_digest_is_none() {
        let cancel = CancellationToken::new();
        cancel.cancel();
        let progress = Progress::default();
        assert_eq!(FileDigest::of(&file(b"abc"), &progress, &cancel).unwrap(), None);
    }
}
