//! The targets of a job: prepared before it starts, published when it is complete, otherwise discarded.
//!
//! One module per kind of target. Knows files, directories and devices; not QEMU, jobs or callers. All functions
//! block: call them off the runtime. Dropping a [`Targets`] discards what is not published, unless the caller leaves
//! it to a later process of the service.

mod bases;
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
mod identity;
mod inside;
mod lock;
mod look;
mod loops;
mod opener;
mod pinned;
mod space;
mod sparse;
mod writeback;

pub use bases::Bases;
pub use block::device_path;
pub use device::{Devices, TargetId};
pub use digest::FileDigest;
pub use error::Error;
pub use find::Found;
pub use format::format;
pub use identity::{Holder, Sources};
pub use inside::directories_behind;
pub use lock::{ImageLock, is_in_use};
pub use look::protocol as look_protocol;
pub use look::{Look, VARIABLE as LOOK_VARIABLE, serve as serve_look};
pub use opener::{Opener, opener};
pub use pinned::{Pinned, check_pinned, pin};
pub use space::device_for_restore;
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
use crate::files::FileId;
use crate::offload::Progress;
use crate::plan::{Destination, DiskPlan, Plan, TargetPlan};
use crate::store::{self, BackupName, Published, Staging};

/// How many bytes at the beginning of a block device a failed backup wipes, in bytes. No header remains.
pub const WIPED_HEAD: u64 = 1 << 20;

/// The state of the host that the checks of targets need.
#[derive(Debug)]
pub struct Around {
    /// The way to inspect the open files of other processes.
    pub look: Look,
    /// The files that the domains have open.
    pub sources: Sources,
    /// The process whose open images may be read to estimate the space that the backup needs: a configured domain's QEMU.
    pub process: Option<u32>,
    /// The caller is root and may learn which process or domain uses a target.
    pub for_root: bool,
    /// The mark of the store, if the targets are in a store.
    pub mark: Option<String>,
    /// The devices that the caller was authorised for.
    pub devices: Devices,
    /// The files at the paths when the backup was queued.
    pub pinned: Vec<Pinned>,
    /// The job restores a stored backup.
    pub is_restore: bool,
}

/// The type of a target's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Media {
    Regular,
    Block,
}

/// How a target is published.
#[derive(Debug)]
enum Publication {
    /// A file in the staging directory of a store, which is renamed as a whole.
    InStore { file_name: String },
    /// A file under a staging name, which is renamed.
    Rename(file::StagedFile),
    /// A descriptor of the caller or an existing file, which stays in place.
    InPlace,
}

/// The target of one disk, open and checked.
#[derive(Debug)]
pub struct Target {
    pub disk: String,
    /// The final path of the data, for messages.
    pub label: String,
    pub media: Media,
    /// Closing it waits for its storage, so the last owner must be a thread that may block.
    file: Arc<OwnedFd>,
    id: FileId,
    /// The identity of a block device, if the kernel has one.
    device: Option<DeviceId>,
    publication: Publication,
    /// Existing content may have been changed.
    written: AtomicBool,
    /// Zeroes become holes.
    sparse: bool,
    /// Keeps other QEMUs from opening an existing target.
    lock: Option<ImageLock>,
}

/// Returns the final path of a disk's data, for messages.
pub fn label(plan: &Plan, disk: &DiskPlan, id: &str) -> String {
    match (&disk.target, &plan.destination) {
        (TargetPlan::InStore { file_name }, Destination::Store { path, directory, .. }) => {
            let domain = directory.as_str();
            let file = store::location_of(path, BackupName { domain, id }, file_name);
            file.display().to_string()
        }
        (TargetPlan::InStore { file_name }, Destination::Caller) => file_name.clone(),
        (TargetPlan::File(path) | TargetPlan::Block(path), _) => path.display().to_string(),
        (TargetPlan::Descriptor(index), _) => format!("fd:{index}"),
    }
}

impl Target {
    /// Duplicates the descriptor for QEMU.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(rustix::io::fcntl_dupfd_cloexec(&self.file, 3)?)
    }
}

/// Durable files that the service does not read again soon. Closing them waits for their storage.
#[derive(Debug, Default)]
pub struct Cached(Vec<Arc<OwnedFd>>);

impl Cached {
    /// Drops their pages from the page cache. Blocks.
    pub fn release(self) {
        for file in self.0 {
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        }
    }
}

