//! The bases of backups, and damage of a base that affects its dependents.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Connection, params};

use super::jobs::DOMAIN_KEY;
use super::{BackupKey, BackupState, Catalog, DomainRecord, Error};
use crate::model::DomainDir;

/// A backup and its dependencies in its domain's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub id: String,
    /// The direct bases.
    pub parents: Vec<String>,
    /// The state without that of its bases.
    pub own_state: BackupState,
    /// The reason why its bases make it unusable; empty if they do not.
    pub broken: String,
}

/// A backup that can be the base of a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// JSON.
    pub manifest: String,
    /// A check found that its content has changed.
    pub damaged: bool,
}

impl Catalog {
    /// Returns at most `at_most` of a domain's newest backups in a directory of a store, newest first.
    pub async fn newest_backups(
        &self,
        store: String,
        directory: DomainDir,
        domain: DomainRecord,
        at_most: u32,
    ) -> Result<Vec<Stored>, Error> {
        self.run(move |connection| {
            let mut select = connection.prepare(&format!(
                "SELECT manifest, damage <> '' FROM backups WHERE store = ?1 AND domain = ?2 AND {DOMAIN_KEY} = ?3 \
                     AND NOT removing ORDER BY sequence DESC, id DESC LIMIT ?4"
            ))?;
            let place = params![store, directory.as_str(), domain.key(), at_most];
            let rows = select.query_map(place, |row| {
                Ok(Stored {
                    manifest: row.get(0)?,
                    damaged: row.get(1)?,
                })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// Returns all backups of a domain's directory in a store, by id.
    pub async fn links(&self, store: String, domain: String) -> Result<Vec<Link>, Error> {
        self.run(move |connection| Ok(links(connection, &store, &domain)?))
            .await
    }
}

fn links(connection: &Connection, store: &str, domain: &str) -> rusqlite::Result<Vec<Link>> {
    let mut select = connection.prepare(
        "SELECT id, parents, iif(look_state = '' AND damage <> '', 'damaged', look_state) AS state, broken \
         FROM backups WHERE store = ?1 AND domain = ?2 ORDER BY id",
    )?;
    let rows = select.query_map([store, domain], |row| {
        let (parents, state): (String, String) = (row.get("parents")?, row.get("state")?);
        Ok(Link {
            id: row.get("id")?,
            parents: parents.lines().map(str::to_owned).collect(),
            own_state: BackupState::parse(&state),
            broken: row.get("broken")?,
        })
    })?;
    rows.collect()
}

/// Updates, for all backups of the same domains and stores as these, whether their bases are usable.
pub(super) fn propagate_damage<'a>(
    connection: &Connection,
    changed: impl IntoIterator<Item = &'a BackupKey>,
) -> rusqlite::Result<()> {
    let changed: BTreeSet<(&str, &str)> = changed
        .into_iter()
        .map(|key| (key.store.as_str(), key.domain.as_str()))
        .collect();
    for (store, domain) in changed {
        let links = links(connection, store, domain)?;
        let broken = broken(&links);
        for link in &links {
            let broken = broken.get(link.id.as_str()).map_or("", String::as_str);
            if broken != link.broken {
                let update = "UPDATE backups SET broken = ?4 WHERE store = ?1 AND domain = ?2 AND id = ?3";
                connection.execute(update, params![store, domain, link.id, broken])?;
            }
        }
    }
    Ok(())
}

/// Returns the problems of backups whose bases are unusable, by id.
pub fn broken(links: &[Link]) -> BTreeMap<&str, String> {
    let known: BTreeSet<&str> = links.iter().map(|link| link.id.as_str()).collect();
    let mut above: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut broken = BTreeMap::new();
    let mut reached = Vec::new();
    let text = |parent: &str, word: &str| format!("its base {parent} is {word}");
    for link in links {
        for parent in &link.parents {
            above.entry(parent).or_default().push(&link.id);
            if !known.contains(parent.as_str()) {
                broken.entry(link.id.as_str()).or_insert_with(|| {
                    reached.push(link.id.as_str());
                    text(parent, "not in the store")
                });
            }
        }
    }
    let mut wrong: Vec<(&str, &str)> = links
        .iter()
        .filter(|link| link.own_state != BackupState::Complete)
        .map(|link| (link.id.as_str(), link.own_state.as_str()))
        .chain(reached.into_iter().map(|id| (id, BackupState::Damaged.as_str())))
        .collect();
    while let Some((id, word)) = wrong.pop() {
        for child in above.get(id).into_iter().flatten().copied() {
            broken.entry(child).or_insert_with(|| {
                wrong.push((child, BackupState::Damaged.as_str()));
                text(id, word)
            });
        }
    }
    broken
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(id: &str, parents: &[&str], own_state: BackupState) -> Link {
        Link {
            id: id.into(),
            parents: parents.iter().map(|&parent| parent.to_owned()).collect(),
            own_state,
            broken: String::new(),
        }
    }

    #[test]
    fn damage_of_a_base_reaches_all_its_dependents() {
        use BackupState::{Complete, Damaged, Missing};
        let links = [
            link("a", &[], Complete),
            link("b", &["a"], Damaged),
            link("c", &["b"], Complete),
            link("d", &["c", "a"], Complete),
            link("e", &["a"], Complete),
            link("f", &["z"], Complete),
            link("g", &["f"], Complete),
            link("h", &[], Missing),
            link("i", &["h"], Complete),
            // The service never creates a backup that is its own base, but such a manifest must not cause an endless
            // loop.
            link("j", &["k"], Complete),
            link("k", &["j"], Damaged),
        ];
        let broken = broken(&links);
        let said = |id: &str| broken.get(id).map(String::as_str);
        assert_eq!(
            (said("a"), said("b"), said("e"), said("h")),
            (None, None, None, None)
        );
        assert_eq!(said("c"), Some("its base b is damaged"));
        assert_eq!(said("d"), Some("its base c is damaged"));
        assert_eq!(said("f"), Some("its base z is not in the store"));
        assert_eq!(said("g"), Some("its base f is damaged"));
        assert_eq!(said("i"), Some("its base h is missing"));
        assert!(said("j").is_some());
    }
}
