//! Stored backups: restored, exported and verified, through the service (`remote`), or by this program itself with the
//! user's own rights on the store.

pub mod args;
mod export;
mod partial;
mod place;
mod progress;
pub mod remote;
mod restore;
mod verify;

pub use place::Error as PlaceError;

use std::path::Path;

use backupd::image::{self, Chain, Location};
use backupd::target::Shelf;

use crate::args::Command;
use crate::error::{Error, Result, Status};

/// Runs one of the commands without the service, if it says where its store is; nothing for the others.
pub fn run(command: &Command, json: bool) -> Option<Result<Status>> {
    let runtime = || {
        if let Some(why) = image::is_confinement_incomplete() {
            eprintln!("backupctl: warning: {why}");
        }
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::Setup)
    };
    match command {
        Command::Restore(args) => {
            let from = args.from.as_deref()?;
            Some(runtime().and_then(|runtime| runtime.block_on(restore::run(args, from, json))))
        }
        Command::Verify(args) => {
            let from = args.from.as_deref()?;
            Some(runtime().and_then(|runtime| runtime.block_on(verify::run(args, from, json))))
        }
        Command::Export(args) => {
            let from = args.from.as_deref()?;
            Some(runtime().and_then(|runtime| runtime.block_on(export::run(args, from, json))))
        }
        _ => None,
    }
}

/// The store at a path, which may be relative and lead over links: it is the user's own.
fn open_store(path: &Path) -> Result<Shelf> {
    let path = path
        .canonicalize()
        .map_err(|error| Error::Usage(format!("{}: {error}", path.display())))?;
    Ok(Shelf::of_users_store(&path).map_err(image::Error::from)?)
}

/// Whether this is enough of a backup's id for a command that destroys data: all of it, or at least its date and time. A shorter
/// beginning can be a typing error, or the number of a job.
pub fn identifies(wanted: &str, id: &str) -> bool {
    const DATE_AND_TIME: usize = "20261101T000000Z".len();
    let given = wanted.rsplit('/').next().unwrap_or_default();
    given == id || given.len() >= DATE_AND_TIME && id.starts_with(given)
}

/// Opens the backup that the user means, with all or some of its disks.
fn open_chain(store: &Shelf, backup: &str, disks: Option<&[&str]>) -> Result<(Location, Chain)> {
    let location = image::find(store, backup)?;
    let gone = || image::Error::NoSuchBackup {
        wanted: backup.to_owned(),
        store: store.path().display().to_string(),
    };
    let domain = store.below(&location.domain).map_err(image::Error::from)?;
    let chain = Chain::open(&domain.ok_or_else(gone)?, &location.id, disks)?;
    Ok((location, chain))
}
