//! Jobs as the catalog remembers them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::error::Stopped;
use super::{Decision, DiskState, DiskStatus, Error, Job, Outcome, State, Status};
use crate::catalog::{self, Catalog, DomainRecord, Ended, JobRecord, Step};
use crate::domain::{Domain, Identity, Origin};
use crate::plan::Plan;
use crate::target::{self, FileId};

/// What became of a backup in QEMU: `completed` says that all is copied.
#[derive(Debug, Serialize, Deserialize)]
pub struct Verdict {
    pub outcome: Outcome,
    pub disks: Vec<DiskStatus>,
}

/// What may be left of a job that has ended.
#[derive(Debug, Clone, Copy, Default)]
pub struct Left {
    pub in_qemu: bool,
    pub on_disk: bool,
    /// In QEMU: the guest's power-off is still held back.
    pub holds_poweroff: bool,
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

/// What is remembered as text.
pub fn to_text<T: Serialize>(value: &T) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|error| Error::Catalog(error.to_string()))
}

pub fn plan(record: &JobRecord) -> Result<Plan, Error> {
    read(record.id, Some(&record.plan))
}

pub fn files(record: &JobRecord) -> Result<Option<Vec<FileId>>, Error> {
    match record.step >= Step::Writing && record.files.is_some() {
        true => read(record.id, record.files.as_deref()).map(Some),
        false => Ok(None),
    }
}

pub fn verdict(record: &JobRecord) -> Result<Verdict, Error> {
    read(record.id, record.verdict.as_deref())
}

fn read<T: DeserializeOwned>(id: u32, text: Option<&str>) -> Result<T, Error> {
    let text = text.ok_or_else(|| unreadable(id, "a part is missing"))?;
    serde_json::from_str(text).map_err(|error| unreadable(id, &error.to_string()))
}

fn unreadable(id: u32, why: &str) -> Error {
    let why = why.to_owned();
    catalog::Error::Record { id, why }.into()
}

impl Verdict {
    /// As if it had been found just now.
    pub fn judged(self) -> Result<(), Stopped> {
        match self.outcome {
            Outcome::Completed => Ok(()),
            Outcome::Cancelled => Err(Stopped::Cancelled),
            Outcome::Failed(error) => Err(Stopped::Failed(Error::Former(error))),
        }
    }
}

impl Job {
    /// A job of which nothing is known but what is to be done.
    pub(super) fn new(record: &JobRecord, domain: Arc<Domain>, plan: Plan, catalog: Catalog) -> Self {
        let cancelled = record.cancel_requested;
        let status = Status {
            frozen: record.frozen,
            ..first_status(&plan, &record.backup_id)
        };
        let cancel = CancellationToken::new();
        if cancelled {
            cancel.cancel();
        }
        Self {
            id: record.id,
            backup_id: record.backup_id.clone(),
            domain,
            started_by: record.started_by,
            imported: record.imported,
            start_time: record.start_time,
            status: watch::Sender::new(status),
            decision: Mutex::new(match cancelled {
                true => Decision::CancelRequested,
                false => Decision::Open,
            }),
            cancel,
            speed: watch::Sender::new(record.speed),
            looks: watch::Sender::new(None),
            asked: watch::Sender::new(None),
            catalog,
            plan,
        }
    }

    /// A job that has ended.
    pub(super) fn ended(record: &JobRecord, domain: Arc<Domain>, catalog: Catalog) -> Result<Self, Error> {
        let job = Self::new(record, domain, plan(record)?, catalog);
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

    /// The outcome as it is remembered.
    pub(super) fn end_record(&self, outcome: &Outcome, left: Left) -> Result<Ended, Error> {
        Ok(Ended {
            time: Timestamp::now(),
            result: outcome.as_str().to_owned(),
            error: match outcome {
                Outcome::Failed(error) => Some(to_text(error)?),
                Outcome::Completed | Outcome::Cancelled => None,
            },
            disks: to_text(&self.status().disks)?,
            left_in_qemu: left.in_qemu,
            left_on_disk: left.on_disk,
        })
    }
}

fn first_status(plan: &Plan, backup_id: &str) -> Status {
    let disks = plan.disks.iter().map(|disk| DiskStatus {
        name: disk.name.clone(),
        state: DiskState::Preparing,
        total: disk.virtual_size,
        done: 0,
        target: target::label(plan, disk, backup_id),
    });
    Status {
        state: State::Preparing,
        disks: disks.collect(),
        rate: 0,
        expected_end: None,
        frozen: Duration::ZERO,
        outcome: None,
    }
}
