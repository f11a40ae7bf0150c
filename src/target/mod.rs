//! Targets for the data: prepared before a backup starts, published when it is complete, discarded otherwise.
//!
//! One module a kind. Knows files, directories and devices; not QEMU, jobs or callers. All of it blocks: call it
//! off the runtime. A [`Targets`] discards what it has not published when it is dropped, unless it is left to a later
//! process of the service.

mod block;
mod check;
mod descriptor;
mod digest;
mod error;
mod file;
mod find;
mod format;
mod generation;
mod identity;
mod inside;
mod inventory;
mod lock;
mod mark;
mod naming;
mod opener;
mod parents;
mod protection;
mod removal;
mod replacement;
mod space;
mod sparse;
mod store;
mod writeback;

pub use block::device_path;
pub use digest::FileDigest;
pub use error::Error;
pub use find::Found;
pub use format::format;
pub use generation::{Raised, generation, raise_generation};
pub use identity::{FileId, Holder, Sources};
pub use inside::{directories_behind, store_around};
pub use inventory::{Held, Sharing, Shelf};
pub use lock::{ImageLock, is_in_use};
pub use mark::{DIRECTORY as STORE_DIRECTORY, check_mark, check_mark_of, make_mark};
pub use opener::{Opener, opener};
pub use parents::Parents;
pub use protection::protect;
pub use removal::{Removal, removed_backup, removed_name};
pub use replacement::{Replacement, replaced_backup};
pub use space::device_for_restore;
pub use store::{Published, ensure as ensure_store, partial_backup};
pub use writeback::Writeback;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::fs::FileType;
use tokio_util::sync::CancellationToken;

use digest::Reading;
use sparse::Digger;

use crate::fault;
use crate::offload::Progress;
use crate::plan::{Destination, DiskPlan, Place, Plan};

/// How many images are made durable at a time.
const WORKERS: usize = 4;
/// What a failed backup leaves of a block device's beginning: nothing that has a header.
pub const WIPED_HEAD: u64 = 1 << 20;

/// Which backup of a store; both become names of directories.
#[derive(Debug, Clone, Copy)]
pub struct BackupName<'a> {
    /// The domain's directory in the store.
    pub domain: &'a str,
    /// Unique in the store, and fit for a file's name.
    pub id: &'a str,
}

/// What is around a backup's targets on this host.
#[derive(Debug, Default)]
pub struct Around {
    /// What the domains have open.
    pub sources: Sources,
    /// The domain's QEMU.
    pub process: Option<u32>,
    /// Root asks, who may know who is in the way.
    pub for_root: bool,
    /// The mark of the store, where the targets are in one.
    pub mark: Option<String>,
}

/// What lies behind a target's descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Media {
    Regular,
    Block,
}

/// What becomes of the data in the end.
#[derive(Debug)]
enum Publication {
    /// A file in the directory of a store's backup, which is renamed as a whole.
    InStore { file_name: String },
    /// A file under a partial name that gets its own.
    Rename(file::Partial),
    /// The caller's or an existing one: it is where it is.
    InPlace,
}

/// One disk's place, open and checked.
#[derive(Debug)]
pub struct Target {
    pub disk: String,
    /// Where the data will be, for people.
    pub label: String,
    pub media: Media,
    /// Closing it waits for its storage, so the last one who has it is somebody who may wait.
    file: Arc<OwnedFd>,
    id: FileId,
    publication: Publication,
    /// Content that was there before may have been changed.
    written: AtomicBool,
    /// What reads as zeroes is to take no space.
    sparse: bool,
    /// Keeps other QEMUs from what was there before.
    lock: Option<ImageLock>,
}

/// Where a disk's data of a backup will be, for people.
pub fn label(plan: &Plan, disk: &DiskPlan, id: &str) -> String {
    match (&disk.place, &plan.destination) {
        (Place::InStore { file_name }, Destination::Store { path, directory, .. }) => {
            let file = path.join(directory.as_str()).join(id).join(file_name);
            file.display().to_string()
        }
        (Place::InStore { file_name }, Destination::Caller) => file_name.clone(),
        (Place::File(path) | Place::Block(path), _) => path.display().to_string(),
        (Place::Descriptor(index), _) => format!("fd:{index}"),
    }
}

