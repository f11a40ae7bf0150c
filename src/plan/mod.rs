//! Turns a caller's request into a plan with every default made explicit.
//!
//! Pure: combines a document, the options of a call, the domain's disks and the configured stores, and performs no I/O.
//! Every [`Plan`] names only disks that exist and have a medium, each with one target.

mod error;
mod requested;
pub mod retention;
mod spec;
#[cfg(test)]
mod tests;

pub use error::Error;
pub use requested::{Requested, TargetKind, requested};
pub use spec::{JobSpec, RestorePlan, RestoredDisk, Stored};

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::checkpoint::{
    self, BaseRequest, Candidates, CheckpointOption, FullReason, Mode, PlannedDisk, kind,
};
use crate::config::{DEFAULT_STORE, Store};
use crate::definition::{
    BackupMode, CheckpointRef, Definition, DiskDefinition, Position, Quiesce, StoreRef, Target,
};
use crate::domain::{Disk, find_disks};
use crate::model::{Checkpoint, Compression, DomainDir, Format, Kind, Outside};

/// The options of a call, beside its document.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Options {
    /// Overwrite existing targets.
    pub reuse_external: bool,
    /// Bytes a second for all disks together.
    pub bandwidth: Option<u64>,
    /// How long the guest's writes may take, in milliseconds; 0 disables the limit. `None` selects the configured
    /// value.
    pub max_latency: Option<u32>,
    pub quiesce: Option<Quiesce>,
    pub incremental: Option<Incremental>,
    pub checkpoint: Option<CheckpointOption>,
    /// Let the guest power off during the backup, although that ends its QEMU and fails the backup.
    pub allow_poweroff: bool,
    /// Refuse a backup that would lack data of the guest.
    pub require_all_disks: bool,
}

/// The kind of backup for disks that the document does not specify.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Incremental {
    /// For each disk, incremental to the newest backup in the store with a bitmap on it, or else full.
    Auto,
    Full,
    /// Incremental to this checkpoint.
    Since(String),
}

/// A complete description of a backup. Immutable. A later instance of the service reads it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub name: Option<String>,
    pub description: Option<String>,
    pub destination: Destination,
    pub reuse_external: bool,
    /// Bytes a second for all disks together; 0 is unlimited.
    pub bandwidth: u64,
    /// How long the guest's writes may take, in milliseconds, before the service slows the backup down.
    #[serde(default)]
    pub max_latency: Option<NonZeroU32>,
    pub quiesce: Option<Quiesce>,
    /// If the guest powers off, keep it paused until the backup has ended.
    pub hold_poweroff: bool,
    /// Name and description of the backup's checkpoint.
    #[serde(default)]
    pub checkpoint: Option<Checkpoint>,
    /// At least one.
    pub disks: Vec<DiskPlan>,
    /// Disks of the domain that are not backed up.
    pub excluded: Vec<String>,
    /// Devices and disks of the domain whose data no backup can include.
    #[serde(default)]
    pub outside: Vec<Outside>,
}

/// The party that chooses the targets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Destination {
    /// The service, inside a store.
    Store {
        name: String,
        path: PathBuf,
        /// The domain's directory in the store.
        directory: DomainDir,
        /// The backup's sequence number in that directory.
        sequence: u64,
        /// The id of the service that creates it.
        service: Uuid,
    },
    /// The caller, one for each disk.
    Caller,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPlan {
    pub name: String,
    /// QEMU's node to read from.
    pub node: String,
    /// QEMU's path of the guest's device.
    #[serde(default)]
    pub device: String,
    /// Size that the guest sees, in bytes. The target gets exactly this size.
    pub virtual_size: u64,
    /// Estimated maximum of the data, in bytes.
    pub estimate: u64,
    /// The file with the disk's data, as QEMU has it open. `None` if a part of it is not in the backup.
    #[serde(default)]
    pub source: Option<PathBuf>,
    /// QEMU decrypts the disk, so the backup contains plain text.
    #[serde(default)]
    pub encrypted: bool,
    /// Unallocated parts of the disk's image read as zeroes, so a full copy can skip them.
    pub only_allocated: bool,
    pub format: Format,
    pub compress: Option<Compression>,
    #[serde(default)]
    pub mode: Mode,
    /// Record changes from this backup on, so that a later backup can start from it.
    #[serde(default)]
    pub checkpoint: bool,
    /// The name in records is older.
    #[serde(rename = "place")]
    pub target: TargetPlan,
}

