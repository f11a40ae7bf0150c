//! The dependencies between the backups of a domain's directory, from the store and the catalog.

use std::collections::{BTreeMap, BTreeSet};

use super::{Backups, Error};
use crate::catalog::{BackupState, Link};
use crate::offload::Progress;
use crate::store::{self, Dependencies, Store, Unreadable};

/// The backups of a domain's directory and their dependencies.
pub(super) struct Chains {
    /// By id.
    pub links: Vec<Link>,
    /// Backups in the store that the catalog does not record.
    unknown: BTreeSet<String>,
    /// Backups that the store marks as protected.
    protected: BTreeSet<String>,
    /// Backups by id whose manifest cannot be read or parsed. Only the catalog may know their bases.
    unreadable: BTreeMap<String, UnknownBases>,
}

struct UnknownBases {
    why: Error,
    /// The manifest is damaged, so neither a retry nor a newer version can parse it.
    is_damaged: bool,
}

impl Chains {
    /// Fails if one of `ids` is not in the catalog, because the service does not know the files of such a backup.
    /// `first` is the request.
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

    /// Fails if a manifest other than those of `ids` cannot be read or parsed.
    pub fn check_understood(&self, ids: &BTreeSet<String>) -> Result<(), Error> {
        let mut others = self.unreadable.iter().filter(|(id, _)| !ids.contains(*id));
        others.next().map_or(Ok(()), |(_, other)| Err(other.why.clone()))
    }

    /// As [`Self::check_understood`], for the removal of `ids`. If all of `ids` are damaged, other damaged backups do
    /// not count, because two of them would block each other forever. They do count for a good backup, because a
    /// damaged one may depend on it.
    pub fn check_removable(&self, ids: &BTreeSet<String>) -> Result<(), Error> {
        let is_damaged = |id: &String| self.unreadable.get(id).is_some_and(|entry| entry.is_damaged);
        let others = self.unreadable.iter().filter(|(id, _)| !ids.contains(*id));
        let mut others = others.filter(|(_, other)| !(other.is_damaged && ids.iter().all(is_damaged)));
        others.next().map_or(Ok(()), |(_, other)| Err(other.why.clone()))
    }

    /// Fails if one of `ids` is protected.
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

    /// Bases of backups that the catalog does not record: pairs of base and dependent.
    pub fn needed_by_unknown(&self) -> impl Iterator<Item = (&str, &str)> {
        let unknown = self.links.iter().filter(|link| self.unknown.contains(&link.id));
        unknown.flat_map(|link| {
            let parents = link.parents.iter();
            parents.map(|parent| (parent.as_str(), link.id.as_str()))
        })
    }
}

impl Backups {
    /// Returns the dependencies in a domain's directory. The store's manifests take precedence; the catalog supplements
    /// those that cannot be parsed.
    pub(super) async fn chains(&self, store: &str, domain: &str) -> Result<Chains, Error> {
        let directory = domain.to_owned();
        let read =
            move |store: &dyn Store, progress: &Progress| store::dependencies(store, &directory, progress);
        let found = self.in_store(store, read).await?;
        let recorded = self.catalog.links(store.to_owned(), domain.to_owned()).await?;
        let mut links: BTreeMap<String, Link> =
            recorded.into_iter().map(|link| (link.id.clone(), link)).collect();
        let (mut unknown, mut protected) = (BTreeSet::new(), BTreeSet::new());
        let mut unreadable = BTreeMap::new();
        for Dependencies {
            id,
            manifest,
            bases,
            protected: is_protected,
        } in found
        {
            if is_protected {
                protected.insert(id.clone());
            }
            let parents = match bases {
                Ok(bases) => bases,
                Err(Unreadable::Manifest(why)) => {
                    let is_damaged = why.is_damage();
                    let why = Error::Unreadable { path: manifest, why };
                    unreadable.insert(id, UnknownBases { why, is_damaged });
                    continue;
                }
                Err(Unreadable::Store(error)) => {
                    let why = error.into();
                    let is_damaged = false;
                    unreadable.insert(id, UnknownBases { why, is_damaged });
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
            unreadable,
        })
    }
}
