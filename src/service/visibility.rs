//! Visibility of domains and their objects for callers.
//!
//! A caller that sees a domain knows its existence. A caller that reads it also knows its disks and jobs; this requires
//! seeing it. A domain that a user registered is visible to that user and root, and to others only by a polkit rule.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use futures_util::future::join_all;

use super::{Service, details};
use crate::access::{self, Caller, Details, Permission, ReadAnswer};
use crate::catalog::EndedJob;
use crate::domain::{self, Domain, Identity};
use crate::error::{Error, Kind, Result, shown};
use crate::job::Job;

impl Service {
    /// The domain with this name or UUID, if `caller` may see it.
    pub async fn domain(&self, caller: &Caller, name: &str) -> Result<Arc<Domain>> {
        for group in self.domains.find(name, caller.uid) {
            let answers = join_all(group.iter().map(|domain| self.view(caller, domain, false))).await;
            match complete(group, answers)?.as_slice() {
                [] => {}
                [one] => return Ok(one.clone()),
                _ => return Err(domain::Error::Ambiguous(shown(name)).into()),
            }
        }
        // Hidden and missing domains get the same answer.
        self.confirm(caller, name).await?;
        Err(match self.others(caller, name).await {
            None => domain::Error::no_such_domain(name),
            Some(others) => domain::Error::OnlyOthers {
                name: shown(name),
                others,
            },
        }
        .into())
    }

    /// The names of other users' domains under that name, as far as `caller` may see them.
    async fn others(&self, caller: &Caller, name: &str) -> Option<String> {
        const MOST: usize = 3;
        let mut others = self.domains.others(name, caller.uid);
        others.truncate(MOST);
        let answers = join_all(others.iter().map(|domain| self.view(caller, domain, false))).await;
        let others = complete(others, answers).ok()?;
        let names = others
            .iter()
            .map(|domain| format!("'{}'", shown(&domain.unique_name())));
        let names: Vec<_> = names.collect();
        (!names.is_empty()).then(|| names.join(", "))
    }

    /// The domains that `caller` may see, by name.
    pub async fn list_domains(&self, caller: &Caller) -> Result<Vec<Arc<Domain>>> {
        let permission = Permission::ServiceSearchDomains;
        let details = service_details();
        match self.access.check_read(caller, permission, None, &details).await {
            ReadAnswer::Allowed => {}
            ReadAnswer::Refused => return Err(access::Error::Denied(permission).into()),
            ReadAnswer::Unknown => return Err(access::Error::Unknown.into()),
        }
        let domains = self.domains.list();
        let answers = join_all(domains.iter().map(|domain| self.view(caller, domain, false))).await;
        Ok(complete(domains, answers)?)
    }

    /// The domain with this id, if `caller` may see it.
    pub async fn domain_of_id(&self, caller: &Caller, id: u64) -> Result<Option<Arc<Domain>>> {
        let Some(domain) = self.domains.get(id) else {
            return Ok(None);
        };
        let allowed = self.view(caller, &domain, false).await.allowed()?;
        Ok(allowed.then_some(domain))
    }

    /// Fails if polkit cannot be asked. The service calls this before it reports an object as missing, hidden or not.
    pub async fn confirm(&self, caller: &Caller, name: &str) -> Result<()> {
        let details = unknown_domain(name);
        let permission = Permission::DomainGetattr;
        Ok(self.access.confirm(caller, permission, &details).await?)
    }

    /// As [`Service::confirm`] for a list, which may be empty. A cached answer suffices.
    pub(super) async fn can_list(&self, caller: &Caller) -> Result<()> {
        let details = unknown_domain("");
        let permission = Permission::DomainGetattr;
        let answer = self.access.check_read(caller, permission, None, &details).await;
        Ok(answer.allowed().map(drop)?)
    }

