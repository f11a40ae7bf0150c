//! Going on where a former process of the service ended, however it ended.
//!
//! What is on record says how far each job was; QEMU and the places say what came after that. A job that QEMU still has goes
//! on; one that ended there meanwhile gets its true outcome; one that QEMU does not know has failed. Whatever is left of
//! jobs that have ended is removed, as soon as it can be reached. Nothing is touched that is not on record.

use std::sync::Arc;
use std::time::Duration;

use super::conclude::End;
use super::error::Stopped;
use super::footprint::Footprint;
use super::manager::{Ending, Setting};
use super::quiesce;
use super::record::{self, Left};
use super::run::{blocking, check_scans, check_start, follow, footprint};
use super::running::Running;
use super::{Error, Job, Reservation};
use crate::catalog::{Instant, JobRecord, Leftover, Step};
use crate::definition::Quiesce;
use crate::domain::{Identity, Reach};
use crate::plan::{Place, Plan};
use crate::target::{FileId, Found, Targets};

/// Brings a job to its end that was not ended before.
pub(super) async fn resume(
    job: &Arc<Job>,
    record: &JobRecord,
    reservation: Reservation,
    setting: &Setting,
) -> Ending {
    tracing::info!(
        job = job.id,
        domain = job.domain.name,
        step = record.step.as_str(),
        "a backup of before is gone on with"
    );
    let identity = job.domain.identity();
    let files = record::files(record);
    let found = match &files {
        Ok(files) => find_targets(job, files.clone(), setting).await,
        Err(_) => find_targets(job, None, setting).await,
    };
    let reached = setting
        .stop
        .run_until_cancelled(setting.domains.reach(&identity, setting.deadlines.reconnect()));
    let Some(reached) = reached.await else {
        blocking(setting, move || drop(found.targets.leave())).await;
        return Ending::Left;
    };
    let (footprint, unreachable) = match reached {
        Reach::Connected(domain, link) => {
            // Else it was done first of all.
            if may_be_frozen(record, &job.plan) && job.domain.agent.is_none() {
                quiesce::thaw_again(&domain).await;
            }
            (Some(footprint(job, domain, link, setting)), None)
        }
        Reach::Gone => (None, Some("it has ended")),
        Reach::Late => (None, Some("it did not appear in time")),
    };
    if record.holds_poweroff
        && let Some(footprint) = &footprint
    {
        footprint.holds_poweroff();
    }
    let judged = match files.map(|_| ()) {
        Ok(()) => judge(job, record, footprint.as_ref(), unreachable, &found, setting).await,
        Err(error) => Err(error.into()),
    };
    if let Err(Stopped::Left) = judged {
        blocking(setting, move || drop(found.targets.leave())).await;
        return Ending::Left;
    }
    if let (Err(stopped), Some(footprint)) = (&judged, &footprint)
        && !matches!(stopped, Stopped::Failed(error) if error.hangs())
    {
        empty_lost_files(job, footprint, setting).await;
    }
    let gone = matches!(unreachable, Some("it has ended"));
    let end = End {
        job,
        setting,
        footprint,
        targets: Some(found.targets),
        step: record.step,
        unknown: found.unknown,
    };
    let left = end.conclude(judged, reservation).await;
    Ending::Ended(Left {
        in_qemu: left.in_qemu && !gone,
        holds_poweroff: record.holds_poweroff,
        ..left
    })
}

/// Whether the former process may have ended while the guest was frozen.
pub(super) fn may_be_frozen(record: &JobRecord, plan: &Plan) -> bool {
    record.step == Step::Starting && quiesce::may_freeze(plan.quiesce)
}

/// Thaws a guest that was frozen when the former process ended, as soon as there is a process again: all else can wait.
pub(super) async fn thaw(record: JobRecord, setting: &Setting) {
    let (Ok(plan), Ok(identity)) = (record::plan(&record), record::identity(record.id, &record.domain))
    else {
        return;
    };
    if may_be_frozen(&record, &plan)
        && let Some(domain) = setting.domains.identified(&identity)
    {
        let thawed = quiesce::thaw_again(&domain);
        setting.stop.run_until_cancelled(thawed).await;
    }
}

