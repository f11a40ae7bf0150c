//! Handles a request, from a caller's words to a running job.
//!
//! Calls `definition`, `access`, `plan`, `target` and `job` in their order. Knows no D-Bus: the bus turns messages into
//! these calls and their results into replies.

mod backups;
mod base;
mod checkpoints;
mod queued;
mod request;
mod sight;
mod stored;

pub use backups::{BackupsWanted, Deletion, PruneWanted};
pub use checkpoints::WhichCheckpoints;
pub use request::{Authorised, Request};
pub use sight::ListedJob;
pub use stored::RestoreRequest;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::access::{Access, Basis, Caller, Details, Permission};
use crate::backups::Backups;
use crate::catalog::Starter;
use crate::config::{Config, Store};
use crate::domain::{self, Domain, Origin, Registration, Registry};
use crate::error::{Error, Kind, Result};
use crate::job::{Job, Jobs, Rescan};
use crate::quota::{Quota, Share};
use crate::turns::Turns;

/// Open files of a caller's, and the count of them, which is held as long as any of them is.
#[derive(Debug)]
pub struct Descriptors {
    pub files: Vec<OwnedFd>,
    pub share: Arc<Share>,
}

/// Long lists of a user's that are made at a time, which bounds the memory for them; and reads for such lists, of all users.
const LISTS_OF_A_USER: usize = 2;
const READS: usize = 4;

/// The driver of the domains, a detail for rules.
const DRIVER: &str = "QEMU";

/// All that the service is, apart from the bus.
pub struct Service {
    pub domains: Arc<Registry>,
    pub jobs: Arc<Jobs>,
    backups: Arc<Backups>,
    access: Access,
    stores: BTreeMap<String, Store>,
    /// Of descriptors that came with calls.
    descriptors: Quota,
    document_bytes: usize,
    /// How long the guest's writes may take during a backup, in milliseconds, where neither the call nor the domain's file says it.
    max_latency: u32,
    /// Long lists that are being made.
    lists: Turns,
}

impl Service {
    pub fn new(
        domains: Arc<Registry>,
        jobs: Arc<Jobs>,
        backups: Arc<Backups>,
        access: Access,
        config: &Config,
    ) -> Self {
        Self {
            domains,
            jobs,
            backups,
            access,
            stores: config.stores.clone(),
            descriptors: config.limits.of_descriptors(),
            document_bytes: config.limits.document_bytes,
            max_latency: config.max_latency,
            lists: Turns::new(READS, LISTS_OF_A_USER),
        }
    }

    /// Counts descriptors that a user passes, from when they come.
    pub fn hold_descriptors(&self, uid: u32, count: usize) -> Result<Share> {
        Ok(self.descriptors.take(uid, count)?)
    }

    /// Takes over a monitor of the caller's own.
    pub async fn register_domain(
        &self,
        caller: &Caller,
        name: &str,
        monitor: Descriptors,
    ) -> Result<Arc<Domain>> {
        domain::check_new_name(name)?;
        let share = monitor.share;
        let Ok([monitor]) = <[OwnedFd; 1]>::try_from(monitor.files) else {
            return Err(Error::new(Kind::InvalidArgs, "a domain has one monitor"));
        };
        let details = sight::service_details().with("domain_name", name);
        let grant = self
            .access
            .require(caller, Permission::ServiceRegisterDomain, &details, None)
            .await?;
        drop(grant);
        // Of a name that the caller may not see it must not learn that it is taken: the domains have names of their own.
        if let Ok(taken) = self.domain(caller, name).await
            && taken.origin == Origin::Configured
        {
            return Err(domain::Error::NameTaken(name.to_owned()).into());
        }
        let registration = Registration {
            name,
            owner: caller.uid,
            sender: &caller.name,
            share,
        };
        Ok(self.domains.register(registration, monitor).await?)
    }

