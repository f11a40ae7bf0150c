//! Makes dependents independent so that their bases can be removed: replaces each incremental image by an image of the
//! complete disk.
//!
//! The service creates the new image beside the old one, compares both and replaces the old one atomically. The backup
//! stays readable throughout, and its own dependents keep the same backing content under the same name.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::remove::name;
use super::{Backups, Error, Unwanted};
use crate::catalog::{Backup, BackupKey, BackupState};
use crate::fault::{self, Point};
use crate::image::{self, Chain, Control, Output};
use crate::model::{
    Algorithm, DEFINITION_NAME, Digest, Disk, Format, Kind, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest,
    ManifestError, PROTECTED_NAME,
};
use crate::offload::{Progress, watched};
use crate::store::{Replacement, Store};
use crate::targets::{self, FileDigest};

impl Backups {
    /// Makes the dependents of the requested backups independent, except those that are to be removed too.
    pub(super) async fn merge(&self, unwanted: &Unwanted) -> Result<(), Error> {
        for id in self.dependents(unwanted).await? {
            let backup = self.complete(unwanted, &id).await?;
            self.merge_one(backup, &unwanted.ids).await?;
        }
        Ok(())
    }

    /// Returns the backups that a merge would change. Fails if one of them cannot be read.
    pub(super) async fn mergeable(&self, unwanted: &Unwanted) -> Result<Vec<String>, Error> {
        let dependents = self.dependents(unwanted).await?;
        for id in &dependents {
            let backup = self.complete(unwanted, id).await?;
            let key = backup.key;
            let open =
                move |store: &dyn Store, _: &Progress| Ok(Chain::open(store, name(&key), None).map(drop));
            self.in_store(&unwanted.store, open).await??;
        }
        Ok(dependents)
    }

    async fn dependents(&self, unwanted: &Unwanted) -> Result<Vec<String>, Error> {
        let chains = self.chains(&unwanted.store, &unwanted.domain).await?;
        chains.check_understood(&unwanted.ids)?;
        let dependents = chains.dependents(&unwanted.ids);
        chains.check_known(&unwanted.ids, &dependents)?;
        unwanted.check_allowed(&dependents)?;
        Ok(dependents)
    }

    /// Returns a dependent that can be merged.
    async fn complete(&self, unwanted: &Unwanted, id: &str) -> Result<Backup, Error> {
        // Completes an earlier merge first, because its result may not be recorded.
        let backup = self.record(unwanted, id).await?;
        self.finish_merge(&backup.key).await?;
        let backup = self.record(unwanted, id).await?;
        match backup.state {
            BackupState::Complete => Ok(backup),
            // A new image would hide known damage of this backup or its bases.
            _ => Err(Error::NotComplete {
                id: backup.key.id.clone(),
                problem: backup.problem.clone(),
            }),
        }
    }

    async fn merge_one(&self, backup: Backup, gone: &BTreeSet<String>) -> Result<(), Error> {
        // Recorded first, so that the next start cleans up if the service ends in between.
        self.catalog
            .merging(backup.key.clone(), Some(String::new()))
            .await?;
        let merged = self.make_merged(&backup, gone).await;
        let put = match merged {
            Ok((replacement, manifest)) => self.put_merged(&backup.key, replacement, manifest).await,
            Err(error) => Err(error),
        };
        match (put, self.finish_merge(&backup.key).await) {
            (Ok(()), Err(error)) => {
                tracing::warn!(backup = backup.key.id, %error, "cannot remove the former images of a merged backup");
                Ok(())
            }
            (put, _) => put,
        }
    }

