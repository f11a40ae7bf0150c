//! Reads a store again if the catalog does not match it.

use std::sync::Arc;

use super::scan;
use crate::job::context::watched;
use crate::job::{Error, Jobs};
use crate::store;

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
        scan::one(&self.context, name).await
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
        Ok(watched(context, "the store", move |_| {
            store::open(&path)?.check_mark(&known)
        })
        .await??)
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
