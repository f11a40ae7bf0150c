//! A disk's content, from its chain of images into one that lies on nothing.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FileType, MemfdFlags, SeekFrom};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::chain::DiskChain;
use super::engine::{Engine, Plan};
use super::{Error, Progress, blocking};
use crate::definition::Format;
use crate::qmp::EventsError;

/// How often progress is asked for. The end is not waited for by asking.
const LOOK: Duration = Duration::from_millis(250);
const JOB: &str = "restore";

/// The target, and what it is.
struct Target {
    file: Arc<OwnedFd>,
    driver: &'static str,
}

/// A job as `query-jobs` shows it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Job {
    id: String,
    status: String,
    current_progress: u64,
    total_progress: u64,
    error: Option<String>,
}

/// Copies the disk as the chain shows it into `target`, a regular file, what is in it being lost, or a block device that is
/// large enough. What reads as zeroes takes no space where the target's storage can do that. Durable when this returns.
///
/// When this is dropped or fails, the target holds something that is no restored disk. Cancelling waits until nobody writes
/// any more; dropping does not.
pub async fn restore(
    chain: &DiskChain,
    target: OwnedFd,
    format: Format,
    progress: &Progress,
    cancel: &CancellationToken,
) -> Result<(), Error> {
    let target = tokio::select! {
        target = prepare(chain, target, format) => target?,
        () = cancel.cancelled() => return Err(Error::Cancelled),
    };
    let mut plan = Plan::new();
    let source = plan.source(0, chain)?;
    let name = plan.file(&target.file)?;
    let empty = match format {
        Format::Qcow2 => {
            let image = memfd(&chain.disk)?;
            let name = plan.file(&image)?;
            Some((image, name))
        }
        Format::Raw => None,
    };
    let mut engine = tokio::select! {
        engine = Engine::start(plan) => engine?,
        () = cancel.cancelled() => return Err(Error::Cancelled),
    };
    let copied = tokio::select! {
        copied = copy(&mut engine, chain, (&source, &name), &target, empty, progress) => copied,
        () = cancel.cancelled() => Err(Error::Cancelled),
    };
    if let Err(error) = copied {
        engine.kill().await;
        return Err(error);
    }
    engine.quit().await?;
    let disk = chain.disk.clone();
    blocking(move || {
        rustix::fs::fsync(&target.file).map_err(|errno| Error::system(&disk, "made durable", errno))
    })
    .await
}

/// Empties a file and gives a raw one its size; looks whether a device is large enough.
async fn prepare(chain: &DiskChain, file: OwnedFd, format: Format) -> Result<Target, Error> {
    let (disk, size) = (chain.disk.clone(), chain.virtual_size());
    blocking(move || {
        let stat = rustix::fs::fstat(&file).map_err(|errno| Error::system(&disk, "looked at", errno))?;
        let driver = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let length = if format == Format::Raw { size } else { 0 };
                for length in [0, length] {
                    rustix::fs::ftruncate(&file, length)
                        .map_err(|errno| Error::system(&disk, "given its size", errno))?;
                }
                "file"
            }
            FileType::BlockDevice => {
                let found = rustix::fs::seek(&file, SeekFrom::End(0))
                    .map_err(|errno| Error::system(&disk, "measured", errno))?;
                if format == Format::Raw && found < size {
                    return Err(Error::BadTarget {
                        disk,
                        why: format!("has {found} bytes where the disk has {size}"),
                    });
                }
                "host_device"
            }
            _ => {
                return Err(Error::BadTarget {
                    disk,
                    why: "is neither a regular file nor a block device".to_owned(),
                });
            }
        };
        Ok(Target {
            file: Arc::new(file),
            driver,
        })
    })
    .await
}

