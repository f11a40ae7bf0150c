//! One backup from its targets to QEMU's verdict on it.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::error::Stopped;
use super::footprint::{Footprint, Names};
use super::manager::Setting;
use super::progress::share;
use super::quiesce::{self, Frozen};
use super::record::to_text;
use super::running::Running;
use super::writeback::write_back;
use super::{Error, Job};
use crate::catalog::{Instant, Reached};
use crate::domain::{Domain, Link, Snapshot, poweroff};
use crate::fault::{self, Point};
use crate::plan::{DiskPlan, Mode};
use crate::qmp::{self, Events};
use crate::target::{Media, Target, Targets};

/// What there is of a backup when QEMU has judged it.
pub(super) struct Made {
    pub footprint: Footprint,
    /// Nothing if they hang with who works on them.
    pub targets: Option<Targets>,
    pub judged: Result<Instant, Stopped>,
}

/// Makes the backup of a job that nothing was done of but its places.
pub(super) async fn make(job: &Arc<Job>, link: Arc<Link>, targets: Targets, setting: &Setting) -> Made {
    let footprint = footprint(job, job.domain.clone(), link, setting);
    let (targets, begun) = begin(job, targets, setting).await;
    let judged = match (&targets, begun) {
        (Some(targets), Ok(())) => copy(job, &footprint, targets, setting).await,
        (_, Err(stopped)) => Err(stopped),
        (None, Ok(())) => Err(Error::stalled("the targets", setting.deadlines.stall()).into()),
    };
    Made {
        footprint,
        targets,
        judged,
    }
}

pub(super) fn footprint(job: &Job, domain: Arc<Domain>, link: Arc<Link>, setting: &Setting) -> Footprint {
    let names = Names::new(tag(&job.backup_id));
    Footprint::new(domain, link, names, setting.deadlines.reconnect())
}

/// The part of a backup's id that is unique by itself.
fn tag(backup_id: &str) -> &str {
    backup_id.rsplit('-').next().unwrap_or(backup_id)
}

/// Empties existing targets, when all that can be known before says that the backup will be made.
async fn begin(
    job: &Arc<Job>,
    mut targets: Targets,
    setting: &Setting,
) -> (Option<Targets>, Result<(), Stopped>) {
    let ready = async {
        quiesce::check(&job.domain, job.plan.quiesce).await?;
        let files = to_text(&targets.files())?;
        remember(job, setting, Reached::Writing { files }).await
    };
    if let Err(error) = ready.await {
        return (Some(targets), Err(error.into()));
    }
    fault::point(Point::Writing);
    let patience = setting.deadlines.stall();
    let job = job.clone();
    // Should it come back after all, what it has is discarded.
    let emptied = blocking(setting, move || {
        let begun = targets.begin(&job.plan).map_err(Error::Target);
        fault::point(Point::Begun);
        (targets, begun.map_err(Stopped::Failed))
    });
    match tokio::time::timeout(patience, emptied).await {
        Ok((targets, begun)) => (Some(targets), begun),
        Err(_) => (None, Err(Error::stalled("the targets", patience).into())),
    }
}

/// A step, before the next thing is done.
pub(super) async fn remember(job: &Job, setting: &Setting, reached: Reached) -> Result<(), Error> {
    Ok(setting.catalog.reached(job.id, reached).await?)
}

/// Prepares QEMU, starts the transaction and waits for its end.
async fn copy(
    job: &Job,
    footprint: &Footprint,
    targets: &Targets,
    setting: &Setting,
) -> Result<Instant, Stopped> {
    let prepare = async {
        for (index, (target, disk)) in targets.iter().zip(&job.plan.disks).enumerate() {
            footprint.open_target(index, target, disk).await?;
        }
        footprint.make_checkpoints(job).await?;
        Ok::<_, Error>(())
    };
    let patience = setting.deadlines.stall();
    let prepare = tokio::time::timeout(patience, prepare);
    // What was half made is removed by its name.
    match job.cancel.run_until_cancelled(prepare).await {
        Some(prepared) => {
            prepared.unwrap_or_else(|_| Err(Error::stalled("the preparation of QEMU", patience)))?
        }
        None => return Err(Stopped::Cancelled),
    }
    let speed = *job.speed.borrow();
    // From before the transaction: its jobs can end before its reply is read.
    let events = footprint.client().events();
    let instant = start(job, footprint, targets, speed, setting).await?;
    let frozen = job.status().frozen;
    remember(job, setting, Reached::Running { instant, frozen }).await?;
    fault::point(Point::Running);
    let mut running = Running::new(job, footprint, Some(speed), patience);
    follow(&mut running, events, targets, setting).await?;
    check_scans(job, footprint).await?;
    Ok(instant)
}

/// As exactly as the catalog remembers it: a later process of the service tells the same.
fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now)
}

