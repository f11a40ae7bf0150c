//! The entry of a backup: it gets its domain and a place now, waits for them, or displaces a slow backup that blocks
//! them.
//!
//! A domain has one backup at a time, and the host a limited number. A user, or a malicious QEMU, could start a backup
//! that never ends.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Claim, Entered, Jobs, ROOT};
use crate::domain::Domain;
use crate::job::{Displaced, Error, Job, State};
use crate::plan::Destination;
use crate::quota::Share;

/// Root's backup displaces a backup that copies less than this, in bytes a second.
const LEAST_RATE: u64 = 1 << 20;
/// Root's backup displaces a backup that would take longer than this.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// How long a backup must copy before its rate is judged.
const GRACE: Duration = Duration::from_secs(60);
/// How often backups are judged while others wait.
const LOOK: Duration = Duration::from_secs(5);
/// How long a caller waits for a reservation to end, or for the residue of an ended job.
const SHORTLY: Duration = Duration::from_secs(10);

impl Jobs {
    /// Cancels the domain's backup if it must not block a backup of user `uid`, and waits for its end until the stall
    /// timeout. Returns whether the domain may be free now.
    async fn displace(&self, name: &str, uid: u32) -> bool {
        let Some((job, why)) = self
            .running(name)
            .and_then(|job| Some((job.clone(), job.displaceable(uid)?)))
        else {
            return false;
        };
        if job.cancel_because(why).await.is_err() {
            return false;
        }
        tracing::warn!(
            job = job.id,
            domain = job.domain.name,
            started_by = job.started_by.uid,
            %why,
            "cancelling a backup in favour of root's backup"
        );
        tokio::time::timeout(self.patience(), job.wait()).await.is_ok()
    }

    /// Waits shortly until QEMU has no objects of the domain's ended jobs.
    pub async fn wait_until_qemu_has_no_residue(&self, domain: &Domain) -> Result<(), Error> {
        let (name, until) = (domain.unique_name(), tokio::time::Instant::now() + SHORTLY);
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            let Some(job) = self.left_in_qemu(&name) else {
                return Ok(());
            };
            if tokio::time::timeout_at(until, freed).await.is_err() {
                return Err(Error::Left { job });
            }
        }
    }

    fn running(&self, name: &str) -> Option<Arc<Job>> {
        let mut jobs = self.list().into_iter();
        jobs.find(|job| {
            job.domain.unique_name() == name
                && job.plan().is_some()
                && job.status.borrow().state != State::Queued
                && job.status.borrow().outcome.is_none()
        })
    }

    /// Occupies the domain and a place, or joins the queue. Root's backups precede those of other users, and short
    /// obstacles are waited for. Calls `tried` after the first attempt.
    pub async fn enter_or_displace(
        self: &Arc<Self>,
        domain: &Arc<Domain>,
        claim: Claim,
        (descriptors, passes_files): (&Arc<Share>, bool),
        tried: impl FnOnce(),
    ) -> Result<Entered, Error> {
        let (name, uid) = (claim.domain.clone(), claim.uid);
        let enter = || self.enter(domain, claim.clone(), descriptors.clone(), passes_files);
        let mut reserved = enter();
        tried();
        let mut until = tokio::time::Instant::now() + SHORTLY;
        loop {
            let may_wait = match &reserved {
                Err(Error::Left { .. }) => true,
                Err(Error::Busy { .. }) if uid == ROOT => match self.running(&name) {
                    Some(job) if job.started_by.uid == ROOT => false,
                    running => {
                        self.lock().busy.await_root(&name);
                        let is_displaced = running.is_some() && self.displace(&name, uid).await;
                        if is_displaced {
                            // The job ends a moment before its place becomes free.
                            until = tokio::time::Instant::now() + SHORTLY;
                        }
                        running.is_none() || is_displaced
                    }
                },
                _ => false,
            };
            if !may_wait {
                return reserved;
            }
            let freed = self.freed.notified();
            tokio::pin!(freed);
            // Registered before the attempt, so that no notification is missed.
            freed.as_mut().enable();
            reserved = enter();
            if reserved.is_err() && tokio::time::timeout_at(until, freed).await.is_err() {
                return reserved;
            }
        }
    }

    /// While backups wait, gives them the places of crawling ones. One task does this, and ends when no backup waits.
    pub(in crate::job) fn watch_crawling(self: &Arc<Self>) {
        let mut table = self.lock();
        if table.queue.is_empty() || std::mem::replace(&mut table.is_watched, true) {
            return;
        }
        drop(table);
        let jobs = self.clone();
        self.tasks.spawn(async move {
            let stop = &jobs.context.stop;
            while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
                let mut table = jobs.lock();
                if table.queue.is_empty() {
                    table.is_watched = false;
                    return;
                }
                drop(table);
                jobs.pass_crawling();
            }
        });
    }

    fn pass_crawling(self: &Arc<Self>) {
        let crawling = self.list().into_iter().filter(|job| job.crawls());
        for job in crawling {
            let mut table = self.lock();
            let ticket = table.tickets.get(&job.id).copied();
            let passed = ticket.is_some_and(|ticket| table.queue.crawl(ticket));
            drop(table);
            if passed {
                tracing::info!(
                    job = job.id,
                    domain = job.domain.name,
                    "other backups get the place of this one, because it copies less than 1 MiB a second, or would \
                     take longer than a day"
                );
            }
        }
        self.give_places();
    }

    /// Marks the job as orphaned when the connection that started it has `left` the bus.
    pub fn watch_starter(self: &Arc<Self>, job: &Arc<Job>, left: impl Future<Output = ()> + Send + 'static) {
        let (jobs, job) = (self.clone(), job.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = left => job.is_orphan.store(true, Ordering::Relaxed),
                _ = job.wait() => {}
                () = jobs.context.stop.cancelled() => {}
            }
        });
    }
}

