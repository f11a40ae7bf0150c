//! The second half of a backup: from ended block jobs to the outcome.

use std::sync::PoisonError;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::driver::Driver;
use super::state::{Copying, Fact, State};
use crate::catalog::{self, BackupRecord};
use crate::checkpoint::bitmap_name;
use crate::job::bandwidth::Part;
use crate::job::context::{JobContext, blocking};
use crate::job::error::Stopped;
use crate::job::qemu::QemuObjects;
use crate::job::{DiskState, Error, Job, Outcome, Reservation, State as Shown};
use crate::model;
use crate::offload::{self, Progress, unless_stalled};
use crate::plan::{Destination, Plan, TargetPlan};
use crate::targets::{self, FileDigest, Targets};

/// The timeout for undoing a stalled backup before its outcome is announced.
pub(super) const BRIEFLY: Duration = Duration::from_secs(2);

impl Driver<'_> {
    /// Dismisses the jobs and closes the images in QEMU. The caller has recorded the jobs' outcome.
    pub(super) async fn close_images(&mut self) -> Result<Fact, Stopped> {
        self.show_finishing();
        let patience = self.context.deadlines.stall();
        let closed = self.objects()?.close_images(self.plan.disks.len());
        let closed = tokio::time::timeout(patience, closed).await;
        closed.map_err(|_| Error::stalled("QEMU", patience))??;
        Ok(Fact::Closed)
    }

    /// Removes all objects of the backup from QEMU. The hold on the guest's power-off is removed first, in any case. If
    /// the backup is stalled, the other objects stay, because QEMU and the guest would hang with it.
    pub(super) async fn release(&mut self, state: &State) -> Fact {
        self.show_finishing();
        self.part = self.part.take().and_then(Part::end);
        let in_qemu = self.release_all(state).await;
        if !in_qemu {
            self.part = None;
        }
        Fact::Released { in_qemu }
    }

    /// Returns whether QEMU may still have objects of the backup.
    async fn release_all(&self, state: &State) -> bool {
        let undo = state.verdict();
        let stalled = undo.is_some_and(|verdict| verdict.stalled);
        let Some(objects) = &self.objects else {
            return !self.qemu_is_gone;
        };
        objects.allow_poweroff(BRIEFLY).await;
        if stalled {
            return true;
        }
        if self.resumed && undo.is_some() && state.files().is_some() {
            self.empty_lost_files(objects).await;
        }
        let is_closed = matches!(state, State::Closed(_)) && !self.resumed;
        let released = async {
            match is_closed {
                true => objects.release_closed(self.plan.disks.len()).await,
                false => objects.release().await,
            }
        };
        let released = tokio::time::timeout(self.context.deadlines.stall(), released).await;
        let why = match released {
            Ok(Ok(())) => {
                if state.may_have_paused_guest() {
                    resume_guest(self.job, objects).await;
                }
                return false;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "QEMU does not answer".to_owned(),
        };
        tracing::warn!(
            job = self.job.id,
            why,
            "QEMU still has objects of the backup; the service removes them later"
        );
        true
    }

    /// Empties files that the caller passed as descriptors. The service's own descriptors ended with the earlier
    /// process, so only QEMU can do it.
    async fn empty_lost_files(&self, objects: &QemuObjects) {
        let disks = self.plan.disks.iter().enumerate();
        let passed = disks.filter(|(_, disk)| matches!(disk.target, TargetPlan::Descriptor(_)));
        let passed: Vec<usize> = passed.map(|(index, _)| index).collect();
        if passed.is_empty() {
            return;
        }
        let emptied = objects.empty_files(&passed);
        let why = match tokio::time::timeout(self.context.deadlines.stall(), emptied).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "QEMU does not answer".to_owned(),
        };
        tracing::warn!(
            job = self.job.id,
            why,
            "a file that the caller passed may still contain a part of the backup"
        );
    }

    /// Makes the images durable, and computes their digests.
    pub(super) async fn seal(&mut self) -> Result<Fact, Stopped> {
        self.show_finishing();
        let digests = self.watched(Targets::seal).await?;
        Ok(Fact::Sealed { digests })
    }

    /// Compares the images with the recorded digests. This is necessary after a restart of the host, because its file
    /// system was recovered.
    pub(super) async fn prove(&mut self, state: &State) -> Result<Fact, Stopped> {
        self.show_finishing();
        let State::Sealed { digests, .. } = state.clone() else {
            return Err(Error::Interrupted.into());
        };
        let proven = self.watched(move |targets, progress, cancel| targets.prove(&digests, progress, cancel));
        match proven.await? {
            true => Ok(Fact::Proven),
            false => Err(Error::HostRestarted.into()),
        }
    }

    /// Runs work on the targets that reports its progress. It ends early only if its progress stalls, if the backup is
    /// cancelled, or if the service stops.
    async fn watched<T, W>(&mut self, work: W) -> Result<T, Stopped>
    where
        T: Send + 'static,
        W: FnOnce(&Targets, &Progress, &CancellationToken) -> Result<Option<T>, targets::Error>
            + Send
            + 'static,
    {
        let targets = self.take_targets()?;
        let (progress, interrupt) = (Progress::default(), CancellationToken::new());
        let _interrupt = interrupt.clone().drop_guard();
        let (counted, interrupted) = (progress.clone(), interrupt.clone());
        let shares = self.shares.clone();
        let work = blocking(self.context, move || {
            let _shares = shares;
            let result = work(&targets, &counted, &interrupted);
            // If the caller has given up, this drops the targets, which discards them.
            (targets, result)
        });
        let work = unless_stalled(|| progress.get(), self.context.deadlines.stall(), work);
        tokio::pin!(work);
        let stop = &self.context.stop;
        let worked = tokio::select! {
            worked = &mut work => worked,
            () = self.job.cancel.cancelled() => { interrupt.cancel(); work.await }
            () = stop.cancelled() => { interrupt.cancel(); work.await }
        };
        let (targets, result) = worked.ok_or_else(|| self.stalled())?;
        self.targets = Some(targets);
        match result.map_err(Error::Target)? {
            Some(result) => Ok(result),
            None if self.job.cancel.is_cancelled() => Err(Stopped::Cancelled),
            None => Err(Stopped::Detached),
        }
    }

    /// Publishes all images, unless the backup was cancelled before.
    pub(super) async fn publish(&mut self, state: &State) -> Result<Fact, Stopped> {
        self.show_finishing();
        let State::Sealed { copying, digests, .. } = state else {
            return Err(Error::Interrupted.into());
        };
        if !self.job.begin_publishing() {
            return Err(Stopped::Cancelled);
        }
        let targets = self.take_targets()?;
        let manifest = match targets.in_store() {
            true => manifest(
                (self.job, &self.plan),
                copying,
                digests,
                self.context.catalog.key(),
            ),
            false => Ok(Vec::new()),
        };
        let (manifest, document) = match (manifest, self.job.definition()) {
            (Ok(manifest), Ok(document)) => (manifest, document),
            (Err(error), _) | (_, Err(error)) => {
                self.targets = Some(targets);
                return Err(error.into());
            }
        };
        let record = String::from_utf8_lossy(&manifest).into_owned();
        self.name_all(
            targets,
            vec![
                (model::MANIFEST_NAME, manifest),
                (model::DEFINITION_NAME, document.into_bytes()),
            ],
        )
        .await?;
        self.made = self.backup_record(record, false);
        self.raise_generation().await;
        Ok(Fact::Published)
    }

    /// Completes a backup that an earlier instance published. The manifest has all its properties.
    pub(super) async fn adopt(&mut self) -> Result<Fact, Stopped> {
        self.show_finishing();
        let targets = self.take_targets()?;
        let Some(published) = targets.published().cloned() else {
            self.targets = Some(targets);
            return Err(Error::Interrupted.into());
        };
        // The manifest was written after the data was durable, so it is right even if the job's record says less.
        self.name_all(targets, Vec::new()).await?;
        self.made = self.backup_record(published.text, published.protected);
        self.raise_generation().await;
        Ok(Fact::Published)
    }

    async fn name_all(
        &mut self,
        mut targets: Targets,
        records: Vec<(&'static str, Vec<u8>)>,
    ) -> Result<(), Stopped> {
        let (job, progress) = (self.job.clone(), Progress::default());
        let (counted, shares) = (progress.clone(), self.shares.clone());
        let work = blocking(self.context, move || {
            let _shares = shares;
            let records: Vec<(&str, &[u8])> = records
                .iter()
                .map(|(name, content)| (*name, content.as_slice()))
                .collect();
            let published = targets.publish(&records, &counted).map_err(Error::Target);
            match published {
                // The job failed with a timeout in the meantime, so this thread undoes the publication.
                Ok(()) if !job.published() => (targets, Err(Stopped::Cancelled)),
                Ok(()) => (targets, Ok(())),
                Err(error) => (targets, Err(error.into())),
            }
        });
        tokio::pin!(work);
        let stall = self.context.deadlines.stall();
        let (targets, published) = match unless_stalled(|| progress.get(), stall, &mut work).await {
            Some(published) => published,
            None if self.job.give_up() => return Err(self.stalled().into()),
            None => work.await,
        };
        match published {
            Ok(()) => {
                self.cached = targets.cached();
                self.parents = targets.leave();
                Ok(())
            }
            Err(stopped) => {
                self.targets = Some(targets);
                Err(stopped)
            }
        }
    }

    /// Marks the change in the store before the backup is recorded. If the service dies in between, the next start
    /// reads the store again.
    async fn raise_generation(&self) {
        if let Some(made) = &self.made {
            self.context.generations.raise(&made.store).await;
        }
    }

    fn backup_record(&self, manifest: String, protected: bool) -> Option<BackupRecord> {
        match &self.plan.destination {
            Destination::Store { name, directory, .. } => Some(BackupRecord {
                id: self.job.backup_id.clone(),
                store: name.clone(),
                domain: directory.to_string(),
                manifest,
                protected,
            }),
            Destination::Caller => None,
        }
    }

    /// Removes the targets of a failed or cancelled backup.
    pub(super) async fn discard(&mut self, state: &State) -> Fact {
        self.show_finishing();
        let patience = match state.verdict() {
            Some(verdict) if verdict.stalled => BRIEFLY,
            _ => self.context.deadlines.stall(),
        };
        let left = discard(self.context, self.targets.take(), patience).await;
        Fact::Discarded {
            on_disk: left || self.unknown,
        }
    }

    /// Announces the outcome. The caller has recorded it, because the record decides which checkpoints are useful.
    pub(super) async fn announce(&mut self, state: &State, reservation: Option<Reservation>) {
        let job = self.job;
        let outcome = match state.verdict() {
            None => Outcome::Completed,
            Some(verdict) => verdict.outcome.clone(),
        };
        tracing::info!(job = job.id, domain = job.domain.name, outcome = ?outcome, "backup ended");
        drop(std::mem::take(&mut self.parents));
        // After a stall, or if QEMU still has objects of this backup, a later backup removes useless checkpoints.
        let State::Ended(ended) = state else { return };
        let stalled = ended.undone.as_ref().is_some_and(|verdict| verdict.stalled);
        if job.has_checkpoints()
            && !stalled
            && !ended.in_qemu
            && let Some(objects) = self.objects.take()
        {
            self.prune_checkpoints(&objects).await;
        }
        // Freed before the announcement, because a client may start the next backup as soon as it knows the outcome.
        drop((reservation, self.shares.take()));
        job.update(|status| status.outcome = Some(outcome));
        let cached = std::mem::take(&mut self.cached);
        blocking(self.context, move || cached.release()).await;
    }

    async fn prune_checkpoints(&self, objects: &QemuObjects) {
        let kept = self.disks.lock().unwrap_or_else(PoisonError::into_inner).take();
        let settled = objects.prune_checkpoints(kept, self.context);
        let why = match tokio::time::timeout(self.context.deadlines.stall(), settled).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "QEMU does not answer".to_owned(),
        };
        tracing::warn!(
            job = self.job.id,
            why,
            "cannot remove useless checkpoints; the next backup tries again"
        );
    }

    fn show_finishing(&self) {
        self.job.update(|status| {
            status.state = Shown::Finishing;
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
}

/// Removes the targets of a failed job. Returns whether some may remain.
pub(in crate::job) async fn discard(
    context: &JobContext,
    targets: Option<Targets>,
    patience: Duration,
) -> bool {
    let Some(targets) = targets else { return true };
    let discard = move |progress: &Progress| targets.discard(progress);
    !offload::watched(&context.activity, patience, discard)
        .await
        .unwrap_or(false)
}

fn manifest(
    (job, plan): (&Job, &Plan),
    copying: &Copying,
    digests: &[FileDigest],
    key: &catalog::Key,
) -> Result<Vec<u8>, Error> {
    let domain = model::Domain {
        name: job.domain.name.clone(),
        uuid: job.domain_uuid,
        unknown: model::Unknown::new(),
    };
    let mut manifest = model::Manifest::new(
        plan.kind(),
        job.backup_id.clone(),
        job.id,
        job.started_by.uid,
        domain,
        job.start_time,
        copying.point_in_time,
    );
    manifest.name = plan.name.clone();
    manifest.description = plan.description.clone();
    manifest.quiesced = copying.quiesced;
    manifest.frozen_us = Some(copying.frozen_us).filter(|time| *time > 0);
    manifest.quiesce_problem.clone_from(&copying.quiesce_problem);
    manifest.checkpoint = plan.checkpoint.clone();
    if let Destination::Store {
        sequence, service, ..
    } = &plan.destination
    {
        manifest.sequence = *sequence;
        manifest.service = Some(*service);
    }
    manifest.not_in_backup = plan.outside.clone();
    let disks = plan.disks.iter().zip(digests).enumerate();
    let in_store = disks.filter_map(|(index, (disk, digest))| match &disk.target {
        TargetPlan::InStore { file_name } => Some(model::Disk {
            name: disk.name.clone(),
            file: file_name.clone(),
            format: disk.format,
            virtual_size: disk.virtual_size,
            length: Some(digest.length),
            blake3: digest.blake3.clone(),
            sha256: None,
            parent: disk.mode.parent(),
            bitmap: disk.checkpoint.then(|| bitmap_name(&job.backup_id, index)),
            unknown: model::Unknown::new(),
        }),
        TargetPlan::File(_) | TargetPlan::Block(_) | TargetPlan::Descriptor(_) => None,
    });
    manifest.disks = in_store.collect();
    manifest
        .prove(key)
        .and_then(|()| manifest.to_json())
        .map_err(|error| Error::Record(error.to_string()))
}

/// Resumes the guest if QEMU paused it because the target failed.
///
/// A guest's write to a part that is not copied yet fails with the target (copy-before-write). By default, a device
/// pauses the guest if the target is full (`werror=enospc`). Without the backup, the repeated write reaches the disk.
/// If the disk itself failed, QEMU pauses the guest again.
pub(super) async fn resume_guest(job: &Job, objects: &QemuObjects) {
    let link = objects.link();
    let resumed = async {
        match link.run_state().await?.is_io_error() {
            true => link.resume_guest().await.map(|()| true),
            false => Ok(false),
        }
    };
    let (job, domain) = (job.id, &job.domain.name);
    match resumed.await {
        Ok(true) => tracing::warn!(
            job,
            domain,
            "resumed the guest, which QEMU had paused because the backup's target failed"
        ),
        Ok(false) => {}
        Err(error) => tracing::warn!(
            job,
            domain,
            %error,
            "QEMU may have paused the guest because the backup's target failed. Check the VM"
        ),
    }
}
