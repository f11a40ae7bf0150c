//! Backup requests: parsed, authorised, and started exactly as authorised.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use super::{Descriptors, Service, details, starter};
use crate::access::{Basis, Caller, Details, Grant, Permission};
use crate::checkpoint::CheckpointOption;
use crate::clock;
use crate::definition::{self, Definition, Target};
use crate::domain::{Domain, Link, Origin, Snapshot};
use crate::error::{Error, Kind, Result, shown};
use crate::job::{self, Claim, Entered, Job, Reservation, Start};
use crate::plan::{self, Destination, JobSpec, Options, Plan, Requested, TargetKind};
use crate::qmp::Feature;
use crate::targets::{self, Around, Devices, Holder, Pinned, Sources, Targets};

/// Timeout for the other domains' answers about their open files.
const LOOK: Duration = Duration::from_millis(500);
/// How long `CreateBackup` waits for the backup to begin. Less than the D-Bus clients' default timeout of 25 s.
const BEGIN: Duration = Duration::from_secs(20);
/// How often a request is authorised again because the domain's disks have changed.
const ATTEMPTS: usize = 3;

/// A parsed request.
#[derive(Debug)]
pub struct Request {
    pub(super) definition: Definition,
    pub(super) options: Options,
    pub(super) files: Descriptors,
    /// The devices that the document names.
    pub(super) devices: Devices,
}

/// An authorised request, with its domain and the disks that the authorisation covers. Only [`Service::authorise`]
/// creates one, and the service executes it unchanged.
#[derive(Debug)]
pub struct Authorised {
    pub(super) request: Request,
    pub(super) places: Vec<Requested>,
    pub(super) domain: Arc<Domain>,
    link: Arc<Link>,
    pub(super) snapshot: Snapshot,
    pub(super) grants: Vec<Grant>,
    pub(super) caller: Caller,
}

impl Service {
    /// Parses the `checkpoint` option: a document, or `no`.
    pub fn checkpoint_option(&self, text: &str) -> Result<CheckpointOption> {
        let named = |error: Error| Error::new(error.kind, format!("option 'checkpoint': {error}"));
        match text {
            "no" => Ok(CheckpointOption::No),
            _ if text.trim_start_matches('\u{feff}').trim_start().starts_with('<') => {
                let definition = self.checkpoint_definition(text).map_err(named)?;
                Ok(CheckpointOption::This(definition))
            }
            _ => {
                let text = format!(
                    "option 'checkpoint': '{}' is neither 'no' nor a <domaincheckpoint> document",
                    shown(text)
                );
                Err(Error::new(Kind::InvalidArgs, text))
            }
        }
    }

    /// Enforces the configured limit of document length.
    pub(super) fn check_length(&self, document: &str) -> Result<()> {
        let (bytes, limit) = (document.len(), self.document_bytes);
        if bytes <= limit {
            return Ok(());
        }
        let text = format!("the document has {bytes} bytes; the limit 'document-bytes' is {limit} bytes");
        Err(Error::new(Kind::LimitsExceeded, text))
    }

    /// Parses a request; an empty document means all defaults.
    pub fn request(&self, document: &str, options: Options, files: Descriptors) -> Result<Request> {
        self.check_length(document)?;
        let definition = match document.trim().is_empty() {
            true => Definition::default(),
            false => definition::parse(document)?,
        };
        Ok(Request {
            definition,
            options,
            files,
            devices: Devices::default(),
        })
    }

    /// Requires the permissions for the backup. Changes nothing; dropping the future withdraws the question.
    ///
    /// The authorisation covers the known disks and devices. Only then the service asks QEMU, and authorises again if
    /// the disks differ.
    pub async fn authorise(
        &self,
        caller: &Caller,
        domain: Arc<Domain>,
        request: Request,
    ) -> Result<Authorised> {
        let request = settle_devices(request).await?;
        let mut disks = domain.snapshot().disks;
        for _ in 0..ATTEMPTS {
            let places = plan::requested(&request.definition, &disks);
            let mut grants = Vec::new();
            for place in &places {
                grants.push(self.ask(caller, &domain, place).await?);
            }
            let (link, snapshot) = self.ask_qemu(&domain).await?;
            if plan::requested(&request.definition, &snapshot.disks) == places {
                return Ok(Authorised {
                    request,
                    places,
                    domain,
                    link,
                    snapshot,
                    grants,
                    caller: caller.clone(),
                });
            }
            disks = snapshot.disks;
        }
        Err(job::Error::Unsettled.into())
    }

