//! Jobs on stored backups: restore into a caller's open files, export over NBD, verify.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};

use super::request::disk_list;
use super::{Descriptors, Service, starter};
use crate::access::{Caller, Grant, Permission};
use crate::catalog::{Backup, BackupKey};
use crate::clock;
use crate::error::{Error, Kind, Result, shown};
use crate::image::{self, Chain, Export, Location, Survey};
use crate::job::{self, Job, Served, Work};
use crate::model::Format;
use crate::offload::Progress;
use crate::plan::{JobSpec, RestorePlan, RestoredDisk, Stored};
use crate::store::{self, BackupName, Store};
use crate::targets::Devices;

/// The disks to restore, each into the descriptor at the same index.
#[derive(Debug)]
pub struct RestoreRequest {
    pub disks: Vec<String>,
    pub files: Descriptors,
    pub format: Format,
}

impl Service {
    /// Requires the permission to read these disks of a backup; without names, all disks.
    pub async fn authorise_restore(
        &self,
        caller: &Caller,
        backup: &Backup,
        disks: &[String],
    ) -> Result<Grant> {
        let details = self
            .backup_details(backup)
            .with("target_kind", "fd")
            .with("disks", disk_list(disks));
        let permission = Permission::BackupRestore;
        Ok(self.access.require(caller, permission, &details, None).await?)
    }

    /// Starts a job that restores disks into the caller's open files.
    pub async fn restore(
        &self,
        grant: Grant,
        caller: &Caller,
        backup: &Backup,
        request: RestoreRequest,
    ) -> Result<Arc<Job>> {
        let RestoreRequest { disks, files, format } = request;
        if disks.is_empty() {
            return Err(Error::new(Kind::InvalidArgs, "name at least one disk"));
        }
        if disks.iter().collect::<BTreeSet<_>>().len() < disks.len() {
            return Err(Error::new(Kind::InvalidArgs, "name each disk only once"));
        }
        let turn = self.jobs.turn(caller.uid, files.share)?;
        let chain = self.chain(backup, disks.clone()).await?;
        let domain = self.backups.domain(&backup.domain);
        let restore = RestorePlan {
            stored: stored(backup),
            disks: restored_disks(&chain, &disks, format),
        };
        let spec = JobSpec::Restore(restore.clone());
        let record = self
            .jobs
            .begin(&domain, &spec, starter(caller), clock::now())
            .await?;
        let prepared = self
            .prepare(
                Arc::new(restore.targets()),
                &domain,
                (caller.uid, &record.backup_id),
                files.files,
                (None, Devices::default(), Vec::new()),
                true,
            )
            .await;
        let (turn, (_, targets)) = self.jobs.prepared(record.id, turn, prepared).await?;
        let work = Work::Restore(Box::new((chain, targets)));
        let job = self.jobs.start_stored(turn, domain, (spec, record), work);
        grant.record(job.id);
        Ok(job)
    }

    /// Requires the permission to verify a backup.
    pub async fn authorise_verify(&self, caller: &Caller, backup: &Backup) -> Result<Grant> {
        let details = self.backup_details(backup);
        let permission = Permission::BackupVerify;
        Ok(self.access.require(caller, permission, &details, None).await?)
    }

    /// Starts a job that verifies a backup and all its bases. `files` is empty.
    pub async fn verify(
        &self,
        grant: Grant,
        caller: &Caller,
        backup: &Backup,
        files: Descriptors,
    ) -> Result<Arc<Job>> {
        let turn = self.jobs.turn(caller.uid, files.share)?;
        let location = Location {
            domain: backup.key.domain.clone(),
            id: backup.key.id.clone(),
        };
        let survey = self
            .in_store(backup, move |store| {
                Ok(Survey::new(Arc::from(store), &[location]))
            })
            .await?;
        let domain = self.backups.domain(&backup.domain);
        let spec = JobSpec::Verify(stored(backup));
        let record = self
            .jobs
            .begin(&domain, &spec, starter(caller), clock::now())
            .await?;
        let work = Work::Verify(survey);
        let job = self.jobs.start_stored(turn, domain, (spec, record), work);
        grant.record(job.id);
        Ok(job)
    }

