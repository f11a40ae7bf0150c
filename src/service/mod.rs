//! The way of a request, from a caller and its words to a running job.
//!
//! Puts `definition`, `access`, `plan`, `target` and `job` in their order. Knows no D-Bus: the bus turns messages into
//! these calls and their results into replies.

mod sight;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::access::{Access, Caller, Details, Permission};
use crate::config::Store;
use crate::definition::{self, Definition};
use crate::domain::{self, Domain, Link, Registry, Snapshot};
use crate::error::{Error, Kind, Result};
use crate::job::{self, Job, Jobs, Start};
use crate::plan::{self, Options, Plan};
use crate::target::{BackupName, Holder, Sources, Targets};
use sight::Sight;

/// How long a backup of one domain waits for news of the others.
const LOOK: Duration = Duration::from_millis(500);

/// All that the service is, apart from the bus.
pub struct Service {
    pub domains: Arc<Registry>,
    pub jobs: Arc<Jobs>,
    access: Access,
    sight: Sight,
    stores: BTreeMap<String, Store>,
}

/// A request as it came, in types.
#[derive(Debug)]
pub struct Request {
    definition: Definition,
    options: Options,
    files: Vec<OwnedFd>,
}

impl Request {
    /// Reads the document; an empty one means every default.
    pub fn new(document: &str, options: Options, files: Vec<OwnedFd>) -> Result<Self> {
        let definition = match document.trim().is_empty() {
            true => Definition::default(),
            false => definition::parse(document)?,
        };
        Ok(Self {
            definition,
            options,
            files,
        })
    }
}

/// A request that its caller may make, on the domain that it may be made on. Only [`Service::authorise`] makes one,
/// and it is what is executed: nothing in it changes in between.
#[derive(Debug)]
pub struct Authorised {
    request: Request,
    domain: Arc<Domain>,
    uid: u32,
}

impl Service {
    pub fn new(
        domains: Arc<Registry>,
        jobs: Arc<Jobs>,
        access: Access,
        stores: BTreeMap<String, Store>,
    ) -> Self {
        Self {
            domains,
            jobs,
            sight: Sight::new(access.clone()),
            access,
            stores,
        }
    }

    /// The domain of that name or UUID, if `caller` may know of it.
    pub async fn domain(&self, caller: &Caller, name: &str) -> Result<Arc<Domain>> {
        if let Some(domain) = self.domains.find(name, caller.uid)
            && self.sees(caller, &domain).await
        {
            return Ok(domain);
        }
        // The same for a domain that is hidden as for one that was never there.
        Err(domain::Error::no_such_domain(name).into())
    }

    /// The domains that `caller` may know of, by name.
    pub async fn list_domains(&self, caller: &Caller) -> Result<Vec<Arc<Domain>>> {
        self.access
            .require(caller, Permission::ServiceSearchDomains, &Details::default())
            .await?;
        let mut visible = Vec::new();
        for domain in self.domains.list() {
            if self.sees(caller, &domain).await {
                visible.push(domain);
            }
        }
        Ok(visible)
    }

    /// Whether `caller` may know that `domain` exists.
    pub async fn sees(&self, caller: &Caller, domain: &Domain) -> bool {
        self.sight.allows(caller, Permission::DomainGetattr, domain).await
    }

    /// Whether `caller` may know what `domain` has and does.
    pub async fn reads(&self, caller: &Caller, domain: &Domain) -> bool {
        self.sight.allows(caller, Permission::DomainRead, domain).await
    }

    /// Forgets what was decided for a connection that has gone.
    pub fn forget_caller(&self, name: &str) {
        self.sight.forget(name);
    }

    /// Takes over a monitor of the caller's own.
    pub async fn register_domain(
        &self,
        caller: &Caller,
        name: &str,
        monitor: OwnedFd,
    ) -> Result<Arc<Domain>> {
        domain::check_new_name(name)?;
        let details = Details::default().with("domain_name", name);
        self.access
            .require(caller, Permission::ServiceRegisterDomain, &details)
            .await?;
        Ok(self.domains.register(name, monitor, caller.uid).await?)
    }

    /// Asks whether `caller` may have that backup. Nothing is touched; dropping this withdraws the question.
    pub async fn authorise(
        &self,
        caller: &Caller,
        domain: Arc<Domain>,
        request: Request,
    ) -> Result<Authorised> {
        for place in plan::requested(&request.definition) {
            let details = details(&domain)
                .with("mode", "push")
                .with("target_kind", place.kind)
                .with("target", place.target);
            self.access
                .require(caller, Permission::DomainBackup, &details)
                .await?;
        }
        Ok(Authorised {
            request,
            domain,
            uid: caller.uid,
        })
    }

