//! Refusals on record, without letting anybody fill the journal with them.
//!
//! Nobody needs a right to be refused, so refusals alone could rotate everything else out of the journal. The first of a user, an
//! action and an outcome is recorded at once; further ones are counted, and recorded as one number a minute.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often the count is recorded.
const PERIOD: Duration = Duration::from_secs(60);
/// Users, actions and outcomes that are told apart. Those of further users count as one user's.
const MOST: usize = 1024;
/// No user has this number (chown(2) takes it for "as it is").
const OTHERS: u32 = u32::MAX;

/// What refusals are counted by: the user, the action and the outcome.
pub type Key = (u32, &'static str, &'static str);

/// Writes a count: of what, how many, and in how many seconds at most.
type Write = fn(Key, u64);

/// Those that were recorded in the last minute, with how many came since.
#[derive(Debug, Clone)]
pub struct Refusals {
    counted: Arc<Mutex<HashMap<Key, u64>>>,
    write: Write,
}

impl Refusals {
    pub fn new(write: Write) -> Self {
        Self {
            counted: Arc::default(),
            write,
        }
    }

    /// Whether this one is to be recorded now. Otherwise it is counted.
    pub fn is_first(&self, (uid, action, outcome): Key) -> bool {
        let mut counted = self.lock();
        let mut key = (uid, action, outcome);
        if counted.len() >= MOST && !counted.contains_key(&key) {
            key.0 = OTHERS;
        }
        match counted.entry(key) {
            Entry::Occupied(mut entry) => {
                *entry.get_mut() += 1;
                false
            }
            Entry::Vacant(entry) => {
                entry.insert(0);
                drop(counted);
                let refusals = self.clone();
                tokio::spawn(async move { refusals.follow(key).await });
                true
            }
        }
    }

    /// Records the count each minute, until there is none.
    async fn follow(&self, key: Key) {
        loop {
            tokio::time::sleep(PERIOD).await;
            let mut counted = self.lock();
            let count = counted.get_mut(&key).map(std::mem::take).unwrap_or(0);
            if count == 0 {
                counted.remove(&key);
                return;
            }
            drop(counted);
            (self.write)(key, count);
        }
    }

    /// Records what was counted until now.
    pub fn flush(&self) {
        let counted = std::mem::take(&mut *self.lock());
        for (key, count) in counted {
            if count > 0 {
                (self.write)(key, count);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, u64>> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static WRITTEN: Mutex<Vec<(Key, u64)>> = Mutex::new(Vec::new());

    fn written(action: &str) -> Vec<u64> {
        let written = WRITTEN.lock().unwrap();
        let of_action = written.iter().filter(|((_, known, _), _)| *known == action);
        of_action.map(|(_, count)| *count).collect()
    }

    fn refusals() -> Refusals {
        Refusals::new(|key, count| WRITTEN.lock().unwrap().push((key, count)))
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_is_recorded_at_once_and_the_others_once_a_minute_as_a_count() {
        let refusals = refusals();
        let key = (1000, "a", "denied");
        assert!(refusals.is_first(key));
        assert!((0..500).all(|_| !refusals.is_first(key)));
        assert!(refusals.is_first((1001, "a", "denied")) && refusals.is_first((1000, "a", "failed")));
        assert_eq!(written("a"), [0; 0]);
        tokio::time::sleep(PERIOD + Duration::from_secs(1)).await;
        assert_eq!(written("a"), [500]);
        assert!(!refusals.is_first(key));
        tokio::time::sleep(2 * PERIOD).await;
        assert_eq!(written("a"), [500, 1]);
        assert!(refusals.is_first(key), "a minute without any has passed");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_counted_is_recorded_at_the_end() {
        let refusals = refusals();
        let key = (1000, "b", "denied");
        for _ in 0..8 {
            refusals.is_first(key);
        }
        refusals.flush();
        refusals.flush();
        tokio::time::sleep(2 * PERIOD).await;
        assert_eq!(written("b"), [7]);
    }

    #[tokio::test(start_paused = true)]
    async fn many_users_take_no_more_memory_than_some() {
        let refusals = refusals();
        let recorded = (0..100_000).filter(|uid| refusals.is_first((*uid, "c", "denied")));
        assert_eq!(recorded.count(), MOST + 1);
        assert_eq!(refusals.lock().len(), MOST + 1);
        refusals.flush();
        assert_eq!(written("c"), [100_000 - MOST as u64 - 1]);
    }
}
