//! Removes backups, dependents first, each atomically.
//!
//! The service records the removal in the catalog before it removes the first file, and deletes the record after the
//! last. If the service ends in between, the next start completes the removal.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::{Backups, Error, StoreLocks};
use crate::catalog::{Backup, BackupKey, Link};
use crate::fault::{self, Point};
use crate::offload::Progress;
use crate::plan::{Destination, JobSpec};
use crate::store::{self, BackupName, Removal, Store};

/// Inspects a backup, which may be missing. The arguments are the store, the backup's name and its images.
type Find<T> = fn(&dyn Store, BackupName<'_>, &[&str]) -> Result<Option<T>, store::Error>;

/// A backup that is locked for its removal.
type LockedBackup = Box<dyn Removal>;

/// A request to remove backups of one domain in one store.
#[derive(Debug, Clone)]
pub struct Unwanted {
    pub store: String,
    /// The directory's name in the store.
    pub domain: String,
    pub ids: BTreeSet<String>,
    /// Also remove all dependents.
    pub with_dependents: bool,
    /// Make dependents independent before, and keep them.
    pub merge: bool,
    /// The only backups that may be removed or changed; `None` allows all.
    pub only: Option<BTreeSet<String>>,
}

impl Unwanted {
    /// Fails for backups that the authority was not asked about, such as a dependent created since.
    pub(super) fn check_allowed(&self, ids: &[String]) -> Result<(), Error> {
        let Some(only) = &self.only else { return Ok(()) };
        let others: Vec<String> = ids.iter().filter(|id| !only.contains(*id)).cloned().collect();
        match others.is_empty() {
            true => Ok(()),
            false => Err(Error::HasDependents {
                id: self.ids.iter().next().cloned().unwrap_or_default(),
                hidden: others.len(),
                others: Vec::new(),
            }),
        }
    }
}

/// The removed backups; in a dry run, those that would be removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// In the order of removal.
    pub ids: Vec<String>,
    /// Bytes on disk that were freed.
    pub freed: u64,
}

/// Whether the removal of a backup has begun, and its remaining files.
enum RemovalState {
    Begun(Option<LockedBackup>),
    NotBegun,
}

