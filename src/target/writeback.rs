//! Starts the writeback to the device early.
//!
//! The kernel keeps written data in memory for half a minute, so that the final fsync would wait for all of it.
//! Writing it back while more is being copied does both at the same time.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{Advice, fadvise};

/// The places of a backup under way.
#[derive(Debug)]
pub struct Writeback(Vec<Arc<OwnedFd>>);

impl Writeback {
    /// Nothing is to be sent early.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Starts to write what is in memory, and lets go of what is written: a backup is not read again soon, and the
    /// memory is worth more to others. Waits for nothing but a place in the device's queue.
    ///
    /// An fsync would do the same, but it takes an error away from the one that counts, the last (fsync(2): an error
    /// is reported once).
    pub fn start(&self) {
        for file in &self.0 {
            // Advice: where it is not taken, the end takes longer.
            let _ = fadvise(file, 0, None, Advice::DontNeed);
        }
    }
}

impl FromIterator<Arc<OwnedFd>> for Writeback {
    fn from_iter<I: IntoIterator<Item = Arc<OwnedFd>>>(files: I) -> Self {
        Self(files.into_iter().collect())
    }
}