    /// Fails unless `caller` may read `domain`.
    pub async fn require_read(&self, caller: &Caller, domain: &Domain) -> Result<()> {
        match self.view(caller, domain, true).await.allowed()? {
            true => Ok(()),
            false => Err(access::Error::Denied(Permission::DomainRead).into()),
        }
    }

    /// Whether `caller` may see `domain`.
    pub async fn sees(&self, caller: &Caller, domain: &Domain) -> bool {
        self.view(caller, domain, false).await == ReadAnswer::Allowed
    }

    /// Whether `caller` may read `domain`.
    pub async fn reads(&self, caller: &Caller, domain: &Domain) -> bool {
        self.view(caller, domain, true).await == ReadAnswer::Allowed
    }

    /// Whether `caller` may see `domain`, or with `all` read it.
    pub(super) async fn view(&self, caller: &Caller, domain: &Domain, all: bool) -> ReadAnswer {
        // If the owner has no name, only the registration proves the user.
        let registered = || self.domains.get(domain.id).is_some();
        let foreign = domain.is_foreign_to(caller.uid, caller.user.as_deref())
            || !domain.has_lasting_owner() && !registered();
        let permissions = [
            (Permission::DomainSeeForeign, foreign),
            (Permission::DomainGetattr, true),
            (Permission::DomainRead, all),
        ];
        let details = details(domain);
        let object = Some((domain.id, domain.snapshot().uuid));
        for (permission, needed) in permissions {
            if needed {
                let answer = self.access.check_read(caller, permission, object, &details).await;
                if answer != ReadAnswer::Allowed {
                    return answer;
                }
            }
        }
        ReadAnswer::Allowed
    }

    /// The job with this number, if `caller` started it or may read its domain.
    pub async fn job(&self, caller: &Caller, id: u32) -> Result<Arc<Job>> {
        match self.job_of_id(caller, id).await? {
            Some(job) => Ok(job),
            None => {
                self.confirm(caller, "").await?;
                Err(Error::new(Kind::NoSuchJob, format!("no job {id}")))
            }
        }
    }

    /// As [`Service::job`], but `None` if there is no such job.
    pub async fn job_of_id(&self, caller: &Caller, id: u32) -> Result<Option<Arc<Job>>> {
        let found = self.jobs.find(id).await.map_err(|error| {
            // The owner of an unreadable job is unknown, so the error contains no details.
            tracing::error!(job = id, %error, "cannot read a job");
            Error::new(
                Kind::Internal,
                "cannot read the jobs: the service's log has the reason",
            )
        });
        let Some(job) = found? else { return Ok(None) };
        let allowed = self.view_job(caller, &job).await.allowed()?;
        Ok(allowed.then_some(job))
    }

    /// The jobs that `caller` started or whose domain it may read, by number. Lists active and recent jobs; with
    /// `ended` all recorded jobs.
    pub async fn list_jobs(&self, caller: &Caller, ended: bool) -> Result<Vec<ListedJob>> {
        self.can_list(caller).await?;
        let jobs = self.jobs.list();
        let answers = join_all(jobs.iter().map(|job| self.view_job(caller, job))).await;
        let known: HashSet<u32> = jobs.iter().map(|job| job.id).collect();
        let jobs = complete(jobs, answers)?;
        let mut listed: Vec<ListedJob> = jobs.iter().map(|job| ListedJob::of(job, caller)).collect();
        if ended {
            // The list takes memory until it is sent.
            let share = self.lists.share(caller.uid).await;
            let turn = share.turn().await;
            let mut history = self.jobs.history().await?;
            drop(turn);
            history.retain(|(job, _)| !known.contains(&job.id));
            listed.extend(self.readable(caller, history).await?);
            listed.sort_by_key(|job| job.id);
            drop(share);
        }
        Ok(listed)
    }

