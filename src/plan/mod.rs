//! Turns a caller's request into a plan, with every default made explicit.
//!
//! Pure: it combines a document, the options of a call, the domain's disks and the configured stores, and touches
//! nothing. A [`Plan`] that exists names only disks that exist and have a medium, and one place for each.

mod chain;
mod checkpoint;
mod error;
mod requested;
pub mod retention;
#[cfg(test)]
mod tests;

pub use chain::{
    Base, Earlier, EarlierDisk, Mode, Wanted, Why, checkpoint_of_sentinel, sentinel_name, was_never_smaller,
};
pub use checkpoint::{CheckpointOption, Existing, Obstacle, checkpoint};
pub use error::Error;
pub use requested::{PlaceKind, Requested, requested};

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::{DEFAULT_STORE, Store};
use crate::definition::{
    BackupMode, CheckpointRef, Definition, DiskDefinition, Position, Quiesce, StoreRef, Target,
};
use crate::domain::{Disk, DiskLookup, find_disk};
use crate::model::{Checkpoint, Compression, DomainDir, Format, Kind, Outside};

/// What a call says beside its document.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Options {
    /// Targets exist and are written into.
    pub reuse_external: bool,
    /// Bytes a second, all disks together.
    pub bandwidth: Option<u64>,
    /// How long the guest's writes may take, in milliseconds; 0 is no limit. Nothing: as the configuration says.
    pub max_latency: Option<u32>,
    pub quiesce: Option<Quiesce>,
    pub incremental: Option<Incremental>,
    pub checkpoint: Option<CheckpointOption>,
    /// A guest that powers off takes its QEMU, and so the backup, with it.
    pub allow_poweroff: bool,
    /// None is made that lacks data of the guest's that cannot be in it.
    pub require_all_disks: bool,
}

/// How much a call wants to be copied of the disks of which the document says nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Incremental {
    /// What changed since the newest backup in the store, of each disk of which that is known.
    Auto,
    Full,
    /// What changed since that checkpoint.
    Since(String),
}

/// What will be done, whole. Immutable once it is made. A later process of the service reads it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub name: Option<String>,
    pub description: Option<String>,
    pub destination: Destination,
    pub reuse_external: bool,
    /// Bytes a second, all disks together; 0 is unlimited.
    pub bandwidth: u64,
    /// How long the guest's writes may take, in milliseconds, before the backup becomes slower.
    #[serde(default)]
    pub max_latency: Option<NonZeroU32>,
    pub quiesce: Option<Quiesce>,
    /// A guest that powers off is kept, paused, until the backup has ended.
    pub hold_poweroff: bool,
    /// What is said of the checkpoint that the backup begins.
    #[serde(default)]
    pub checkpoint: Option<Checkpoint>,
    /// At least one; none where backups are verified or served.
    pub disks: Vec<DiskPlan>,
    /// Disks of the domain that are left out.
    pub excluded: Vec<String>,
    /// What the domain has beside its disks, and disks that no backup can hold.
    #[serde(default)]
    pub outside: Vec<Outside>,
    #[serde(default)]
    pub task: Task,
}

/// What is done with the places.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Task {
    /// The domain's disks are copied to them.
    #[default]
    Backup,
    /// A stored backup's disks are.
    Restore(Stored),
    /// There are none: stored backups are read.
    Verify(Stored),
    /// There are none: a stored backup's disks are served.
    Export(Stored),
}

impl Task {
    /// The stored backup that it reads.
    pub fn stored(&self) -> Option<&Stored> {
        match self {
            Self::Backup => None,
            Self::Restore(stored) | Self::Verify(stored) | Self::Export(stored) => Some(stored),
        }
    }
}

/// A backup in a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    pub store: String,
    /// The directory's name in the store.
    pub domain: String,
    pub id: String,
}

/// Who chooses the places.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Destination {
    /// The service does, inside a store.
    Store {
        name: String,
        path: PathBuf,
        /// The domain's directory in the store.
        directory: DomainDir,
        /// The backup's number in the order of making in that directory.
        sequence: u64,
        /// The service that makes it.
        service: Uuid,
    },
    /// The caller named one for each disk.
    Caller,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPlan {
    pub name: String,
    /// QEMU's node to read.
    pub node: String,
    /// QEMU's path of the guest's device.
    #[serde(default)]
    pub device: String,
    /// What the guest sees, in bytes; the target gets exactly that.
    pub virtual_size: u64,
    /// What the data takes at most, as far as is known, in bytes.
    pub estimate: u64,
    /// The file with the disk's data, as its QEMU has it open, where what is in it is also in the backup.
    #[serde(default)]
    pub source: Option<PathBuf>,
    /// QEMU decrypts it: what is copied is plain text.
    #[serde(default)]
    pub encrypted: bool,
    /// What the disk's image does not have reads as zeroes, so that a copy of all of it can leave that out.
    pub only_allocated: bool,
    pub format: Format,
    pub compress: Option<Compression>,
    #[serde(default)]
    pub mode: Mode,
    /// A later backup can go on from this one: what is written from its instant on is recorded.
    #[serde(default)]
    pub checkpoint: bool,
    pub place: Place,
}