impl Job {
    fn displaceable(&self, uid: u32) -> Option<Displaced> {
        if uid != ROOT || self.started_by.uid == ROOT {
            return None;
        }
        if self.crawls() {
            return Some(Displaced::Slow);
        }
        let orphan = self
            .plan()
            .is_some_and(|plan| plan.destination == Destination::Caller)
            && self.is_orphan.load(Ordering::Relaxed);
        orphan.then_some(Displaced::Orphan)
    }

    /// Returns whether this is a running backup that would take very long.
    fn crawls(&self) -> bool {
        let status = self.status.borrow();
        if self.plan().is_none() || status.state == State::Queued || status.outcome.is_some() {
            return false;
        }
        let copying =
            (status.state == State::Running).then(|| (status.bytes_done(), self.taken_up.elapsed()));
        let left = status.bytes().saturating_sub(status.bytes_done());
        is_slow(self.speed.limits().own, left, copying)
    }
}

/// Decides whether a backup is too slow. `limit`: bytes a second, 0 for none. `left`: remaining bytes. `copying`: the
/// bytes copied and the time taken, once QEMU copies. Before that, `left` is the virtual size, which does not predict
/// the duration for a sparse disk.
fn is_slow(limit: u64, left: u64, copying: Option<(u64, Duration)>) -> bool {
    let least = LEAST_RATE.max(left / LONGEST.as_secs());
    let is_limited = (1..LEAST_RATE).contains(&limit);
    let crawls = |(bytes, time): (u64, Duration)| time >= GRACE && bytes / time.as_secs().max(1) < least;
    is_limited || copying.is_some_and(crawls)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_is_slow_by_its_limit_or_by_what_it_copied() {
        let copied = |bytes, seconds| Some((bytes, Duration::from_secs(seconds)));
        assert!(is_slow(1, 0, None));
        assert!(is_slow(LEAST_RATE - 1, 0, copied(1 << 40, 1)));
        assert!(!is_slow(0, 1 << 40, None));
        assert!(!is_slow(LEAST_RATE, 1 << 30, None));
        assert!(
            !is_slow(100 << 20, 16 << 40, None),
            "a sparse disk may hold little"
        );
        assert!(!is_slow(0, 0, copied(0, 59)), "it has just begun");
        assert!(is_slow(0, 0, copied(60 << 20, 61)));
        assert!(!is_slow(0, 0, copied(61 << 20, 61)));
        assert!(is_slow(0, 1 << 40, copied(61 << 20, 61)));
    }
}
