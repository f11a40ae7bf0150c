//! Counts repeated decisions, so that no user can fill the journal with them.
//!
//! A refusal needs no permission, and the starter of a job may change its speed without limit. Either could rotate all
//! other records out of the journal. The first decision of each kind is recorded at once. Further ones are counted, and
//! the count is recorded once a minute. All other grants are recorded one by one.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The period of the counts.
const PERIOD: Duration = Duration::from_secs(60);
/// The most kinds of decisions that are counted, in each group.
const MOST: usize = 1024;
/// The most processes of a user whose grants for one job are counted separately. Further processes share one count,
/// because a user can start many.
const MOST_PROCESSES: usize = 16;
/// The uid of a shared count. No user has it, because chown(2) reserves it.
const OTHERS: u32 = u32::MAX;

/// The kind of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    pub uid: u32,
    pub action: &'static str,
    pub outcome: &'static str,
    pub basis: &'static str,
    /// The process of a granted call's connection, if it is known.
    pub process: Option<u32>,
    /// The job that a granted call is about.
    pub job: Option<u32>,
}

/// Decisions that share one limit of kinds. Each account has a bounded number of kinds. A user with subordinate uids
/// (subuid(5)) has 65,536 users without a name, which must not use up the limit for accounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Refusals of users that have a name. Beyond [`MOST`] kinds, further users share one count.
    Accounts,
    /// Refusals of users without a name, with the same limit.
    Nameless,
    /// Grants. Beyond [`MOST`] kinds, each is recorded.
    Grants,
}

const GROUPS: usize = 3;

/// Records the count of a kind.
type Write = fn(Key, u64);

/// The kinds that were recorded in the last minute, each with the number of further decisions.
#[derive(Debug, Clone)]
pub struct Repeats {
    counted: Arc<Mutex<[HashMap<Key, u64>; GROUPS]>>,
    write: Write,
}

impl Repeats {
    pub fn new(write: Write) -> Self {
        Self {
            counted: Arc::default(),
            write,
        }
    }

    /// Whether to record this decision now. Otherwise it is counted.
    pub fn is_first(&self, group: Group, mut key: Key) -> bool {
        let mut groups = self.lock();
        let counted = &mut groups[group as usize];
        if key.process.is_some() && !counted.contains_key(&key) {
            let of_user = |other: &&Key| {
                Key {
                    process: None,
                    ..**other
                } == Key { process: None, ..key }
            };
            if counted.keys().filter(of_user).count() >= MOST_PROCESSES {
                key.process = None;
            }
        }
        if counted.len() >= MOST && !counted.contains_key(&key) {
            if group == Group::Grants {
                return true;
            }
            key.uid = OTHERS;
        }
        match counted.entry(key) {
            Entry::Occupied(mut entry) => {
                *entry.get_mut() += 1;
                false
            }
            Entry::Vacant(entry) => {
                entry.insert(0);
                drop(groups);
                let repeats = self.clone();
                tokio::spawn(async move { repeats.follow(group, key).await });
                true
            }
        }
    }

    /// Records the count each minute, and ends after a minute without decisions.
    async fn follow(&self, group: Group, key: Key) {
        loop {
            tokio::time::sleep(PERIOD).await;
            let mut groups = self.lock();
            let counted = &mut groups[group as usize];
            let count = counted.get_mut(&key).map(std::mem::take).unwrap_or(0);
            if count == 0 {
                counted.remove(&key);
                return;
            }
            drop(groups);
            (self.write)(key, count);
        }
    }

