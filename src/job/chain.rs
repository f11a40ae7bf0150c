//! The bases that earlier backups provide: their images in the store, and the checkpoints on the domain's disks.
//!
//! A checkpoint is a persistent dirty bitmap that records writes since a backup's point in time. Its name contains the
//! backup's id, so its status follows from the catalog: pending until the backup is recorded, usable afterwards. A
//! checkpoint without a backup has an id of the same form. Bitmaps with other names belong to other programs and stay
//! untouched.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::BoxFuture;
use jiff::Timestamp;

use super::manager::JobContext;
use super::objects::QemuObjects;
use super::record::domain_record;
use super::watched;
use super::{Error, Job, Jobs, sentinel};
use crate::catalog::{Key, Standing, Stored, There};
use crate::config::Store;
use crate::domain::{CheckpointPolicy, Disk, Domain, Greeter, Link, Snapshot};
use crate::model::{self, DomainDir, Manifest, is_backup_id};
use crate::offload::Progress;
use crate::plan::{Destination, DiskPlan, Earlier, EarlierDisk, checkpoint_of_sentinel, sentinel_name};
use crate::qmp;
use crate::qmp::block::{BlockDirtyBitmap, Transaction, TransactionAction};
use crate::targets::Shelf;

/// The number of newest backups that are considered as bases. A backup that would need an older base is full.
const MAX_CANDIDATES: u32 = 256;
/// How many checkpoints of unknown origin stay on each disk, for the service that created them.
const MAX_UNKNOWN: usize = 16;

/// Returns the name of the bitmap that records a disk's writes since the backup's point in time. `disk` is the disk's
/// index in the backup's plan.
pub(super) fn checkpoint_name(backup_id: &str, disk: usize) -> String {
    format!("backupd-{backup_id}-{disk}")
}

/// Returns the id of the backup at whose point in time the bitmap was created.
fn backup_of(checkpoint: &str) -> Option<&str> {
    let (id, disk) = checkpoint.strip_prefix("backupd-")?.rsplit_once('-')?;
    let number = !disk.is_empty() && disk.bytes().all(|byte| byte.is_ascii_digit());
    (number && is_backup_id(id)).then_some(id)
}

/// Returns the backups of a domain in a directory of a store, the newest first, with their usability as bases.
pub(super) async fn earlier(
    context: &JobContext,
    (store, path): (&str, PathBuf),
    directory: &DomainDir,
    domain: &Domain,
) -> Result<Vec<Earlier>, Error> {
    let whose = domain_record(domain.identity());
    let (store, directory) = (store.to_owned(), directory.clone());
    let records = context
        .catalog
        .newest_backups(store, directory.clone(), whose, MAX_CANDIDATES)
        .await?;
    if records.is_empty() {
        return Ok(Vec::new());
    }
    let key = context.catalog.key().clone();
    let look = move |progress: &Progress| look(&path, &directory, &records, &key, progress);
    watched(context, "the store", look).await
}

fn look(
    store: &Path,
    directory: &DomainDir,
    stored: &[Stored],
    key: &Key,
    progress: &Progress,
) -> Vec<Earlier> {
    // After a failure no image counts as usable, so the backup is full. If the store is not usable at all, the backup
    // fails later with the store's error.
    let shelf = Shelf::of_store(store).and_then(|store| store.below(directory.as_str()));
    let shelf = shelf.ok().flatten();
    let parsed = stored.iter().filter_map(|stored| {
        let manifest = Manifest::parse(stored.manifest.as_bytes()).ok()?;
        Some((manifest, stored.damaged))
    });
    let mut manifests: Vec<(Manifest, bool)> = parsed.collect();
    manifests.sort_by(|(a, _), (b, _)| (a.sequence, a.instant, &a.id).cmp(&(b.sequence, b.instant, &b.id)));
    let mut images: HashMap<(String, String), u32> = HashMap::new();
    let mut earlier: Vec<Earlier> = Vec::new();
    for (manifest, damaged) in &manifests {
        let directory = shelf
            .as_ref()
            .and_then(|shelf| shelf.below(&manifest.id).ok().flatten());
        let disks = manifest.disks.iter().map(|disk| {
            let there = directory
                .as_ref()
                .is_some_and(|directory| is_whole(directory, disk));
            let below = match &disk.parent {
                None => Some(0),
                Some(parent) => images.get(&(parent.backup.clone(), parent.file.clone())).copied(),
            };
            EarlierDisk {
                file: disk.file.clone(),
                virtual_size: disk.virtual_size,
                bitmap: disk.bitmap.clone(),
                images: below.filter(|_| there && !damaged).map(|below| below + 1),
            }
        });
        let disks: Vec<EarlierDisk> = disks.collect();
        progress.add(1);
        for disk in &disks {
            if let Some(count) = disk.images {
                images.insert((manifest.id.clone(), disk.file.clone()), count);
            }
        }
        earlier.push(Earlier {
            id: manifest.id.clone(),
            checkpoint: manifest.checkpoint.clone().and_then(|checkpoint| checkpoint.name),
            proven: manifest.is_proven(key),
            disks,
        });
    }
    earlier.reverse();
    earlier
}

