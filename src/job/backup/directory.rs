//! Chooses the directory of a domain's backups in a store, and the next sequence number in it.
//!
//! The UUID identifies a domain: it keeps its directory under any name, and does not use the directory of another
//! domain that had its name. The catalog knows the backups of this service. For other backups, the manifests name the
//! domain.

use std::collections::BTreeSet;
use std::path::PathBuf;

use uuid::Uuid;

use crate::catalog::{DirectoryState, DomainRecord, UsedDirectory};
use crate::config::Store;
use crate::domain::{Domain, Identity};
use crate::job::Error;
use crate::job::context::{JobContext, watched};
use crate::job::record::domain_record;
use crate::model::{DomainDir, MAX_SEQUENCE, Manifest};
use crate::offload::Progress;
use crate::store::{self, BackupName};

/// Returns the directory in a store for a domain's next backup, and the backup's sequence number.
pub(in crate::job) async fn choose(
    context: &JobContext,
    domain: &Domain,
    name: &str,
    store: &Store,
) -> Result<(DomainDir, u64), Error> {
    let whose = domain_record(domain.identity());
    let reader = DirectoryReader {
        context,
        name,
        path: store.path.clone(),
    };
    let used = context
        .catalog
        .directories(name.to_owned(), whose.clone())
        .await?;
    if let Some(used) = own_directory(&used, domain, context) {
        let found = reader.at(&used.directory, &whose).await?;
        return Ok((used.directory.clone(), found.next));
    }
    let mut candidates = candidates(domain, &whose, context);
    let last = candidates
        .pop()
        .unwrap_or_else(|| DomainDir::new(domain.unique_name()));
    for directory in candidates {
        let found = reader.at(&directory, &whose).await?;
        if !found.others {
            return Ok((directory, found.next));
        }
    }
    // No other domain uses a directory with the whole UUID. Even if somebody created one, chains and keep rules
    // separate its backups by domain.
    let found = reader.at(&last, &whose).await?;
    Ok((last, found.next))
}

/// Returns the directory that the domain continues to use. That is the one used under its present name. Otherwise it is
/// one of a former name. Such a name does not count if another domain with the same UUID, such as the original of a
/// clone, has it now.
fn own_directory<'a>(
    used: &'a [UsedDirectory],
    domain: &Domain,
    context: &JobContext,
) -> Option<&'a UsedDirectory> {
    if let Some(named) = used.iter().find(|used| used.names.contains(&domain.name)) {
        return Some(named);
    }
    let identity = domain.identity();
    let others: Vec<_> = context
        .domains
        .list()
        .into_iter()
        .filter(|other| other.id != domain.id)
        .collect();
    let is_anothers = |used: &&UsedDirectory| {
        used.names.iter().any(|name| {
            let former = Identity {
                name: name.clone(),
                ..identity.clone()
            };
            let known = context.domains.same(&former);
            known.is_some_and(|known| known.name == *name && others.iter().any(|other| other.id == known.id))
        })
    };
    used.iter().find(|used| !is_anothers(used))
}

/// Returns candidate names for a new directory, the most readable first. The caller checks that no other domain uses
/// them, because another domain's name can contain the suffix.
fn candidates(domain: &Domain, whose: &DomainRecord, context: &JobContext) -> Vec<DomainDir> {
    let name = domain.unique_name();
    let unique = whose.uuid.unwrap_or(context.catalog.service());
    let whole = unique.to_string();
    let short = whole.split('-').next().unwrap_or_default().to_owned();
    vec![
        DomainDir::new(name.clone()),
        DomainDir::new(format!("{name}-{short}")),
        DomainDir::new(format!("{name}-{whole}")),
    ]
}

/// The contents of a directory.
struct Found {
    /// It has backups of other domains.
    others: bool,
    /// The next sequence number.
    next: u64,
}

struct DirectoryReader<'a> {
    context: &'a JobContext,
    name: &'a str,
    path: PathBuf,
}

impl DirectoryReader<'_> {
    async fn at(&self, directory: &DomainDir, whose: &DomainRecord) -> Result<Found, Error> {
        let catalog = &self.context.catalog;
        let state = catalog.directory(self.name.to_owned(), directory.clone()).await?;
        let DirectoryState {
            ids,
            domains,
            highest,
        } = state;
        let (path, below) = (self.path.clone(), directory.clone());
        let read = move |progress: &Progress| unknown(&path, &below, &ids, progress);
        let found = watched(self.context, "the store", read).await?;
        let (key, service) = (whose.key(), catalog.service());
        let is_whose = |backup: &Unrecorded| {
            let identity = Identity::in_directory(directory.as_str(), &backup.name, backup.uuid);
            let same = identity.is_some_and(|identity| domain_record(identity).key() == key);
            // Without a UUID, a domain of another host can have the same name.
            same && (whose.uuid.is_some() || backup.service == Some(service))
        };
        let on_disk = found.iter().map(|backup| backup.sequence).max();
        Ok(Found {
            others: domains.iter().any(|domain| domain.key() != key) || !found.iter().all(is_whose),
            next: (highest.max(on_disk.unwrap_or(0)) + 1).min(MAX_SEQUENCE),
        })
    }
}

/// A backup that the catalog does not record. It has the fields of the manifest that the choice needs, because a
/// directory can have many large manifests.
struct Unrecorded {
    /// The domain's name.
    name: String,
    /// The domain's UUID.
    uuid: Option<Uuid>,
    service: Option<Uuid>,
    sequence: u64,
}

/// Returns the backups that the catalog does not record. Blocks. Ignores unreadable entries: if the store
/// is unusable, publishing the backup fails later with the reason.
fn unknown(
    store: &std::path::Path,
    directory: &DomainDir,
    known: &BTreeSet<String>,
    progress: &Progress,
) -> Vec<Unrecorded> {
    let read = || -> Result<Vec<Unrecorded>, store::Error> {
        let (store, domain) = (store::open(store)?, directory.as_str());
        let mut ids = store.entries(domain)?.backups;
        ids.retain(|id| !known.contains(id));
        let backups = ids.iter().filter_map(|id| {
            progress.add(1);
            let backup = store.open(BackupName { domain, id }).ok().flatten()?;
            let (bytes, _) = backup.read_manifest().ok()?;
            let manifest = Manifest::parse(&bytes)
                .ok()
                .filter(|manifest| manifest.id == *id)?;
            Some(Unrecorded {
                name: manifest.domain.name,
                uuid: manifest.domain.uuid,
                service: manifest.service,
                sequence: manifest.sequence,
            })
        });
        Ok(backups.collect())
    };
    read().unwrap_or_default()
}
