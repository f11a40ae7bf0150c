//! The first half of a backup: from its targets to completed block jobs.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use jiff::Timestamp;

use super::driver::Driver;
use super::end::BRIEFLY;
use super::state::Fact;
use crate::clock;
use crate::domain::{Disk, Link, RunState, poweroff};
use crate::error::is_no_space;
use crate::fault;
use crate::job::error::Stopped;
use crate::job::footprint::{Footprint, Names};
use crate::job::guard::Limits;
use crate::job::latency::Latency;
use crate::job::progress::share;
use crate::job::quiesce::Freeze;
use crate::job::running::Running;
use crate::job::scan::check_snapshot;
use crate::job::writeback::write_back;
use crate::job::{Error, blocking, sentinel, watched};
use crate::model::Format;
use crate::offload::Progress;
use crate::plan::{DiskPlan, Mode};
use crate::qmp::block::{
    BackupPerf, BackupSync, BitmapSyncMode, BlockdevBackup, OnError, Transaction, TransactionAction,
};
use crate::qmp::{self, Done, Feature};
use crate::target::{Media, Target, Targets};

/// How many parts of a disk QEMU copies at a time, up to 1 MiB each. With its default of 64 the buffers don't fit into a processor's
/// cache, which makes copying in memory a quarter slower, and a guest's write waits for more of them where the target is slow.
const WORKERS: u32 = 16;
/// The most that QEMU copies at once, in bytes: less is left where it found no more space (`BLOCK_COPY_MAX_BUFFER` in block-copy.c).
const COPIED_AT_ONCE: u64 = 1 << 20;