impl Target {
    /// A descriptor of the same open file, for QEMU.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(rustix::io::fcntl_dupfd_cloexec(&self.file, 3)?)
    }
}

/// All places of one backup.
#[derive(Debug)]
pub struct Targets {
    targets: Vec<Target>,
    store: Option<store::Partial>,
    /// The backing images.
    parents: Parents,
    /// Published, discarded, or left to a later process: nothing is to be done when it is dropped.
    settled: bool,
}

impl Targets {
    /// Opens or creates every place of `plan` and checks it. No byte that was there before is changed.
    ///
    /// `id` is the backup's; `files` are the descriptors of the call.
    pub fn prepare(plan: &Plan, id: &str, files: &[OwnedFd], around: &Around) -> Result<Self, Error> {
        let mut targets = Self {
            targets: Vec::new(),
            store: None,
            parents: Parents::hold(plan)?,
            settled: false,
        };
        if let Destination::Store { path, directory, .. } = &plan.destination {
            let name = BackupName {
                domain: directory.as_str(),
                id,
            };
            targets.store = Some(store::Partial::create(path, name, around.mark.as_deref())?);
        }
        for (index, disk) in plan.disks.iter().enumerate() {
            let target = targets.open(plan, disk, index, id, files);
            targets
                .targets
                .push(target.map_err(|error| error.of(&disk.name))?);
        }
        for (target, disk) in targets.targets.iter().zip(&plan.disks) {
            check::source(target, around)?;
            check::outside_stores(target)?;
            check::twice(target, &targets.targets)?;
            check::names(target, &disk.place, &plan.task)?;
            check::content(target, disk, plan.reuse_external).map_err(|error| error.of(&disk.name))?;
        }
        space::check(&targets.targets, &plan.disks, &plan.task, around.process)?;
        check::unused(&mut targets.targets, around)?;
        fault::passed("prepared");
        Ok(targets)
    }

    /// Empties what was there before: the point of no return for existing files. Raw images get their size, others an empty
    /// image. Each counts as progress.
    pub fn format(&mut self, plan: &Plan, progress: &Progress) -> Result<(), Error> {
        let mut targets = self.targets.iter_mut().zip(&plan.disks);
        targets.try_for_each(|(target, disk)| {
            progress.add(1);
            target.format(disk).map_err(|error| error.of(&disk.name))
        })
    }

    pub fn iter(&self) -> impl Iterator<Item = &Target> {
        self.targets.iter()
    }

    /// The backup that these are, if it had its final name and its manifest when they were found: it is complete.
    pub fn published(&self) -> Option<&Published> {
        self.store.as_ref().and_then(store::Partial::published)
    }

    /// QEMU has locks of its own on all of them, and keeps these as long as it writes.
    pub fn unlock(&self) {
        let locks = self.targets.iter().filter_map(|target| target.lock.as_ref());
        locks.for_each(ImageLock::release);
    }

    /// Whether the places are in a store, where a manifest belongs beside the images.
    pub fn in_store(&self) -> bool {
        self.store.is_some()
    }

    /// Which files the targets are, in the plan's order.
    pub fn files(&self) -> Vec<FileId> {
        self.targets.iter().map(|target| target.id).collect()
    }

    /// For early write-back, while data is still being copied. Not of images in a store: they are read again for their digest,
    /// and what is written back leaves the memory, so that the device would have to read it.
    pub fn writeback(&self) -> Writeback {
        let sent = self.targets.iter().filter(|_| !self.in_store());
        sent.map(|target| target.file.clone()).collect()
    }