impl Backups {
    /// Removes backups; in a dry run, only reports them. A removal that has begun continues even if no caller waits.
    pub async fn remove(self: &Arc<Self>, unwanted: Unwanted, dry_run: bool) -> Result<Removed, Error> {
        self.settle_store(&unwanted.store).await?;
        if dry_run {
            // A dry run ends with its caller.
            let order = self.order(&unwanted, true).await?;
            return self.count(&unwanted, order).await;
        }
        let backups = self.clone();
        // Taken before the check of `stop`, so that a later stop waits for the removal.
        let token = self.tasks.token();
        if self.stop.is_cancelled() {
            return Err(Error::Stopping);
        }
        let removing = self.tasks.spawn(async move {
            let _token = token;
            let _needed = [backups.activity.begin(), backups.jobs.at_stake().begin()];
            backups.remove_now(&unwanted).await
        });
        match removing.await {
            Ok(removed) => removed,
            // The task is never cancelled, so it panicked.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    async fn remove_now(&self, unwanted: &Unwanted) -> Result<Removed, Error> {
        // The lock keeps the following results valid.
        let _turn = self.store_locks(&unwanted.store)?.removal.lock().await;
        self.check_mark(&unwanted.store).await?;
        if unwanted.merge {
            // Every check that can refuse the removal runs before the first dependent is changed.
            self.check_merge(unwanted).await?;
            self.merge(unwanted).await?;
        }
        let order = self.order(unwanted, false).await?;
        let mut locked = self.lock(unwanted, &order).await?;
        // A job locks its base, so from here on these backups get no new dependents.
        let again = self.order(unwanted, false).await?;
        if let Some(other) = again.iter().find(|id| !order.contains(id)) {
            return Err(Error::HasDependents {
                id: unwanted.ids.iter().next().cloned().unwrap_or_default(),
                others: vec![other.clone()],
                hidden: 0,
            });
        }
        self.check_running(unwanted, &order).await?;
        let mut removed = Removed::default();
        while let Some((backup, removal)) = locked.0.pop_front() {
            let gone = match self.stop.is_cancelled() {
                true => Err(Error::Stopping),
                false => self.remove_one(&backup, removal).await,
            };
            match gone {
                Ok(freed) => {
                    removed.freed += freed;
                    removed.ids.push(backup.key.id.clone());
                    self.notify_removed(backup);
                }
                Err(source) if removed.ids.is_empty() => return Err(source),
                Err(source) => {
                    return Err(Error::Partly {
                        gone: removed.ids,
                        source: Box::new(source),
                    });
                }
            }
        }
        Ok(removed)
    }

    /// Locks the directories of these backups. Fails if one is in use, has foreign files or cannot be renamed.
    async fn lock(&self, unwanted: &Unwanted, ids: &[String]) -> Result<LockedBackups, Error> {
        let mut locked = LockedBackups::default();
        for id in ids {
            let backup = self.record(unwanted, id).await?;
            let removal = self.inspect(&backup, lock_to_remove).await?;
            locked.0.push_back((backup, removal));
        }
        Ok(locked)
    }

    /// Runs every check that can refuse a merge before anything changes. A later refusal would have rewritten
    /// dependents in vain. Releases the locks at once, because the merge itself locks the bases that it reads.
    async fn check_merge(&self, unwanted: &Unwanted) -> Result<(), Error> {
        let order = self.order(unwanted, true).await?;
        self.check_running(unwanted, &order).await?;
        let dependents = self.mergeable(unwanted).await?;
        let all = [order, dependents].concat();
        drop(self.lock(unwanted, &all).await?);
        Ok(())
    }

    /// Fails if a recorded job that has not ended uses one of these backups as its base. That includes a job that does
    /// not run at the moment and so holds no lock.
    async fn check_running(&self, unwanted: &Unwanted, order: &[String]) -> Result<(), Error> {
        for job in self.catalog.under_way().await? {
            // A job whose record cannot be read could depend on any of these backups.
            let job = job?;
            let spec = JobSpec::from_record(&job.plan).map_err(|error| {
                tracing::error!(job = job.id, %error, "cannot read the plan of a job");
                Error::Catalog
            })?;
            let JobSpec::Backup(plan) = &spec else { continue };
            let is_there = |destination: &Destination| match destination {
                Destination::Store { name, directory, .. } => {
                    *name == unwanted.store && directory.as_str() == unwanted.domain
                }
                Destination::Caller => false,
            };
            let mut bases = plan.disks.iter().filter_map(|disk| disk.mode.parent());
            if is_there(&plan.destination)
                && let Some(base) = bases.find(|base| order.contains(&base.backup))
            {
                return Err(Error::BuiltUpon {
                    id: base.backup,
                    job: job.id,
                });
            }
        }
        Ok(())
    }

    /// Returns the requested backups and all their dependents. Returns only the ids of those that the catalog does not
    /// record.
    pub async fn with_dependents(&self, unwanted: &Unwanted) -> Result<(Vec<Backup>, Vec<String>), Error> {
        let chains = self.chains(&unwanted.store, &unwanted.domain).await?;
        let (mut backups, mut unknown) = (Vec::new(), Vec::new());
        for id in order(&chains.links, &unwanted.ids, true)? {
            match self.record(unwanted, &id).await {
                Ok(backup) => backups.push(backup),
                Err(Error::Gone(id)) => unknown.push(id),
                Err(error) => return Err(error),
            }
        }
        Ok((backups, unknown))
    }

    /// Reports the backups that would be removed.
    async fn count(&self, unwanted: &Unwanted, order: Vec<String>) -> Result<Removed, Error> {
        let mut removed = Removed::default();
        for id in order {
            let backup = self.record(unwanted, &id).await?;
            let space = self.inspect(&backup, space_of).await?;
            removed.freed += space.unwrap_or(0);
            removed.ids.push(id);
        }
        Ok(removed)
    }

    /// Returns the backups to remove in order. Fails if a backup that is kept depends on them.
    async fn order(&self, unwanted: &Unwanted, as_if_merged: bool) -> Result<Vec<String>, Error> {
        let mut chains = self.chains(&unwanted.store, &unwanted.domain).await?;
        if unwanted.merge {
            chains.check_understood(&unwanted.ids)?;
        }
        if unwanted.merge && as_if_merged {
            // Ignores the dependents that the merge will detach. After the merge, the catalog has no such links, so new
            // dependents are noticed.
            let links = chains.links.iter_mut();
            for link in links.filter(|link| !unwanted.ids.contains(&link.id)) {
                link.parents.retain(|parent| !unwanted.ids.contains(parent));
            }
        }
        let order = order(&chains.links, &unwanted.ids, unwanted.with_dependents)?;
        chains.check_removable(&order.iter().cloned().collect())?;
        chains.check_known(&unwanted.ids, &order)?;
        chains.check_unprotected(&order)?;
        unwanted.check_allowed(&order)?;
        Ok(order)
    }

    /// Sets or removes a backup's protection.
    pub async fn protect(&self, backup: &Backup, protected: bool) -> Result<(), Error> {
        let key = &backup.key;
        let _turn = self.store_locks(&key.store)?.removal.lock().await;
        let at = key.clone();
        let protect = move |store: &dyn Store, _: &Progress| store.protect(name(&at), protected);
        self.in_store(&key.store, protect).await?;
        self.catalog.protect(key.clone(), protected).await?;
        self.jobs.raise_generation(&key.store).await;
        tracing::info!(
            backup = key.id,
            store = key.store,
            protected,
            "the protection of a backup changed"
        );
        Ok(())
    }

    pub(super) async fn record(&self, unwanted: &Unwanted, id: &str) -> Result<Backup, Error> {
        let key = BackupKey {
            store: unwanted.store.clone(),
            domain: unwanted.domain.clone(),
            id: id.to_owned(),
        };
        let found = self.catalog.backup_at(key).await?;
        found.ok_or_else(|| Error::Gone(id.to_owned()))
    }

    /// Inspects a backup; `None` if it is missing.
    pub(super) async fn inspect<T: Send + 'static>(
        &self,
        backup: &Backup,
        find: Find<T>,
    ) -> Result<Option<T>, Error> {
        let (key, manifest) = (backup.key.clone(), backup.manifest.clone());
        let find = move |store: &dyn Store, _: &Progress| find(store, name(&key), &manifest.images());
        self.in_store(&backup.key.store, find).await
    }

