//! The durable records: jobs with every step that must survive, their outcomes, and the backups in the stores.
//!
//! One SQLite file in the state directory. The manifests beside the images repeat what is needed to read a store on
//! another host. Knows files and plain values. Must not know QEMU, plans or callers: records of other modules are
//! opaque text.

mod backups;
mod bitmap_owners;
mod chains;
mod checkpoints;
mod database;
mod directory;
mod error;
mod generations;
mod history;
mod jobs;
mod marks;
mod merging;
mod proof;
mod record;
mod rescan;

pub use backups::{Backup, BackupFilter, BackupKey, BackupRecord, BackupState, Cursor, ProbeResult};
pub use chains::{Link, Stored, broken};
pub use checkpoints::NewCheckpoint;
pub use directory::{DirectoryState, UsedDirectory};
pub use error::Error;
pub use history::EndedJob;
pub use proof::Key;
pub use record::{DomainRecord, Ended, JobRecord, JobState, Leftover, NewJob, QUEUED, Starter};
pub use rescan::{ImportResult, StoredBackup};

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::{Connection, Statement};
use uuid::Uuid;

/// The catalog's file name in the state directory.
pub const FILE_NAME: &str = "catalog.sqlite";
/// The file name of the key, in the same directory.
const KEY_NAME: &str = "key";

/// The open catalog. Clones share it. A call completes even if its caller no longer waits.
#[derive(Debug, Clone)]
pub struct Catalog {
    connection: Arc<Mutex<Connection>>,
    service: Uuid,
    key: Key,
}

impl Catalog {
    /// Opens the catalog at `path`, or creates it. Blocks.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let connection = database::open(path)?;
        let service: String = connection.query_row("SELECT id FROM service", [], |row| row.get(0))?;
        let wrong = |_| Error::Statement(format!("'{service}' is not a valid service id"));
        let key_path = path.with_file_name(KEY_NAME);
        let key = Key::open(&key_path).map_err(|source| Error::Io {
            path: key_path,
            action: "read or create",
            source,
        })?;
        Ok(Self {
            key,
            service: service.parse().map_err(wrong)?,
            connection: Arc::new(Mutex::new(connection)),
        })
    }

    /// The id of this service, which its manifests contain.
    pub fn service(&self) -> Uuid {
        self.service
    }

    /// The key for the proofs in this service's manifests.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Runs `work` on a blocking thread.
    async fn run<T, W>(&self, work: W) -> Result<T, Error>
    where
        T: Send + 'static,
        W: FnOnce(&mut Connection) -> Result<T, Error> + Send + 'static,
    {
        let catalog = self.connection.clone();
        let done = tokio::task::spawn_blocking(move || {
            // Dropping a transaction rolls it back, so a panic leaves none open.
            let mut connection = catalog.lock().unwrap_or_else(PoisonError::into_inner);
            work(&mut connection)
        });
        done.await.map_err(|error| Error::Statement(error.to_string()))?
    }

    /// Runs one statement that changes records.
    async fn change<W>(&self, sql: &'static str, work: W) -> Result<(), Error>
    where
        W: FnOnce(&mut Statement) -> rusqlite::Result<usize> + Send + 'static,
    {
        self.run(move |connection| {
            work(&mut connection.prepare(sql)?)?;
            Ok(())
        })
        .await
    }
}
