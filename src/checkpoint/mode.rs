//! Full or incremental: the part of a disk that a backup copies, with its base or the reason for having none.

use serde::{Deserialize, Serialize};

use crate::model::{Kind, Parent};

/// The part of a disk to copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    Full {
        why: FullReason,
    },
    /// The records of earlier versions have this name.
    #[serde(rename = "since")]
    Incremental(Base),
}

impl Mode {
    /// Returns libvirt's term if it has one.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Full { .. } => "full",
            Self::Incremental(Base { is_newest: true, .. }) => "incremental",
            Self::Incremental(_) => "differential",
        }
    }

    /// The backing image of the new one.
    pub fn parent(&self) -> Option<Parent> {
        match self {
            Self::Full { .. } => None,
            Self::Incremental(base) => Some(base.parent()),
        }
    }
}

impl Default for Mode {
    fn default() -> Self {
        Self::Full {
            why: FullReason::Requested,
        }
    }
}

/// The backing image of a new one, and the bitmap of the data to copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Base {
    pub backup: String,
    pub file: String,
    pub bitmap: String,
    /// The base is the newest backup. The records of earlier versions have the name `newest`.
    #[serde(rename = "newest")]
    pub is_newest: bool,
}

impl Base {
    pub fn parent(&self) -> Parent {
        Parent {
            backup: self.backup.clone(),
            file: self.file.clone(),
        }
    }
}

/// The reason for a full copy of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FullReason {
    /// The call requested it.
    Requested,
    /// The caller chose the target, and only stores record earlier backups.
    Outside,
    /// The target is raw, so it cannot have a backing file.
    Raw,
    /// The store has no earlier backup of the domain.
    First,
    /// The disk's image cannot store dirty bitmaps.
    NoBitmaps,
    /// The disk has no bitmap since an earlier backup: it is new, or has another image.
    NoBitmap,
    /// Its image holds internal snapshots, and QEMU cannot revert to them while it has a persistent bitmap.
    InternalSnapshots,
    /// The bitmap is incomplete, as after a crash of its QEMU.
    Inconsistent,
    /// The disk has another size, or was smaller in between.
    Resized,
    /// An image of the earlier backup is damaged or missing.
    Damaged,
    /// Another service created the earlier backup, or its manifest was changed.
    NotProven,
    /// The chain would have too many images.
    ChainTooLong,
    /// The catalog no longer has the reason.
    Unknown,
    /// The checkpoint has no backup.
    NoBackup,
}

impl FullReason {
    /// The name in the D-Bus interface.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Outside => "outside",
            Self::Raw => "raw",
            Self::First => "first",
            Self::NoBitmaps => "no-bitmaps",
            Self::NoBitmap => "no-bitmap",
            Self::InternalSnapshots => "internal-snapshots",
            Self::Inconsistent => "inconsistent",
            Self::Resized => "resized",
            Self::Damaged => "damaged",
            Self::NotProven => "not-proven",
            Self::ChainTooLong => "chain-too-long",
            Self::Unknown => "unknown",
            Self::NoBackup => "no-backup",
        }
    }

    /// The text for users.
    pub fn text(self) -> &'static str {
        match self {
            Self::Requested => "a full backup was requested",
            Self::Outside => "only stores record earlier backups",
            Self::Raw => "a raw image cannot have a backing file",
            Self::First => "the store has no earlier backup",
            Self::NoBitmaps => "its image cannot store dirty bitmaps (qcow2 version 3 can)",
            Self::NoBitmap => "it has no dirty bitmap since then",
            Self::InternalSnapshots => {
                "its image holds internal snapshots, and QEMU cannot revert to them while it has a dirty bitmap"
            }
            Self::Inconsistent => "its dirty bitmap is incomplete, as after a crash of its QEMU",
            Self::Resized => "its size has changed since then, even if it is the same again",
            Self::Damaged => "an image of the earlier backup is damaged or missing",
            Self::NotProven => "another service created the earlier backup, or its manifest was changed",
            Self::ChainTooLong => "its chain would have too many images",
            Self::Unknown => "the reason is no longer on record",
            Self::NoBackup => "the checkpoint was made without a backup, so there is no base",
        }
    }
}

/// Returns the kind of a backup whose disks have these modes.
pub fn kind<'a>(modes: impl Iterator<Item = &'a Mode>) -> Kind {
    let mut kind = Kind::Full;
    for mode in modes {
        match mode {
            Mode::Full { .. } => {}
            Mode::Incremental(Base { is_newest: true, .. }) if kind == Kind::Full => kind = Kind::Incremental,
            Mode::Incremental(Base { is_newest: true, .. }) => {}
            Mode::Incremental(_) => kind = Kind::Differential,
        }
    }
    kind
}
