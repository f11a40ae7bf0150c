//! Reads stored backups with all their bases: restores, exports and verifies them.
//!
//! QEMU processes that belong to users wrote the images, so no content of an image decides which file is opened. The
//! service opens every file below the store's directory, and compares its header with the manifest. A separate
//! `qemu-storage-daemon` or `qemu-img` then gets descriptors and the chain. A backup is never changed, and a lock on
//! its directory prevents changes by others. Must not know jobs or callers.

mod backup;
mod chain;
mod check;
mod compare;
mod confine;
mod error;
mod export;
mod process;
mod restore;
mod storage_daemon;
mod tether;
mod verify;
mod watch;

pub use crate::offload::Progress;
pub use backup::{Location, all, find, is_backup};
pub use chain::{Chain, DiskChain, OpenDisk};
pub use compare::shows_the_same;
pub use confine::is_incomplete as is_confinement_incomplete;
pub use error::{Error, Fault, Finding};
pub use export::Export;
pub use restore::{Output, restore};
pub use tether::become_tethered;
pub use verify::{Survey, Verified, check_sums};
pub use watch::Control;

/// Runs `work` on a blocking thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::Task(error.to_string()))?
}