impl Driver<'_> {
    /// Has QEMU open what existed before, makes the checkpoints' bitmaps, and asks the guest's agent whether it can freeze:
    /// whatever refuses the backup here costs nobody the content of a file.
    pub(super) async fn check_targets(&mut self) -> Result<Fact, Stopped> {
        let (footprint, targets) = (self.footprint()?, self.targets()?);
        let existing = targets
            .iter()
            .enumerate()
            .filter(|(_, target)| target.has_content());
        self.in_qemu(async {
            let mut rehearse = false;
            for (index, target) in existing {
                footprint.check_target(index, target).await?;
                rehearse = true;
            }
            if rehearse {
                let actions = self.actions(footprint, targets, self.job.speed.limits().effective());
                footprint.rehearse(&self.job.plan.disks, actions).await?;
            }
            footprint.make_checkpoints(self.job).await
        })
        .await?;
        let limits = Limits {
            wait: self.setting.deadlines.freeze_wait(),
            frozen: self.setting.deadlines.freeze(),
        };
        self.freeze = Some(Freeze::prepare(&self.job.domain, self.job.plan.quiesce, limits).await?);
        Ok(Fact::Checked)
    }

    /// Empties the targets: the point of no return for existing files.
    pub(super) async fn format(&mut self) -> Result<Fact, Stopped> {
        let mut targets = self.take_targets()?;
        let job = self.job.clone();
        // If it comes back after the timeout, what it has is discarded there.
        let format = move |progress: &Progress| {
            let formatted = targets.format(&job.plan, progress);
            (targets, formatted)
        };
        let (targets, formatted) = watched(self.setting, "the targets", format).await?;
        self.targets = Some(targets);
        formatted.map_err(Error::Target)?;
        Ok(Fact::Formatted)
    }

    /// Makes the targets' nodes in QEMU. What was half made is removed by its name.
    pub(super) async fn open_targets(&mut self) -> Result<Fact, Stopped> {
        self.job.speed.set_latency(Latency::first_limit(&self.job.plan));
        // Before it copies: those that copy already give it their parts.
        self.part = Some(self.setting.bandwidth.join(self.job));
        let (footprint, targets) = (self.footprint()?, self.targets()?);
        let holds_poweroff = self
            .in_qemu(async {
                for (index, (target, disk)) in targets.iter().zip(&self.job.plan.disks).enumerate() {
                    footprint.open_target(index, target, disk).await?;
                }
                // Nobody else can open what the service has just made in a store.
                if !targets.in_store() {
                    footprint.check_headers(&self.job.plan.disks).await?;
                }
                Ok(self.job.plan.hold_poweroff && poweroff::can_hold(&footprint.link()).await)
            })
            .await?;
        Ok(Fact::Opened {
            not_before: now(),
            holds_poweroff,
            freezes: self.freeze.as_ref().is_some_and(Freeze::may_freeze),
        })
    }

    /// Prepares something in QEMU, which may be cancelled.
    async fn in_qemu<T>(&self, prepare: impl Future<Output = Result<T, Error>>) -> Result<T, Stopped> {
        let patience = self.setting.deadlines.stall();
        let prepare = tokio::time::timeout(patience, prepare);
        let prepared = self.job.cancel.run_until_cancelled(prepare).await;
        let prepared = prepared.ok_or(Stopped::Cancelled)?;
        Ok(prepared.unwrap_or_else(|_| Err(Error::stalled("the preparation of QEMU", patience)))?)
    }

    /// Has QEMU begin to copy, at a point in time.
    pub(super) async fn start(&mut self, holds_poweroff: bool) -> Result<Fact, Stopped> {
        let job = self.job;
        let mut freeze = self.freeze.take().ok_or(Error::Interrupted)?;
        let part = self.part.as_ref().ok_or(Error::Interrupted)?;
        let speed = part.claim();
        let (footprint, targets) = (self.footprint()?, self.targets()?);
        // From before the transaction: its jobs can end before its reply is read.
        let events = footprint.client().events();
        let transaction = Transaction::grouped(self.actions(footprint, targets, speed));
        if job.cancel.is_cancelled() {
            return Err(Stopped::Cancelled);
        }
        let patience = self.setting.deadlines.stall();
        if holds_poweroff {
            footprint.holds_poweroff();
            let held = tokio::time::timeout(patience, poweroff::hold(&footprint.link())).await;
            held.map_err(|_| Error::stalled("QEMU", patience))?
                .map_err(Error::Lost)?;
        }
        freeze.begin(&job.cancel).await?;
        fault::passed("frozen");
        let written: Vec<bool> = targets.iter().map(Target::mark_written).collect();
        let client = footprint.client();
        let starting = async {
            let started = tokio::time::timeout(patience, client.execute(transaction)).await;
            (started, now())
        };
        tokio::pin!(starting);
        let in_time = freeze.during(starting.as_mut()).await;
        let thawed = freeze.end(in_time.is_some()).await;
        job.update(|status| {
            status.frozen = thawed.frozen;
            status.quiesce_problem.clone_from(&thawed.problem);
        });
        let (started, point_in_time) = match in_time {
            Some(started) => started,
            None => starting.await,
        };
        match started {
            Ok(Ok(Done)) => {}
            Ok(Err(error)) => {
                // A transaction is atomic: QEMU wrote nothing for one that it refused.
                if error.is_refusal() {
                    for (target, was) in targets.iter().zip(written) {
                        target.written().store(was, Ordering::Relaxed);
                    }
                }
                return Err(Error::Transaction(error).into());
            }
            Err(_) => return Err(Error::stalled("the start in QEMU", patience).into()),
        };
        fault::passed("begun");
        let quiesced = thawed.quiesced?;
        let guest_ran = self.check_start().await?.is_running();
        tracing::info!(job = job.id, domain = job.domain.name, "backup started");
        self.started = Some((events, speed));
        Ok(Fact::Started {
            point_in_time,
            quiesced,
            frozen: thawed.frozen,
            quiesce_problem: thawed.problem,
            guest_ran,
        })
    }

    fn actions(&self, footprint: &Footprint, targets: &Targets, speed: u64) -> Vec<TransactionAction> {
        let disks = &self.job.plan.disks;
        let has_workers = footprint.link().schema.has(Feature::BackupPerf);
        let small_steps = self.job.plan.copies_in_small_steps();
        let actions = targets.iter().zip(disks).enumerate();
        actions
            .map(|(index, (target, disk))| {
                let mut backup = backup(&footprint.names, index, target, disk, share(speed, disks.len()));
                backup.x_perf = has_workers.then(|| perf(small_steps));
                TransactionAction::BlockdevBackup(backup)
            })
            .collect()
    }

    /// Whether what is copied from now on is the VM's own. Returns what QEMU does with the guest.
    pub(super) async fn check_start(&self) -> Result<RunState, Stopped> {
        self.check_sources().await?;
        // Some versions begin to copy a disk that another QEMU writes to already.
        let link = self.footprint()?.link();
        let ask = || {
            let link = link.clone();
            async move { link.run_state().await }
        };
        let state = self.ask(ask).await?;
        match state.migration() {
            Some(migration) => Err(Error::Migration(migration).into()),
            None => Ok(state),
        }
    }

    /// Follows the block jobs to QEMU's verdict on them, those of this process or of an earlier one.
    pub(super) async fn follow(&mut self) -> Result<Fact, Stopped> {
        let started = self.started.take();
        if self.part.is_none() {
            self.part = Some(self.setting.bandwidth.resume(self.job));
        }
        let part = self.part.as_ref().ok_or(Error::Interrupted)?;
        let (footprint, targets) = (self.footprint()?, self.targets()?);
        targets.unlock();
        let (events, speed) = match started {
            Some((events, speed)) => (events, Some(speed)),
            None => (footprint.client().events(), None),
        };
        let mut running = Running::new(self.job, footprint, (speed, part), self.setting.deadlines.stall());
        running.show_running();
        tokio::select! {
            ended = running.run(events, &self.setting.stop) => ended?,
            failed = write_back(targets, self.setting) => match failed? {},
        }
        if let Err(stopped) = running.judge() {
            return Err(self.explain(targets, stopped).await);
        }
        // QEMU first looks for what an image holds. A snapshot that another client makes meanwhile turns that look to a
        // new, empty image.
        if !running.is_proven() {
            self.check_sources().await?;
        }
        self.part = None;
        Ok(Fact::Copied)
    }

    /// QEMU words the reason in the language of its user, because a display sets the locale, and has no number for it. If the words
    /// are not known and the target's file system is full, that is taken for the reason.
    async fn explain(&self, targets: &Targets, stopped: Stopped) -> Stopped {
        let (disk, message) = match stopped {
            Stopped::Failed(Error::Copy { disk, message }) if !is_no_space(&message) => (disk, message),
            stopped => return stopped,
        };
        let target = targets.iter().find(|target| target.disk == disk);
        if let Some(target) = target
            && let Some(look) = target.free_space()
            && let Ok(Ok(free)) = tokio::time::timeout(BRIEFLY, blocking(self.setting, look)).await
            && free < COPIED_AT_ONCE
        {
            let target = target.label.clone();
            return Stopped::Failed(Error::ProbablyFull {
                disk,
                message,
                target,
                free,
            });
        }
        Stopped::Failed(Error::Copy { disk, message })
    }

    /// Whether what is being copied is what the guest writes to: a snapshot that another client made while the targets were
    /// prepared has put a new image above it.
    async fn check_sources(&self) -> Result<(), Stopped> {
        let footprint = self.footprint()?;
        let link = footprint.link();
        let ask = || {
            let link = link.clone();
            async move { link.disks().await }
        };
        let now = self.ask(ask).await?;
        check_snapshot(self.job, footprint, &now)?;
        sentinel::check_sizes(&self.job.plan, &now)?;
        self.keep_disks(&link, now);
        Ok(())
    }

    /// Asks QEMU, however long it takes to answer while it copies.
    async fn ask<T, F: Future<Output = qmp::Result<T>>>(
        &self,
        question: impl Fn() -> F,
    ) -> Result<T, Stopped> {
        let look = async {
            loop {
                match question().await {
                    // It has much to write before it gets to answers. The copying goes on meanwhile.
                    Err(qmp::Error::TimedOut { .. }) => {}
                    result => return result.map_err(Error::Lost),
                }
            }
        };
        let patience = self.setting.deadlines.stall();
        let now = tokio::select! {
            now = tokio::time::timeout(patience, look) => now,
            () = self.job.cancel.cancelled() => return Err(Stopped::Cancelled),
            () = self.setting.stop.cancelled() => return Err(Stopped::Detached),
        };
        Ok(now.map_err(|_| Error::stalled("QEMU", patience))??)
    }

    fn keep_disks(&self, link: &Arc<Link>, disks: Vec<Disk>) {
        let mut kept = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        *kept = Some((link.clone(), disks));
    }
}

