//! Scans the stores, and records what they contain.

use std::collections::HashSet;
use std::path::Path;

use super::import::{Found, read};
use super::mark::mark;
use crate::catalog::ImportResult;
use crate::job::context::{JobContext, watched};
use crate::job::{Error, Jobs};
use crate::offload::Progress;
use crate::store::{self, BackupName, Operation, Store, Unfinished};

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

/// Recorded backups that the scan has not seen yet, as (domain's directory, id).
type Missing = HashSet<(String, String)>;

/// Scans all stores. With `adopt`, keep rules apply to all backups found, even if another service created them.
async fn rescan(context: &JobContext, adopt: bool) -> Result<Rescan, Error> {
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
        let before = self.within(|store, _| Ok((store.identity()?, store.domains()?)));
        let (before, directories) = before.await?;
        for directory in directories {
            self.domain(&directory).await?;
        }
        Ok(self.within(|store, _| store.identity()).await? == before)
    }

    async fn domain(&mut self, directory: &str) -> Result<(), Error> {
        let domain = directory.to_owned();
        let entries = match self.within(move |store, _| store.entries(&domain)).await {
            Ok(entries) => entries,
            Err(Error::Store(error)) => {
                self.rescan
                    .problem(&self.path.join(directory), &error.to_string());
                self.missing.retain(|(of, _)| of != directory);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let mut ids = entries.backups;
        for id in self.finish(directory, entries.unfinished).await? {
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
    /// backups that may be published again.
    async fn finish(&mut self, directory: &str, unfinished: Vec<Unfinished>) -> Result<Vec<String>, Error> {
        let mut back = Vec::new();
        for Unfinished { id, operation, entry } in unfinished {
            let (domain, at) = (directory.to_owned(), id.clone());
            let finished = match operation {
                Operation::Replacement => {
                    // The backup exists, under one of the two names.
                    self.missing.remove(&(directory.to_owned(), id.clone()));
                    let settled = self.within(move |store, _| store.settle_replacement(name(&domain, &at)));
                    settled.await.map(|()| back.push(id))
                }
                Operation::Removal => {
                    let finish = move |store: &dyn Store, progress: &Progress| {
                        store.finish_removal(name(&domain, &at), progress)
                    };
                    self.within(finish).await
                }
                Operation::Staging => match self.context.catalog.knows_backup(id).await? {
                    true => Ok(()),
                    false => {
                        self.rescan.problem(
                            &self.path.join(directory).join(&entry),
                            "the staging directory of an unknown job, which nothing will complete. Remove it",
                        );
                        Ok(())
                    }
                },
            };
            if let Err(error) = finished {
                let path = self.path.join(directory).join(&entry);
                self.rescan.problem(&path, &error.to_string());
            }
        }
        Ok(back)
    }

    async fn backups(&mut self, directory: &str, ids: &[String]) -> Result<(), Error> {
        let (store, wanted) = (self.store.to_owned(), ids.to_vec());
        let (domain, domains) = (directory.to_owned(), self.context.domains.clone());
        let read = move |opened: &dyn Store, progress: &Progress| {
            let read = wanted.iter().filter_map(|id| {
                progress.add(1);
                read(&store, opened, name(&domain, id), &domains)
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

    /// Opens the store and runs `read` on a thread that may block on storage. Fails if it stalls.
    async fn within<T: Send + 'static>(
        &self,
        read: impl FnOnce(&dyn Store, &Progress) -> Result<T, store::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let path = self.path.to_owned();
        let read = move |progress: &Progress| read(&*store::open(&path)?, progress);
        Ok(watched(self.context, "the store", read).await??)
    }
}

fn name<'a>(domain: &'a str, id: &'a str) -> BackupName<'a> {
    BackupName { domain, id }
}

impl Jobs {
    /// Reads all stores again and updates the catalog. Rescans run one at a time. With `adopt`, keep rules apply to all
    /// backups found, even if another service created them.
    pub async fn rescan(&self, adopt: bool) -> Result<Rescan, Error> {
        let _asked = self.asked_to_rescan.try_lock().map_err(|_| Error::Rescanning)?;
        let _turn = self.rescanning.lock().await;
        rescan(&self.context, adopt).await
    }
}
