//! Turns a backup in a store into the records of the backup and of the job that created it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::catalog::{BackupRecord, NewJob, Starter, StoredBackup};
use crate::checkpoint::{Base, FullReason, Mode};
use crate::definition::{self, Definition};
use crate::domain::{Identity, Registry};
use crate::job::backup::{Ended, State, journal};
use crate::job::boot::BootId;
use crate::job::record::{domain_record, spec_to_text, to_text};
use crate::job::{DiskState, DiskStatus, Error};
use crate::model::{DEFINITION_NAME, DomainDir, Format, Kind, MANIFEST_NAME, Manifest};
use crate::plan::{Destination, DiskPlan, JobSpec, Plan, TargetPlan};
use crate::store::{BackupName, OpenBackup, Store};

/// A backup in a store, or the reason why it is not usable.
pub struct Found {
    pub path: PathBuf,
    pub id: String,
    pub backup: Result<StoredBackup, String>,
}

/// Reads the backup with this name; `None` if it does not exist. `store` is the store's name.
pub fn read(store: &str, opened: &dyn Store, name: BackupName<'_>, domains: &Registry) -> Option<Found> {
    let backup = match opened.open(name) {
        Ok(Some(backup)) => stored_backup((store, opened.location()), name, &*backup, domains),
        Ok(None) => return None,
        Err(error) => Err(error.to_string()),
    };
    Some(Found {
        path: opened.location().join(name.domain).join(name.id),
        id: name.id.to_owned(),
        backup,
    })
}

/// Returns the record of a backup in a store, or the reason why it is not usable.
fn stored_backup(
    (store, store_path): (&str, &Path),
    BackupName {
        domain: directory,
        id,
    }: BackupName<'_>,
    backup: &dyn OpenBackup,
    domains: &Registry,
) -> Result<StoredBackup, String> {
    let (bytes, end_time) = backup.read_manifest().map_err(|error| error.to_string())?;
    let manifest = Manifest::parse(&bytes).map_err(|error| format!("{MANIFEST_NAME}: {error}"))?;
    if manifest.id != id {
        return Err(format!("{MANIFEST_NAME} belongs to backup '{}'", manifest.id));
    }
    for disk in &manifest.disks {
        let size = backup.size_of(&disk.file).map_err(|error| error.to_string())?;
        if size == 0 || (disk.format == Format::Raw && size != disk.virtual_size) {
            return Err(format!(
                "{} has {size} bytes, which is not a valid size for an image of the disk",
                disk.file
            ));
        }
    }
    let (domain, uuid) = (&manifest.domain.name, manifest.domain.uuid);
    let identity = Identity::in_directory(directory, domain, uuid)
        .ok_or_else(|| format!("{MANIFEST_NAME}: '{domain}' is not a valid name of a domain"))?;
    let identity = match domains.same(&identity) {
        Some(known) => Identity {
            owner: known.owner,
            owner_name: known.owner_name.clone(),
            ..identity
        },
        None => identity,
    };
    let plan = plan(
        (store, store_path, directory),
        &manifest,
        document(backup).as_ref(),
    );
    let disks: Vec<DiskStatus> = manifest
        .disks
        .iter()
        .map(|disk| DiskStatus {
            name: disk.name.clone(),
            state: DiskState::Completed,
            total: disk.virtual_size,
            done: disk.virtual_size,
            target: backup.location().join(&disk.file).display().to_string(),
        })
        .collect();
    let ended = State::Ended(Ended {
        frozen_us: manifest.frozen_us.unwrap_or(0),
        quiesce_problem: manifest.quiesce_problem.clone(),
        ..Ended::default()
    });
    let text = |result: Result<String, Error>| result.map_err(|error| error.to_string());
    Ok(StoredBackup {
        number: manifest.job,
        job: NewJob {
            backup_id: manifest.id.clone(),
            domain: domain_record(identity),
            started_by: Starter {
                uid: manifest.started_by,
                name: None,
                connection: None,
            },
            start_time: manifest.started,
            speed: plan.bandwidth,
            plan: text(spec_to_text(&JobSpec::Backup(Arc::new(plan))))?,
            state: journal::to_record(&ended, BootId::nil()).map_err(|error| error.to_string())?,
        },
        end_time,
        disks: text(to_text(&disks))?,
        backup: BackupRecord {
            id: manifest.id,
            store: store.to_owned(),
            domain: directory.to_owned(),
            manifest: String::from_utf8_lossy(&bytes).into_owned(),
            protected: backup.is_protected().map_err(|error| error.to_string())?,
        },
    })
}

/// Returns the document of the backup's request, if the store still has it. A backup is usable without it.
fn document(backup: &dyn OpenBackup) -> Option<Definition> {
    let (bytes, _) = backup.read(DEFINITION_NAME, definition::MAX_BYTES).ok()?;
    definition::parse(std::str::from_utf8(&bytes).ok()?).ok()
}

/// Reconstructs the plan from the manifest and the document.
fn plan(
    (store, path, directory): (&str, &Path, &str),
    manifest: &Manifest,
    document: Option<&Definition>,
) -> Plan {
    let listed = || {
        document
            .into_iter()
            .flat_map(|document| document.disks.iter().flatten())
    };
    Plan {
        checkpoint: manifest.checkpoint.clone(),
        name: manifest.name.clone(),
        description: manifest.description.clone(),
        destination: Destination::Store {
            name: store.to_owned(),
            path: path.to_owned(),
            directory: DomainDir::new(directory),
            sequence: manifest.sequence,
            service: manifest.service.unwrap_or_default(),
        },
        reuse_external: false,
        max_latency: None,
        bandwidth: document.and_then(|document| document.bandwidth).unwrap_or(0),
        quiesce: document.and_then(|document| document.quiesce),
        hold_poweroff: true,
        disks: manifest
            .disks
            .iter()
            .map(|disk| DiskPlan {
                device: String::new(),
                name: disk.name.clone(),
                node: String::new(),
                virtual_size: disk.virtual_size,
                estimate: disk.virtual_size,
                source: None,
                encrypted: false,
                only_allocated: false,
                format: disk.format,
                compress: listed()
                    .find(|listed| listed.name == disk.name)
                    .and_then(|listed| listed.compress),
                mode: match &disk.parent {
                    None => Mode::Full {
                        why: FullReason::Unknown,
                    },
                    Some(parent) => Mode::Incremental(Base {
                        backup: parent.backup.clone(),
                        file: parent.file.clone(),
                        bitmap: String::new(),
                        is_newest: manifest.kind == Kind::Incremental,
                    }),
                },
                checkpoint: disk.bitmap.is_some(),
                target: TargetPlan::InStore {
                    file_name: disk.file.clone(),
                },
            })
            .collect(),
        excluded: listed()
            .filter(|listed| !listed.backup)
            .map(|listed| listed.name.clone())
            .collect(),
        outside: manifest.not_in_backup.clone(),
    }
}