    /// Creates the new images and their manifest.
    async fn make_merged(
        &self,
        backup: &Backup,
        gone: &BTreeSet<String>,
    ) -> Result<(Arc<dyn Replacement>, Manifest), Error> {
        let key = backup.key.clone();
        let open = move |store: &dyn Store, progress: &Progress| {
            let chain = Chain::open(store, name(&key), None);
            Ok((chain, store.replace(name(&key), progress)?))
        };
        let (chain, replacement) = self.in_store(&backup.key.store, open).await?;
        let (chain, replacement) = (chain?, Arc::<dyn Replacement>::from(replacement));
        let mut manifest = backup.manifest.clone();
        for disk in &mut manifest.disks {
            let loses_base = disk
                .parent
                .as_ref()
                .is_some_and(|parent| gone.contains(&parent.backup));
            if loses_base {
                self.merge_disk(&backup.key.store, &chain, &replacement, disk)
                    .await?;
            } else {
                let (kept, file, stop) = (replacement.clone(), disk.file.clone(), self.stop.clone());
                let keep = move |progress: &Progress| kept.keep(&file, progress, &stop);
                let kept = self.blocking(&backup.key.store, keep).await?;
                kept.ok_or(Error::Stopping)?;
            }
        }
        if manifest.parents().is_empty() {
            manifest.kind = Kind::Full;
        }
        if backup.manifest.is_proven(self.catalog.key()) {
            let proven = manifest.prove(self.catalog.key());
            proven.map_err(|error| Error::Manifest(error.to_string()))?;
        }
        let text = encode(&manifest)?;
        let written = replacement.clone();
        let write = move |progress: &Progress| {
            written.keep_record(DEFINITION_NAME, progress)?;
            written.keep_record_if_there(PROTECTED_NAME, progress)?;
            written.write(MANIFEST_NAME, &text)
        };
        self.blocking(&backup.key.store, write).await?;
        fault::point(Point::MergeMade);
        Ok((replacement, manifest))
    }

    async fn merge_disk(
        &self,
        store: &str,
        chain: &Chain,
        replacement: &Arc<dyn Replacement>,
        disk: &mut Disk,
    ) -> Result<(), Error> {
        let Some(images) = chain.disks().iter().find(|images| images.disk == disk.name) else {
            return Err(Error::Gone(chain.manifest.id.clone()));
        };
        let (made, file) = (replacement.clone(), disk.file.clone());
        let target = self.blocking(store, move |_| made.create_image(&file)).await?;
        let target = Arc::new(target);
        let copy = duplicate(&target)?;
        let images = &images.open().await?;
        let control = Control {
            progress: &Progress::default(),
            cancel: &self.stop,
            stall: self.deadlines.stall(),
        };
        image::check_sums(images, control).await?;
        let output = Output {
            file: copy,
            format: Format::Qcow2,
            kept: true,
            // The file belongs to no backup yet, and is removed with the replacement.
            written: &AtomicBool::new(false),
        };
        image::restore(images, output, control).await?;
        let (stop, stall, file) = (self.stop.clone(), self.deadlines.stall(), target.clone());
        let digest = move |progress: &Progress| FileDigest::of(&file, progress, &stop);
        let (same, digest) = tokio::join!(
            image::shows_the_same(images, &target, control),
            watched(&self.activity, stall, digest),
        );
        if !same? {
            return Err(Error::NotTheSame {
                id: chain.manifest.id.clone(),
                disk: disk.name.clone(),
            });
        }
        let digest = digest
            .ok_or_else(|| Error::stalled(stall))??
            .ok_or(Error::Stopping)?;
        disk.length = Some(digest.length);
        disk.set_digest(digest.blake3.map(|hex| Digest {
            algorithm: Algorithm::Blake3,
            hex,
        }));
        disk.parent = None;
        Ok(())
    }

    /// Replaces the images. Records the new manifest first, so that recovery recognises it in the store.
    async fn put_merged(
        &self,
        key: &BackupKey,
        replacement: Arc<dyn Replacement>,
        manifest: Manifest,
    ) -> Result<(), Error> {
        let text = encode(&manifest)?;
        let text = String::from_utf8_lossy(&text).into_owned();
        self.catalog.merging(key.clone(), Some(text)).await?;
        fault::point(Point::MergeRecorded);
        self.blocking(&key.store, move |_| replacement.put()).await?;
        self.put_on_record(key).await?;
        fault::point(Point::Merged);
        tracing::info!(
            backup = key.id,
            store = key.store,
            "a backup was made independent of its bases"
        );
        Ok(())
    }

