//! The records of the directories that hold a domain's backups in a store.

use std::collections::BTreeSet;

use rusqlite::params;

use super::jobs::{DOMAIN, DOMAIN_KEY, domain};
use super::{Catalog, DomainRecord, Error};
use crate::model::DomainDir;

/// A directory that has backups of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsedDirectory {
    pub directory: DomainDir,
    /// The domain's names when the backups were created.
    pub names: BTreeSet<String>,
}

/// The records of a directory in a store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DirectoryState {
    pub ids: BTreeSet<String>,
    /// The domains of the backups in it.
    pub domains: Vec<DomainRecord>,
    /// The highest sequence number.
    pub highest: u64,
}

impl Catalog {
    /// Returns the directories in a store that have backups of a domain, sorted by their newest backup, newest first.
    /// Without a UUID, only backups count that this service created or adopted.
    pub async fn directories(&self, store: String, whose: DomainRecord) -> Result<Vec<UsedDirectory>, Error> {
        self.run(move |connection| {
            let mut select = connection.prepare(&format!(
                "SELECT domain, domain_name FROM backups WHERE store = ?1 AND {DOMAIN_KEY} = ?2 AND \
                     (domain_uuid IS NOT NULL OR adopted OR manifest ->> '$.service' = (SELECT id FROM service)) \
                 GROUP BY domain, domain_name ORDER BY max(id) DESC"
            ))?;
            let rows = select.query_map([&store, &whose.key()], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
            })?;
            let mut used: Vec<UsedDirectory> = Vec::new();
            for row in rows {
                let (directory, name) = row?;
                match used.iter_mut().find(|used| used.directory.as_str() == directory) {
                    Some(known) => drop(known.names.insert(name)),
                    None => used.push(UsedDirectory {
                        directory: DomainDir::new(directory),
                        names: BTreeSet::from([name]),
                    }),
                }
            }
            Ok(used)
        })
        .await
    }

    /// Returns the records of a directory in a store.
    pub async fn directory(&self, store: String, directory: DomainDir) -> Result<DirectoryState, Error> {
        self.run(move |connection| {
            let place = params![store, directory.as_str()];
            let mut select =
                connection.prepare("SELECT id, sequence FROM backups WHERE store = ?1 AND domain = ?2")?;
            let mut state = DirectoryState::default();
            let mut rows = select.query(place)?;
            while let Some(row) = rows.next()? {
                state.ids.insert(row.get(0)?);
                state.highest = state.highest.max(row.get::<_, i64>(1)?.cast_unsigned());
            }
            let mut select = connection.prepare(&format!(
                "SELECT id, {DOMAIN} FROM backups WHERE store = ?1 AND domain = ?2 GROUP BY {DOMAIN_KEY}"
            ))?;
            let mut rows = select.query(place)?;
            while let Some(row) = rows.next()? {
                state.domains.push(domain(row)?);
            }
            Ok(state)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::jobs::DOMAIN_KEY;
    use uuid::Uuid;

    #[tokio::test]
    async fn a_domains_key_is_the_same_in_the_code_and_in_the_catalog() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&directory.path().join("c")).unwrap();
        for (source, uuid, expected) in [
            ("configured", None, "web"),
            ("registered", None, "7:anna:web"),
            (
                "configured",
                Some(Uuid::from_u128(1)),
                ":00000000-0000-0000-0000-000000000001",
            ),
            (
                "registered",
                Some(Uuid::from_u128(1)),
                "7:anna::00000000-0000-0000-0000-000000000001",
            ),
        ] {
            let record = DomainRecord {
                name: "web".into(),
                source: source.into(),
                owner: 7,
                owner_name: "anna".into(),
                uuid,
            };
            assert_eq!(record.key(), expected);
            let sql = format!(
                "SELECT {DOMAIN_KEY} FROM (SELECT ?1 AS domain_source, 7 AS domain_owner, 'anna' AS domain_owner_name, \
                     'web' AS domain_name, ?2 AS domain_uuid)"
            );
            let found = catalog.run(move |connection| {
                let uuid = uuid.map(|uuid| uuid.to_string());
                Ok(connection.query_row(&sql, params![source, uuid], |row| row.get::<_, String>(0))?)
            });
            assert_eq!(found.await.unwrap(), expected);
        }
    }
}