impl DiskPlan {
    /// A disk of a stored backup that is restored into the caller's descriptor at `index`.
    pub fn of_stored(name: &str, virtual_size: u64, estimate: u64, format: Format, index: u32) -> Self {
        Self {
            name: name.to_owned(),
            node: String::new(),
            device: String::new(),
            virtual_size,
            estimate,
            source: None,
            encrypted: false,
            only_allocated: true,
            format,
            compress: None,
            mode: Mode::default(),
            checkpoint: false,
            place: Place::Descriptor(index),
        }
    }
}

/// Where one disk's data goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// A file of this name in the backup's own directory of a store.
    InStore {
        file_name: String,
    },
    File(PathBuf),
    Block(PathBuf),
    /// The caller's descriptor at this index.
    Descriptor(u32),
}

/// The formats that tell data from holes, as QEMU calls them: what is not allocated reads as zeroes where there is no backing
/// file, in all drivers that support one (QEMU's `bdrv_co_block_status`). A raw image may tell so too, but of NBD and iSCSI a
/// hole need not read as zeroes, and of a file QEMU takes all as allocated.
const EXACT_FORMATS: [&str; 3] = ["qcow2", "qed", "vmdk"];

impl DiskPlan {
    /// Whether QEMU first looks what the disk's image has, and copies only that.
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
    /// The new backup's number in the order of making in that directory.
    pub sequence: u64,
    pub service: Uuid,
    pub past: Past,
}

/// What the domain has of former backups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Past {
    /// Its backups in the store that is asked for, from the newest on.
    pub earlier: Vec<Earlier>,
    pub checkpoints: Vec<Existing>,
    /// The administrator wants checkpoints also on disks whose images hold internal snapshots.
    pub records_over_snapshots: bool,
}

impl Past {
    /// Whether a backup may begin to record what is written to the disk, where its image can keep that.
    fn may_record(&self, disk: &Disk) -> bool {
        self.records_over_snapshots || !disk.has_snapshots
    }
}

/// Makes the plan.
///
/// `disks` are the domain's now, `outside` what it has beside them; `store` is the one that [`store`] returns; `files` counts the descriptors that came with
/// the call.
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
    let nothing = Past::default();
    let past = store.as_ref().map_or(&nothing, |chosen| &chosen.past);
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
        disk_plan(disk, asked, settings, past, &wanted)
    });
    let mut planned = planned.collect::<Result<Vec<_>, _>>()?;
    let max_latency = options.max_latency.and_then(NonZeroU32::new);
    let checkpoint = checkpoint::of_backup(
        options.checkpoint.as_ref(),
        settings,
        disks,
        &past.checkpoints,
        &mut planned,
    );
    Ok(Plan {
        checkpoint: checkpoint.map_err(|error| Error::Checkpoint(Box::new(error)))?,
        disks: planned,
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
        task: Task::Backup,
        excluded,
        outside,
    })
}

