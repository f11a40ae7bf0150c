//! The chains of a backup's disks. Their backups stay locked; the images are opened disk by disk.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::backup::{Backup, Image};
use super::{Error, Fault, Finding};
use crate::model::{self, Format, Manifest};
use crate::store::{BackupLock, BackupName, Store};

/// The maximum number of images in a chain. QEMU can open more, and the service creates shorter chains.
pub const MAX_DEPTH: usize = 64;

/// A backup with its bases. None of them can change while this exists.
#[derive(Debug)]
pub struct Chain {
    pub manifest: Manifest,
    disks: Vec<DiskChain>,
}

/// The chain of one disk. Its images passed the checks of their lengths and headers.
#[derive(Debug, Clone)]
pub struct DiskChain {
    pub disk: String,
    /// Ordered from the image without a backing image upwards.
    links: Vec<(Link, Option<Format>)>,
    virtual_size: u64,
    estimate: u64,
}

/// The open images of one disk, each the backing image of the next. Each uses one descriptor.
#[derive(Debug, Clone)]
pub struct OpenDisk {
    pub disk: String,
    pub(super) images: Vec<Image>,
    /// Locks that keep the open images from changing.
    _locks: Vec<Arc<BackupLock>>,
}

impl Chain {
    /// Opens a backup with all its disks, or only the `wanted` ones. Fails with [`Error::NoSuchBackup`] if the backup
    /// itself does not exist, and with [`Error::Damaged`] if one of its bases does not. Blocks.
    pub fn open(store: &dyn Store, name: BackupName<'_>, wanted: Option<&[&str]>) -> Result<Self, Error> {
        let (id, mut links) = (name.id, Links::new(store, name.domain));
        let top = links.backup(id).map_err(|fault| match fault {
            Fault::Missing => Error::NoSuchBackup {
                wanted: id.to_owned(),
                store: store.location().display().to_string(),
            },
            fault => damaged(id, None, fault),
        })?;
        let manifest = top.manifest.clone();
        let has = |name: &str| manifest.disks.iter().any(|disk| disk.name == name);
        if let Some(missing) = wanted.unwrap_or_default().iter().find(|name| !has(name)) {
            let names = manifest.disks.iter().map(|disk| disk.name.as_str());
            return Err(Error::NoSuchDisk {
                backup: id.to_owned(),
                disk: (*missing).to_owned(),
                has: names.collect::<Vec<_>>().join(", "),
            });
        }
        let mut disks = Vec::new();
        for disk in &manifest.disks {
            if wanted.is_some_and(|wanted| !wanted.contains(&disk.name.as_str())) {
                continue;
            }
            disks.push(links.disk(id, disk)?);
        }
        Ok(Self { manifest, disks })
    }

    pub fn disks(&self) -> &[DiskChain] {
        &self.disks
    }
}

impl DiskChain {
    /// Estimated maximum of the content, in bytes.
    pub fn estimate(&self) -> u64 {
        self.estimate
    }

    /// Size of the disk that the guest sees, in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// The number of images in the chain.
    pub fn length(&self) -> usize {
        self.links.len()
    }

    /// Opens the images.
    pub async fn open(&self) -> Result<OpenDisk, Error> {
        let chain = self.clone();
        super::blocking(move || chain.open_now()).await
    }

    /// Blocks.
    fn open_now(&self) -> Result<OpenDisk, Error> {
        let (mut images, mut locks) = (Vec::new(), Vec::new());
        for ((backup, disk), backing) in &self.links {
            let image = backup.image(disk, *backing);
            images.push(image.map_err(|fault| damaged(&backup.manifest.id, Some(&disk.name), fault))?);
            locks.push(backup.lock());
        }
        Ok(OpenDisk {
            disk: self.disk.clone(),
            images,
            _locks: locks,
        })
    }
}

impl OpenDisk {
    /// Size of the disk that the guest sees, in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.images.last().map_or(0, Image::virtual_size)
    }
}

fn damaged(backup: &str, disk: Option<&str>, fault: Fault) -> Error {
    Error::Damaged(Finding {
        backup: backup.to_owned(),
        disk: disk.map(str::to_owned),
        fault,
    })
}

/// The backups of one domain, each read once, for following chains.
pub(super) struct Links<'a> {
    store: &'a dyn Store,
    domain: &'a str,
    backups: BTreeMap<String, Result<Arc<Backup>, Fault>>,
}