/// All targets of one job.
#[derive(Debug)]
pub struct Targets {
    targets: Vec<Target>,
    staging: Option<Box<dyn Staging>>,
    /// The locks on the backing images.
    bases: Bases,
    writeback: Writeback,
    /// The targets are published, discarded, or left to a later process, so drop does nothing.
    settled: bool,
}

impl Targets {
    /// Opens or creates every target of `plan` and checks it. Does not change existing content.
    ///
    /// `id` is the backup's; `files` are the descriptors of the call.
    pub fn prepare(plan: &Plan, id: &str, files: &[OwnedFd], around: &Around) -> Result<Self, Error> {
        let mut targets = Self {
            targets: Vec::new(),
            staging: None,
            bases: Bases::lock(plan)?,
            writeback: Writeback::default(),
            settled: false,
        };
        if let Destination::Store { path, directory, .. } = &plan.destination {
            let name = BackupName {
                domain: directory.as_str(),
                id,
            };
            let store = store::open(path)?;
            if let Some(mark) = &around.mark {
                store.check_mark(mark)?;
            }
            targets.staging = Some(store.stage(name)?);
        }
        for (index, disk) in plan.disks.iter().enumerate() {
            let target = targets.open(plan, disk, index, id, files);
            let target = target.map_err(|error| error.of(&disk.name))?;
            if let TargetPlan::Block(path) = &disk.target {
                around.devices.check(path, &target)?;
            }
            if let TargetPlan::File(path) | TargetPlan::Block(path) = &disk.target {
                pinned::check_opened(&around.pinned, path, &target)?;
            }
            targets.targets.push(target);
        }
        for (target, disk) in targets.targets.iter().zip(&plan.disks) {
            check::source(target, around)?;
            check::outside_stores(target)?;
            check::distinct(target, &targets.targets)?;
            check::single_link(target, &disk.target, around.is_restore)?;
            check::content(target, disk, plan.reuse_external).map_err(|error| error.of(&disk.name))?;
        }
        space::check(&targets.targets, plan, around)?;
        check::unused(&mut targets.targets, around)?;
        fault::passed("prepared");
        Ok(targets)
    }

    /// Truncates existing content: the point of no return for existing files. A raw image gets its size; for other
    /// formats an empty image is created. Each target counts as progress.
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

    /// Returns the backup if it had its final name and its manifest when it was found. It is then complete.
    pub fn published(&self) -> Option<&Published> {
        self.staging.as_ref()?.published()
    }

    /// Releases the locks of the service. The caller makes sure that QEMU has opened all targets: QEMU holds its own
    /// locks as long as it writes.
    pub fn unlock(&self) {
        let locks = self.targets.iter().filter_map(|target| target.lock.as_ref());
        locks.for_each(ImageLock::release);
    }

    /// Whether the targets are in a store, where a manifest is stored beside the images.
    pub fn in_store(&self) -> bool {
        self.staging.is_some()
    }

    /// Returns the identities of the targets, in the plan's order.
    pub fn files(&self) -> Vec<TargetId> {
        self.targets.iter().map(TargetId::of).collect()
    }

    /// The early write-back while QEMU copies. Images in a store stay in the page cache, because the service reads
    /// them again for their digests.
    pub fn writeback(&self) -> &Writeback {
        &self.writeback
    }

    /// Stops new write-backs and waits for running ones. Fails if one has failed, because no later process would see
    /// that error. Blocks.
    pub fn close_writeback(&self) -> Result<(), Error> {
        (0..self.targets.len()).try_for_each(|index| self.writeback.close_target(index))
    }

    /// Makes the data durable, before it is published. Returns the digests in the plan's order, or `None` if it is
    /// cancelled. QEMU has closed the targets, so no byte changes between the digest and the fsync.
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

    /// Whether the images match `digests`, in the plan's order. `None` if it is cancelled.
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

