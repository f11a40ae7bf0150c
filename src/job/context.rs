//! The dependencies that all jobs share, and work on threads that may block.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::Error;
use super::bandwidth::Bandwidth;
use super::boot::BootId;
use super::generation::Generations;
use crate::activity::Activity;
use crate::catalog::Catalog;
use crate::config::{Deadlines, Store};
use crate::domain::Registry;
use crate::offload::{self, Progress};

/// The dependencies that all jobs share.
pub(super) struct JobContext {
    pub domains: Arc<Registry>,
    pub catalog: Catalog,
    pub deadlines: Deadlines,
    /// The current boot of the host.
    pub boot: BootId,
    /// The number of ended jobs that the catalog keeps.
    pub history: u32,
    pub stores: BTreeMap<String, Store>,
    /// The service stops. QEMU continues to copy without it.
    pub stop: CancellationToken,
    /// Counts the work that must end before the service exits.
    pub activity: Activity,
    /// Counts the part of it that a restart of the service would abort, because it runs in the service's own processes.
    pub at_stake: Activity,
    pub generations: Generations,
    /// The bandwidth of the stores.
    pub bandwidth: Bandwidth,
}

/// Runs `work` on a thread that may block on storage.
pub(super) async fn blocking<T: Send + 'static>(
    context: &JobContext,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    offload::blocking(&context.activity, work).await
}

/// Like `blocking`, for work that reports its progress. Fails with an error about `what` if the progress stalls.
pub(super) async fn watched<T: Send + 'static>(
    context: &JobContext,
    what: &'static str,
    work: impl FnOnce(&Progress) -> T + Send + 'static,
) -> Result<T, Error> {
    let patience = context.deadlines.stall();
    let done = offload::watched(&context.activity, patience, work).await;
    done.ok_or_else(|| Error::stalled(what, patience))
}
