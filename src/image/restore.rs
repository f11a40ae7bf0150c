//! Restores a disk from its chain into one image without a backing file.

use std::convert::Infallible;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{Advice, FileType, SeekFrom};

use super::chain::OpenDisk;
use super::storage_daemon::{DaemonSpec, PATIENCE, Source, StorageDaemon};
use super::{Control, Error, Progress, blocking};
use crate::error::is_no_space;
use crate::model::Format;
use crate::qcow2::Empty;
use crate::qmp::block::{
    BlockCommit, BlockJobCancel, BlockdevAdd, BlockdevMirror, BlockdevOptions, BlockdevSnapshot,
    CacheOptions, DetectZeroes, Discard, Driver, JobDismiss, JobStatus, MirrorSync, OnError, QueryJobs,
};
use crate::qmp::{Command, Done, EventsError};
use crate::targets::{Media, Pace, Writeback};

/// How often progress is polled. The end is reported by an event.
const LOOK: Duration = Duration::from_millis(250);
const JOB: &str = "restore";
/// The names of the target's nodes.
const TARGET: &str = "target";
const TARGET_FILE: &str = "target-file";
/// Cluster size of a restored image in bytes: the default of QEMU's tools.
const CLUSTER_SIZE: u32 = 1 << 16;
/// How much is sent to the device at a time, in bytes.
const PIECE: usize = 16 << 20;

/// The target of a restore.
#[derive(Debug)]
pub struct Output<'a> {
    /// A regular file or a block device.
    pub file: OwnedFd,
    /// The format of the restored disk.
    pub format: Format,
    /// The file is read again at once, so it stays in the page cache.
    pub kept: bool,
    /// Set before the first byte changes. While it is not set, the target is unchanged.
    pub written: &'a AtomicBool,
}

/// The target and its type.
struct Target<'a> {
    file: Arc<OwnedFd>,
    media: Media,
    kept: bool,
    writeback: Writeback,
    written: &'a AtomicBool,
}

impl Target<'_> {
    /// Records that the content may have changed.
    fn mark_written(&self) {
        self.written.store(true, Ordering::Relaxed);
    }

    fn driver(&self, filename: String) -> Driver {
        match self.media {
            Media::Regular => Driver::File { filename },
            Media::Block => Driver::HostDevice { filename },
        }
    }
}

/// Copies the disk as the chain shows it into a regular file, whose content is lost, or onto a block device that is
/// large enough. Zeroes take no space if the target's storage supports that. The data is durable when this returns.
///
/// If this fails or is dropped, and `output.written` is set, the target holds an incomplete disk. Cancelling waits
/// until nothing is written any more; dropping does not.
pub async fn restore(chain: &OpenDisk, output: Output<'_>, control: Control<'_>) -> Result<(), Error> {
    let (mut daemon, steps) = (None, AtomicU64::new(0));
    let moved = || {
        control
            .progress
            .get()
            .0
            .wrapping_add(steps.load(Ordering::Relaxed))
    };
    let work = work(chain, output, control.progress, &steps, &mut daemon);
    let done = control.watch("the restore", moved, work).await;
    if let (Err(_), Some(daemon)) = (&done, daemon) {
        daemon.kill().await;
    }
    done
}

/// `steps` counts the steps other than copying, so that each shows progress.
async fn work(
    chain: &OpenDisk,
    output: Output<'_>,
    progress: &Progress,
    steps: &AtomicU64,
    running: &mut Option<StorageDaemon>,
) -> Result<(), Error> {
    let format = output.format;
    let target = inspect(chain, output).await?;
    let mut spec = DaemonSpec::new();
    let source = spec.source(0, chain)?;
    let name = spec.file(&target.file)?;
    let daemon = running.insert(StorageDaemon::start(spec).await?);
    let copied = copy(daemon, chain, (source, &name), &target, format, progress);
    tokio::select! {
        copied = copied => copied?,
        failed = write_back(&target) => match failed? {},
    }
    if let Some(daemon) = running.take() {
        daemon.quit().await?;
    }
    sync(chain, &target, steps).await
}

