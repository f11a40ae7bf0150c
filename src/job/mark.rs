//! Checks that a store is the recorded one, and not another directory with its path while the store is not mounted.

use std::path::Path;

use super::manager::{Jobs, Setting};
use super::{Error, watched};
use crate::target::{check_mark, make_mark};

impl Jobs {
    /// Returns the mark of a store, after checking it against the recorded one. The first use of a store creates and
    /// records a mark.
    pub async fn store_mark(&self, name: &str) -> Result<Option<String>, Error> {
        let setting = &self.setting;
        let Some(store) = setting.stores.get(name) else {
            return Ok(None);
        };
        let Some(known) = setting.catalog.store_mark(name.to_owned()).await? else {
            return mark(setting, name, &store.path).await.map(Some);
        };
        let (path, expected) = (store.path.clone(), known.clone());
        watched(setting, "the store", move |_| check_mark(&path, &expected)).await??;
        Ok(Some(known))
    }
}

/// Writes the recorded mark into a store, replacing any other. A store without a recorded mark gets a new one.
pub(super) async fn mark(setting: &Setting, name: &str, path: &Path) -> Result<String, Error> {
    let known = setting.catalog.backups_in(name.to_owned()).await?;
    let path = path.to_owned();
    let mark = watched(setting, "the store", move |_| make_mark(&path, &known)).await??;
    setting
        .catalog
        .set_store_mark(name.to_owned(), mark.clone())
        .await?;
    Ok(mark)
}
