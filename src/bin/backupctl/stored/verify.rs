//! `backupctl verify`: checks stored backups for damage.

use std::path::Path;
use std::sync::Arc;

use backupd::config::Deadlines;
use backupd::image::{self, Control, Location, Progress, Survey, Verified};
use backupd::store::Store;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::args::Verify;
use super::open_store;
use super::progress::{Show, follow};
use crate::error::{Error, Result, Status};
use crate::interrupt::Interrupts;
use crate::output::{self, escape};
use crate::{units, view};

/// Verifies one backup with its bases, or all backups of a store.
pub async fn run(args: &Verify, from: &Path, json: bool) -> Result<Status> {
    let mut interrupts = Interrupts::catch().map_err(Error::Setup)?;
    let store = open_store(from)?;
    let wanted = match &args.backup {
        Some(backup) => vec![image::find(&*store, backup)?],
        None => all(&*store)?,
    };
    let (progress, cancel) = (Progress::default(), CancellationToken::new());
    let mut show = Show::choose(json);
    let survey = Survey::new(Arc::from(store), &wanted);
    let control = Control {
        progress: &progress,
        cancel: &cancel,
        stall: Deadlines::default().stall(),
    };
    let work = survey.verify(control, |one| {
        if json {
            view::event(object(one));
        }
    });
    let done = follow(&mut show, "verified", &progress, &mut interrupts, &cancel, work).await;
    show.finish();
    let verified = done?;
    let damaged = verified.iter().filter(|one| one.is_damaged()).count();
    let good = verified.iter().filter(|one| one.is_good()).count();
    let removed = verified.iter().filter(|one| one.is_removed()).count();
    let counts = Counts {
        good,
        damaged,
        unknown: verified.len() - damaged - good - removed,
        removed,
    };
    counts.print(verified.iter().map(lines).collect(), json)
}

/// All backups of a store. A directory without backups is an error unless it is marked as a store, because its file
/// system may not be mounted.
fn all(store: &dyn Store) -> Result<Vec<Location>> {
    let found = image::all(store)?;
    if found.is_empty() && !store.is_used()? {
        return Err(Error::NoStore(store.location().to_owned()));
    }
    Ok(found)
}

/// The number of backups in each state.
pub struct Counts {
    /// Without damage.
    pub good: usize,
    /// Damaged, or with a damaged base.
    pub damaged: usize,
    /// Not verified because of an error.
    pub unknown: usize,
    /// Deleted or pruned before their turn.
    pub removed: usize,
}

impl Counts {
    /// Prints the `text` about the backups and the counts, and returns the exit status.
    pub fn print(&self, text: String, json: bool) -> Result<Status> {
        let Self {
            good,
            damaged,
            unknown,
            removed,
        } = self;
        if json {
            output::print_json(&json!({
                "event": "result", "good": good, "damaged": damaged, "unknown": unknown,
                "removed": removed,
            }))?;
        } else {
            let mut sum = match good + damaged + unknown + removed {
                0 => "There are no backups".to_owned(),
                _ => format!("{good} good, {damaged} damaged, {unknown} unknown"),
            };
            if *removed > 0 {
                sum.push_str(&format!(", {removed} removed during the check"));
            }
            output::print(&format!("{text}{sum}\n"))?;
        }
        Ok(match (damaged, unknown) {
            (0, 0) => Status::Completed,
            (0, _) => Status::Failed,
            _ => Status::Damaged,
        })
    }
}

fn state(verified: &Verified) -> &'static str {
    match (verified.is_good(), verified.is_damaged()) {
        (true, _) => "good",
        (_, true) => "damaged",
        _ if verified.is_removed() => "removed",
        // An error prevented the verification.
        _ => "unknown",
    }
}

fn object(verified: &Verified) -> Value {
    let findings = verified
        .findings
        .iter()
        .map(|finding| json!({ "disk": finding.disk, "message": finding.fault.to_string() }));
    json!({
        "event": "backup", "domain": verified.location.domain, "id": verified.location.id,
        "state": state(verified), "findings": findings.collect::<Vec<_>>(),
        "without_checksum": verified.unrecorded, "bytes": verified.bytes,
    })
}

fn lines(verified: &Verified) -> String {
    let (location, size) = (&verified.location, units::size(verified.bytes));
    let mut text = format!(
        "{}/{}: {}, {size}\n",
        escape(&location.domain),
        escape(&location.id),
        state(verified)
    );
    for finding in &verified.findings {
        let disk = finding
            .disk
            .as_ref()
            .map(|disk| format!("disk {}: ", escape(disk)));
        let fault = escape(&finding.fault.to_string());
        text.push_str(&format!("  {}{fault}\n", disk.unwrap_or_default()));
    }
    for disk in &verified.unrecorded {
        text.push_str(&format!(
            "  disk {}: the manifest has no digest, so the content was not compared\n",
            escape(disk)
        ));
    }
    text
}
