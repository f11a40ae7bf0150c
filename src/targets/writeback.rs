//! Starts the write-back to the device early.
//!
//! The kernel keeps written data in memory for half a minute, and the final fsync would wait for all of it. Early
//! write-back runs while QEMU copies. It also bounds the dirty memory that the guest's own writes wait for.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, Stat, fadvise, fdatasync, fstat};
use rustix::io::Errno;

use super::{Error, Media, Target};

/// The least new data for a write-back, in bytes.
const ENOUGH: u64 = 16 << 20;
/// The shortest pause between two write-backs. A fast disk copies some ten MiB in that time.
const SOON: Duration = Duration::from_millis(20);
/// The longest pause, when little is copied or the device is slow.
const SELDOM: Duration = Duration::from_secs(1);
/// A busy device is free of write-back for one part in this many of the time, for other programs' fsyncs.
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

/// The targets of a running backup. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Writeback(Arc<Vec<Early>>);

/// One target.
#[derive(Debug)]
struct Early {
    disk: String,
    label: String,
    media: Media,
    way: Way,
    /// The length in bytes before this process copied data into it.
    length: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
enum Way {
    /// Written data stays in memory, because the service reads it again for its digest.
    ///
    /// The kernel reports an error of the device once to each open file description (errseq_t), and an error of a
    /// server only to the fsync that caused it. So an error here is stored, and fails the backup. The final fsync
    /// uses another open file description, so it sees the device's errors too.
    Keep(Arc<OwnedFd>),
    /// Written pages leave the page cache, to make room for other data. This reports no error, and so hides none from
    /// the final fsync.
    Evict(Arc<OwnedFd>),
}

#[derive(Debug, Default)]
struct State {
    /// The file's state when the last write-back began.
    seen: Seen,
    error: Option<Errno>,
    /// No further write-back begins.
    closed: bool,
}

/// The size of a file, in bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Seen {
    length: u64,
    /// Allocated blocks, including those in memory. A raw image has its full length from the start, and only its
    /// blocks grow.
    blocks: u64,
    modified: (i64, i64),
}

impl Seen {
    fn of(stat: &Stat) -> Self {
        Self {
            length: u64::try_from(stat.st_size).unwrap_or(0),
            blocks: u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512),
            modified: (stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(0)),
        }
    }

    fn has_grown(&self, since: &Self) -> bool {
        let enough = |now: u64, then: u64| now >= then.saturating_add(ENOUGH);
        enough(self.length, since.length) || enough(self.blocks, since.blocks)
    }
}

impl Early {
    fn new(disk: &str, label: &str, media: Media, way: Way) -> Self {
        let (Way::Keep(file) | Way::Evict(file)) = &way;
        Self {
            disk: disk.to_owned(),
            label: label.to_owned(),
            media,
            // If stat(2) fails, the first write-back fails, too.
            length: fstat(file).map_or(0, |stat| Seen::of(&stat).length),
            way,
            state: Mutex::default(),
        }
    }

    /// Starts a write-back if there is enough new data. Returns whether it did.
    fn start(&self) -> Result<bool, Error> {
        let mut state = self.state();
        if state.closed {
            return Ok(false);
        }
        match &self.way {
            _ if state.error.is_some() => {}
            Way::Keep(file) => match keep(file, &mut state.seen) {
                Ok(written) => return Ok(written),
                Err(errno) => state.error = Some(errno),
            },
            Way::Evict(file) => {
                // stat(2) does not show the writes to a device.
                if self.media == Media::Regular
                    && let Ok(stat) = fstat(file)
                {
                    let seen = Seen::of(&stat);
                    if std::mem::replace(&mut state.seen, seen) == seen {
                        return Ok(false);
                    }
                }
                // Advice to the kernel: without it, the final fsync takes longer.
                let _ = fadvise(file, 0, None, Advice::DontNeed);
                return Ok(true);
            }
        }
        self.failed(state.error).map(|()| false)
    }

    /// See [`Writeback::close`].
    fn close(&self) -> Option<Errno> {
        let mut state = self.state();
        state.closed = true;
        state.error
    }

