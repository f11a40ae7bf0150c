//! Removes ended jobs from the table after a while. The catalog keeps their history.

use std::sync::Arc;
use std::time::Duration;

use super::Jobs;

/// How long ended jobs stay in the table, and how many at most.
pub const KEEP: Duration = Duration::from_secs(600);
pub const KEEP_AT_MOST: u32 = 100;

impl Jobs {
    /// Removes an ended job from the table after a while. The timer does not keep the service from stopping.
    pub(in crate::job) fn forget_later(self: &Arc<Self>, id: u32) {
        let mut table = self.lock();
        // The table may have dropped this job already because it holds a limited number of ended jobs.
        if !table.jobs.contains_key(&id) {
            return;
        }
        let jobs = self.clone();
        let forgetting = self.tasks.spawn(async move {
            let stop = &jobs.context.stop;
            if stop.run_until_cancelled(tokio::time::sleep(KEEP)).await.is_some() {
                jobs.forget(id);
            }
        });
        table.forgetting.insert(id, forgetting.abort_handle());
    }

    pub(in crate::job) fn forget_oldest(&self) {
        let ended: Vec<u32> = {
            let table = self.lock();
            let ended = table
                .jobs
                .values()
                .filter(|job| job.status.borrow().outcome.is_some());
            ended.map(|job| job.id).collect()
        };
        let surplus = ended.len().saturating_sub(KEEP_AT_MOST as usize);
        ended.into_iter().take(surplus).for_each(|id| self.forget(id));
    }

    fn forget(&self, id: u32) {
        let mut table = self.lock();
        table.jobs.remove(&id);
        if let Some(forgetting) = table.forgetting.remove(&id) {
            forgetting.abort();
        }
    }
}
