//! Writes and reads the records of jobs: every step that must survive the service, and the outcome.

use jiff::Timestamp;
use rusqlite::{Connection, Params, Row, named_params, params};

use super::backups::keep_backup;
use super::record::{ENDED, QUEUED};
use super::{
    BackupRecord, Catalog, DomainRecord, Ended, Error, JobRecord, JobState, Leftover, NewJob, Starter,
};

impl Catalog {
    /// Records a job before it does anything, and gives it a number that is never reused.
    pub async fn begin(&self, job: NewJob) -> Result<JobRecord, Error> {
        self.run(move |connection| {
            let mut insert = connection.prepare(
                "INSERT INTO jobs (backup_id, domain_name, domain_source, domain_owner, domain_owner_name, domain_uuid, \
                     started_by, start_time, plan, speed, step, state, started_by_name) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
            )?;
            insert.execute(params![
                job.backup_id,
                job.domain.name,
                job.domain.source,
                job.domain.owner,
                job.domain.owner_name,
                job.domain.uuid.map(|uuid| uuid.to_string()),
                job.started_by.uid,
                job.start_time.as_microsecond(),
                job.plan,
                job.speed.cast_signed(),
                job.state.step,
                job.state.text,
                job.started_by.name.unwrap_or_default(),
            ])?;
            let id = connection.last_insert_rowid();
            let found = select(connection, "id = ?1", [id])?;
            let missing = || Error::Statement("a job that was just recorded is missing".into());
            let mut record = found.into_iter().next().ok_or_else(missing)?;
            record.started_by.connection = job.started_by.connection;
            Ok(record)
        })
        .await
    }

    /// Deletes the record of a job that never began and has no residue.
    pub async fn withdraw(&self, id: u32) -> Result<(), Error> {
        self.change("DELETE FROM jobs WHERE id = ?1", move |statement| {
            statement.execute([id])
        })
        .await
    }

    /// Records the state of a job durably.
    pub async fn reached(&self, id: u32, state: JobState) -> Result<(), Error> {
        self.run(move |connection| {
            let sql = "UPDATE jobs SET step = ?2, state = ?3 WHERE id = ?1 AND step <> ?4";
            let changed = connection.execute(sql, params![id, state.step, state.text, ENDED])?;
            one_changed(id, changed)
        })
        .await
    }

    /// Records that a job leaves the queue with this plan.
    pub async fn dequeued(&self, id: u32, plan: String, state: JobState) -> Result<(), Error> {
        self.run(move |connection| {
            let sql = "UPDATE jobs SET plan = ?2, step = ?3, state = ?4 WHERE id = ?1 AND step = ?5";
            let changed = connection.execute(sql, params![id, plan, state.step, state.text, QUEUED])?;
            one_changed(id, changed)
        })
        .await
    }

    /// Records that a caller was promised that the job does not complete.
    pub async fn cancel_requested(&self, id: u32) -> Result<(), Error> {
        self.change(
            "UPDATE jobs SET cancel_requested = 1 WHERE id = ?1",
            move |update| update.execute([id]),
        )
        .await
    }

    /// Records the limit that was set while the job runs, in bytes a second.
    pub async fn speed_set(&self, id: u32, speed: u64) -> Result<(), Error> {
        self.change("UPDATE jobs SET speed = ?2 WHERE id = ?1", move |update| {
            update.execute(params![id, speed.cast_signed()])
        })
        .await
    }

