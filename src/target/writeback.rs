//! Starts the write-back to the device early.
//!
//! The kernel keeps written data in memory for half a minute, so that the final fsync would wait for all of it.
//! Writing it back while more is being copied does both at the same time, and bounds the dirty memory that the guest's own
//! writes have to wait for.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, Stat, fadvise, fdatasync, fstat};
use rustix::io::Errno;

use super::{Error, Media, Target};

/// How much must have come since the last time to be worth a write-back, in bytes.
const ENOUGH: u64 = 16 << 20;

/// The targets of a backup under way. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Writeback(Arc<Vec<Early>>);

/// One target.
#[derive(Debug)]
struct Early {
    disk: String,
    label: String,
    media: Media,
    way: Way,
    state: Mutex<State>,
}

#[derive(Debug)]
enum Way {
    /// What is written back stays in memory, because it is read once more for its digest. It is another open file than QEMU's and
    /// the one of the final fsync: an error of the device is reported once to each open file (Linux' errseq_t), so that an error
    /// that this one gets is not taken from the final fsync. File systems in user space and of the network report the server's
    /// own errors only to the fsync that asked, so an error here is kept, too, and is the backup's.
    Keep(OwnedFd),
    /// What is written back leaves the memory, which is worth more to others. This reports no error, and so takes none from the
    /// final fsync.
    LetGo(Arc<OwnedFd>),
}

#[derive(Debug, Default)]
struct State {
    /// When the last write-back began.
    seen: Seen,
    error: Option<Errno>,
}

/// How much a file held.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Seen {
    bytes: u64,
    modified: (i64, i64),
}

impl Seen {
    fn of(stat: &Stat) -> Self {
        // A sparse file grows in its allocated blocks, those that wait in memory included.
        let blocks = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
        Self {
            bytes: blocks.max(u64::try_from(stat.st_size).unwrap_or(0)),
            modified: (stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(0)),
        }
    }
}

impl Early {
    /// Whether there was enough to be written back.
    fn start(&self) -> Result<bool, Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &self.way {
            _ if state.error.is_some() => {}
            Way::Keep(file) => match keep(file, &mut state.seen) {
                Ok(written) => return Ok(written),
                Err(errno) => state.error = Some(errno),
            },
            Way::LetGo(file) => {
                // A device does not show what it was written.
                if self.media == Media::Regular
                    && let Ok(stat) = fstat(file)
                {
                    let seen = Seen::of(&stat);
                    if std::mem::replace(&mut state.seen, seen) == seen {
                        return Ok(false);
                    }
                }
                // Advice: where it is not taken, the end takes longer.
                let _ = fadvise(file, 0, None, Advice::DontNeed);
                return Ok(true);
            }
        }
        drop(state);
        self.check().map(|()| false)
    }

    fn check(&self) -> Result<(), Error> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.error {
            Some(errno) => Err(Error::io("fsync", &self.label, errno).of(&self.disk)),
            None => Ok(()),
        }
    }
}

fn keep(file: &OwnedFd, seen: &mut Seen) -> Result<bool, Errno> {
    let now = Seen::of(&fstat(file)?);
    if now.bytes < seen.bytes.saturating_add(ENOUGH) {
        return Ok(false);
    }
    fdatasync(file)?;
    *seen = now;
    Ok(true)
}

impl Writeback {
    /// `again` gives another open file of a target's, where it is to stay in memory.
    pub(super) fn new(targets: &[Target], again: impl Fn(&Target) -> Option<OwnedFd>) -> Self {
        let early = targets.iter().map(|target| Early {
            disk: target.disk.clone(),
            label: target.label.clone(),
            media: target.media,
            way: match again(target) {
                Some(file) => Way::Keep(file),
                None => Way::LetGo(target.file.clone()),
            },
            state: Mutex::default(),
        });
        Self(Arc::new(early.collect()))
    }

    /// Writes back what has come, if it is enough. Returns for how long that took; nothing if there was nothing to be done. An error
    /// is the backup's end: something that was written is lost. Blocks.
    pub fn start(&self) -> Result<Option<Duration>, Error> {
        let (began, mut worked) = (Instant::now(), false);
        for early in self.0.iter() {
            worked |= early.start()?;
        }
        Ok(worked.then(|| began.elapsed()))
    }

    /// Waits for a write-back of the target at `index` that is under way. Fails if one has failed.
    pub(super) fn check(&self, index: usize) -> Result<(), Error> {
        self.0.get(index).map_or(Ok(()), Early::check)
    }
}
