//! Blocking work, done off the runtime and watched for progress. Does not know what the work is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::activity::Activity;

/// How often work is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// How far some work is. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub struct Progress(Arc<(AtomicU64, AtomicU64)>);

impl Progress {
    /// Bytes done, and in all as far as it is known.
    pub fn get(&self) -> (u64, u64) {
        let (done, total) = &*self.0;
        (done.load(Ordering::Relaxed), total.load(Ordering::Relaxed))
    }

    pub fn set(&self, done: u64, total: u64) {
        self.0.0.store(done, Ordering::Relaxed);
        self.0.1.store(total, Ordering::Relaxed);
    }

    pub fn add(&self, bytes: u64) {
        self.0.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Runs `work` on a thread that may wait for storage. The service stays until it returns, though nobody may wait for it any
/// more: a process does not end before the last of its threads does, and no other is started before that.
pub async fn blocking<T: Send + 'static>(
    activity: &Activity,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let needed = activity.begin();
    let work = move || {
        let result = work();
        drop(needed);
        result
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // Nobody cancels it, and the runtime outlives every job: it panicked.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// The result of `work`; nothing if `progress` stands still for `patience`. However long it takes in all does not matter.
/// Work that runs on a thread goes on there unwatched, and its result is dropped there.
pub async fn unless_stalled<T>(
    progress: &Progress,
    patience: Duration,
    work: impl Future<Output = T>,
) -> Option<T> {
    tokio::pin!(work);
    let (mut done, mut moved) = (progress.get(), Instant::now());
    loop {
        if let Ok(result) = tokio::time::timeout(LOOK.min(patience), &mut work).await {
            return Some(result);
        }
        let now = progress.get();
        if now != done {
            (done, moved) = (now, Instant::now());
        } else if moved.elapsed() >= patience {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn slow_work_that_makes_progress_is_waited_for() {
        let progress = Progress::default();
        let counted = progress.clone();
        let work = async move {
            for _ in 0..8 {
                tokio::time::sleep(Duration::from_millis(100)).await;
                counted.add(1);
            }
            "done"
        };
        let result = unless_stalled(&progress, Duration::from_millis(400), work).await;
        assert_eq!(result, Some("done"));
    }

    #[tokio::test]
    async fn work_without_progress_is_given_up() {
        let never = std::future::pending::<()>();
        let result = unless_stalled(&Progress::default(), Duration::from_millis(50), never).await;
        assert_eq!(result, None);
    }
}