    /// Serves one disk of a backup or all of them read-only over NBD, on the caller's listening socket, until `left`
    /// completes.
    pub async fn export(
        &self,
        grant: Grant,
        caller: &Caller,
        backup: &Backup,
        (disks, listener): (Vec<String>, Descriptors),
        left: impl Future<Output = ()> + Send + 'static,
    ) -> Result<Arc<Job>> {
        let turn = self.jobs.turn(caller.uid, listener.share)?;
        let Ok([socket]) = <[OwnedFd; 1]>::try_from(listener.files) else {
            return Err(Error::new(Kind::InvalidArgs, "pass exactly one socket"));
        };
        check_listener(&socket)?;
        let chain = self.chain(backup, disks).await?;
        let start = Export::start(chain, socket);
        let export = match tokio::time::timeout(self.jobs.patience(), start).await {
            Ok(export) => export?,
            Err(_) => return Err(job::Error::stalled("the store", self.jobs.patience()).into()),
        };
        let domain = self.backups.domain(&backup.domain);
        let spec = JobSpec::Export(stored(backup));
        let record = self
            .jobs
            .begin(&domain, &spec, starter(caller), clock::now())
            .await?;
        let work = Work::Export(Box::new(Served {
            export,
            left: Box::pin(left),
        }));
        let job = self.jobs.start_stored(turn, domain, (spec, record), work);
        grant.record(job.id);
        Ok(job)
    }

    /// The images of the named disks; without names, of all disks.
    async fn chain(&self, backup: &Backup, disks: Vec<String>) -> Result<Chain> {
        let key = backup.key.clone();
        self.in_store(backup, move |store| {
            let disks: Vec<&str> = disks.iter().map(String::as_str).collect();
            let wanted = (!disks.is_empty()).then_some(disks.as_slice());
            Chain::open(&*store, name(&key), wanted)
        })
        .await
    }

    /// Runs `work` on the backup's store, with a timeout for hung storage.
    async fn in_store<T: Send + 'static>(
        &self,
        backup: &Backup,
        work: impl FnOnce(Box<dyn Store>) -> std::result::Result<T, image::Error> + Send + 'static,
    ) -> Result<T> {
        let store_name = &backup.key.store;
        let store = self.backups.store(store_name).ok_or_else(|| {
            let text = format!("store '{}' is not configured any more", shown(store_name));
            Error::new(Kind::NoSuchStore, text)
        })?;
        let (path, key) = (store.path.clone(), backup.key.clone());
        let known = self.backups.known_mark(store_name).await?;
        let work = move |_: &Progress| {
            let store = store::open(&path)?;
            // If the store is not mounted, report that and not a missing backup.
            if let Some(known) = known
                && matches!(store.open(name(&key)), Ok(None))
            {
                store.check_mark(&known)?;
            }
            Ok::<_, store::Error>(work(store))
        };
        match self.jobs.in_store(work).await? {
            Ok(done) => Ok(done?),
            Err(error) => {
                let text = format!("store '{}': {error}", shown(store_name));
                Err(Error::new(error.kind(), text))
            }
        }
    }
}

fn name(key: &BackupKey) -> BackupName<'_> {
    BackupName {
        domain: &key.domain,
        id: &key.id,
    }
}

fn stored(backup: &Backup) -> Stored {
    Stored {
        store: backup.key.store.clone(),
        domain: backup.key.domain.clone(),
        id: backup.key.id.clone(),
    }
}

fn restored_disks(chain: &Chain, disks: &[String], format: Format) -> Vec<RestoredDisk> {
    let named = |name: &String| chain.disks().iter().find(|disk| disk.disk == *name);
    let restored = disks.iter().filter_map(|name| {
        let disk = named(name)?;
        Some(RestoredDisk {
            name: name.clone(),
            virtual_size: disk.virtual_size(),
            estimate: disk.estimate(),
            format,
        })
    });
    restored.collect()
}

/// Requires a listening UNIX stream socket.
fn check_listener(socket: &OwnedFd) -> Result<()> {
    let listens = socket_domain(socket) == Ok(rustix::net::AddressFamily::UNIX)
        && socket_type(socket) == Ok(SocketType::STREAM)
        && socket_acceptconn(socket) == Ok(true);
    match listens {
        true => Ok(()),
        false => {
            let text = "pass a listening UNIX stream socket";
            Err(Error::new(Kind::InvalidArgs, text))
        }
    }
}
