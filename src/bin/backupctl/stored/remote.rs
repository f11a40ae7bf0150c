//! Restore, verify and export through the service. The client opens the files with the user's own rights and passes
//! them; the service reads the backup.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::sync::atomic::Ordering;
use std::time::Instant;

use backupd::names::ERROR_PREFIX;
use serde_json::{Value, json};

use super::args::{Export, Restore, Verify};
use super::restore::{Restored, RestoredDisk, Wanted, format, open_targets};
use super::{export, verify};
use crate::agent::Agent;
use crate::error::{Error, Result, Status};
use crate::files::MAX_FILES;
use crate::follow::{Ending, Follow, OnInterrupt};
use crate::interrupt::Interrupts;
use crate::job::{Outcome, Snapshot};
use crate::output::{self, escape};
use crate::proxy::{Job, Service};
use crate::{units, view};

/// `backupctl restore` without `--from`.
pub async fn restore(service: &Service, args: &Restore, json: bool, ask_password: bool) -> Result<Status> {
    let began = Instant::now();
    let mut interrupts = Interrupts::catch().map_err(Error::Setup)?;
    let backup = service.stored(&args.backup).await?;
    let disks: Vec<String> = match args.disk.is_empty() {
        true => backup.disks.iter().map(|(name, _)| name.clone()).collect(),
        false => args.disk.iter().map(|disk| disk.disk.clone()).collect(),
    };
    let wanted = disks.iter().map(|name| {
        let known = backup.disks.iter().find(|(disk, _)| disk == name);
        Wanted {
            name,
            // The service refuses a disk that the backup does not contain.
            virtual_size: known.map_or(0, |(_, size)| *size),
            estimate: 0,
        }
    });
    let mut targets = open_targets(args, &wanted.collect::<Vec<_>>(), &backup.id)?;
    let mut formats = targets.iter().map(|target| format(args, target));
    let format = formats.next().unwrap_or(backupd::model::Format::Qcow2);
    if formats.any(|other| other != format) {
        let text = "give --format when you restore to files and devices together, because their default formats differ";
        return Err(Error::Usage(text.to_owned()));
    }
    // One job for as many disks as the bus passes descriptors in one message.
    for (disks, targets) in disks.chunks(MAX_FILES).zip(targets.chunks(MAX_FILES)) {
        let mut descriptors = Vec::new();
        for (disk, target) in disks.iter().zip(targets) {
            descriptors.push((disk.clone(), target.descriptor()?));
        }
        let agent = Agent::start(ask_password).await;
        let job = tokio::select! {
            job = service.restore(&backup.path, descriptors, format.as_str()) => job?,
            _ = interrupts.next() => return Err(Error::Interrupted),
        };
        drop(agent);
        let followed = follow(service, &job, &mut interrupts, json).await;
        if followed.is_err() {
            // The service may still write, so the client wipes nothing.
            for target in targets.iter().filter(|target| target.is_device()) {
                let path = escape(&target.path().display().to_string());
                output::complain(&format!(
                    "backupctl: {path} may contain a part of the disk: restore it again"
                ));
            }
        }
        completed(followed?.0)?;
        // If a later job fails, no disk is published.
        for target in targets {
            target.written().store(true, Ordering::Relaxed);
        }
    }
    for target in &mut targets {
        target.publish()?;
    }
    let mut restored = Vec::new();
    for (name, target) in disks.iter().zip(&targets) {
        let size = backup.disks.iter().find(|(disk, _)| disk == name);
        restored.push(RestoredDisk {
            name,
            format,
            path: target.path(),
            behind: size.map_or(Ok(0), |(_, size)| target.bytes_behind(*size))?,
        });
    }
    let restored = Restored {
        id: &backup.id,
        domain: &backup.domain,
        took: began.elapsed(),
        disks: restored,
    };
    restored.print(json)
}

