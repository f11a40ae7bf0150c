//! `backupctl restore`: disks of a backup, from a store.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use backupd::config::Deadlines;
use backupd::image::{self, Control, Output, Progress};
use backupd::model::Format;
use backupd::plan::DiskPlan;
use backupd::target;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::args::Restore;
use super::place::{self, Place};
use super::progress::{Show, follow};
use super::{identifies, open_chain, open_store};
use crate::args;
use crate::create::file_name;
use crate::error::{Error, Result, Status};
use crate::interrupt::Interrupts;
use crate::output::{self, escape};
use crate::units;

/// Restores the disks, and gives them their names when all are complete.
pub async fn run(args: &Restore, from: &Path, json: bool) -> Result<Status> {
    let began = Instant::now();
    let mut interrupts = Interrupts::catch().map_err(Error::Setup)?;
    let store = open_store(from)?;
    let wanted: Vec<&str> = args.disk.iter().map(|disk| disk.disk.as_str()).collect();
    if wanted.iter().collect::<BTreeSet<_>>().len() < wanted.len() {
        return Err(Error::Usage("a disk is given twice".to_owned()));
    }
    let wanted = (!wanted.is_empty()).then_some(wanted.as_slice());
    let (location, chain) = open_chain(&store, &args.backup, wanted)?;
    let disks = chain.disks().iter().map(|disk| Wanted {
        name: &disk.disk,
        virtual_size: disk.virtual_size(),
        estimate: disk.estimate(),
    });
    let mut places = open_places(args, &disks.collect::<Vec<_>>(), &location.id)?;
    let (mut show, cancel) = (Show::choose(json), CancellationToken::new());
    let mut restored = Vec::new();
    for (disk, place) in chain.disks().iter().zip(&mut places) {
        let (format, progress) = (format(args, place), Progress::default());
        let control = Control {
            progress: &progress,
            cancel: &cancel,
            stall: Deadlines::default().stall(),
        };
        let output = Output {
            file: place.descriptor()?,
            format,
            kept: false,
            written: place.written(),
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
            place.bytes_behind(disk.virtual_size())?,
        ));
    }
    show.finish();
    for place in &mut places {
        place.publish()?;
    }
    let disks = restored.into_iter().zip(&places);
    let restored = Restored {
        id: &location.id,
        domain: &chain.manifest.domain.name,
        took: began.elapsed(),
        disks: disks
            .map(|((name, format, behind), place)| RestoredDisk {
                name,
                format,
                path: place.path(),
                behind,
            })
            .collect(),
    };
    restored.tell(json)
}

/// A disk that is to be restored.
pub struct Wanted<'a> {
    /// Its name.
    pub name: &'a str,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// Bytes that the content takes at most; 0 if only the service knows.
    pub estimate: u64,
}

/// Opens the places of all disks of the backup `id`, and checks them. Changes nothing that is there.
pub fn open_places(args: &Restore, disks: &[Wanted<'_>], id: &str) -> Result<Vec<Place>> {
    let paths = disks.iter().map(|disk| Ok((disk.name, path(args, disk.name)?)));
    let paths = paths.collect::<Result<Vec<_>>>()?;
    place::check_distinct(&paths)?;
    let places = paths.iter().map(|(_, path)| Place::open(path, id, args.force));
    let places = places.collect::<std::result::Result<Vec<_>, _>>()?;
    require_whole_id(args, &places, id)?;
    for (disk, place) in disks.iter().zip(&places) {
        if let Some(size) = place.device_size()? {
            let plan = DiskPlan::of_stored(
                disk.name,
                disk.virtual_size,
                disk.estimate,
                format(args, place),
                0,
            );
            target::device_for_restore(&plan, &place.path().display().to_string(), size)?;
        }
    }
    Ok(places)
}

/// What replaces files or overwrites devices wants more than the beginning of an id.
fn require_whole_id(args: &Restore, places: &[Place], id: &str) -> Result<()> {
    let destroys = args.force || places.iter().any(Place::is_device);
    match destroys && !identifies(&args.backup, id) {
        true => Err(Error::Abbreviated {
            wanted: args.backup.clone(),
            job: None,
        }),
        false => Ok(()),
    }
}

/// The present state.
pub struct Restored<'a> {
    /// The backup.
    pub id: &'a str,
    /// Its domain's name.
    pub domain: &'a str,
    /// How long it took.
    pub took: Duration,
    /// Its disks.
    pub disks: Vec<RestoredDisk<'a>>,
}

/// A disk that was restored.
pub struct RestoredDisk<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its format there.
    pub format: Format,
    /// Where it is.
    pub path: &'a Path,
    /// Bytes of a device behind the end of the disk.
    pub behind: u64,
}

impl RestoredDisk<'_> {
    /// Bytes of the device that still have their old content. An image in another format takes the device for itself.
    fn unchanged(&self) -> u64 {
        match self.format {
            Format::Raw => self.behind,
            Format::Qcow2 => 0,
        }
    }
}

impl Restored<'_> {
    /// Tells the user.
    pub fn tell(&self, json: bool) -> Result<Status> {
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
                    "note: {path} is larger than the disk: its last {unchanged} have their old content\n"
                ));
            }
        }
        output::print(&text)?;
        Ok(Status::Completed)
    }
}

/// Where a disk goes.
fn path(args: &Restore, disk: &str) -> Result<PathBuf> {
    match (&args.to, args.disk.iter().find(|given| given.disk == disk)) {
        (_, Some(given)) => Ok(given.file.clone()),
        (Some(directory), None) => {
            let format = args.format.unwrap_or(args::Format::Qcow2);
            Ok(directory.join(file_name(disk, format.word())?))
        }
        (None, None) => Err(Error::Usage(format!("where disk \"{disk}\" goes is not said"))),
    }
}

/// The format that it gets there.
pub fn format(args: &Restore, place: &Place) -> Format {
    match args.format {
        Some(args::Format::Raw) => Format::Raw,
        Some(args::Format::Qcow2) => Format::Qcow2,
        None if place.is_device() => Format::Raw,
        None => Format::Qcow2,
    }
}