/// A disk's image as the manifest of its backup describes it.
type Link = (Arc<Backup>, model::Disk);

impl<'a> Links<'a> {
    pub fn new(store: &'a dyn Store, domain: &'a str) -> Self {
        Self {
            store,
            domain,
            backups: BTreeMap::new(),
        }
    }

    pub fn backup(&mut self, id: &str) -> Result<Arc<Backup>, Fault> {
        if let Some(known) = self.backups.get(id) {
            return known.clone();
        }
        let name = BackupName {
            domain: self.domain,
            id,
        };
        let backup = Backup::open(self.store, name).map(Arc::new);
        self.backups.insert(id.to_owned(), backup.clone());
        backup
    }

    /// Returns the backing image of `disk`.
    pub fn parent(&mut self, disk: &model::Disk) -> Result<Option<Link>, Fault> {
        let Some(parent) = &disk.parent else {
            return Ok(None);
        };
        let backup = self.backup(&parent.backup)?;
        let found = backup.manifest.disks.iter().find(|disk| disk.file == parent.file);
        let found = found.cloned().ok_or_else(|| Fault::NoSuchParent {
            backup: parent.backup.clone(),
            file: parent.file.clone(),
        })?;
        Ok(Some((backup, found)))
    }

    fn disk(&mut self, id: &str, disk: &model::Disk) -> Result<DiskChain, Error> {
        let top = self
            .backup(id)
            .map_err(|fault| damaged(id, Some(&disk.name), fault))?;
        let mut links = Vec::new();
        let top = (top, disk.clone());
        // Checks that the chain ends before any image is opened.
        for_each_link(self, top.clone(), |_, _, _| Ok(())).map_err(Error::Damaged)?;
        let mut files = 0_u64;
        let mut virtual_size = None;
        for_each_link(self, top, |backup, disk, below| {
            let backing = below.map(|(_, disk)| disk.format);
            let image = backup.image(disk, backing)?;
            files = files.saturating_add(image.length);
            virtual_size.get_or_insert(image.virtual_size());
            links.push(((backup.clone(), disk.clone()), backing));
            Ok(())
        })
        .map_err(Error::Damaged)?;
        links.reverse();
        let virtual_size = virtual_size.unwrap_or(0);
        Ok(DiskChain {
            disk: disk.name.clone(),
            links,
            virtual_size,
            estimate: virtual_size.min(files),
        })
    }
}

/// Follows a chain from an image down to the one without a base. Reports where that fails.
pub(super) fn for_each_link(
    links: &mut Links,
    top: Link,
    mut visit: impl FnMut(&Arc<Backup>, &model::Disk, Option<&Link>) -> Result<(), Fault>,
) -> Result<(), Finding> {
    let mut seen = HashSet::new();
    let too_deep = Finding {
        backup: top.0.manifest.id.clone(),
        disk: Some(top.1.name.clone()),
        fault: Fault::TooDeep,
    };
    let mut next = Some(top);
    while let Some((backup, disk)) = next {
        let id = backup.manifest.id.clone();
        let finding = |fault| Finding {
            backup: id.clone(),
            disk: Some(disk.name.clone()),
            fault,
        };
        if !seen.insert((id.clone(), disk.file.clone())) {
            return Err(finding(Fault::Loop));
        }
        if seen.len() > MAX_DEPTH {
            return Err(too_deep);
        }
        let below = links.parent(&disk).map_err(|fault| match (&disk.parent, fault) {
            (Some(parent), Fault::Missing) => finding(Fault::NoParent {
                backup: parent.backup.clone(),
            }),
            (_, fault @ Fault::NoSuchParent { .. }) | (None, fault) => finding(fault),
            (Some(parent), fault) => Finding {
                backup: parent.backup.clone(),
                disk: None,
                fault,
            },
        })?;
        visit(&backup, &disk, below.as_ref()).map_err(finding)?;
        next = below;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use crate::store::memory::MemoryStore;

    #[test]
    fn a_backup_that_does_not_exist_is_not_a_broken_chain() {
        let name = BackupName {
            domain: "web",
            id: "20261123T055901Z-10ebf9b0",
        };
        let error = Chain::open(&MemoryStore::default(), name, None).unwrap_err();
        assert_eq!(error.kind(), Kind::NoSuchBackup, "{error}");
        assert_eq!(
            error.to_string(),
            "no backup '20261123T055901Z-10ebf9b0' in memory:"
        );
    }
}
