//! Bounds the questions to the authority, in all and for each user.
//!
//! The bus limits the calls in flight of one connection (128 with dbus-daemon), and the authority answers one
//! after the other. Each user has only a part of the turns, so that one user's thousand questions do not block the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Silent questions at a time; with the password dialogs of the default limit, fewer than the bus allows.
const TURNS: usize = 96;
const TURNS_OF_A_USER: usize = 48;

#[derive(Debug)]
pub struct Turns {
    all: Arc<Semaphore>,
    by_user: Mutex<HashMap<u32, Arc<Semaphore>>>,
}

/// The right to put one question.
pub struct Turn {
    _own: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

impl Default for Turns {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(TURNS)),
            by_user: Mutex::default(),
        }
    }
}

impl Turns {
    /// Waits for a turn of this user's.
    pub async fn take(&self, uid: u32) -> Option<Turn> {
        let own = self.of(uid).acquire_owned().await;
        let all = self.all.clone().acquire_owned().await;
        // They are never closed.
        Some(Turn {
            _own: own.ok()?,
            _all: all.ok()?,
        })
    }

    fn of(&self, uid: u32) -> Arc<Semaphore> {
        let mut by_user = self.by_user.lock().unwrap_or_else(PoisonError::into_inner);
        // Every holder of a turn, and everyone who waits for one, holds a reference.
        by_user.retain(|_, turns| Arc::strong_count(turns) > 1);
        let turns = by_user
            .entry(uid)
            .or_insert_with(|| Arc::new(Semaphore::new(TURNS_OF_A_USER)));
        turns.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn one_user_cannot_have_every_turn() {
        let turns = Turns::default();
        let held: Vec<_> = (0..TURNS_OF_A_USER)
            .map(|_| turns.take(1000).now_or_never().unwrap())
            .collect();
        assert!(turns.take(1000).now_or_never().is_none());
        assert!(turns.take(1001).now_or_never().is_some());
        drop(held);
        assert!(turns.take(1000).now_or_never().is_some());
    }

    #[tokio::test]
    async fn users_without_questions_are_not_remembered() {
        let turns = Turns::default();
        drop(turns.take(1000).await);
        drop(turns.take(1001).await);
        assert_eq!(turns.by_user.lock().unwrap().len(), 1);
    }
}