/// Starts write-back of copied data while copying continues, so that less remains for the end. Runs until it is
/// dropped.
async fn write_back(target: &Target<'_>) -> Result<Infallible, Error> {
    let mut pace = Pace::default();
    loop {
        tokio::time::sleep(pace.pause()).await;
        let writeback = target.writeback.clone();
        // The final check reports errors.
        let started = blocking(move || Ok(writeback.start().unwrap_or_default())).await?;
        pace = pace.after(started);
    }
}

/// Makes the target durable piece by piece, so that slow storage shows progress and is distinguished from storage that
/// hangs. The final fsync does not wait for data that is already written back.
async fn sync(chain: &OpenDisk, target: &Target<'_>, steps: &AtomicU64) -> Result<(), Error> {
    let failed = |errno| Error::system(&chain.disk, "made durable", errno);
    let sent = target.writeback.clone();
    if let Some(errno) = blocking(move || Ok(sent.close())).await? {
        return Err(failed(errno));
    }
    let length = rustix::fs::seek(&target.file, SeekFrom::End(0)).map_err(failed)?;
    for offset in (0..length).step_by(PIECE).filter(|_| !target.kept) {
        let file = target.file.clone();
        // Only advice: if the kernel ignores it, the final fsync takes longer.
        let sent = blocking(move || {
            let _ = rustix::fs::fadvise(&file, offset, NonZeroU64::new(PIECE as u64), Advice::DontNeed);
            Ok(())
        });
        sent.await?;
        steps.fetch_add(1, Ordering::Relaxed);
    }
    let (disk, file) = (chain.disk.clone(), target.file.clone());
    blocking(move || rustix::fs::fsync(&file).map_err(|errno| Error::system(&disk, "made durable", errno)))
        .await
}

/// Determines the type of the target, and whether a device is large enough. Changes nothing.
async fn inspect<'a>(chain: &OpenDisk, output: Output<'a>) -> Result<Target<'a>, Error> {
    let (disk, size) = (chain.disk.clone(), chain.virtual_size());
    let Output {
        file,
        format,
        kept,
        written,
    } = output;
    let (file, media) = blocking(move || {
        let stat = rustix::fs::fstat(&file).map_err(|errno| Error::system(&disk, "inspected", errno))?;
        let media = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Media::Regular,
            FileType::BlockDevice => {
                let found = rustix::fs::seek(&file, SeekFrom::End(0))
                    .map_err(|errno| Error::system(&disk, "measured", errno))?;
                if format == Format::Raw && found < size {
                    return Err(Error::BadTarget {
                        disk,
                        why: format!("has {found} bytes, but the disk has {size} bytes"),
                    });
                }
                Media::Block
            }
            _ => {
                return Err(Error::BadTarget {
                    disk,
                    why: "is neither a regular file nor a block device".to_owned(),
                });
            }
        };
        Ok((Arc::new(file), media))
    })
    .await?;
    Ok(Target {
        writeback: Writeback::of_file(file.clone(), media, kept),
        file,
        media,
        kept,
        written,
    })
}

/// Formats the target as an empty disk; a raw device stays unchanged.
async fn format_target(chain: &OpenDisk, target: &Target<'_>, format: Format) -> Result<(), Error> {
    if (format, target.media) == (Format::Raw, Media::Block) {
        return Ok(());
    }
    let (disk, size, file, media) = (
        chain.disk.clone(),
        chain.virtual_size(),
        target.file.clone(),
        target.media,
    );
    target.mark_written();
    blocking(move || {
        let empty = Empty {
            virtual_size: size,
            cluster_size: CLUSTER_SIZE,
            compression: None,
            backing: None,
        };
        let formatted = crate::targets::format(&file, media, format, &empty);
        formatted.map_err(|errno| Error::system(&disk, "formatted", errno))
    })
    .await
}

