//! The first half of a backup: from its prepared targets to completed block jobs.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use jiff::Timestamp;

use super::driver::Driver;
use super::end::BRIEFLY;
use super::guard::Limits;
use super::latency::Latency;
use super::quiesce::Freeze;
use super::running::Running;
use super::scan::check_snapshot;
use super::state::Fact;
use super::writeback::write_back;
use crate::checkpoint::Mode;
use crate::clock;
use crate::domain::{Disk, Link, RunState, poweroff};
use crate::error::is_no_space;
use crate::fault;
use crate::job::Error;
use crate::job::checkpoint::check_sizes;
use crate::job::context::{blocking, watched};
use crate::job::error::Stopped;
use crate::job::progress::share;
use crate::job::qemu::{Names, QemuObjects};
use crate::model::Format;
use crate::offload::Progress;
use crate::plan::DiskPlan;
use crate::qmp::block::{
    BackupPerf, BackupSync, BitmapSyncMode, BlockdevBackup, OnError, Transaction, TransactionAction,
};
use crate::qmp::{self, Done, Feature};
use crate::targets::{Media, Target, Targets};

/// How many chunks of a disk QEMU copies at a time, up to 1 MiB each. QEMU's default of 64 has two drawbacks: the
/// buffers exceed a processor's cache, which makes copying in memory a quarter slower. And a guest's write waits for
/// more chunks if the target is slow.
const WORKERS: u32 = 16;
/// The largest chunk that QEMU copies, in bytes (`BLOCK_COPY_MAX_BUFFER` in block-copy.c). A target on which QEMU found
/// no more space has less free space than this.
const COPIED_AT_ONCE: u64 = 1 << 20;

