//! Lists, creates and deletes the checkpoints of a domain.
//!
//! The bitmaps on the disks are authoritative; the catalog only adds their names and times. The catalog records a new
//! checkpoint as pending before QEMU creates its bitmaps. If the service ends in between, the next clean-up of the
//! domain's checkpoints removes them.

use std::sync::Arc;

use super::prune::{prune_bitmaps, removal};
use crate::catalog::NewCheckpoint;
use crate::checkpoint::{self, Checkpoint, CheckpointRecord};
use crate::clock;
use crate::definition::CheckpointDefinition;
use crate::domain::{Disk, Domain, Link};
use crate::error;
use crate::job::context::JobContext;
use crate::job::record::domain_record;
use crate::job::{Error, Jobs, Reservation};
use crate::qmp::Done;
use crate::qmp::block::{BlockDirtyBitmapAdd, Transaction, TransactionAction};

/// The maximum number of checkpoints without a backup that a domain can have.
const MAX_WITHOUT_BACKUP: u32 = 64;

impl Jobs {
    /// Returns the checkpoints of a domain with these disks, the oldest first.
    pub async fn checkpoints(&self, domain: &Domain, disks: &[Disk]) -> Result<Vec<Checkpoint>, Error> {
        let found = checkpoint::on_disks(disks);
        let ids: Vec<String> = found.keys().map(|id| (*id).to_owned()).collect();
        let catalog = &self.context.catalog;
        let key = domain_record(domain.identity()).key();
        let owners = catalog.bitmap_owners(key.clone(), ids).await?;
        Ok(checkpoint::list(found, owners, catalog.checkpoints(key).await?))
    }

    /// Creates a checkpoint without a backup, and returns its name. Atomic, even if the caller disconnects.
    pub async fn create_checkpoint(
        self: &Arc<Self>,
        reservation: Reservation,
        domain: Arc<Domain>,
        definition: CheckpointDefinition,
    ) -> error::Result<String> {
        let jobs = self.clone();
        self.to_the_end(async move {
            let _reservation = reservation;
            jobs.create(&domain, definition).await
        })
        .await
    }

    /// Deletes a checkpoint from the domain's disks. Its backup, if it has one, remains.
    pub async fn delete_checkpoint(
        self: &Arc<Self>,
        reservation: Reservation,
        domain: Arc<Domain>,
        name: String,
    ) -> error::Result<()> {
        let jobs = self.clone();
        self.to_the_end(async move {
            let _reservation = reservation;
            jobs.delete(&domain, &name).await
        })
        .await
    }

    /// Removes all bitmaps with names of this kind from the domain's disks, even if another backupd created them.
    /// Backups remain.
    pub async fn delete_checkpoints(
        self: &Arc<Self>,
        reservation: Reservation,
        domain: Arc<Domain>,
    ) -> error::Result<()> {
        let jobs = self.clone();
        self.to_the_end(async move {
            let _reservation = reservation;
            jobs.delete_all(&domain).await
        })
        .await
    }

