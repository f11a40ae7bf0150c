//! The bases of backups, and damage of a base that affects its dependents.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Connection, params};

use super::jobs::DOMAIN_KEY;
use super::{BackupKey, BackupState, Catalog, DomainRecord, Error};
use crate::model::DomainDir;

/// A backup among those of its domain in its store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub id: String,
    /// Its direct bases.
    pub parents: Vec<String>,
    /// Apart from its bases.
    pub own_state: BackupState,
    /// Why it is of no use though nothing is wrong with itself.
    pub broken: String,
}

/// A backup that a later one could be built upon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// JSON.
    pub manifest: String,
    /// A check of its content found it to be not what it was.
    pub damaged: bool,
}

impl Catalog {
    /// The newest backups of a domain in a directory of a store, at most so many, from the one that was made last on.
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

    /// All backups of a domain's directory in a store, by id.
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
pub(super) fn settle<'a>(
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

/// Problems of backups whose bases are unusable, by their ids.
pub fn broken(links: &[Link]) -> BTreeMap<&str, String> {
    let known: BTreeSet<&str> = links.iter().map(|link| link.id.as_str()).collect();
    let mut above: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut broken = BTreeMap::new();
    let mut reached = Vec::new();
    let text = |parent: &str, word: &str| format!("it lies on backup {parent}, which is {word}");
    for link in links {
        for parent in &link.parents {
            above.entry(parent).or_default().push(&link.id);
            if !known.contains(parent.as_str()) {
                broken.entry(link.id.as_str()).or_insert_with(|| {
                    reached.push(link.id.as_str());
                    text(parent, "not there")
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
    fn what_lies_on_something_that_is_of_no_use_is_of_none_either() {
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
            // A backup that is its own base is never made, but must not cause an endless loop.
            link("j", &["k"], Complete),
            link("k", &["j"], Damaged),
        ];
        let broken = broken(&links);
        let said = |id: &str| broken.get(id).map(String::as_str);
        assert_eq!(
            (said("a"), said("b"), said("e"), said("h")),
            (None, None, None, None)
        );
        assert_eq!(said("c"), Some("it lies on backup b, which is damaged"));
        assert_eq!(said("d"), Some("it lies on backup c, which is damaged"));
        assert_eq!(said("f"), Some("it lies on backup z, which is not there"));
        assert_eq!(said("g"), Some("it lies on backup f, which is damaged"));
        assert_eq!(said("i"), Some("it lies on backup h, which is missing"));
        assert!(said("j").is_some());
    }
}
