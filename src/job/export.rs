//! Serves the disks of a stored backup until the caller no longer reads them.

use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use super::context::JobContext;
use super::error::Stopped;
use super::follow::stopped;
use super::{DiskState, DiskStatus, Error};
use crate::image::Export;

/// How often an export is checked within its idle timeout.
const CHECKS_OF_IDLE: u32 = 16;

/// A backup that is exported until the client that started it has `left` the bus.
pub struct Served {
    pub export: Export,
    pub left: BoxFuture<'static, ()>,
}

/// Returns the status of the disks.
pub fn rows(served: &Served) -> Vec<DiskStatus> {
    let rows = served.export.chain().disks().iter().map(|disk| DiskStatus {
        name: disk.disk.clone(),
        state: DiskState::Running,
        total: 0,
        done: 0,
        target: String::new(),
    });
    rows.collect()
}

/// Serves the export until the caller has left the bus, the job is cancelled, or the idle timeout has passed.
pub async fn serve(served: Served, cancel: &CancellationToken, context: &JobContext) -> Result<(), Stopped> {
    let Served { mut export, left } = served;
    let patience = context.deadlines.export_idle();
    let mut last_read = LastRead::new(export.bytes_read());
    let mut pace = tokio::time::interval(patience / CHECKS_OF_IDLE);
    tokio::pin!(left);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return Err(Stopped::Cancelled),
            () = &mut left => return Ok(()),
            error = export.ended() => return Err(stopped(error)),
            _ = pace.tick() => {
                if last_read.is_idle(export.bytes_read(), patience) {
                    let seconds = patience.as_secs();
                    return Err(Error::ExportIdle { seconds }.into());
                }
            }
        }
    }
}

/// The number of bytes read from an export, and when it last changed.
struct LastRead {
    read: Option<u64>,
    at: Instant,
}

impl LastRead {
    fn new(read: Option<u64>) -> Self {
        let at = Instant::now();
        Self { read, at }
    }

    /// Returns whether the idle timeout has passed since the last read. If reads are not counted, the export ends after
    /// that time, because it keeps a backup from being removed.
    fn is_idle(&mut self, read: Option<u64>, patience: Duration) -> bool {
        if read.is_some() && read != self.read {
            *self = Self::new(read);
        }
        self.at.elapsed() >= patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_becomes_idle_even_if_reads_are_not_counted() {
        let patience = Duration::from_secs(60);
        let mut last_read = LastRead::new(Some(7));
        let before = |last_read: &mut LastRead| last_read.at = Instant::now().checked_sub(patience).unwrap();
        before(&mut last_read);
        assert!(!last_read.is_idle(Some(8), patience), "it was read from");
        assert!(!last_read.is_idle(Some(8), patience));
        before(&mut last_read);
        assert!(last_read.is_idle(None, patience));
    }
}
