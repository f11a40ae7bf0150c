//! The generation of each store, and that of the catalog. They differ if either is an old copy, or if another service
//! changed the store.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::Error;
use crate::activity::Activity;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::offload::{Progress, Queue, Turn};
use crate::store;

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
        let raise = move |store: &dyn store::Store, progress: &Progress| {
            // If the store was just unmounted, the directory below the mount point must stay unchanged.
            known.map_or(Ok(()), |known| store.check_mark(&known))?;
            store.raise_generation(progress)
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
    pub(super) async fn difference(&self, name: &str) -> Result<Option<String>, Error> {
        let Some(store) = self.stores.get(name) else {
            return Ok(None);
        };
        let (_turn, found) = self.in_turn(store, |store, _| store.generation()).await?;
        let known = self.catalog.generation(name.to_owned()).await?;
        Ok((found != known).then_some(found))
    }

    /// Returns the generation of a store.
    pub async fn of(&self, name: &str) -> Result<String, Error> {
        match self.stores.get(name) {
            Some(store) => Ok(self.in_turn(store, |store, _| store.generation()).await?.1),
            None => Ok(String::new()),
        }
    }

    /// Runs work on a store. The store stays locked until the returned turn is dropped.
    async fn in_turn<T: Send + 'static>(
        &self,
        store: &Store,
        work: impl FnOnce(&dyn store::Store, &Progress) -> Result<T, store::Error> + Send + 'static,
    ) -> Result<(Turn, T), Error> {
        let path = store.path.clone();
        let work = move |progress: &Progress| work(&*store::open(&path)?, progress);
        match store.queue.watched(&self.activity, self.patience, work).await {
            Some((turn, done)) => Ok((turn, done?)),
            None => Err(Error::stalled("the store", self.patience)),
        }
    }
}
