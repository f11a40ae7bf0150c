//! Updates the records from the stores: a manifest has everything that the record of a complete backup needs.

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, named_params};

use super::backups::keep_backup;
use super::jobs::{domain_of, forget_oldest};
use super::{BackupRecord, Catalog, Error, NewJob};

/// Higher numbers are reserved for new jobs, because a foreign manifest could contain the highest possible number.
const MOST_NUMBER: u32 = u32::MAX / 2;

/// A backup as its store describes it, with a job record to insert if the catalog has none.
#[derive(Debug, Clone)]
pub struct StoredBackup {
    pub backup: BackupRecord,
    /// The job's number on the host that ran it. The job gets another number here if this one is taken.
    pub number: u32,
    pub job: NewJob,
    pub end_time: Timestamp,
    /// JSON.
    pub disks: String,
}

/// The result of recording a backup from a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportResult {
    Recorded,
    /// Its job has not ended, or its residue is still being removed.
    Unfinished,
    /// The job with this number created it and did not complete.
    NotCompleted(u32),
}

impl Catalog {
    /// Returns the recorded backups of a store, as (domain's directory, id).
    pub async fn backups_in(&self, store: String) -> Result<Vec<(String, String)>, Error> {
        self.run(move |connection| {
            let mut select = connection.prepare("SELECT domain, id FROM backups WHERE store = ?1")?;
            let rows = select.query_map([store], |row| Ok((row.get(0)?, row.get(1)?)))?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// Returns the highest number that a job ever had.
    pub async fn last_number(&self) -> Result<u32, Error> {
        self.run(|connection| {
            let mut select = connection.prepare("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'")?;
            Ok(select.query_row([], |row| row.get(0)).optional()?.unwrap_or(0))
        })
        .await
    }

    /// Records backups that were found in a store, all or none, and returns a result for each in their order. Does not
    /// reuse numbers up to `last`. Keeps at most `history` imported jobs.
    pub async fn take_in(
        &self,
        found: Vec<StoredBackup>,
        last: u32,
        history: u32,
    ) -> Result<Vec<ImportResult>, Error> {
        self.run(move |connection| {
            let transaction = connection.transaction()?;
            let taken = found.iter().map(|found| take_in(&transaction, found, last));
            let taken = taken.collect::<Result<_, _>>()?;
            forget_oldest(&transaction, (true, 0), history)?;
            transaction.commit()?;
            Ok(taken)
        })
        .await
    }

    /// Returns true if a job with this backup id is on record.
    pub async fn knows_backup(&self, backup_id: String) -> Result<bool, Error> {
        self.run(move |connection| {
            let mut select = connection.prepare("SELECT 1 FROM jobs WHERE backup_id = ?1")?;
            Ok(select.exists([backup_id])?)
        })
        .await
    }
}

/// The record of the job that created a backup.
struct Maker {
    id: u32,
    settled: bool,
    completed: bool,
}

fn take_in(connection: &Connection, found: &StoredBackup, last: u32) -> Result<ImportResult, Error> {
    let maker = connection
        .prepare(
            "SELECT id, step = 'ended' AND (result = 'completed' OR NOT left_on_disk), result IS 'completed' \
             FROM jobs WHERE backup_id = ?1",
        )?
        .query_row([&found.backup.id], |row| {
            Ok(Maker {
                id: row.get(0)?,
                settled: row.get(1)?,
                completed: row.get(2)?,
            })
        })
        .optional()?;
    let domain = match maker {
        None => {
            insert_job(connection, found, last)?;
            found.job.domain.clone()
        }
        Some(maker) if !maker.settled => return Ok(ImportResult::Unfinished),
        Some(maker) if !maker.completed => return Ok(ImportResult::NotCompleted(maker.id)),
        Some(maker) => domain_of(connection, maker.id)?,
    };
    keep_backup(connection, &found.backup, &domain)?;
    Ok(ImportResult::Recorded)
}

fn insert_job(connection: &Connection, found: &StoredBackup, last: u32) -> rusqlite::Result<()> {
    let taken = connection
        .prepare("SELECT 1 FROM jobs WHERE id = ?1")?
        .exists([found.number])?;
    let free = !taken && (last + 1..=MOST_NUMBER).contains(&found.number);
    let job = &found.job;
    let mut insert = connection.prepare(
        "INSERT INTO jobs (id, backup_id, domain_name, domain_source, domain_owner, domain_owner_name, domain_uuid, \
             started_by, start_time, plan, speed, step, state, end_time, result, disks, left_in_qemu, left_on_disk, imported) \
         VALUES (:id, :backup_id, :name, :source, :owner, :owner_name, :uuid, :started_by, :start_time, :plan, :speed, 'ended', \
             :state, :end_time, 'completed', :disks, 0, 0, 1)",
    )?;
    insert.execute(named_params! {
        ":id": Some(found.number).filter(|_| free),
        ":backup_id": job.backup_id,
        ":name": job.domain.name,
        ":source": job.domain.source,
        ":owner": job.domain.owner,
        ":owner_name": job.domain.owner_name,
        ":uuid": job.domain.uuid.map(|uuid| uuid.to_string()),
        ":started_by": job.started_by.uid,
        ":start_time": job.start_time.as_microsecond(),
        ":plan": job.plan,
        ":speed": job.speed.cast_signed(),
        ":state": job.state.text,
        ":end_time": found.end_time.as_microsecond(),
        ":disks": found.disks,
    })?;
    Ok(())
}
