//! Reads the dependencies between the backups of a domain's directory from the store itself.
//!
//! The catalog may be stale, and others may have written to the store: another host's service, a newer version, a user
//! with `cp`. So the service reads every manifest there before it removes or merges a backup.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::probe::is_absent;
use super::{Backups, Error};
use crate::catalog::{BackupState, Link};
use crate::model::{MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, ManifestError};
use crate::offload::Progress;
use crate::store::{self, Directory};

/// The backups of a domain's directory and their dependencies.
pub(super) struct Chains {
    /// By id.
    pub links: Vec<Link>,
    /// Backups in the store that the catalog does not record.
    unknown: BTreeSet<String>,
    /// Backups that the store marks as protected.
    protected: BTreeSet<String>,
    /// Backups by id whose manifest cannot be read or parsed. Only the catalog may know their bases.
    unreadable: BTreeMap<String, Unreadable>,
}

struct Unreadable {
    why: Error,
    /// The manifest is damaged, so neither a retry nor a newer version can parse it.
    is_damaged: bool,
}

/// One backup's directory as its manifest describes it.
struct Stored {
    id: String,
    /// The manifest's path, for messages.
    path: String,
    parents: Result<Vec<String>, ReadError>,
    protected: bool,
}

/// The reasons why a backup's bases are unknown.
enum ReadError {
    Manifest(ManifestError),
    Store(store::Error),
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
        let (path, directory) = (self.path_of(store)?, domain.to_owned());
        let read = move |progress: &Progress| read_domain(&path, &directory, progress);
        let stored = self.blocking(store, read).await?;
        let recorded = self.catalog.links(store.to_owned(), domain.to_owned()).await?;
        let mut links: BTreeMap<String, Link> =
            recorded.into_iter().map(|link| (link.id.clone(), link)).collect();
        let (mut unknown, mut protected) = (BTreeSet::new(), BTreeSet::new());
        let mut unreadable = BTreeMap::new();
        for stored in stored {
            let Stored {
                id, path, parents, ..
            } = stored;
            if stored.protected {
                protected.insert(id.clone());
            }
            let parents = match parents {
                Ok(parents) => parents,
                Err(ReadError::Manifest(why)) => {
                    let is_damaged = why.is_damage();
                    let why = Error::Unreadable { path, why };
                    unreadable.insert(id, Unreadable { why, is_damaged });
                    continue;
                }
                Err(ReadError::Store(error)) => {
                    let why = error.into();
                    let is_damaged = false;
                    unreadable.insert(id, Unreadable { why, is_damaged });
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

/// Reads every directory that has, or may have, a manifest. Blocks.
fn read_domain(store: &Path, domain: &str, progress: &Progress) -> Result<Vec<Stored>, store::Error> {
    let Some(shelf) = Directory::of_store(store)?.below(domain)? else {
        return Ok(Vec::new());
    };
    let mut stored = Vec::new();
    // Hidden directories are in staging or being removed. A job in staging holds locks on its bases.
    for id in shelf.names()?.into_iter().filter(|name| !name.starts_with('.')) {
        let (parents, protected) = match shelf.below(&id) {
            Ok(None) => continue,
            Ok(Some(backup)) => {
                let protected = backup.is_protected()?;
                match backup.read(MANIFEST_NAME, MAX_MANIFEST_BYTES) {
                    // No longer a backup; only the catalog may know its content.
                    Err(error) if is_absent(&error) && !protected => continue,
                    Err(error) if is_absent(&error) => (Ok(Vec::new()), protected),
                    Err(error) => (Err(ReadError::Store(error)), protected),
                    Ok((bytes, _)) => (parents(&bytes), protected),
                }
            }
            Err(error) => (Err(ReadError::Store(error)), false),
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

fn parents(manifest: &[u8]) -> Result<Vec<String>, ReadError> {
    let manifest = Manifest::parse(manifest).map_err(ReadError::Manifest)?;
    Ok(manifest.parents().into_iter().map(str::to_owned).collect())
}