    /// Makes the records of the backups in the stores those that the stores have. `adopt` has keep rules apply to all of
    /// them, whichever service made them.
    pub async fn rescan(&self, caller: &Caller, adopt: bool) -> Result<Rescan> {
        let details = sight::service_details();
        let grant = self
            .access
            .require(caller, Permission::ServiceRescan, &details, None)
            .await?;
        drop(grant);
        Ok(self.jobs.rescan(adopt).await?)
    }

    /// Forgets a connection that has left: what was decided for it, and the domains that it registered.
    pub fn forget_caller(&self, name: &str) {
        self.access.forget(name);
        self.domains.release(name);
    }

    /// Cancels `job`, or one disk of it and so all of it. Who started it may.
    pub async fn cancel(&self, caller: &Caller, job: &Job, disk: Option<&str>) -> Result<()> {
        self.control(caller, job, Permission::DomainAbort).await?;
        match disk {
            Some(disk) => job.cancel_disk(disk).await?,
            None => job.cancel().await?,
        }
        Ok(())
    }

    /// Limits `job` to `bytes_per_second`, all disks together; 0 is unlimited. Who started it may.
    pub async fn set_speed(&self, caller: &Caller, job: &Job, bytes_per_second: u64) -> Result<()> {
        self.control(caller, job, Permission::DomainSetSpeed).await?;
        Ok(job.set_speed(bytes_per_second).await?)
    }

    /// Whether `caller` has the rights of who started `job`.
    pub fn is_starter(&self, caller: &Caller, job: &Job) -> bool {
        job.is_of(&starter(caller))
    }

    /// Passes only the user who started `job`, and callers with `permission` for all its targets.
    async fn control(&self, caller: &Caller, job: &Job, permission: Permission) -> Result<()> {
        let of_stored = job.plan.task.stored().map(|stored| {
            details(&job.domain)
                .with("mode", job.plan.mode())
                .with("backup_id", &stored.id)
                .with("store", &stored.store)
        });
        let asked = match of_stored {
            Some(details) => vec![details],
            None => {
                let places = job.plan.places();
                let asked = places
                    .iter()
                    .map(|place| request::backup_details(&job.domain, place));
                asked.collect()
            }
        };
        // The speed can be changed as often as one likes. The targets of one call are recorded together, or count as one.
        let mut is_first = None;
        for details in asked {
            let grant = match self.is_starter(caller, job) {
                true => self.access.implied(caller, permission, &details, Basis::Starter),
                false => {
                    self.access
                        .require(caller, permission, &details, Some(job.id))
                        .await?
                }
            };
            let is_recorded = permission != Permission::DomainSetSpeed
                || *is_first.get_or_insert_with(|| self.access.is_first(&grant, job.id));
            match is_recorded {
                true => grant.record(job.id),
                false => grant.leave_to_count(),
            }
        }
        Ok(())
    }

    /// Starts no queued backup any more, and has nobody wait for one: the next process of the service goes on with the queue.
    pub fn close_queue(&self) {
        self.jobs.close_queue();
    }

    /// Ends everything that works for the service. Backups that QEMU is making go on there.
    pub async fn shut_down(&self) {
        self.jobs.shut_down().await;
        self.backups.shut_down().await;
        self.domains.shut_down().await;
        self.access.flush();
    }
}

/// The caller as the starter of a job.
fn starter(caller: &Caller) -> Starter {
    Starter {
        uid: caller.uid,
        name: caller.user.clone(),
        connection: Some(caller.name.clone()),
    }
}

/// The details of a question to the authority about a domain.
fn details(domain: &Domain) -> Details {
    let uuid = domain.snapshot().uuid;
    let name = domain.told_name();
    // For the dialog: a user may have given a domain the name of a configured one.
    let told = match domain.origin {
        Origin::Configured => name.clone(),
        Origin::Registered => format!("{name} of the user {}", domain.owner_name),
    };
    sight::service_details()
        .with("domain", told)
        .with("domain_name", name)
        .with(
            "domain_uuid",
            uuid.map(|uuid| uuid.to_string()).unwrap_or_default(),
        )
        .with("domain_owner", &domain.owner_name)
}
