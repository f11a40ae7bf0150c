//! From QEMU's verdict on a backup to its outcome.
//!
//! The order of the end is fixed: the verdict is on record, QEMU forgets its jobs and closes the images, they are durable,
//! they get their names, the outcome is on record, it is told. Nothing is told earlier.

use std::sync::Arc;
use std::time::Duration;

use super::chain::checkpoint_name;
use super::error::Stopped;
use super::footprint::Footprint;
use super::manager::Setting;
use super::record::{Left, Verdict, to_text};
use super::run::{blocking, remember};
use super::{Decision, DiskState, Error, Job, Outcome, Reservation, State};
use crate::catalog::{self, BackupRecord, Instant, Reached, Step};
use crate::error;
use crate::fault::{self, Point};
use crate::plan::{Destination, Place};
use crate::target::{Parents, Seal, Targets};

/// How long is waited for what hung before to be undone now, before the outcome is told.
const BRIEFLY: Duration = Duration::from_secs(2);

/// What there is to be concluded.
pub(super) struct End<'a> {
    pub job: &'a Arc<Job>,
    pub setting: &'a Setting,
    /// Nothing where the domain cannot be reached.
    pub footprint: Option<Footprint>,
    /// Nothing where they hang with who works on them.
    pub targets: Option<Targets>,
    /// How far it is already on record.
    pub step: Step,
    /// Some of the targets could not be looked for.
    pub unknown: bool,
}

impl End<'_> {
    /// Brings the job to its outcome. Every place is published or gone after it, as far as is known.
    pub async fn conclude(self, judged: Result<Instant, Stopped>, reservation: Reservation) -> Left {
        self.show_finishing();
        let judged = self.remember_verdict(judged).await;
        let judged = self.close_images(judged).await;
        let hangs = matches!(&judged, Err(Stopped::Failed(error)) if error.hangs());
        let in_qemu = !self.release(hangs).await;
        let holds_poweroff = self
            .footprint
            .as_ref()
            .is_some_and(Footprint::is_holding_poweroff);
        fault::point(Point::Released);
        let Self {
            job,
            setting,
            footprint,
            targets,
            unknown,
            ..
        } = self;
        let patience = setting.deadlines.stall();
        let Published {
            ended,
            backup,
            parents,
            left: on_disk,
        } = match (judged, targets) {
            (Ok(instant), Some(targets)) => publish(job, setting, targets, instant).await,
            (Ok(_), None) => Published::not(Error::stalled("the targets", patience).into(), true),
            (Err(stopped), targets) => {
                let patience = if hangs { BRIEFLY } else { patience };
                let left = discard(setting, targets, patience).await;
                Published::not(stopped, left)
            }
        };
        fault::point(match ended {
            Ok(()) => Point::Published,
            Err(_) => Point::Discarded,
        });
        let left = Left {
            in_qemu,
            on_disk: on_disk || unknown,
            holds_poweroff,
        };
        let outcome = outcome(job, ended);
        tracing::info!(job = job.id, domain = job.domain.name, outcome = ?outcome, "backup ended");
        show_ended(job, &outcome);
        // Where it is not on record that the job has ended, it is that it runs, and on what.
        remember_end(job, setting, &outcome, left, backup).await;
        drop(parents);
        fault::point(Point::Ended);
        // What hangs, or was not let go of, is settled by a later backup.
        if let Some(footprint) = footprint.filter(|_| job.has_checkpoints() && !hangs && !in_qemu) {
            settle_checkpoints(job, setting, &footprint).await;
        }
        // Before anybody hears of the end: who waits for it may start the next one at once.
        drop(reservation);
        job.update(|status| status.outcome = Some(outcome));
        left
    }

    fn show_finishing(&self) {
        self.job.update(|status| {
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
    }

    /// Nothing is dismissed in QEMU before it is on record what it said.
    async fn remember_verdict(&self, judged: Result<Instant, Stopped>) -> Result<Instant, Stopped> {
        if self.step >= Step::Judged {
            return judged;
        }
        let verdict = match &judged {
            Ok(_) => Outcome::Completed,
            Err(Stopped::Failed(error)) => Outcome::Failed(error.clone().into()),
            Err(Stopped::Cancelled | Stopped::Left) => Outcome::Cancelled,
        };
        let verdict = Verdict {
            outcome: verdict,
            disks: self.job.status().disks,
        };
        let remembered = async {
            let verdict = to_text(&verdict)?;
            let frozen = self.job.status().frozen;
            remember(self.job, self.setting, Reached::Judged { verdict, frozen }).await
        };
        match remembered.await {
            Ok(()) => {
                fault::point(Point::Judged);
                judged
            }
            // What cannot be remembered cannot be told to be good. What failed has failed all the same.
            Err(error) => Err(judged.err().unwrap_or(Stopped::Failed(error))),
        }
    }

    async fn close_images(&self, judged: Result<Instant, Stopped>) -> Result<Instant, Stopped> {
        let instant = judged?;
        if self.step >= Step::Closed {
            return Ok(instant);
        }
        let Some(footprint) = &self.footprint else {
            return Err(Error::NotClosed.into());
        };
        let patience = self.setting.deadlines.stall();
        let closed = footprint.close_images(self.job.plan.disks.len());
        match tokio::time::timeout(patience, closed).await {
            Ok(closed) => closed?,
            Err(_) => return Err(Error::stalled("QEMU", patience).into()),
        }
        fault::point(Point::ImagesClosed);
        remember(self.job, self.setting, Reached::Closed).await?;
        fault::point(Point::Closed);
        Ok(instant)
    }

    /// Whether QEMU has nothing of the job any more. Where something hangs it is not even asked to let go: it would wait,
    /// and the guest with it.
    async fn release(&self, hangs: bool) -> bool {
        let Some(footprint) = &self.footprint else {
            return false;
        };
        if hangs {
            return false;
        }
        let released = tokio::time::timeout(self.setting.deadlines.stall(), footprint.release()).await;
        let why = match released {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it does not answer".to_owned(),
        };
        tracing::warn!(
            job = self.job.id,
            why,
            "QEMU still has something of the backup: it is removed later"
        );
        false
    }
}

/// After the outcome is on record: what is on record is what decides.
async fn settle_checkpoints(job: &Job, setting: &Setting, footprint: &Footprint) {
    let settled = footprint.settle_checkpoints(setting);
    let why = match tokio::time::timeout(setting.deadlines.stall(), settled).await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "QEMU does not answer".to_owned(),
    };
    tracing::warn!(
        job = job.id,
        why,
        "checkpoints that are of no use stay until the next backup"
    );
}

