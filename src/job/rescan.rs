//! Rebuilds the catalog's records of backups from the stores.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::boot::BootId;
use super::manager::JobContext;
use super::mark::mark;
use super::record::{domain_record, journal, to_text};
use super::{DiskState, DiskStatus, Error, backup, watched};
use crate::catalog::{BackupRecord, ImportResult, NewJob, Starter, StoredBackup};
use crate::checkpoint::{Base, FullReason, Mode};
use crate::definition::{self, Definition};
use crate::domain::{Identity, Registry};
use crate::model::{DEFINITION_NAME, DomainDir, Format, Kind, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest};
use crate::offload::Progress;
use crate::plan::{Destination, DiskPlan, Place, Plan, Task};
use crate::store::{self, BackupName, Directory, Replacement};

/// The maximum number of reported problems.
const MAX_PROBLEMS: usize = 100;
/// The number of backups that are read and recorded at a time.
const BATCH: usize = 50;

/// The result of a rescan.
#[derive(Debug, Default)]
pub struct Rescan {
    /// The number of good backups in all stores.
    pub backups: u32,
    /// Problems with path and reason, for display: at most 100. The log has all of them.
    pub problems: Vec<String>,
}

impl Rescan {
    fn problem(&mut self, path: &Path, why: &str) {
        let text = format!("{}: {why}", path.display());
        tracing::warn!("{text}");
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(text);
        }
    }
}

/// A backup in a store, or the reason why it is not usable.
struct Found {
    path: PathBuf,
    id: String,
    backup: Result<StoredBackup, String>,
}

/// Recorded backups that the scan has not seen yet, as (domain's directory, id).
type Missing = HashSet<(String, String)>;

/// Scans all stores. With `adopt`, keep rules apply to all backups found, even if another service created them.
pub(super) async fn rescan(context: &JobContext, adopt: bool) -> Result<Rescan, Error> {
    let mut rescan = Rescan::default();
    for (name, store) in &context.stores {
        match scan_store(context, name, &store.path, &mut rescan).await {
            Ok(_) => {
                if adopt {
                    context.catalog.adopt(name.clone()).await?;
                }
                mark_as(context, name, &store.path, &mut rescan).await?;
            }
            Err(error @ (Error::Store(_) | Error::Stalled { .. } | Error::Exchanged)) => {
                rescan.problem(&store.path, &error.to_string());
            }
            Err(error) => return Err(error),
        }
    }
    tracing::info!(backups = rescan.backups, "scanned the stores");
    Ok(rescan)
}

