//! Handles requests, from the caller's arguments to a running job.
//!
//! For a backup it calls `definition`, `access` and `plan` in this order, then `job`, which records the job before it
//! prepares the targets. Knows no D-Bus: the bus maps messages to
//! these calls and their results to replies.

mod backups;
mod base;
mod checkpoints;
mod queued;
mod request;
mod stored;
mod visibility;

pub use backups::{BackupsWanted, Deletion, PruneWanted};
pub use checkpoints::WhichCheckpoints;
pub use request::{Authorised, Request};
pub use stored::RestoreRequest;
pub use visibility::ListedJob;

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
use crate::targets::Look;
use crate::turns::Turns;

/// A caller's open descriptors, and their share of the user's limit.
#[derive(Debug)]
pub struct Descriptors {
    pub files: Vec<OwnedFd>,
    pub share: Arc<Share>,
}

/// Bounds the memory for long lists: the lists in flight of a user, and the page reads of all users.
const LISTS_OF_A_USER: usize = 2;
const READS: usize = 4;

/// The driver of all domains, a detail for polkit rules.
const DRIVER: &str = "QEMU";

/// The service without its D-Bus interface.
pub struct Service {
    pub domains: Arc<Registry>,
    pub jobs: Arc<Jobs>,
    backups: Arc<Backups>,
    access: Access,
    stores: BTreeMap<String, Store>,
    /// Limits the descriptors of calls.
    descriptors: Quota,
    document_bytes: usize,
    /// The default bound of the latency of guest writes during a backup, in milliseconds. The call and the domain's
    /// file override it.
    max_latency: u32,
    /// How open files of other processes are found.
    look: Look,
    /// Limits long lists.
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
            look: Look::of_service(),
            lists: Turns::new(READS, LISTS_OF_A_USER),
        }
    }

    /// Counts descriptors that a user passes, from their arrival.
    pub fn hold_descriptors(&self, uid: u32, count: usize) -> Result<Share> {
        Ok(self.descriptors.take(uid, count)?)
    }

    /// Registers a domain by a QMP monitor that the caller passes.
    pub async fn register_domain(
        &self,
        caller: &Caller,
        name: &str,
        monitor: Descriptors,
    ) -> Result<Arc<Domain>> {
        domain::check_new_name(name)?;
        let share = monitor.share;
        let Ok([monitor]) = <[OwnedFd; 1]>::try_from(monitor.files) else {
            return Err(Error::new(Kind::InvalidArgs, "pass exactly one monitor"));
        };
        let details = visibility::service_details().with("domain_name", name);
        let grant = self
            .access
            .require(caller, Permission::ServiceRegisterDomain, &details, None)
            .await?;
        drop(grant);
        // A hidden domain must not reveal that its name is taken. Registered domains have a separate namespace, so it
        // need not.
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

    /// Rewrites the catalog from the contents of the stores. With `adopt`, keep rules apply to all found backups, even
    /// to those of other service instances.
    pub async fn rescan(&self, caller: &Caller, adopt: bool) -> Result<Rescan> {
        let details = visibility::service_details();
        let grant = self
            .access
            .require(caller, Permission::ServiceRescan, &details, None)
            .await?;
        drop(grant);
        Ok(self.jobs.rescan(adopt).await?)
    }

    /// Drops the cached permissions of a disconnected client, and the domains that it registered.
    pub fn forget_caller(&self, name: &str) {
        self.access.forget(name);
        self.domains.release(name);
    }

    /// Cancels `job`, or one disk of it and thereby the whole job. The starter needs no permission.
    pub async fn cancel(&self, caller: &Caller, job: &Job, disk: Option<&str>) -> Result<()> {
        self.control(caller, job, Permission::DomainAbort).await?;
        match disk {
            Some(disk) => job.cancel_disk(disk).await?,
            None => job.cancel().await?,
        }
        Ok(())
    }

    /// Limits `job` to `bytes_per_second` for all disks together; 0 is unlimited. The starter needs no permission.
    pub async fn set_speed(&self, caller: &Caller, job: &Job, bytes_per_second: u64) -> Result<()> {
        self.control(caller, job, Permission::DomainSetSpeed).await?;
        Ok(job.set_speed(bytes_per_second).await?)
    }

    /// Whether `caller` is the user that started `job`.
    pub fn is_starter(&self, caller: &Caller, job: &Job) -> bool {
        job.is_of(&starter(caller))
    }

    /// Admits the starter of `job`, and callers with `permission` on all its targets.
    async fn control(&self, caller: &Caller, job: &Job, permission: Permission) -> Result<()> {
        let of_stored = job.spec.stored().map(|stored| {
            details(&job.domain)
                .with("mode", job.spec.mode())
                .with("backup_id", &stored.id)
                .with("store", &stored.store)
        });
        let asked = match of_stored {
            Some(details) => vec![details],
            None => {
                let places = job.plan().map(|plan| plan.requested()).unwrap_or_default();
                let asked = places
                    .iter()
                    .map(|place| request::backup_details(&job.domain, place));
                asked.collect()
            }
        };
        // The speed may change without limit, so its records are counted. The targets of one call share one decision
        // about that.
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

    /// Stops starting queued backups, and ends the calls that wait for one. The next instance continues the queue.
    pub fn close_queue(&self) {
        self.jobs.close_queue();
    }

    /// Stops all work of the service. Running backups continue in QEMU.
    pub async fn shut_down(&self) {
        self.jobs.shut_down().await;
        self.backups.shut_down().await;
        self.domains.shut_down().await;
        self.access.flush();
    }
}

/// The caller, as the starter of a job.
fn starter(caller: &Caller) -> Starter {
    Starter {
        uid: caller.uid,
        name: caller.user.clone(),
        connection: Some(caller.name.clone()),
    }
}

/// The polkit details of a domain.
fn details(domain: &Domain) -> Details {
    let uuid = domain.snapshot().uuid;
    let name = domain.told_name();
    // The dialog names the owner, because a user can register a domain under the name of a configured one.
    let shown = match domain.origin {
        Origin::Configured => name.clone(),
        Origin::Registered => format!("{name} of the user {}", domain.shown_owner()),
    };
    visibility::service_details()
        .with("domain", shown)
        .with("domain_name", name)
        .with(
            "domain_uuid",
            uuid.map(|uuid| uuid.to_string()).unwrap_or_default(),
        )
        .with("domain_owner", domain.shown_owner())
}
