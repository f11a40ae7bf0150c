//! Caches the authority's answers to read permissions.
//!
//! A desktop asks the same question a hundred times a minute. The cache holds answers, positive and negative, that
//! needed no password dialog. It drops them when the authority reports a change, when the caller disconnects, and after
//! half a minute.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::Permission;

const KEEP: Duration = Duration::from_secs(30);
/// Limits of the cached answers, for each caller and in total.
const MOST_OF_A_CALLER: usize = 4096;
const MOST: usize = 65536;

/// The object of a question: a domain, by its id and known UUID; or `None` for the service itself. An answer about a
/// domain whose UUID was unknown does not apply once it is known.
pub type Object = Option<(u64, Option<Uuid>)>;

#[derive(Debug, Clone, Copy)]
struct Answer {
    given: Instant,
    /// The authority's generation before the question.
    generation: u64,
    allowed: bool,
}

type Answers = HashMap<(Permission, Object), Answer>;

#[derive(Debug, Default)]
struct Kept {
    by_caller: HashMap<String, Answers>,
    count: usize,
}

#[derive(Debug, Default)]
pub struct Cache(Mutex<Kept>);

impl Cache {
    /// The cached answer, if it is still valid in this generation.
    pub fn get(&self, caller: &str, permission: Permission, object: Object, generation: u64) -> Option<bool> {
        let kept = self.lock();
        let answer = kept.by_caller.get(caller)?.get(&(permission, object))?;
        answer.counts(generation).then_some(answer.allowed)
    }

    pub fn put(&self, caller: &str, permission: Permission, object: Object, generation: u64, allowed: bool) {
        let answer = Answer {
            given: Instant::now(),
            generation,
            allowed,
        };
        let mut kept = self.lock();
        if kept.count >= MOST {
            kept.sweep(generation);
        }
        if kept.count >= MOST {
            // A full cache stores nothing, so the authority decides each time.
            return;
        }
        let answers = kept.by_caller.entry(caller.to_owned()).or_default();
        let before = answers.len();
        if before >= MOST_OF_A_CALLER {
            answers.retain(|_, answer| answer.counts(generation));
        }
        if answers.len() < MOST_OF_A_CALLER {
            answers.insert((permission, object), answer);
        }
        let after = answers.len();
        kept.count = kept.count + after - before;
    }

    /// Drops the answers of a caller that has disconnected.
    pub fn forget(&self, caller: &str) {
        let mut kept = self.lock();
        if let Some(answers) = kept.by_caller.remove(caller) {
            kept.count -= answers.len();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Answer {
    fn counts(&self, generation: u64) -> bool {
        self.generation == generation && self.given.elapsed() < KEEP
    }
}

impl Kept {
    fn sweep(&mut self, generation: u64) {
        for answers in self.by_caller.values_mut() {
            answers.retain(|_, answer| answer.counts(generation));
        }
        self.by_caller.retain(|_, answers| !answers.is_empty());
        self.count = self.by_caller.values().map(HashMap::len).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Permission = Permission::DomainRead;

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_valid_for_half_a_minute() {
        let cache = Cache::default();
        cache.put(":1.1", READ, Some((1, None)), 0, true);
        tokio::time::advance(KEEP - Duration::from_secs(1)).await;
        assert_eq!(cache.get(":1.1", READ, Some((1, None)), 0), Some(true));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(cache.get(":1.1", READ, Some((1, None)), 0), None);
    }

    #[tokio::test]
    async fn an_answer_applies_to_one_caller_permission_object_and_generation() {
        let cache = Cache::default();
        cache.put(":1.1", READ, Some((1, None)), 7, false);
        assert_eq!(cache.get(":1.1", READ, Some((1, None)), 7), Some(false));
        assert_eq!(cache.get(":1.2", READ, Some((1, None)), 7), None);
        assert_eq!(
            cache.get(":1.1", Permission::DomainGetattr, Some((1, None)), 7),
            None
        );
        assert_eq!(cache.get(":1.1", READ, Some((2, None)), 7), None);
        assert_eq!(cache.get(":1.1", READ, Some((1, None)), 8), None);
        assert_eq!(cache.get(":1.1", READ, Some((1, Some(Uuid::nil()))), 7), None);
        cache.forget(":1.1");
        assert_eq!(cache.get(":1.1", READ, Some((1, None)), 7), None);
        assert_eq!(cache.lock().count, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_cache_keeps_valid_answers_and_drops_expired_ones() {
        let cache = Cache::default();
        for caller in 0..MOST / MOST_OF_A_CALLER {
            for object in 0..=MOST_OF_A_CALLER as u64 {
                cache.put(&format!(":1.{caller}"), READ, Some((object, None)), 0, true);
            }
        }
        assert_eq!(cache.lock().count, MOST);
        cache.put(":2.1", READ, Some((1, None)), 0, true);
        assert_eq!(cache.get(":2.1", READ, Some((1, None)), 0), None);
        tokio::time::advance(KEEP).await;
        cache.put(":2.1", READ, Some((1, None)), 0, true);
        assert_eq!(cache.get(":2.1", READ, Some((1, None)), 0), Some(true));
        assert_eq!(cache.lock().count, 1);
    }
}
