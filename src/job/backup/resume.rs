//! Crash recovery: resumes or cleans up a backup of an earlier instance of the service.
//!
//! The record has the last step; QEMU and the targets show any later progress. Recovery touches only recorded targets
//! and names.

use std::sync::Arc;
use std::time::Duration;

use super::driver::Driver;
use super::end::resume_guest;
use super::state::{Evidence, Fact, Reached, State};
use super::{journal, quiesce};
use crate::catalog::{JobRecord, Leftover};
use crate::definition::Quiesce;
use crate::domain::Reach;
use crate::error;
use crate::job::bandwidth::Part;
use crate::job::boot::BootId;
use crate::job::context::{JobContext, blocking, watched};
use crate::job::ending::{Ending, Residue};
use crate::job::error::Stopped;
use crate::job::qemu::QemuObjects;
use crate::job::{Error, Job, Reservation, record};
use crate::offload::Progress;
use crate::plan::Plan;
use crate::targets::{Found, TargetId, Targets, label};

/// The recorded identities of a backup's target files.
#[derive(Debug, Default)]
struct Known {
    files: Option<Vec<TargetId>>,
    /// Device numbers are comparable only within one boot.
    same_boot: bool,
}

impl Known {
    fn on_record(job: &JobRecord, context: &JobContext) -> Self {
        let Ok((boot, state)) = journal::read_state(job) else {
            return Self::default();
        };
        Self {
            files: state.files().map(<[TargetId]>::to_vec),
            same_boot: boot == context.boot,
        }
    }
}

/// Resumes an unfinished job and returns how it ended.
pub(in crate::job) async fn resume(
    (job, plan): (&Arc<Job>, &Arc<Plan>),
    record: &JobRecord,
    (boot, state): (BootId, State),
    (mut reservation, part): (Reservation, Option<Part>),
    context: &JobContext,
) -> Ending {
    tracing::info!(
        job = job.id,
        domain = job.domain.name,
        step = record.step,
        "resuming a backup after a restart of the service"
    );
    let same_boot = boot == context.boot;
    let known = Known {
        files: state.files().map(<[TargetId]>::to_vec),
        same_boot,
    };
    let patience = context.deadlines.stall();
    let found = tokio::time::timeout(patience, find_targets((job, plan), known, context)).await;
    let mut driver = Driver::new(job, plan.clone(), context);
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
        match reach((job, plan), record, &mut reservation, context).await {
            Ok((reached, objects)) => {
                evidence.qemu = reached;
                driver.objects = objects;
            }
            Err(()) => {
                if let Some(targets) = driver.targets.take() {
                    blocking(context, move || drop(targets.leave())).await;
                }
                return Ending::Detached;
            }
        }
    }
    driver.qemu_is_gone = evidence.qemu == Reached::Gone;
    if state.holds_poweroff()
        && let Some(objects) = &driver.objects
    {
        objects.holds_poweroff();
    }
    driver
        .drive(state, Fact::Resumed(evidence), Some(reservation))
        .await
}