    /// Makes the data durable; returns the digests, in the plan's order, or nothing if it is cancelled. Several disks at a
    /// time. Nothing has its final name yet. QEMU has let go of the targets.
    pub fn seal(
        &self,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Option<Vec<FileDigest>>, Error> {
        self.each(|target| target.seal(self.in_store(), progress, cancel))
    }

    /// Whether the images are what `digests` say, in the plan's order; nothing if it is cancelled.
    pub fn prove(
        &self,
        digests: &[FileDigest],
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Option<bool>, Error> {
        let found = self.each(|target| target.digest(self.in_store(), progress, cancel))?;
        Ok(found.map(|found| found == digests))
    }

    /// The digest that `find` gives of each target, in the plan's order; nothing if one gives nothing.
    fn each(
        &self,
        find: impl Fn(&Target) -> Result<Option<FileDigest>, Error> + Sync,
    ) -> Result<Option<Vec<FileDigest>>, Error> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut found = Vec::new();
            while let Some(target) = self.targets.get(next.fetch_add(1, Ordering::Relaxed)) {
                found.push((target.id, find(target)?));
            }
            Ok::<_, Error>(found)
        };
        let workers = self.targets.len().min(WORKERS);
        let found = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            let found = workers.into_iter().map(|worker| match worker.join() {
                Ok(found) => found,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            found.collect::<Result<Vec<_>, Error>>()
        })?;
        let found: HashMap<FileId, Option<FileDigest>> = found.into_iter().flatten().collect();
        let digests = self.targets.iter().map(|target| found.get(&target.id)?.clone());
        Ok(digests.collect())
    }

    /// Gives everything its final name, durably. `records` are names and contents of the files that go beside a
    /// store's images. What fails half-way is taken back with the rest when it is discarded. Each file
    /// counts as progress.
    pub fn publish(&mut self, records: &[(&str, &[u8])], progress: &Progress) -> Result<(), Error> {
        self.parents.check()?;
        if let Some(store) = &mut self.store {
            store.publish(records)?;
        }
        for target in &mut self.targets {
            progress.add(1);
            if let Publication::Rename(partial) = &mut target.publication {
                let published = partial.publish(target.id, &target.disk, &target.label);
                published.map_err(|error| error.of(&target.disk))?;
            }
        }
        Ok(())
    }

    /// Removes what was made and makes unreadable what was written into; but not what was found [`Targets::published`], which
    /// others may depend on. Dropping does the same. Says whether nothing is left.
    /// Each file counts as progress.
    pub fn discard(mut self, progress: &Progress) -> bool {
        self.clear(progress)
    }

    /// Leaves everything as it is: it is published, or a later process of the service resumes it. The backing images
    /// are not removed until the returned value is dropped.
    pub fn leave(mut self) -> Parents {
        self.settled = true;
        std::mem::take(&mut self.parents)
    }

    fn open(
        &self,
        plan: &Plan,
        disk: &DiskPlan,
        index: usize,
        id: &str,
        files: &[OwnedFd],
    ) -> Result<Target, Error> {
        match (&disk.place, &self.store) {
            (Place::InStore { file_name }, Some(store)) => store.create_file(&disk.name, file_name),
            (Place::InStore { .. }, None) => Err(Error::NoStore),
            (Place::File(path), _) if plan.reuse_external => file::open_existing(&disk.name, path),
            (Place::File(path), _) => file::create(&disk.name, path, id, index),
            (Place::Block(path), _) => block::open(&disk.name, path),
            (Place::Descriptor(index), _) => descriptor::take(&disk.name, *index, files),
        }
    }
}

impl Targets {
    fn clear(&mut self, progress: &Progress) -> bool {
        if std::mem::replace(&mut self.settled, true) {
            return true;
        }
        if let Some(published) = self.published() {
            tracing::warn!(
                backup = published.manifest.id,
                "a complete backup of an earlier time is left as it is: the catalog may be an old copy"
            );
            self.store = None;
        }
        let mut clear = true;
        // What has a backup's name is a whole backup, at any moment: the name goes first.
        if let Some(store) = &mut self.store
            && let Err(error) = store.retract()
        {
            tracing::error!(%error, "a backup that failed could not be taken back: do not use it");
            clear = false;
        }
        for target in &self.targets {
            if let Err(error) = target.discard(self.store.as_ref()) {
                tracing::error!(target = target.label, %error, "a partial image could not be removed");
                clear = false;
            }
            progress.add(1);
        }
        if let Some(store) = &self.store
            && let Err(error) = store.discard()
        {
            tracing::error!(%error, "a partial backup's directory could not be removed");
            clear = false;
        }
        clear
    }
}

