//! Checks the values of a manifest's fields.

use std::collections::BTreeSet;

use super::{
    Checkpoint, DEFINITION_NAME, Disk, MANIFEST_NAME, MAX_SEQUENCE, Manifest, ManifestError, PROTECTED_NAME,
};
use crate::error::shown;
use crate::model::{Format, Kind, MAX_DESCRIPTION_BYTES, Outside, is_checkpoint_name, is_hex, is_valid_name};

/// The longest name of a file, in bytes. Names of backups, domains and disks become file names.
const MAX_NAME_BYTES: usize = 255;

impl Manifest {
    /// Fails if a value could name a file outside the backup's directory, or contradicts another value.
    pub(super) fn check(&self) -> Result<(), ManifestError> {
        require(is_file_name(&self.id), "a backup's id", &self.id)?;
        require(
            is_file_name(&self.domain.name),
            "a domain's name",
            &self.domain.name,
        )?;
        if let Some(name) = &self.name {
            require(is_valid_name(name), "a backup's name", name)?;
        }
        if let Some(description) = &self.description {
            require(is_description(description), "a description", description)?;
        }
        if let Some(why) = &self.quiesce_problem {
            require(is_description(why), "a reason", why)?;
        }
        if let Some(Checkpoint { name, description }) = &self.checkpoint {
            if let Some(name) = name {
                require(is_checkpoint_name(name), "a checkpoint's name", name)?;
            }
            if let Some(description) = description {
                require(is_description(description), "a description", description)?;
            }
        }
        if self.sequence > MAX_SEQUENCE {
            let found = self.sequence;
            return Err(ManifestError::Sequence { found });
        }
        for Outside { name, kind } in &self.not_in_backup {
            require(is_disk_name(name), "a device's name", name)?;
            require(is_disk_name(kind), "a device's type", kind)?;
        }
        if self.disks.is_empty() {
            return Err(ManifestError::NoDisks);
        }
        let (mut names, mut files) = (BTreeSet::new(), BTreeSet::new());
        for disk in &self.disks {
            let Disk { name, file, .. } = disk;
            require(is_disk_name(name), "a disk's name", name)?;
            require(is_image_name(file), "an image's file name", file)?;
            distinct(names.insert(name), "name", name)?;
            distinct(files.insert(file), "file", file)?;
            for (hex, what) in [
                (&disk.blake3, "a BLAKE3 digest"),
                (&disk.sha256, "a SHA-256 digest"),
            ] {
                if let Some(hex) = hex {
                    require(is_hex(hex), what, hex)?;
                }
            }
            if let Some(bitmap) = &disk.bitmap {
                require(is_bitmap_name(bitmap), "a bitmap's name", bitmap)?;
            }
            self.check_parent(disk)?;
        }
        Ok(())
    }

    fn check_parent(&self, disk: &Disk) -> Result<(), ManifestError> {
        let Some(parent) = &disk.parent else {
            return Ok(());
        };
        require(is_file_name(&parent.backup), "a backup's id", &parent.backup)?;
        require(is_image_name(&parent.file), "an image's file name", &parent.file)?;
        let wrong = |on| {
            Err(ManifestError::Parent {
                disk: shown(&disk.name),
                on,
            })
        };
        if parent.backup == self.id {
            return wrong("an image of the same backup");
        }
        match (disk.format, self.kind) {
            (Format::Raw, _) => wrong("another image, and is raw"),
            (_, Kind::Full) => wrong("another image, in a full backup"),
            _ => Ok(()),
        }
    }
}

fn require(good: bool, what: &'static str, value: &str) -> Result<(), ManifestError> {
    good.then_some(()).ok_or_else(|| ManifestError::Text {
        what,
        value: shown(value),
    })
}

fn distinct(first: bool, what: &'static str, value: &str) -> Result<(), ManifestError> {
    first.then_some(()).ok_or_else(|| ManifestError::SameDisk {
        what,
        value: shown(value),
    })
}

/// Returns true if the name denotes a visible file inside one directory: not the directory itself and no parent of it.
fn is_file_name(name: &str) -> bool {
    is_disk_name(name) && !name.starts_with('.') && !name.contains('/')
}

fn is_image_name(name: &str) -> bool {
    is_file_name(name) && ![MANIFEST_NAME, DEFINITION_NAME, PROTECTED_NAME].contains(&name)
}

/// QEMU limits names of bitmaps in qcow2 images to 1023 bytes (its docs/interop/qcow2).
fn is_bitmap_name(name: &str) -> bool {
    (1..=1023).contains(&name.len()) && !name.contains(char::is_control)
}

/// QEMU's name of a disk may contain a slash.
fn is_disk_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.contains(char::is_control)
}

fn is_description(text: &str) -> bool {
    text.len() <= MAX_DESCRIPTION_BYTES && is_text(text)
}

/// Returns true if an XML document can contain the text.
fn is_text(text: &str) -> bool {
    !text.contains(|c: char| c < ' ' && !matches!(c, '\t' | '\n' | '\r'))
}
