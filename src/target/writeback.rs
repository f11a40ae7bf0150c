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
/// The shortest pause between two write-backs. A fast disk copies some ten MiB in that time.
const SOON: Duration = Duration::from_millis(20);
/// The longest pause, when little is copied or the device is slow.
const SELDOM: Duration = Duration::from_secs(1);
/// A busy device has one part in so many of the time for others' fsyncs.
const REST: u32 = 8;

/// How long to wait before the next write-back.
#[derive(Debug, Clone, Copy)]
pub struct Pace(Duration);

impl Default for Pace {
    fn default() -> Self {
        Self(SOON)
    }
}

impl Pace {
    pub fn pause(self) -> Duration {
        self.0
    }

    /// The pace after a write-back: see [`Writeback::start`].
    pub fn after(self, took: Option<Duration>) -> Self {
        Self(match took {
            Some(took) => (took / REST).clamp(SOON, SELDOM),
            None => (self.0 * 2).min(SELDOM),
        })
    }
}

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
    /// What is written back stays in memory, because it is read once more for its digest. An error of the device is reported once to
    /// each open file (Linux' errseq_t), and an error of a server to the one fsync that asked. So an error here is kept, and is the
    /// backup's. A target's is another open file than the one of the final fsync, which has the device's errors reported, too.
    Keep(Arc<OwnedFd>),
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
    length: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Seen {
    fn of(stat: &Stat) -> Self {
        // A sparse file grows in its allocated blocks, those that wait in memory included.
        let blocks = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        Self {
            length,
            bytes: blocks.max(length),
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
    /// One file. It is `kept` in memory if it is read again soon.
    pub fn of_file(file: Arc<OwnedFd>, media: Media, kept: bool) -> Self {
        Self(Arc::new(vec![Early {
            disk: String::new(),
            label: String::new(),
            media,
            way: match kept {
                true => Way::Keep(file),
                false => Way::LetGo(file),
            },
            state: Mutex::default(),
        }]))
    }

    /// Waits for a write-back that runs. Returns its error, which the kernel may not report to the final fsync again. Blocks.
    pub fn failure(&self) -> Option<Errno> {
        let states = self.0.iter().map(|early| early.state.lock());
        let mut states = states.map(|state| state.unwrap_or_else(PoisonError::into_inner));
        states.find_map(|state| state.error)
    }

    /// `again` gives another open file of a target's, where it is to stay in memory.
    pub(super) fn new(targets: &[Target], again: impl Fn(&Target) -> Option<OwnedFd>) -> Self {
        let early = targets.iter().map(|target| Early {
            disk: target.disk.clone(),
            label: target.label.clone(),
            media: target.media,
            way: match again(target) {
                Some(file) => Way::Keep(Arc::new(file)),
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

    /// How many bytes from the beginning of the target at `index` were written back when they were all that it had. A byte may have
    /// changed since. Does not wait.
    pub(super) fn clean_to(&self, index: usize) -> u64 {
        match self.0.get(index) {
            Some(early) if matches!(early.way, Way::Keep(_)) => {
                early.state.try_lock().map_or(0, |state| state.seen.length)
            }
            _ => 0,
        }
    }

    /// Waits for a write-back of the target at `index` that is under way. Fails if one has failed.
    pub(super) fn check(&self, index: usize) -> Result<(), Error> {
        self.0.get(index).map_or(Ok(()), Early::check)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_is_looked_at_seldom_and_a_slow_device_has_rests() {
        let mut pace = Pace::default();
        for _ in 0..10 {
            pace = pace.after(None);
        }
        assert_eq!(pace.pause(), SELDOM);
        assert_eq!(pace.after(Some(Duration::from_millis(1))).pause(), SOON);
        assert_eq!(
            pace.after(Some(Duration::from_secs(4))).pause(),
            Duration::from_millis(500)
        );
        assert_eq!(pace.after(Some(Duration::from_secs(60))).pause(), SELDOM);
    }

    #[test]
    fn what_has_not_changed_is_not_sent_again() {
        let file = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        let writeback = Writeback::of_file(file.clone(), Media::Regular, false);
        rustix::io::pwrite(&*file, &[1; 100], 0).unwrap();
        assert!(writeback.start().unwrap().is_some());
        assert!(writeback.start().unwrap().is_none());
        rustix::fs::ftruncate(&*file, 1 << 20).unwrap();
        assert!(writeback.start().unwrap().is_some());
    }
}