    /// Records all pending counts.
    pub fn flush(&self) {
        let groups = std::mem::take(&mut *self.lock());
        for (key, count) in groups.into_iter().flatten() {
            if count > 0 {
                (self.write)(key, count);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, [HashMap<Key, u64>; GROUPS]> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static WRITTEN: Mutex<Vec<(Key, u64)>> = Mutex::new(Vec::new());

    fn written(action: &str) -> Vec<u64> {
        let written = WRITTEN.lock().unwrap();
        let of_action = written.iter().filter(|(key, _)| key.action == action);
        of_action.map(|(_, count)| *count).collect()
    }

    fn repeats() -> Repeats {
        Repeats::new(|key, count| WRITTEN.lock().unwrap().push((key, count)))
    }

    fn refusal(uid: u32, action: &'static str, outcome: &'static str) -> Key {
        Key {
            uid,
            action,
            outcome,
            basis: "polkit",
            process: None,
            job: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_decision_is_recorded_at_once_and_the_others_once_a_minute_as_a_count() {
        let repeats = repeats();
        let is_first = |uid, outcome| repeats.is_first(Group::Accounts, refusal(uid, "a", outcome));
        assert!(is_first(1000, "denied"));
        assert!((0..500).all(|_| !is_first(1000, "denied")));
        assert!(is_first(1001, "denied") && is_first(1000, "failed"));
        assert_eq!(written("a"), [0; 0]);
        tokio::time::sleep(PERIOD + Duration::from_secs(1)).await;
        assert_eq!(written("a"), [500]);
        assert!(!is_first(1000, "denied"));
        tokio::time::sleep(2 * PERIOD).await;
        assert_eq!(written("a"), [500, 1]);
        assert!(is_first(1000, "denied"), "a minute without any has passed");
    }

    #[tokio::test(start_paused = true)]
    async fn pending_counts_are_recorded_at_the_end() {
        let repeats = repeats();
        for _ in 0..8 {
            repeats.is_first(Group::Accounts, refusal(1000, "b", "denied"));
        }
        repeats.flush();
        repeats.flush();
        tokio::time::sleep(2 * PERIOD).await;
        assert_eq!(written("b"), [7]);
    }

    #[tokio::test(start_paused = true)]
    async fn many_users_take_bounded_memory() {
        let repeats = repeats();
        let is_first = |uid: &u32| repeats.is_first(Group::Nameless, refusal(*uid, "c", "denied"));
        assert_eq!((0..100_000).filter(is_first).count(), MOST + 1);
        assert_eq!(repeats.lock()[Group::Nameless as usize].len(), MOST + 1);
        repeats.flush();
        assert_eq!(written("c"), [100_000 - MOST as u64 - 1]);
    }

    #[tokio::test(start_paused = true)]
    async fn users_without_a_name_do_not_hide_accounts() {
        let repeats = repeats();
        for uid in 100_000..165_536 {
            repeats.is_first(Group::Nameless, refusal(uid, "d", "denied"));
        }
        let account = refusal(1000, "d", "denied");
        assert!(repeats.is_first(Group::Accounts, account));
        assert!(!repeats.is_first(Group::Accounts, account));
        repeats.flush();
        assert!(WRITTEN.lock().unwrap().contains(&(account, 1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_limited_number_of_processes_is_counted_separately() {
        let repeats = repeats();
        let grant = |process| Key {
            process: Some(process),
            job: Some(1),
            ..refusal(1000, "f", "granted")
        };
        let is_first = |process: &u32| repeats.is_first(Group::Grants, grant(*process));
        // The first decision of the shared count is recorded too.
        assert_eq!((1..1000).filter(is_first).count(), MOST_PROCESSES + 1);
        assert_eq!((1..1000).filter(is_first).count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_grant_of_each_job_is_always_recorded() {
        let repeats = repeats();
        let grant = |job| Key {
            job: Some(job),
            ..refusal(1000, "e", "granted")
        };
        let jobs = 0..2 * MOST as u32;
        assert!(
            jobs.clone()
                .all(|job| repeats.is_first(Group::Grants, grant(job)))
        );
        let again = jobs.filter(|job| repeats.is_first(Group::Grants, grant(*job)));
        assert_eq!(
            again.count(),
            MOST,
            "grants beyond the limit are recorded each time"
        );
    }
}
