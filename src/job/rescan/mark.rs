//! Checks that a store is the recorded one, and not another directory with its path while the store is not mounted.

use std::path::Path;

use crate::job::context::{JobContext, watched};
use crate::job::{Error, Jobs};
use crate::store;

impl Jobs {
    /// Returns the mark of a store, after checking it against the recorded one. The first use of a store creates and
    /// records a mark.
    pub async fn store_mark(&self, name: &str) -> Result<Option<String>, Error> {
        let context = &self.context;
        let Some(store) = context.stores.get(name) else {
            return Ok(None);
        };
        let Some(known) = context.catalog.store_mark(name.to_owned()).await? else {
            return mark(context, name, &store.path).await.map(Some);
        };
        let (path, expected) = (store.path.clone(), known.clone());
        watched(context, "the store", move |_| {
            store::open(&path)?.check_mark(&expected)
        })
        .await??;
        Ok(Some(known))
    }
}

/// Writes the recorded mark into a store, replacing any other. A store without a recorded mark gets a new one.
pub async fn mark(context: &JobContext, name: &str, path: &Path) -> Result<String, Error> {
    let known = context.catalog.backups_in(name.to_owned()).await?;
    let path = path.to_owned();
    let mark = watched(context, "the store", move |_| {
        store::open(&path)?.make_mark(&known)
    })
    .await??;
    context
        .catalog
        .set_store_mark(name.to_owned(), mark.clone())
        .await?;
    Ok(mark)
}