    /// The jobs that `caller` may see. Each domain is asked about once.
    async fn readable(
        &self,
        caller: &Caller,
        history: Vec<(EndedJob, Arc<Domain>)>,
    ) -> Result<Vec<ListedJob>> {
        let domains = history.iter().map(|(_, domain)| (domain.id, domain));
        let domains: BTreeMap<u64, &Arc<Domain>> = domains.collect();
        let mut owners = Owners::default();
        let mut asked = Vec::new();
        for domain in domains.into_values() {
            if !self.hides_owner(caller, domain, &mut owners).await? {
                asked.push(domain);
            }
        }
        let answers = join_all(asked.iter().map(|domain| self.view(caller, domain, true))).await;
        let read = complete(asked.iter().map(|domain| domain.id).collect(), answers)?;
        let read: HashSet<u64> = read.into_iter().collect();
        Ok(history
            .into_iter()
            .filter(|(_, domain)| read.contains(&domain.id))
            .map(|(job, domain)| ListedJob {
                id: job.id,
                domain: Identity {
                    name: job.domain.name,
                    ..domain.identity()
                }
                .name_for(caller.uid),
                state: job.result,
            })
            .collect())
    }

    /// Whether `caller` sees none of the former domains of this domain's owner. A list asks polkit one question for
    /// each owner of former domains, without a name, because a user can have had any number of them. Current domains
    /// are limited, so the list asks about each.
    pub(super) async fn hides_owner(
        &self,
        caller: &Caller,
        domain: &Domain,
        owners: &mut Owners,
    ) -> Result<bool> {
        if !domain.is_absent() || !domain.is_foreign_to(caller.uid, caller.user.as_deref()) {
            return Ok(false);
        }
        let owner = (domain.owner, domain.shown_owner().to_owned());
        if let Some(hides) = owners.get(&owner) {
            return Ok(*hides);
        }
        let details = service_details()
            .with("domain", "")
            .with("domain_name", "")
            .with("domain_uuid", "")
            .with("domain_owner", domain.shown_owner());
        let permission = Permission::DomainSeeForeign;
        let hides = !self
            .access
            .check_read_uncached(caller, permission, &details)
            .await
            .allowed()?;
        owners.insert(owner, hides);
        Ok(hides)
    }

    async fn view_job(&self, caller: &Caller, job: &Job) -> ReadAnswer {
        if self.is_starter(caller, job) {
            return ReadAnswer::Allowed;
        }
        self.view(caller, &job.domain, true).await
    }
}

/// Owners of former domains, by uid and name, and whether all their former domains are hidden.
pub(super) type Owners = HashMap<(u32, String), bool>;

/// An entry of the list of jobs.
#[derive(Debug)]
pub struct ListedJob {
    pub id: u32,
    /// The name by which the caller knows the domain.
    pub domain: String,
    /// The state on the bus.
    pub state: String,
}

impl ListedJob {
    fn of(job: &Job, caller: &Caller) -> Self {
        Self {
            id: job.id,
            domain: job.domain.name_for(caller.uid),
            state: job.status().state_word().to_owned(),
        }
    }
}

/// Filters a list by the answers. If an answer is unknown, it fails instead, because the caller would take a partial
/// list for complete.
fn complete<T>(objects: Vec<T>, answers: Vec<ReadAnswer>) -> std::result::Result<Vec<T>, access::Error> {
    if answers.contains(&ReadAnswer::Unknown) {
        return Err(access::Error::Unknown);
    }
    let seen = objects.into_iter().zip(answers);
    Ok(seen
        .filter_map(|(object, answer)| (answer == ReadAnswer::Allowed).then_some(object))
        .collect())
}

/// The polkit details of a domain that does not exist.
fn unknown_domain(name: &str) -> Details {
    service_details()
        .with("domain", name)
        .with("domain_name", name)
        .with("domain_uuid", "")
        .with("domain_owner", "")
}

/// The polkit details of the service itself.
pub(super) fn service_details() -> Details {
    Details::default().with("driver", super::DRIVER)
}
