//! The domains with running work, and those that are kept for root. Pure except for the clock.
//!
//! A domain has one backup, or one change of its checkpoints, at a time. After a restart of the service it can have
//! two: the hanging job of an earlier instance, and a later one.

use std::collections::HashMap;
use std::time::{Duration, Instant};

pub const ROOT: u32 = 0;

/// How long other users must wait after root found a backup of another user running.
const AWAITED: Duration = Duration::from_secs(600);

/// Keyed by the domains' unique names. A domain that replaces another has the same name, and may be the same VM.
#[derive(Debug, Default)]
pub struct Busy {
    work: HashMap<String, Work>,
    /// Domains that root could not back up because of another user's backup, and until when others must wait.
    awaited: HashMap<String, Instant>,
}

/// The number of running jobs of a domain.
#[derive(Debug, Default)]
struct Work {
    all: usize,
    of_root: usize,
}

impl Busy {
    pub fn contains(&self, domain: &str) -> bool {
        self.work.contains_key(domain)
    }

    /// Returns whether this user's work on the domain may begin.
    pub fn is_free_for(&self, domain: &str, uid: u32) -> bool {
        let now = Instant::now();
        let is_awaited = || self.awaited.get(domain).is_some_and(|until| *until > now);
        !self.contains(domain) && (uid == ROOT || !is_awaited())
    }

    /// Counts this user's work, even if other work on the domain runs.
    pub fn begin(&mut self, domain: &str, uid: u32) {
        let work = self.work.entry(domain.to_owned()).or_default();
        work.all += 1;
        if uid == ROOT {
            work.of_root += 1;
            self.is_here(domain);
        }
    }

    /// Removes this user's work from the count.
    pub fn end(&mut self, domain: &str, uid: u32) {
        let Some(work) = self.work.get_mut(domain) else {
            return;
        };
        work.all -= 1;
        work.of_root -= usize::from(uid == ROOT);
        if work.all == 0 {
            self.work.remove(domain);
        }
    }

    /// Makes other users wait for root's backup of the domain, unless work of root's already runs.
    pub fn await_root(&mut self, domain: &str) {
        let now = Instant::now();
        self.awaited.retain(|_, until| *until > now);
        if self.work.get(domain).is_none_or(|work| work.of_root == 0) {
            self.awaited.insert(domain.to_owned(), now + AWAITED);
        }
    }

    /// Ends that wait: root's backup of the domain runs, or is in the queue, where it precedes others.
    pub fn is_here(&mut self, domain: &str) {
        self.awaited.remove(domain);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER: u32 = 1000;

    #[test]
    fn an_awaited_domain_is_kept_for_root_until_root_has_come() {
        let mut busy = Busy::default();
        busy.begin("web", USER);
        assert!(!busy.is_free_for("web", ROOT) && busy.is_free_for("db", USER));
        busy.await_root("web");
        busy.end("web", USER);
        assert!(!busy.is_free_for("web", USER) && busy.is_free_for("web", ROOT));
        busy.begin("web", ROOT);
        busy.await_root("web");
        busy.end("web", ROOT);
        assert!(busy.is_free_for("web", USER), "root's own backup was in the way");
    }

    #[test]
    fn a_domain_with_two_jobs_is_free_after_both() {
        let mut busy = Busy::default();
        busy.begin("web", ROOT);
        busy.begin("web", USER);
        busy.end("web", ROOT);
        assert!(busy.contains("web"));
        busy.await_root("web");
        busy.end("web", USER);
        assert!(!busy.contains("web") && !busy.is_free_for("web", USER));
    }
}