    /// The disks as QEMU reports them, if they can be backed up.
    pub(super) async fn ask_qemu(&self, domain: &Domain) -> Result<(Arc<Link>, Snapshot)> {
        // Before any query: a target that hangs can freeze QEMU when QEMU queries it.
        self.jobs.wait_until_qemu_has_no_residue(domain).await?;
        let link = domain.link().await?;
        check_features(&link)?;
        let snapshot = domain.refresh().await?;
        match snapshot.migration {
            Some(migration) => Err(job::Error::Migration(migration).into()),
            None => Ok((link, snapshot)),
        }
    }

    async fn ask(&self, caller: &Caller, domain: &Domain, place: &Requested) -> Result<Grant> {
        let details = backup_details(domain, place);
        let permission = match place.kind {
            TargetKind::Store => Permission::DomainBackup,
            TargetKind::File | TargetKind::Block | TargetKind::Fd => Permission::DomainExport,
        };
        // The user who passed the monitor can read all the VM's data without the service.
        if place.kind == TargetKind::Fd && domain.is_own(caller.uid) {
            return Ok(self.access.implied(caller, permission, &details, Basis::Owner));
        }
        Ok(self.access.require(caller, permission, &details, None).await?)
    }

    /// Prepares the backup and starts its job. If it cannot start now, the job is queued.
    pub async fn start(self: &Arc<Self>, authorised: Authorised) -> Result<Arc<Job>> {
        let (request, caller) = (&authorised.request, &authorised.caller);
        let store = plan::store(&request.definition, &self.stores)?;
        let claim = Claim::new(caller.uid, &authorised.domain, store.map(|(name, _)| name));
        let descriptors = (&request.files.share, !request.files.files.is_empty());
        let tried = || caller.turn.cancel();
        let entered = self
            .jobs
            .enter_or_displace(&authorised.domain, claim, descriptors, tried);
        match entered.await? {
            Entered::Now(reservation) => self.start_now(authorised, reservation).await,
            Entered::Later(line) => self.start_later(authorised, line).await,
        }
    }

    async fn start_now(&self, authorised: Authorised, reservation: Reservation) -> Result<Arc<Job>> {
        let Authorised {
            request,
            domain,
            link,
            snapshot,
            grants,
            caller,
            ..
        } = authorised;
        let uid = caller.uid;
        let start_time = clock::now();
        let (plan, held) = self
            .plan(
                (&request.definition, &request.options, request.files.files.len()),
                &domain,
                &snapshot,
            )
            .await?;
        let mark = match &plan.destination {
            Destination::Store { name, .. } => self.jobs.store_mark(name).await?,
            Destination::Caller => None,
        };
        let plan = Arc::new(plan);
        let spec = JobSpec::Backup(plan.clone());
        let record = self
            .jobs
            .begin(&domain, &spec, starter(&caller), start_time)
            .await?;
        let prepared = self
            .prepare(
                plan,
                &domain,
                (uid, &record.backup_id),
                request.files.files,
                (mark, request.devices, Vec::new()),
                false,
            )
            .await;
        let (reservation, (plan, targets)) = self.jobs.prepared(record.id, reservation, prepared).await?;
        // The targets hold the bases themselves now.
        drop(tokio::task::spawn_blocking(move || drop(held)));
        let job = self.jobs.start(Start {
            reservation,
            domain,
            link,
            plan,
            targets,
            record,
        });
        self.follow(job.clone());
        for grant in grants {
            grant.record(job.id);
        }
        Ok(job)
    }

    /// Notifies the job when the connection that started it disconnects.
    pub fn watch_starter(&self, job: &Arc<Job>, left: impl Future<Output = ()> + Send + 'static) {
        self.jobs.watch_starter(job, left);
    }

