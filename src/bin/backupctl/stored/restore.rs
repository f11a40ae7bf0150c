//! `backupctl restore`: disks as they were, out of a store.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use backupd::definition::Format;
use backupd::image::{self, Progress};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::args::Restore;
use super::place::Place;
use super::progress::{Show, follow};
use super::{open_chain, open_store};
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
    let mut places = Vec::new();
    for disk in chain.disks() {
        let place = Place::open(&path(args, &disk.disk)?, &location.id, args.force)?;
        places.push(place);
    }
    let (mut show, cancel) = (Show::choose(json), CancellationToken::new());
    let mut restored = Vec::new();
    for (disk, place) in chain.disks().iter().zip(&mut places) {
        let (format, progress) = (format(args, place), Progress::default());
        let work = image::restore(disk, place.begin()?, format, &progress, &cancel);
        let done = follow(&mut show, &disk.disk, &progress, &mut interrupts, &cancel, work).await;
        if done.is_err() {
            show.finish();
        }
        done?;
        restored.push((disk, format));
    }
    show.finish();
    for place in &mut places {
        place.publish()?;
    }
    let disks = restored.iter().zip(&places);
    let restored = Restored {
        id: &location.id,
        domain: &chain.manifest.domain.name,
        took: began.elapsed(),
        disks: disks
            .map(|((disk, format), place)| (disk.disk.as_str(), *format, place.path()))
            .collect(),
    };
    restored.tell(json)
}

/// What there is now.
pub struct Restored<'a> {
    /// The backup.
    pub id: &'a str,
    /// Its domain's name.
    pub domain: &'a str,
    /// How long it took.
    pub took: Duration,
    /// Each disk, its format, and where it is.
    pub disks: Vec<(&'a str, Format, &'a Path)>,
}

impl Restored<'_> {
    /// Tells the user.
    pub fn tell(&self, json: bool) -> Result<Status> {
        if json {
            let disks = self.disks.iter().map(|(name, format, path)| {
                json!({ "name": name, "file": path.display().to_string(), "format": format.as_str() })
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
        for (disk, _, path) in &self.disks {
            let path = escape(&path.display().to_string());
            text.push_str(&format!("  {}  {path}\n", escape(disk)));
        }
        output::print(&text)?;
        Ok(Status::Completed)
    }
}

/// Where a disk goes.
pub fn path(args: &Restore, disk: &str) -> Result<PathBuf> {
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
