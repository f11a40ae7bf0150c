//! Reading stored backups: they are found with all their bases, restored, exported and verified.
//!
//! The images were written by QEMU processes that belong to users, so nothing in them decides what is opened: every file is
//! opened here, below the store's directory, its header is compared with the manifest, and the program that reads it (a
//! `qemu-storage-daemon` or `qemu-img` of our own) gets descriptors and the chain. A backup is never
//! changed, and cannot be changed by others meanwhile: its directory is held. Knows neither jobs nor callers.

mod backup;
mod chain;
mod check;
mod compare;
mod confine;
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
pub use confine::is_incomplete as is_confinement_incomplete;
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
