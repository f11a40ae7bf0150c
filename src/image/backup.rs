//! One backup of a store: its path, its manifest, and its images.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use super::{Error, Fault, Finding};
use crate::error::shown;
use crate::model::{self, Digest, Format, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest};
use crate::qcow2::{self, Expected, HeaderError};
use crate::store::{BackupLock, BackupName, LockKind, OpenBackup, Store};

/// The path of a backup in its store: the domain's directory, and the backup's directory in it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    pub domain: String,
    pub id: String,
}

impl Location {
    pub fn name(&self) -> BackupName<'_> {
        BackupName {
            domain: &self.domain,
            id: &self.id,
        }
    }
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", shown(&self.domain), shown(&self.id))
    }
}

/// Returns all backups of a store, including incomplete ones. Blocks.
pub fn all(store: &dyn Store) -> Result<Vec<Location>, Error> {
    let mut found = Vec::new();
    for domain in store.domains()? {
        for id in store.entries(&domain)?.backups {
            let location = Location {
                domain: domain.clone(),
                id,
            };
            if store.open(location.name())?.is_some() {
                found.push(location);
            }
        }
    }
    Ok(found)
}

/// Returns true if a directory has a valid manifest, in any store. Blocks.
pub fn is_backup(directory: &Path) -> bool {
    let limit = MAX_MANIFEST_BYTES as u64;
    let mut content = Vec::new();
    let read =
        File::open(directory.join(MANIFEST_NAME)).and_then(|file| file.take(limit).read_to_end(&mut content));
    read.is_ok() && Manifest::parse(&content).is_ok()
}

/// Returns the only backup whose id is `wanted` or begins with it. `DIRECTORY/ID` searches only this directory. Blocks.
pub fn find(store: &dyn Store, wanted: &str) -> Result<Location, Error> {
    let (domain, prefix) = match wanted.split_once('/') {
        Some((domain, prefix)) => (Some(domain), prefix),
        None => (None, wanted),
    };
    let mut found = all(store)?;
    found.retain(|one| domain.is_none_or(|domain| one.domain == domain) && one.id.starts_with(prefix));
    if found.iter().any(|one| one.id == prefix) {
        found.retain(|one| one.id == prefix);
    }
    match found.as_slice() {
        [one] if !prefix.is_empty() => Ok(one.clone()),
        [first, second, ..] if !prefix.is_empty() => Err(Error::Ambiguous {
            wanted: wanted.to_owned(),
            first: first.to_string(),
            second: second.to_string(),
        }),
        _ => Err(Error::NoSuchBackup {
            wanted: wanted.to_owned(),
            store: store.location().display().to_string(),
        }),
    }
}

/// A backup that cannot change while this exists, because it is locked.
#[derive(Debug)]
pub struct Backup {
    pub manifest: Manifest,
    opened: Box<dyn OpenBackup>,
    lock: Arc<BackupLock>,
}

impl Backup {
    /// Blocks.
    pub fn open(store: &dyn Store, name: BackupName<'_>) -> Result<Self, Fault> {
        let opened = store.open(name)?.ok_or(Fault::Missing)?;
        let lock = opened.lock(LockKind::Shared)?;
        let (content, _) = opened.read_manifest()?;
        let manifest = Manifest::parse(&content).map_err(Fault::Manifest)?;
        if manifest.id != name.id {
            return Err(Fault::OtherId { found: manifest.id });
        }
        Ok(Self {
            manifest,
            opened,
            lock: Arc::new(lock),
        })
    }

    /// Returns the lock, which a reader of its images keeps.
    pub fn lock(&self) -> Arc<BackupLock> {
        self.lock.clone()
    }

    /// The length of an image's file, if it exists.
    pub fn file_size(&self, disk: &model::Disk) -> Option<u64> {
        self.opened.size_of(&disk.file).ok()
    }

    /// Opens an image and compares its length and header with the manifests. `backing` is the format of its backing
    /// image, if it has one. Blocks.
    pub fn image(&self, disk: &model::Disk, backing: Option<Format>) -> Result<Image, Fault> {
        let file = match self.opened.open_image(&disk.file) {
            Err(error) if error.is_not_found() => {
                return Err(Fault::NoImage {
                    file: disk.file.clone(),
                });
            }
            file => Arc::new(file?),
        };
        let found = rustix::fs::fstat(&file)
            .map_err(|errno| Fault::Header(HeaderError::Io(errno)))?
            .st_size
            .cast_unsigned();
        if let Some(recorded) = disk.length.filter(|recorded| *recorded != found) {
            return Err(Fault::Length { found, recorded });
        }
        let parent = disk.parent.as_ref().zip(backing);
        let image = Image {
            backup: self.manifest.id.clone(),
            format: disk.format,
            expected: Expected {
                virtual_size: disk.virtual_size,
                backing: parent.map(|(parent, format)| (parent.relative_path(), format)),
            },
            length: found,
            digest: disk.digest(),
            file,
        };
        image.check_header()?;
        Ok(image)
    }
}

/// An image, open for reading.
#[derive(Debug, Clone)]
pub struct Image {
    pub backup: String,
    pub format: Format,
    pub length: u64,
    pub digest: Option<Digest>,
    pub file: Arc<OwnedFd>,
    expected: Expected,
}

impl Image {
    pub fn virtual_size(&self) -> u64 {
        self.expected.virtual_size
    }

    /// Compares the image's current header with the manifests. Blocks.
    pub fn check_header(&self) -> Result<(), Fault> {
        let (found, virtual_size) = (self.length, self.expected.virtual_size);
        match self.format {
            Format::Raw if found != virtual_size => Err(Fault::RawLength { found, virtual_size }),
            Format::Raw => Ok(()),
            Format::Qcow2 => qcow2::check(&self.file, &self.expected).map_err(Fault::Header),
        }
    }

    /// Converts a fault of this image to an error.
    pub fn damaged(&self, fault: Fault) -> Error {
        Error::Damaged(Finding {
            backup: self.backup.clone(),
            disk: None,
            fault,
        })
    }
}