/// Returns whether an image exists and has its recorded length.
fn is_whole(directory: &Shelf, disk: &model::Disk) -> bool {
    match (directory.file_size(&disk.file), disk.length) {
        (Ok(length), Some(then)) => length == then,
        (Ok(length), None) => length > 0,
        (Err(_), _) => false,
    }
}

impl QemuObjects {
    /// Creates the checkpoints of the plan. QEMU cannot add a bitmap and start the backup in one transaction, so the
    /// bitmaps come first. The next backup therefore copies the writes in between again. If QEMU refuses a bitmap, the
    /// disk is still backed up, and its next backup is full. If the request describes the checkpoint, the backup fails
    /// instead.
    pub async fn make_checkpoints(&self, job: &Job) -> Result<(), Error> {
        let planned = job.plan.disks.iter().enumerate();
        let disks: Vec<(usize, &DiskPlan)> = planned.filter(|(_, disk)| disk.checkpoint).collect();
        let Some((_, first)) = disks.first() else {
            return Ok(());
        };
        let sizes = disks.iter().map(|(_, disk)| disk.virtual_size);
        let marks = match self.make_marks(sizes).await {
            Ok(marks) => marks,
            // `release` removes the nodes together with the other objects.
            Err(error) => return without_checkpoint(job, first, error),
        };
        for (index, disk) in disks {
            let actions = sentinel::checkpoint(disk, &checkpoint_name(&job.backup_id, index), &marks);
            if let Err(error) = self.client().execute(Transaction::of(actions)).await {
                without_checkpoint(job, disk, error)?;
            }
        }
        self.forget_marks(marks).await.map_err(Error::Lost)
    }

