//! The owner of a bitmap: the backup or the checkpoint whose id is in the bitmap's name, as the catalog records it.

use jiff::Timestamp;

use crate::model;

/// A checkpoint without a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointRecord {
    /// Part of the names of the checkpoint's bitmaps. It is never reused.
    pub id: String,
    pub name: Option<String>,
    pub description: Option<String>,
    pub time: Timestamp,
}

/// The owner of the bitmaps with one id on a domain's disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// False if all readable records belong to another domain, which used the same image or is the same VM under
    /// another name.
    pub is_of_domain: bool,
    pub state: OwnerState,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnerState {
    /// At least one backup exists. A copy of a store has the same ids.
    Backups {
        /// The backups with a readable manifest, at least one. Those of the domain come first.
        backups: Vec<Backup>,
        /// There are others, whose manifest cannot be read. One of them may need the bitmaps.
        has_unreadable: bool,
    },
    /// A checkpoint without a backup. Only a caller deletes it.
    Checkpoint(CheckpointRecord),
    /// The job of the backup has not ended, or the checkpoint is being created.
    Pending,
    /// The job failed, or the backup or the checkpoint was removed.
    Removed,
    /// The catalog has no record of the id, or cannot read it.
    Unknown,
}

/// A backup that owns bitmaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    pub store: String,
    /// The directory's name in the store.
    pub directory: String,
    /// The position in that directory.
    pub sequence: u64,
    pub time: Timestamp,
    /// Name and description of the backup's checkpoint, if the request had any.
    pub checkpoint: Option<model::Checkpoint>,
}

impl Owner {
    pub const UNKNOWN: Self = Self {
        is_of_domain: false,
        state: OwnerState::Unknown,
    };
}