    /// Updates the record from the store. Raises the store's generation first, because recovery repeats that
    /// only until the record is updated.
    async fn put_on_record(&self, key: &BackupKey) -> Result<(), Error> {
        self.jobs.raise_generation(&key.store).await;
        Ok(self.catalog.merged(key.clone()).await?)
    }

    /// Completes or undoes a merge of a previous instance.
    pub(super) async fn recover_merge(&self, key: &BackupKey) -> Result<(), Error> {
        let _turn = self.store_locks(&key.store)?.removal.lock().await;
        self.check_mark(&key.store).await?;
        self.finish_merge(key).await
    }

    /// Compares the record with the manifest in the store, and removes the files in staging.
    async fn finish_merge(&self, key: &BackupKey) -> Result<(), Error> {
        let at = key.clone();
        let read = move |store: &dyn Store, _: &Progress| {
            store.settle_replacement(name(&at))?;
            let backup = store.open(name(&at))?;
            let read = backup.map(|backup| backup.read_manifest());
            Ok(read.transpose()?.map(|(bytes, _)| bytes))
        };
        let found = self.in_store(&key.store, read).await?;
        let is_new = match (self.catalog.being_merged(key.clone()).await?, found) {
            (Some(new), Some(found)) => new.as_bytes() == found,
            _ => false,
        };
        if is_new {
            self.put_on_record(key).await?;
        }
        let at = key.clone();
        let clear =
            move |store: &dyn Store, progress: &Progress| store.clear_replacement(name(&at), progress);
        self.in_store(&key.store, clear).await?;
        Ok(self.catalog.merging(key.clone(), None).await?)
    }

    pub(super) fn path_of(&self, store: &str) -> Result<PathBuf, Error> {
        let found = self.stores.get(store);
        Ok(found
            .ok_or_else(|| Error::NoStore(store.to_owned()))?
            .path
            .clone())
    }
}

/// Fails if no reader would accept the manifest: unknown fields of another program may be longer when the service
/// writes them again.
fn encode(manifest: &Manifest) -> Result<Vec<u8>, Error> {
    let text = manifest.to_json();
    let text = text.map_err(|error| Error::Manifest(error.to_string()))?;
    match text.len() {
        ..=MAX_MANIFEST_BYTES => Ok(text),
        bytes => Err(Error::Manifest(ManifestError::TooLong { bytes }.to_string())),
    }
}

fn duplicate(file: &OwnedFd) -> Result<OwnedFd, Error> {
    let copy = rustix::io::fcntl_dupfd_cloexec(file, 3);
    copy.map_err(|errno| {
        Error::Target(targets::Error::system(
            "duplicate a descriptor of",
            "a new image",
            errno,
        ))
    })
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::model::{Domain, Unknown};

    #[test]
    fn a_manifest_that_no_reader_would_accept_is_not_encoded() {
        let domain = Domain {
            name: "web".into(),
            uuid: None,
            unknown: Unknown::new(),
        };
        let now = Timestamp::UNIX_EPOCH;
        let mut manifest = Manifest::new(Kind::Full, "a".into(), 1, 0, domain, now, now);
        manifest.description = Some(String::new());
        let least = encode(&manifest).unwrap().len();
        manifest.description = Some("x".repeat(MAX_MANIFEST_BYTES - least));
        assert_eq!(encode(&manifest).unwrap().len(), MAX_MANIFEST_BYTES);
        manifest.description = Some("x".repeat(MAX_MANIFEST_BYTES - least + 1));
        let error = encode(&manifest).unwrap_err().to_string();
        assert!(error.contains("1048577 bytes"), "{error}");
    }
}
