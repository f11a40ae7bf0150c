//! QEMU's commands for nodes, block jobs and bitmaps, with its own names (`qapi/block-core.json`, `qapi/job.json`).
//!
//! A command borrows its names. What is collected before it is sent, such as nodes and actions, owns them.

mod events;
mod jobs;
mod nodes;

pub use events::*;
pub use jobs::*;
pub use nodes::*;
