//! Creates, lists and removes the checkpoints of a domain in its QEMU and in the catalog. [`crate::checkpoint`] decides
//! which bitmaps.
//!
//! Useless bitmaps are removed at the end of a backup into a store, after a change of a checkpoint, and when the service
//! connects to a QEMU. The deletion of a backup removes none.

mod change;
mod prune;
mod sentinel;
mod with_backup;

pub(super) use sentinel::check_sizes;