/// Has QEMU begin to copy, at an instant.
async fn start(
    job: &Job,
    footprint: &Footprint,
    targets: &Targets,
    speed: u64,
    setting: &Setting,
) -> Result<Instant, Stopped> {
    let disks = job.plan.disks.len();
    let actions = targets.iter().zip(&job.plan.disks).enumerate();
    let actions = actions
        .map(|(index, (target, disk))| action(&footprint.names, index, target, disk, share(speed, disks)));
    let transaction = json!({
        "actions": actions.collect::<Vec<_>>(),
        "properties": { "completion-mode": "grouped" },
    });
    let patience = setting.deadlines.stall();
    let link = footprint.link();
    let holds_poweroff = job.plan.hold_poweroff && poweroff::can_hold(&link).await;
    let starting = Reached::Starting {
        not_before: now(),
        holds_poweroff,
    };
    remember(job, setting, starting).await?;
    fault::point(Point::Starting);
    if job.cancel.is_cancelled() {
        return Err(Stopped::Cancelled);
    }
    if holds_poweroff {
        footprint.holds_poweroff();
        let held = tokio::time::timeout(patience, poweroff::hold(&link)).await;
        held.map_err(|_| Error::stalled("QEMU", patience))?
            .map_err(Error::Lost)?;
    }
    fault::point(Point::PowerOffHeld);
    let quiesce = job.plan.quiesce;
    let frozen = Frozen::freeze(&job.domain, quiesce, setting.deadlines.freeze()).await?;
    fault::point(Point::Frozen);
    targets.iter().for_each(Target::mark_written);
    let client = footprint.client();
    let starting = async {
        let started = tokio::time::timeout(patience, client.execute("transaction", transaction)).await;
        (started, now())
    };
    tokio::pin!(starting);
    let in_time = frozen.during(starting.as_mut()).await;
    let thawed = frozen.thaw(&job.domain, quiesce, in_time.is_some()).await;
    job.update(|status| status.frozen = thawed.frozen);
    let (started, time) = match in_time {
        Some(started) => started,
        None => starting.await,
    };
    match started {
        Ok(started) => started.map_err(Error::Transaction)?,
        Err(_) => return Err(Error::stalled("the start in QEMU", patience).into()),
    };
    fault::point(Point::Started);
    let quiesced = thawed.quiesced?;
    check_start(job, footprint).await?;
    tracing::info!(job = job.id, domain = job.domain.name, "backup started");
    Ok(Instant { time, quiesced })
}

/// Whether what is copied from now on is the machine's.
pub(super) async fn check_start(job: &Job, footprint: &Footprint) -> Result<(), Stopped> {
    let now = check_sources(job, footprint).await?;
    // Some versions begin to copy a disk that another QEMU writes to already.
    match now.migration {
        Some(migration) => Err(Error::Migration(migration).into()),
        None => Ok(()),
    }
}

/// Follows jobs that run to QEMU's verdict on them.
pub(super) async fn follow(
    running: &mut Running<'_>,
    events: Events,
    targets: &Targets,
    setting: &Setting,
) -> Result<(), Stopped> {
    running.show_running();
    tokio::select! {
        ended = running.run(events, &setting.stop) => ended?,
        never = write_back(targets, setting) => match never {},
    }
    fault::point(Point::Concluded);
    running.judge()
}

/// Whether what was copied is what the guest wrote to, to the end, where that matters: QEMU first looks for what an image
/// holds, and a snapshot that another client makes meanwhile turns its eyes to a new, empty one.
pub(super) async fn check_scans(job: &Job, footprint: &Footprint) -> Result<(), Stopped> {
    if job.plan.disks.iter().any(|disk| disk.only_allocated) {
        check_sources(job, footprint).await?;
    }
    Ok(())
}

/// Whether what is being copied is what the guest writes to: a snapshot that another client made while the targets were
/// prepared has put a new image above it. Gives what QEMU said of itself.
async fn check_sources(job: &Job, footprint: &Footprint) -> Result<Snapshot, Stopped> {
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
    Ok(now)
}

fn action(names: &Names, index: usize, target: &Target, disk: &DiskPlan, speed: u64) -> Value {
    let sync = match &disk.mode {
        Mode::Since(_) => "bitmap",
        Mode::Full { .. } if disk.only_allocated && target.media == Media::Regular => "top",
        Mode::Full { .. } => "full",
    };
    let mut data = json!({
        "job-id": names.block_job(index),
        "device": disk.node,
        "target": names.target_node(index),
        "filter-node-name": names.filter_node(index),
        "sync": sync,
        "speed": speed,
        "auto-dismiss": false,
        // Anything else than an error would stop the job, or let the guest's writes fail, or retry for ever.
        "on-source-error": "report",
        "on-target-error": "report",
    });
    if let Mode::Since(base) = &disk.mode {
        data["bitmap"] = json!(base.bitmap);
        // It goes on recording since the instant that it has recorded since, for others to go on from.
        data["bitmap-mode"] = json!("never");
    }
    if disk.compress.is_some() {
        data["compress"] = json!(true);
    }
    json!({ "type": "blockdev-backup", "data": data })
}

/// Runs what waits for a disk where it keeps nobody else waiting. The service stays until it returns, though nobody may wait
/// for it any more: a process does not end before the last of its threads does, and no other is started before that.
pub(super) async fn blocking<T: Send + 'static>(
    setting: &Setting,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let needed = setting.activity.begin();
    let work = move || {
        let result = work();
        drop(needed);
        result
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // Nobody cancels it, and the runtime outlives every job: it panicked.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
