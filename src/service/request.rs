//! A request for a backup: read, authorised, and started as it was authorised.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use super::{Descriptors, Service, details, starter};
use crate::access::{Basis, Caller, Details, Grant, Permission};
use crate::clock;
use crate::definition::{self, Definition, Target};
use crate::domain::{Domain, Link, Origin, Snapshot};
use crate::error::{Error, Kind, Result, shown};
use crate::job::{self, Claim, Entered, Job, Reservation, Start};
use crate::plan::{self, CheckpointOption, Destination, Options, PlaceKind, Plan, Requested};
use crate::qmp::Feature;
use crate::target::{self, Around, Devices, Holder, Sources, Targets};

/// How long a backup of one domain waits for news of the others.
const LOOK: Duration = Duration::from_millis(500);
/// How long a call waits for its backup to begin: less than the 25 s after which callers of D-Bus give up.
const BEGIN: Duration = Duration::from_secs(20);
/// How often a request is put to the authority again because the domain has other disks now.
const ATTEMPTS: usize = 3;

/// A request as it came, in types.
#[derive(Debug)]
pub struct Request {
    pub(super) definition: Definition,
    pub(super) options: Options,
    pub(super) files: Descriptors,
    /// The devices that the document names.
    pub(super) devices: Devices,
}

/// A request that its caller may make, on the domain that it may be made on, and on the disks that it was then found to
/// be about. Only [`Service::authorise`] makes one, and it is what is executed: nothing in it changes in between.
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
    /// What a call says of the checkpoint that its backup begins: a document, or a word.
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

    /// Holds a document to the configured limit.
    pub(super) fn check_length(&self, document: &str) -> Result<()> {
        let (bytes, limit) = (document.len(), self.document_bytes);
        if bytes <= limit {
            return Ok(());
        }
        let text = format!("the document has {bytes} bytes, and the limit 'document-bytes' is {limit}");
        Err(Error::new(Kind::LimitsExceeded, text))
    }

    /// Reads a request; an empty document means every default.
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

    /// Asks whether `caller` may have that backup. Nothing is touched; dropping this withdraws the question.
    ///
    /// The question is about disks and devices as they are. If they are found to be others when QEMU is asked, which is
    /// not done for callers that may not have a backup, the question is put again.
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

    /// What the domain's QEMU says of its disks, if they can be backed up.
    pub(super) async fn ask_qemu(&self, domain: &Domain) -> Result<(Arc<Link>, Snapshot)> {
        // Before QEMU is asked for anything: where a target hangs, a look at it can be what freezes QEMU.
        self.jobs.nothing_left(domain).await?;
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
            PlaceKind::Store => Permission::DomainBackup,
            PlaceKind::File | PlaceKind::Block | PlaceKind::Fd => Permission::DomainExport,
        };
        // The user who passed its monitor can read all its data without the service.
        if place.kind == PlaceKind::Fd && domain.is_own(caller.uid) {
            return Ok(self.access.implied(caller, permission, &details, Basis::Owner));
        }
        Ok(self.access.require(caller, permission, &details, None).await?)
    }

    /// Checks and prepares everything, then starts the job, which reports how it goes on and ends. Where there is no place for
    /// it now, the job is queued.
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
        let record = self
            .jobs
            .begin(&domain, &plan, starter(&caller), start_time)
            .await?;
        let prepared = self
            .prepare(
                plan,
                &domain,
                (uid, &record.backup_id),
                request.files.files,
                (mark, request.devices),
            )
            .await;
        let (reservation, (plan, targets)) = self.jobs.prepared(record.id, reservation, prepared).await?;
        // The targets hold it themselves now.
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

    /// Takes notice when the connection that started a backup has left the bus.
    pub fn watch_starter(&self, job: &Arc<Job>, left: impl Future<Output = ()> + Send + 'static) {
        self.jobs.watch_starter(job, left);
    }

    /// Waits until the backup has begun: what the guest writes from then on is in no image. Fails with what prevented it. If
    /// it takes longer than [`BEGIN`], the job stays as it is. It also stays if it is queued and the service is about to stop:
    /// the next process goes on with the queue.
    pub async fn begun(&self, job: &Job) -> Result<()> {
        let goes_on = async {
            self.jobs.queue_is_closed().await;
            if !job.is_queued() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            begun = job.begun(BEGIN) => begun,
            () = goes_on => Ok(()),
        }
    }

    /// Begins to prepare the targets, on a thread that may wait for storage.
    pub(super) async fn prepare(
        &self,
        plan: Plan,
        domain: &Domain,
        (uid, backup_id): (u32, &str),
        files: Vec<OwnedFd>,
        (mark, devices): (Option<String>, Devices),
    ) -> JoinHandle<Result<(Plan, Targets)>> {
        // A new file is nobody's disk.
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
        let process = domain.process();
        let id = backup_id.to_owned();
        // It may take longer than anybody waits for it.
        let needed = self.jobs.need_service();
        tokio::task::spawn_blocking(move || {
            let _needed = needed;
            let around = Around {
                sources: Sources::of(&holders),
                process,
                for_root: uid == 0,
                mark,
                devices,
            };
            let targets = Targets::prepare(&plan, &id, &files, &around)?;
            Ok((plan, targets))
        })
    }

    /// The domains whose word counts for a backup of this one, asked what they have open: a disk that was added is no event.
    /// One that does not answer in time is known as it was. What another user has registered says nothing here and costs nothing: its
    /// disks are known by QEMU's locks.
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

/// Gives every device that the document names its own name, and remembers which device that is, so that the one that is asked
/// about is the one that is opened. What cannot be found keeps its name, and is refused by it after the question.
async fn settle_devices(mut request: Request) -> Result<Request> {
    let settled = tokio::task::spawn_blocking(move || {
        for disk in request.definition.disks.iter_mut().flatten() {
            if let Some(Target::Block(path)) = &mut disk.target
                && let Some(device) = target::device_path(path)
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

/// The details of a question to the authority about the part of a backup of `domain` with this target.
pub(super) fn backup_details(domain: &Domain, place: &Requested) -> Details {
    details(domain)
        .with("mode", "push")
        .with("target_kind", place.kind.as_str())
        .with("target", &place.target)
        .with("disks", disk_list(&place.disks))
}

/// Names of disks, for rules. QEMU's own have no commas in them.
pub(super) fn disk_list(disks: &[String]) -> String {
    let disks: Vec<String> = disks.iter().map(|disk| disk.replace(',', "%2C")).collect();
    disks.join(",")
}

/// What every backup needs of QEMU.
fn check_features(link: &Link) -> Result<()> {
    match link.schema.has(Feature::GroupedBackups) {
        true => Ok(()),
        false => Err(job::Error::TooOld.into()),
    }
}