    /// Starts early write-back. The targets have their lengths from before the copying.
    fn set_writeback(&mut self) {
        let again = |target: &Target| match &target.publication {
            Publication::InStore { file_name } => self.staging.as_ref()?.open_again(file_name, target.id),
            _ => None,
        };
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
                // Many clusters and tables of a qcow2 image are mostly zeroes.
                How::DigestAndWriteBack => run.digging().clean_to(self.writeback.clean_to(index)),
                How::Digest | How::WriteBack => run,
            })
        });
        let runs = runs.collect::<Result<Vec<_>, _>>()?;
        digest::go_through(&runs, end, failed, progress, cancel)
    }

    /// Publishes all targets durably. `records` are the names and contents of the files beside a store's images.
    /// After a failure, discarding also removes what was published. Each file counts as progress.
    pub fn publish(&mut self, records: &[(&str, &[u8])], progress: &Progress) -> Result<(), Error> {
        self.bases.check()?;
        if let Some(staging) = &mut self.staging {
            staging.publish(records)?;
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

    /// Removes new files, and makes written existing targets unreadable. Keeps a backup that was found complete
    /// ([`Targets::published`]), because others may depend on it. Drop does the same. Returns true if nothing
    /// remains. Each file counts as progress.
    pub fn discard(mut self, progress: &Progress) -> bool {
        self.clear(progress)
    }

    /// Returns the files whose pages in the page cache the job does not need any more.
    pub fn cached(&self) -> Cached {
        Cached(self.targets.iter().map(|target| target.file.clone()).collect())
    }

    /// Leaves all targets unchanged, because they are published, or a later process of the service resumes the job.
    /// The returned value keeps the backing images locked.
    pub fn leave(mut self) -> Bases {
        self.settled = true;
        std::mem::take(&mut self.bases)
    }

    fn open(
        &self,
        plan: &Plan,
        disk: &DiskPlan,
        index: usize,
        id: &str,
        files: &[OwnedFd],
    ) -> Result<Target, Error> {
        match (&disk.target, &self.staging) {
            (TargetPlan::InStore { file_name }, Some(staging)) => {
                let file = staging.create_image(file_name)?;
                Target::in_store(&disk.name, &**staging, file_name, file)
            }
            (TargetPlan::InStore { .. }, None) => Err(Error::NoStore),
            (TargetPlan::File(path), _) if plan.reuse_external => file::open_existing(&disk.name, path),
            (TargetPlan::File(path), _) => file::create(&disk.name, path, id, index),
            (TargetPlan::Block(path), _) => block::open(&disk.name, path),
            (TargetPlan::Descriptor(index), _) => descriptor::take(&disk.name, *index, files),
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
                "keeping a complete backup of an unfinished job: the catalog may be an old copy"
            );
            self.staging = None;
        }
        let mut clear = true;
        // A directory with a backup's name must always be a complete backup, so remove the name first.
        if let Some(staging) = &mut self.staging
            && let Err(error) = staging.retract()
        {
            tracing::error!(%error, "cannot unpublish a failed backup: do not use it");
            clear = false;
        }
        for target in &self.targets {
            if let Err(error) = target.discard(self.staging.as_deref()) {
                tracing::error!(target = target.label, %error, "cannot remove a partial image");
                clear = false;
            }
            progress.add(1);
        }
        if let Some(staging) = &self.staging
            && let Err(error) = staging.discard()
        {
            tracing::error!(%error, "cannot remove the directory of a partial backup");
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

    /// An image in the staging directory of a store.
    fn in_store(disk: &str, staging: &dyn Staging, file_name: &str, file: OwnedFd) -> Result<Self, Error> {
        let label = staging.location_of(file_name).display().to_string();
        let file_name = file_name.to_owned();
        Self::new(disk, label, file, Publication::InStore { file_name })
    }

    /// Whether the target existed before the backup, so that truncating it may lose data.
    pub fn has_content(&self) -> bool {
        matches!(self.publication, Publication::InPlace)
    }

    /// Records that QEMU may write into the target from now on. Returns whether that was recorded before.
    pub fn mark_written(&self) -> bool {
        self.written.swap(true, Ordering::Relaxed)
    }

    /// Whether existing content may have been changed. Set before each write.
    pub fn written(&self) -> &AtomicBool {
        &self.written
    }

    /// Called after the whole file was processed.
    fn make_durable(&self, how: How) -> Result<(), Error> {
        self.fsync()?;
        if self.sparse && how == How::WriteBack {
            // Only after the data is durable: before, data that is not written back could look like a hole.
            sparse::punch_holes(&self.file)
                .map_err(|errno| Error::io("make sparse", &self.label, errno).of(&self.disk))?;
            self.fsync()?;
        }
        Ok(())
    }

    fn fsync(&self) -> Result<(), Error> {
        rustix::fs::fsync(&self.file).map_err(|errno| Error::io("fsync", &self.label, errno).of(&self.disk))
    }

    /// Removes the name, then truncates the file. A descriptor that QEMU still has would keep the space of a file
    /// that is only unlinked, and a block device has no name to remove.
    fn discard(&self, staging: Option<&dyn Staging>) -> io::Result<()> {
        let removed = match &self.publication {
            Publication::InStore { file_name } => staging
                .map_or(Ok(()), |staging| staging.remove_image(file_name))
                .map_err(io::Error::other),
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
