//! The layout of qcow2 images, as far as it is read and written here: what a header names, and an empty image.
//!
//! It is QEMU's `docs/interop/qcow2`. Knows open files and nothing else; all of it blocks.

mod empty;
mod header;

pub use empty::Empty;
pub use header::{Expected, HeaderError, check};