/// The target of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetPlan {
    /// A file of this name in the backup's directory in a store.
    InStore {
        file_name: String,
    },
    File(PathBuf),
    Block(PathBuf),
    /// The caller's descriptor at this index.
    Descriptor(u32),
}

/// QEMU's names of the formats that distinguish data from holes exactly. Without a backing file, unallocated parts read
/// as zeroes in all drivers that support one (QEMU's `bdrv_co_block_status`). A raw image may report holes too. But
/// holes on NBD and iSCSI need not read as zeroes, and QEMU treats all of a raw file as allocated.
const EXACT_FORMATS: [&str; 3] = ["qcow2", "qed", "vmdk"];

impl DiskPlan {
    /// Returns true if QEMU first finds the allocated parts of the disk's image, and copies only those.
    pub fn is_scanned(&self) -> bool {
        self.only_allocated && matches!(self.mode, Mode::Full { .. })
    }
}

/// The store of a backup, and the domain's backups in it.
#[derive(Debug, Clone)]
pub struct ChosenStore<'a> {
    pub name: &'a str,
    pub store: &'a Store,
    /// The domain's directory in the store.
    pub directory: DomainDir,
    /// The new backup's sequence number in that directory.
    pub sequence: u64,
    pub service: Uuid,
    pub candidates: Candidates,
}

/// Creates the plan.
///
/// `disks` are the domain's current disks, and `outside` its other devices. `store` is the result of [`store`]. `files`
/// is the number of descriptors in the call.
pub fn resolve(
    definition: &Definition,
    options: &Options,
    disks: &[Disk],
    outside: &[Outside],
    store: Option<ChosenStore<'_>>,
    files: usize,
) -> Result<Plan, Error> {
    let chosen = choose(definition, disks)?;
    let outside = not_in_backup(disks, outside);
    if options.require_all_disks && !outside.is_empty() {
        return Err(Error::NotInBackup(outside));
    }
    let nothing = Candidates::default();
    let candidates = store.as_ref().map_or(&nothing, |chosen| &chosen.candidates);
    let settings = store.as_ref().map(|chosen| chosen.store);
    if store.is_some() && options.reuse_external {
        return Err(Error::ReuseInStore);
    }
    check_files(definition, files)?;
    let excluded = disks
        .iter()
        .filter(|disk| !chosen.iter().any(|(chosen, _)| chosen.name == disk.name))
        .map(|disk| disk.name.clone())
        .collect();
    let planned = chosen.into_iter().map(|(disk, asked)| {
        let wanted = wanted(definition, options, asked)?;
        Ok((disk, disk_plan(disk, asked, settings, candidates, &wanted)?))
    });
    let mut planned = planned.collect::<Result<Vec<(&Disk, DiskPlan)>, Error>>()?;
    let max_latency = options.max_latency.and_then(NonZeroU32::new);
    let checkpoint = checkpoint_of(options, settings, disks, candidates, &mut planned)?;
    Ok(Plan {
        checkpoint,
        disks: planned.into_iter().map(|(_, planned)| planned).collect(),
        name: definition.name.clone(),
        description: definition.description.clone(),
        destination: match store {
            Some(chosen) => Destination::Store {
                name: chosen.name.to_owned(),
                path: chosen.store.path.clone(),
                directory: chosen.directory,
                sequence: chosen.sequence,
                service: chosen.service,
            },
            None => Destination::Caller,
        },
        reuse_external: options.reuse_external,
        max_latency,
        bandwidth: agreed("bandwidth", definition.bandwidth, options.bandwidth)?.unwrap_or(0),
        quiesce: agreed("quiesce", definition.quiesce, options.quiesce)?,
        hold_poweroff: !options.allow_poweroff,
        excluded,
        outside,
    })
}

