//! Removes the residue of ended jobs in the background.

use std::sync::Arc;

use tokio_util::sync::{CancellationToken, DropGuard};

use super::resume;
use crate::job::bandwidth::Part;
use crate::job::ending::{Ending, Residue, Uncleaned};
use crate::job::{Job, Jobs};

impl Jobs {
    /// Follows up when the service's work on a job has ended: expiry, and removal of residue.
    pub(in crate::job) async fn after(self: &Arc<Self>, job: &Arc<Job>, ending: Ending) {
        let is_queued = job.is_queued();
        let (residue, part) = match ending {
            Ending::Ended(residue, part) => (residue, part),
            Ending::Detached => {
                let (job, domain) = (job.id, &job.domain.name);
                match is_queued {
                    true => tracing::info!(job, domain, "the backup stays queued"),
                    false => tracing::info!(job, domain, "QEMU continues the backup without the service"),
                }
                return;
            }
        };
        self.forget_oldest();
        self.forget_later(job.id);
        // If the removal of files hangs, its own thread finishes it, or the next instance of the service does.
        let residue = Residue {
            on_disk: false,
            ..residue
        };
        self.clean_up(Uncleaned {
            job: job.clone(),
            residue,
            _part: part
                .filter(|_| residue.in_qemu)
                .and_then(Part::end)
                .map(|part| self.give_back_later(part)),
        });
    }

    /// Returns a part of a store's bandwidth when the guard is dropped, or after the stall timeout. Without the
    /// timeout, a copy that never stops would slow the others down for ever.
    pub(in crate::job) fn give_back_later(&self, part: Part) -> DropGuard {
        let over = CancellationToken::new();
        let guard = over.clone().drop_guard();
        let (stop, patience) = (self.context.stop.clone(), self.patience());
        self.tasks.spawn(async move {
            let over = tokio::time::timeout(patience, over.cancelled());
            stop.run_until_cancelled(over).await;
            drop(part);
        });
        guard
    }

    /// Queues the removal of an ended job's residue. One task for each domain removes it in order.
    pub(in crate::job) fn clean_up(self: &Arc<Self>, uncleaned: Uncleaned) {
        if !uncleaned.residue.in_qemu && !uncleaned.residue.on_disk {
            return;
        }
        let domain = uncleaned.job.domain.unique_name();
        let mut table = self.lock();
        let queue = table.cleanups.entry(domain.clone()).or_default();
        queue.push_back(uncleaned);
        if queue.len() > 1 {
            return;
        }
        drop(table);
        let jobs = self.clone();
        self.tasks.spawn(async move {
            while let Some((job, residue)) = jobs.next_cleanup(&domain) {
                resume::clean_up(&job, residue, &jobs.context).await;
                if let Some(queue) = jobs.lock().cleanups.get_mut(&domain) {
                    queue.pop_front();
                }
                jobs.freed.notify_waiters();
            }
        });
    }

    /// Returns the first entry of the queue. It stays in the queue until its residue is removed.
    fn next_cleanup(&self, domain: &str) -> Option<(Arc<Job>, Residue)> {
        let mut table = self.lock();
        let next = table.cleanups.get(domain).and_then(|queue| queue.front());
        let next = next.map(|uncleaned| (uncleaned.job.clone(), uncleaned.residue));
        if next.is_none() || self.context.stop.is_cancelled() {
            table.cleanups.remove(domain);
            return None;
        }
        next
    }
}
