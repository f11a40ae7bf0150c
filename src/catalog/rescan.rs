//! Taking in what lies in the stores: the manifests know all that must be known of a good backup.

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, named_params, params};

use super::backups::keep_backup;
use super::{BackupRecord, Catalog, Error, Instant, NewJob};

/// Numbers above are left to jobs to come: a manifest from elsewhere could name the last one there is.
const MOST_NUMBER: u32 = u32::MAX / 2;

/// A backup as its store has it, and what is remembered of the job that made it if nobody here knows that job.
#[derive(Debug, Clone)]
pub struct StoredBackup {
    pub backup: BackupRecord,
    /// The job's number where it ran. Here it has another one if this one is taken.
    pub number: u32,
    pub job: NewJob,
    pub instant: Instant,
    pub end_time: Timestamp,
    /// JSON.
    pub disks: String,
}

/// What came of taking in a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    Kept,
    /// Its job has not ended.
    UnderWay,
    /// Its job, which has this number, did not complete, and what it left could not be removed.
    NotGood(u32),
}

impl Catalog {
    /// The backups in a store that are on record, as (domain's directory, id).
    pub async fn backups_in(&self, store: String) -> Result<Vec<(String, String)>, Error> {
        self.run(move |connection| {
            let mut select = connection.prepare("SELECT domain, id FROM backups WHERE store = ?1")?;
            let rows = select.query_map([store], |row| Ok((row.get(0)?, row.get(1)?)))?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// Takes in backups that were found in a store, all or none; what came of each is in the order of the backups.
    pub async fn take_in(&self, found: Vec<StoredBackup>) -> Result<Vec<Taken>, Error> {
        self.run(move |connection| {
            let transaction = connection.transaction()?;
            let taken = found.iter().map(|found| take_in(&transaction, found));
            let taken = taken.collect::<Result<_, _>>()?;
            transaction.commit()?;
            Ok(taken)
        })
        .await
    }

    /// Forgets backups that are not in their store any more, given as (domain's directory, id).
    pub async fn forget(&self, store: String, gone: Vec<(String, String)>) -> Result<(), Error> {
        self.run(move |connection| {
            let transaction = connection.transaction()?;
            for (domain, id) in gone {
                let delete = "DELETE FROM backups WHERE store = ?1 AND domain = ?2 AND id = ?3";
                transaction.execute(delete, params![store, domain, id])?;
            }
            Ok(transaction.commit()?)
        })
        .await
    }
}

fn take_in(connection: &Connection, found: &StoredBackup) -> Result<Taken, Error> {
    let job: Option<(u32, String, Option<String>)> = connection
        .prepare("SELECT id, step, result FROM jobs WHERE backup_id = ?1")?
        .query_row([&found.backup.id], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })
        .optional()?;
    match job {
        None => insert_job(connection, found)?,
        Some((_, step, _)) if step != "ended" => return Ok(Taken::UnderWay),
        Some((_, _, Some(result))) if result == "completed" => {}
        Some((id, ..)) => return Ok(Taken::NotGood(id)),
    }
    keep_backup(connection, &found.backup)?;
    Ok(Taken::Kept)
}

fn insert_job(connection: &Connection, found: &StoredBackup) -> rusqlite::Result<()> {
    let taken = connection
        .prepare("SELECT 1 FROM jobs WHERE id = ?1")?
        .exists([found.number])?;
    let job = &found.job;
    let mut insert = connection.prepare(
        "INSERT INTO jobs (id, backup_id, domain_name, domain_source, domain_owner, domain_owner_name, domain_uuid, \
             started_by, start_time, plan, speed, step, instant, quiesced, end_time, result, disks, left_in_qemu, left_on_disk) \
         VALUES (:id, :backup_id, :name, :source, :owner, :owner_name, :uuid, :started_by, :start_time, :plan, :speed, 'ended', \
             :instant, :quiesced, :end_time, 'completed', :disks, 0, 0)",
    )?;
    insert.execute(named_params! {
        ":id": Some(found.number).filter(|number| !taken && (1..=MOST_NUMBER).contains(number)),
        ":backup_id": job.backup_id,
        ":name": job.domain.name,
        ":source": job.domain.source,
        ":owner": job.domain.owner,
        ":owner_name": job.domain.owner_name,
        ":uuid": job.domain.uuid.map(|uuid| uuid.to_string()),
        ":started_by": job.started_by,
        ":start_time": job.start_time.as_microsecond(),
        ":plan": job.plan,
        ":speed": job.speed.cast_signed(),
        ":instant": found.instant.time.as_microsecond(),
        ":quiesced": found.instant.quiesced,
        ":end_time": found.end_time.as_microsecond(),
        ":disks": found.disks,
    })?;
    Ok(())
}
