//! The journal of a job: its state in the catalog.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::state::State;
use crate::catalog::{Catalog, Ended, JobRecord, JobState};
use crate::clock;
use crate::domain::Domain;
use crate::job::boot::BootId;
use crate::job::ending::Residue;
use crate::job::record;
use crate::job::{DiskStatus, Error, Job, Outcome, State as Shown};
use crate::plan::{JobSpec, Options, Requested};
use crate::targets::{Devices, Pinned};

/// The request for a queued backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct QueuedRequest {
    /// The document, with each disk under the name of its device.
    pub document: String,
    pub options: Options,
    /// The targets that the caller was authorised for.
    pub places: Vec<Requested>,
    pub pinned: Vec<Pinned>,
    pub devices: Devices,
    /// The targets are open files of the caller, which do not outlive this process.
    pub passes_files: bool,
}

/// A job's state as the catalog stores it.
#[derive(Serialize, Deserialize)]
struct Journal {
    /// Incremented when an older reader would misunderstand the record.
    version: u32,
    /// The boot of the host during which the record was written.
    boot: BootId,
    state: State,
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

/// Returns the record of a state.
pub fn to_record(state: &State, boot: BootId) -> Result<JobState, Error> {
    of_journal(state.clone(), None, boot)
}

/// Returns the record of a queued job.
pub fn queued_to_record(request: QueuedRequest, boot: BootId) -> Result<JobState, Error> {
    of_journal(State::Queued, Some(request), boot)
}

fn of_journal(state: State, request: Option<QueuedRequest>, boot: BootId) -> Result<JobState, Error> {
    let step = state.name();
    let journal = Journal {
        version: VERSION,
        boot,
        state,
        request,
    };
    let text = record::to_text(&journal)?;
    Ok(JobState { step, text })
}

/// Returns the state of a job, and the boot during which it was recorded.
pub fn read_state(job: &JobRecord) -> Result<(BootId, State), Error> {
    let Journal { boot, state, .. } = whole_journal(job)?;
    Ok((boot, state))
}

/// Returns the request of a queued job, and the boot during which it was recorded.
pub fn queued_request(job: &JobRecord) -> Result<(BootId, QueuedRequest), Error> {
    let Journal { boot, request, .. } = whole_journal(job)?;
    let request = request.ok_or_else(|| record::unreadable(job.id, "its request is missing"))?;
    Ok((boot, request))
}

fn whole_journal(job: &JobRecord) -> Result<Journal, Error> {
    let Versioned { version } = record::read(job.id, Some(&job.state))?;
    if version != VERSION {
        return Err(record::unreadable(
            job.id,
            &format!("a service of another version wrote it: {version}"),
        ));
    }
    record::read(job.id, Some(&job.state))
}

impl State {
    /// Returns the residue that a job may have after it has ended with this state.
    pub fn residue(&self) -> Residue {
        match self {
            Self::Ended(ended) => Residue {
                in_qemu: ended.in_qemu,
                on_disk: ended.on_disk,
                holds_poweroff: ended.holds_poweroff,
                may_have_paused_guest: self.may_have_paused_guest(),
            },
            _ => Residue::default(),
        }
    }
}

impl Job {
    /// Creates a job that has not ended, with the status of its recorded state. `earlier`: an earlier instance of the
    /// service started it.
    pub(in crate::job) fn of_record(
        of: &JobRecord,
        domain: Arc<Domain>,
        spec: JobSpec,
        catalog: Catalog,
        earlier: bool,
    ) -> Self {
        let job = Self::new(of, domain, spec, catalog, earlier);
        if let Ok((_, state)) = read_state(of) {
            job.update(|status| {
                status.frozen = state.frozen();
                status.quiesce_problem = state.quiesce_problem().map(str::to_owned);
                if let Some(verdict) = state.verdict().filter(|verdict| !verdict.disks.is_empty()) {
                    status.disks.clone_from(&verdict.disks);
                }
            });
        }
        job
    }

    /// Creates a job that has ended.
    pub(in crate::job) fn ended(
        of: &JobRecord,
        domain: Arc<Domain>,
        catalog: Catalog,
    ) -> Result<Self, Error> {
        let job = Self::of_record(of, domain, record::spec(of)?, catalog, true);
        let disks: Vec<DiskStatus> = record::read(of.id, of.disks.as_deref())?;
        let outcome = match of.result.as_deref() {
            Some("completed") => Outcome::Completed,
            Some("cancelled") => Outcome::Cancelled,
            Some("failed") => Outcome::Failed(record::read(of.id, of.error.as_deref())?),
            _ => return Err(record::unreadable(of.id, "its result")),
        };
        job.update(|status| {
            status.state = Shown::Finishing;
            status.disks = disks;
            status.outcome = Some(outcome);
        });
        Ok(job)
    }

    /// Returns the record of the outcome.
    pub(in crate::job) fn end_record(
        &self,
        outcome: &Outcome,
        state: &State,
        boot: BootId,
    ) -> Result<Ended, Error> {
        let residue = state.residue();
        Ok(Ended {
            time: clock::now(),
            result: outcome.as_str().to_owned(),
            error: match outcome {
                Outcome::Failed(error) => Some(record::to_text(error)?),
                Outcome::Completed | Outcome::Cancelled => None,
            },
            disks: record::to_text(&self.status().disks)?,
            state: to_record(state, boot)?.text,
            left_in_qemu: residue.in_qemu,
            left_on_disk: residue.on_disk,
        })
    }
}