async fn copy(
    daemon: &mut StorageDaemon,
    chain: &OpenDisk,
    (source, name): (Source, &str),
    target: &Target<'_>,
    format: Format,
    progress: &Progress,
) -> Result<(), Error> {
    let size = chain.virtual_size();
    format_target(chain, target, format).await?;
    // The target is made durable once, at the end. Until then it is incomplete anyway.
    let cache = Some(CacheOptions {
        direct: Some(false),
        no_flush: true,
    });
    let node = BlockdevOptions {
        discard: Some(Discard::Unmap),
        cache,
        ..BlockdevOptions::named(TARGET_FILE, target.driver(name.to_owned()))
    };
    daemon.execute(BlockdevAdd(node)).await?;
    let file = TARGET_FILE.to_owned().into();
    let driver = match format {
        Format::Qcow2 => Driver::Qcow2 { file, backing: None },
        Format::Raw => Driver::Raw {
            file,
            offset: None,
            // A device can be larger than the disk, so QEMU must not touch the rest.
            size: (target.media == Media::Block).then_some(size),
        },
    };
    let node = BlockdevOptions {
        discard: Some(Discard::Unmap),
        detect_zeroes: Some(DetectZeroes::Unmap),
        cache,
        ..BlockdevOptions::named(TARGET, driver)
    };
    daemon.execute(BlockdevAdd(node)).await?;
    // The caller who passed the file can write to it. If its header named another file, QEMU would write to that file.
    daemon.check(&[TARGET_FILE, TARGET]).await?;
    match is_fresh(target, format) && chain.images.iter().all(|image| image.format == Format::Qcow2) {
        true => {
            // Inserts the target below the chain. The commit job then copies only allocated data, and holes cost
            // nothing.
            let below = BlockdevSnapshot {
                node: TARGET,
                overlay: &source.base,
            };
            daemon.execute(below).await?;
            let commit = BlockCommit {
                job_id: JOB,
                device: &source.top,
                base_node: TARGET,
                auto_dismiss: false,
                on_error: OnError::Report,
            };
            run(daemon, chain, commit, target, progress).await
        }
        false => {
            // A mirror job makes the rest of the target read as zeroes, with holes where possible. A backup job would
            // allocate space for all of it.
            let mirror = BlockdevMirror {
                job_id: JOB,
                device: &source.top,
                target: TARGET,
                sync: MirrorSync::Full,
                auto_dismiss: false,
                on_source_error: Some(OnError::Report),
                on_target_error: Some(OnError::Report),
            };
            run(daemon, chain, mirror, target, progress).await
        }
    }
}

/// Returns true if the target reads as zeroes after formatting.
fn is_fresh(target: &Target<'_>, format: Format) -> bool {
    (format, target.media) != (Format::Raw, Media::Block)
}

/// Runs a copy job until it ends.
async fn run(
    daemon: &mut StorageDaemon,
    chain: &OpenDisk,
    command: impl Command<Reply = Done>,
    target: &Target<'_>,
    progress: &Progress,
) -> Result<(), Error> {
    let mut events = daemon.client().events();
    let was_written = target.written.swap(true, Ordering::Relaxed);
    if let Err(error) = daemon.client().execute_within(PATIENCE, command).await {
        // A command that QEMU refuses has not begun. "Failed to get write lock" means the disk of a running VM.
        if error.is_refusal() {
            target.written.store(was_written, Ordering::Relaxed);
        }
        return Err(daemon.explain(error).await);
    }
    let mut finishing = false;
    loop {
        let jobs = match daemon.client().execute(QueryJobs {}).await {
            Ok(jobs) => jobs,
            Err(error) => return Err(daemon.explain(error).await),
        };
        let job = jobs.into_iter().find(|job| job.id == JOB);
        let Some(job) = job else {
            return Err(Error::Copy {
                disk: chain.disk.clone(),
                why: "its job has disappeared".to_owned(),
            });
        };
        progress.set(job.current_progress, job.total_progress);
        match (job.status, job.error) {
            (JobStatus::Concluded, None) => break,
            (JobStatus::Concluded, Some(why)) => return Err(failed(chain, why)),
            (JobStatus::Ready, _) if !finishing => {
                finishing = true;
                // `block-job-complete` would make the source's users use the target.
                let finish = BlockJobCancel {
                    device: JOB,
                    force: false,
                };
                daemon.execute(finish).await?;
            }
            _ => {}
        }
        // An event reports the job's end. Polling finds it if the event was missed.
        let next = tokio::time::timeout(LOOK, events.next()).await;
        if let Ok(Err(EventsError::Closed)) = next {
            tokio::task::yield_now().await;
        }
    }
    daemon.execute(JobDismiss { id: JOB }).await?;
    Ok(())
}

fn failed(chain: &OpenDisk, why: String) -> Error {
    let disk = chain.disk.clone();
    if is_no_space(&why) {
        Error::NoSpace { disk }
    } else {
        Error::Copy { disk, why }
    }
}