    /// Waits until the start of the job is `announced` and the backup has begun: later writes of the guest are in no
    /// image. Returns the error if the job fails before. After [`BEGIN`] it returns and leaves the job as it is. It also
    /// returns if the job is queued and the service stops, because the next instance continues the queue.
    pub async fn begun(&self, job: &Job, announced: impl Future<Output = ()>) -> Result<()> {
        let goes_on = async {
            self.jobs.queue_is_closed().await;
            if !job.is_queued() {
                std::future::pending::<()>().await;
            }
        };
        let begun = async {
            announced.await;
            job.begun(BEGIN).await
        };
        tokio::select! {
            biased;
            begun = begun => begun,
            () = goes_on => Ok(()),
        }
    }

    /// Starts to prepare the targets on a thread that may block.
    pub(super) async fn prepare(
        &self,
        plan: Arc<Plan>,
        domain: &Domain,
        (uid, backup_id): (u32, &str),
        files: Vec<OwnedFd>,
        (mark, devices, pinned): (Option<String>, Devices, Vec<Pinned>),
        is_restore: bool,
    ) -> JoinHandle<Result<(Arc<Plan>, Targets)>> {
        // No VM can have a new file open.
        let others = match plan.writes_into_existing() {
            true => self.refresh_others(domain).await,
            false => Vec::new(),
        };
        let holders: Vec<Holder> = others
            .iter()
            .map(|other| Holder {
                domain: other.unique_name(),
                process: other.process(),
                files: other.snapshot().files.to_vec(),
                owner: (other.origin == Origin::Registered).then_some(other.owner),
            })
            .collect();
        // A user's process can have files open that the user cannot read, or on a file system that hangs every reader.
        let is_configured = domain.origin == Origin::Configured;
        let process = domain.process_of_root().filter(|_| is_configured);
        let id = backup_id.to_owned();
        let look = self.look.clone();
        // The thread may outlive the call's timeout.
        let needed = self.jobs.need_service();
        tokio::task::spawn_blocking(move || {
            let _needed = needed;
            let sources = Sources::of(&look, &holders).map_err(targets::Error::from)?;
            let around = Around {
                look,
                sources,
                process,
                for_root: uid == 0,
                mark,
                devices,
                pinned,
                is_restore,
            };
            let targets = Targets::prepare(&plan, &id, &files, &around)?;
            Ok((plan, targets))
        })
    }

    /// The other domains whose open files matter for a backup of this one. The service asks each for its current disks,
    /// because QEMU emits no event for an added disk. A domain that does not answer in time counts with its last known
    /// disks. Domains of other users are not asked, because their disks are protected by QEMU's locks.
    async fn refresh_others(&self, domain: &Domain) -> Vec<Arc<Domain>> {
        let mut others = self.domains.list();
        others.retain(|other| !other.is_foreign(domain.owner));
        let asked = others
            .iter()
            .filter(|other| other.id != domain.id && other.process().is_some());
        let refreshes = asked.map(|other| tokio::time::timeout(LOOK, other.refresh()));
        futures_util::future::join_all(refreshes).await;
        others
    }
}

/// Replaces each device path of the document by the canonical one, and records the device number. So the authorised
/// device is the one that is opened. A path without a device stays, and is refused after the authorisation.
async fn settle_devices(mut request: Request) -> Result<Request> {
    let settled = tokio::task::spawn_blocking(move || {
        for disk in request.definition.disks.iter_mut().flatten() {
            if let Some(Target::Block(path)) = &mut disk.target
                && let Some(device) = targets::device_path(path)
            {
                request.devices.add(&device);
                *path = device;
            }
        }
        request
    });
    settled
        .await
        .map_err(|error| Error::new(Kind::Internal, error.to_string()))
}

/// The polkit details of the part of a backup with this target.
pub(super) fn backup_details(domain: &Domain, place: &Requested) -> Details {
    details(domain)
        .with("mode", "push")
        .with("target_kind", place.kind.as_str())
        .with("target", &place.target)
        .with("disks", disk_list(&place.disks))
}

/// Joins the names of disks for polkit rules. Commas in names are escaped; QEMU's own names have none.
pub(super) fn disk_list(disks: &[String]) -> String {
    let disks: Vec<String> = disks.iter().map(|disk| disk.replace(',', "%2C")).collect();
    disks.join(",")
}

/// Refuses a QEMU that lacks commands which every backup needs.
fn check_features(link: &Link) -> Result<()> {
    match link.schema.has(Feature::GroupedBackups) {
        true => Ok(()),
        false => Err(job::Error::TooOld.into()),
    }
}