/// Decides which disks of the backup have a checkpoint, and returns the requested name and description.
fn checkpoint_of(
    options: &Options,
    store: Option<&Store>,
    disks: &[Disk],
    candidates: &Candidates,
    planned: &mut [(&Disk, DiskPlan)],
) -> Result<Option<Checkpoint>, Error> {
    let with_checkpoint = planned.iter().map(|(disk, planned)| PlannedDisk {
        disk,
        format: planned.format,
        has_checkpoint: planned.checkpoint,
    });
    let mut with_checkpoint: Vec<PlannedDisk> = with_checkpoint.collect();
    let existing = &candidates.checkpoints;
    let requested = options.checkpoint.as_ref();
    let checkpoint = checkpoint::of_backup(requested, store, disks, existing, &mut with_checkpoint);
    let checkpoint = checkpoint.map_err(Error::Checkpoint)?;
    let decided: Vec<bool> = with_checkpoint.iter().map(|disk| disk.has_checkpoint).collect();
    for ((_, planned), has_checkpoint) in planned.iter_mut().zip(decided) {
        planned.checkpoint = has_checkpoint;
    }
    Ok(checkpoint)
}

/// Returns the store that a request goes to, with its name; `None` if the caller chose the targets.
pub fn store<'a>(
    definition: &'a Definition,
    stores: &'a BTreeMap<String, Store>,
) -> Result<Option<(&'a str, &'a Store)>, Error> {
    if selected(definition).any(|disk| disk.target.is_some()) {
        return Ok(None);
    }
    let (name, at) = store_name(definition);
    match stores.get(name) {
        Some(store) => Ok(Some((name, store))),
        None => Err(Error::NoSuchStore {
            name: name.to_owned(),
            at,
        }),
    }
}

impl Plan {
    /// Returns the kind of the whole backup.
    pub fn kind(&self) -> Kind {
        kind(self.disks.iter().map(|disk| &disk.mode))
    }

    /// Returns true if QEMU copies in small steps, one at a time, so that a guest's write waits only briefly.
    pub fn copies_in_small_steps(&self) -> bool {
        self.max_latency.is_some()
    }

    /// Returns true if the plan writes to an existing target, which another domain may have open.
    pub fn writes_into_existing(&self) -> bool {
        self.disks.iter().any(|disk| match disk.target {
            TargetPlan::InStore { .. } => false,
            TargetPlan::File(_) => self.reuse_external,
            TargetPlan::Block(_) | TargetPlan::Descriptor(_) => true,
        })
    }

    /// Returns the document with every default filled in. It lists every disk of the domain.
    pub fn definition(&self) -> Definition {
        let included = self.disks.iter().map(|disk| DiskDefinition {
            name: disk.name.clone(),
            at: Position::default(),
            backup: true,
            format: Some(disk.format),
            compress: disk.compress,
            mode: match (&self.destination, &disk.mode) {
                (Destination::Caller, _) => None,
                (_, Mode::Full { .. }) => Some(BackupMode::Full),
                (_, Mode::Incremental(base)) => Some(BackupMode::Incremental(Some(CheckpointRef {
                    name: base.backup.clone(),
                    at: Position::default(),
                }))),
            },
            target: match &disk.target {
                TargetPlan::InStore { .. } => None,
                TargetPlan::File(path) => Some(Target::File(path.clone())),
                TargetPlan::Block(path) => Some(Target::Block(path.clone())),
                TargetPlan::Descriptor(index) => Some(Target::Fd(*index)),
            },
        });
        let excluded = self.excluded.iter().map(DiskDefinition::left_out);
        Definition {
            name: self.name.clone(),
            description: self.description.clone(),
            store: match &self.destination {
                Destination::Store { name, .. } => Some(StoreRef {
                    name: name.clone(),
                    at: Position::default(),
                }),
                Destination::Caller => None,
            },
            bandwidth: Some(self.bandwidth).filter(|bandwidth| *bandwidth != 0),
            quiesce: self.quiesce,
            incremental: None,
            disks: Some(included.chain(excluded).collect()),
        }
    }
}

