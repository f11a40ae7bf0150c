//! The candidates for the base of a new backup: the domain's earlier backups in a store, with the state of their images.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::directory::choose;
use crate::catalog::{Key, Stored};
use crate::checkpoint::{Candidate, CandidateImage, Candidates};
use crate::config::Store;
use crate::domain::{CheckpointPolicy, Disk, Domain};
use crate::job::context::{JobContext, watched};
use crate::job::record::domain_record;
use crate::job::{Error, Jobs};
use crate::model::{self, DomainDir, Manifest};
use crate::offload::Progress;
use crate::plan::ChosenStore;
use crate::store::{self, BackupName, OpenBackup};

/// The number of newest backups that are considered as bases. A backup that would need an older base is full.
const MAX_CANDIDATES: u32 = 256;

impl Jobs {
    /// Returns a store with the domain's directory in it. The result includes the earlier backups and checkpoints that
    /// a new backup into the store can start from.
    pub async fn choose_store<'a>(
        &self,
        domain: &Domain,
        disks: &[Disk],
        (name, store): (&'a str, &'a Store),
    ) -> Result<ChosenStore<'a>, Error> {
        // After a failure the backup cannot be incremental. If the store is not usable, the backup fails later with the
        // store's error.
        if let Err(error) = self.settle_store(name).await {
            tracing::warn!(store = name, %error, "cannot compare the store with the catalog");
        }
        let (directory, sequence) = choose(&self.context, domain, name, store).await?;
        let candidates = Candidates {
            backups: earlier(&self.context, (name, store.path.clone()), &directory, domain).await?,
            checkpoints: self.checkpoints(domain, disks).await?,
            allow_internal_snapshots: domain.checkpoints == CheckpointPolicy::Always,
        };
        Ok(ChosenStore {
            name,
            store,
            directory,
            sequence,
            service: self.context.catalog.service(),
            candidates,
        })
    }
}

/// Returns the backups of a domain in a directory of a store, the newest first, with their usability as bases.
async fn earlier(
    context: &JobContext,
    (store, path): (&str, PathBuf),
    directory: &DomainDir,
    domain: &Domain,
) -> Result<Vec<Candidate>, Error> {
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
) -> Vec<Candidate> {
    // After a failure no image counts as usable, so the backup is full. If the store is not usable at all, the backup
    // fails later with the store's error.
    let store = store::open(store).ok();
    let parsed = stored.iter().filter_map(|stored| {
        let manifest = Manifest::parse(stored.manifest.as_bytes()).ok()?;
        Some((manifest, stored.damaged))
    });
    let mut manifests: Vec<(Manifest, bool)> = parsed.collect();
    manifests.sort_by(|(a, _), (b, _)| (a.sequence, a.instant, &a.id).cmp(&(b.sequence, b.instant, &b.id)));
    let mut images: HashMap<(String, String), u32> = HashMap::new();
    let mut candidates: Vec<Candidate> = Vec::new();
    for (manifest, damaged) in &manifests {
        let name = BackupName {
            domain: directory.as_str(),
            id: &manifest.id,
        };
        let opened = store.as_ref().and_then(|store| store.open(name).ok().flatten());
        let disks = manifest.disks.iter().map(|disk| {
            let there = opened.as_ref().is_some_and(|backup| is_whole(&**backup, disk));
            let below = match &disk.parent {
                None => Some(0),
                Some(parent) => images.get(&(parent.backup.clone(), parent.file.clone())).copied(),
            };
            CandidateImage {
                file: disk.file.clone(),
                virtual_size: disk.virtual_size,
                bitmap: disk.bitmap.clone(),
                images: below.filter(|_| there && !damaged).map(|below| below + 1),
            }
        });
        let disks: Vec<CandidateImage> = disks.collect();
        progress.add(1);
        for disk in &disks {
            if let Some(count) = disk.images {
                images.insert((manifest.id.clone(), disk.file.clone()), count);
            }
        }
        candidates.push(Candidate {
            id: manifest.id.clone(),
            checkpoint: manifest.checkpoint.clone().and_then(|checkpoint| checkpoint.name),
            proven: manifest.is_proven(key),
            disks,
        });
    }
    candidates.reverse();
    candidates
}

/// Returns whether an image exists and has its recorded length.
fn is_whole(backup: &dyn OpenBackup, disk: &model::Disk) -> bool {
    match (backup.size_of(&disk.file), disk.length) {
        (Ok(length), Some(then)) => length == then,
        (Ok(length), None) => length > 0,
        (Err(_), _) => false,
    }
}
