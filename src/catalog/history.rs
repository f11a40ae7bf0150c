//! The records of ended jobs.

use jiff::Timestamp;
use rusqlite::{Row, params};

use super::jobs::{DOMAIN, domain, select};
use super::{Catalog, DomainRecord, Error, JobRecord};

/// What a list says of an ended job.
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
    /// The last jobs that ended after `since`, at most so many, by number.
    pub async fn ended_since(&self, since: Timestamp, at_most: u32) -> Result<Vec<JobRecord>, Error> {
        self.run(move |connection| {
            let condition = "step = 'ended' AND end_time > ?1 ORDER BY id DESC LIMIT ?2";
            let mut jobs = select(connection, condition, params![since.as_microsecond(), at_most])?;
            jobs.reverse();
            Ok(jobs)
        })
        .await
    }

    /// All jobs that have ended, by number: as many as the history keeps.
    pub async fn history(&self) -> Result<Vec<EndedJob>, Error> {
        self.run(|connection| {
            // The index has all of that.
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
                    // One that cannot be understood hides no other.
                    Err(error) => tracing::error!(%error, "a job is left out of the list"),
                }
            }
            Ok(jobs)
        })
        .await
    }

    /// The job of that number, if it has ended.
    pub async fn ended_job(&self, id: u32) -> Result<Option<JobRecord>, Error> {
        self.run(move |connection| {
            let found = select(connection, "step = 'ended' AND id = ?1", [id])?;
            Ok(found.into_iter().next())
        })
        .await
    }
}
