//! Restores the disks of a stored backup into the targets.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::backup::discard;
use super::context::{JobContext, blocking};
use super::error::Stopped;
use super::follow::{follow, stopped};
use super::progress::Meter;
use super::{DiskState, Error, Job};
use crate::image::{self, Chain, Control, Output, Progress};
use crate::plan::JobSpec;
use crate::targets::Targets;

/// Restores all disks. Returns whether a partial target may remain.
pub async fn restore(
    job: &Arc<Job>,
    chain: &Chain,
    targets: Targets,
    cancel: &CancellationToken,
    context: &JobContext,
) -> (Result<(), Stopped>, bool) {
    let restored = restore_all(job, chain, &targets, cancel, context.deadlines.stall()).await;
    if restored.is_ok() {
        blocking(context, move || drop(targets.leave())).await;
        return (restored, false);
    }
    let left = discard(context, Some(targets), context.deadlines.stall()).await;
    (restored, left)
}

async fn restore_all(
    job: &Job,
    chain: &Chain,
    targets: &Targets,
    cancel: &CancellationToken,
    stall: Duration,
) -> Result<(), Stopped> {
    let JobSpec::Restore(restore) = &*job.spec else {
        return Err(Error::Interrupted.into());
    };
    let mut meter = Meter::new();
    // The storage daemon opens the targets again, and locks them itself.
    targets.unlock();
    for (index, (target, planned)) in targets.iter().zip(&restore.disks).enumerate() {
        let disk = chain.disks().iter().find(|disk| disk.disk == planned.name);
        let disk = disk.ok_or_else(|| Error::NoSuchDisk {
            id: job.id,
            disk: planned.name.clone(),
        })?;
        let descriptor = target.descriptor().map_err(|error| Error::Descriptor {
            disk: planned.name.clone(),
            why: error.to_string(),
        })?;
        let progress = Progress::default();
        let control = Control {
            progress: &progress,
            cancel,
            stall,
        };
        let output = Output {
            file: descriptor,
            format: planned.format,
            kept: false,
            written: target.written(),
        };
        let work = async { image::restore(&disk.open().await?, output, control).await };
        let show = |job: &Job| {
            let (done, total) = progress.get();
            job.update(|status| {
                let disk = &mut status.disks[index];
                disk.state = DiskState::Running;
                if total > 0 {
                    (disk.total, disk.done) = (total, done);
                }
            });
        };
        follow(job, &mut meter, show, work).await.map_err(stopped)?;
        job.update(|status| {
            let disk = &mut status.disks[index];
            (disk.state, disk.done) = (DiskState::Waiting, disk.total);
        });
    }
    Ok(())
}