    async fn remove_one(&self, backup: &Backup, removal: Option<LockedBackup>) -> Result<u64, Error> {
        let key = &backup.key;
        self.catalog.removing(key.clone(), true).await?;
        fault::point(Point::RemovalRecorded);
        let freed = match removal {
            Some(removal) => {
                let at = key.clone();
                let remove = move |store: &dyn Store, progress: &Progress| {
                    // Files that an interrupted merge left.
                    store.clear_replacement(name(&at), progress)?;
                    store::remove(removal, progress)
                };
                match self.in_store(&key.store, remove).await {
                    Ok(freed) => freed,
                    Err(error) => {
                        // Withdraws the record if no file was touched. If that fails, the next start decides.
                        let _ = self.withdraw_unless_begun(backup).await;
                        return Err(error);
                    }
                }
            }
            None => 0,
        };
        // The store's generation first, because recovery repeats this only while the record of the removal exists.
        self.jobs.raise_generation(&key.store).await;
        let gone = vec![(key.domain.clone(), key.id.clone())];
        self.catalog.forget(key.store.clone(), gone).await?;
        tracing::info!(backup = key.id, store = key.store, freed, "a backup was removed");
        Ok(freed)
    }

    /// Completes the merges and removals of a previous instance.
    pub async fn recover(self: &Arc<Self>) -> Result<(), Error> {
        for key in self.catalog.all_merging().await? {
            let backups = self.clone();
            self.tasks.spawn(async move {
                if let Err(error) = backups.recover_merge(&key).await {
                    tracing::warn!(backup = key.id, store = key.store, %error, "cannot complete the merge of a backup");
                }
            });
        }
        for backup in self.catalog.all_removing().await? {
            let backups = self.clone();
            self.tasks.spawn(async move {
                let (id, store) = (backup.key.id.clone(), backup.key.store.clone());
                if let Err(error) = backups.finish(backup).await {
                    tracing::warn!(backup = id, store, %error, "cannot complete the removal of a backup");
                }
            });
        }
        Ok(())
    }

