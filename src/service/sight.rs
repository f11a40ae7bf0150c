//! Who may know of what.
//!
//! To see a domain is to know that it exists; to read it is to know what it has and does, and nobody reads what it does
//! not see. What a user registered is seen by that user and root, and by others only where a rule says so.

use std::sync::Arc;

use futures_util::future::join_all;

use super::{Service, details};
use crate::access::{self, Caller, Details, Look, Permission};
use crate::domain::{self, Domain};
use crate::error::{Error, Kind, Result};
use crate::job::Job;

impl Service {
    /// The domain of that name or UUID, if `caller` may know of it.
    pub async fn domain(&self, caller: &Caller, name: &str) -> Result<Arc<Domain>> {
        for group in self.domains.find(name, caller.uid) {
            let looks = join_all(group.iter().map(|domain| self.view(caller, domain, false))).await;
            // One that may come first cannot be told from one that is hidden: no other has its name meanwhile.
            let Ok(seen) = whole(group, looks) else { break };
            match seen.as_slice() {
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
        let permission = Permission::ServiceSearchDomains;
        let details = service_details();
        match self.access.look(caller, permission, None, &details).await {
            Look::Allowed => {}
            Look::Refused | Look::Unknown => return Err(access::Error::Denied(permission).into()),
        }
        let domains = self.domains.list();
        let looks = join_all(domains.iter().map(|domain| self.view(caller, domain, false))).await;
        Ok(whole(domains, looks)?)
    }

    /// Whether `caller` may know that `domain` exists.
    pub async fn sees(&self, caller: &Caller, domain: &Domain) -> bool {
        self.view(caller, domain, false).await == Look::Allowed
    }

    /// Whether `caller` may know what `domain` has and does.
    pub async fn reads(&self, caller: &Caller, domain: &Domain) -> bool {
        self.view(caller, domain, true).await == Look::Allowed
    }

    /// What `caller` may know of `domain`: all of it, or that it exists.
    async fn view(&self, caller: &Caller, domain: &Domain, all: bool) -> Look {
        let foreign = domain.is_foreign(caller.uid);
        let permissions = [
            (Permission::DomainSeeForeign, foreign),
            (Permission::DomainGetattr, true),
            (Permission::DomainRead, all),
        ];
        let details = details(domain);
        let object = Some((domain.id, domain.snapshot().uuid));
        for (permission, needed) in permissions {
            if needed {
                let look = self.access.look(caller, permission, object, &details).await;
                if look != Look::Allowed {
                    return look;
                }
            }
        }
        Look::Allowed
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
    pub async fn list_jobs(&self, caller: &Caller) -> Result<Vec<Arc<Job>>> {
        let jobs = self.jobs.list();
        let looks = join_all(jobs.iter().map(|job| self.view_job(caller, job))).await;
        Ok(whole(jobs, looks)?)
    }

    /// Whether `caller` may know of `job`.
    pub async fn knows(&self, caller: &Caller, job: &Job) -> bool {
        self.view_job(caller, job).await == Look::Allowed
    }

    async fn view_job(&self, caller: &Caller, job: &Job) -> Look {
        if job.started_by == caller.uid {
            return Look::Allowed;
        }
        self.view(caller, &job.domain, true).await
    }
}

/// A list without what is refused. One that may lack something for another reason would be taken for all that there is.
fn whole<T>(objects: Vec<T>, looks: Vec<Look>) -> std::result::Result<Vec<T>, access::Error> {
    if looks.contains(&Look::Unknown) {
        return Err(access::Error::Unknown);
    }
    let seen = objects.into_iter().zip(looks);
    Ok(seen
        .filter_map(|(object, look)| (look == Look::Allowed).then_some(object))
        .collect())
}

/// What an authority is told where there is no domain.
pub(super) fn service_details() -> Details {
    Details::default().with("driver", super::DRIVER)
}
