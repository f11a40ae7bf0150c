//! The time of day, and a clock that a test sets.
//!
//! `BACKUPD_TEST_CLOCK=FILE` names a file with a number of seconds, which are added to the time. It is read each time, so that
//! the clock can jump while the service runs. Only in builds with debug assertions; in others there is nothing of it.

use std::sync::OnceLock;

use jiff::{SignedDuration, Timestamp};

/// Names the file with the seconds that a test adds.
pub const VARIABLE: &str = "BACKUPD_TEST_CLOCK";

/// The time of day. It can jump, also backwards: the order of two times says nothing about what came first.
pub fn now() -> Timestamp {
    let now = Timestamp::now();
    if !cfg!(debug_assertions) {
        return now;
    }
    static FILE: OnceLock<Option<String>> = OnceLock::new();
    let file = FILE.get_or_init(|| std::env::var(VARIABLE).ok());
    let text = file.as_ref().and_then(|file| std::fs::read_to_string(file).ok());
    let seconds = text.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    now.checked_add(SignedDuration::from_secs(seconds)).unwrap_or(now)
}
