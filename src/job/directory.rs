//! The directory of a domain's backups in a store, and the next number in the order of making there.
//!
//! A domain is its UUID: it keeps the directory with its backups under any name, and does not use the directory of another
//! one that had its name. The catalog knows the backups of this service; for other backups in a directory, the
//! manifests say which domain's they are.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::manager::Setting;
use super::record::domain_record;
use super::{Error, watched};
use crate::catalog::{DirectoryState, DomainRecord, Used};
use crate::config::Store;
use crate::domain::{Domain, Identity};
use crate::model::{DomainDir, MANIFEST_NAME, MAX_MANIFEST_BYTES, MAX_SEQUENCE, Manifest};
use crate::offload::Progress;
use crate::target::{self, Shelf};

/// The directory in a store that a domain's next backup goes to, and its number there.
pub(super) async fn choose(
    setting: &Setting,
    domain: &Domain,
    name: &str,
    store: &Store,
) -> Result<(DomainDir, u64), Error> {
    let whose = domain_record(domain.identity());
    let look = Look {
        setting,
        name,
        path: store.path.clone(),
    };
    let used = setting
        .catalog
        .directories(name.to_owned(), whose.clone())
        .await?;
    if let Some(used) = own_directory(&used, domain, setting) {
        let found = look.at(&used.directory, &whose).await?;
        return Ok((used.directory.clone(), found.next));
    }
    let mut candidates = candidates(domain, &whose, setting);
    let last = candidates
        .pop()
        .unwrap_or_else(|| DomainDir::new(domain.unique_name()));
    for directory in candidates {
        let found = look.at(&directory, &whose).await?;
        if !found.others {
            return Ok((directory, found.next));
        }
    }
    // Nobody else has a directory with the whole UUID. If somebody made one, the backups in it stay apart all the same:
    // chains and rules go by the domain.
    let found = look.at(&last, &whose).await?;
    Ok((last, found.next))
}

/// The directory that the domain goes on in: one that it used under its present name, or one of a former name that no other
/// domain with the same UUID has now, such as the machine of which it is a copy.
fn own_directory<'a>(used: &'a [Used], domain: &Domain, setting: &Setting) -> Option<&'a Used> {
    if let Some(named) = used.iter().find(|used| used.names.contains(&domain.name)) {
        return Some(named);
    }
    let identity = domain.identity();
    let others: Vec<_> = setting
        .domains
        .list()
        .into_iter()
        .filter(|other| other.id != domain.id)
        .collect();
    let is_anothers = |used: &&Used| {
        used.names.iter().any(|name| {
            let former = Identity {
                name: name.clone(),
                ..identity.clone()
            };
            let known = setting.domains.same(&former);
            known.is_some_and(|known| known.name == *name && others.iter().any(|other| other.id == known.id))
        })
    };
    used.iter().find(|used| !is_anothers(used))
}

/// Names for a new directory, the most readable first. Whether another domain has it is looked up: what follows the name
/// can be part of another domain's name.
fn candidates(domain: &Domain, whose: &DomainRecord, setting: &Setting) -> Vec<DomainDir> {
    let name = domain.unique_name();
    let unique = whose.uuid.unwrap_or(setting.catalog.service());
    let whole = unique.to_string();
    let short = whole.split('-').next().unwrap_or_default().to_owned();
    vec![
        DomainDir::new(name.clone()),
        DomainDir::new(format!("{name}-{short}")),
        DomainDir::new(format!("{name}-{whole}")),
    ]
}

/// The entries of a directory.
struct Found {
    /// Backups of other domains.
    others: bool,
    /// The next number in the order of making.
    next: u64,
}

struct Look<'a> {
    setting: &'a Setting,
    name: &'a str,
    path: PathBuf,
}

impl Look<'_> {
    async fn at(&self, directory: &DomainDir, whose: &DomainRecord) -> Result<Found, Error> {
        let catalog = &self.setting.catalog;
        let state = catalog.directory(self.name.to_owned(), directory.clone()).await?;
        let DirectoryState {
            ids,
            domains,
            highest,
        } = state;
        let (path, below) = (self.path.clone(), directory.clone());
        let read = move |progress: &Progress| unknown(&path, &below, &ids, progress);
        let manifests = watched(self.setting, "the store", read).await?;
        let (key, service) = (whose.key(), catalog.service());
        let is_whose = |manifest: &Manifest| {
            let (name, uuid) = (&manifest.domain.name, manifest.domain.uuid);
            let identity = Identity::in_directory(directory.as_str(), name, uuid);
            let same = identity.is_some_and(|identity| domain_record(identity).key() == key);
            // Another host has other domains without a UUID.
            same && (whose.uuid.is_some() || manifest.service == Some(service))
        };
        let on_disk = manifests.iter().map(|manifest| manifest.sequence).max();
        Ok(Found {
            others: domains.iter().any(|domain| domain.key() != key) || !manifests.iter().all(is_whose),
            next: (highest.max(on_disk.unwrap_or(0)) + 1).min(MAX_SEQUENCE),
        })
    }
}

/// The manifests in a directory of the backups that are not on record. Blocks. What cannot be looked at is no reason to
/// refuse a backup here: if nothing can be put there either, that fails and says why.
fn unknown(
    store: &std::path::Path,
    directory: &DomainDir,
    known: &BTreeSet<String>,
    progress: &Progress,
) -> Vec<Manifest> {
    let read = || -> Result<Vec<Manifest>, target::Error> {
        let Some(shelf) = Shelf::of_store(store)?.below(directory.as_str())? else {
            return Ok(Vec::new());
        };
        let mut names = shelf.names()?;
        names.retain(|name| !name.starts_with('.') && !known.contains(name));
        let manifests = names.iter().filter_map(|id| {
            progress.add(1);
            let backup = shelf.below(id).ok().flatten()?;
            let (bytes, _) = backup.read(MANIFEST_NAME, MAX_MANIFEST_BYTES).ok()?;
            Manifest::parse(&bytes).ok().filter(|manifest| manifest.id == *id)
        });
        Ok(manifests.collect())
    };
    read().unwrap_or_default()
}
