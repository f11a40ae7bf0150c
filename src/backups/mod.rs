//! Stored backups: lists them and checks that they still exist.
//!
//! The catalog records them, their stores hold them. Knows the catalog, the stores and the owners of domains. Must not
//! know permissions or D-Bus.

mod chains;
mod error;
mod inventory;
mod merge;
mod probe;
mod prune;
mod remove;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::broadcast;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::activity::Activity;
use crate::catalog::{self, Backup, BackupFilter, BackupKey, Catalog, Cursor, DomainRecord};
use crate::config::{Config, Deadlines, Store};
use crate::domain::{Domain, Identity, NOBODY, Origin, Registry, registered};
use crate::job::{self, Jobs};
use crate::offload::Queue;

pub use error::Error;
pub use inventory::{Inventory, Stored, read_store};
pub use probe::PATIENCE;
pub use prune::{Allowed, Group, Pruned, Verdict};
pub use remove::{Removed, Unwanted};

/// The number of backups that are read and checked at a time.
const BATCH: u32 = 100;
/// The highest number of matches for the beginning of an id. More matches than this are cut off.
const MOST_NAMED: u32 = 1000;

/// How often the same backups are checked: the first check may cause the store to be read again.
const PROBES: usize = 2;

/// Serialises work in one store.
#[derive(Default)]
struct StoreLocks {
    /// One removal at a time.
    removal: tokio::sync::Mutex<()>,
    /// Queues all blocking work in the store, except checks.
    queue: Queue,
}

/// The number of changes that a slow listener may lag behind.
const CHANGES: usize = 1024;

/// A change of the stored backups.
#[derive(Debug, Clone)]
pub enum Change {
    /// The backup was removed, so its checkpoints and other data for future dependents are useless.
    Removed(Box<Backup>),
}

