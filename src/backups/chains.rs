//! The dependencies in a domain's directory, as the store itself has them.
//!
//! The catalog may be an old copy, and others may have written into the store: another host's service, a newer one, a person
//! with `cp`. So every manifest there is read before a backup is removed or merged.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::look::is_absent;
use super::{Backups, Error};
use crate::catalog::{BackupState, Link};
use crate::model::{MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, ManifestError};
use crate::offload::Progress;
use crate::target::{self, Shelf};

/// The backups of a domain's directory and what they depend on.
pub(super) struct Chains {
    /// By id.
    pub links: Vec<Link>,
    /// Those that are in the store and not on record.
    unknown: BTreeSet<String>,
    /// Those that nobody removes, as the store says.
    protected: BTreeSet<String>,
    /// Those whose manifest cannot be read or understood, by id: what they depend on only the catalog may know.
    obscure: BTreeMap<String, Obscure>,
}

struct Obscure {
    why: Error,
    /// It is no manifest any more: another look, or a newer service, would make no more of it.
    is_damaged: bool,
}

/// A backup's directory, as its manifest says.
struct Stored {
    id: String,
    /// Where it is, for people.
    path: String,
    parents: Result<Vec<String>, Why>,
    protected: bool,
}

/// Why it is not known what a backup depends on.
enum Why {
    Manifest(ManifestError),
    Store(target::Error),
}

impl Chains {
    /// Those among `ids` and their dependents that are not on record, as an error: nobody here knows their files.
    pub fn check_known(&self, first: &BTreeSet<String>, ids: &[String]) -> Result<(), Error> {
        let others = ids.iter().filter(|id| self.unknown.contains(*id));
        let others: Vec<String> = others.cloned().collect();
        match others.is_empty() {
            true => Ok(()),
            false => Err(Error::NotOnRecord {
                id: first.iter().next().cloned().unwrap_or_default(),
                others,
            }),
        }
    }

    /// Refuses to change anything beside a manifest that cannot be read or understood, unless it is one of `ids`.
    pub fn check_understood(&self, ids: &BTreeSet<String>) -> Result<(), Error> {
        let mut others = self.obscure.iter().filter(|(id, _)| !ids.contains(*id));
        others.next().map_or(Ok(()), |(_, other)| Err(other.why.clone()))
    }

    /// The same of removing `ids`. Damaged backups go all the same if no other depends on them, as far as is known: of two with
    /// damaged manifests each would keep the other for ever. A good one stays, because a damaged one may depend on it.
    pub fn check_removable(&self, ids: &BTreeSet<String>) -> Result<(), Error> {
        let is_damaged = |id: &String| self.obscure.get(id).is_some_and(|obscure| obscure.is_damaged);
        let others = self.obscure.iter().filter(|(id, _)| !ids.contains(*id));
        let mut others = others.filter(|(_, other)| !(other.is_damaged && ids.iter().all(is_damaged)));
        others.next().map_or(Ok(()), |(_, other)| Err(other.why.clone()))
    }

    /// Refuses to have protected ones among `ids` removed.
    pub fn check_unprotected(&self, ids: &[String]) -> Result<(), Error> {
        match ids.iter().find(|id| self.is_protected(id)) {
            Some(id) => Err(Error::Protected { id: id.clone() }),
            None => Ok(()),
        }
    }

    pub fn is_protected(&self, id: &str) -> bool {
        self.protected.contains(id)
    }

    /// The direct dependents of `ids` that are not among them.
    pub fn dependents(&self, ids: &BTreeSet<String>) -> Vec<String> {
        let depends = |link: &&Link| link.parents.iter().any(|parent| ids.contains(parent));
        let links = self.links.iter().filter(depends).map(|link| &link.id);
        links.filter(|id| !ids.contains(*id)).cloned().collect()
    }

    /// What backups that are not on record depend on, and which of them does.
    pub fn needed_by_unknown(&self) -> impl Iterator<Item = (&str, &str)> {
        let unknown = self.links.iter().filter(|link| self.unknown.contains(&link.id));
        unknown.flat_map(|link| {
            let parents = link.parents.iter();
            parents.map(|parent| (parent.as_str(), link.id.as_str()))
        })
    }
}

impl Backups {
    /// What depends on what in a domain's directory. The store's word counts; the catalog's where the store has nothing that
    /// can be understood.
    pub(super) async fn chains(&self, store: &str, domain: &str) -> Result<Chains, Error> {
        let (path, directory) = (self.path_of(store)?, domain.to_owned());
        let read = move |progress: &Progress| read_domain(&path, &directory, progress);
        let stored = self.blocking(store, read).await?;
        let recorded = self.catalog.links(store.to_owned(), domain.to_owned()).await?;
        let mut links: BTreeMap<String, Link> =
            recorded.into_iter().map(|link| (link.id.clone(), link)).collect();
        let (mut unknown, mut protected) = (BTreeSet::new(), BTreeSet::new());
        let mut obscure = BTreeMap::new();
        for stored in stored {
            let Stored {
                id, path, parents, ..
            } = stored;
            if stored.protected {
                protected.insert(id.clone());
            }
            let parents = match parents {
                Ok(parents) => parents,
                Err(Why::Manifest(why)) => {
                    let is_damaged = why.is_damage();
                    let why = Error::Unreadable { path, why };
                    obscure.insert(id, Obscure { why, is_damaged });
                    continue;
                }
                Err(Why::Store(error)) => {
                    let why = error.into();
                    let is_damaged = false;
                    obscure.insert(id, Obscure { why, is_damaged });
                    continue;
                }
            };
            if let Some(link) = links.get_mut(&id) {
                link.parents = parents;
                continue;
            }
            unknown.insert(id.clone());
            let link = Link {
                id: id.clone(),
                parents,
                own_state: BackupState::Complete,
                broken: String::new(),
            };
            links.insert(id, link);
        }
        Ok(Chains {
            links: links.into_values().collect(),
            unknown,
            protected,
            obscure,
        })
    }
}

/// All directories that have a manifest, or may have one. Blocks.
fn read_domain(store: &Path, domain: &str, progress: &Progress) -> Result<Vec<Stored>, target::Error> {
    let Some(shelf) = Shelf::of_store(store)?.below(domain)? else {
        return Ok(Vec::new());
    };
    let mut stored = Vec::new();
    // What is hidden is not finished, or is just going. Who makes one holds what it depends on.
    for id in shelf.names()?.into_iter().filter(|name| !name.starts_with('.')) {
        let (parents, protected) = match shelf.below(&id) {
            Ok(None) => continue,
            Ok(Some(backup)) => {
                let protected = backup.is_protected()?;
                match backup.read(MANIFEST_NAME, MAX_MANIFEST_BYTES) {
                    // It is no backup any more; the catalog may know what it was.
                    Err(error) if is_absent(&error) && !protected => continue,
                    Err(error) if is_absent(&error) => (Ok(Vec::new()), protected),
                    Err(error) => (Err(Why::Store(error)), protected),
                    Ok((bytes, _)) => (parents(&bytes), protected),
                }
            }
            Err(error) => (Err(Why::Store(error)), false),
        };
        let path = shelf.path().join(&id).join(MANIFEST_NAME).display().to_string();
        progress.add(1);
        stored.push(Stored {
            id,
            path,
            parents,
            protected,
        });
    }
    Ok(stored)
}

fn parents(manifest: &[u8]) -> Result<Vec<String>, Why> {
    let manifest = Manifest::parse(manifest).map_err(Why::Manifest)?;
    Ok(manifest.parents().into_iter().map(str::to_owned).collect())
}
