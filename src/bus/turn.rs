//! The order in which the calls of one connection take effect.
//!
//! Calls run concurrently, each in its own task, so this module keeps their order. A call that changes something gets
//! its turn when the turns of all earlier calls of its connection have ended. A turn ends
//!
//! - with the reply, or
//! - when the call has taken effect and only waits: `CreateBackup` after it has reserved the domain, or
//! - when polkit asks a person for a password, or
//! - after [`TURN_TIMEOUT`], so that hung storage or a hung QEMU delays later calls no longer than that.
//!
//! A call that only reads starts after the turns of earlier changes. It has no turn, so no later call waits for it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::methods::Effect;

/// The longest duration of a turn.
const TURN_TIMEOUT: Duration = Duration::from_secs(5);

/// The calls of one connection whose turns have not ended.
#[derive(Debug, Default)]
pub struct CallQueue {
    waiting: Mutex<Waiting>,
    moved: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    came: u64,
    numbers: BTreeSet<u64>,
}

/// A call's position in the queue.
#[derive(Debug)]
pub struct Ticket {
    queue: Arc<CallQueue>,
    number: u64,
    /// Ends the turn before the call ends.
    turn: CancellationToken,
}

impl CallQueue {
    /// Queues a call with this effect, in the order of arrival.
    pub fn join(self: &Arc<Self>, effect: Effect) -> Ticket {
        let mut waiting = self.lock();
        waiting.came += 1;
        let number = waiting.came;
        if effect == Effect::Changes {
            waiting.numbers.insert(number);
        }
        Ticket {
            queue: self.clone(),
            number,
            turn: CancellationToken::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket {
    /// The call cancels this token when it has taken effect.
    pub fn turn(&self) -> CancellationToken {
        self.turn.clone()
    }

    /// Runs `work` when it is the call's turn, and ends the turn as early as possible.
    pub async fn run<T>(self, work: impl Future<Output = T>) -> T {
        self.wait_for_turn().await;
        tokio::pin!(work);
        tokio::select! {
            biased;
            done = &mut work => return done,
            _ = tokio::time::timeout(TURN_TIMEOUT, self.turn.cancelled()) => {}
        }
        drop(self);
        work.await
    }

    async fn wait_for_turn(&self) {
        loop {
            let moved = self.queue.moved.notified();
            tokio::pin!(moved);
            // Registered before the check, so that no notification is missed.
            moved.as_mut().enable();
            let first = self.queue.lock().numbers.first().copied();
            if first.is_none_or(|first| first >= self.number) {
                return;
            }
            moved.await;
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.queue.lock().numbers.remove(&self.number);
        self.queue.moved.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test(start_paused = true)]
    async fn a_change_waits_for_earlier_changes_but_not_for_reads() {
        let queue = Arc::new(CallQueue::default());
        let reading = queue.join(Effect::Waits);
        let first = queue.join(Effect::Changes);
        let (second, third) = (queue.join(Effect::Changes), queue.join(Effect::Reads));
        let mut waits = Box::pin(reading.run(std::future::pending::<()>()));
        assert!(waits.as_mut().now_or_never().is_none());
        first.run(std::future::ready(())).now_or_never().unwrap();
        let mut runs = Box::pin(second.run(tokio::time::sleep(TURN_TIMEOUT / 2)));
        let mut reads = Box::pin(third.run(std::future::ready(())));
        assert!(runs.as_mut().now_or_never().is_none());
        assert!(
            reads.as_mut().now_or_never().is_none(),
            "a change before it is under way"
        );
        runs.await;
        reads.now_or_never().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_ends_when_the_call_only_waits_or_takes_too_long() {
        let queue = Arc::new(CallQueue::default());
        for gives_up in [true, false] {
            let (waits, next) = (queue.join(Effect::Changes), queue.join(Effect::Changes));
            let turn = waits.turn();
            let mut waiting = Box::pin(waits.run(std::future::pending::<()>()));
            assert!(waiting.as_mut().now_or_never().is_none());
            let mut next = Box::pin(next.run(std::future::ready(())));
            assert!(next.as_mut().now_or_never().is_none());
            match gives_up {
                true => turn.cancel(),
                false => tokio::time::advance(TURN_TIMEOUT).await,
            }
            assert!(waiting.as_mut().now_or_never().is_none());
            next.now_or_never().unwrap();
        }
    }

    #[tokio::test]
    async fn a_dropped_call_does_not_block_later_calls() {
        let queue = Arc::new(CallQueue::default());
        let (first, second, third) = (
            queue.join(Effect::Changes),
            queue.join(Effect::Changes),
            queue.join(Effect::Changes),
        );
        drop(second);
        let mut third = Box::pin(third.run(std::future::ready(())));
        assert!(
            third.as_mut().now_or_never().is_none(),
            "the first is still there"
        );
        drop(first);
        third.now_or_never().unwrap();
    }
}
