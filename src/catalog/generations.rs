//! The generation of each store that the catalog's records describe. See `store::Store::generation`.

use rusqlite::{OptionalExtension, params};

use super::{Catalog, Error};

const SET: &str = "INSERT INTO store_generations (store, generation) VALUES (?1, ?2) \
     ON CONFLICT (store) DO UPDATE SET generation = excluded.generation";

impl Catalog {
    /// Returns the generation of a store that the records describe; "" if there is none.
    pub async fn generation(&self, store: String) -> Result<String, Error> {
        self.run(move |connection| {
            let mut select =
                connection.prepare("SELECT generation FROM store_generations WHERE store = ?1")?;
            let found = select.query_row([store], |row| row.get(0)).optional()?;
            Ok(found.unwrap_or_default())
        })
        .await
    }

    /// Records that the catalog describes this generation of a store.
    pub async fn set_generation(&self, store: String, generation: String) -> Result<(), Error> {
        self.change(SET, move |set| set.execute(params![store, generation]))
            .await
    }

    /// Records that this service changed a store from generation `before` to `now`. If the catalog did not describe
    /// `before`, it does not describe `now` either.
    pub async fn raised_generation(&self, store: String, before: String, now: String) -> Result<(), Error> {
        self.run(move |connection| {
            let transaction = connection.transaction()?;
            let known: Option<String> = transaction
                .query_row(
                    "SELECT generation FROM store_generations WHERE store = ?1",
                    [&store],
                    |row| row.get(0),
                )
                .optional()?;
            if known.unwrap_or_default() == before {
                transaction.execute(SET, params![store, now])?;
            }
            Ok(transaction.commit()?)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use crate::catalog::Catalog;

    #[tokio::test]
    async fn raising_an_unknown_generation_records_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&directory.path().join("catalog.sqlite")).unwrap();
        let known = || async { catalog.generation("default".into()).await.unwrap() };
        let raised =
            |before: &str, now: &str| catalog.raised_generation("default".into(), before.into(), now.into());
        assert_eq!(known().await, "");
        raised("", "1 a").await.unwrap();
        assert_eq!(known().await, "1 a");
        raised("2 other", "3 b").await.unwrap();
        assert_eq!(known().await, "1 a");
        catalog
            .set_generation("default".into(), "3 b".into())
            .await
            .unwrap();
        raised("3 b", "4 c").await.unwrap();
        assert_eq!(known().await, "4 c");
        assert_eq!(catalog.generation("other".into()).await.unwrap(), "");
    }
}
