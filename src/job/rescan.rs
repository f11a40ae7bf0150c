//! Making the records of the backups in the stores again, from the stores.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use super::manager::Setting;
use super::record::{domain_record, to_text};
use super::run::blocking;
use super::{DiskState, DiskStatus, Error};
use crate::catalog::{
    BackupRecord, DEFINITION_NAME, Instant, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, NewJob,
    StoredBackup, Taken,
};
use crate::config::Store;
use crate::definition::{self, Definition};
use crate::domain::{Identity, Registry};
use crate::plan::{Destination, DiskPlan, Place, Plan};
use crate::target::{self, Shelf};

/// Texts about what could not be taken in.
const MAX_PROBLEMS: usize = 100;

/// What a look into the stores gave.
#[derive(Debug, Default)]
pub struct Rescan {
    /// Good backups in all stores.
    pub backups: u32,
    /// What could not be taken in, where, and why; for people, and at most 100 of them. All are in the log.
    pub problems: Vec<String>,
}

impl Rescan {
    fn problem(&mut self, path: &Path, why: &str) {
        let text = format!("{}: {why}", path.display());
        tracing::warn!("{text}");
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(text);
        }
    }
}

/// What is in a domain's directory: each backup, or what is wrong with it.
type Contents = Vec<(PathBuf, Result<StoredBackup, String>)>;

/// Looks through all stores. What is not in its store any more is forgotten, unless a part of the store could not be read.
pub(super) async fn rescan(stores: &BTreeMap<String, Store>, setting: &Setting) -> Result<Rescan, Error> {
    let mut rescan = Rescan::default();
    for (name, store) in stores {
        // From before the look: what comes meanwhile is not missing.
        let mut missing: HashSet<_> = setting
            .catalog
            .backups_in(name.clone())
            .await?
            .into_iter()
            .collect();
        if look_through(name, &store.path, setting, &mut rescan, &mut missing).await? {
            let missing = missing.into_iter().collect();
            setting.catalog.forget(name.clone(), missing).await?;
        }
    }
    tracing::info!(backups = rescan.backups, "the stores were looked through");
    Ok(rescan)
}

/// Takes in what a store has, and takes it from `missing`. Says whether all of it could be read.
async fn look_through(
    name: &str,
    path: &Path,
    setting: &Setting,
    rescan: &mut Rescan,
    missing: &mut HashSet<(String, String)>,
) -> Result<bool, Error> {
    let directories = within(setting, {
        let path = path.to_owned();
        move || Shelf::of_store(&path).and_then(|store| store.names())
    });
    let directories = match directories.await {
        Ok(directories) => directories,
        Err(error) => {
            rescan.problem(path, &error.to_string());
            return Ok(false);
        }
    };
    let mut whole = true;
    for directory in directories {
        if setting.stop.is_cancelled() {
            return Err(Error::Stopping);
        }
        let contents = within(setting, {
            let (store, path, directory) = (name.to_owned(), path.to_owned(), directory.clone());
            let domains = setting.domains.clone();
            move || contents(&store, &path, &directory, &domains)
        });
        let contents = match contents.await {
            Ok(contents) => contents,
            Err(error) => {
                rescan.problem(&path.join(&directory), &error.to_string());
                whole = false;
                continue;
            }
        };
        let mut found = Vec::new();
        for (path, backup) in contents {
            match backup {
                Ok(backup) => found.push(backup),
                Err(why) => rescan.problem(&path, &why),
            }
        }
        // Numbers that are new go up with time.
        found.sort_by_key(|found| found.job.start_time);
        let ids: Vec<_> = found.iter().map(|found| found.backup.id.clone()).collect();
        let taken = setting.catalog.take_in(found).await?;
        for (id, taken) in ids.into_iter().zip(taken) {
            match taken {
                Taken::Kept => {
                    missing.remove(&(directory.clone(), id));
                    rescan.backups += 1;
                }
                Taken::UnderWay => {}
                Taken::NotGood(job) => {
                    rescan.problem(
                        path,
                        &format!("job {job}, which made it, did not complete: remove it"),
                    );
                }
            }
        }
    }
    Ok(whole)
}

/// Reads where it keeps nobody waiting, and no longer than storage may take for a sign of life.
async fn within<T: Send + 'static>(
    setting: &Setting,
    read: impl FnOnce() -> Result<T, target::Error> + Send + 'static,
) -> Result<T, Error> {
    let patience = setting.deadlines.stall();
    match tokio::time::timeout(patience, blocking(setting, read)).await {
        Ok(read) => Ok(read?),
        Err(_) => Err(Error::stalled("the store", patience)),
    }
}

