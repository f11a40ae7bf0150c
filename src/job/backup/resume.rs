//! Crash recovery: resumes or cleans up a backup of an earlier instance of the service.
//!
//! The record has the last step; QEMU and the targets show any later progress. Recovery touches only recorded targets
//! and names.

use std::sync::Arc;
use std::time::Duration;

use super::driver::Driver;
use super::end::resume_guest;
use super::state::{Evidence, Fact, Reached, State};
use crate::catalog::{JobRecord, Leftover};
use crate::definition::Quiesce;
use crate::domain::Reach;
use crate::error;
use crate::job::bandwidth::Part;
use crate::job::boot::BootId;
use crate::job::error::Stopped;
use crate::job::footprint::Footprint;
use crate::job::manager::{Ending, Setting};
use crate::job::record::{self, Residue};
use crate::job::{Error, Job, Reservation, blocking, quiesce};
use crate::offload::Progress;
use crate::target::{Found, TargetId, Targets};

/// The recorded identities of a backup's target files.
#[derive(Debug, Default)]
struct Known {
    files: Option<Vec<TargetId>>,
    /// Device numbers are comparable only within one boot.
    same_boot: bool,
}

impl Known {
    fn on_record(job: &JobRecord, setting: &Setting) -> Self {
        let Ok((boot, state)) = record::read_journal(job) else {
            return Self::default();
        };
        Self {
            files: state.files().map(<[TargetId]>::to_vec),
            same_boot: boot == setting.boot,
        }
    }
}

/// Resumes an unfinished job and returns how it ended.
pub(in crate::job) async fn resume(
    job: &Arc<Job>,
    record: &JobRecord,
    (boot, state): (BootId, State),
    (mut reservation, part): (Reservation, Option<Part>),
    setting: &Setting,
) -> Ending {
    tracing::info!(
        job = job.id,
        domain = job.domain.name,
        step = record.step,
        "resuming a backup after a restart of the service"
    );
    let same_boot = boot == setting.boot;
    let known = Known {
        files: state.files().map(<[TargetId]>::to_vec),
        same_boot,
    };
    let patience = setting.deadlines.stall();
    let found = tokio::time::timeout(patience, find_targets(job, known, setting)).await;
    let mut driver = Driver::new(job, setting);
    driver.resumed = true;
    driver.part = part;
    let mut evidence = Evidence {
        same_boot,
        cancel_requested: record.cancel_requested,
        published: false,
        lost: None,
        qemu: Reached::Gone,
        disks: job.status().disks,
    };
    match found {
        Ok(found) => {
            evidence.published = found.targets.published().is_some();
            evidence.lost = found.lost.map(|lost| error::Error::from(Error::Target(lost)));
            driver.unknown = found.unknown;
            driver.targets = Some(found.targets);
        }
        Err(_) => evidence.lost = Some(Error::stalled("the storage", patience).into()),
    }
    job.recovered(evidence.published);
    if same_boot {
        match reach(job, record, &mut reservation, setting).await {
            Ok((reached, footprint)) => {
                evidence.qemu = reached;
                driver.footprint = footprint;
            }
            Err(()) => {
                if let Some(targets) = driver.targets.take() {
                    blocking(setting, move || drop(targets.leave())).await;
                }
                return Ending::Detached;
            }
        }
    }
    driver.qemu_is_gone = evidence.qemu == Reached::Gone;
    if state.holds_poweroff()
        && let Some(footprint) = &driver.footprint
    {
        footprint.holds_poweroff();
    }
    driver
        .drive(state, Fact::Resumed(evidence), Some(reservation))
        .await
}

/// Finds the domain's QEMU. Fails if the service stops before.
async fn reach(
    job: &Arc<Job>,
    record: &JobRecord,
    reservation: &mut Reservation,
    setting: &Setting,
) -> Result<(Reached, Option<Footprint>), ()> {
    let identity = job.identity();
    let reach = setting.domains.reach(&identity, setting.deadlines.reconnect());
    Ok(match setting.stop.run_until_cancelled(reach).await.ok_or(())? {
        Reach::Connected(domain, link) => {
            reservation.add(&domain);
            // Otherwise `thaw` has already done this.
            if may_be_frozen(record) && (job.domain.agent.is_none() || job.domain.id != domain.id) {
                quiesce::thaw_again(&domain).await;
            }
            (Reached::Yes, Some(Footprint::of(job, domain, link, setting)))
        }
        Reach::Gone => (Reached::Gone, None),
        Reach::Late => (Reached::Late, None),
    })
}