    fn failed(&self, error: Option<Errno>) -> Result<(), Error> {
        match error {
            Some(errno) => Err(Error::io("fsync", &self.label, errno).of(&self.disk)),
            None => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn keep(file: &OwnedFd, seen: &mut Seen) -> Result<bool, Errno> {
    let now = Seen::of(&fstat(file)?);
    if !now.has_grown(seen) {
        return Ok(false);
    }
    fdatasync(file)?;
    *seen = now;
    Ok(true)
}

impl Writeback {
    /// Writes back one file. With `kept` it stays in memory, because the caller reads it again soon.
    pub fn of_file(file: Arc<OwnedFd>, media: Media, kept: bool) -> Self {
        let way = match kept {
            true => Way::Keep(file),
            false => Way::Evict(file),
        };
        Self(Arc::new(vec![Early::new("", "", media, way)]))
    }

    /// Stops new write-backs and waits for a running one. Returns the error of any write-back, because the kernel may
    /// not report it again. A later fsync gets every later error, because no other thread can consume it. Blocks.
    pub fn close(&self) -> Option<Errno> {
        self.0.iter().filter_map(Early::close).reduce(|first, _| first)
    }

    /// `again` opens a target again if it is to stay in memory.
    pub(super) fn new(targets: &[Target], again: impl Fn(&Target) -> Option<OwnedFd>) -> Self {
        let early = targets.iter().map(|target| {
            let way = match again(target) {
                Some(file) => Way::Keep(Arc::new(file)),
                None => Way::Evict(target.file.clone()),
            };
            Early::new(&target.disk, &target.label, target.media, way)
        });
        Self(Arc::new(early.collect()))
    }

    /// Writes back new data, if there is enough. Returns how long that took, or `None` if there was not enough. An
    /// error fails the backup, because written data is lost. Blocks.
    pub fn start(&self) -> Result<Option<Duration>, Error> {
        let (began, mut worked) = (Instant::now(), false);
        for early in self.0.iter() {
            worked |= early.start()?;
        }
        Ok(worked.then(|| began.elapsed()))
    }

    /// Returns how many bytes from the beginning of the target at `index` were written back while they were all of
    /// its data. A byte may have changed since. 0 for a file whose length does not grow, because any part may have
    /// been written. Does not wait.
    pub(super) fn clean_to(&self, index: usize) -> u64 {
        match self.0.get(index) {
            Some(early) if matches!(early.way, Way::Keep(_)) => {
                let seen = early.state.try_lock().map_or(0, |state| state.seen.length);
                if seen > early.length { seen } else { 0 }
            }
            _ => 0,
        }
    }

    /// [`Writeback::close`] for the target at `index`. Fails if a write-back of it has failed.
    pub(super) fn close_target(&self, index: usize) -> Result<(), Error> {
        match self.0.get(index) {
            Some(early) => early.failed(early.close()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_data_is_checked_seldom_and_a_slow_device_has_pauses() {
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
    fn unchanged_data_is_not_written_back_again() {
        let file = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        let writeback = Writeback::of_file(file.clone(), Media::Regular, false);
        rustix::io::pwrite(&*file, &[1; 100], 0).unwrap();
        assert!(writeback.start().unwrap().is_some());
        assert!(writeback.start().unwrap().is_none());
        rustix::fs::ftruncate(&*file, 1 << 20).unwrap();
        assert!(writeback.start().unwrap().is_some());
    }

    fn fill(file: &OwnedFd, offset: u64) {
        rustix::io::pwrite(file, &vec![1; ENOUGH as usize], offset).unwrap();
    }

    #[test]
    fn a_raw_image_is_written_back_as_its_blocks_grow_and_no_part_is_clean() {
        let file = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        rustix::fs::ftruncate(&*file, 8 * ENOUGH).unwrap();
        let writeback = Writeback::of_file(file.clone(), Media::Regular, true);
        // At first the whole length is new.
        assert!(writeback.start().unwrap().is_some());
        for offset in [5 * ENOUGH, ENOUGH] {
            assert!(writeback.start().unwrap().is_none());
            fill(&file, offset);
            assert!(writeback.start().unwrap().is_some(), "{offset}");
        }
        assert_eq!(writeback.clean_to(0), 0);
    }

    #[test]
    fn an_image_that_grows_is_clean_up_to_its_last_write_back() {
        let file = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        let writeback = Writeback::of_file(file.clone(), Media::Regular, true);
        assert!(writeback.start().unwrap().is_none());
        fill(&file, 0);
        assert_eq!(writeback.clean_to(0), 0);
        assert!(writeback.start().unwrap().is_some());
        rustix::io::pwrite(&*file, &[1; 100], ENOUGH).unwrap();
        assert!(writeback.start().unwrap().is_none());
        assert_eq!(writeback.clean_to(0), ENOUGH);
    }

    #[test]
    fn no_write_back_begins_after_the_close_and_the_close_returns_earlier_errors() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(ENOUGH).unwrap();
        let good = Arc::new(OwnedFd::from(file.reopen().unwrap()));
        let good = Writeback::of_file(good, Media::Regular, true);
        assert_eq!(good.close(), None);
        assert!(good.start().unwrap().is_none());
        // stat(2) works on an O_PATH descriptor, but fdatasync(2) fails.
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let bad = rustix::fs::open(file.path(), flags, rustix::fs::Mode::empty()).unwrap();
        let bad = Writeback::of_file(Arc::new(bad), Media::Regular, true);
        bad.start().unwrap_err();
        assert_eq!(bad.close(), Some(Errno::BADF));
        bad.close_target(0).unwrap_err();
        assert!(bad.start().unwrap().is_none());
    }
}