    /// Records the outcome, and the backup if the job created one. Then trims the user's history to `history` jobs,
    /// except those with residue.
    pub async fn end(
        &self,
        id: u32,
        ended: Ended,
        backup: Option<BackupRecord>,
        history: u32,
    ) -> Result<(), Error> {
        self.run(move |connection| {
            let error = ended.error.as_deref().unwrap_or_default();
            let bytes = ended.state.len() + ended.disks.len() + error.len();
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            let transaction = connection.transaction()?;
            let changed = transaction.execute(
                "UPDATE jobs SET step = 'ended', end_time = :time, result = :result, error = :error, disks = :disks, \
                     state = :state, left_in_qemu = :qemu, left_on_disk = :disk, \
                     bytes = length(CAST(plan AS BLOB)) + :bytes WHERE id = :id AND step <> 'ended'",
                named_params! {
                    ":id": id,
                    ":time": ended.time.as_microsecond(),
                    ":result": ended.result,
                    ":error": ended.error,
                    ":disks": ended.disks,
                    ":state": ended.state,
                    ":qemu": ended.left_in_qemu,
                    ":disk": ended.left_on_disk,
                    ":bytes": bytes,
                },
            )?;
            one_changed(id, changed)?;
            if let Some(backup) = &backup {
                keep_backup(&transaction, backup, &domain_of(&transaction, id)?)?;
            }
            let user = "SELECT imported, started_by FROM jobs WHERE id = ?1";
            let user = transaction.query_row(user, [id], |row| Ok((row.get(0)?, row.get(1)?)))?;
            forget_oldest(&transaction, user, history)?;
            Ok(transaction.commit()?)
        })
        .await
    }

    /// Records that this residue of the job has been removed.
    pub async fn cleared(&self, id: u32, what: Leftover) -> Result<(), Error> {
        let sql = match what {
            Leftover::InQemu => "UPDATE jobs SET left_in_qemu = 0 WHERE id = ?1",
            Leftover::OnDisk => "UPDATE jobs SET left_on_disk = 0 WHERE id = ?1",
        };
        self.change(sql, move |update| update.execute([id])).await
    }

    /// Returns the jobs that have begun and not ended. An unreadable record is an error of its own.
    pub async fn under_way(&self) -> Result<Vec<Result<JobRecord, Error>>, Error> {
        self.each("step <> 'ended' AND step <> 'queued' ORDER BY id")
            .await
    }

    /// Returns the jobs that have not ended or may have residue. An unreadable record is an error of its own.
    pub async fn unsettled(&self) -> Result<Vec<Result<JobRecord, Error>>, Error> {
        self.each("step <> 'ended' OR left_in_qemu OR left_on_disk ORDER BY id")
            .await
    }

    /// Returns a queued job.
    pub async fn queued_job(&self, id: u32) -> Result<JobRecord, Error> {
        self.run(move |connection| {
            let found = select(connection, "step = ?2 AND id = ?1", params![id, QUEUED])?;
            let missing = || Error::Statement(format!("job {id} is not recorded as queued"));
            found.into_iter().next().ok_or_else(missing)
        })
        .await
    }

    async fn each(&self, condition: &'static str) -> Result<Vec<Result<JobRecord, Error>>, Error> {
        self.run(move |connection| {
            let mut statement = connection.prepare(&format!("SELECT * FROM jobs WHERE {condition}"))?;
            let mut rows = statement.query([])?;
            let mut jobs = Vec::new();
            while let Some(row) = rows.next()? {
                jobs.push(read(row));
            }
            Ok(jobs)
        })
        .await
    }
}

/// A state that matches no record would be lost, so it is an error.
fn one_changed(id: u32, changed: usize) -> Result<(), Error> {
    match changed {
        1 => Ok(()),
        _ => Err(Error::Statement(format!("job {id} is not recorded as running"))),
    }
}

/// The maximum size of one user's history, in bytes.
const MOST_BYTES: u32 = 32 << 20;
/// How many ended jobs of one user may have residue in the QEMU of a registered domain. The service never reconnects to
/// such a QEMU, so without a limit a user could create any number of these records.
const MOST_UNSETTLED: u32 = 100;