impl Driver<'_> {
    /// Returns the result of a transaction whose reply is not recorded. A transaction starts all of its jobs or none.
    pub(super) async fn find_jobs(&self, state: &State) -> Result<Fact, Stopped> {
        let State::Starting { not_before, .. } = state else {
            return Err(Error::Interrupted.into());
        };
        let footprint = self.footprint()?;
        let infos = footprint
            .query_jobs_within(self.setting.deadlines.stall())
            .await?;
        let there = infos.iter().any(|info| footprint.names.own(&info.id));
        // Without the reply, nobody knows whether the guest was frozen at the point in time.
        if !there || self.job.plan.quiesce == Some(Quiesce::Require) {
            return Err(Error::Interrupted.into());
        }
        let guest_ran = self.check_start().await?.is_running();
        Ok(Fact::Started {
            guest_ran,
            point_in_time: *not_before,
            quiesced: false,
            frozen: Duration::ZERO,
            quiesce_problem: self
                .job
                .plan
                .quiesce
                .filter(|wanted| *wanted != Quiesce::No)
                .map(|_| "the service ended before it knew whether they were frozen".to_owned()),
        })
    }
}

/// Returns whether the earlier instance may have ended while the guest was frozen.
fn may_be_frozen(record: &JobRecord) -> bool {
    matches!(
        record::read_journal(record),
        Ok((_, State::Starting { freezes: true, .. }))
    )
}

/// Thaws a guest that may be frozen since an earlier instance ended. The service does this before all other recovery.
pub(in crate::job) async fn thaw(record: JobRecord, setting: &Setting) {
    if may_be_frozen(&record)
        && let Ok(identity) = record::identity(record.id, &record.domain)
        && let Some(domain) = setting.domains.identified(&identity)
    {
        let thawed = quiesce::thaw_again(&domain);
        setting.stop.run_until_cancelled(thawed).await;
    }
}

/// Finds a published backup whose job is recorded as queued, because the catalog is an old copy. Removes files of any
/// other queued backup. Fails if the storage hangs.
pub(in crate::job) async fn find_published(
    job: &Arc<Job>,
    setting: &Setting,
) -> Result<Option<Targets>, Error> {
    let patience = setting.deadlines.stall();
    let sought = job.clone();
    let find = move || Untaken(Some(find(&sought, &Known::default()).targets));
    let found = tokio::time::timeout(patience, blocking(setting, find)).await;
    let mut untaken = found.map_err(|_| Error::stalled("the storage", patience))?;
    let targets = untaken.0.take();
    if targets
        .as_ref()
        .is_some_and(|targets| targets.published().is_some())
    {
        return Ok(targets);
    }
    blocking(setting, move || drop(targets)).await;
    Ok(None)
}

/// The targets that a thread found. If the caller has given up, dropping this leaves them unchanged, because another
/// step of the job may use them.
struct Untaken(Option<Targets>);

impl Drop for Untaken {
    fn drop(&mut self) {
        if let Some(targets) = self.0.take() {
            drop(targets.leave());
        }
    }
}

fn find(job: &Job, known: &Known) -> Found {
    let files = known.files.as_deref();
    Targets::find(&job.plan, &job.backup_id, files, known.same_boot)
}

async fn find_targets(job: &Arc<Job>, known: Known, setting: &Setting) -> Found {
    let job = job.clone();
    blocking(setting, move || find(&job, &known)).await
}

/// Removes the residue of an ended job as soon as it can be reached, and records the removal.
pub(in crate::job) async fn sweep(job: &Arc<Job>, residue: Residue, setting: &Setting) {
    if residue.on_disk {
        let known = match setting.catalog.ended_job(job.id).await {
            Ok(Some(ended)) => Known::on_record(&ended, setting),
            _ => Known::default(),
        };
        let found = find_targets(job, known, setting).await;
        let unknown = found.unknown;
        if blocking(setting, move || found.targets.discard(&Progress::default())).await && !unknown {
            cleared(job.id, Leftover::OnDisk, setting).await;
        }
    }
    if !residue.in_qemu {
        return;
    }
    let identity = job.identity();
    // Keeps the service running only for a known domain. An unknown domain may never return; if it does, a later
    // instance removes the residue.
    let known = setting.domains.identified(&identity);
    let _needed = known.map(|_| setting.activity.begin());
    let free = async {
        loop {
            match setting.domains.reach(&identity, Duration::MAX).await {
                Reach::Gone => return true,
                Reach::Late => return false,
                Reach::Connected(domain, link) => {
                    let footprint = Footprint::of(job, domain, link, setting);
                    if residue.holds_poweroff {
                        footprint.holds_poweroff();
                    }
                    match footprint.release_gently().await {
                        Ok(()) => {
                            if residue.may_have_paused_guest {
                                resume_guest(job, &footprint).await;
                            }
                            return true;
                        }
                        Err(error) => {
                            tracing::warn!(job = job.id, %error, "QEMU still has objects of the backup");
                            tokio::time::sleep(setting.deadlines.reconnect()).await;
                        }
                    }
                }
            }
        }
    };
    if setting.stop.run_until_cancelled(free).await == Some(true) {
        cleared(job.id, Leftover::InQemu, setting).await;
    }
}

async fn cleared(id: u32, what: Leftover, setting: &Setting) {
    tracing::info!(job = id, ?what, "removed the residue of a job");
    if let Err(error) = setting.catalog.cleared(id, what).await {
        tracing::warn!(job = id, %error, "cannot record the removal of a job's residue");
    }
}
