//! The marks of the stores that were used. See `store::Store::make_mark`.

use rusqlite::{OptionalExtension, params};

use super::{Catalog, Error};

impl Catalog {
    /// Returns the mark that a store had when it was first used or last read again; `None` if it was never used.
    pub async fn store_mark(&self, store: String) -> Result<Option<String>, Error> {
        self.run(move |connection| {
            let mut select = connection.prepare("SELECT mark FROM store_marks WHERE store = ?1")?;
            Ok(select.query_row([store], |row| row.get(0)).optional()?)
        })
        .await
    }

    pub async fn set_store_mark(&self, store: String, mark: String) -> Result<(), Error> {
        let sql = "INSERT INTO store_marks (store, mark) VALUES (?1, ?2) \
             ON CONFLICT (store) DO UPDATE SET mark = excluded.mark";
        self.change(sql, move |set| set.execute(params![store, mark]))
            .await
    }
}
