//! Ended jobs: those in the table, and those of which only the catalog knows.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use super::{Error, Job, Jobs, record};
use crate::catalog::EndedJob;
use crate::domain::Domain;

impl Jobs {
    /// Returns the job with this id, if it is in the table or in the history.
    pub async fn find(&self, id: u32) -> Result<Option<Arc<Job>>, Error> {
        if let Some(job) = self.lock().jobs.get(&id).cloned() {
            return Ok(Some(job));
        }
        let Some(record) = self.context.catalog.ended_job(id).await? else {
            return Ok(None);
        };
        let domain = record::identity(record.id, &record.domain)
            .map(|identity| self.context.domains.same_or_absent(identity))?;
        let mut job = Job::ended(&record, domain, self.context.catalog.clone())?;
        job.past = true;
        Ok(Some(Arc::new(job)))
    }

    /// Returns the jobs of the history by id, each with its domain. A domain that no longer exists is represented by a
    /// placeholder, the same one for all of its jobs.
    pub async fn history(&self) -> Result<Vec<(EndedJob, Arc<Domain>)>, Error> {
        let mut domains = HashMap::new();
        let mut jobs = Vec::new();
        for ended in self.context.catalog.history().await? {
            let domain = match domains.entry(ended.domain.clone()) {
                Entry::Occupied(entry) => Arc::clone(entry.get()),
                Entry::Vacant(entry) => match record::identity(ended.id, &ended.domain) {
                    Ok(identity) => Arc::clone(entry.insert(self.context.domains.same_or_absent(identity))),
                    Err(error) => {
                        tracing::error!(%error, "cannot read a job's record; the list omits the job");
                        continue;
                    }
                },
            };
            jobs.push((ended, domain));
        }
        Ok(jobs)
    }
}
