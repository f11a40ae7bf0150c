//! `org.example.Backup1.Job`: one job.

use std::sync::Arc;

use zbus::wire::{OwnedObjectPath, Variant};

use super::call::{Answer, Call};
use super::error::name;
use super::object::Properties;
use super::{Context, domain_path};
use crate::checkpoint::Mode;
use crate::error::Kind;
use crate::job::{DiskState, DiskStatus, Job, Outcome, Status};
use crate::plan::DiskPlan;

/// A disk on the bus: name, state, bytes in total, bytes done, target, error.
pub type DiskTuple = (String, String, u64, u64, String, String);

/// The copied part of a disk: its name, mode, base backup, and the reason for a full copy.
pub type IncrementTuple = (String, &'static str, String, &'static str);

fn increment(disk: &DiskPlan) -> IncrementTuple {
    let (since, why) = match &disk.mode {
        Mode::Full { why } => (String::new(), why.as_str()),
        Mode::Incremental(base) => (base.backup.clone(), ""),
    };
    (disk.name.clone(), disk.mode.as_str(), since, why)
}

/// The changing properties on the bus.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    pub domain: OwnedObjectPath,
    pub increments: Vec<IncrementTuple>,
    pub not_in_backup: Vec<(String, String)>,
    pub encrypted: Vec<String>,
    pub state: &'static str,
    pub progress: f64,
    pub bytes: u64,
    pub bytes_done: u64,
    pub rate: u64,
    pub expected_end_time: u64,
    pub frozen_time: u64,
    pub quiesce_problem: String,
    pub disks: Vec<DiskTuple>,
    pub error_name: &'static str,
    pub error_message: String,
}

impl View {
    pub fn of(job: &Job, status: &Status) -> Self {
        let (_, error_name, error_message) = result(status);
        let end = status
            .expected_end
            .and_then(|end| u64::try_from(end.as_microsecond()).ok());
        Self {
            domain: domain_path(job.domain.id),
            increments: disks(job).map(increment).collect(),
            not_in_backup: not_in_backup(job),
            encrypted: encrypted(job),
            state: status.state_word(),
            progress: status.progress(),
            bytes: status.bytes(),
            bytes_done: status.bytes_done(),
            rate: status.rate,
            expected_end_time: end.unwrap_or(0),
            frozen_time: status.frozen_us(),
            quiesce_problem: status.quiesce_problem.clone().unwrap_or_default(),
            disks: status.disks.iter().map(disk).collect(),
            error_name,
            error_message,
        }
    }
}

/// The disks that the job backs up; none for work on stored backups.
fn disks(job: &Job) -> impl Iterator<Item = &DiskPlan> {
    job.plan().into_iter().flat_map(|plan| &plan.disks)
}

/// The domain's devices that are not in the backup, on the bus: name and type.
fn not_in_backup(job: &Job) -> Vec<(String, String)> {
    let devices = job.plan().into_iter().flat_map(|plan| &plan.outside);
    devices
        .map(|device| (device.name.clone(), device.kind.clone()))
        .collect()
}

/// The disks that QEMU decrypts for the backup.
fn encrypted(job: &Job) -> Vec<String> {
    let disks = disks(job).filter(|disk| disk.encrypted);
    disks.map(|disk| disk.name.clone()).collect()
}

fn disk(disk: &DiskStatus) -> DiskTuple {
    let error = match &disk.state {
        DiskState::Failed { message, .. } => message.clone(),
        _ => String::new(),
    };
    let state = disk.state.as_str().to_owned();
    (
        disk.name.clone(),
        state,
        disk.total,
        disk.done,
        disk.target.clone(),
        error,
    )
}

/// The outcome of a job for `Wait` and `Completed`: result, error name, message. All empty while the job runs.
pub fn result(status: &Status) -> (&'static str, &'static str, String) {
    let Some(outcome) = &status.outcome else {
        return <_>::default();
    };
    let word = outcome.as_str();
    match outcome {
        Outcome::Completed => (word, "", String::new()),
        Outcome::Failed(error) => (word, name(error.kind), error.message.clone()),
        Outcome::Cancelled => (word, name(Kind::Cancelled), cancelled(status)),
    }
}

fn cancelled(status: &Status) -> String {
    match status.displaced {
        Some(why) => format!("the job was cancelled: {why}"),
        None => "the job was cancelled".into(),
    }
}

pub async fn call(context: &Context, call: &Call, job: &Arc<Job>) -> Answer {
    match call.member.as_str() {
        "Cancel" => {
            call.no_arguments()?;
            cancel(context, call, job, None).await
        }
        "CancelDisk" => {
            let disk: String = call.arguments()?;
            cancel(context, call, job, Some(&disk)).await
        }
        "Wait" => {
            call.no_arguments()?;
            if context.service.is_starter(&call.caller, job) {
                context.follower.listen(job, call.peer());
            }
            call.while_present(async { Ok(job.wait().await) }).await?;
            call.reply(&result(&job.status()))
        }
        "SetSpeed" => {
            let bytes_per_second: u64 = call.arguments()?;
            let set = async {
                let service = &context.service;
                Ok(service.set_speed(&call.caller, job, bytes_per_second).await?)
            };
            call.while_present(set).await?;
            call.reply(&())
        }
        "GetDefinition" => {
            call.no_arguments()?;
            call.reply(&job.definition()?)
        }
        _ => Err(call.unknown_method()),
    }
}

async fn cancel(context: &Context, call: &Call, job: &Job, disk: Option<&str>) -> Answer {
    let cancel = async { Ok(context.service.cancel(&call.caller, job, disk).await?) };
    call.while_present(cancel).await?;
    call.reply(&())
}

pub async fn properties(context: &Context, job: &Job) -> Properties {
    job.look().await;
    let position = context.service.jobs.position(job.id);
    let view = View::of(job, &job.status());
    // The time is negative if the host's clock was not set.
    let start_time = u64::try_from(job.start_time.as_microsecond()).unwrap_or(0);
    vec![
        ("Id", Variant::from(job.id)),
        ("Domain", Variant::from(view.domain)),
        ("Mode", Variant::from(job.spec.mode())),
        ("Backup", Variant::from(job.backup().to_owned())),
        ("StartedByUID", Variant::from(job.started_by.uid)),
        ("StartTime", Variant::from(start_time)),
        ("Increments", Variant::from(view.increments)),
        ("NotInBackup", Variant::from(view.not_in_backup)),
        ("Encrypted", Variant::from(view.encrypted)),
        ("State", Variant::from(view.state)),
        ("QueuePosition", Variant::from(position)),
        ("Progress", Variant::from(view.progress)),
        ("Bytes", Variant::from(view.bytes)),
        ("BytesDone", Variant::from(view.bytes_done)),
        ("Rate", Variant::from(view.rate)),
        ("ExpectedEndTime", Variant::from(view.expected_end_time)),
        ("FrozenTime", Variant::from(view.frozen_time)),
        ("QuiesceProblem", Variant::from(view.quiesce_problem)),
        ("Disks", Variant::from(view.disks)),
        ("ErrorName", Variant::from(view.error_name)),
        ("ErrorMessage", Variant::from(view.error_message)),
    ]
}
