//! Backups whose images a merge is replacing.

use rusqlite::{OptionalExtension, params};

use super::backups::key;
use super::chains::propagate_damage;
use super::{BackupKey, Catalog, Error};
use crate::model::Manifest;

impl Catalog {
    /// Records the future manifest (JSON) of a merge. "" means that the merge has begun or is being cleaned up; `None`
    /// means that there is no merge.
    pub async fn merging(&self, of: BackupKey, manifest: Option<String>) -> Result<(), Error> {
        let sql = "UPDATE backups SET merging = ?4 WHERE store = ?1 AND domain = ?2 AND id = ?3";
        self.change(sql, move |update| {
            update.execute(params![of.store, of.domain, of.id, manifest])
        })
        .await
    }

    /// Returns the future manifest of a backup if a merge is in progress.
    pub async fn being_merged(&self, of: BackupKey) -> Result<Option<String>, Error> {
        self.run(move |connection| {
            let sql = "SELECT merging FROM backups WHERE store = ?1 AND domain = ?2 AND id = ?3";
            let mut select = connection.prepare(sql)?;
            let found = select.query_row(params![of.store, of.domain, of.id], |row| row.get(0));
            Ok(found.optional()?.flatten())
        })
        .await
    }

    /// Returns all backups with a merge in progress.
    pub async fn all_merging(&self) -> Result<Vec<BackupKey>, Error> {
        self.run(|connection| {
            let mut select = connection.prepare("SELECT * FROM backups WHERE merging IS NOT NULL")?;
            let found = select.query_map([], key)?;
            Ok(found.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// Records that the backup has its future manifest now, and that the former images may still exist.
    pub async fn merged(&self, of: BackupKey) -> Result<(), Error> {
        self.run(move |connection| {
            let transaction = connection.transaction()?;
            let condition = "store = ?1 AND domain = ?2 AND id = ?3";
            let place = params![of.store, of.domain, of.id];
            let text: Option<String> = transaction.query_row(
                &format!("SELECT merging FROM backups WHERE {condition}"),
                place,
                |row| row.get(0),
            )?;
            let Some(text) = text.filter(|text| !text.is_empty()) else {
                return Ok(());
            };
            let manifest = Manifest::parse(text.as_bytes())
                .map_err(|error| Error::Statement(format!("the manifest of backup {}: {error}", of.id)))?;
            let parents: Vec<&str> = manifest.parents().into_iter().collect();
            let sql = format!(
                "UPDATE backups SET manifest = merging, merging = '', parents = ?4, look_state = '', \
                     look_problem = '' WHERE {condition}"
            );
            transaction.execute(&sql, params![of.store, of.domain, of.id, parents.join("\n")])?;
            propagate_damage(&transaction, [&of])?;
            Ok(transaction.commit()?)
        })
        .await
    }
}
