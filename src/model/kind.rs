//! Kinds of backups.

use serde::{Deserialize, Serialize};

/// How much of the disks a backup holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// All data of the disks.
    Full,
    /// The changes since the newest backup; all data of a disk that had none.
    Incremental,
    /// The changes since an older backup.
    Differential,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
            Self::Differential => "differential",
        }
    }
}
