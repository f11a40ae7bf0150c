//! Blocking work, done off the runtime and watched for progress. Does not know what the work is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

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

/// The same, for work that reports its progress; nothing if it makes none for `patience`. The thread then goes on unwatched, and
/// the result is dropped there.
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

/// The result of `work`; nothing if what `moved` gives stays the same for `patience`. However long the work takes in all does
/// not matter. Work that runs on a thread goes on there unwatched, and its result is dropped there.
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

/// Storage that is asked for one thing at a time: where it hangs, it keeps one thread, however often it is asked.
pub struct Queue {
    turn: Arc<Semaphore>,
    /// Who has the turn makes no progress: nobody need wait for it.
    hangs: watch::Sender<bool>,
}

/// Until it is dropped, nobody else has the turn.
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
    /// Runs `work` as [`watched`] does when it has the turn. To wait for that is no sign that the storage hangs, because who has
    /// it is watched as well: nothing is returned only if one of the two makes no progress.
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
            // Nobody closes it.
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
    async fn to_wait_for_a_turn_is_not_to_stall() {
        let (activity, queue) = (Activity::default(), Queue::default());
        let patience = Duration::from_millis(600);
        let slow = |progress: &Progress| {
            for _ in 0..4 {
                std::thread::sleep(Duration::from_millis(200));
                progress.add(1);
            }
        };
        let since = Instant::now();
        // Each gives the turn back when it is done.
        let all = (0..4).map(|_| async { queue.watched(&activity, patience, slow).await.is_some() });
        let done = futures_util::future::join_all(all).await;
        assert_eq!(done, [true; 4]);
        assert!(since.elapsed() > 2 * patience, "{:?}", since.elapsed());
    }

    #[tokio::test]
    async fn nobody_waits_for_who_stalls_and_the_next_one_has_the_turn_afterwards() {
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