/// Removes what a failed backup made; true if something may be left.
pub(super) async fn discard(setting: &Setting, targets: Option<Targets>, patience: Duration) -> bool {
    let Some(targets) = targets else { return true };
    let discarded = blocking(setting, move || targets.discard());
    !tokio::time::timeout(patience, discarded).await.unwrap_or(false)
}

struct Published {
    ended: Result<(), Stopped>,
    backup: Option<BackupRecord>,
    /// Until the backup is on record.
    parents: Parents,
    /// Something of it may be.
    left: bool,
}

impl Published {
    fn not(stopped: Stopped, left: bool) -> Self {
        Self {
            ended: Err(stopped),
            backup: None,
            parents: Parents::default(),
            left,
        }
    }
}

/// Makes the data durable and gives it its name, unless the backup was cancelled up to that point.
async fn publish(job: &Arc<Job>, setting: &Setting, targets: Targets, instant: Instant) -> Published {
    let work = {
        let job = job.clone();
        blocking(setting, move || publish_all(&job, targets, instant))
    };
    tokio::pin!(work);
    let patience = setting.deadlines.finish();
    match tokio::time::timeout(patience, &mut work).await {
        Ok(published) => published,
        // Whatever it does from here on, it takes back.
        Err(_) if job.give_up() => Published::not(Error::stalled("the storage", patience).into(), true),
        Err(_) => work.await,
    }
}

fn publish_all(job: &Job, mut targets: Targets, instant: Instant) -> Published {
    match try_publish(job, &mut targets, instant) {
        Ok(backup) => Published {
            ended: Ok(()),
            backup,
            parents: targets.leave(),
            left: false,
        },
        Err(stopped) => Published::not(stopped, !targets.discard()),
    }
}

