//! Backups that would keep a domain from being backed up for good, and end when root starts one of it.
//!
//! A domain has one backup at a time. Whoever may make one could begin it and never let it end.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Job, Jobs, State};
use crate::domain::Domain;
use crate::plan::{Destination, Task};

/// Root's backups wait for none that copies less than this, in bytes a second.
const LEAST_RATE: u64 = 1 << 20;
/// Before that, how fast a backup is says nothing.
const GRACE: Duration = Duration::from_secs(60);
const ROOT: u32 = 0;

/// Why a backup was ended for another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Displaced {
    Slow,
    /// Nobody hears of its end, and it is not in a store.
    Orphan,
}

impl fmt::Display for Displaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("root started a backup of the domain, and this one ")?;
        f.write_str(match self {
            Self::Slow => "copied less than 1 MiB a second",
            Self::Orphan => "was made for a connection that had left",
        })
    }
}

impl Jobs {
    /// Ends the domain's backup if it must not keep one of `uid`'s waiting, and waits for its end, for as long as anything that
    /// makes no progress is waited for. Whether the domain may be free now.
    pub async fn displace(&self, domain: &Domain, uid: u32) -> bool {
        let name = domain.unique_name();
        let mut jobs = self.list().into_iter();
        let running = jobs.find(|job| {
            job.domain.unique_name() == name
                && job.plan.task == Task::Backup
                && job.status.borrow().outcome.is_none()
        });
        let Some((job, why)) = running.and_then(|job| Some((job.clone(), job.displaceable(uid)?))) else {
            return false;
        };
        // It says something of a job that ends as cancelled only.
        job.update(|status| status.displaced = Some(why));
        if job.cancel().await.is_err() {
            return false;
        }
        tracing::warn!(job = job.id, domain = domain.name, started_by = job.started_by.uid, %why, "a backup is ended for another one");
        tokio::time::timeout(self.patience(), job.wait()).await.is_ok()
    }

    /// Takes notice when the connection that started the job has `left` the bus.
    pub fn watch_starter(self: &Arc<Self>, job: &Arc<Job>, left: impl Future<Output = ()> + Send + 'static) {
        let (jobs, job) = (self.clone(), job.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = left => job.is_orphan.store(true, Ordering::Relaxed),
                _ = job.wait() => {}
                () = jobs.setting.stop.cancelled() => {}
            }
        });
    }
}

impl Job {
    fn displaceable(&self, uid: u32) -> Option<Displaced> {
        if uid != ROOT || self.started_by.uid == ROOT {
            return None;
        }
        let status = self.status.borrow();
        let copying =
            (status.state == State::Running).then(|| (status.bytes_done(), self.taken_up.elapsed()));
        if is_slow(*self.speed.borrow(), copying) {
            return Some(Displaced::Slow);
        }
        let orphan = self.plan.destination == Destination::Caller && self.is_orphan.load(Ordering::Relaxed);
        orphan.then_some(Displaced::Orphan)
    }
}

/// `limit` in bytes a second, 0 for none; `copying` is what was copied and in which time, while it copies.
fn is_slow(limit: u64, copying: Option<(u64, Duration)>) -> bool {
    let is_limited = (1..LEAST_RATE).contains(&limit);
    let crawls = |(bytes, time): (u64, Duration)| time >= GRACE && bytes / time.as_secs().max(1) < LEAST_RATE;
    is_limited || copying.is_some_and(crawls)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_is_slow_by_its_limit_or_by_what_it_copied() {
        let copied = |bytes, seconds| Some((bytes, Duration::from_secs(seconds)));
        assert!(is_slow(1, None));
        assert!(is_slow(LEAST_RATE - 1, copied(1 << 40, 1)));
        assert!(!is_slow(0, None));
        assert!(!is_slow(LEAST_RATE, None));
        assert!(!is_slow(0, copied(0, 59)), "it has just begun");
        assert!(is_slow(0, copied(60 << 20, 61)));
        assert!(!is_slow(0, copied(61 << 20, 61)));
    }
}
