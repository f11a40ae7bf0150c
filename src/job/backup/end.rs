//! The second half of a backup: from block jobs that completed or failed to the outcome.

use std::sync::PoisonError;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::driver::Driver;
use super::state::{Copying, Fact, State};
use crate::catalog::{self, BackupRecord};
use crate::job::chain::checkpoint_name;
use crate::job::error::Stopped;
use crate::job::footprint::Footprint;
use crate::job::{DiskState, Error, Job, Outcome, Reservation, State as Shown, blocking};
use crate::model;
use crate::offload::{self, Progress, unless_stalled};
use crate::plan::{Destination, Place};
use crate::target::{self, FileDigest, Targets};

/// How long what hung before may take to be undone before the outcome is announced.
pub(super) const BRIEFLY: Duration = Duration::from_secs(2);

impl Driver<'_> {
    /// Has QEMU forget the jobs and close the images. Their outcome is on record.
    pub(super) async fn close_images(&mut self) -> Result<Fact, Stopped> {
        self.show_finishing();
        let patience = self.setting.deadlines.stall();
        let closed = self.footprint()?.close_images(self.job.plan.disks.len());
        let closed = tokio::time::timeout(patience, closed).await;
        closed.map_err(|_| Error::stalled("QEMU", patience))??;
        Ok(Fact::Closed)
    }

    /// Removes all that QEMU has of the backup. The guest's power-off comes first, whatever becomes of the rest. Where
    /// something hangs QEMU is not asked for the rest: it would wait, and the guest with it.
    pub(super) async fn release(&mut self, state: &State) -> Fact {
        self.show_finishing();
        let in_qemu = self.release_all(state).await;
        if !in_qemu {
            self.part = None;
        }
        Fact::Released { in_qemu }
    }

    /// Returns whether QEMU may still have something.
    async fn release_all(&self, state: &State) -> bool {
        let undo = state.verdict();
        let stalled = undo.is_some_and(|verdict| verdict.stalled);
        let Some(footprint) = &self.footprint else {
            return !self.qemu_is_gone;
        };
        footprint.let_poweroff_go(BRIEFLY).await;
        if stalled {
            return true;
        }
        if self.resumed && undo.is_some() && state.files().is_some() {
            self.empty_lost_files(footprint).await;
        }
        let is_closed = matches!(state, State::Closed(_)) && !self.resumed;
        let released = async {
            match is_closed {
                true => footprint.release_closed(self.job.plan.disks.len()).await,
                false => footprint.release().await,
            }
        };
        let released = tokio::time::timeout(self.setting.deadlines.stall(), released).await;
        let why = match released {
            Ok(Ok(())) => {
                if state.may_have_paused_guest() {
                    resume_guest(self.job, footprint).await;
                }
                return false;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it does not answer".to_owned(),
        };
        tracing::warn!(
            job = self.job.id,
            why,
            "QEMU still has something of the backup: it is removed later"
        );
        true
    }

    /// A file that a caller had passed went with the earlier process; only QEMU still has it.
    async fn empty_lost_files(&self, footprint: &Footprint) {
        let disks = self.job.plan.disks.iter().enumerate();
        let passed = disks.filter(|(_, disk)| matches!(disk.place, Place::Descriptor(_)));
        let passed: Vec<usize> = passed.map(|(index, _)| index).collect();
        if passed.is_empty() {
            return;
        }
        let emptied = footprint.empty_files(&passed);
        let why = match tokio::time::timeout(self.setting.deadlines.stall(), emptied).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "QEMU does not answer".to_owned(),
        };
        tracing::warn!(
            job = self.job.id,
            why,
            "an open file of the caller's may still have a part of the backup in it"
        );
    }

    /// Makes the images durable, and computes their digests.
    pub(super) async fn seal(&mut self) -> Result<Fact, Stopped> {
        self.show_finishing();
        let digests = self.watched(Targets::seal).await?;
        Ok(Fact::Sealed { digests })
    }

    /// Compares the images with the digests on record: the host restarted since, and its file system was recovered.
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

    /// Runs work on the targets that reports its progress. However long it takes, it ends when it makes none, when the
    /// backup is cancelled, or when the service stops.
    async fn watched<T, W>(&mut self, work: W) -> Result<T, Stopped>
    where
        T: Send + 'static,
        W: FnOnce(&Targets, &Progress, &CancellationToken) -> Result<Option<T>, target::Error>
            + Send
            + 'static,
    {
        let targets = self.take_targets()?;
        let (progress, interrupt) = (Progress::default(), CancellationToken::new());
        let _interrupt = interrupt.clone().drop_guard();
        let (counted, interrupted) = (progress.clone(), interrupt.clone());
        let shares = self.shares.clone();
        let work = blocking(self.setting, move || {
            let _shares = shares;
            let result = work(&targets, &counted, &interrupted);
            // If nobody waits for it any more, it is discarded here.
            (targets, result)
        });
        let work = unless_stalled(|| progress.get(), self.setting.deadlines.stall(), work);
        tokio::pin!(work);
        let stop = &self.setting.stop;
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

    /// Gives everything its final name, unless the backup was cancelled up to here.
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
            true => manifest(self.job, copying, digests, self.setting.catalog.key()),
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

    /// Takes in a backup that an earlier process published: its manifest says what it is.
    pub(super) async fn adopt(&mut self) -> Result<Fact, Stopped> {
        self.show_finishing();
        let targets = self.take_targets()?;
        let Some(published) = targets.published().cloned() else {
            self.targets = Some(targets);
            return Err(Error::Interrupted.into());
        };
        // Whatever the record says of it: the manifest was written when all was durable.
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
        let work = blocking(self.setting, move || {
            let _shares = shares;
            let records: Vec<(&str, &[u8])> = records
                .iter()
                .map(|(name, content)| (*name, content.as_slice()))
                .collect();
            let published = targets.publish(&records, &counted).map_err(Error::Target);
            match published {
                // It took so long that it was said to have failed: it is taken back here.
                Ok(()) if !job.published() => (targets, Err(Stopped::Cancelled)),
                Ok(()) => (targets, Ok(())),
                Err(error) => (targets, Err(error.into())),
            }
        });
        tokio::pin!(work);
        let stall = self.setting.deadlines.stall();
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

    /// Marks the change in the store before it is on record: in between, the next start reads the store again.
    async fn raise_generation(&self) {
        if let Some(made) = &self.made {
            self.setting.generations.raise(&made.store).await;
        }
    }

    fn backup_record(&self, manifest: String, protected: bool) -> Option<BackupRecord> {
        match &self.job.plan.destination {
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

    /// Removes the targets of a backup that came to nothing.
    pub(super) async fn discard(&mut self, state: &State) -> Fact {
        self.show_finishing();
        let patience = match state.verdict() {
            Some(verdict) if verdict.stalled => BRIEFLY,
            _ => self.setting.deadlines.stall(),
        };
        let left = discard(self.setting, self.targets.take(), patience).await;
        Fact::Discarded {
            on_disk: left || self.unknown,
        }
    }

    /// After the outcome is on record: what is on record decides which checkpoints are of use.
    pub(super) async fn announce(&mut self, state: &State, reservation: Option<Reservation>) {
        let job = self.job;
        let outcome = match state.verdict() {
            None => Outcome::Completed,
            Some(verdict) => verdict.outcome.clone(),
        };
        tracing::info!(job = job.id, domain = job.domain.name, outcome = ?outcome, "backup ended");
        drop(std::mem::take(&mut self.parents));
        // What hangs, or still has something of this backup, is tidied by a later one.
        let State::Ended(ended) = state else { return };
        let stalled = ended.undone.as_ref().is_some_and(|verdict| verdict.stalled);
        if job.has_checkpoints()
            && !stalled
            && !ended.in_qemu
            && let Some(footprint) = self.footprint.take()
        {
            self.settle_checkpoints(&footprint).await;
        }
        // Before anybody hears of the end: who waits for it may start the next one at once.
        drop((reservation, self.shares.take()));
        job.update(|status| status.outcome = Some(outcome));
        let cached = std::mem::take(&mut self.cached);
        blocking(self.setting, move || cached.release()).await;
    }

    async fn settle_checkpoints(&self, footprint: &Footprint) {
        let kept = self.disks.lock().unwrap_or_else(PoisonError::into_inner).take();
        let settled = footprint.settle_checkpoints(kept, self.setting);
        let why = match tokio::time::timeout(self.setting.deadlines.stall(), settled).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "QEMU does not answer".to_owned(),
        };
        tracing::warn!(
            job = self.job.id,
            why,
            "checkpoints that are of no use stay until the next backup"
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

/// Removes what a failed job made; true if something may be left.
pub(in crate::job) async fn discard(
    setting: &crate::job::manager::Setting,
    targets: Option<Targets>,
    patience: Duration,
) -> bool {
    let Some(targets) = targets else { return true };
    let discard = move |progress: &Progress| targets.discard(progress);
    !offload::watched(&setting.activity, patience, discard)
        .await
        .unwrap_or(false)
}

fn manifest(
    job: &Job,
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
        job.plan.kind(),
        job.backup_id.clone(),
        job.id,
        job.started_by.uid,
        domain,
        job.start_time,
        copying.point_in_time,
    );
    manifest.name = job.plan.name.clone();
    manifest.description = job.plan.description.clone();
    manifest.quiesced = copying.quiesced;
    manifest.frozen_us = Some(copying.frozen_us).filter(|time| *time > 0);
    manifest.quiesce_problem.clone_from(&copying.quiesce_problem);
    manifest.checkpoint = job.plan.checkpoint.clone();
    if let Destination::Store {
        sequence, service, ..
    } = &job.plan.destination
    {
        manifest.sequence = *sequence;
        manifest.service = Some(*service);
    }
    manifest.not_in_backup = job.plan.outside.clone();
    let disks = job.plan.disks.iter().zip(digests).enumerate();
    let in_store = disks.filter_map(|(index, (disk, digest))| match &disk.place {
        Place::InStore { file_name } => Some(model::Disk {
            name: disk.name.clone(),
            file: file_name.clone(),
            format: disk.format,
            virtual_size: disk.virtual_size,
            length: Some(digest.length),
            blake3: digest.blake3.clone(),
            sha256: None,
            parent: disk.mode.parent(),
            bitmap: disk.checkpoint.then(|| checkpoint_name(&job.backup_id, index)),
            unknown: model::Unknown::new(),
        }),
        Place::File(_) | Place::Block(_) | Place::Descriptor(_) => None,
    });
    manifest.disks = in_store.collect();
    manifest
        .prove(key)
        .and_then(|()| manifest.to_json())
        .map_err(|error| Error::Record(error.to_string()))
}

/// Resumes the guest if QEMU paused it because the target failed.
///
/// A guest's write to a part that is not copied yet fails with the target (copy-before-write). By default, a device pauses
/// the guest if the target is full (`werror=enospc`). Without the backup, the repeated write reaches the disk. If the disk
/// itself failed, QEMU pauses the guest again.
pub(super) async fn resume_guest(job: &Job, footprint: &Footprint) {
    let link = footprint.link();
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
            "QEMU had paused the guest because the backup's target failed: it runs again"
        ),
        Ok(false) => {}
        Err(error) => tracing::warn!(
            job,
            domain,
            %error,
            "QEMU may have paused the guest because the backup's target failed: check the VM"
        ),
    }
}
