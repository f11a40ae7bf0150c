//! Compares the generation of the catalog with that of each store. They differ if either is an old copy, or if another
//! service changed the store.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::manager::Jobs;
use super::{Error, rescan, watched};
use crate::activity::Activity;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::offload::{Progress, Queue, Turn};
use crate::store::{self, check_mark, generation, raise_generation};

/// The stores' generations.
pub(super) struct Generations {
    catalog: Catalog,
    patience: Duration,
    activity: Activity,
    stores: BTreeMap<String, Store>,
}

struct Store {
    path: PathBuf,
    /// Serialises reading and raising the generation.
    queue: Queue,
}

impl Generations {
    pub fn new(catalog: Catalog, config: &Config, activity: Activity) -> Self {
        let stores = config.stores.iter().map(|(name, store)| {
            let path = store.path.clone();
            let queue = Queue::default();
            (name.clone(), Store { path, queue })
        });
        Self {
            catalog,
            patience: config.deadlines.stall(),
            activity,
            stores: stores.collect(),
        }
    }

    /// Marks that the service has changed a store. A failure does not fail the change, because the next comparison then
    /// finds a difference and the store is read again.
    pub async fn raise(&self, name: &str) {
        let Some(store) = self.stores.get(name) else {
            return;
        };
        let known = self.catalog.store_mark(name.to_owned()).await.ok().flatten();
        let raise = move |path: &Path, progress: &Progress| {
            // If the store was just unmounted, the directory below the mount point must stay unchanged.
            known.map_or(Ok(()), |known| check_mark(path, &known))?;
            raise_generation(path, progress)
        };
        let (_turn, raised) = match self.in_turn(store, raise).await {
            Ok(raised) => raised,
            Err(error) => {
                tracing::warn!(store = name, %error, "cannot record the change in the store");
                return;
            }
        };
        let known = self
            .catalog
            .raised_generation(name.to_owned(), raised.before, raised.now);
        if let Err(error) = known.await {
            tracing::warn!(store = name, %error, "cannot record the store's generation; the store will be read again");
        }
    }

    /// Returns the generation of a store if the catalog has another one.
    async fn difference(&self, name: &str) -> Result<Option<String>, Error> {
        let Some(store) = self.stores.get(name) else {
            return Ok(None);
        };
        let (_turn, found) = self.in_turn(store, |path, _| generation(path)).await?;
        let known = self.catalog.generation(name.to_owned()).await?;
        Ok((found != known).then_some(found))
    }

    /// Returns the generation of a store.
    pub async fn of(&self, name: &str) -> Result<String, Error> {
        match self.stores.get(name) {
            Some(store) => Ok(self.in_turn(store, |path, _| generation(path)).await?.1),
            None => Ok(String::new()),
        }
    }

    /// Runs work on a store. The store stays locked until the returned turn is dropped.
    async fn in_turn<T: Send + 'static>(
        &self,
        store: &Store,
        work: impl FnOnce(&Path, &Progress) -> Result<T, store::Error> + Send + 'static,
    ) -> Result<(Turn, T), Error> {
        let path = store.path.clone();
        let work = move |progress: &Progress| work(&path, progress);
        match store.queue.watched(&self.activity, self.patience, work).await {
            Some((turn, done)) => Ok((turn, done?)),
            None => Err(Error::stalled("the store", self.patience)),
        }
    }
}

impl Jobs {
    /// Makes sure that the catalog matches the store. The service calls this before it removes a backup, builds upon
    /// one, or reports one as damaged. Returns whether the records may have changed, because the store was read again.
    pub async fn settle_store(&self, name: &str) -> Result<bool, Error> {
        let generations = &self.context.generations;
        if generations.difference(name).await?.is_none() {
            return Ok(false);
        }
        let _turn = self.rescanning.lock().await;
        // The task that held the lock before may have read the store.
        let Some(found) = generations.difference(name).await? else {
            return Ok(true);
        };
        self.check_same_store(name).await?;
        tracing::warn!(
            store = name,
            generation = found,
            "the catalog does not match the store: another service changed the store, or one of \
             them is an old copy. Reading the store again"
        );
        rescan::one(&self.context, name).await
    }

    /// Fails if the store's path has another directory, for example because the store is not mounted. Only an explicit
    /// rescan reads such a directory.
    async fn check_same_store(&self, name: &str) -> Result<(), Error> {
        let context = &self.context;
        let known = context.catalog.store_mark(name.to_owned()).await?;
        let (Some(known), Some(store)) = (known, context.stores.get(name)) else {
            return Ok(());
        };
        let path = store.path.clone();
        Ok(watched(context, "the store", move |_| check_mark(&path, &known)).await??)
    }

    /// Compares all stores with the catalog at the start, and reads those again that differ. Does not wait for the
    /// result.
    pub fn settle_stores(self: &Arc<Self>) {
        for name in self.context.stores.keys() {
            let (jobs, name) = (self.clone(), name.clone());
            let needed = self.context.activity.begin();
            self.tasks.spawn(async move {
                let _needed = needed;
                let settled = jobs.context.stop.run_until_cancelled(jobs.settle_store(&name));
                if let Some(Err(error)) = settled.await {
                    tracing::warn!(store = name, %error, "cannot compare the store with the catalog");
                }
            });
        }
    }

    /// Marks that the service has changed a store.
    pub async fn raise_generation(&self, store: &str) {
        self.context.generations.raise(store).await;
    }
}