/// Marks the scanned store as the one to use from now on.
async fn mark_as(context: &JobContext, name: &str, path: &Path, rescan: &mut Rescan) -> Result<(), Error> {
    match mark(context, name, path).await {
        // The scan has already reported that none of the recorded backups exists.
        Ok(_) | Err(Error::Store(store::Error::NotMounted { .. })) => Ok(()),
        Err(Error::Store(error)) => {
            rescan.problem(path, &error.to_string());
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Scans one store. Returns whether the catalog matches the store now.
pub(super) async fn one(context: &JobContext, name: &str) -> Result<bool, Error> {
    let Some(store) = context.stores.get(name) else {
        return Ok(false);
    };
    let mut rescan = Rescan::default();
    let settled = scan_store(context, name, &store.path, &mut rescan).await?;
    tracing::info!(store = name, backups = rescan.backups, "scanned the store");
    Ok(settled)
}

/// Returns whether the catalog matches the store now. It does not if the store is empty, because it may be another
/// directory.
async fn scan_store(
    context: &JobContext,
    name: &str,
    path: &Path,
    rescan: &mut Rescan,
) -> Result<bool, Error> {
    // Read before the scan, so that backups published during the scan count neither as known nor as missing.
    let generation = context.generations.of(name).await?;
    let known = context.catalog.backups_in(name.to_owned()).await?;
    let mut scan = StoreScan {
        store: name,
        path,
        context,
        last_number: context.catalog.last_number().await?,
        missing: known.into_iter().collect(),
        seen: 0,
        rescan,
    };
    if !scan.through().await? {
        return Err(Error::Exchanged);
    }
    let settled = scan.forget_missing().await?;
    if settled {
        context
            .catalog
            .set_generation(name.to_owned(), generation)
            .await?;
    }
    Ok(settled)
}

/// A scan of one store.
struct StoreScan<'a> {
    store: &'a str,
    path: &'a Path,
    context: &'a JobContext,
    /// The highest job id before the scan.
    last_number: u32,
    missing: Missing,
    /// The number of backups found, including unusable ones.
    seen: usize,
    rescan: &'a mut Rescan,
}

impl StoreScan<'_> {
    /// Records the backups found. Returns false if the store was replaced or unmounted during the scan.
    async fn through(&mut self) -> Result<bool, Error> {
        let path = self.path.to_owned();
        let names = self.within(move |_| {
            let store = Directory::of_store(&path)?;
            Ok((store.id()?, store.names()?))
        });
        let (before, directories) = names.await?;
        for directory in directories.into_iter().filter(|name| !is_hidden(name)) {
            self.domain(&directory).await?;
        }
        let path = self.path.to_owned();
        let after = self.within(move |_| Directory::of_store(&path)?.id());
        Ok(after.await? == before)
    }

    async fn domain(&mut self, directory: &str) -> Result<(), Error> {
        let (path, name) = (self.path.to_owned(), directory.to_owned());
        let names = self.within(move |_| match Directory::of_store(&path)?.below(&name)? {
            Some(shelf) => shelf.names(),
            None => Ok(Vec::new()),
        });
        let names = match names.await {
            Ok(names) => names,
            Err(Error::Store(error)) => {
                self.rescan
                    .problem(&self.path.join(directory), &error.to_string());
                self.missing.retain(|(of, _)| of != directory);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let (hidden, mut ids): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| is_hidden(name));
        for id in self.unfinished(directory, &hidden).await? {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        for ids in ids.chunks(BATCH) {
            if self.context.stop.is_cancelled() {
                return Err(Error::Stopping);
            }
            self.backups(directory, ids).await?;
        }
        Ok(())
    }

    /// Completes interrupted removals and replacements, and reports staging directories of unknown jobs. Returns the
    /// backups that may have their final name again.
    async fn unfinished(&mut self, directory: &str, hidden: &[String]) -> Result<Vec<String>, Error> {
        let mut back = Vec::new();
        for name in hidden {
            if let Some(id) = store::replaced_backup(name) {
                let (path, domain, at) = (self.path.to_owned(), directory.to_owned(), id.to_owned());
                let settle = move |_: &Progress| {
                    let name = BackupName {
                        domain: &domain,
                        id: &at,
                    };
                    Replacement::settle(&path, name)
                };
                // The backup exists, under one of the two names.
                self.missing.remove(&(directory.to_owned(), id.to_owned()));
                match self.within(settle).await {
                    Ok(()) => back.push(id.to_owned()),
                    Err(error) => {
                        let path = self.path.join(directory).join(name);
                        self.rescan.problem(&path, &error.to_string());
                    }
                }
            }
            if let Some(id) = store::removed_backup(name) {
                let (path, domain, at) = (self.path.to_owned(), directory.to_owned(), id.to_owned());
                let finish = move |progress: &Progress| {
                    let name = BackupName {
                        domain: &domain,
                        id: &at,
                    };
                    store::finish_removal(&path, name, progress)
                };
                if let Err(error) = self.within(finish).await {
                    let path = self.path.join(directory).join(name);
                    self.rescan.problem(&path, &error.to_string());
                }
            }
            if let Some(id) = store::staged_backup(name)
                && !self.context.catalog.knows_backup(id.to_owned()).await?
            {
                let path = self.path.join(directory).join(name);
                self.rescan.problem(
                    &path,
                    "the staging directory of an unknown job, which nothing will complete. Remove it",
                );
            }
        }
        Ok(back)
    }

    async fn backups(&mut self, directory: &str, ids: &[String]) -> Result<(), Error> {
        let (store, path) = (self.store.to_owned(), self.path.to_owned());
        let (name, wanted) = (directory.to_owned(), ids.to_vec());
        let domains = self.context.domains.clone();
        let read = move |progress: &Progress| {
            let Some(shelf) = Directory::of_store(&path)?.below(&name)? else {
                return Ok(Vec::new());
            };
            let read = wanted.iter().filter_map(|id| {
                progress.add(1);
                read(&store, &path, &name, id, &shelf, &domains)
            });
            Ok(read.collect::<Vec<_>>())
        };
        let mut found = self.within(read).await?;
        for Found { id, .. } in &found {
            // An unusable backup is not a missing one.
            self.missing.remove(&(directory.to_owned(), id.clone()));
            self.seen += 1;
        }
        // New job ids must follow the order of time.
        found.sort_by_key(|found| found.backup.as_ref().ok().map(|backup| backup.job.start_time));
        let (mut paths, mut good) = (Vec::new(), Vec::new());
        for Found { path, backup, .. } in found {
            match backup {
                Ok(backup) => {
                    paths.push(path);
                    good.push(backup);
                }
                Err(why) => self.rescan.problem(&path, &why),
            }
        }
        let history = self.context.history;
        let taken = self
            .context
            .catalog
            .take_in(good, self.last_number, history)
            .await?;
        for (path, taken) in paths.iter().zip(taken) {
            match taken {
                ImportResult::Recorded => self.rescan.backups += 1,
                ImportResult::Unfinished => {}
                ImportResult::NotCompleted(job) => {
                    let why = format!("its job {job} did not complete, so the backup is not usable");
                    self.rescan.problem(path, &why);
                }
            }
        }
        Ok(())
    }

    /// Removes the records of missing backups. Returns false if all recorded backups are missing, because the directory
    /// may be another store.
    async fn forget_missing(self) -> Result<bool, Error> {
        let missing: Vec<_> = self.missing.into_iter().collect();
        if missing.is_empty() {
            return Ok(true);
        }
        if self.seen == 0 {
            let why = format!(
                "the store contains no backup, but the catalog records {} and keeps the records. \
                 Check that the store is mounted",
                missing.len()
            );
            self.rescan.problem(self.path, &why);
            return Ok(false);
        }
        tracing::info!(
            store = self.store,
            count = missing.len(),
            "removed the records of backups that are no longer in the store"
        );
        let forgotten = self.context.catalog.forget(self.store.to_owned(), missing);
        forgotten.await?;
        Ok(true)
    }

    /// Runs `read` on a thread that may block on storage. Fails if it stalls.
    async fn within<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Progress) -> Result<T, store::Error> + Send + 'static,
    ) -> Result<T, Error> {
        Ok(watched(self.context, "the store", read).await??)
    }
}

fn is_hidden(name: &str) -> bool {
    name.starts_with('.')
}

/// Reads the backup with this name; `None` if it is not a directory.
fn read(
    store: &str,
    path: &Path,
    directory: &str,
    id: &str,
    shelf: &Directory,
    domains: &Registry,
) -> Option<Found> {
    let backup = match shelf.below(id) {
        Ok(Some(backup)) => stored_backup(store, path, directory, id, &backup, domains),
        Ok(None) => return None,
        Err(error) => Err(error.to_string()),
    };
    Some(Found {
        path: shelf.path().join(id),
        id: id.to_owned(),
        backup,
    })
}

/// Returns the record of a backup in a store, or the reason why it is not usable.
fn stored_backup(
    store: &str,
    store_path: &Path,
    directory: &str,
    id: &str,
    shelf: &Directory,
    domains: &Registry,
) -> Result<StoredBackup, String> {
    let (bytes, end_time) = shelf
        .read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        .map_err(|error| error.to_string())?;
    let manifest = Manifest::parse(&bytes).map_err(|error| format!("{MANIFEST_NAME}: {error}"))?;
    if manifest.id != id {
        return Err(format!("{MANIFEST_NAME} belongs to backup '{}'", manifest.id));
    }
    for disk in &manifest.disks {
        let size = shelf.file_size(&disk.file).map_err(|error| error.to_string())?;
        if size == 0 || (disk.format == Format::Raw && size != disk.virtual_size) {
            return Err(format!(
                "{} has {size} bytes, which is not a valid size for an image of the disk",
                disk.file
            ));
        }
    }
    let (domain, uuid) = (&manifest.domain.name, manifest.domain.uuid);
    let identity = Identity::in_directory(directory, domain, uuid)
        .ok_or_else(|| format!("{MANIFEST_NAME}: '{domain}' is not a valid name of a domain"))?;
    let identity = match domains.same(&identity) {
        Some(known) => Identity {
            owner: known.owner,
            owner_name: known.owner_name.clone(),
            ..identity
        },
        None => identity,
    };
    let plan = plan(
        (store, store_path, directory),
        &manifest,
        document(shelf).as_ref(),
    );
    let disks: Vec<DiskStatus> = manifest
        .disks
        .iter()
        .map(|disk| DiskStatus {
            name: disk.name.clone(),
            state: DiskState::Completed,
            total: disk.virtual_size,
            done: disk.virtual_size,
            target: shelf.path().join(&disk.file).display().to_string(),
        })
        .collect();
    let ended = backup::State::Ended(backup::Ended {
        frozen_us: manifest.frozen_us.unwrap_or(0),
        quiesce_problem: manifest.quiesce_problem.clone(),
        ..backup::Ended::default()
    });
    let text = |result: Result<String, Error>| result.map_err(|error| error.to_string());
    Ok(StoredBackup {
        number: manifest.job,
        job: NewJob {
            backup_id: manifest.id.clone(),
            domain: domain_record(identity),
            started_by: Starter {
                uid: manifest.started_by,
                name: None,
                connection: None,
            },
            start_time: manifest.started,
            speed: plan.bandwidth,
            plan: text(to_text(&plan))?,
            state: journal(&ended, BootId::nil()).map_err(|error| error.to_string())?,
        },
        end_time,
        disks: text(to_text(&disks))?,
        backup: BackupRecord {
            id: manifest.id,
            store: store.to_owned(),
            domain: directory.to_owned(),
            manifest: String::from_utf8_lossy(&bytes).into_owned(),
            protected: shelf.is_protected().map_err(|error| error.to_string())?,
        },
    })
}

/// Returns the document of the backup's request, if the store still has it. A backup is usable without it.
fn document(shelf: &Directory) -> Option<Definition> {
    let (bytes, _) = shelf.read(DEFINITION_NAME, definition::MAX_BYTES).ok()?;
    definition::parse(std::str::from_utf8(&bytes).ok()?).ok()
}

/// Reconstructs the plan from the manifest and the document.
fn plan(
    (store, path, directory): (&str, &Path, &str),
    manifest: &Manifest,
    document: Option<&Definition>,
) -> Plan {
    let listed = || {
        document
            .into_iter()
            .flat_map(|document| document.disks.iter().flatten())
    };
    Plan {
        checkpoint: manifest.checkpoint.clone(),
        name: manifest.name.clone(),
        description: manifest.description.clone(),
        destination: Destination::Store {
            name: store.to_owned(),
            path: path.to_owned(),
            directory: DomainDir::new(directory),
            sequence: manifest.sequence,
            service: manifest.service.unwrap_or_default(),
        },
        reuse_external: false,
        task: Task::Backup,
        max_latency: None,
        bandwidth: document.and_then(|document| document.bandwidth).unwrap_or(0),
        quiesce: document.and_then(|document| document.quiesce),
        hold_poweroff: true,
        disks: manifest
            .disks
            .iter()
            .map(|disk| DiskPlan {
                device: String::new(),
                name: disk.name.clone(),
                node: String::new(),
                virtual_size: disk.virtual_size,
                estimate: disk.virtual_size,
                source: None,
                encrypted: false,
                only_allocated: false,
                format: disk.format,
                compress: listed()
                    .find(|listed| listed.name == disk.name)
                    .and_then(|listed| listed.compress),
                mode: match &disk.parent {
                    None => Mode::Full {
                        why: FullReason::Unknown,
                    },
                    Some(parent) => Mode::Incremental(Base {
                        backup: parent.backup.clone(),
                        file: parent.file.clone(),
                        bitmap: String::new(),
                        is_newest: manifest.kind == Kind::Incremental,
                    }),
                },
                checkpoint: disk.bitmap.is_some(),
                place: Place::InStore {
                    file_name: disk.file.clone(),
                },
            })
            .collect(),
        excluded: listed()
            .filter(|listed| !listed.backup)
            .map(|listed| listed.name.clone())
            .collect(),
        outside: manifest.not_in_backup.clone(),
    }
}
