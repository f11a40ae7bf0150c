//! QEMU's commands for nodes, block jobs and bitmaps, under QEMU's names (`qapi/block-core.json`, `qapi/job.json`).
//!
//! A command borrows its names. Nodes and actions, which callers collect before they send them, own theirs.

mod bitmaps;
mod events;
mod fdsets;
mod graph;
mod jobs;
mod nodes;
mod stats;
mod transaction;

pub use bitmaps::*;
pub use events::*;
pub use fdsets::*;
pub use graph::*;
pub use jobs::*;
pub use nodes::*;
pub use stats::*;
pub use transaction::*;
