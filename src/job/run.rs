//! One backup from its targets to its outcome.
//!
//! The order of the end is fixed: QEMU's verdict, QEMU lets go, the data is durable, it gets its name, the outcome is
//! told. Nothing is told earlier.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::error::Stopped;
use super::footprint::{Footprint, Names};
use super::progress::share;
use super::quiesce::{self, Frozen};
use super::running::Running;
use super::writeback::write_back;
use super::{DiskState, Error, Job, Outcome, Reservation, State};
use crate::catalog;
use crate::domain::Link;
use crate::error;
use crate::plan::{DiskPlan, Place};
use crate::qmp;
use crate::target::{Media, Target, Targets};

/// What was copied, and of when.
struct Copied {
    instant: Timestamp,
    quiesced: bool,
}

/// Runs `job` to its end. Every place in `targets` is published or gone when this returns.
pub(super) async fn run(job: &Arc<Job>, link: Arc<Link>, targets: Targets, reservation: Reservation) {
    let names = Names::new(tag(&job.backup_id));
    let mut footprint = Footprint::new(job.domain.clone(), link, names);
    let (targets, begun) = begin(job, targets).await;
    let copied = match begun {
        Ok(()) => copy(job, &footprint, &targets).await,
        Err(stopped) => Err(stopped),
    };
    job.update(|status| {
        status.state = State::Finishing;
        status.rate = 0;
        status.expected_end = None;
        for disk in &mut status.disks {
            if matches!(
                disk.state,
                DiskState::Preparing | DiskState::Running | DiskState::Waiting
            ) {
                disk.state = DiskState::Finishing;
            }
        }
    });
    let released = footprint.release().await;
    let ended = match (copied, released) {
        (Ok(copied), Ok(())) => finish(job, targets, copied).await,
        (Ok(_), Err(error)) => discard(targets, Stopped::Failed(error)).await,
        (Err(stopped), released) => {
            if let Err(error) = released {
                tracing::error!(job = job.id, %error, "something of the backup may be left in QEMU");
            }
            discard(targets, stopped).await
        }
    };
    let outcome = match ended {
        Ok(()) => Outcome::Completed,
        Err(Stopped::Cancelled) => Outcome::Cancelled,
        Err(Stopped::Failed(error)) => {
            blame(job, &error);
            Outcome::Failed(error::Error::from(error))
        }
    };
    tracing::info!(job = job.id, domain = job.domain.name, outcome = ?outcome, "backup ended");
    // Before anybody hears of the end: who waits for it may start the next one at once.
    drop(reservation);
    job.update(|status| {
        for disk in &mut status.disks {
            match (&outcome, &disk.state) {
                (Outcome::Completed, _) => disk.state = DiskState::Completed,
                (_, DiskState::Failed { .. }) => {}
                _ => disk.state = DiskState::Cancelled,
            }
        }
        status.outcome = Some(outcome);
    });
}

/// The part of a backup's id that is unique by itself.
fn tag(backup_id: &str) -> &str {
    backup_id.rsplit('-').next().unwrap_or(backup_id)
}

/// Marks the disk that an error is about, unless QEMU's verdict did so before.
fn blame(job: &Job, error: &Error) {
    let Some((name, operation)) = error.disk() else {
        return;
    };
    job.update(|status| {
        let guilty = status.disks.iter_mut().find(|disk| disk.name == name);
        if let Some(disk) = guilty.filter(|disk| !matches!(disk.state, DiskState::Failed { .. })) {
            disk.state = DiskState::Failed {
                operation: operation.into(),
                message: error.to_string(),
            };
        }
    });
}

/// Empties existing targets, when all that can be known before says that the backup will be made.
async fn begin(job: &Arc<Job>, mut targets: Targets) -> (Targets, Result<(), Stopped>) {
    if let Err(error) = quiesce::check(&job.domain, job.plan.quiesce).await {
        return (targets, Err(error.into()));
    }
    let job = job.clone();
    blocking(move || {
        let begun = targets.begin(&job.plan).map_err(Error::Target);
        (targets, begun.map_err(Stopped::Failed))
    })
    .await
}

