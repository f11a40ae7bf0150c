//! Ends work on images that is cancelled or makes no progress.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{Error, Progress};
use crate::offload::unless_stalled;

/// Progress, cancellation and timeout of work on images.
#[derive(Debug, Clone, Copy)]
pub struct Control<'a> {
    /// The progress of the work.
    pub progress: &'a Progress,
    pub cancel: &'a CancellationToken,
    /// How long the work may make no progress.
    pub stall: Duration,
}

impl Control<'_> {
    /// Returns the result of `work`, unless it is cancelled or makes no progress for too long. Total time is not
    /// limited. `moved` returns a number that changes with each step.
    pub(super) async fn watch<T>(
        &self,
        what: &'static str,
        moved: impl Fn() -> u64,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::select! {
            done = unless_stalled(moved, self.stall, work) => done.unwrap_or_else(|| {
                let seconds = self.stall.as_secs();
                Err(Error::Stalled { what, seconds })
            }),
            () = self.cancel.cancelled() => Err(Error::Cancelled),
        }
    }
}

/// Returns a number that changes while a process reads, writes or computes (proc_pid_io(5), proc_pid_stat(5)). It is
/// constant for a process that has ended.
pub(super) fn work_of(process: Option<u32>) -> u64 {
    let read = |name| process.and_then(|id| std::fs::read_to_string(format!("/proc/{id}/{name}")).ok());
    let io = read("io").unwrap_or_default();
    let bytes = io.lines().filter_map(|line| {
        let (key, value) = line.split_once(": ")?;
        ["rchar", "wchar"]
            .contains(&key)
            .then(|| value.parse::<u64>().ok())?
    });
    let stat = read("stat").unwrap_or_default();
    // The name, in brackets, may contain spaces. User and system time are fields 14 and 15.
    let fields = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_ascii_whitespace();
    let ticks = fields
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok());
    bytes.chain(ticks).fold(0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn work_that_makes_progress_may_take_long_and_stalled_work_fails() {
        let (progress, cancel) = (Progress::default(), CancellationToken::new());
        let control = Control {
            progress: &progress,
            cancel: &cancel,
            stall: Duration::from_secs(2),
        };
        let moving = async {
            for _ in 0..9 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                progress.add(1);
            }
            Ok("done")
        };
        let moved = || progress.get().0;
        assert_eq!(control.watch("it", moved, moving).await, Ok("done"));
        let never = std::future::pending::<Result<(), Error>>();
        let stalled = Error::Stalled {
            what: "it",
            seconds: 2,
        };
        let given_up = tokio::time::timeout(Duration::from_secs(60), control.watch("it", moved, never));
        assert_eq!(given_up.await, Ok(Err(stalled)));
        cancel.cancel();
        let never = std::future::pending::<Result<(), Error>>();
        assert_eq!(control.watch("it", moved, never).await, Err(Error::Cancelled));
    }

    #[test]
    fn the_work_of_a_process_is_noticed() {
        let own = Some(std::process::id());
        let before = work_of(own);
        std::fs::read("/proc/self/maps").unwrap();
        assert_ne!(work_of(own), before);
        assert_eq!(work_of(None), 0);
    }
}
