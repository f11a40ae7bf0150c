//! The backup that was begun by a service that ended before it answered.

use std::time::Instant;

use jiff::Timestamp;

use crate::error::{Error, Result};
use crate::follow::{PATIENCE, QUIET};
use crate::job::Snapshot;
use crate::output;
use crate::proxy::{Job, JobLine, Service};

/// Jobs that are looked at: those of other domains, and of stores that were read again, may be newer.
const LOOKED_AT: usize = 100;

/// The job that was put on record for a call since `since`: the next process of the service resumes or undoes it. The `error` of
/// the call if there is none.
pub async fn begun(service: &Service, domain: &str, since: Timestamp, error: Error) -> Result<Job> {
    let until = Timestamp::now();
    output::complain("The backup service has gone: looking for the backup that it may have begun");
    let asked = Instant::now();
    loop {
        // A service that is started by the call needs no pause; one that is not there yet does.
        match service.jobs(true).await {
            Ok(lines) => return find(service, domain, (since, until), lines).await?.ok_or(error),
            Err(away) if away.is_away() && asked.elapsed() < PATIENCE => tokio::time::sleep(QUIET).await,
            Err(_) => return Err(error),
        }
    }
}

async fn find(
    service: &Service,
    domain: &str,
    (since, until): (Timestamp, Timestamp),
    mut lines: Vec<JobLine>,
) -> Result<Option<Job>> {
    // The domain need not be known yet, nor have the name that it is asked for by.
    let path = service.without_asking().domain(domain).await.ok();
    let caller = rustix::process::geteuid().as_raw();
    let called = |snapshot: &Snapshot| {
        let time = Timestamp::from_microsecond(i64::try_from(snapshot.start_time).ok()?).ok()?;
        // The service's times are of whole µs.
        let since = Timestamp::from_microsecond(since.as_microsecond()).ok()?;
        Some(since <= time && time <= until)
    };
    lines.sort_by_key(|line| std::cmp::Reverse(line.id));
    for line in lines.into_iter().take(LOOKED_AT) {
        let job = service.job_at(line.id, line.path);
        let Ok(snapshot) = job.snapshot().await else {
            continue;
        };
        let is_of = line.domain == domain || path.as_ref() == Some(&snapshot.domain_path);
        let is_own = snapshot.started_by == caller && snapshot.mode == "push";
        if is_of && is_own && called(&snapshot) == Some(true) {
            return Ok(Some(job));
        }
    }
    Ok(None)
}