impl Drop for Targets {
    fn drop(&mut self) {
        self.clear(&Progress::default());
    }
}

impl Target {
    fn new(disk: &str, label: String, file: OwnedFd, publication: Publication) -> Result<Self, Error> {
        let stat = rustix::fs::fstat(&file).map_err(|errno| Error::io("stat", &label, errno))?;
        let media = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Media::Regular,
            FileType::BlockDevice => Media::Block,
            _ => {
                return Err(Error::WrongType {
                    disk: disk.to_owned(),
                    target: label,
                    wanted: "a regular file or a block device",
                });
            }
        };
        Ok(Self {
            disk: disk.to_owned(),
            label,
            media,
            id: FileId::of(&stat),
            file: Arc::new(file),
            publication,
            written: AtomicBool::new(false),
            sparse: false,
            lock: None,
        })
    }

    /// Whether it may hold something that somebody would lose if it was emptied, before the backup begins.
    pub fn has_content(&self) -> bool {
        matches!(self.publication, Publication::InPlace)
    }

    /// From here on QEMU may write into it. Returns whether it was marked before.
    pub fn mark_written(&self) -> bool {
        self.written.swap(true, Ordering::Relaxed)
    }

    /// Whether earlier content may have been changed. It is set before each write.
    pub fn written(&self) -> &AtomicBool {
        &self.written
    }

    fn seal(
        &self,
        with_checksum: bool,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Option<FileDigest>, Error> {
        let reading = match with_checksum {
            true => Reading::DigestAndWriteBack,
            false => Reading::WriteBack,
        };
        let digger = (with_checksum && self.sparse).then(|| Digger::new(&self.file));
        let dug = digger.is_some();
        let digest = self.read(reading, digger, progress, cancel)?;
        if digest.is_some() {
            self.fsync()?;
            if self.sparse && !dug {
                // After the data is durable, or what is still on its way could be taken for a hole.
                sparse::dig(&self.file)
                    .map_err(|errno| Error::io("make sparse", &self.label, errno).of(&self.disk))?;
                self.fsync()?;
            }
        }
        Ok(digest)
    }

    fn digest(
        &self,
        with_checksum: bool,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Option<FileDigest>, Error> {
        let reading = match with_checksum {
            true => Reading::Digest,
            false => Reading::WriteBack,
        };
        self.read(reading, None, progress, cancel)
    }

    fn read(
        &self,
        reading: Reading,
        digger: Option<Digger>,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Option<FileDigest>, Error> {
        let digest = digest::read(&self.file, reading, digger, progress, cancel);
        digest.map_err(|errno| Error::io("read", &self.label, errno).of(&self.disk))
    }

    fn fsync(&self) -> Result<(), Error> {
        rustix::fs::fsync(&self.file).map_err(|errno| Error::io("fsync", &self.label, errno).of(&self.disk))
    }

    /// Removes the name, then the content: a descriptor that QEMU still holds would keep the space of a file that is
    /// only unlinked, and a block device has no name to be removed.
    fn discard(&self, store: Option<&store::Partial>) -> io::Result<()> {
        let removed = match &self.publication {
            Publication::InStore { file_name } => store.map_or(Ok(()), |store| store.remove_file(file_name)),
            Publication::Rename(partial) => partial.discard(self.id),
            Publication::InPlace => Ok(()),
        };
        if self.written.load(Ordering::Relaxed) {
            match self.media {
                Media::Regular => rustix::fs::ftruncate(&self.file, 0)?,
                Media::Block => {
                    rustix::io::pwrite(&self.file, &vec![0; WIPED_HEAD as usize], 0)?;
                    rustix::fs::fsync(&self.file)?;
                }
            }
        }
        removed
    }
}