fn try_publish(job: &Job, targets: &mut Targets, instant: Instant) -> Result<Option<BackupRecord>, Stopped> {
    let sealed = targets.sync();
    fault::point(Point::Synced);
    if !job.begin_publishing() {
        return Err(Stopped::Cancelled);
    }
    let seals = sealed.map_err(Error::Target)?;
    let manifest = match targets.in_store() {
        true => manifest(job, instant, &seals)?,
        false => Vec::new(),
    };
    let document = job.definition()?;
    let records = [
        (catalog::MANIFEST_NAME, manifest.as_slice()),
        (catalog::DEFINITION_NAME, document.as_bytes()),
    ];
    targets.publish(&records).map_err(Error::Target)?;
    // It took so long that it was told to have failed.
    if !job.published() {
        return Err(Stopped::Cancelled);
    }
    Ok(match &job.plan.destination {
        Destination::Store { name, directory, .. } => Some(BackupRecord {
            id: job.backup_id.clone(),
            store: name.clone(),
            domain: directory.to_string(),
            manifest: String::from_utf8_lossy(&manifest).into_owned(),
        }),
        Destination::Caller => None,
    })
}

/// All disks have what the job has; but one that failed, or was done with, stays so.
pub(super) fn show_ended(job: &Job, outcome: &Outcome) {
    job.update(|status| {
        status.rate = 0;
        status.expected_end = None;
        for disk in &mut status.disks {
            match (outcome, &disk.state) {
                (Outcome::Completed, _) => disk.state = DiskState::Completed,
                (_, DiskState::Failed { .. } | DiskState::Completed) => {}
                _ => disk.state = DiskState::Cancelled,
            }
        }
    });
}

pub(super) fn outcome(job: &Job, ended: Result<(), Stopped>) -> Outcome {
    match ended {
        Ok(()) => Outcome::Completed,
        Err(Stopped::Cancelled | Stopped::Left) => Outcome::Cancelled,
        // Whoever cancelled what hangs was promised that.
        Err(Stopped::Failed(error)) if error.hangs() && *job.decision() == Decision::CancelRequested => {
            Outcome::Cancelled
        }
        Err(Stopped::Failed(error)) => {
            blame(job, &error);
            Outcome::Failed(error::Error::from(error))
        }
    }
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

/// A later process of the service comes to the same outcome from the last step that is on record.
pub(super) async fn remember_end(
    job: &Job,
    setting: &Setting,
    outcome: &Outcome,
    left: Left,
    backup: Option<BackupRecord>,
) {
    let remembered = async {
        let record = job.end_record(outcome, left)?;
        let history = setting.history;
        Ok::<_, Error>(setting.catalog.end(job.id, record, backup, history).await?)
    };
    if let Err(error) = remembered.await {
        tracing::error!(job = job.id, %error, "the outcome of a backup is not on record");
    }
}

fn manifest(job: &Job, instant: Instant, seals: &[Seal]) -> Result<Vec<u8>, Error> {
    let domain = catalog::Domain {
        name: job.domain.name.clone(),
        uuid: job.domain.snapshot().uuid,
    };
    let mut manifest = catalog::Manifest::new(
        job.plan.kind(),
        job.backup_id.clone(),
        job.id,
        job.started_by,
        domain,
        job.start_time,
        instant.time,
    );
    manifest.name = job.plan.name.clone();
    manifest.description = job.plan.description.clone();
    manifest.quiesced = instant.quiesced;
    manifest.frozen_us = Some(job.status().frozen_us()).filter(|time| *time > 0);
    manifest.checkpoint = job.plan.checkpoint.clone();
    let disks = job.plan.disks.iter().zip(seals).enumerate();
    let in_store = disks.filter_map(|(index, (disk, seal))| match &disk.place {
        Place::InStore { file_name } => Some(catalog::Disk {
            name: disk.name.clone(),
            file: file_name.clone(),
            format: disk.format,
            virtual_size: disk.virtual_size,
            length: Some(seal.length),
            sha256: seal.sha256.clone(),
            parent: disk.mode.parent(),
            bitmap: disk.checkpoint.then(|| checkpoint_name(&job.backup_id, index)),
        }),
        Place::File(_) | Place::Block(_) | Place::Descriptor(_) => None,
    });
    manifest.disks = in_store.collect();
    manifest
        .to_json()
        .map_err(|error| Error::Record(error.to_string()))
}
