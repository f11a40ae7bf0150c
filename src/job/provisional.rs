//! A value that is provisional until the job leaves the queue, and final from then on.

use std::ops::Deref;
use std::sync::OnceLock;

/// Dereferences to the final value if it is set, or else to the provisional one.
#[derive(Debug)]
pub struct Provisional<T> {
    first: T,
    last: OnceLock<T>,
}

impl<T> Provisional<T> {
    /// Sets the final value. The caller does this once.
    pub(super) fn finalise(&self, last: T) {
        let first = self.last.set(last).is_ok();
        debug_assert!(first, "a job leaves the queue once");
    }
}

impl<T> From<T> for Provisional<T> {
    fn from(first: T) -> Self {
        let last = OnceLock::new();
        Self { first, last }
    }
}

impl<T> Deref for Provisional<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.last.get().unwrap_or(&self.first)
    }
}
