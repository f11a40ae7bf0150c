//! Values that a backup and its records are made of: identifiers, names, formats, digests and the manifest.
//!
//! Pure. Must not know files, QEMU, callers or the other modules.

mod digest;
mod format;
mod id;
mod kind;
pub mod manifest;
mod name;
mod outside;

pub use digest::{Algorithm, Digest, is_hex};
pub use format::{Compression, Format};
pub use id::DomainDir;
pub use kind::Kind;
pub use manifest::{
    Checkpoint, DEFINITION_NAME, Disk, Domain, MANIFEST_NAME, MAX_MANIFEST_BYTES, MAX_SEQUENCE, Manifest,
    ManifestError, PROTECTED_NAME, Parent, Unknown,
};
pub use name::{
    MAX_DESCRIPTION_BYTES, MAX_NAME_BYTES, is_backup_id, is_checkpoint_name, is_reserved, is_valid_name,
};
pub use outside::Outside;