impl Driver<'_> {
    /// Lets QEMU open existing targets, creates the checkpoints' bitmaps, and connects to the guest's agent. Any
    /// refusal happens here, before a file loses its content.
    pub(super) async fn check_targets(&mut self) -> Result<Fact, Stopped> {
        let (objects, targets) = (self.objects()?, self.targets()?);
        let existing = targets
            .iter()
            .enumerate()
            .filter(|(_, target)| target.has_content());
        self.in_qemu(async {
            let mut rehearse = false;
            for (index, target) in existing {
                objects.check_target(index, target).await?;
                rehearse = true;
            }
            if rehearse {
                let actions = self.actions(objects, targets, self.job.speed.limits().effective());
                objects.rehearse(&self.plan.disks, actions).await?;
            }
            objects.make_checkpoints(self.job, &self.plan).await
        })
        .await?;
        let limits = Limits {
            wait: self.context.deadlines.freeze_wait(),
            frozen: self.context.deadlines.freeze(),
        };
        self.freeze = Some(Freeze::prepare(&self.job.domain, self.plan.quiesce, limits).await?);
        Ok(Fact::Checked)
    }

    /// Truncates or formats the targets. From here on the content of existing files is lost.
    pub(super) async fn format(&mut self) -> Result<Fact, Stopped> {
        let mut targets = self.take_targets()?;
        let plan = self.plan.clone();
        // If the thread continues after the timeout, it discards the targets.
        let format = move |progress: &Progress| {
            let formatted = targets.format(&plan, progress);
            (targets, formatted)
        };
        let (targets, formatted) = watched(self.context, "the targets", format).await?;
        self.targets = Some(targets);
        formatted.map_err(Error::Target)?;
        Ok(Fact::Formatted)
    }

    /// Creates the targets' nodes in QEMU. After a failure, `release` finds partial ones by name.
    pub(super) async fn open_targets(&mut self) -> Result<Fact, Stopped> {
        self.job.speed.set_latency(Latency::first_limit(&self.plan));
        // The backup must join before it copies, so that running backups free bandwidth for it.
        self.part = Some(self.context.bandwidth.join(self.job));
        let (objects, targets) = (self.objects()?, self.targets()?);
        let holds_poweroff = self
            .in_qemu(async {
                for (index, (target, disk)) in targets.iter().zip(&self.plan.disks).enumerate() {
                    objects.open_target(index, target, disk).await?;
                }
                // Only the service can open new files in a store, so their headers need no check.
                if !targets.in_store() {
                    objects.check_headers(&self.plan.disks).await?;
                }
                Ok(self.plan.hold_poweroff && poweroff::can_hold(&objects.link()).await)
            })
            .await?;
        Ok(Fact::Opened {
            not_before: now(),
            holds_poweroff,
            freezes: self.freeze.as_ref().is_some_and(Freeze::may_freeze),
        })
    }

    /// Runs preparations in QEMU with the stall timeout. The caller of the job can cancel them.
    async fn in_qemu<T>(&self, prepare: impl Future<Output = Result<T, Error>>) -> Result<T, Stopped> {
        let patience = self.context.deadlines.stall();
        let prepare = tokio::time::timeout(patience, prepare);
        let prepared = self.job.cancel.run_until_cancelled(prepare).await;
        let prepared = prepared.ok_or(Stopped::Cancelled)?;
        Ok(prepared.unwrap_or_else(|_| Err(Error::stalled("the preparation of QEMU", patience)))?)
    }

    /// Starts the block jobs in one transaction, which defines the point in time.
    pub(super) async fn start(&mut self, holds_poweroff: bool) -> Result<Fact, Stopped> {
        let job = self.job;
        let mut freeze = self.freeze.take().ok_or(Error::Interrupted)?;
        let part = self.part.as_ref().ok_or(Error::Interrupted)?;
        let (objects, targets) = (self.objects()?, self.targets()?);
        // Subscribed before the transaction, because its jobs can end before its reply arrives.
        let events = objects.client().events();
        if job.cancel.is_cancelled() {
            return Err(Stopped::Cancelled);
        }
        let patience = self.context.deadlines.stall();
        if holds_poweroff {
            objects.holds_poweroff();
            let held = tokio::time::timeout(patience, poweroff::hold(&objects.link())).await;
            held.map_err(|_| Error::stalled("QEMU", patience))?
                .map_err(Error::Lost)?;
        }
        freeze.begin(&job.cancel).await?;
        fault::passed("frozen");
        let written: Vec<bool> = targets.iter().map(Target::mark_written).collect();
        // From here on, a failed backup keeps its part of the bandwidth, because QEMU may copy.
        let speed = part.claim();
        let transaction = Transaction::grouped(self.actions(objects, targets, speed));
        let client = objects.client();
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
                // A transaction is atomic: QEMU has written nothing for a refused one.
                if error.is_refusal() {
                    for (target, was) in targets.iter().zip(written) {
                        target.written().store(was, Ordering::Relaxed);
                    }
                    part.confirm(0);
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

    fn actions(&self, objects: &QemuObjects, targets: &Targets, speed: u64) -> Vec<TransactionAction> {
        let disks = &self.plan.disks;
        let has_workers = objects.link().schema.has(Feature::BackupPerf);
        let small_steps = self.plan.copies_in_small_steps();
        let actions = targets.iter().zip(disks).enumerate();
        actions
            .map(|(index, (target, disk))| {
                let mut backup = backup(&objects.names, index, target, disk, share(speed, disks.len()));
                backup.x_perf = has_workers.then(|| perf(small_steps));
                TransactionAction::BlockdevBackup(backup)
            })
            .collect()
    }

    /// Checks that QEMU copies the VM's present data. Returns QEMU's run state.
    pub(super) async fn check_start(&self) -> Result<RunState, Stopped> {
        self.check_sources().await?;
        // Some versions of QEMU copy a disk even after a migration, while another QEMU writes to it.
        let link = self.objects()?.link();
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

    /// Follows the block jobs until QEMU has concluded them. An earlier instance of the service may have started them.
    pub(super) async fn follow(&mut self) -> Result<Fact, Stopped> {
        let started = self.started.take();
        if self.part.is_none() {
            self.part = Some(self.context.bandwidth.resume(self.job));
        }
        let part = self.part.as_ref().ok_or(Error::Interrupted)?;
        let (objects, targets) = (self.objects()?, self.targets()?);
        targets.unlock();
        let (events, speed) = match started {
            Some((events, speed)) => (events, Some(speed)),
            None => (objects.client().events(), None),
        };
        let mut running = Running::new(
            (self.job, &self.plan),
            objects,
            (speed, part),
            self.context.deadlines.stall(),
        );
        running.show_running();
        tokio::select! {
            ended = running.run(events, &self.context.stop) => ended?,
            failed = write_back(targets, self.context) => match failed? {},
        }
        if let Err(stopped) = running.judge() {
            return Err(self.explain(targets, stopped).await);
        }
        // QEMU first scans which clusters an image has. If another client creates a snapshot then, QEMU scans the new,
        // empty image.
        if !running.is_proven() {
            self.check_sources().await?;
        }
        self.part = None;
        Ok(Fact::Copied)
    }

    /// QEMU reports a full target only as text, without an error code. The text depends on the locale, which a display
    /// can set. If the text is unknown and the target's file system is full, the error names that as the probable
    /// reason.
    async fn explain(&self, targets: &Targets, stopped: Stopped) -> Stopped {
        let (disk, message) = match stopped {
            Stopped::Failed(Error::Copy { disk, message }) if !is_no_space(&message) => (disk, message),
            stopped => return stopped,
        };
        let target = targets.iter().find(|target| target.disk == disk);
        if let Some(target) = target
            && let Some(look) = target.free_space()
            && let Ok(Ok(free)) = tokio::time::timeout(BRIEFLY, blocking(self.context, look)).await
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

    /// Fails unless QEMU copies the images that the guest writes to. If another client created a snapshot during the
    /// preparation, the guest writes to a new image above them.
    async fn check_sources(&self) -> Result<(), Stopped> {
        let objects = self.objects()?;
        let link = objects.link();
        let ask = || {
            let link = link.clone();
            async move { link.disks().await }
        };
        let now = self.ask(ask).await?;
        check_snapshot(&self.plan, objects, &now)?;
        check_sizes(&self.plan, &now)?;
        self.keep_disks(&link, now);
        Ok(())
    }

    /// Queries QEMU until it answers, within the stall timeout. QEMU can be slow while it copies.
    async fn ask<T, F: Future<Output = qmp::Result<T>>>(
        &self,
        question: impl Fn() -> F,
    ) -> Result<T, Stopped> {
        let look = async {
            loop {
                match question().await {
                    // QEMU is busy writing, and continues to copy.
                    Err(qmp::Error::TimedOut { .. }) => {}
                    result => return result.map_err(Error::Lost),
                }
            }
        };
        let patience = self.context.deadlines.stall();
        let now = tokio::select! {
            now = tokio::time::timeout(patience, look) => now,
            () = self.job.cancel.cancelled() => return Err(Stopped::Cancelled),
            () = self.context.stop.cancelled() => return Err(Stopped::Detached),
        };
        Ok(now.map_err(|_| Error::stalled("QEMU", patience))??)
    }

    fn keep_disks(&self, link: &Arc<Link>, disks: Vec<Disk>) {
        let mut kept = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        *kept = Some((link.clone(), disks));
    }
}

/// Returns the time with the precision of the record, so that a later instance of the service reports the same time.
fn now() -> Timestamp {
    let now = clock::now();
    Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now)
}

/// The chunk size in bytes if the guest's writes must not wait long: a cluster of the image.
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
        Mode::Incremental(base) => (BackupSync::Bitmap, Some(base.bitmap.clone())),
        // An existing raw device may contain other data, so `top`, which skips unallocated clusters, is not safe for
        // it.
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
        // The bitmap stays as it is, so that later backups can start from the same checkpoint.
        bitmap_mode: bitmap.is_some().then_some(BitmapSyncMode::Never),
        bitmap,
        compress: disk.compress.is_some().then_some(true),
        speed,
        auto_dismiss: false,
        // Any other policy would stop the job, fail the guest's writes, or retry for ever.
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
        x_perf: None,
    }
}
