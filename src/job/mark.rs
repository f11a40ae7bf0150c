//! Whether a store is the one that is on record, and not what else has its path while it isn't mounted.

use std::path::Path;

use super::manager::{Jobs, Setting};
use super::{Error, watched};
use crate::target::{check_mark, make_mark};

impl Jobs {
    /// The mark of a store, which is the one that is on record; the first use of a store puts one there.
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

/// Puts the mark that a store has on record, whatever was there; one that has none gets one.
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