    async fn finish(&self, backup: Backup) -> Result<(), Error> {
        let _turn = self.store_locks(&backup.key.store)?.removal.lock().await;
        self.check_mark(&backup.key.store).await?;
        if let RemovalState::Begun(removal) = self.withdraw_unless_begun(&backup).await? {
            self.remove_one(&backup, removal).await?;
            self.notify_removed(backup);
        }
        Ok(())
    }

    /// Withdraws the removal if no file was touched yet. No caller has received a success for it.
    async fn withdraw_unless_begun(&self, backup: &Backup) -> Result<RemovalState, Error> {
        match self.inspect(backup, lock).await? {
            Some(removal) if !removal.is_begun() => {
                self.catalog.removing(backup.key.clone(), false).await?;
                Ok(RemovalState::NotBegun)
            }
            removal => Ok(RemovalState::Begun(removal)),
        }
    }

    pub(super) fn store_locks(&self, store: &str) -> Result<&StoreLocks, Error> {
        self.store_locks
            .get(store)
            .ok_or_else(|| Error::NoStore(store.to_owned()))
    }

    /// Opens a store and runs blocking work in it. As [`Self::blocking`].
    pub(super) async fn in_store<T: Send + 'static>(
        &self,
        store: &str,
        work: impl FnOnce(&dyn Store, &Progress) -> Result<T, store::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let path = self.path_of(store)?;
        let work = move |progress: &Progress| work(&*store::open(&path)?, progress);
        self.blocking(store, work).await
    }

    /// Runs blocking work in a store. Only other work in the same store waits for it. The service keeps running until
    /// it returns.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        store: &str,
        work: impl FnOnce(&Progress) -> Result<T, store::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (queue, patience) = (&self.store_locks(store)?.queue, self.deadlines.stall());
        match queue.watched(&self.activity, patience, work).await {
            Some((_, done)) => Ok(done?),
            None => Err(Error::stalled(patience)),
        }
    }
}

/// Backups and their locked directories, if these exist. Releasing the locks can block on storage.
#[derive(Default)]
struct LockedBackups(VecDeque<(Backup, Option<LockedBackup>)>);

impl Drop for LockedBackups {
    fn drop(&mut self) {
        let locked = std::mem::take(&mut self.0);
        if !locked.is_empty() {
            // No caller waits for it.
            drop(tokio::task::spawn_blocking(move || drop(locked)));
        }
    }
}

/// Locks a backup, and checks that its removal is possible.
fn lock_to_remove(
    store: &dyn Store,
    name: BackupName<'_>,
    images: &[&str],
) -> Result<Option<LockedBackup>, store::Error> {
    let locked = store.lock_for_removal(name, images)?;
    locked.as_ref().map_or(Ok(()), |locked| locked.check_possible())?;
    Ok(locked)
}

