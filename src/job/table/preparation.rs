//! Waits for the thread that creates a job's targets, which storage may block.

use std::sync::Arc;

use tokio::task::{JoinError, JoinHandle};

use super::Jobs;
use super::reservation::Held;
use crate::error;
use crate::job::Error;
use crate::job::context::blocking;

impl Jobs {
    /// Waits for the targets of a recorded job, and keeps `held` until the targets exist or are discarded. If this
    /// fails, the record is withdrawn. That can happen later, because the thread that prepares the targets may hang.
    pub async fn prepared<H, T>(
        self: &Arc<Self>,
        id: u32,
        held: H,
        mut targets: JoinHandle<error::Result<T>>,
    ) -> error::Result<(H, T)>
    where
        H: Held,
        T: Send + 'static,
    {
        match self.made(&mut targets).await {
            Some(Ok(prepared)) => Ok((held, prepared)),
            Some(Err(error)) => {
                self.withdraw(id).await;
                Err(error)
            }
            None => {
                self.abandon(targets, held, Some(id));
                Err(self.target_stalled().into())
            }
        }
    }

    /// Abandons a thread that hangs while it prepares targets. When it continues, its targets are discarded, and then
    /// the record of the job `withdrawn` is removed.
    pub(in crate::job) fn abandon<T: Send + 'static>(
        self: &Arc<Self>,
        targets: JoinHandle<error::Result<T>>,
        mut held: impl Held,
        withdrawn: Option<u32>,
    ) {
        // The job has no objects in QEMU yet, so another job can start.
        held.make_room();
        let jobs = self.clone();
        self.tasks.spawn(async move {
            let discarded = async {
                // Dropping the targets can block on storage, too.
                if let Ok(made) = targets.await {
                    blocking(&jobs.context, move || drop(made)).await;
                }
                if let Some(id) = withdrawn {
                    jobs.withdraw(id).await;
                }
            };
            // If the service stops first, the next instance finds the record and removes it.
            jobs.context.stop.run_until_cancelled(discarded).await;
            drop(held);
        });
    }

    /// Returns the result of the thread that prepares the targets; `None` if it hangs.
    pub(in crate::job) async fn made<T>(
        &self,
        targets: &mut JoinHandle<error::Result<T>>,
    ) -> Option<error::Result<T>> {
        let failed = |error: JoinError| error::Error::new(error::Kind::Internal, error.to_string());
        let made = tokio::time::timeout(self.patience(), targets).await.ok()?;
        Some(made.map_err(failed).flatten())
    }

    pub(in crate::job) fn target_stalled(&self) -> Error {
        Error::stalled("the target", self.patience())
    }

    /// Removes the record of a job whose targets could not be created.
    pub(in crate::job) async fn withdraw(&self, id: u32) {
        if let Err(error) = self.context.catalog.withdraw(id).await {
            tracing::warn!(job = id, %error, "cannot remove the record of a job that never began");
        }
    }
}