    /// Checks and prepares everything, then starts the job. Its course and end are told by the job.
    pub async fn start(&self, authorised: Authorised) -> Result<Arc<Job>> {
        let Authorised { request, domain, uid } = authorised;
        let start_time = Timestamp::now();
        let reservation = self.jobs.reserve(&domain)?;
        let link = domain.link().await?;
        check_features(&link)?;
        let snapshot = domain.refresh().await?;
        let plan = plan::resolve(
            &request.definition,
            &request.options,
            &snapshot.disks,
            &self.stores,
            request.files.len(),
        )?;
        let backup_id = Jobs::new_backup_id(start_time);
        let (plan, targets) = self.prepare(plan, &domain, &backup_id, request.files).await?;
        Ok(self.jobs.start(Start {
            reservation,
            domain,
            link,
            plan,
            targets,
            started_by: uid,
            backup_id,
            start_time,
        }))
    }

    async fn prepare(
        &self,
        plan: Plan,
        domain: &Domain,
        backup_id: &str,
        files: Vec<OwnedFd>,
    ) -> Result<(Plan, Targets)> {
        self.refresh_others(domain).await;
        let holders: Vec<Holder> = self
            .domains
            .list()
            .iter()
            .map(|domain| holder(domain, domain.snapshot()))
            .collect();
        let (domain, id) = (domain.name.clone(), backup_id.to_owned());
        let prepared = tokio::task::spawn_blocking(move || {
            let name = BackupName {
                domain: &domain,
                id: &id,
            };
            let targets = Targets::prepare(&plan, name, &files, &Sources::of(&holders))?;
            Ok((plan, targets))
        });
        prepared
            .await
            .map_err(|error| Error::new(Kind::Internal, error.to_string()))?
    }

    /// Asks the other domains what they have open, for a disk that was added is no event. One that does not answer in
    /// time is known as it was.
    async fn refresh_others(&self, domain: &Domain) {
        let others = self.domains.list();
        let others = others
            .iter()
            .filter(|other| other.id != domain.id && other.process().is_some());
        let refreshes = others.map(|other| tokio::time::timeout(LOOK, other.refresh()));
        futures_util::future::join_all(refreshes).await;
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
        let mut visible = Vec::new();
        for job in self.jobs.list() {
            if self.knows(caller, &job).await {
                visible.push(job);
            }
        }
        visible
    }

    /// Whether `caller` may know of `job`.
    pub async fn knows(&self, caller: &Caller, job: &Job) -> bool {
        job.started_by == caller.uid || self.reads(caller, &job.domain).await
    }

    /// Cancels `job`, or one disk of it and so all of it. Who started it may.
    pub async fn cancel(&self, caller: &Caller, job: &Job, disk: Option<&str>) -> Result<()> {
        self.control(caller, job, Permission::DomainAbort).await?;
        match disk {
            Some(disk) => job.cancel_disk(disk)?,
            None => job.cancel()?,
        }
        Ok(())
    }

    /// Limits `job` to `bytes_per_second`, all disks together; 0 is unlimited. Who started it may.
    pub async fn set_speed(&self, caller: &Caller, job: &Job, bytes_per_second: u64) -> Result<()> {
        self.control(caller, job, Permission::DomainSetSpeed).await?;
        Ok(job.set_speed(bytes_per_second)?)
    }

    async fn control(&self, caller: &Caller, job: &Job, permission: Permission) -> Result<()> {
        if job.started_by == caller.uid {
            return Ok(());
        }
        Ok(self
            .access
            .require(caller, permission, &details(&job.domain))
            .await?)
    }

    /// Cancels what runs, and ends everything that works for the service.
    pub async fn shut_down(&self) {
        self.jobs.shut_down().await;
        self.domains.shut_down().await;
    }
}

/// What an authority is told of a domain.
fn details(domain: &Domain) -> Details {
    let uuid = domain.snapshot().uuid;
    Details::default().with("domain_name", &domain.name).with(
        "domain_uuid",
        uuid.map(|uuid| uuid.to_string()).unwrap_or_default(),
    )
}

fn holder(domain: &Domain, snapshot: Snapshot) -> Holder {
    Holder {
        process: domain.process(),
        files: snapshot.files.to_vec(),
    }
}

/// What every backup needs of QEMU.
fn check_features(link: &Link) -> Result<()> {
    let schema = &link.schema;
    let grouped = schema.command_takes("transaction", "properties");
    if grouped && schema.has_command("blockdev-backup") && schema.has_command("blockdev-create") {
        return Ok(());
    }
    Err(job::Error::TooOld.into())
}