fn selected(definition: &Definition) -> impl Iterator<Item = &DiskDefinition> {
    definition.disks.iter().flatten().filter(|disk| disk.backup)
}

fn store_name(definition: &Definition) -> (&str, Position) {
    let named = definition
        .store
        .as_ref()
        .map(|store| (store.name.as_str(), store.at));
    named.unwrap_or((DEFAULT_STORE, Position::default()))
}

type Chosen<'a> = Vec<(&'a Disk, Option<&'a DiskDefinition>)>;

/// Returns the disks to back up, with their elements of the document.
fn choose<'a>(definition: &'a Definition, disks: &'a [Disk]) -> Result<Chosen<'a>, Error> {
    let Some(listed) = &definition.disks else {
        let all: Chosen = disks
            .iter()
            .filter(|disk| disk.left_out().is_none())
            .map(|disk| (disk, None))
            .collect();
        return if all.is_empty() {
            Err(Error::NothingToBackUp)
        } else {
            Ok(all)
        };
    };
    let found = find_disks(disks, listed.iter().map(|asked| (asked.name.as_str(), asked.at)))?;
    let mut chosen = Chosen::new();
    for (asked, disk) in listed.iter().zip(found) {
        let (name, at) = (asked.name.clone(), asked.at);
        if !asked.backup {
            continue;
        }
        if !disk.has_medium() {
            return Err(Error::NoMedium { name, at });
        }
        if let Some(kind) = disk.passed_through {
            return Err(Error::PassedThrough { name, kind, at });
        }
        chosen.push((disk, Some(asked)));
    }
    if chosen.is_empty() {
        Err(Error::NothingToBackUp)
    } else {
        Ok(chosen)
    }
}

/// Returns the devices and disks that no backup of the domain can include.
fn not_in_backup(disks: &[Disk], outside: &[Outside]) -> Vec<Outside> {
    let passed_through = disks.iter().filter_map(|disk| {
        Some(Outside {
            kind: disk.passed_through?.to_owned(),
            name: disk.name.clone(),
        })
    });
    outside.iter().cloned().chain(passed_through).collect()
}

fn check_files(definition: &Definition, count: usize) -> Result<(), Error> {
    let mut used = vec![false; count];
    for disk in selected(definition) {
        if let Some(Target::Fd(index)) = disk.target {
            let slot = usize::try_from(index).ok().and_then(|index| used.get_mut(index));
            *slot.ok_or(Error::NoSuchFile {
                index,
                count,
                at: disk.at,
            })? = true;
        }
    }
    match used.iter().position(|used| !used) {
        Some(index) => Err(Error::UnusedFile { index }),
        None => Ok(()),
    }
}

/// Merges a value that the document and an option can set. Fails if they differ.
fn agreed<T: PartialEq>(
    what: &'static str,
    document: Option<T>,
    option: Option<T>,
) -> Result<Option<T>, Error> {
    match (document, option) {
        (Some(document), Some(option)) if document != option => Err(Error::Disagreement { what }),
        (document, option) => Ok(document.or(option)),
    }
}

