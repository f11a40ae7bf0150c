//! One backup of a store: its path, its manifest, and its images.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;

use super::{Error, Fault, Finding};
use crate::error::shown;
use crate::model::{self, Digest, Format, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest};
use crate::qcow2::{self, Expected, HeaderError};
use crate::store::{self, BackupLock, Directory, LockKind};

/// The path of a backup in its store: the domain's directory, and the backup's directory in it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    pub domain: String,
    pub id: String,
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", shown(&self.domain), shown(&self.id))
    }
}

/// Returns all backups of a store, including incomplete ones. Blocks.
pub fn all(store: &Directory) -> Result<Vec<Location>, Error> {
    let mut found = Vec::new();
    let visible = |names: Vec<String>| names.into_iter().filter(|name| !name.starts_with('.'));
    for domain in visible(store.names()?) {
        let Some(shelf) = store.below(&domain)? else {
            continue;
        };
        for id in visible(shelf.names()?) {
            if shelf.below(&id)?.is_some() {
                found.push(Location {
                    domain: domain.clone(),
                    id,
                });
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
pub fn find(store: &Directory, wanted: &str) -> Result<Location, Error> {
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
            store: store.path().display().to_string(),
        }),
    }
}

/// A backup that cannot change while this exists, because its directory is locked.
#[derive(Debug)]
pub struct Backup {
    pub manifest: Manifest,
    shelf: Directory,
    held: Arc<BackupLock>,
}

impl Backup {
    /// Blocks.
    pub fn open(domain: &Directory, id: &str) -> Result<Self, Fault> {
        let shelf = domain.below(id)?.ok_or(Fault::Missing)?;
        let held = shelf.lock(LockKind::Shared)?;
        let (content, _) = shelf.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)?;
        let manifest = Manifest::parse(&content).map_err(Fault::Manifest)?;
        if manifest.id != id {
            return Err(Fault::OtherId { found: manifest.id });
        }
        Ok(Self {
            manifest,
            shelf,
            held: Arc::new(held),
        })
    }

    pub fn held(&self) -> Arc<BackupLock> {
        self.held.clone()
    }

    /// The length of an image's file, if it exists.
    pub fn file_size(&self, disk: &model::Disk) -> Option<u64> {
        self.shelf.file_size(&disk.file).ok()
    }

    /// Opens an image and compares its length and header with the manifests. `backing` is the format of its backing
    /// image, if it has one. Blocks.
    pub fn image(&self, disk: &model::Disk, backing: Option<Format>) -> Result<Image, Fault> {
        let file = match self.shelf.open_file(&disk.file) {
            Err(store::Error::Io {
                errno: Errno::NOENT, ..
            }) => {
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