/// All backups of the service.
pub struct Backups {
    domains: Arc<Registry>,
    catalog: Catalog,
    /// Knows the stores' generations and whether the catalog matches them.
    jobs: Arc<Jobs>,
    stores: BTreeMap<String, Store>,
    /// Keeps the service running while a check hangs with its storage.
    activity: Activity,
    /// Stores that are being checked. A store that hangs blocks only one thread.
    probing: Arc<Mutex<BTreeSet<String>>>,
    deadlines: Deadlines,
    /// By name of the store.
    store_locks: BTreeMap<String, StoreLocks>,
    changes: broadcast::Sender<Change>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Backups {
    pub fn new(
        domains: Arc<Registry>,
        catalog: Catalog,
        jobs: Arc<Jobs>,
        config: &Config,
        activity: Activity,
    ) -> Self {
        Self {
            domains,
            catalog,
            jobs,
            stores: config.stores.clone(),
            activity,
            probing: Arc::default(),
            deadlines: config.deadlines,
            store_locks: config
                .stores
                .keys()
                .map(|name| (name.clone(), StoreLocks::default()))
                .collect(),
            changes: broadcast::Sender::new(CHANGES),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    /// Returns the domain of a backup, or a placeholder if the service no longer knows it.
    pub fn domain(&self, record: &DomainRecord) -> Arc<Domain> {
        self.domains.same_or_absent(identity(record))
    }

    /// Returns true if a backup belongs to the domain that the user means by this name or UUID. If no domain has the
    /// name now, it means the domains that had it. Domains that another user registered match only `UID:NAME`.
    fn is_of(&self, record: &DomainRecord, wanted: &str, uid: u32) -> bool {
        let identity = identity(record);
        let uuid: Option<uuid::Uuid> = wanted.parse().ok();
        let called = |domain: Arc<Domain>| domain.identity().is_called(wanted, uid);
        uuid.is_some() && uuid == identity.uuid && identity.is_trusted_by(uid)
            || self.domains.same(&identity).is_some_and(called)
            || identity.is_called(wanted, uid) && !self.domains.has_name_of(&identity)
    }

    /// Adds the UUIDs of the domains that have the name now, and replaces the name by the recorded form.
    fn with_uuids(&self, filter: &BackupFilter) -> BackupFilter {
        let Some(wanted) = &filter.domain else {
            return filter.clone();
        };
        let domains = self.domains.list().into_iter();
        let named = domains.filter(|domain| domain.identity().is_called(wanted, filter.uid));
        BackupFilter {
            uuids: named.filter_map(|domain| domain.snapshot().uuid).collect(),
            domain: Some(
                registered(wanted)
                    .map_or(wanted.as_str(), |(_, name)| name)
                    .to_owned(),
            ),
            ..filter.clone()
        }
    }

    fn is_wanted(&self, filter: &BackupFilter, record: &DomainRecord) -> bool {
        let wanted = filter.domain.as_deref();
        wanted.is_none_or(|wanted| self.is_of(record, wanted, filter.uid))
    }
}

/// Returns the name by which this user addresses the domain of a backup.
pub fn domain_name(backup: &Backup, uid: u32) -> String {
    let identity = Identity {
        name: backup.manifest.domain.name.clone(),
        ..identity(&backup.domain)
    };
    identity.name_for(uid)
}

fn identity(record: &DomainRecord) -> Identity {
    let DomainRecord {
        name,
        source,
        owner,
        owner_name,
        uuid,
    } = record.clone();
    match Origin::parse(&source) {
        Some(origin) => Identity {
            name,
            origin,
            owner,
            owner_name,
            uuid,
        },
        // The service never wrote such a source, so the backup belongs to no user.
        None => Identity {
            name,
            origin: Origin::Registered,
            owner: NOBODY,
            owner_name: NOBODY.to_string(),
            uuid,
        },
    }
}

impl Backups {
    /// Returns the next backups after `after`; empty at the end. Checks them unless that takes longer than until
    /// `deadline`.
    pub async fn after(
        &self,
        filter: &BackupFilter,
        after: &Cursor,
        deadline: Instant,
    ) -> Result<Vec<Backup>, catalog::Error> {
        let catalog_filter = self.with_uuids(filter);
        let read = |after: Cursor| self.catalog.backups_after(catalog_filter.clone(), after, BATCH);
        let mut after = after.clone();
        loop {
            let mut found = read(after.clone()).await?;
            let Some(last) = found.last().map(Backup::cursor) else {
                return Ok(found);
            };
            found.retain(|backup| self.is_wanted(filter, &backup.domain));
            if found.is_empty() {
                after = last;
                continue;
            }
            for _ in 0..PROBES {
                if !self.probe(&found, deadline).await? {
                    break;
                }
                found = read(after.clone()).await?;
                found.retain(|backup| self.is_wanted(filter, &backup.domain));
            }
            return Ok(found);
        }
    }

    /// Returns the backup with this object number. Checks it unless that takes longer than until `deadline`.
    pub async fn get(&self, object: u64, deadline: Instant) -> Result<Option<Backup>, catalog::Error> {
        let mut found = self.catalog.backup(object).await?;
        for _ in 0..PROBES {
            if !self.probe(found.as_slice(), deadline).await? {
                break;
            }
            found = self.catalog.backup(object).await?;
        }
        Ok(found)
    }

    /// Returns the backups whose ids begin with `prefix`: their keys, object numbers and domains.
    pub async fn named(&self, prefix: &str) -> Result<Vec<(BackupKey, u64, DomainRecord)>, catalog::Error> {
        self.catalog.backups_named(prefix.to_owned(), MOST_NAMED).await
    }

    /// Checks that a store is the one used before. While a file system is not mounted, another directory has its path.
    pub(super) async fn check_mark(&self, name: &str) -> Result<(), Error> {
        let Some(known) = self.known_mark(name).await? else {
            return Ok(());
        };
        self.in_store(name, move |store, _| store.check_mark(&known))
            .await
    }

    /// Returns the mark of the store if it was used before.
    pub async fn known_mark(&self, name: &str) -> Result<Option<String>, Error> {
        Ok(self.catalog.store_mark(name.to_owned()).await?)
    }

    /// Makes the catalog's records of a store equal to the store's content.
    async fn settle_store(&self, store: &str) -> Result<(), Error> {
        self.check_mark(store).await?;
        match self.jobs.settle_store(store).await {
            Ok(_) => Ok(()),
            Err(job::Error::Store(error)) => Err(error.into()),
            Err(error) => Err(Error::Unsettled {
                store: store.to_owned(),
                source: Box::new(error.into()),
            }),
        }
    }

    /// Returns the configured store of that name.
    pub fn store(&self, name: &str) -> Option<&Store> {
        self.stores.get(name)
    }

    /// Subscribes to changes of the backups.
    pub fn changes(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }

    /// Cancels work that can be cancelled, and waits for the rest.
    pub async fn shut_down(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn notify_removed(&self, backup: Backup) {
        // While the service starts, there is no listener yet.
        let _ = self.changes.send(Change::Removed(Box::new(backup)));
    }

    fn begin_probe(&self, store: &str) -> Option<ProbeSlot> {
        let mut probing = self.probing.lock().unwrap_or_else(PoisonError::into_inner);
        probing.insert(store.to_owned()).then(|| ProbeSlot {
            store: store.to_owned(),
            probing: self.probing.clone(),
            _needed: self.activity.begin(),
        })
    }
}

/// The exclusive right to check a store, until it is dropped.
struct ProbeSlot {
    store: String,
    probing: Arc<Mutex<BTreeSet<String>>>,
    _needed: crate::activity::Use,
}

impl Drop for ProbeSlot {
    fn drop(&mut self) {
        let mut probing = self.probing.lock().unwrap_or_else(PoisonError::into_inner);
        probing.remove(&self.store);
    }
}
