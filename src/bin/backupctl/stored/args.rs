//! The options of the commands for stored backups.

use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueHint};

use crate::args::{DiskFile, Format, parse_disk};

/// The options of `restore`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("target").args(["to", "disk"]).required(true)))]
pub struct Restore {
    /// The id of the backup, or a unique beginning of it
    ///
    /// Write STORE/ID to select the store; with --from, DOMAIN/ID to select the VM.
    pub backup: String,
    /// Read the store in this directory, without the service
    #[arg(long, value_name = "STORE_PATH", value_hint = ValueHint::DirPath)]
    pub from: Option<PathBuf>,
    /// Restore all disks into new files in this directory
    ///
    /// The files are called DIR/DISK.FORMAT.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub to: Option<PathBuf>,
    /// Restore this disk into a new file or onto a block device
    ///
    /// Repeat the option for more disks.
    #[arg(long, value_name = "DISK=FILE", value_parser = parse_disk, value_hint = ValueHint::FilePath)]
    pub disk: Vec<DiskFile>,
    /// The format of the restored images
    ///
    /// The default is qcow2, and raw on block devices.
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// Replace existing files
    ///
    /// Each file remains unchanged until its replacement is complete.
    #[arg(long)]
    pub force: bool,
}

/// The options of `verify`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("which").args(["backup", "all"]).required(true)))]
pub struct Verify {
    /// The id of the backup, or a unique beginning of it
    ///
    /// Write STORE/ID to select the store; with --from, DOMAIN/ID to select the VM.
    pub backup: Option<String>,
    /// Verify all backups in the store, or all that you may see
    #[arg(long)]
    pub all: bool,
    /// Read the store in this directory, without the service
    #[arg(long, value_name = "STORE_PATH", value_hint = ValueHint::DirPath)]
    pub from: Option<PathBuf>,
}

/// The options of `export`.
#[derive(Debug, Args)]
pub struct Export {
    /// The id of the backup, or a unique beginning of it
    ///
    /// Write STORE/ID to select the store; with --from, DOMAIN/ID to select the VM.
    pub backup: String,
    /// Read the store in this directory, without the service
    #[arg(long, value_name = "STORE_PATH", value_hint = ValueHint::DirPath)]
    pub from: Option<PathBuf>,
    /// Export only this disk [default: all disks]
    #[arg(long, value_name = "DISK")]
    pub disk: Option<String>,
    /// The UNIX socket to create; only you can connect to it
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub socket: PathBuf,
}
