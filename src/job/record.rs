//! Converts jobs to and from the catalog's records.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::boot::BootId;
use super::queued::QueuedRequest;
use super::speed::Speed;
use super::{Decision, DiskState, DiskStatus, Error, Job, Outcome, State, Status, backup};
use crate::catalog::{self, Catalog, DomainRecord, Ended, JobRecord, JobState, QUEUED};
use crate::clock;
use crate::domain::{Domain, Identity, Origin};
use crate::plan::Plan;
use crate::targets;

/// The residue that an ended job may have.
#[derive(Debug, Clone, Copy, Default)]
pub struct Residue {
    pub in_qemu: bool,
    pub on_disk: bool,
    /// In QEMU: the guest's power-off is still delayed.
    pub holds_poweroff: bool,
    /// In QEMU: QEMU may have paused the guest because the target failed.
    pub may_have_paused_guest: bool,
}

impl Residue {
    pub fn of(state: &backup::State) -> Self {
        match state {
            backup::State::Ended(ended) => Self {
                in_qemu: ended.in_qemu,
                on_disk: ended.on_disk,
                holds_poweroff: ended.holds_poweroff,
                may_have_paused_guest: state.may_have_paused_guest(),
            },
            _ => Self::default(),
        }
    }
}

/// A job's state as the catalog stores it.
#[derive(Serialize, Deserialize)]
struct Journal {
    /// Incremented when an older reader would misunderstand the record.
    version: u32,
    /// The boot of the host during which the record was written.
    boot: BootId,
    state: backup::State,
    /// Only for a queued job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    request: Option<QueuedRequest>,
}

/// The version that this program writes and reads.
const VERSION: u32 = 1;

/// The fields that all versions have.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

pub fn journal(state: &backup::State, boot: BootId) -> Result<JobState, Error> {
    of_journal(state.clone(), None, boot)
}

/// Returns the record of a queued job.
pub fn queued_journal(request: QueuedRequest, boot: BootId) -> Result<JobState, Error> {
    of_journal(backup::State::Queued, Some(request), boot)
}

fn of_journal(state: backup::State, request: Option<QueuedRequest>, boot: BootId) -> Result<JobState, Error> {
    let step = state.name();
    let journal = Journal {
        version: VERSION,
        boot,
        state,
        request,
    };
    let text = to_text(&journal)?;
    Ok(JobState { step, text })
}

/// Returns the state of a job, and the boot during which it was recorded.
pub fn read_journal(record: &JobRecord) -> Result<(BootId, backup::State), Error> {
    let Journal { boot, state, .. } = whole_journal(record)?;
    Ok((boot, state))
}

/// Returns the request of a queued job, and the boot during which it was recorded.
pub fn queued_request(record: &JobRecord) -> Result<(BootId, QueuedRequest), Error> {
    let Journal { boot, request, .. } = whole_journal(record)?;
    let request = request.ok_or_else(|| unreadable(record.id, "its request is missing"))?;
    Ok((boot, request))
}

fn whole_journal(record: &JobRecord) -> Result<Journal, Error> {
    let Versioned { version } = read(record.id, Some(&record.state))?;
    if version != VERSION {
        return Err(unreadable(
            record.id,
            &format!("a service of another version wrote it: {version}"),
        ));
    }
    read(record.id, Some(&record.state))
}

pub fn domain_record(identity: Identity) -> DomainRecord {
    DomainRecord {
        name: identity.name,
        source: identity.origin.as_str().to_owned(),
        owner: identity.owner,
        owner_name: identity.owner_name,
        uuid: identity.uuid,
    }
}

pub fn identity(id: u32, domain: &DomainRecord) -> Result<Identity, Error> {
    let DomainRecord {
        name,
        source,
        owner,
        owner_name,
        uuid,
    } = domain.clone();
    let origin = Origin::parse(&source).ok_or_else(|| unreadable(id, "its domain's source"))?;
    Ok(Identity {
        name,
        origin,
        owner,
        owner_name,
        uuid,
    })
}

/// Serialises a value for the catalog.
pub fn to_text<T: Serialize>(value: &T) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|error| Error::Catalog(error.to_string()))
}

pub fn plan(record: &JobRecord) -> Result<Plan, Error> {
    read(record.id, Some(&record.plan))
}

fn read<T: DeserializeOwned>(id: u32, text: Option<&str>) -> Result<T, Error> {
    let text = text.ok_or_else(|| unreadable(id, "a part is missing"))?;
    serde_json::from_str(text).map_err(|error| unreadable(id, &error.to_string()))
}

