//! Runs blocking work outside the runtime, and watches its progress. Does not know the work.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

use crate::activity::Activity;

/// How often the progress is checked.
const LOOK: Duration = Duration::from_millis(200);

/// The progress of work. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Progress(Arc<(AtomicU64, AtomicU64)>);

impl Progress {
    /// Bytes done, and bytes in total as far as known.
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

/// Runs `work` on a thread that may block. The service does not exit until it returns, even if nobody awaits it any
/// more. A process ends only after its last thread, and no new instance starts before that.
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
        // The task is never cancelled, and the runtime outlives every job. So it panicked.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// As [`blocking`], for work that reports its progress. Returns `None` if there is none for `patience`. The thread then
/// continues unwatched, and drops the result.
pub async fn watched<T: Send + 'static>(
    activity: &Activity,
    patience: Duration,
    work: impl FnOnce(&Progress) -> T + Send + 'static,
) -> Option<T> {
    let progress = Progress::default();
    let counted = progress.clone();
    let work = blocking(activity, move || work(&counted));
    unless_stalled(|| progress.get(), patience, work).await
}

/// The result of `work`, or `None` if the value of `moved` stays the same for `patience`. The total duration has no
/// limit. Work on a thread continues unwatched, and its result is dropped there.
pub async fn unless_stalled<T, M: PartialEq>(
    moved: impl Fn() -> M,
    patience: Duration,
    work: impl Future<Output = T>,
) -> Option<T> {
    tokio::pin!(work);
    let (mut last, mut since) = (moved(), Instant::now());
    loop {
        if let Ok(result) = tokio::time::timeout(LOOK.min(patience), &mut work).await {
            return Some(result);
        }
        let now = moved();
        if now != last {
            (last, since) = (now, Instant::now());
        } else if since.elapsed() >= patience {
            return None;
        }
    }
}

/// Serialises access to one storage: hung storage blocks one thread, no matter how many tasks use it.
pub struct Queue {
    turn: Arc<Semaphore>,
    /// The running work makes no progress, so waiting tasks give up.
    hangs: watch::Sender<bool>,
}

/// The right to run, until it is dropped.
pub type Turn = OwnedSemaphorePermit;

impl Default for Queue {
    fn default() -> Self {
        Self {
            turn: Arc::new(Semaphore::new(1)),
            hangs: watch::Sender::new(false),
        }
    }
}

impl Queue {
    /// Runs `work` as [`watched`] does, in its turn. Waiting for the turn does not count as a stall, because the
    /// running work is watched too. Returns `None` only if either makes no progress.
    pub async fn watched<T: Send + 'static>(
        &self,
        activity: &Activity,
        patience: Duration,
        work: impl FnOnce(&Progress) -> T + Send + 'static,
    ) -> Option<(Turn, T)> {
        let _needed = activity.begin();
        let mut stuck = self.hangs.subscribe();
        let turn = tokio::select! {
            biased;
            // The semaphore is never closed.
            turn = self.turn.clone().acquire_owned() => turn.ok()?,
            _ = stuck.wait_for(|hangs| *hangs) => return None,
        };
        let hangs = self.hangs.clone();
        let work = move |progress: &Progress| {
            let done = work(progress);
            hangs.send_replace(false);
            (turn, done)
        };
        let done = watched(activity, patience, work).await;
        if done.is_none() {
            self.hangs.send_replace(true);
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn slow_work_that_makes_progress_is_not_stalled() {
        let progress = Progress::default();
        let counted = progress.clone();
        let work = async move {
            for _ in 0..8 {
                tokio::time::sleep(Duration::from_millis(100)).await;
                counted.add(1);
            }
            "done"
        };
        let result = unless_stalled(|| progress.get(), Duration::from_millis(400), work).await;
        assert_eq!(result, Some("done"));
    }

    #[tokio::test]
    async fn work_without_progress_is_given_up() {
        let never = std::future::pending::<()>();
        let result = unless_stalled(|| (), Duration::from_millis(50), never).await;
        assert_eq!(result, None);
    }

    #[tokio::test]
    async fn waiting_for_a_turn_is_not_a_stall() {
        let (activity, queue) = (Activity::default(), Queue::default());
        let patience = Duration::from_millis(600);
        let slow = |progress: &Progress| {
            for _ in 0..4 {
                std::thread::sleep(Duration::from_millis(200));
                progress.add(1);
            }
        };
        let since = Instant::now();
        // Each task returns its turn when it is done.
        let all = (0..4).map(|_| async { queue.watched(&activity, patience, slow).await.is_some() });
        let done = futures_util::future::join_all(all).await;
        assert_eq!(done, [true; 4]);
        assert!(since.elapsed() > 2 * patience, "{:?}", since.elapsed());
    }

    #[tokio::test]
    async fn waiting_tasks_give_up_behind_stalled_work() {
        let (activity, queue) = (Activity::default(), Queue::default());
        let patience = Duration::from_millis(50);
        let (go_on, held) = std::sync::mpsc::channel::<()>();
        let hang = move |_: &Progress| held.recv().ok();
        let hanging = queue.watched(&activity, patience, hang);
        let waiting = queue.watched(&activity, patience, |_| ());
        let (first, second) = tokio::join!(hanging, waiting);
        assert!(first.is_none() && second.is_none());
        drop(go_on);
        let turn = queue.turn.clone().acquire_owned().await.unwrap();
        drop(turn);
        assert!(queue.watched(&activity, patience, |_| ()).await.is_some());
    }
}