/// `backupctl verify` without `--from`.
pub async fn verify(service: &Service, args: &Verify, json: bool, ask_password: bool) -> Result<Status> {
    let mut interrupts = Interrupts::catch().map_err(Error::Setup)?;
    // By store and id, because ids are unique only in a store.
    let mut wanted: Vec<(String, String, String)> = match &args.backup {
        Some(backup) => {
            let backup = service.stored(backup).await?;
            vec![(backup.store, backup.id, backup.path)]
        }
        None => {
            let all = service.backups(None, None).await?.into_iter();
            all.map(|backup| (backup.store, backup.id, backup.path)).collect()
        }
    };
    let mut verified: Vec<(String, Value)> = Vec::new();
    let mut unreachable: BTreeMap<String, String> = BTreeMap::new();
    // The newest first, because its bases are verified with it.
    while let Some((store, id, path)) = wanted.pop() {
        let path_of = |id: &str| format!("{store}/{id}");
        if verified.iter().any(|(known, _)| *known == path_of(&id)) {
            continue;
        }
        let mut add = |id: &str, (state, message): (&str, Option<&str>), bytes: u64| {
            let findings: Vec<Value> = message
                .map(|message| json!({ "disk": null, "message": message }))
                .into_iter()
                .collect();
            let object = json!({
                "event": "backup", "store": store, "id": id, "state": state, "findings": findings, "bytes": bytes,
            });
            if json {
                view::event(object.clone());
            }
            verified.push((path_of(id), object));
        };
        if let Some(why) = unreachable.get(&store) {
            add(&id, ("unknown", Some(why)), 0);
            continue;
        }
        let agent = Agent::start(ask_password).await;
        let job = service.verify(&path).await;
        drop(agent);
        let job = match job {
            // Listed backups may be deleted or pruned before their turn.
            Err(error) if args.backup.is_none() && error.is_no_such_backup() => {
                add(&id, ("removed", None), 0);
                continue;
            }
            Err(error) if error.is_target_invalid() => {
                let why = error.to_string();
                add(&id, ("unknown", Some(&why)), 0);
                unreachable.insert(store, why);
                continue;
            }
            job => job?,
        };
        let (outcome, snapshot) = follow(service, &job, &mut interrupts, json).await?;
        if outcome.result == "cancelled" || snapshot.disks.is_empty() {
            completed(outcome)?;
            continue;
        }
        let was_read = |state: &str| matches!(state, "completed" | "failed");
        let there = match snapshot.disks.iter().all(|row| was_read(&row.state)) {
            true => Vec::new(),
            false => service.backups(None, Some(&store)).await?,
        };
        let removed_meanwhile = outcome.error_name == format!("{ERROR_PREFIX}NoSuchBackup");
        let is_gone = |id: &str| match there.iter().find(|backup| backup.id == id) {
            // Its directory is renamed already, and the service is about to remove its record.
            Some(backup) => removed_meanwhile && backup.state == "missing",
            None => true,
        };
        for row in &snapshot.disks {
            let found = match row.state.as_str() {
                "completed" => ("good", None),
                "failed" => ("damaged", Some(row.error.as_str())),
                _ if is_gone(&row.name) => ("removed", None),
                _ => ("unknown", Some(outcome.message.as_str())),
            };
            add(&row.name, found, row.bytes);
        }
    }
    verified.sort_by(|(one, _), (other, _)| one.cmp(other));
    let text = |(target, object): &(String, Value)| {
        let (state, size) = (
            object["state"].as_str().unwrap_or_default(),
            units::size(object["bytes"].as_u64().unwrap_or(0)),
        );
        let mut text = format!("{}: {state}, {size}\n", escape(target));
        for finding in object["findings"].as_array().into_iter().flatten() {
            let message = finding["message"].as_str().unwrap_or_default();
            text.push_str(&format!("  {}\n", escape(message)));
        }
        text
    };
    let count = |state| {
        verified
            .iter()
            .filter(|(_, object)| object["state"] == state)
            .count()
    };
    let counts = verify::Counts {
        good: count("good"),
        damaged: count("damaged"),
        unknown: count("unknown"),
        removed: count("removed"),
    };
    counts.print(verified.iter().map(text).collect(), json)
}

/// `backupctl export` without `--from`.
pub async fn export(service: &Service, args: &Export, json: bool, ask_password: bool) -> Result<Status> {
    let mut interrupts = Interrupts::catch().map_err(Error::Setup)?;
    let backup = service.stored(&args.backup).await?;
    let (disk, disks) = match &args.disk {
        None => ("", backup.disks.into_iter().map(|(name, _)| name).collect()),
        Some(one) => (one.as_str(), vec![one.clone()]),
    };
    let (socket, listener) = export::listen(&args.socket)?;
    let agent = Agent::start(ask_password).await;
    let job = tokio::select! {
        job = service.export(&backup.path, disk, listener) => job?,
        _ = interrupts.next() => return Err(Error::Interrupted),
    };
    drop(agent);
    for disk in &disks {
        socket.print(disk, json)?;
    }
    // The export ends with this program, when it is cancelled, or when no client uses it.
    tokio::select! {
        outcome = job.wait() => completed(outcome?).map(|()| Status::Completed),
        _ = interrupts.next() => Ok(Status::Completed),
    }
}

/// Follows a job that is useless without this program, so a signal cancels it.
async fn follow(
    service: &Service,
    job: &Job,
    interrupts: &mut Interrupts,
    json: bool,
) -> Result<(Outcome, Snapshot)> {
    let mut view = view::choose(json, io::stderr().is_terminal());
    let mut follow = Follow::new(job, view.as_mut(), OnInterrupt::Leave).await?;
    let ending = follow.run(service, interrupts).await?;
    let snapshot = follow.snapshot.clone();
    match ending {
        Ending::Ended(outcome) => Ok((outcome, snapshot)),
        Ending::Detached => {
            // An ended job cannot be cancelled. `Wait` returns its outcome in any case.
            let _ = job.cancel().await;
            Ok((job.wait().await?, snapshot))
        }
    }
}

fn completed(outcome: Outcome) -> Result<()> {
    match outcome.result.as_str() {
        "completed" => Ok(()),
        _ => Err(Error::Call {
            name: outcome.error_name,
            message: outcome.message,
        }),
    }
}

/// A stored backup, as the service reports it.
#[derive(Debug)]
pub struct Stored {
    pub path: String,
    pub id: String,
    pub domain: String,
    pub store: String,
    /// The names of its disks, and their virtual sizes in bytes.
    pub disks: Vec<(String, u64)>,
}