async fn copy(
    engine: &mut Engine,
    chain: &DiskChain,
    (source, name): (&str, &str),
    target: &Target,
    empty: Option<(OwnedFd, String)>,
    progress: &Progress,
) -> Result<(), Error> {
    let size = chain.virtual_size();
    let format = match empty {
        Some((image, name)) => {
            make_empty(engine, chain, &name).await?;
            put(chain, image, target).await?;
            Format::Qcow2
        }
        None => Format::Raw,
    };
    // It is made durable at the end, once; until then it is worth nothing.
    let cache = json!({ "direct": false, "no-flush": true });
    let node = json!({
        "driver": target.driver, "node-name": "target-file", "filename": name,
        "discard": "unmap", "cache": cache,
    });
    engine.execute("blockdev-add", node).await?;
    let mut node = json!({
        "driver": format.as_str(), "node-name": "target", "file": "target-file",
        "discard": "unmap", "detect-zeroes": "unmap", "cache": cache,
    });
    match format {
        Format::Qcow2 => node["backing"] = Value::Null,
        // A device can be larger than the disk: the rest of it is not the disk's.
        Format::Raw if target.driver == "host_device" => node["size"] = size.into(),
        Format::Raw => {}
    }
    engine.execute("blockdev-add", node).await?;
    // Whoever passed the file can write to it: a header that names another file would have that written to.
    engine.check(&["target-file", "target"]).await?;
    // A mirror copies what is allocated anywhere in the chain and has the rest of the target read as zeroes, by holes where
    // there can be holes; a backup job would reserve space for all of it.
    let mirror = json!({
        "job-id": JOB, "device": source, "target": "target", "sync": "full", "auto-dismiss": false,
        "on-source-error": "report", "on-target-error": "report",
    });
    run(engine, chain, "blockdev-mirror", mirror, Some(progress)).await?;
    for node in ["target", "target-file"] {
        engine
            .execute("blockdev-del", json!({ "node-name": node }))
            .await?;
    }
    Ok(())
}

/// A file that nobody else has.
fn memfd(disk: &str) -> Result<OwnedFd, Error> {
    let made = rustix::fs::memfd_create("backupd-image", MemfdFlags::CLOEXEC);
    made.map_err(|errno| Error::system(disk, "prepared", errno))
}

/// Makes an empty image of the disk's size. Not in the target: QEMU opens what it has just written once more, to give it its
/// size, and whoever passed the target could have it open, and make larger, another file meanwhile.
async fn make_empty(engine: &mut Engine, chain: &DiskChain, name: &str) -> Result<(), Error> {
    let node = json!({ "driver": "file", "node-name": "empty", "filename": name });
    engine.execute("blockdev-add", node).await?;
    let options = json!({ "driver": "qcow2", "file": "empty", "size": chain.virtual_size() });
    let create = json!({ "job-id": JOB, "options": options });
    run(engine, chain, "blockdev-create", create, None).await?;
    engine
        .execute("blockdev-del", json!({ "node-name": "empty" }))
        .await?;
    Ok(())
}

/// Puts an empty image into the target.
async fn put(chain: &DiskChain, image: OwnedFd, target: &Target) -> Result<(), Error> {
    let (disk, target) = (chain.disk.clone(), target.file.clone());
    blocking(move || {
        let failed = |errno| Error::system(&disk, "written", errno);
        let (mut piece, mut offset) = (vec![0; 1 << 16], 0);
        loop {
            let count = rustix::io::pread(&image, &mut piece[..], offset).map_err(failed)?;
            if count == 0 {
                return Ok(());
            }
            let mut written = 0;
            while written < count {
                let at = offset + written as u64;
                written += rustix::io::pwrite(&*target, &piece[written..count], at).map_err(failed)?;
            }
            offset += count as u64;
        }
    })
    .await
}

/// Runs a job to its end.
async fn run(
    engine: &mut Engine,
    chain: &DiskChain,
    command: &str,
    arguments: Value,
    progress: Option<&Progress>,
) -> Result<(), Error> {
    let mut events = engine.client().events();
    engine.execute(command, arguments).await?;
    let mut finishing = false;
    loop {
        let jobs = match engine.client().query::<Vec<Job>>("query-jobs", json!({})).await {
            Ok(jobs) => jobs,
            Err(error) => return Err(engine.explain(error).await),
        };
        let job = jobs.into_iter().find(|job| job.id == JOB);
        let Some(job) = job else {
            return Err(Error::Copy {
                disk: chain.disk.clone(),
                why: "its job is gone".to_owned(),
            });
        };
        if let Some(progress) = progress {
            progress.set(job.current_progress, job.total_progress);
        }
        match (job.status.as_str(), job.error) {
            ("concluded", None) => break,
            ("concluded", Some(why)) => return Err(failed(chain, why)),
            ("ready", _) if !finishing => {
                finishing = true;
                // Not "complete", which would have others use the target instead of the source.
                let finish = json!({ "device": JOB, "force": false });
                engine.execute("block-job-cancel", finish).await?;
            }
            _ => {}
        }
        // A job's end is an event; what was missed is asked for.
        let next = tokio::time::timeout(LOOK, events.next()).await;
        if let Ok(Err(EventsError::Closed)) = next {
            tokio::task::yield_now().await;
        }
    }
    engine.execute("job-dismiss", json!({ "id": JOB })).await?;
    Ok(())
}

fn failed(chain: &DiskChain, why: String) -> Error {
    let disk = chain.disk.clone();
    if why.contains("No space left on device") {
        Error::NoSpace { disk }
    } else {
        Error::Copy { disk, why }
    }
}