    /// Removes checkpoints that no later backup will use as a base. These are checkpoints of failed or removed backups,
    /// and those beyond the number that their store keeps. Inconsistent ones are removed too, because they also prevent
    /// resizing of the disk.
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

/// Handles a disk on which QEMU cannot create the checkpoint.
fn without_checkpoint(job: &Job, disk: &DiskPlan, source: qmp::Error) -> Result<(), Error> {
    if !source.is_refusal() {
        return Err(Error::Lost(source));
    }
    if job.plan.checkpoint.is_some() {
        let disk = disk.name.clone();
        return Err(Error::Checkpoint { disk, source });
    }
    tracing::warn!(
        job = job.id,
        disk = disk.name,
        error = %source,
        "cannot create the checkpoint of the disk; its next backup will be full"
    );
    Ok(())
}

/// See [`QemuObjects::prune_checkpoints`]. The caller makes sure that nothing else changes the domain's checkpoints at
/// the same time.
pub(super) async fn prune_bitmaps(link: &Link, domain: &Domain, context: &JobContext) -> Result<(), Error> {
    let disks = link.disks().await.map_err(Error::Lost)?;
    prune_bitmaps_of(link, domain, &disks, context).await
}

impl Greeter for Jobs {
    /// Removes useless checkpoints, and those that prevent resizing or reverting the disks, when a QEMU connects: the
    /// domain's next backup may be far away. If a job works on the domain, the job does this at its end.
    fn greet<'a>(&'a self, domain: &'a Domain, link: &'a Link, snapshot: &'a Snapshot) -> BoxFuture<'a, ()> {
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
    let ids: BTreeSet<&str> = disks.iter().flat_map(checkpoints).map(|(id, _)| id).collect();
    let ids: Vec<String> = ids.into_iter().map(str::to_owned).collect();
    if ids.is_empty() && disks.iter().all(|disk| orphans(disk).next().is_none()) {
        return Ok(());
    }
    let key = domain_record(domain.identity()).key();
    let standings = context.catalog.standings(key, ids.clone()).await?;
    let standings = standings.into_iter().map(CheckpointUse::of);
    let uses: BTreeMap<&str, CheckpointUse> = ids.iter().map(String::as_str).zip(standings).collect();
    for disk in disks {
        let cleared = disk.has_snapshots && domain.checkpoints == CheckpointPolicy::Auto;
        for name in unwanted(disk, cleared, &uses, &context.stores) {
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

/// Returns the actions that remove a checkpoint and its sentinel from a disk, as far as they exist. The caller puts
/// them into one transaction.
pub(super) fn removal(disk: &Disk, checkpoint: &str) -> Vec<TransactionAction> {
    let names = [checkpoint.to_owned(), sentinel_name(checkpoint)];
    let there = names.into_iter().filter(|name| disk.bitmap(name).is_some());
    let remove = |name: String| {
        TransactionAction::BlockDirtyBitmapRemove(BlockDirtyBitmap {
            node: disk.node.clone(),
            name,
        })
    };
    there.map(remove).collect()
}

/// Returns the bitmap names of all checkpoints on a disk, including those of which only the sentinel remains.
pub(super) fn own(disk: &Disk) -> impl Iterator<Item = &str> {
    checkpoints(disk).map(|(_, name)| name).chain(orphans(disk))
}

/// Returns the checkpoints of which only the sentinel remains.
fn orphans(disk: &Disk) -> impl Iterator<Item = &str> {
    let names = disk.bitmaps.iter().map(|bitmap| bitmap.name.as_str());
    let of = names.filter_map(checkpoint_of_sentinel);
    of.filter(|name| backup_of(name).is_some() && disk.bitmap(name).is_none())
}

/// Returns this service's bitmaps on a disk, as (backup's id, bitmap's name).
pub(super) fn checkpoints(disk: &Disk) -> impl Iterator<Item = (&str, &str)> {
    let names = disk.bitmaps.iter().map(|bitmap| bitmap.name.as_str());
    names.filter_map(|name| backup_of(name).map(|id| (id, name)))
}

/// The use of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
enum CheckpointUse {
    /// It can be the base for backups into these stores. There is at least one.
    Base(Vec<Order>),
    /// Somebody created it without a backup, and deletes it explicitly.
    Alone,
    /// Its backup is not complete yet.
    Pending,
    None,
    Unknown,
}

/// The position of a backup among those in a directory of a store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Order {
    store: String,
    directory: String,
    sequence: u64,
    instant: Timestamp,
}

impl Order {
    fn of(there: There) -> Option<Self> {
        let manifest = Manifest::parse(there.manifest.as_bytes()).ok()?;
        Some(Self {
            store: there.store,
            directory: there.directory,
            sequence: manifest.sequence,
            instant: manifest.instant,
        })
    }
}

impl CheckpointUse {
    fn of(standing: Standing) -> Self {
        match standing {
            Standing::There(there) => match there.into_iter().map(Order::of).collect() {
                Some(orders) => Self::Base(orders),
                None => Self::Unknown,
            },
            Standing::Alone => Self::Alone,
            Standing::UnderWay => Self::Pending,
            Standing::Gone => Self::None,
            Standing::Unknown => Self::Unknown,
        }
    }
}

/// Returns the useless checkpoints of a disk. `cleared`: checkpoints of backups go too, because the image has internal
/// snapshots.
fn unwanted<'a>(
    disk: &'a Disk,
    cleared: bool,
    uses: &BTreeMap<&str, CheckpointUse>,
    stores: &BTreeMap<String, Store>,
) -> Vec<&'a str> {
    let mut found: Vec<(&str, &str)> = checkpoints(disk).collect();
    // The newest first: for checkpoints of unknown origin, only the name shows the age.
    found.sort_by_key(|(id, _)| Reverse(*id));
    let (bases, mut unknown) = (needed(&found, uses, stores), 0);
    let inconsistent = |name: &str| disk.bitmap(name).is_some_and(|bitmap| bitmap.inconsistent);
    found.retain(|(id, name)| match uses.get(id) {
        Some(CheckpointUse::Alone) => false,
        _ if inconsistent(name) => true,
        Some(CheckpointUse::Base(_)) if cleared => true,
        Some(CheckpointUse::Base(_)) => !bases.contains(id),
        Some(CheckpointUse::None) => true,
        Some(CheckpointUse::Pending) => false,
        Some(CheckpointUse::Unknown) | None => {
            unknown += 1;
            unknown > MAX_UNKNOWN
        }
    });
    found
        .into_iter()
        .map(|(_, name)| name)
        .chain(orphans(disk))
        .collect()
}

/// Returns the backups that serve as bases for the next ones: for each directory, as many of the newest as the store
/// keeps checkpoints. A backup in several stores is needed if one of them needs it.
fn needed<'a>(
    found: &[(&'a str, &str)],
    uses: &'a BTreeMap<&str, CheckpointUse>,
    stores: &BTreeMap<String, Store>,
) -> BTreeSet<&'a str> {
    let mut orders: Vec<(&Order, &str)> = Vec::new();
    for (id, _) in found {
        if let Some(CheckpointUse::Base(of)) = uses.get(id) {
            orders.extend(of.iter().map(|order| (order, *id)));
        }
    }
    orders.sort_by_key(|order| Reverse(*order));
    let (mut counts, mut needed) = (HashMap::<(&str, &str), usize>::new(), BTreeSet::new());
    for (order, id) in orders {
        let count = counts.entry((&order.store, &order.directory)).or_default();
        *count += 1;
        // If a store is not configured at the moment, the service does not know how many checkpoints it keeps.
        if stores
            .get(&order.store)
            .is_none_or(|store| *count <= store.checkpoints)
        {
            needed.insert(id);
        }
    }
    needed
}

impl Job {
    /// Returns whether the end of the job can make checkpoints useless.
    pub(super) fn has_checkpoints(&self) -> bool {
        matches!(self.plan.destination, Destination::Store { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Bitmap;

    fn id(second: u32) -> String {
        format!("20261123T0559{second:02}Z-10ebf9b0")
    }

    fn disk(seconds: &[u32]) -> Disk {
        let bitmap = |name: String| Bitmap {
            name,
            good: true,
            inconsistent: false,
            dirty: 0,
        };
        let mut bitmaps: Vec<Bitmap> = seconds
            .iter()
            .map(|second| bitmap(checkpoint_name(&id(*second), 0)))
            .collect();
        bitmaps.push(bitmap("somebody-elses".into()));
        bitmaps.push(bitmap("backupd-mine-0".into()));
        let mut disk = Disk::for_test("vda", "a", true, true);
        disk.bitmaps = bitmaps;
        disk
    }

    fn kept(seconds: &[u32], used: impl Fn(u32) -> CheckpointUse) -> Vec<u32> {
        let disk = disk(seconds);
        let ids: Vec<String> = seconds.iter().map(|second| id(*second)).collect();
        let uses = ids.iter().map(String::as_str);
        let uses = uses.zip(seconds.iter().map(|second| used(*second))).collect();
        let mut store = Store::at("/s".into());
        store.checkpoints = 2;
        let mut none = Store::at("/none".into());
        none.checkpoints = 0;
        let stores = BTreeMap::from([("s".to_owned(), store), ("none".to_owned(), none)]);
        let gone = unwanted(&disk, false, &uses, &stores);
        let stays = |second: &&u32| !gone.contains(&checkpoint_name(&id(**second), 0).as_str());
        assert!(
            !gone
                .iter()
                .any(|name| name.contains("else") || name.contains("mine"))
        );
        seconds.iter().filter(stays).copied().collect()
    }

    #[test]
    fn only_bitmaps_of_this_service_are_recognised() {
        assert_eq!(backup_of(&checkpoint_name(&id(7), 12)), Some(id(7).as_str()));
        for name in [
            "backupd-20261123T055907Z-10ebf9b0",
            "backupd-20261123T055907Z-10ebf9b0-",
            "backupd-20261123T055907Z-10ebf9b0-x",
            "backupd-20261123T055907Z-10ebf9bg-0",
            "backupd-2026112xT055907Z-10ebf9b0-0",
            "backupd-tuesday-0",
            "libvirt-20261123T055907Z-10ebf9b0-0",
            "",
        ] {
            assert_eq!(backup_of(name), None, "{name}");
        }
    }

    fn order(sequence: u32, store: &str, directory: &str) -> Order {
        Order {
            store: store.into(),
            directory: directory.into(),
            sequence: sequence.into(),
            // The clock may have been wrong at any time.
            instant: Timestamp::from_second(100 - i64::from(sequence)).unwrap(),
        }
    }

    #[test]
    fn a_checkpoint_of_a_backup_in_two_stores_stays_while_one_of_them_needs_it() {
        // The copy of the store keeps no checkpoint.
        let both =
            |second| CheckpointUse::Base(vec![order(second, "none", "web"), order(second, "s", "web")]);
        assert_eq!(kept(&[1, 2, 3, 4], both), [3, 4]);
        let copied = |second| CheckpointUse::Base(vec![order(second, "none", "web")]);
        assert_eq!(kept(&[1, 2, 3, 4], copied), [0; 0]);
    }

    #[test]
    fn checkpoints_of_another_domain_do_not_count_for_this_one() {
        let two =
            |second| CheckpointUse::Base(vec![order(second, "s", if second < 3 { "web" } else { "copy" })]);
        assert_eq!(kept(&[1, 2, 3, 4], two), [1, 2, 3, 4]);
    }

    #[test]
    fn a_sentinel_is_removed_with_its_checkpoint_or_without_one() {
        let mut disk = disk(&[1, 2]);
        let names = [1, 2, 3].map(|second| checkpoint_name(&id(second), 0));
        for name in [
            sentinel_name(&names[0]),
            sentinel_name(&names[2]),
            "mine-end".into(),
        ] {
            let bitmap = Bitmap {
                name,
                ..disk.bitmaps[0].clone()
            };
            disk.bitmaps.push(bitmap);
        }
        let uses = BTreeMap::from(
            [(&*id(1), CheckpointUse::None), (&*id(2), CheckpointUse::Alone)]
                .map(|(id, used)| (id.to_owned(), used)),
        );
        let uses = uses
            .iter()
            .map(|(id, used)| (id.as_str(), used.clone()))
            .collect();
        let gone = unwanted(&disk, false, &uses, &BTreeMap::new());
        assert_eq!(gone, [names[0].as_str(), names[2].as_str()]);
        let removed = |name: &str| -> Vec<String> {
            let actions = removal(&disk, name);
            let name = |action| match action {
                TransactionAction::BlockDirtyBitmapRemove(bitmap) => bitmap.name,
                other => panic!("{other:?}"),
            };
            actions.into_iter().map(name).collect()
        };
        assert_eq!(removed(&names[0]), [names[0].clone(), sentinel_name(&names[0])]);
        assert_eq!(removed(&names[1]), [names[1].clone()]);
        assert_eq!(removed(&names[2]), [sentinel_name(&names[2])]);
        assert!(checkpoints(&disk).all(|(_, name)| !name.ends_with("-end")));
    }

    #[test]
    fn with_internal_snapshots_only_explicit_checkpoints_stay() {
        let disk = disk(&[1, 2, 3]);
        let ids = [1, 2, 3].map(id);
        let uses = [
            CheckpointUse::Base(vec![order(1, "s", "web")]),
            CheckpointUse::Alone,
            CheckpointUse::Pending,
        ];
        let uses = ids.iter().map(String::as_str).zip(uses).collect();
        let stores = BTreeMap::from([("s".to_owned(), Store::at("/s".into()))]);
        assert_eq!(
            unwanted(&disk, true, &uses, &stores),
            [checkpoint_name(&ids[0], 0)]
        );
        assert_eq!(unwanted(&disk, false, &uses, &stores), [""; 0]);
    }

    #[test]
    fn the_newest_of_each_store_stay_and_those_without_a_backup_go() {
        let there = |second: u32, store: &str| CheckpointUse::Base(vec![order(second, store, "web")]);
        assert_eq!(kept(&[1, 2, 3, 4], |second| there(second, "s")), [3, 4]);
        // Ordered by sequence number, not by name.
        assert_eq!(kept(&[1, 2, 3, 4], |second| there(9 - second, "s")), [1, 2]);
        let two_stores = |second| there(second, if second % 2 == 0 { "s" } else { "unconfigured" });
        assert_eq!(kept(&[1, 2, 3, 4, 6], two_stores), [1, 3, 4, 6]);
        let gone = |second| match second {
            1 => CheckpointUse::Pending,
            2 => CheckpointUse::None,
            _ => CheckpointUse::Unknown,
        };
        assert_eq!(kept(&[1, 2, 3], gone), [1, 3]);
        assert_eq!(kept(&[1, 2, 3, 4], |_| CheckpointUse::Alone), [1, 2, 3, 4]);
        let many: Vec<u32> = (0..20).collect();
        assert_eq!(kept(&many, |_| CheckpointUse::Unknown), many[4..]);
    }
}