/// Returns the kind of backup requested for one disk. A disk's own setting takes precedence.
fn wanted(
    definition: &Definition,
    options: &Options,
    asked: Option<&DiskDefinition>,
) -> Result<BaseRequest, Error> {
    let since = |checkpoint: &CheckpointRef| BaseRequest::Checkpoint {
        name: checkpoint.name.clone(),
        at: checkpoint.at,
    };
    let disagreement = Err(Error::Disagreement { what: "incremental" });
    let all = match (&definition.incremental, &options.incremental) {
        (Some(document), Some(Incremental::Since(name))) if document.name == *name => since(document),
        (Some(_), Some(_)) => return disagreement,
        (Some(document), None) => since(document),
        (None, Some(Incremental::Full)) => BaseRequest::Full,
        (None, Some(Incremental::Since(name))) => BaseRequest::Checkpoint {
            name: name.clone(),
            at: Position::default(),
        },
        (None, Some(Incremental::Auto) | None) => BaseRequest::Auto,
    };
    match (asked.and_then(|asked| asked.mode.as_ref()), all) {
        (None, all) => Ok(all),
        (Some(BackupMode::Full), _) => Ok(BaseRequest::Full),
        (Some(BackupMode::Incremental(_)), BaseRequest::Full) => disagreement,
        (Some(BackupMode::Incremental(Some(checkpoint))), _) => Ok(since(checkpoint)),
        (Some(BackupMode::Incremental(None)), BaseRequest::Auto) => Ok(BaseRequest::Newest),
        (Some(BackupMode::Incremental(None)), all) => Ok(all),
    }
}

fn disk_plan(
    disk: &Disk,
    asked: Option<&DiskDefinition>,
    store: Option<&Store>,
    candidates: &Candidates,
    wanted: &BaseRequest,
) -> Result<DiskPlan, Error> {
    let format = asked.and_then(|asked| asked.format).unwrap_or(Format::Qcow2);
    let refused = match (store, format) {
        (None, _) => Some(FullReason::Outside),
        (_, Format::Raw) => Some(FullReason::Raw),
        _ => None,
    };
    let mode = checkpoint::choose(disk, candidates, wanted, refused)?;
    let only_allocated = EXACT_FORMATS.contains(&disk.format.as_str()) && !disk.has_backing;
    let target = match asked.and_then(|asked| asked.target.as_ref()) {
        None => TargetPlan::InStore {
            file_name: format!("{}.{}", file_stem(&disk.name), format.as_str()),
        },
        Some(Target::File(path)) => TargetPlan::File(path.clone()),
        Some(Target::Block(path)) => TargetPlan::Block(path.clone()),
        Some(Target::Fd(index)) => TargetPlan::Descriptor(*index),
    };
    // In other cases QEMU allocates space in a raw target for zeroes too.
    let whole = match format == Format::Raw && !only_allocated {
        true => disk.virtual_size,
        false => disk.allocated,
    };
    let estimate = match &mode {
        Mode::Full { .. } => whole,
        Mode::Incremental(base) => {
            let bitmap = disk.bitmap(&base.bitmap);
            bitmap.map_or(whole, |bitmap| bitmap.dirty)
        }
    };
    Ok(DiskPlan {
        name: disk.name.clone(),
        node: disk.node.clone(),
        device: disk.device.clone(),
        virtual_size: disk.virtual_size,
        estimate,
        source: disk.source.clone(),
        encrypted: disk.encrypted,
        only_allocated,
        format,
        compress: asked.and_then(|asked| asked.compress),
        checkpoint: refused.is_none()
            && disk.keeps_bitmaps
            && candidates.may_add_bitmap(disk)
            && store.is_some_and(|store| store.checkpoints > 0),
        mode,
        target,
    })
}

/// Converts a disk's name to a file name. Characters that are special to a shell or a path become `%XX`, so two disks
/// never get the same name.
fn file_stem(disk: &str) -> String {
    let mut stem = String::with_capacity(disk.len());
    for (index, byte) in disk.bytes().enumerate() {
        let plain =
            byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-') || (byte == b'.' && index > 0);
        if plain {
            stem.push(char::from(byte));
        } else {
            stem.push_str(&format!("%{byte:02X}"));
        }
    }
    stem
}
