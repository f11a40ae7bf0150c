//! Reads and writes the parts of qcow2 that the service needs: the file names in a header, and an empty image.
//!
//! The format is QEMU's `docs/interop/qcow2`. Knows open files and nothing else. Every function blocks.

mod empty;
mod header;

pub use empty::Empty;
pub use header::{Expected, HeaderError, check};
