//! Removes the bitmaps that no later backup will start from.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::checkpoint::{self, Owner};
use crate::domain::{CheckpointPolicy, Disk, Domain, Link, OnConnect, Snapshot};
use crate::job::context::JobContext;
use crate::job::qemu::QemuObjects;
use crate::job::record::domain_record;
use crate::job::{Error, Job, Jobs};
use crate::plan::Destination;
use crate::qmp::block::{BlockDirtyBitmap, Transaction, TransactionAction};

impl QemuObjects {
    /// Removes checkpoints that no later backup will use as a base. These are checkpoints of failed or removed backups,
    /// and those beyond the number that their store keeps. Inconsistent ones are removed too, because they also prevent
    /// resizing of the disk, except those of checkpoints without a backup.
    ///
    /// `kept` is the last known state of the disks. It is queried again if it comes from another QEMU, or if it shows a
    /// node of this job in place of a disk.
    pub async fn prune_checkpoints(
        &self,
        kept: Option<(Arc<Link>, Vec<Disk>)>,
        context: &JobContext,
    ) -> Result<(), Error> {
        let link = self.link();
        match kept {
            Some((of, disks))
                if Arc::ptr_eq(&of, &link) && !disks.iter().any(|disk| self.names.own(&disk.node)) =>
            {
                prune_bitmaps_of(&link, &self.domain, &disks, context).await
            }
            _ => prune_bitmaps(&link, &self.domain, context).await,
        }
    }
}

/// See [`QemuObjects::prune_checkpoints`]. The caller makes sure that nothing else changes the domain's checkpoints at
/// the same time.
pub async fn prune_bitmaps(link: &Link, domain: &Domain, context: &JobContext) -> Result<(), Error> {
    let disks = link.disks().await.map_err(Error::Lost)?;
    prune_bitmaps_of(link, domain, &disks, context).await
}

impl OnConnect for Jobs {
    /// Removes useless checkpoints, and those that prevent resizing or reverting the disks, when a QEMU connects: the
    /// domain's next backup may be far away. If a job works on the domain, the job does this at its end.
    fn connected<'a>(
        &'a self,
        domain: &'a Domain,
        link: &'a Link,
        snapshot: &'a Snapshot,
    ) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            // During an incoming migration, the source QEMU still owns the disks.
            if self.is_busy(domain) || snapshot.migration.is_some() {
                return;
            }
            let settled = prune_bitmaps_of(link, domain, &snapshot.disks, &self.context);
            if let Err(error) = settled.await {
                tracing::warn!(
                    domain = domain.name,
                    %error,
                    "cannot remove useless checkpoints; the next backup tries again"
                );
            }
        })
    }
}

async fn prune_bitmaps_of(
    link: &Link,
    domain: &Domain,
    disks: &[Disk],
    context: &JobContext,
) -> Result<(), Error> {
    let ids: BTreeSet<&str> = disks
        .iter()
        .flat_map(checkpoint::bitmaps)
        .map(|(id, _)| id)
        .collect();
    let ids: Vec<String> = ids.into_iter().map(str::to_owned).collect();
    if ids.is_empty()
        && disks
            .iter()
            .all(|disk| checkpoint::orphans(disk).next().is_none())
    {
        return Ok(());
    }
    let key = domain_record(domain.identity()).key();
    let owners = context.catalog.bitmap_owners(key, ids.clone()).await?;
    let owners: BTreeMap<&str, Owner> = ids.iter().map(String::as_str).zip(owners).collect();
    for disk in disks {
        let clear_backups = disk.has_snapshots && domain.checkpoints == CheckpointPolicy::Auto;
        for name in checkpoint::useless(disk, clear_backups, &owners, &context.stores) {
            match link.client.execute(Transaction::of(removal(disk, name))).await {
                // A block job of another client reads the bitmap, or the bitmap is gone already.
                Err(error) if error.is_refusal() => {
                    tracing::info!(disk = disk.name, %error, "cannot remove a checkpoint yet");
                }
                result => drop(result.map_err(Error::Lost)?),
            }
        }
    }
    Ok(())
}

/// Returns the actions that remove a checkpoint's bitmap and its sentinel from a disk, as far as they exist. The caller
/// puts them into one transaction.
pub fn removal(disk: &Disk, bitmap: &str) -> Vec<TransactionAction> {
    let remove = |name: String| {
        TransactionAction::BlockDirtyBitmapRemove(BlockDirtyBitmap {
            node: disk.node.clone(),
            name,
        })
    };
    checkpoint::with_sentinel(disk, bitmap).map(remove).collect()
}

impl Job {
    /// Returns whether the end of the job can make checkpoints useless.
    pub(in crate::job) fn has_checkpoints(&self) -> bool {
        self.plan()
            .is_some_and(|plan| matches!(plan.destination, Destination::Store { .. }))
    }
}
