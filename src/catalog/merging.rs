//! Backups whose images are being replaced by others of the same content.

use rusqlite::{OptionalExtension, params};

use super::backups::key;
use super::chains::settle;
use super::{BackupKey, Catalog, Error};
use crate::model::Manifest;

impl Catalog {
    /// Remembers what a backup's manifest (JSON) will be, "" if that is not known yet; or that it stays what it is.
    pub async fn merging(&self, of: BackupKey, manifest: Option<String>) -> Result<(), Error> {
        let sql = "UPDATE backups SET merging = ?4 WHERE store = ?1 AND domain = ?2 AND id = ?3";
        self.change(sql, move |update| {
            update.execute(params![of.store, of.domain, of.id, manifest])
        })
        .await
    }

    /// What the manifest of a backup will be, if it is to be another one.
    pub async fn being_merged(&self, of: BackupKey) -> Result<Option<String>, Error> {
        self.run(move |connection| {
            let sql = "SELECT merging FROM backups WHERE store = ?1 AND domain = ?2 AND id = ?3";
            let mut select = connection.prepare(sql)?;
            let found = select.query_row(params![of.store, of.domain, of.id], |row| row.get(0));
            Ok(found.optional()?.flatten())
        })
        .await
    }

    /// The backups whose manifests are to be others.
    pub async fn all_merging(&self) -> Result<Vec<BackupKey>, Error> {
        self.run(|connection| {
            let mut select = connection.prepare("SELECT * FROM backups WHERE merging IS NOT NULL")?;
            let found = select.query_map([], key)?;
            Ok(found.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// Remembers that the manifest of a backup is now what it was to be, and that there is something left of what was before.
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
            settle(&transaction, [&of])?;
            Ok(transaction.commit()?)
        })
        .await
    }
}
