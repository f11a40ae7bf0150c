//! Finds the backup that a service started before it ended without a reply.

use std::time::Instant;

use jiff::Timestamp;

use crate::error::{Error, Result};
use crate::follow::{PATIENCE, QUIET};
use crate::job::Snapshot;
use crate::output;
use crate::proxy::{Job, JobLine, Service};

/// The most jobs to examine. Newer jobs of other domains or rescans may precede the wanted one.
const LOOKED_AT: usize = 100;

/// The job that the service recorded for a call since `since`. The next instance resumes it or rolls it back. Returns
/// `error`, the error of the call, if there is no such job.
pub async fn started(service: &Service, domain: &str, since: Timestamp, error: Error) -> Result<Job> {
    let until = Timestamp::now();
    output::complain("The backup service has left the bus: looking for the backup that it may have started");
    let asked = Instant::now();
    loop {
        // The call itself activates the service. A pause is needed only if that fails.
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
    // The service may not know the domain yet, and `domain` may be its UUID.
    let path = service.without_asking().domain(domain).await.ok();
    let caller = rustix::process::geteuid().as_raw();
    let called = |snapshot: &Snapshot| {
        let time = Timestamp::from_microsecond(i64::try_from(snapshot.start_time).ok()?).ok()?;
        // The service's times have a resolution of 1 µs.
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
