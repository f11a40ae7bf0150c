//! Targets for the data: prepared before a backup starts, published when it is complete, discarded otherwise.
//!
//! One module a kind. Knows files, directories and devices; not QEMU, jobs or callers. All of it blocks: call it
//! off the runtime. A [`Targets`] discards what it has not published when it is dropped, unless it is left to a later
//! process of the service.

mod block;
mod budget;
mod check;
mod descriptor;
mod device;
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
mod loops;
mod mark;
mod naming;
mod opener;
mod parents;
mod pinned;
mod protection;
mod removal;
mod replacement;
mod space;
mod sparse;
mod store;
mod writeback;

pub use block::device_path;
pub use device::{Devices, TargetId};
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
pub use pinned::{Pinned, check_pinned, pin};
pub use protection::protect;
pub use removal::{Removal, finish_removal, removed_backup, removed_name};
pub use replacement::{Replacement, replaced_backup};
pub use space::device_for_restore;
pub use store::{Published, ensure as ensure_store, partial_backup};
pub use writeback::{Pace, Writeback};

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FileType;
use tokio_util::sync::CancellationToken;

use device::DeviceId;
use digest::{How, Run};

use crate::fault;
use crate::offload::Progress;
use crate::plan::{Destination, DiskPlan, Place, Plan};

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
    /// The devices that the caller was authorised for.
    pub devices: Devices,
    /// What was at the paths when the backup was queued.
    pub pinned: Vec<Pinned>,
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
    /// A block device, where the kernel identifies it.
    device: Option<DeviceId>,
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

/// Durable files that nobody reads again soon. Closing them waits for their storage.
#[derive(Debug, Default)]
pub struct Cached(Vec<Arc<OwnedFd>>);

impl Cached {
    /// Gives the memory to others. Blocks.
    pub fn release(self) {
        for file in self.0 {
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        }
    }
}

/// All places of one backup.
#[derive(Debug)]
pub struct Targets {
    targets: Vec<Target>,
    store: Option<store::Partial>,
    /// The backing images.
    parents: Parents,
    writeback: Writeback,
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
            writeback: Writeback::default(),
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
            let target = target.map_err(|error| error.of(&disk.name))?;
            if let Place::Block(path) = &disk.place {
                around.devices.check(path, &target)?;
            }
            if let Place::File(path) | Place::Block(path) = &disk.place {
                pinned::check_opened(&around.pinned, path, &target)?;
            }
            targets.targets.push(target);
        }
        for (target, disk) in targets.targets.iter().zip(&plan.disks) {
            check::source(target, around)?;
            check::outside_stores(target)?;
            check::twice(target, &targets.targets)?;
            check::names(target, &disk.place, &plan.task)?;
            check::content(target, disk, plan.reuse_external).map_err(|error| error.of(&disk.name))?;
        }
        space::check(&targets.targets, plan, around.process)?;
        check::unused(&mut targets.targets, around)?;
        fault::passed("prepared");
        Ok(targets)
    }

    /// Empties what was there before: the point of no return for existing files. Raw images get their size, others an empty
    /// image. Each counts as progress.
    pub fn format(&mut self, plan: &Plan, progress: &Progress) -> Result<(), Error> {
        let small_steps = plan.copies_in_small_steps();
        for (target, disk) in self.targets.iter_mut().zip(&plan.disks) {
            progress.add(1);
            target
                .format(disk, small_steps)
                .map_err(|error| error.of(&disk.name))?;
        }
        self.set_writeback();
        Ok(())
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
    pub fn files(&self) -> Vec<TargetId> {
        self.targets.iter().map(TargetId::of).collect()
    }

    /// Sends to the device what is written, while more is being copied. Images in a store stay in memory, because they are read
    /// once more for their digests.
    pub fn writeback(&self) -> &Writeback {
        &self.writeback
    }

    /// Lets no write-back begin any more, and waits for those that run. Fails if one has failed: no later process would have that
    /// reported. Blocks.
    pub fn close_writeback(&self) -> Result<(), Error> {
        (0..self.targets.len()).try_for_each(|index| self.writeback.close_target(index))
    }

    /// Makes the data durable; returns the digests, in the plan's order, or nothing if it is cancelled. Nothing has its final name
    /// yet. QEMU has let go of the targets, so no byte changes between its digest and its fsync.
    pub fn seal(
        &self,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Option<Vec<FileDigest>>, Error> {
        let how = match self.in_store() {
            true => How::DigestAndWriteBack,
            false => How::WriteBack,
        };
        let end = |index: usize| {
            self.writeback.close_target(index)?;
            self.targets[index].make_durable(how)
        };
        self.go_through(how, end, progress, cancel)
    }

    /// Whether the images are what `digests` say, in the plan's order; nothing if it is cancelled.
    pub fn prove(
        &self,
        digests: &[FileDigest],
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Option<bool>, Error> {
        let how = match self.in_store() {
            true => How::Digest,
            false => How::WriteBack,
        };
        let found = self.go_through(how, |_| Ok(()), progress, cancel)?;
        Ok(found.map(|found| found == digests))
    }

    /// The targets have the lengths with which the copying begins.
    fn set_writeback(&mut self) {
        let again = |target: &Target| self.store.as_ref()?.open_again(target);
        self.writeback = Writeback::new(&self.targets, again);
    }

    fn go_through(
        &self,
        how: How,
        end: impl Fn(usize) -> Result<(), Error> + Sync,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Option<Vec<FileDigest>>, Error> {
        let failed = |index: usize, errno| {
            let target = &self.targets[index];
            Error::io("read", &target.label, errno).of(&target.disk)
        };
        let runs = self.targets.iter().enumerate().map(|(index, target)| {
            let run = Run::new(&target.file, how).map_err(|errno| failed(index, errno))?;
            Ok::<_, Error>(match how {
                // A qcow2 image has clusters that are mostly empty, and tables.
                How::DigestAndWriteBack => run.digging().clean_to(self.writeback.clean_to(index)),
                How::Digest | How::WriteBack => run,
            })
        });
        let runs = runs.collect::<Result<Vec<_>, _>>()?;
        digest::go_through(&runs, end, failed, progress, cancel)
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

    /// Its pages in memory, which are of no use to the backup any more.
    pub fn cached(&self) -> Cached {
        Cached(self.targets.iter().map(|target| target.file.clone()).collect())
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
            device: DeviceId::of_stat(&stat),
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

    /// All of it was gone through.
    fn make_durable(&self, how: How) -> Result<(), Error> {
        self.fsync()?;
        if self.sparse && how == How::WriteBack {
            // After the data is durable, or what is still on its way could be taken for a hole.
            sparse::dig(&self.file)
                .map_err(|errno| Error::io("make sparse", &self.label, errno).of(&self.disk))?;
            self.fsync()?;
        }
        Ok(())
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
