//! Shows the progress of work on stored backups.

use std::time::{Duration, Instant};

use super::Error;
use super::Job;
use super::error::Stopped;
use super::progress::Meter;
use crate::clock;
use crate::image;

/// How often the status is updated.
const PROGRESS: Duration = Duration::from_millis(500);

/// Updates the job's status until `work` has ended.
pub async fn follow<T>(
    job: &Job,
    meter: &mut Meter,
    show: impl Fn(&Job),
    work: impl Future<Output = T>,
) -> T {
    tokio::pin!(work);
    let mut pace = tokio::time::interval(PROGRESS);
    loop {
        tokio::select! {
            result = &mut work => {
                show(job);
                return result;
            }
            _ = pace.tick() => {
                show(job);
                let status = job.status();
                let rate = meter.measure(Instant::now(), status.bytes_done());
                let left = status.bytes().saturating_sub(status.bytes_done());
                let end = meter.expected_end(clock::now(), left);
                job.update(|status| (status.rate, status.expected_end) = (rate, end));
                job.asked.send_replace(Some(Instant::now()));
            }
        }
    }
}

/// Returns why the work stopped.
pub fn stopped(error: image::Error) -> Stopped {
    match error {
        image::Error::Cancelled => Stopped::Cancelled,
        error => Stopped::Failed(Error::Image(Box::new(error))),
    }
}
