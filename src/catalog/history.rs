//! The records of ended jobs.

use jiff::Timestamp;
use rusqlite::{Row, params};

use super::jobs::{DOMAIN, domain, select};
use super::{Catalog, DomainRecord, Error, JobRecord};

/// An entry in the list of ended jobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedJob {
    pub id: u32,
    pub domain: DomainRecord,
    pub result: String,
}

fn ended(row: &Row) -> Result<EndedJob, Error> {
    Ok(EndedJob {
        id: row.get("id")?,
        domain: domain(row)?,
        result: row.get("result")?,
    })
}

impl Catalog {
    /// Returns at most `at_most` jobs that ended after `since`, sorted by number. Prefers the newest.
    pub async fn ended_since(&self, since: Timestamp, at_most: u32) -> Result<Vec<JobRecord>, Error> {
        self.run(move |connection| {
            let condition = "step = 'ended' AND end_time > ?1 ORDER BY id DESC LIMIT ?2";
            let mut jobs = select(connection, condition, params![since.as_microsecond(), at_most])?;
            jobs.reverse();
            Ok(jobs)
        })
        .await
    }

    /// Returns all ended jobs that the history keeps, sorted by number.
    pub async fn history(&self) -> Result<Vec<EndedJob>, Error> {
        self.run(|connection| {
            // The index contains all of these columns.
            let columns = format!(
                "SELECT id, {DOMAIN}, result FROM jobs INDEXED BY ended_jobs \
                 WHERE step = 'ended' ORDER BY id"
            );
            let mut statement = connection.prepare(&columns)?;
            let mut rows = statement.query([])?;
            let mut jobs = Vec::new();
            while let Some(row) = rows.next()? {
                match ended(row) {
                    Ok(job) => jobs.push(job),
                    // One unreadable record must not hide the others.
                    Err(error) => tracing::error!(%error, "cannot list a job"),
                }
            }
            Ok(jobs)
        })
        .await
    }

    /// Returns the job with this number, if it has ended.
    pub async fn ended_job(&self, id: u32) -> Result<Option<JobRecord>, Error> {
        self.run(move |connection| {
            let found = select(connection, "step = 'ended' AND id = ?1", [id])?;
            Ok(found.into_iter().next())
        })
        .await
    }
}
