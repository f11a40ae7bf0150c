//! Creates, lists and removes the checkpoints of a domain in its QEMU and in the catalog. [`crate::checkpoint`] decides
//! which bitmaps.

mod change;
mod prune;
mod sentinel;
mod with_backup;

pub(super) use sentinel::check_sizes;
