//! The order in which the calls of one connection take effect.
//!
//! Calls run side by side, each in a task of its own, so their order must be kept on purpose. A call that changes something
//! has a turn, from when every earlier call of its connection has had its own. The turn ends
//!
//! - with the call's answer, or
//! - when the call has taken effect and only waits: `CreateBackup` when its domain is reserved for it, or
//! - when a person is asked for a password, or
//! - after [`LONGEST`]: storage or a QEMU that hangs keeps no later call waiting for longer.
//!
//! A call that only reads begins when the changes before it have had their turns, and has none itself: nothing waits for it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// How long a turn lasts at most.
const LONGEST: Duration = Duration::from_secs(5);

/// Methods that only read. Any other is taken to change something.
pub const READING: [&str; 15] = [
    "Get",
    "GetAll",
    "GetBackup",
    "GetCheckpointDefinition",
    "GetDefinition",
    "GetDomain",
    "GetJob",
    "GetMachineId",
    "Introspect",
    "ListBackups",
    "ListCheckpoints",
    "ListDomains",
    "ListJobs",
    "Ping",
    "Wait",
];

/// The calls of one connection that have not had their turns.
#[derive(Debug, Default)]
pub struct Line {
    waiting: Mutex<Waiting>,
    moved: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    came: u64,
    numbers: BTreeSet<u64>,
}

/// A call's place in the line.
#[derive(Debug)]
pub struct Place {
    line: Arc<Line>,
    number: u64,
    /// Ends the turn before the call does.
    turn: CancellationToken,
}

impl Line {
    /// Lines up a call of this method, in the order in which calls came.
    pub fn join(self: &Arc<Self>, member: &str) -> Place {
        let mut waiting = self.lock();
        waiting.came += 1;
        let number = waiting.came;
        if !READING.contains(&member) {
            waiting.numbers.insert(number);
        }
        Place {
            line: self.clone(),
            number,
            turn: CancellationToken::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Cancelled by the call when it has taken effect.
    pub fn turn(&self) -> CancellationToken {
        self.turn.clone()
    }

    /// Does `work` when it is the call's turn, and ends the turn as soon as possible.
    pub async fn run<T>(self, work: impl Future<Output = T>) -> T {
        self.come_up().await;
        tokio::pin!(work);
        tokio::select! {
            biased;
            done = &mut work => return done,
            _ = tokio::time::timeout(LONGEST, self.turn.cancelled()) => {}
        }
        drop(self);
        work.await
    }

    async fn come_up(&self) {
        loop {
            let moved = self.line.moved.notified();
            tokio::pin!(moved);
            // Before the look, so that no move is missed.
            moved.as_mut().enable();
            let first = self.line.lock().numbers.first().copied();
            if first.is_none_or(|first| first >= self.number) {
                return;
            }
            moved.await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.line.lock().numbers.remove(&self.number);
        self.line.moved.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test(start_paused = true)]
    async fn a_change_waits_for_the_changes_before_it_and_reading_keeps_nobody_waiting() {
        let line = Arc::new(Line::default());
        let reading = line.join("Wait");
        let first = line.join("SetSpeed");
        let (second, third) = (line.join("SetSpeed"), line.join("GetAll"));
        let mut waits = Box::pin(reading.run(std::future::pending::<()>()));
        assert!(waits.as_mut().now_or_never().is_none());
        first.run(std::future::ready(())).now_or_never().unwrap();
        let mut runs = Box::pin(second.run(tokio::time::sleep(LONGEST / 2)));
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
        let line = Arc::new(Line::default());
        for gives_up in [true, false] {
            let (waits, next) = (line.join("CreateBackup"), line.join("Cancel"));
            let turn = waits.turn();
            let mut waiting = Box::pin(waits.run(std::future::pending::<()>()));
            assert!(waiting.as_mut().now_or_never().is_none());
            let mut next = Box::pin(next.run(std::future::ready(())));
            assert!(next.as_mut().now_or_never().is_none());
            match gives_up {
                true => turn.cancel(),
                false => tokio::time::advance(LONGEST).await,
            }
            assert!(waiting.as_mut().now_or_never().is_none());
            next.now_or_never().unwrap();
        }
    }

    #[tokio::test]
    async fn a_call_that_never_had_its_turn_is_waited_for_no_more() {
        let line = Arc::new(Line::default());
        let (first, second, third) = (line.join("Cancel"), line.join("Cancel"), line.join("Cancel"));
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