    /// Completes `work` even if the caller disconnects or the service stops.
    async fn to_the_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = error::Result<T>> + Send + 'static,
    ) -> error::Result<T> {
        let done = self.tasks.spawn(work).await;
        done.map_err(|error| error::Error::new(error::Kind::Internal, error.to_string()))?
    }

    async fn create(&self, domain: &Domain, definition: CheckpointDefinition) -> error::Result<String> {
        let link = domain.link().await?;
        let snapshot = domain.refresh().await?;
        if let Some(migration) = snapshot.migration {
            return Err(Error::Migration(migration).into());
        }
        let existing = self.checkpoints(domain, &snapshot.disks).await?;
        let disks = checkpoint::select(&definition, &snapshot.disks, &existing)?;
        let now = clock::now();
        let record = CheckpointRecord {
            id: Self::new_backup_id(now),
            name: definition.name,
            description: definition.description,
            time: now,
        };
        let (id, whose) = (record.id.clone(), domain_record(domain.identity()));
        let key = whose.key();
        let name = record.name.clone().unwrap_or_else(|| id.clone());
        let catalog = &self.context.catalog;
        let begun = catalog.begin_checkpoint(whose, record, MAX_WITHOUT_BACKUP);
        let too_many = |of, most| Err(Error::TooManyCheckpoints { of, most }.into());
        match begun.await.map_err(Error::from)? {
            NewCheckpoint::Recorded => {}
            NewCheckpoint::DomainLimit { most } => return too_many("the domain has", most),
            NewCheckpoint::OwnerLimit { most } => return too_many("the domains of its owner have", most),
        }
        let add = disks.iter().enumerate().map(|(index, disk)| {
            TransactionAction::BlockDirtyBitmapAdd(BlockDirtyBitmapAdd {
                node: disk.node.clone(),
                name: checkpoint::bitmap_name(&id, index),
                granularity: None,
                persistent: Some(true),
                disabled: None,
            })
        });
        let made = transaction(&link, add.collect(), &self.context).await;
        let recorded = match &made {
            Ok(()) => catalog.checkpoint_made(key, id, clock::now()).await,
            // Unless QEMU refused the transaction, the bitmaps may exist. `tidy` removes those of a
            // checkpoint that is recorded as deleted.
            Err(_) => catalog.checkpoint_deleted(key, id).await,
        };
        let result = made.and(recorded.map_err(Error::from));
        tidy(&link, domain, &self.context).await;
        result?;
        tracing::info!(domain = domain.name, name, "checkpoint created");
        Ok(name)
    }

    async fn delete(&self, domain: &Domain, name: &str) -> error::Result<()> {
        let link = domain.link().await?;
        let disks = domain.refresh().await?.disks;
        let checkpoints = self.checkpoints(domain, &disks).await?;
        let (found, _) = checkpoint::find(&checkpoints, name)?;
        let bitmaps = found.disks.iter().filter_map(|record| {
            let disk = disks.iter().find(|disk| disk.name == record.disk)?;
            Some(removal(disk, &record.bitmap))
        });
        let remove: Vec<TransactionAction> = bitmaps.flatten().collect();
        if !remove.is_empty() {
            transaction(&link, remove, &self.context).await?;
        }
        let (key, id) = (domain_record(domain.identity()).key(), found.id.clone());
        let forgotten = self.context.catalog.checkpoint_deleted(key, id).await;
        forgotten.map_err(Error::from)?;
        tidy(&link, domain, &self.context).await;
        tracing::info!(domain = domain.name, name = found.name, "checkpoint deleted");
        Ok(())
    }
}

impl Jobs {
    async fn delete_all(&self, domain: &Domain) -> error::Result<()> {
        let link = domain.link().await?;
        let disks = domain.refresh().await?.disks;
        let remove: Vec<TransactionAction> = disks
            .iter()
            .flat_map(|disk| checkpoint::all_bitmaps(disk).flat_map(|name| removal(disk, name)))
            .collect();
        let count = remove.len();
        if !remove.is_empty() {
            transaction(&link, remove, &self.context).await?;
        }
        let (catalog, key) = (&self.context.catalog, domain_record(domain.identity()).key());
        for record in catalog.checkpoints(key.clone()).await.map_err(Error::from)? {
            let forgotten = catalog.checkpoint_deleted(key.clone(), record.id).await;
            forgotten.map_err(Error::from)?;
        }
        tracing::info!(domain = domain.name, bitmaps = count, "all checkpoints deleted");
        Ok(())
    }
}

/// Runs all actions atomically, and on all disks at the same point in time.
async fn transaction(
    link: &Link,
    actions: Vec<TransactionAction>,
    context: &JobContext,
) -> Result<(), Error> {
    let patience = context.deadlines.stall();
    let done = link.client.execute(Transaction::of(actions));
    match tokio::time::timeout(patience, done).await {
        Ok(Ok(Done)) => Ok(()),
        Ok(Err(error)) => Err(Error::Bitmaps(error)),
        Err(_) => Err(Error::NoAnswer {
            seconds: patience.as_secs(),
        }),
    }
}

/// Removes useless bitmaps. If this fails, the next backup removes them.
async fn tidy(link: &Link, domain: &Domain, context: &JobContext) {
    let settled = tokio::time::timeout(context.deadlines.stall(), prune_bitmaps(link, domain, context));
    let why = match settled.await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "QEMU does not answer".to_owned(),
    };
    tracing::warn!(
        domain = domain.name,
        why,
        "cannot remove useless checkpoints; the next backup tries again"
    );
}