/// A file that a caller had passed went with the former process; only QEMU still has it.
async fn empty_lost_files(job: &Job, footprint: &Footprint, setting: &Setting) {
    let disks = job.plan.disks.iter().enumerate();
    let passed = disks.filter(|(_, disk)| matches!(disk.place, Place::Descriptor(_)));
    let passed: Vec<usize> = passed.map(|(index, _)| index).collect();
    if passed.is_empty() {
        return;
    }
    let emptied = tokio::time::timeout(setting.deadlines.stall(), footprint.empty_files(&passed));
    let why = match emptied.await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "QEMU does not answer".to_owned(),
    };
    tracing::warn!(
        job = job.id,
        why,
        "an open file of the caller's may still have a part of the backup in it"
    );
}

async fn find_targets(job: &Arc<Job>, files: Option<Vec<FileId>>, setting: &Setting) -> Found {
    let job = job.clone();
    blocking(setting, move || {
        Targets::find(&job.plan, &job.backup_id, files.as_deref())
    })
    .await
}

/// What became of it in QEMU, as a former process found it or as it is found now.
async fn judge(
    job: &Arc<Job>,
    record: &JobRecord,
    footprint: Option<&Footprint>,
    unreachable: Option<&'static str>,
    found: &Found,
    setting: &Setting,
) -> Result<Instant, Stopped> {
    if record.cancel_requested && record.step < Step::Judged {
        return Err(Stopped::Cancelled);
    }
    match record.step {
        Step::Preparing | Step::Writing => return Err(Error::Interrupted.into()),
        Step::Starting | Step::Running => {}
        Step::Judged => record::verdict(record)?.judged()?,
        Step::Closed | Step::Ended => {}
    }
    let instant = record.instant.ok_or(Error::Interrupted)?;
    if let Some(lost) = &found.lost {
        return Err(Error::Target(lost.clone()).into());
    }
    if record.step >= Step::Judged {
        return Ok(instant);
    }
    let Some(footprint) = footprint else {
        return Err(Error::NotFound(unreachable.unwrap_or_default().to_owned()).into());
    };
    let events = footprint.client().events();
    let mut running = Running::new(job, footprint, None, setting.deadlines.stall());
    if record.step == Step::Starting {
        // The transaction made all of the jobs or none.
        let infos = footprint.query_jobs().await?;
        if !infos.iter().any(|info| footprint.names.own(&info.id)) {
            return Err(Error::Interrupted.into());
        }
        if job.plan.quiesce == Some(Quiesce::Require) {
            return Err(Error::Interrupted.into());
        }
        check_start(job, footprint).await?;
    }
    follow(&mut running, events, &found.targets, setting).await?;
    check_scans(job, footprint).await?;
    Ok(instant)
}

/// Removes what may be left of a job that has ended, as soon as it can be reached, and says so in the catalog.
pub(super) async fn sweep(id: u32, identity: Identity, left: Left, job: Arc<Job>, setting: &Setting) {
    if left.on_disk {
        let files = setting.catalog.ended_job(id).await;
        let files = match &files {
            Ok(Some(record)) => record::files(record).unwrap_or_default(),
            _ => None,
        };
        let found = find_targets(&job, files, setting).await;
        let unknown = found.unknown;
        if blocking(setting, move || found.targets.discard()).await && !unknown {
            cleared(id, Leftover::OnDisk, setting).await;
        }
    }
    if !left.in_qemu {
        return;
    }
    // A domain that is not known may never be again, and a process that is there when it is goes on with this.
    let known = setting.domains.identified(&identity);
    let _needed = known.map(|_| setting.activity.begin());
    let free = async {
        loop {
            match setting.domains.reach(&identity, Duration::MAX).await {
                Reach::Gone => return true,
                Reach::Late => return false,
                Reach::Connected(domain, link) => {
                    let footprint = footprint(&job, domain, link, setting);
                    if left.holds_poweroff {
                        footprint.holds_poweroff();
                    }
                    match footprint.release_gently().await {
                        Ok(()) => return true,
                        Err(error) => {
                            tracing::warn!(job = id, %error, "QEMU still has something of the backup");
                            tokio::time::sleep(setting.deadlines.reconnect()).await;
                        }
                    }
                }
            }
        }
    };
    if setting.stop.run_until_cancelled(free).await == Some(true) {
        cleared(id, Leftover::InQemu, setting).await;
    }
}

async fn cleared(id: u32, what: Leftover, setting: &Setting) {
    tracing::info!(job = id, ?what, "what was left of a backup is gone");
    if let Err(error) = setting.catalog.cleared(id, what).await {
        tracing::warn!(job = id, %error, "that nothing is left of a job is not on record");
    }
}
