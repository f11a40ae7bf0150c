//! Checkpoints: the dirty bitmaps on a domain's disks, their owners, the bases that they give, and which to remove.
//!
//! A checkpoint is a point in time from which a later backup can start. On each disk, a persistent dirty bitmap records
//! the writes since then. The bitmap's name contains an id: that of the backup that was made at the same time, or of a
//! checkpoint without a backup. So the catalog knows the owner of each bitmap. Bitmaps with other names belong to other
//! programs and stay untouched.
//!
//! Pure: decides by what its callers have read from QEMU, the catalog and the stores. Must not know D-Bus, files or
//! QMP.

mod base;
mod bitmap;
mod error;
mod list;
mod mode;
mod owner;
mod prune;
mod select;

pub use base::{BaseRequest, Candidate, CandidateImage, Candidates, choose};
pub use bitmap::{
    all_bitmaps, bitmap_name, bitmaps, orphans, sentinel_name, was_never_smaller, with_sentinel,
};
pub use error::Error;
pub use list::{BitmapOnDisk, Checkpoint, definition, find, list, on_disks};
pub use mode::{Base, FullReason, Mode, kind};
pub use owner::{Backup, CheckpointRecord, Owner, OwnerState};
pub use prune::useless;
pub use select::{CheckpointOption, Obstacle, PlannedDisk, of_backup, select};
