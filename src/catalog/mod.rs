//! The durable records: the jobs with every step that must survive, their outcomes, and the backups in the stores.
//!
//! The service's own memory, in one SQLite file in its state directory; and the manifest beside the images of each backup,
//! from which a store can be read on a host that never ran the service. Knows files and words; not QEMU, nor plans, nor
//! callers: other modules' records are opaque text.

mod backups;
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
mod standing;

pub use backups::{Backup, BackupFilter, BackupKey, BackupRecord, BackupState, Cursor, Looked};
pub use chains::{Link, Stored, broken};
pub use checkpoints::{Begun, CheckpointRecord, Recorded};
pub use directory::{DirectoryState, Used};
pub use error::Error;
pub use history::EndedJob;
pub use proof::Key;
pub use record::{DomainRecord, Ended, JobRecord, JobState, Leftover, NewJob, QUEUED, Starter};
pub use rescan::{StoredBackup, Taken};
pub use standing::{Standing, There};

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::{Connection, Statement};
use uuid::Uuid;

/// The catalog's file name in the state directory.
pub const FILE_NAME: &str = "catalog.sqlite";
/// The name of the key's file beside it.
const KEY_NAME: &str = "key";

/// The open catalog. Clones are the same one. What is called is done, even if nobody waits for it any more.
#[derive(Debug, Clone)]
pub struct Catalog {
    connection: Arc<Mutex<Connection>>,
    service: Uuid,
    key: Key,
}

impl Catalog {
    /// Opens the catalog at `path`, and makes one if there is none. Blocks.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let connection = database::open(path)?;
        let service: String = connection.query_row("SELECT id FROM service", [], |row| row.get(0))?;
        let wrong = |_| Error::Statement(format!("'{service}' is not a service's id"));
        let key_path = path.with_file_name(KEY_NAME);
        let key = Key::open(&key_path).map_err(|source| Error::Io {
            path: key_path,
            action: "read or made",
            source,
        })?;
        Ok(Self {
            key,
            service: service.parse().map_err(wrong)?,
            connection: Arc::new(Mutex::new(connection)),
        })
    }

    /// Names this service in the manifests that it writes.
    pub fn service(&self) -> Uuid {
        self.service
    }

    /// Proves the manifests that this service writes.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Runs `work` where it keeps nobody else waiting.
    async fn run<T, W>(&self, work: W) -> Result<T, Error>
    where
        T: Send + 'static,
        W: FnOnce(&mut Connection) -> Result<T, Error> + Send + 'static,
    {
        let catalog = self.connection.clone();
        let done = tokio::task::spawn_blocking(move || {
            // A transaction that a panic left is rolled back when it is dropped.
            let mut connection = catalog.lock().unwrap_or_else(PoisonError::into_inner);
            work(&mut connection)
        });
        done.await.map_err(|error| Error::Statement(error.to_string()))?
    }

    /// Runs one statement that changes something.
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
