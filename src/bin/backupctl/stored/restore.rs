//! `backupctl restore`: disks as they were, out of a store.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Instant;

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
pub async fn run(args: &Restore, json: bool) -> Result<Status> {
    let began = Instant::now();
    let mut interrupts = Interrupts::catch().map_err(Error::Setup)?;
    let store = open_store(&args.from)?;
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
    let took = began.elapsed();
    if json {
        let disks = restored.iter().zip(&places).map(|((disk, format), place)| {
            json!({
                "name": disk.disk, "file": place.path().display().to_string(), "format": format.as_str(),
                "virtual_size": disk.virtual_size(),
            })
        });
        output::print_json(&json!({
            "event": "result", "result": "completed", "backup": location.id, "domain": chain.manifest.domain.name,
            "disks": disks.collect::<Vec<_>>(), "seconds": took.as_secs_f64(),
        }))?;
        return Ok(Status::Completed);
    }
    let mut text = format!(
        "Backup {} of {} restored in {}\n",
        escape(&location.id),
        escape(&chain.manifest.domain.name),
        units::duration(took)
    );
    for ((disk, _), place) in restored.iter().zip(&places) {
        let path = escape(&place.path().display().to_string());
        text.push_str(&format!("  {}  {path}\n", escape(&disk.disk)));
    }
    output::print(&text)?;
    Ok(Status::Completed)
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

fn format(args: &Restore, place: &Place) -> Format {
    match args.format {
        Some(args::Format::Raw) => Format::Raw,
        Some(args::Format::Qcow2) => Format::Qcow2,
        None if place.is_device() => Format::Raw,
        None => Format::Qcow2,
    }
}