/// Finds the domain's QEMU. Fails if the service stops before.
async fn reach(
    (job, plan): (&Arc<Job>, &Plan),
    record: &JobRecord,
    reservation: &mut Reservation,
    context: &JobContext,
) -> Result<(Reached, Option<QemuObjects>), ()> {
    let identity = job.identity();
    let reach = context.domains.reach(&identity, context.deadlines.reconnect());
    Ok(match context.stop.run_until_cancelled(reach).await.ok_or(())? {
        Reach::Connected(domain, link) => {
            reservation.add(&domain);
            // Otherwise `thaw` has already done this.
            if may_be_frozen(record) && (job.domain.agent.is_none() || job.domain.id != domain.id) {
                quiesce::thaw_again(&domain).await;
            }
            (
                Reached::Yes,
                Some(QemuObjects::of((job, plan), domain, link, context)),
            )
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
        let objects = self.objects()?;
        let infos = objects.query_jobs_within(self.context.deadlines.stall()).await?;
        let there = infos.iter().any(|info| objects.names.own(&info.id));
        // Without the reply, nobody knows whether the guest was frozen at the point in time.
        if !there || self.plan.quiesce == Some(Quiesce::Require) {
            return Err(Error::Interrupted.into());
        }
        let guest_ran = self.check_start().await?.is_running();
        Ok(Fact::Started {
            guest_ran,
            point_in_time: *not_before,
            quiesced: false,
            frozen: Duration::ZERO,
            quiesce_problem: self
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
        journal::read_state(record),
        Ok((_, State::Starting { freezes: true, .. }))
    )
}

/// Thaws a guest that may be frozen since an earlier instance ended. The service does this before all other recovery.
pub(in crate::job) async fn thaw(record: JobRecord, context: &JobContext) {
    if may_be_frozen(&record)
        && let Ok(identity) = record::identity(record.id, &record.domain)
        && let Some(domain) = context.domains.identified(&identity)
    {
        let thawed = quiesce::thaw_again(&domain);
        context.stop.run_until_cancelled(thawed).await;
    }
}

/// Finds a published backup whose job is recorded as queued, because the catalog is an old copy. Removes files of any
/// other queued backup. Fails if files may remain, because the storage hangs or refuses the removal.
pub(in crate::job) async fn find_published(
    (job, plan): (&Arc<Job>, &Arc<Plan>),
    context: &JobContext,
) -> Result<Option<Targets>, Error> {
    let patience = context.deadlines.stall();
    let (id, planned) = (job.backup_id.clone(), plan.clone());
    let find = move || Untaken(Some(find((&id, &planned), &Known::default()).targets));
    let found = tokio::time::timeout(patience, blocking(context, find)).await;
    let mut untaken = found.map_err(|_| Error::stalled("the storage", patience))?;
    let targets = untaken.0.take();
    if targets
        .as_ref()
        .is_some_and(|targets| targets.published().is_some())
    {
        return Ok(targets);
    }
    // Each file counts as progress.
    let discard = move |progress: &Progress| targets.map(|targets| targets.discard(progress));
    match watched(context, "the storage", discard).await? {
        Some(false) => {
            let targets = plan.disks.iter().map(|disk| label(plan, disk, &job.backup_id));
            Err(Error::NotRemoved {
                targets: targets.collect::<Vec<_>>().join(", "),
            })
        }
        Some(true) | None => Ok(None),
    }
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

fn find((id, plan): (&str, &Plan), known: &Known) -> Found {
    let files = known.files.as_deref();
    Targets::find(plan, id, files, known.same_boot)
}

async fn find_targets((job, plan): (&Job, &Arc<Plan>), known: Known, context: &JobContext) -> Found {
    let (id, plan) = (job.backup_id.clone(), plan.clone());
    blocking(context, move || find((&id, &plan), &known)).await
}

/// Removes the residue of an ended job as soon as it can be reached, and records the removal.
pub(in crate::job) async fn clean_up(job: &Arc<Job>, residue: Residue, context: &JobContext) {
    // Only a backup has residue.
    let Some(plan) = job.plan() else { return };
    if residue.on_disk {
        let known = match context.catalog.ended_job(job.id).await {
            Ok(Some(ended)) => Known::on_record(&ended, context),
            _ => Known::default(),
        };
        let found = find_targets((job, plan), known, context).await;
        let unknown = found.unknown;
        if blocking(context, move || found.targets.discard(&Progress::default())).await && !unknown {
            cleared(job.id, Leftover::OnDisk, context).await;
        }
    }
    if !residue.in_qemu {
        return;
    }
    let identity = job.identity();
    // Keeps the service running only for a known domain. An unknown domain may never return; if it does, a later
    // instance removes the residue.
    let known = context.domains.identified(&identity);
    let _needed = known.map(|_| context.activity.begin());
    let free = async {
        loop {
            match context.domains.reach(&identity, Duration::MAX).await {
                Reach::Gone => return true,
                Reach::Late => return false,
                Reach::Connected(domain, link) => {
                    let objects = QemuObjects::of((job, plan), domain, link, context);
                    if residue.holds_poweroff {
                        objects.holds_poweroff();
                    }
                    match objects.release_gently().await {
                        Ok(()) => {
                            if residue.may_have_paused_guest {
                                resume_guest(job, &objects).await;
                            }
                            return true;
                        }
                        Err(error) => {
                            tracing::warn!(job = job.id, %error, "QEMU still has objects of the backup");
                            tokio::time::sleep(context.deadlines.reconnect()).await;
                        }
                    }
                }
            }
        }
    };
    if context.stop.run_until_cancelled(free).await == Some(true) {
        cleared(job.id, Leftover::InQemu, context).await;
    }
}

async fn cleared(id: u32, what: Leftover, context: &JobContext) {
    tracing::info!(job = id, ?what, "removed the residue of a job");
    if let Err(error) = context.catalog.cleared(id, what).await {
        tracing::warn!(job = id, %error, "cannot record the removal of a job's residue");
    }
}
