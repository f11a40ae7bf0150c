//! Stored backups, read: found with all that they lie on, restored, exported and verified.
//!
//! The images were written by QEMU processes that belong to users, so nothing in them decides what is opened: every file is
//! opened here, below the store's directory, its header is held against the manifest, and what works on it (a
//! `qemu-storage-daemon` or `qemu-img` of our own) is given descriptors and told what lies on what. A backup is never
//! changed, and nobody else changes one meanwhile: its directory is held. Knows neither jobs nor callers.

mod backup;
mod chain;
mod check;
mod compare;
mod engine;
mod error;
mod export;
mod process;
mod restore;
mod tether;
mod verify;
mod watch;

pub use crate::offload::Progress;
pub use backup::{Location, all, find, is_backup};
pub use chain::{Chain, DiskChain, OpenDisk};
pub use compare::shows_the_same;
pub use error::{Error, Fault, Finding};
pub use export::Export;
pub use process::start_alone;
pub use restore::{Output, restore};
pub use tether::become_tethered;
pub use verify::{Survey, Verified, check_sums};
pub use watch::Control;

/// Runs `work` where it keeps nobody waiting.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::Task(error.to_string()))?
}
