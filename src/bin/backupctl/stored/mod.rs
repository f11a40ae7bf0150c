//! Stored backups: restore, export and verify. Through the service (`remote`), or directly with the user's own rights
//! on the store.

pub mod args;
mod export;
mod partial;
mod progress;
pub mod remote;
mod restore;
mod restore_target;
mod verify;

pub use restore_target::Error as TargetError;

use std::path::Path;

use backupd::image::{self, Chain, Location};
use backupd::store::{self, Store};

use crate::args::Command;
use crate::error::{Error, Result, Status};

/// Runs a command with `--from` without the service. `None` for all other commands.
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

/// Opens the store at a path of the user's, which may be relative and lead over symbolic links.
fn open_store(path: &Path) -> Result<Box<dyn Store>> {
    let path = path
        .canonicalize()
        .map_err(|error| Error::Usage(format!("{}: {error}", path.display())))?;
    Ok(store::open_users(&path).map_err(image::Error::from)?)
}

/// Whether `wanted` suffices as an id for a command that destroys data: the whole id, or at least date and time. A
/// shorter beginning could be a typing error, or the number of a job.
pub fn identifies(wanted: &str, id: &str) -> bool {
    const DATE_AND_TIME: usize = "20261101T000000Z".len();
    let given = wanted.rsplit('/').next().unwrap_or_default();
    given == id || given.len() >= DATE_AND_TIME && id.starts_with(given)
}

/// Opens the given backup, with all or some of its disks.
fn open_chain(store: &dyn Store, backup: &str, disks: Option<&[&str]>) -> Result<(Location, Chain)> {
    let location = image::find(store, backup)?;
    let chain = Chain::open(store, location.name(), disks)?;
    Ok((location, chain))
}
