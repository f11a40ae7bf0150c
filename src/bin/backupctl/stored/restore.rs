//! `backupctl restore`: restores disks of a backup in a store.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use backupd::config::Deadlines;
use backupd::image::{self, Control, Output, Progress};
use backupd::model::Format;
use backupd::plan;
use backupd::targets;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::args::Restore;
use super::progress::{Show, follow};
use super::restore_target::{self, RestoreTarget};
use super::{identifies, open_chain, open_store};
use crate::args;
use crate::create::file_name;
use crate::error::{Error, Result, Status};
use crate::interrupt::Interrupts;
use crate::output::{self, escape};
use crate::units;

/// Restores the disks, and publishes all files when every disk is complete.
pub async fn run(args: &Restore, from: &Path, json: bool) -> Result<Status> {
    let began = Instant::now();
    let mut interrupts = Interrupts::catch().map_err(Error::Setup)?;
    let store = open_store(from)?;
    let wanted: Vec<&str> = args.disk.iter().map(|disk| disk.disk.as_str()).collect();
    if wanted.iter().collect::<BTreeSet<_>>().len() < wanted.len() {
        return Err(Error::Usage("a disk is given twice".to_owned()));
    }
    let wanted = (!wanted.is_empty()).then_some(wanted.as_slice());
    let (location, chain) = open_chain(&*store, &args.backup, wanted)?;
    let disks = chain.disks().iter().map(|disk| Wanted {
        name: &disk.disk,
        virtual_size: disk.virtual_size(),
        estimate: disk.estimate(),
    });
    let mut targets = open_targets(args, &disks.collect::<Vec<_>>(), &location.id)?;
    let (mut show, cancel) = (Show::choose(json), CancellationToken::new());
    let mut restored = Vec::new();
    for (disk, target) in chain.disks().iter().zip(&mut targets) {
        let (format, progress) = (format(args, target), Progress::default());
        let control = Control {
            progress: &progress,
            cancel: &cancel,
            stall: Deadlines::default().stall(),
        };
        let output = Output {
            file: target.descriptor()?,
            format,
            kept: false,
            written: target.written(),
        };
        let work = async { image::restore(&disk.open().await?, output, control).await };
        let done = follow(&mut show, &disk.disk, &progress, &mut interrupts, &cancel, work).await;
        if done.is_err() {
            show.finish();
        }
        done?;
        restored.push((
            disk.disk.as_str(),
            format,
            target.bytes_behind(disk.virtual_size())?,
        ));
    }
    show.finish();
    for target in &mut targets {
        target.publish()?;
    }
    let disks = restored.into_iter().zip(&targets);
    let restored = Restored {
        id: &location.id,
        domain: &chain.manifest.domain.name,
        took: began.elapsed(),
        disks: disks
            .map(|((name, format, behind), target)| RestoredDisk {
                name,
                format,
                path: target.path(),
                behind,
            })
            .collect(),
    };
    restored.print(json)
}

/// A disk to restore.
pub struct Wanted<'a> {
    pub name: &'a str,
    /// The size that the guest sees, in bytes.
    pub virtual_size: u64,
    /// The most bytes of its content; 0 if only the service knows.
    pub estimate: u64,
}

/// Opens and checks the targets of all disks of the backup `id`. Changes no existing file.
pub fn open_targets(args: &Restore, disks: &[Wanted<'_>], id: &str) -> Result<Vec<RestoreTarget>> {
    let paths = disks.iter().map(|disk| Ok((disk.name, path(args, disk.name)?)));
    let paths = paths.collect::<Result<Vec<_>>>()?;
    restore_target::check_distinct(&paths)?;
    let targets = paths
        .iter()
        .map(|(_, path)| RestoreTarget::open(path, id, args.force));
    let targets = targets.collect::<std::result::Result<Vec<_>, _>>()?;
    require_whole_id(args, &targets, id)?;
    for (disk, target) in disks.iter().zip(&targets) {
        if let Some(size) = target.device_size()? {
            let restored = plan::RestoredDisk {
                name: disk.name.to_owned(),
                virtual_size: disk.virtual_size,
                estimate: disk.estimate,
                format: format(args, target),
            };
            targets::device_for_restore(&restored.target(0), &target.path().display().to_string(), size)?;
        }
    }
    Ok(targets)
}

/// Refuses a short beginning of an id if files are replaced or devices overwritten.
fn require_whole_id(args: &Restore, targets: &[RestoreTarget], id: &str) -> Result<()> {
    let destroys = args.force || targets.iter().any(RestoreTarget::is_device);
    match destroys && !identifies(&args.backup, id) {
        true => Err(Error::Abbreviated {
            wanted: args.backup.clone(),
            job: None,
        }),
        false => Ok(()),
    }
}

/// The result of a restore.
pub struct Restored<'a> {
    pub id: &'a str,
    pub domain: &'a str,
    pub took: Duration,
    pub disks: Vec<RestoredDisk<'a>>,
}

/// A restored disk.
pub struct RestoredDisk<'a> {
    pub name: &'a str,
    /// The format of the target.
    pub format: Format,
    /// The path of the target.
    pub path: &'a Path,
    /// Bytes of a device behind the end of the disk.
    pub behind: u64,
}

impl RestoredDisk<'_> {
    /// Bytes of the device with their old content. Formats other than raw use the whole device.
    fn unchanged(&self) -> u64 {
        match self.format {
            Format::Raw => self.behind,
            Format::Qcow2 => 0,
        }
    }
}

impl Restored<'_> {
    /// Prints the result.
    pub fn print(&self, json: bool) -> Result<Status> {
        if json {
            let disks = self.disks.iter().map(|disk| {
                json!({
                    "name": disk.name, "file": disk.path.display().to_string(), "format": disk.format.as_str(),
                    "unchanged_bytes": disk.unchanged(),
                })
            });
            output::print_json(&json!({
                "event": "result", "result": "completed", "backup": self.id, "domain": self.domain,
                "disks": disks.collect::<Vec<_>>(), "seconds": self.took.as_secs_f64(),
            }))?;
            return Ok(Status::Completed);
        }
        let (id, domain) = (escape(self.id), escape(self.domain));
        let mut text = format!(
            "Backup {id} of {domain} restored in {}\n",
            units::duration(self.took)
        );
        for disk in &self.disks {
            let path = escape(&disk.path.display().to_string());
            text.push_str(&format!("  {}  {path}\n", escape(disk.name)));
            if disk.unchanged() > 0 {
                let unchanged = units::size(disk.unchanged());
                text.push_str(&format!(
                    "note: {path} is larger than the disk: its last {unchanged} keep their old content\n"
                ));
            }
        }
        output::print(&text)?;
        Ok(Status::Completed)
    }
}

/// The target path of a disk.
fn path(args: &Restore, disk: &str) -> Result<PathBuf> {
    match (&args.to, args.disk.iter().find(|given| given.disk == disk)) {
        (_, Some(given)) => Ok(given.file.clone()),
        (Some(directory), None) => {
            let format = args.format.unwrap_or(args::Format::Qcow2);
            Ok(directory.join(file_name(disk, format.into())?))
        }
        (None, None) => Err(Error::Usage(format!(
            "disk \"{disk}\" has no target: use --to or --disk"
        ))),
    }
}

/// The format of the disk on this target.
pub fn format(args: &Restore, target: &RestoreTarget) -> Format {
    match args.format {
        Some(format) => format.into(),
        None if target.is_device() => Format::Raw,
        None => Format::Qcow2,
    }
}