/// Prepares QEMU, starts the transaction and waits for its end.
async fn copy(job: &Job, footprint: &Footprint, targets: &Targets) -> Result<Copied, Stopped> {
    let prepare = async {
        for (index, (target, disk)) in targets.iter().zip(&job.plan.disks).enumerate() {
            footprint.open_target(index, target, disk).await?;
        }
        Ok::<_, Error>(())
    };
    // What was half made is removed by its name.
    match job.cancel.run_until_cancelled(prepare).await {
        Some(prepared) => prepared?,
        None => return Err(Stopped::Cancelled),
    }
    let speed = *job.speed.borrow();
    let disks = job.plan.disks.len();
    let actions = targets.iter().zip(&job.plan.disks).enumerate();
    let actions = actions
        .map(|(index, (target, disk))| action(&footprint.names, index, target, disk, share(speed, disks)));
    let transaction = json!({
        "actions": actions.collect::<Vec<_>>(),
        "properties": { "completion-mode": "grouped" },
    });
    if job.cancel.is_cancelled() {
        return Err(Stopped::Cancelled);
    }
    // From before the transaction: its jobs can end before its reply is read.
    let events = footprint.client().events();
    let frozen = Frozen::freeze(&job.domain, job.plan.quiesce).await?;
    targets.iter().for_each(Target::mark_written);
    let started = footprint.client().execute("transaction", transaction).await;
    let instant = Timestamp::now();
    let thawed = frozen.thaw(&job.domain, job.plan.quiesce).await;
    started.map_err(Error::Transaction)?;
    let quiesced = thawed?;
    check_sources(job, footprint).await?;
    job.update(|status| {
        status.state = State::Running;
        status
            .disks
            .iter_mut()
            .for_each(|disk| disk.state = DiskState::Running);
    });
    tracing::info!(job = job.id, domain = job.domain.name, "backup started");
    let mut running = Running::new(job, footprint, speed);
    tokio::select! {
        ended = running.run(events) => ended.map_err(Error::Lost)?,
        never = write_back(targets) => match never {},
    }
    running.judge()?;
    Ok(Copied { instant, quiesced })
}

/// Whether what is being copied is what the guest writes to: a snapshot that another client made while the targets were
/// prepared has put a new image above it.
async fn check_sources(job: &Job, footprint: &Footprint) -> Result<(), Stopped> {
    let look = async {
        loop {
            match footprint.inspect().await {
                // It has much to write before it gets to answers. The copying goes on meanwhile.
                Err(qmp::Error::TimedOut { .. }) => {}
                result => return result.map_err(Error::Lost),
            }
        }
    };
    let Some(now) = job.cancel.run_until_cancelled(look).await else {
        return Err(Stopped::Cancelled);
    };
    let now = now?;
    for (index, planned) in job.plan.disks.iter().enumerate() {
        // By its node: a disk without an id of its own is called like its node, which is our filter just now.
        let filter = footprint.names.filter_node(index);
        let mut disks = now.disks.iter();
        if !disks.any(|disk| disk.node == planned.node || disk.node == filter) {
            let disk = planned.name.clone();
            return Err(Error::Changed { disk }.into());
        }
    }
    Ok(())
}

fn action(names: &Names, index: usize, target: &Target, disk: &DiskPlan, speed: u64) -> Value {
    let top = disk.only_allocated && target.media == Media::Regular;
    let mut data = json!({
        "job-id": names.block_job(index),
        "device": disk.node,
        "target": names.target_node(index),
        "filter-node-name": names.filter_node(index),
        "sync": if top { "top" } else { "full" },
        "speed": speed,
        "auto-dismiss": false,
        // Anything else than an error would stop the job, or let the guest's writes fail, or retry for ever.
        "on-source-error": "report",
        "on-target-error": "report",
    });
    if disk.compress.is_some() {
        data["compress"] = json!(true);
    }
    json!({ "type": "blockdev-backup", "data": data })
}

/// Makes the data durable and gives it its name, unless the backup was cancelled up to that point.
async fn finish(job: &Arc<Job>, targets: Targets, copied: Copied) -> Result<(), Stopped> {
    let job = job.clone();
    blocking(move || {
        let synced = targets.sync();
        if !job.begin_publishing() {
            return Err(Stopped::Cancelled);
        }
        synced.map_err(Error::Target)?;
        let manifest = if targets.in_store() {
            manifest(&job, &copied)?
        } else {
            Vec::new()
        };
        let document = job.definition();
        let records = [
            (catalog::MANIFEST_NAME, manifest.as_slice()),
            (catalog::DEFINITION_NAME, document.as_bytes()),
        ];
        targets.publish(&records).map_err(Error::Target)?;
        Ok(())
    })
    .await
}

async fn discard(targets: Targets, stopped: Stopped) -> Result<(), Stopped> {
    blocking(move || targets.discard()).await;
    Err(stopped)
}

/// Runs what waits for a disk where it keeps nobody else waiting.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // Nobody cancels it, and the runtime outlives every job: it panicked.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

fn manifest(job: &Job, copied: &Copied) -> Result<Vec<u8>, Error> {
    let domain = catalog::Domain {
        name: job.domain.name.clone(),
        uuid: job.domain.snapshot().uuid,
    };
    let mut manifest = catalog::Manifest::full(
        job.backup_id.clone(),
        job.id,
        job.started_by,
        domain,
        job.start_time,
        copied.instant,
    );
    manifest.name = job.plan.name.clone();
    manifest.description = job.plan.description.clone();
    manifest.quiesced = copied.quiesced;
    let in_store = job.plan.disks.iter().filter_map(|disk| match &disk.place {
        Place::InStore { file_name } => Some((disk, file_name)),
        Place::File(_) | Place::Block(_) | Place::Descriptor(_) => None,
    });
    manifest.disks = in_store
        .map(|(disk, file)| catalog::Disk {
            name: disk.name.clone(),
            file: file.clone(),
            format: disk.format,
            virtual_size: disk.virtual_size,
        })
        .collect();
    manifest
        .to_json()
        .map_err(|error| Error::Record(error.to_string()))
}