/// The store that a request goes to, with its name; nothing where it goes to places of the caller's.
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
    /// What the backup is, as a whole.
    pub fn kind(&self) -> Kind {
        chain::kind(self.disks.iter().map(|disk| &disk.mode))
    }

    /// Whether it is copied in small steps, one after the other, so that a write of the guest's waits for little of it.
    pub fn copies_in_small_steps(&self) -> bool {
        self.max_latency.is_some()
    }

    /// Whether something is written into that is there already, and that another domain may have open.
    pub fn writes_into_existing(&self) -> bool {
        self.disks.iter().any(|disk| match disk.place {
            Place::InStore { .. } => false,
            Place::File(_) => self.reuse_external,
            Place::Block(_) | Place::Descriptor(_) => true,
        })
    }

    /// What is done with a stored backup.
    pub fn of_stored(task: Task, disks: Vec<DiskPlan>) -> Self {
        Self {
            name: None,
            description: None,
            destination: Destination::Caller,
            reuse_external: false,
            bandwidth: 0,
            max_latency: None,
            quiesce: None,
            hold_poweroff: false,
            checkpoint: None,
            disks,
            excluded: Vec::new(),
            outside: Vec::new(),
            task,
        }
    }

    /// The word of the interface for what is done.
    pub fn mode(&self) -> &'static str {
        match self.task {
            Task::Backup => "push",
            Task::Restore(_) => "restore",
            Task::Verify(_) => "verify",
            Task::Export(_) => "export",
        }
    }

    /// The document with every default filled in; every disk of the domain is in it.
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
                (_, Mode::Since(base)) => Some(BackupMode::Incremental(Some(CheckpointRef {
                    name: base.backup.clone(),
                    at: Position::default(),
                }))),
            },
            target: match &disk.place {
                Place::InStore { .. } => None,
                Place::File(path) => Some(Target::File(path.clone())),
                Place::Block(path) => Some(Target::Block(path.clone())),
                Place::Descriptor(index) => Some(Target::Fd(*index)),
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

/// The disks to back up, with what the document says of each.
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
    let mut seen: BTreeMap<&str, &DiskDefinition> = BTreeMap::new();
    let mut chosen = Chosen::new();
    for asked in listed {
        let (name, at) = (asked.name.clone(), asked.at);
        let disk = match find_disk(disks, &asked.name) {
            DiskLookup::Found(disk) => disk,
            DiskLookup::Missing => return Err(Error::NoSuchDisk { name, at }),
            DiskLookup::Ambiguous => return Err(Error::AmbiguousDisk { name, at }),
        };
        if let Some(first) = seen.insert(&disk.name, asked) {
            return Err(Error::SameDisk {
                first: first.name.clone(),
                name,
                at,
            });
        }
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

/// What no backup of the domain holds, in whatever way it is asked for.
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

/// What the document says and an option says too must agree.
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

/// How much a request wants of one disk. What is said of the disk counts before what is said of all.
fn wanted(
    definition: &Definition,
    options: &Options,
    asked: Option<&DiskDefinition>,
) -> Result<Wanted, Error> {
    let since = |checkpoint: &CheckpointRef| Wanted::Since {
        checkpoint: checkpoint.name.clone(),
        at: checkpoint.at,
    };
    let disagreement = Err(Error::Disagreement { what: "incremental" });
    let all = match (&definition.incremental, &options.incremental) {
        (Some(document), Some(Incremental::Since(name))) if document.name == *name => since(document),
        (Some(_), Some(_)) => return disagreement,
        (Some(document), None) => since(document),
        (None, Some(Incremental::Full)) => Wanted::Full,
        (None, Some(Incremental::Since(name))) => Wanted::Since {
            checkpoint: name.clone(),
            at: Position::default(),
        },
        (None, Some(Incremental::Auto) | None) => Wanted::Auto,
    };
    match (asked.and_then(|asked| asked.mode.as_ref()), all) {
        (None, all) => Ok(all),
        (Some(BackupMode::Full), _) => Ok(Wanted::Full),
        (Some(BackupMode::Incremental(_)), Wanted::Full) => disagreement,
        (Some(BackupMode::Incremental(Some(checkpoint))), _) => Ok(since(checkpoint)),
        (Some(BackupMode::Incremental(None)), Wanted::Auto) => Ok(Wanted::Newest),
        (Some(BackupMode::Incremental(None)), all) => Ok(all),
    }
}

fn disk_plan(
    disk: &Disk,
    asked: Option<&DiskDefinition>,
    store: Option<&Store>,
    past: &Past,
    wanted: &Wanted,
) -> Result<DiskPlan, Error> {
    let format = asked.and_then(|asked| asked.format).unwrap_or(Format::Qcow2);
    let refused = match (store, format) {
        (None, _) => Some(Why::Outside),
        (_, Format::Raw) => Some(Why::Raw),
        _ => None,
    };
    let mode = chain::choose(disk, past, wanted, refused)?;
    let only_allocated = EXACT_FORMATS.contains(&disk.format.as_str()) && !disk.has_backing;
    let place = match asked.and_then(|asked| asked.target.as_ref()) {
        None => Place::InStore {
            file_name: format!("{}.{}", file_stem(&disk.name), format.as_str()),
        },
        Some(Target::File(path)) => Place::File(path.clone()),
        Some(Target::Block(path)) => Place::Block(path.clone()),
        Some(Target::Fd(index)) => Place::Descriptor(*index),
    };
    // Otherwise QEMU reserves space in a raw target for zeroes too.
    let whole = match format == Format::Raw && !only_allocated {
        true => disk.virtual_size,
        false => disk.allocated,
    };
    let estimate = match &mode {
        Mode::Full { .. } => whole,
        Mode::Since(base) => {
            let bitmap = disk.bitmaps.iter().find(|bitmap| bitmap.name == base.bitmap);
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
            && past.may_record(disk)
            && store.is_some_and(|store| store.checkpoints > 0),
        mode,
        place,
    })
}

/// A disk's name as a file's: what could mean something to a shell or a path is written as `%XX`, so that two
/// disks never share a name.
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