/// Deletes the records of the jobs of one user that ended first, except `history` of them and those that may have
/// residue. `user` is whether the jobs were imported from a store, and the uid. All imported jobs count as those of one
/// user.
pub(super) fn forget_oldest(
    connection: &Connection,
    user: (bool, u32),
    history: u32,
) -> rusqlite::Result<()> {
    // The index contains every column that this reads.
    let mut delete = connection.prepare(
        "DELETE FROM jobs WHERE id IN (SELECT id FROM ( \
             SELECT id, left_on_disk, left_in_qemu, domain_source, \
                 row_number() OVER newest AS place, sum(bytes) OVER newest AS bytes, \
                 sum(left_in_qemu) OVER newest AS unsettled \
             FROM jobs INDEXED BY ended_jobs_by_user \
             WHERE step = 'ended' AND imported = ?1 AND (imported OR started_by = ?2) \
             WINDOW newest AS (ORDER BY end_time DESC, id DESC ROWS UNBOUNDED PRECEDING)) \
         WHERE NOT left_on_disk AND iif(left_in_qemu, domain_source = 'registered' AND unsettled > ?5, place > ?3 OR bytes > ?4))",
    )?;
    delete.execute(params![user.0, user.1, history, MOST_BYTES, MOST_UNSETTLED])?;
    Ok(())
}

pub(super) fn select(
    connection: &Connection,
    condition: &str,
    values: impl Params,
) -> Result<Vec<JobRecord>, Error> {
    let mut statement = connection.prepare(&format!("SELECT * FROM jobs WHERE {condition}"))?;
    let mut rows = statement.query(values)?;
    let mut jobs = Vec::new();
    while let Some(row) = rows.next()? {
        jobs.push(read(row)?);
    }
    Ok(jobs)
}

/// The columns of a [`DomainRecord`].
pub(super) const DOMAIN: &str = "domain_name, domain_source, domain_owner, domain_owner_name, domain_uuid";

/// SQL for the [`DomainRecord::key`] of a row. Equal to the expression in the index of schema 12, so that SQLite uses
/// that.
pub(super) const DOMAIN_KEY: &str = "iif(domain_source = 'configured', '', domain_owner || ':' || domain_owner_name || ':') \
     || coalesce(':' || domain_uuid, domain_name)";

pub(super) fn domain(row: &Row) -> Result<DomainRecord, Error> {
    let uuid: Option<String> = row.get("domain_uuid")?;
    let uuid = uuid.map(|uuid| uuid.parse()).transpose();
    Ok(DomainRecord {
        name: row.get("domain_name")?,
        source: row.get("domain_source")?,
        owner: row.get("domain_owner")?,
        owner_name: row.get("domain_owner_name")?,
        uuid: match uuid {
            Ok(uuid) => uuid,
            Err(_) => return Err(wrong(row.get("id")?, "UUID")),
        },
    })
}

/// Returns the domain of a job.
pub(super) fn domain_of(connection: &Connection, id: u32) -> Result<DomainRecord, Error> {
    let mut select = connection.prepare(&format!("SELECT id, {DOMAIN} FROM jobs WHERE id = ?1"))?;
    let mut rows = select.query([id])?;
    let row = rows
        .next()?
        .ok_or_else(|| Error::Statement(format!("job {id} has no record")))?;
    domain(row)
}

fn wrong(id: u32, what: &str) -> Error {
    let why = format!("its {what} is invalid");
    Error::Record { id, why }
}