fn unreadable(id: u32, why: &str) -> Error {
    let why = why.to_owned();
    catalog::Error::Record { id, why }.into()
}

impl Job {
    /// Creates a job that has not ended. `earlier`: an earlier instance of the service started it.
    pub(super) fn new(
        record: &JobRecord,
        domain: Arc<Domain>,
        plan: Plan,
        catalog: Catalog,
        earlier: bool,
    ) -> Self {
        let cancelled = record.cancel_requested;
        let mut status = first_status(&plan, &record.backup_id);
        if record.step == QUEUED {
            status.state = State::Queued;
            status
                .disks
                .iter_mut()
                .for_each(|disk| disk.state = DiskState::Queued);
        }
        if let Ok((_, state)) = read_journal(record) {
            status.frozen = state.frozen();
            status.quiesce_problem = state.quiesce_problem().map(str::to_owned);
            if let Some(verdict) = state.verdict().filter(|verdict| !verdict.disks.is_empty()) {
                status.disks.clone_from(&verdict.disks);
            }
        }
        let cancel = CancellationToken::new();
        if cancelled {
            cancel.cancel();
        }
        Self {
            id: record.id,
            backup_id: record.backup_id.clone(),
            domain_uuid: record.domain.uuid,
            domain: domain.into(),
            started_by: record.started_by.clone(),
            imported: record.imported,
            past: false,
            start_time: record.start_time,
            status: watch::Sender::new(status),
            decision: Mutex::new(match cancelled {
                true => Decision::CancelRequested,
                false if earlier => Decision::Recovering,
                false => Decision::Open,
            }),
            cancel,
            taken_up: Instant::now().into(),
            is_orphan: AtomicBool::new(earlier),
            speed: Arc::new(Speed::new(record.speed)),
            looks: watch::Sender::new(None),
            asked: watch::Sender::new(None),
            catalog,
            plan: plan.into(),
        }
    }

    /// Takes the job out of the queue, with a plan for the present domain and its disks.
    pub(super) fn leave_queue(&self, domain: Arc<Domain>, plan: Plan) {
        let disks = first_status(&plan, &self.backup_id).disks;
        self.domain.finalise(domain);
        self.plan.finalise(plan);
        self.taken_up.finalise(Instant::now());
        self.update(|status| (status.state, status.disks) = (State::Preparing, disks));
    }

    /// Returns the identity of the VM with the recorded UUID. Another VM may have its former name now.
    pub fn identity(&self) -> Identity {
        Identity {
            uuid: self.domain_uuid,
            ..self.domain.identity()
        }
    }

    /// Creates a job that has ended.
    pub(super) fn ended(record: &JobRecord, domain: Arc<Domain>, catalog: Catalog) -> Result<Self, Error> {
        let job = Self::new(record, domain, plan(record)?, catalog, true);
        let disks: Vec<DiskStatus> = read(record.id, record.disks.as_deref())?;
        let outcome = match record.result.as_deref() {
            Some("completed") => Outcome::Completed,
            Some("cancelled") => Outcome::Cancelled,
            Some("failed") => Outcome::Failed(read(record.id, record.error.as_deref())?),
            _ => return Err(unreadable(record.id, "its result")),
        };
        job.update(|status| {
            status.state = State::Finishing;
            status.disks = disks;
            status.outcome = Some(outcome);
        });
        Ok(job)
    }

    /// Returns the record of the outcome.
    pub(super) fn end_record(
        &self,
        outcome: &Outcome,
        state: &backup::State,
        boot: BootId,
    ) -> Result<Ended, Error> {
        let residue = Residue::of(state);
        Ok(Ended {
            time: clock::now(),
            result: outcome.as_str().to_owned(),
            error: match outcome {
                Outcome::Failed(error) => Some(to_text(error)?),
                Outcome::Completed | Outcome::Cancelled => None,
            },
            disks: to_text(&self.status().disks)?,
            state: journal(state, boot)?.text,
            left_in_qemu: residue.in_qemu,
            left_on_disk: residue.on_disk,
        })
    }
}

fn first_status(plan: &Plan, backup_id: &str) -> Status {
    let disks = plan.disks.iter().map(|disk| DiskStatus {
        name: disk.name.clone(),
        state: DiskState::Preparing,
        total: disk.virtual_size,
        done: 0,
        target: targets::label(plan, disk, backup_id),
    });
    Status {
        state: State::Preparing,
        begun: false,
        disks: disks.collect(),
        rate: 0,
        expected_end: None,
        frozen: Duration::ZERO,
        quiesce_problem: None,
        displaced: None,
        outcome: None,
    }
}
