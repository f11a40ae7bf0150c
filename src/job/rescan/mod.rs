//! Rescan: makes the catalog match the stores.
//!
//! [`scan`] reads a store, [`import`] turns a backup into records, [`stale`] decides when the service reads a store by
//! itself, and [`mark`] recognises a store.

mod import;
mod mark;
mod scan;
mod stale;

pub use scan::Rescan;
