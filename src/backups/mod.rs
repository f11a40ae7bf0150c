//! The backups that are there: found, and looked at whether they still are.
//!
//! The catalog remembers them; their stores have them. Knows catalog, stores and which domain is whose; not who may see what,
//! nor how callers hear of it.

mod chains;
mod error;
mod look;
mod merge;
mod prune;
mod remove;
mod store;

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
use crate::target;

pub use error::Error;
pub use look::PATIENCE;
pub use prune::{Allowed, Group, Pruned, Verdict};
pub use remove::{Removed, Unwanted};
pub use store::{Inventory, Stored, read_store};

/// Backups that are read, and looked at, at a time.
const BATCH: u32 = 100;
/// The most that an id's beginning can stand for before it says nothing.
const MOST_NAMED: u32 = 1000;

/// Looks at the same backups: after the first, their store may have been read again.
const LOOKS: usize = 2;

/// Who works in a store.
#[derive(Default)]
struct Place {
    /// One removal at a time.
    removal: tokio::sync::Mutex<()>,
    /// For all that waits for the storage, beside a look.
    queue: Queue,
}

/// Changes that a listener may lag behind.
const CHANGES: usize = 1024;

/// What happened to the backups.
#[derive(Debug, Clone)]
pub enum Change {
    /// It was removed; its checkpoints and other data for future dependents are useless now.
    Removed(Box<Backup>),
}

/// All backups of the service.
pub struct Backups {
    domains: Arc<Registry>,
    catalog: Catalog,
    /// Knows whether the catalog is of the stores' generation.
    jobs: Arc<Jobs>,
    stores: BTreeMap<String, Store>,
    /// A look that hangs with its storage is not left alone.
    activity: Activity,
    /// Stores that are being looked at: one that hangs keeps one thread.
    looking: Arc<Mutex<BTreeSet<String>>>,
    deadlines: Deadlines,
    /// By store.
    places: BTreeMap<String, Place>,
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
            looking: Arc::default(),
            deadlines: config.deadlines,
            places: config
                .stores
                .keys()
                .map(|name| (name.clone(), Place::default()))
                .collect(),
            changes: broadcast::Sender::new(CHANGES),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    /// The domain that a backup is of, or what stands for it.
    pub fn domain(&self, record: &DomainRecord) -> Arc<Domain> {
        self.domains.same_or_absent(identity(record))
    }

    /// Whether a backup is one of the domain that the user means by that name, or UUID, now. Of a name that no domain has now:
    /// the ones that had it. Those of what another user has registered are meant only by `UID:NAME`.
    fn is_of(&self, record: &DomainRecord, wanted: &str, uid: u32) -> bool {
        let identity = identity(record);
        let uuid: Option<uuid::Uuid> = wanted.parse().ok();
        let called = |domain: Arc<Domain>| domain.identity().is_called(wanted, uid);
        uuid.is_some() && uuid == identity.uuid && identity.is_trusted_by(uid)
            || self.domains.same(&identity).is_some_and(called)
            || identity.is_called(wanted, uid) && !self.domains.has_name_of(&identity)
    }

    /// With the UUIDs of the domains that have the name now, and the name as the records have it.
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

/// A name by which that user means the domain of a backup.
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
        // Nobody here ever wrote that: it is nobody's.
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
    /// The next backups after `after`, looked at unless that takes longer than until `deadline`; none if that was all.
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
            for _ in 0..LOOKS {
                if !self.look(&found, deadline).await? {
                    break;
                }
                found = read(after.clone()).await?;
                found.retain(|backup| self.is_wanted(filter, &backup.domain));
            }
            return Ok(found);
        }
    }

    /// The backup of that object, looked at unless that takes longer than until `deadline`.
    pub async fn get(&self, object: u64, deadline: Instant) -> Result<Option<Backup>, catalog::Error> {
        let mut found = self.catalog.backup(object).await?;
        for _ in 0..LOOKS {
            if !self.look(found.as_slice(), deadline).await? {
                break;
            }
            found = self.catalog.backup(object).await?;
        }
        Ok(found)
    }

    /// The backups whose ids begin like that, where they lie, their objects, and whose they are.
    pub async fn named(&self, prefix: &str) -> Result<Vec<(BackupKey, u64, DomainRecord)>, catalog::Error> {
        self.catalog.backups_named(prefix.to_owned(), MOST_NAMED).await
    }

    /// Makes sure that a store is the one that was used before, and not what else has its path while it isn't mounted.
    pub(super) async fn check_mark(&self, name: &str) -> Result<(), Error> {
        let store = self.store(name).ok_or_else(|| Error::NoStore(name.to_owned()))?;
        let Some(known) = self.known_mark(name).await? else {
            return Ok(());
        };
        let path = store.path.clone();
        self.blocking(name, move |_| target::check_mark(&path, &known))
            .await
    }

    /// The mark of the store that was used before, if one was.
    pub async fn known_mark(&self, name: &str) -> Result<Option<String>, Error> {
        Ok(self.catalog.store_mark(name.to_owned()).await?)
    }

    /// Makes sure that what is on record of a store is what the store has.
    async fn settle_store(&self, store: &str) -> Result<(), Error> {
        self.check_mark(store).await?;
        match self.jobs.settle_store(store).await {
            Ok(_) => Ok(()),
            Err(job::Error::Target(error)) => Err(error.into()),
            Err(error) => Err(Error::Unsettled {
                store: store.to_owned(),
                source: Box::new(error.into()),
            }),
        }
    }

    /// The store of that name in the configuration.
    pub fn store(&self, name: &str) -> Option<&Store> {
        self.stores.get(name)
    }

    /// What comes and goes from now on.
    pub fn changes(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }

    /// Ends what can be left, and waits for the rest.
    pub async fn shut_down(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn tell_removed(&self, backup: Backup) {
        // Nobody listens yet, at the start.
        let _ = self.changes.send(Change::Removed(Box::new(backup)));
    }

    fn begin_look(&self, store: &str) -> Option<Looking> {
        let mut looking = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        looking.insert(store.to_owned()).then(|| Looking {
            store: store.to_owned(),
            looking: self.looking.clone(),
            _needed: self.activity.begin(),
        })
    }
}

/// The turn to look at a store, given back when it is dropped.
struct Looking {
    store: String,
    looking: Arc<Mutex<BTreeSet<String>>>,
    _needed: crate::activity::Use,
}

impl Drop for Looking {
    fn drop(&mut self) {
        let mut looking = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        looking.remove(&self.store);
    }
}
