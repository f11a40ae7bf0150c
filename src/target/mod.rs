//! Places for the data: made ready before a backup starts, published when it is good, discarded when it is not.
//!
//! One module a kind. Knows files, directories and devices; not QEMU, jobs or callers. All of it blocks: call it
//! off the runtime. Whatever a [`Targets`] made and did not publish is gone when it is dropped.

mod block;
mod check;
mod descriptor;
mod error;
mod file;
mod identity;
mod path;
mod sparse;
mod store;
#[cfg(test)]
mod tests;

pub use error::Error;
pub use identity::{Holder, Sources};
pub use store::ensure as ensure_store;

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::FileType;

use crate::definition::Format;
use crate::plan::{Destination, DiskPlan, Place, Plan};
use identity::FileId;

/// What a failed backup leaves of a block device's beginning: nothing that has a header.
const WIPED_HEAD: usize = 1 << 20;

/// Which backup the places are for; both become names of directories.
#[derive(Debug, Clone, Copy)]
pub struct BackupName<'a> {
    pub domain: &'a str,
    /// Unique in the store, and fit for a file's name.
    pub id: &'a str,
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
    /// It reads as zeroes wherever nothing was written.
    pub blank: bool,
    file: OwnedFd,
    id: FileId,
    publication: Publication,
    /// Content that was there before may have been changed.
    touched: bool,
    /// What reads as zeroes is to take no space.
    sparse: bool,
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
    published: bool,
}

impl Targets {
    /// Opens or creates every place of `plan` and checks it, all before the first existing byte is changed.
    ///
    /// `files` are the descriptors of the call; `sources` is what the domains have open.
    pub fn prepare(
        plan: &Plan,
        name: BackupName,
        files: &[OwnedFd],
        sources: &Sources,
    ) -> Result<Self, Error> {
        let mut targets = Self {
            targets: Vec::new(),
            store: None,
            published: false,
        };
        if let Destination::Store { path, .. } = &plan.destination {
            targets.store = Some(store::Partial::create(path, name)?);
        }
        for (index, disk) in plan.disks.iter().enumerate() {
            let target = targets.open(plan, disk, index, name, files)?;
            targets.targets.push(target);
        }
        for (target, disk) in targets.targets.iter().zip(&plan.disks) {
            check::source(target, sources)?;
            check::twice(target, &targets.targets)?;
            check::content(target, disk, plan.reuse_external)?;
        }
        check::space(&targets.targets, &plan.disks)?;
        for (target, disk) in targets.targets.iter_mut().zip(&plan.disks) {
            target.make_blank(disk)?;
        }
        Ok(targets)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Target> {
        self.targets.iter()
    }

    /// Whether the places are in a store, where a manifest belongs beside the images.
    pub fn in_store(&self) -> bool {
        self.store.is_some()
    }

    /// Makes the data durable. Nothing has its final name yet. QEMU has let go of the targets.
    pub fn sync(&self) -> Result<(), Error> {
        self.targets.iter().try_for_each(Target::sync)
    }

    /// Gives everything its final name, durably. `records` are names and contents of the files that go beside a
    /// store's images. What fails half-way is taken back.
    pub fn publish(mut self, records: &[(&str, &[u8])]) -> Result<(), Error> {
        if let Some(store) = &mut self.store {
            store.publish(records)?;
        }
        for target in &mut self.targets {
            if let Publication::Rename(partial) = &mut target.publication {
                partial.publish(&target.disk, &target.label)?;
            }
        }
        self.published = true;
        Ok(())
    }

    /// Removes what was made and makes unreadable what was written into. Dropping does the same.
    pub fn discard(self) {
        drop(self);
    }

    fn open(
        &self,
        plan: &Plan,
        disk: &DiskPlan,
        index: usize,
        name: BackupName,
        files: &[OwnedFd],
    ) -> Result<Target, Error> {
        match (&disk.place, &self.store) {
            (Place::InStore { file_name }, Some(store)) => store.create_file(&disk.name, file_name),
            (Place::InStore { .. }, None) => Err(Error::NoStore),
            (Place::File(path), _) if plan.reuse_external => file::open_existing(&disk.name, path),
            (Place::File(path), _) => file::create(&disk.name, path, name.id, index),
            (Place::Block(path), _) => block::open(&disk.name, path),
            (Place::Descriptor(index), _) => descriptor::take(&disk.name, *index, files),
        }
    }
}

impl Drop for Targets {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        for target in &mut self.targets {
            if let Err(error) = target.discard(self.store.as_ref()) {
                tracing::error!(target = target.label, %error, "a partial image could not be removed");
            }
        }
        if let Some(store) = &self.store
            && let Err(error) = store.discard()
        {
            tracing::error!(%error, "a partial backup's directory could not be removed");
        }
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
            blank: false,
            id: FileId::of(&stat),
            file,
            publication,
            touched: false,
            sparse: false,
        })
    }

    /// Brings the place into the state in which QEMU takes it over: nothing in it, and a raw image's size.
    fn make_blank(&mut self, disk: &DiskPlan) -> Result<(), Error> {
        if self.media == Media::Block {
            self.touched = true;
            return Ok(());
        }
        let truncate = |size| {
            rustix::fs::ftruncate(&self.file, size).map_err(|errno| Error::io("truncate", &self.label, errno))
        };
        truncate(0)?;
        self.touched = true;
        self.blank = true;
        if disk.format == Format::Raw {
            self.sparse = true;
            rustix::fs::ftruncate(&self.file, disk.virtual_size)
                .map_err(|errno| Error::io("make as large as the disk", &self.label, errno))?;
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), Error> {
        let fsync = || rustix::fs::fsync(&self.file).map_err(|errno| Error::io("fsync", &self.label, errno));
        fsync()?;
        if self.sparse {
            // After the data is durable, or what is still on its way could be taken for a hole.
            sparse::dig(&self.file).map_err(|errno| Error::io("make sparse", &self.label, errno))?;
            fsync()?;
        }
        Ok(())
    }

    fn discard(&mut self, store: Option<&store::Partial>) -> io::Result<()> {
        match self.media {
            // A descriptor that QEMU still holds would keep the space of a file that is only unlinked.
            Media::Regular if self.touched => rustix::fs::ftruncate(&self.file, 0)?,
            Media::Block if self.touched => {
                rustix::io::pwrite(&self.file, &vec![0; WIPED_HEAD], 0)?;
                rustix::fs::fsync(&self.file)?;
            }
            Media::Regular | Media::Block => {}
        }
        match &mut self.publication {
            Publication::InStore { file_name } => store.map_or(Ok(()), |store| store.remove_file(file_name)),
            Publication::Rename(partial) => partial.discard(),
            Publication::InPlace => Ok(()),
        }
    }
}
