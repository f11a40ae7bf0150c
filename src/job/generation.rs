//! Whether the catalog is of the same generation as the stores: if not, it is an old copy, or another service wrote into them.

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
use crate::target::{self, check_mark, generation, raise_generation};

/// The stores' generations.
pub(super) struct Generations {
    catalog: Catalog,
    patience: Duration,
    activity: Activity,
    stores: BTreeMap<String, Store>,
}

struct Store {
    path: PathBuf,
    /// Nobody compares while somebody raises.
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

    /// Marks that the service has changed a store. If that cannot be done now, the next look finds a difference, or none is
    /// needed: so it is no reason for the change to fail.
    pub async fn raise(&self, name: &str) {
        let Some(store) = self.stores.get(name) else {
            return;
        };
        let known = self.catalog.store_mark(name.to_owned()).await.ok().flatten();
        let raise = move |path: &Path, progress: &Progress| {
            // It may have been unmounted just now: what is below it then gets nothing.
            known.map_or(Ok(()), |known| check_mark(path, &known))?;
            raise_generation(path, progress)
        };
        let (_turn, raised) = match self.in_turn(store, raise).await {
            Ok(raised) => raised,
            Err(error) => {
                tracing::warn!(store = name, %error, "the change of a store is not marked in it");
                return;
            }
        };
        let known = self
            .catalog
            .raised_generation(name.to_owned(), raised.before, raised.now);
        if let Err(error) = known.await {
            tracing::warn!(store = name, %error, "the store's generation is not on record: it will be read again");
        }
    }

    /// The generation of a store, unless the catalog is of it.
    async fn difference(&self, name: &str) -> Result<Option<String>, Error> {
        let Some(store) = self.stores.get(name) else {
            return Ok(None);
        };
        let (_turn, found) = self.in_turn(store, |path, _| generation(path)).await?;
        let known = self.catalog.generation(name.to_owned()).await?;
        Ok((found != known).then_some(found))
    }

    /// The generation of a store.
    pub async fn of(&self, name: &str) -> Result<String, Error> {
        match self.stores.get(name) {
            Some(store) => Ok(self.in_turn(store, |path, _| generation(path)).await?.1),
            None => Ok(String::new()),
        }
    }

    /// Does something with a store, and keeps the turn until what is returned is dropped.
    async fn in_turn<T: Send + 'static>(
        &self,
        store: &Store,
        work: impl FnOnce(&Path, &Progress) -> Result<T, target::Error> + Send + 'static,
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
    /// Makes sure that what is on record of a store is what the store has: before anything in it is removed or built upon, or
    /// said to be amiss. Returns whether the record is another one now, because the store was read again.
    pub async fn settle_store(&self, name: &str) -> Result<bool, Error> {
        let generations = &self.setting.generations;
        if generations.difference(name).await?.is_none() {
            return Ok(false);
        }
        let _turn = self.rescanning.lock().await;
        // Who had the turn before may have done it.
        let Some(found) = generations.difference(name).await? else {
            return Ok(true);
        };
        self.check_same_store(name).await?;
        tracing::warn!(
            store = name,
            generation = found,
            "the store is not as the catalog knows it: another service changed it, or the catalog or the store is an old copy; it is read again"
        );
        rescan::one(&self.setting, name).await
    }

    /// What else has the store's path, while that is not mounted, is read in its place by nobody who was not asked to.
    async fn check_same_store(&self, name: &str) -> Result<(), Error> {
        let setting = &self.setting;
        let known = setting.catalog.store_mark(name.to_owned()).await?;
        let (Some(known), Some(store)) = (known, setting.stores.get(name)) else {
            return Ok(());
        };
        let path = store.path.clone();
        Ok(watched(setting, "the store", move |_| check_mark(&path, &known)).await??)
    }

    /// Looks at all stores, at the start, and reads those again that are not as the catalog knows them. Does not wait for it.
    pub fn settle_stores(self: &Arc<Self>) {
        for name in self.setting.stores.keys() {
            let (jobs, name) = (self.clone(), name.clone());
            let needed = self.setting.activity.begin();
            self.tasks.spawn(async move {
                let _needed = needed;
                let settled = jobs.setting.stop.run_until_cancelled(jobs.settle_store(&name));
                if let Some(Err(error)) = settled.await {
                    tracing::warn!(store = name, %error, "it is not known whether the store is as the catalog knows it");
                }
            });
        }
    }

    /// Marks that the service has changed a store.
    pub async fn raise_generation(&self, store: &str) {
        self.setting.generations.raise(store).await;
    }
}