/// As exactly as the record has it: a later process of the service reports the same.
fn now() -> Timestamp {
    let now = clock::now();
    Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now)
}

/// What is copied at a time, in bytes, where the guest's writes are not to wait: a cluster of the image.
const SMALL_STEP: u64 = 1 << 16;

fn perf(small_steps: bool) -> BackupPerf {
    match small_steps {
        true => BackupPerf {
            max_workers: 1,
            max_chunk: Some(SMALL_STEP),
        },
        false => BackupPerf {
            max_workers: WORKERS,
            max_chunk: None,
        },
    }
}

fn backup(names: &Names, index: usize, target: &Target, disk: &DiskPlan, speed: u64) -> BlockdevBackup {
    let (sync, bitmap) = match &disk.mode {
        Mode::Since(base) => (BackupSync::Bitmap, Some(base.bitmap.clone())),
        // A raw device is not empty before.
        Mode::Full { .. }
            if disk.is_scanned() && (disk.format, target.media) != (Format::Raw, Media::Block) =>
        {
            (BackupSync::Top, None)
        }
        Mode::Full { .. } => (BackupSync::Full, None),
    };
    BlockdevBackup {
        job_id: names.block_job(index),
        device: disk.node.clone(),
        target: names.target_node(index),
        filter_node_name: names.filter_node(index),
        sync,
        // It keeps what it has recorded: a later backup can start from the same checkpoint.
        bitmap_mode: bitmap.is_some().then_some(BitmapSyncMode::Never),
        bitmap,
        compress: disk.compress.is_some().then_some(true),
        speed,
        auto_dismiss: false,
        // Anything else than an error would stop the job, or let the guest's writes fail, or retry for ever.
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
        x_perf: None,
    }
}
