//! Starts the write-back to the device early.
//!
//! The kernel keeps written data in memory for half a minute, so that the final fsync would wait for all of it.
//! Writing it back while more is being copied does both at the same time, and bounds the dirty memory that the guest's own
//! writes have to wait for.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
    /// In bytes, before anything was copied into it by this process.
    length: u64,
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
    /// No write-back begins any more.
    closed: bool,
}

/// How much a file held, in bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Seen {
    length: u64,
    /// Allocated blocks, those that wait in memory included. A raw image has its full length from the start, and grows in these.
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
        let (Way::Keep(file) | Way::LetGo(file)) = &way;
        Self {
            disk: disk.to_owned(),
            label: label.to_owned(),
            media,
            // Where stat(2) fails, the first write-back fails, too.
            length: fstat(file).map_or(0, |stat| Seen::of(&stat).length),
            way,
            state: Mutex::default(),
        }
    }

    /// Whether there was enough to be written back.
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
    /// One file. It is `kept` in memory if it is read again soon.
    pub fn of_file(file: Arc<OwnedFd>, media: Media, kept: bool) -> Self {
        let way = match kept {
            true => Way::Keep(file),
            false => Way::LetGo(file),
        };
        Self(Arc::new(vec![Early::new("", "", media, way)]))
    }

    /// Lets no write-back begin any more, and waits for one that runs. Returns the error of any, which the kernel may not report
    /// again. An fsync from here on has every later error reported: no thread can take it from there. Blocks.
    pub fn close(&self) -> Option<Errno> {
        self.0.iter().filter_map(Early::close).reduce(|first, _| first)
    }

    /// `again` gives another open file of a target's, where it is to stay in memory.
    pub(super) fn new(targets: &[Target], again: impl Fn(&Target) -> Option<OwnedFd>) -> Self {
        let early = targets.iter().map(|target| {
            let way = match again(target) {
                Some(file) => Way::Keep(Arc::new(file)),
                None => Way::LetGo(target.file.clone()),
            };
            Early::new(&target.disk, &target.label, target.media, way)
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
    /// changed since. 0 for a file that does not grow in length: it may have been written to anywhere. Does not wait.
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

    fn fill(file: &OwnedFd, offset: u64) {
        rustix::io::pwrite(file, &vec![1; ENOUGH as usize], offset).unwrap();
    }

    #[test]
    fn a_raw_image_is_written_back_as_its_blocks_come_and_no_part_of_it_is_known_to_be_clean() {
        let file = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        rustix::fs::ftruncate(&*file, 8 * ENOUGH).unwrap();
        let writeback = Writeback::of_file(file.clone(), Media::Regular, true);
        // All of its length is new at first.
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
    fn no_write_back_begins_after_the_close_which_returns_the_error_of_an_earlier_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(ENOUGH).unwrap();
        let good = Arc::new(OwnedFd::from(file.reopen().unwrap()));
        let good = Writeback::of_file(good, Media::Regular, true);
        assert_eq!(good.close(), None);
        assert!(good.start().unwrap().is_none());
        // It can be looked at, but fdatasync(2) fails.
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let bad = rustix::fs::open(file.path(), flags, rustix::fs::Mode::empty()).unwrap();
        let bad = Writeback::of_file(Arc::new(bad), Media::Regular, true);
        bad.start().unwrap_err();
        assert_eq!(bad.close(), Some(Errno::BADF));
        bad.close_target(0).unwrap_err();
        assert!(bad.start().unwrap().is_none());
    }
}
