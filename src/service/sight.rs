//! Who may know of what.
//!
//! To see a domain is to know that it exists; to read it is to know what it has and does, and nobody reads what it does
//! not see. What a user registered is seen by that user and root, and by others only where a rule says so.

use std::sync::Arc;

use futures_util::future::join_all;

use super::{Service, details};
use crate::access::{self, Caller, Details, Permission};
use crate::domain::{self, Domain};
use crate::error::{Error, Kind, Result};
use crate::job::Job;

impl Service {
    /// The domain of that name or UUID, if `caller` may know of it.
    pub async fn domain(&self, caller: &Caller, name: &str) -> Result<Arc<Domain>> {
        for group in self.domains.find(name, caller.uid) {
            match self.visible(caller, group).await.as_slice() {
                [] => {}
                [one] => return Ok(one.clone()),
                // Several users' own, to one who sees them all.
                _ => break,
            }
        }
        // The same for a domain that is hidden as for one that was never there.
        Err(domain::Error::no_such_domain(name).into())
    }

    /// The domains that `caller` may know of, by name.
    pub async fn list_domains(&self, caller: &Caller) -> Result<Vec<Arc<Domain>>> {
        let details = service_details();
        if !self
            .access
            .allows(caller, Permission::ServiceSearchDomains, None, &details)
            .await
        {
            return Err(access::Error::Denied(Permission::ServiceSearchDomains).into());
        }
        Ok(self.visible_domains(caller).await)
    }

    /// The same, for a caller that did not ask for a list.
    pub async fn visible_domains(&self, caller: &Caller) -> Vec<Arc<Domain>> {
        self.visible(caller, self.domains.list()).await
    }

    async fn visible(&self, caller: &Caller, domains: Vec<Arc<Domain>>) -> Vec<Arc<Domain>> {
        let seen = join_all(domains.iter().map(|domain| self.sees(caller, domain))).await;
        let seen = domains.into_iter().zip(seen);
        seen.filter_map(|(domain, seen)| seen.then_some(domain)).collect()
    }

    /// Whether `caller` may know that `domain` exists.
    pub async fn sees(&self, caller: &Caller, domain: &Domain) -> bool {
        let may = async |permission| self.may(caller, permission, domain).await;
        (!domain.is_foreign(caller.uid) || may(Permission::DomainSeeForeign).await)
            && may(Permission::DomainGetattr).await
    }

    /// Whether `caller` may know what `domain` has and does.
    pub async fn reads(&self, caller: &Caller, domain: &Domain) -> bool {
        self.sees(caller, domain).await && self.may(caller, Permission::DomainRead, domain).await
    }

    async fn may(&self, caller: &Caller, permission: Permission, domain: &Domain) -> bool {
        let details = details(domain);
        self.access
            .allows(caller, permission, Some(domain.id), &details)
            .await
    }

    /// The job of that number, if `caller` started it or may read its domain.
    pub async fn job(&self, caller: &Caller, id: u32) -> Result<Arc<Job>> {
        if let Some(job) = self.jobs.get(id)
            && self.knows(caller, &job).await
        {
            return Ok(job);
        }
        Err(Error::new(Kind::NoSuchJob, format!("no job {id}")))
    }

    /// Jobs that `caller` started or whose domain it may read, by number.
    pub async fn list_jobs(&self, caller: &Caller) -> Vec<Arc<Job>> {
        let jobs = self.jobs.list();
        let known = join_all(jobs.iter().map(|job| self.knows(caller, job))).await;
        let known = jobs.into_iter().zip(known);
        known.filter_map(|(job, known)| known.then_some(job)).collect()
    }

    /// Whether `caller` may know of `job`.
    pub async fn knows(&self, caller: &Caller, job: &Job) -> bool {
        job.started_by == caller.uid || self.reads(caller, &job.domain).await
    }
}

/// What an authority is told where there is no domain.
pub(super) fn service_details() -> Details {
    Details::default().with("driver", super::DRIVER)
}