fn read(row: &Row) -> Result<JobRecord, Error> {
    let id = row.get("id")?;
    let wrong = |what| wrong(id, what);
    let time = |microseconds| Timestamp::from_microsecond(microseconds).map_err(|_| wrong("times"));
    let end_time: Option<i64> = row.get("end_time")?;
    Ok(JobRecord {
        id,
        backup_id: row.get("backup_id")?,
        domain: domain(row)?,
        started_by: Starter {
            uid: row.get("started_by")?,
            name: Some(row.get("started_by_name")?).filter(|name: &String| !name.is_empty()),
            connection: None,
        },
        start_time: time(row.get("start_time")?)?,
        plan: row.get("plan")?,
        speed: row.get::<_, i64>("speed")?.cast_unsigned(),
        step: row.get("step")?,
        state: row.get("state")?,
        cancel_requested: row.get("cancel_requested")?,
        end_time: end_time.map(time).transpose()?,
        result: row.get("result")?,
        error: row.get("error")?,
        disks: row.get("disks")?,
        left_in_qemu: row.get("left_in_qemu")?,
        left_on_disk: row.get("left_on_disk")?,
        imported: row.get("imported")?,
    })
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn starter(uid: u32) -> Starter {
        Starter {
            uid,
            name: Some(format!("user{uid}")),
            connection: None,
        }
    }

    fn new_job(number: u32) -> NewJob {
        NewJob {
            backup_id: format!("20261123T000000Z-{number:08x}"),
            domain: DomainRecord {
                name: "web".into(),
                source: "configured".into(),
                owner: 0,
                owner_name: "root".into(),
                uuid: Some(Uuid::from_u128(7)),
            },
            started_by: starter(1000),
            start_time: Timestamp::UNIX_EPOCH,
            plan: "{}".into(),
            speed: u64::MAX,
            state: JobState {
                step: "preparing",
                text: "first".into(),
            },
        }
    }

    fn ended(seconds: i64, left_on_disk: bool) -> Ended {
        Ended {
            time: Timestamp::from_second(seconds).unwrap(),
            result: "completed".into(),
            error: None,
            disks: "[]".into(),
            state: "last".into(),
            left_in_qemu: false,
            left_on_disk,
        }
    }

    async fn catalog() -> (tempfile::TempDir, Catalog) {
        let directory = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&directory.path().join("catalog.sqlite")).unwrap();
        (directory, catalog)
    }

    #[tokio::test]
    async fn every_step_survives_reopening_the_catalog() {
        let (directory, catalog) = catalog().await;
        let id = catalog.begin(new_job(1)).await.unwrap().id;
        let running = JobState {
            step: "running",
            text: "{}".into(),
        };
        catalog.reached(id, running).await.unwrap();
        catalog.cancel_requested(id).await.unwrap();
        drop(catalog);
        let catalog = Catalog::open(&directory.path().join("catalog.sqlite")).unwrap();
        let found = catalog.unsettled().await.unwrap();
        let [Ok(job)] = found.as_slice() else {
            panic!("{found:?}")
        };
        assert_eq!((job.step.as_str(), job.state.as_str()), ("running", "{}"));
        assert_eq!((job.speed, job.cancel_requested), (u64::MAX, true));
        assert_eq!(job.domain, new_job(1).domain);
        assert!(catalog.ended_job(id).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn the_history_is_bounded_and_keeps_jobs_with_residue() {
        let (_directory, catalog) = catalog().await;
        for number in 1..=5 {
            let id = catalog.begin(new_job(number)).await.unwrap().id;
            assert_eq!(id, number);
            let outcome = ended(i64::from(number), number == 1);
            catalog.end(id, outcome, None, 2).await.unwrap();
        }
        let left = |jobs: Vec<JobRecord>| jobs.iter().map(|job| job.id).collect::<Vec<_>>();
        let history = catalog.history().await.unwrap();
        assert_eq!(history.iter().map(|job| job.id).collect::<Vec<_>>(), [1, 4, 5]);
        let unsettled = catalog.unsettled().await.unwrap();
        assert_eq!(left(unsettled.into_iter().flatten().collect()), [1]);
        let since = Timestamp::from_second(4).unwrap();
        assert_eq!(left(catalog.ended_since(since, 10).await.unwrap()), [5]);
        catalog.cleared(1, Leftover::OnDisk).await.unwrap();
        assert!(catalog.unsettled().await.unwrap().is_empty());
    }

    /// Runs `jobs` jobs, of these users in turn, and returns the numbers that the history keeps.
    async fn kept(catalog: &Catalog, users: &[u32], jobs: u32, ended: impl Fn(u32) -> Ended) -> Vec<u32> {
        for number in 1..=jobs {
            let new = NewJob {
                started_by: starter(users[number as usize % users.len()]),
                ..new_job(number)
            };
            let id = catalog.begin(new).await.unwrap().id;
            catalog.end(id, ended(number), None, 3).await.unwrap();
        }
        let history = catalog.history().await.unwrap();
        history.iter().map(|job| job.id).collect()
    }

    #[tokio::test]
    async fn the_jobs_of_one_user_do_not_displace_those_of_another() {
        let (_directory, catalog) = catalog().await;
        let first = catalog.begin(new_job(100)).await.unwrap().id;
        catalog.end(first, ended(0, false), None, 3).await.unwrap();
        let kept = kept(&catalog, &[1001, 1002], 20, |number| {
            ended(i64::from(number), false)
        })
        .await;
        assert_eq!(kept, [1, 16, 17, 18, 19, 20, 21]);
    }

    #[tokio::test]
    async fn the_history_of_one_user_is_bounded_in_bytes_too() {
        let (_directory, catalog) = catalog().await;
        let long = |number| Ended {
            disks: format!("\"{}\"", "x".repeat(MOST_BYTES as usize / 2)),
            ..ended(i64::from(number), false)
        };
        assert_eq!(kept(&catalog, &[1001], 5, long).await, [5]);
    }

    #[tokio::test]
    async fn the_number_of_jobs_with_residue_in_registered_domains_is_bounded() {
        let (_directory, catalog) = catalog().await;
        for number in 1..=MOST_UNSETTLED + 20 {
            let mut new = new_job(number);
            new.domain.source = if number % 10 == 0 {
                "configured"
            } else {
                "registered"
            }
            .into();
            let id = catalog.begin(new).await.unwrap().id;
            let outcome = Ended {
                left_in_qemu: true,
                ..ended(i64::from(number), false)
            };
            catalog.end(id, outcome, None, 3).await.unwrap();
        }
        let history = catalog.history().await.unwrap();
        let configured = history.iter().filter(|job| job.domain.source == "configured");
        assert_eq!(
            configured.count(),
            12,
            "the service can reconnect to a configured domain"
        );
        assert_eq!(history.len(), MOST_UNSETTLED as usize + 2);
    }

    #[tokio::test]
    async fn a_step_of_a_job_without_a_record_is_an_error() {
        let (_directory, catalog) = catalog().await;
        let state = JobState {
            step: "running",
            text: "{}".into(),
        };
        assert!(catalog.reached(7, state.clone()).await.is_err());
        let id = catalog.begin(new_job(1)).await.unwrap().id;
        catalog.end(id, ended(1, false), None, 2).await.unwrap();
        assert!(catalog.reached(id, state).await.is_err());
        assert!(catalog.end(id, ended(2, false), None, 2).await.is_err());
    }

    #[tokio::test]
    async fn a_job_that_cannot_be_read_hides_no_other() {
        let (_directory, catalog) = catalog().await;
        for number in 1..=2 {
            catalog.begin(new_job(number)).await.unwrap();
        }
        let sql = "UPDATE jobs SET domain_uuid = 'no UUID' WHERE id = 1";
        catalog.change(sql, |update| update.execute([])).await.unwrap();
        let found = catalog.unsettled().await.unwrap();
        assert!(matches!(found.as_slice(), [Err(_), Ok(JobRecord { id: 2, .. })]));
    }

    #[tokio::test]
    async fn a_number_is_never_reused() {
        let (_directory, catalog) = catalog().await;
        let id = catalog.begin(new_job(1)).await.unwrap().id;
        catalog.withdraw(id).await.unwrap();
        assert_eq!(catalog.begin(new_job(2)).await.unwrap().id, id + 1);
    }
}
