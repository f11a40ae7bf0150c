//! Counts the uses of the service, and measures how long it has been unused.
//!
//! Each call, backup, subscription and registered domain holds a [`Use`] while it lasts. This module does not know
//! their kinds, nor the effect of idleness.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Count {
    now: usize,
    ever: u64,
    /// When the last use ended.
    free_since: Instant,
}

/// Counts uses of the service.
#[derive(Debug, Clone)]
pub struct Activity(Arc<watch::Sender<Count>>);

/// A use of the service, until it is dropped.
#[derive(Debug)]
#[must_use = "a use ends when it is dropped"]
pub struct Use(Activity);

/// A period without uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rest {
    ever: u64,
}

impl Default for Activity {
    fn default() -> Self {
        let count = Count {
            now: 0,
            ever: 0,
            free_since: Instant::now(),
        };
        Self(Arc::new(watch::Sender::new(count)))
    }
}

impl Activity {
    pub fn begin(&self) -> Use {
        self.0.send_if_modified(|count| {
            count.now += 1;
            count.ever += 1;
            // Only the first and the last use wake waiters, because there may be many calls.
            count.now == 1
        });
        Use(self.clone())
    }

    /// Waits until the service has been unused for `time` without interruption.
    pub async fn rest(&self, time: Duration) -> Rest {
        let mut counts = self.0.subscribe();
        loop {
            // `self` owns the sender, so the channel stays open.
            let Ok(count) = counts.wait_for(|count| count.now == 0).await.map(|count| *count) else {
                return std::future::pending().await;
            };
            tokio::time::sleep_until(count.free_since + time).await;
            let rest = Rest { ever: count.ever };
            if self.lasts(rest) {
                return rest;
            }
        }
    }

    /// Whether the period has lasted until now, without even a short use.
    pub fn lasts(&self, rest: Rest) -> bool {
        let count = self.0.borrow();
        count.now == 0 && count.ever == rest.ever
    }

    /// Waits until the period ends.
    pub async fn end_of(&self, rest: Rest) {
        // `self` owns the sender, so the channel stays open.
        let _ = self.0.subscribe().wait_for(|count| count.ever != rest.ever).await;
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.0.0.send_if_modified(|count| {
            count.now -= 1;
            if count.now == 0 {
                count.free_since = Instant::now();
            }
            count.now == 0
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: Duration = Duration::from_secs(120);

    #[tokio::test(start_paused = true)]
    async fn a_rest_begins_when_the_last_use_ends() {
        let activity = Activity::default();
        let began = Instant::now();
        let (first, second) = (activity.begin(), activity.begin());
        let uses = async {
            tokio::time::sleep(TIME).await;
            drop(first);
            tokio::time::sleep(TIME).await;
            drop(second);
            tokio::time::sleep(TIME / 2).await;
            drop(activity.begin());
        };
        let (rest, ()) = tokio::join!(activity.rest(TIME), uses);
        assert_eq!(began.elapsed(), 3 * TIME + TIME / 2);
        assert!(activity.lasts(rest));
    }

    #[tokio::test(start_paused = true)]
    async fn a_short_use_ends_a_rest() {
        let activity = Activity::default();
        let rest = activity.rest(TIME).await;
        drop(activity.begin());
        assert!(!activity.lasts(rest));
        activity.end_of(rest).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_rest_does_not_begin_during_a_use() {
        let activity = Activity::default();
        let _use = activity.begin();
        let resting = tokio::time::timeout(1000 * TIME, activity.rest(TIME));
        assert!(resting.await.is_err());
    }
}