fn lock(
    store: &dyn Store,
    name: BackupName<'_>,
    images: &[&str],
) -> Result<Option<LockedBackup>, store::Error> {
    store.lock_for_removal(name, images)
}

pub(super) fn space_of(
    store: &dyn Store,
    name: BackupName<'_>,
    images: &[&str],
) -> Result<Option<u64>, store::Error> {
    store.space_of(name, images)
}

pub(super) fn name(key: &BackupKey) -> BackupName<'_> {
    BackupName {
        domain: &key.domain,
        id: &key.id,
    }
}

/// Sorts these backups, and their dependents if wanted, so that each precedes its bases.
fn order(links: &[Link], ids: &BTreeSet<String>, with_dependents: bool) -> Result<Vec<String>, Error> {
    let mut above: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for link in links {
        for parent in &link.parents {
            above.entry(parent).or_default().push(&link.id);
        }
    }
    let mut all: BTreeSet<&str> = ids.iter().map(String::as_str).collect();
    let mut left: Vec<&str> = all.iter().copied().collect();
    let mut others = BTreeSet::new();
    while let Some(id) = left.pop() {
        for child in above.get(id).into_iter().flatten().copied() {
            if all.insert(child) {
                left.push(child);
                others.insert(child);
            }
        }
    }
    if !with_dependents && !others.is_empty() {
        return Err(Error::HasDependents {
            id: ids.iter().next().cloned().unwrap_or_default(),
            others: others.into_iter().map(str::to_owned).collect(),
            hidden: 0,
        });
    }
    // Newest first: backups without dependents among the others. Backups in a loop come last.
    let mut order: Vec<String> = Vec::new();
    while !all.is_empty() {
        let free: Vec<&str> = all
            .iter()
            .rev()
            .copied()
            .filter(|id| {
                !above
                    .get(id)
                    .into_iter()
                    .flatten()
                    .any(|child| all.contains(child))
            })
            .collect();
        let free = if free.is_empty() {
            all.iter().rev().copied().collect()
        } else {
            free
        };
        for id in free {
            all.remove(id);
            order.push(id.to_owned());
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::BackupState;

    fn links(chains: &[(&str, &[&str])]) -> Vec<Link> {
        let link = |(id, parents): &(&str, &[&str])| Link {
            id: (*id).to_owned(),
            parents: parents.iter().map(|&parent| parent.to_owned()).collect(),
            own_state: BackupState::Complete,
            broken: String::new(),
        };
        chains.iter().map(link).collect()
    }

    fn ids(ids: &[&str]) -> BTreeSet<String> {
        ids.iter().map(|&id| id.to_owned()).collect()
    }

    #[test]
    fn dependents_are_removed_before_their_bases() {
        let links = links(&[
            ("a", &[]),
            ("b", &["a"]),
            ("c", &["b", "a"]),
            ("d", &["a"]),
            ("e", &[]),
        ]);
        let order =
            |wanted: &[&str], with| order(&links, &ids(wanted), with).map_err(|error| error.to_string());
        assert_eq!(order(&["a"], true).unwrap(), ["d", "c", "b", "a"]);
        assert_eq!(order(&["b"], true).unwrap(), ["c", "b"]);
        assert_eq!(order(&["b", "c"], false).unwrap(), ["c", "b"]);
        assert_eq!(order(&["e"], false).unwrap(), ["e"]);
        let refused = order(&["a"], false).unwrap_err();
        assert!(
            refused.starts_with("3 other backups depend on backup a (b, c, d)"),
            "{refused}"
        );
        let refused = order(&["b"], false).unwrap_err();
        assert!(
            refused.starts_with("1 other backup depends on backup b (c)"),
            "{refused}"
        );
    }

    #[test]
    fn a_loop_of_bases_terminates() {
        let links = links(&[("a", &["b"]), ("b", &["a"]), ("c", &["a"])]);
        assert_eq!(order(&links, &ids(&["a"]), true).unwrap(), ["c", "b", "a"]);
    }
}