fn contents(
    store: &str,
    path: &Path,
    directory: &str,
    domains: &Registry,
) -> Result<Contents, target::Error> {
    let Some(shelf) = Shelf::of_store(path)?.below(directory)? else {
        return Ok(Contents::new());
    };
    let mut contents = Contents::new();
    for id in shelf.names()? {
        if let Some(backup) = shelf.below(&id)? {
            let read = stored_backup(store, path, directory, &id, &backup, domains);
            contents.push((backup.path().to_owned(), read));
        }
    }
    Ok(contents)
}

/// A backup in a store, or why it is none.
fn stored_backup(
    store: &str,
    store_path: &Path,
    directory: &str,
    id: &str,
    shelf: &Shelf,
    domains: &Registry,
) -> Result<StoredBackup, String> {
    let (bytes, end_time) = shelf
        .read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        .map_err(|error| error.to_string())?;
    let manifest = Manifest::parse(&bytes).map_err(|error| format!("{MANIFEST_NAME}: {error}"))?;
    if manifest.id != id {
        return Err(format!("{MANIFEST_NAME} is that of '{}'", manifest.id));
    }
    for disk in &manifest.disks {
        shelf.check_file(&disk.file).map_err(|error| error.to_string())?;
    }
    let (domain, uuid) = (&manifest.domain.name, manifest.domain.uuid);
    let identity = Identity::of_unique_name(directory, domain, uuid)
        .ok_or_else(|| format!("a backup of domain '{domain}' does not belong into '{directory}'"))?;
    // Its owner may be another than the one that is taken for it where it is not known.
    let identity = domains.identified(&identity).map_or(identity, |known| Identity {
        uuid,
        ..known.identity()
    });
    let plan = plan(store, store_path, &manifest, document(shelf).as_ref());
    let disks: Vec<DiskStatus> = manifest
        .disks
        .iter()
        .map(|disk| DiskStatus {
            name: disk.name.clone(),
            state: DiskState::Completed,
            total: disk.virtual_size,
            done: disk.virtual_size,
            target: shelf.path().join(&disk.file).display().to_string(),
        })
        .collect();
    let text = |result: Result<String, Error>| result.map_err(|error| error.to_string());
    Ok(StoredBackup {
        number: manifest.job,
        job: NewJob {
            backup_id: manifest.id.clone(),
            domain: domain_record(identity),
            started_by: manifest.started_by,
            start_time: manifest.started,
            speed: plan.bandwidth,
            plan: text(to_text(&plan))?,
        },
        instant: Instant {
            time: manifest.instant,
            quiesced: manifest.quiesced,
        },
        end_time,
        disks: text(to_text(&disks))?,
        backup: BackupRecord {
            id: manifest.id,
            store: store.to_owned(),
            domain: directory.to_owned(),
            manifest: String::from_utf8_lossy(&bytes).into_owned(),
        },
    })
}

/// What was asked for, if that is still there. A backup is good without.
fn document(shelf: &Shelf) -> Option<Definition> {
    let (bytes, _) = shelf.read(DEFINITION_NAME, definition::MAX_BYTES).ok()?;
    definition::parse(std::str::from_utf8(&bytes).ok()?).ok()
}

/// What was done, as far as manifest and document tell.
fn plan(store: &str, path: &Path, manifest: &Manifest, document: Option<&Definition>) -> Plan {
    let listed = || {
        document
            .into_iter()
            .flat_map(|document| document.disks.iter().flatten())
    };
    Plan {
        name: manifest.name.clone(),
        description: manifest.description.clone(),
        destination: Destination::Store {
            name: store.to_owned(),
            path: path.to_owned(),
        },
        reuse_external: false,
        bandwidth: document.and_then(|document| document.bandwidth).unwrap_or(0),
        quiesce: document.and_then(|document| document.quiesce),
        hold_poweroff: true,
        disks: manifest
            .disks
            .iter()
            .map(|disk| DiskPlan {
                name: disk.name.clone(),
                node: String::new(),
                virtual_size: disk.virtual_size,
                estimate: disk.virtual_size,
                only_allocated: false,
                format: disk.format,
                compress: listed()
                    .find(|listed| listed.name == disk.name)
                    .and_then(|listed| listed.compress),
                place: Place::InStore {
                    file_name: disk.file.clone(),
                },
            })
            .collect(),
        excluded: listed()
            .filter(|listed| !listed.backup)
            .map(|listed| listed.name.clone())
            .collect(),
    }
}
