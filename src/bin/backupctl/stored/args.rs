//! The options of the commands for stored backups.

use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueHint};

use crate::args::{DiskFile, Format, parse_disk};

/// The options of `restore`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("target").args(["to", "disk"]).required(true)))]
pub struct Restore {
    /// The backup's id, or as much of its beginning as no other has; with STORE/ before it, or with --from DOMAIN/, of that one
    pub backup: String,
    /// Read this store's directory, without the service
    #[arg(long, value_name = "STORE_PATH", value_hint = ValueHint::DirPath)]
    pub from: Option<PathBuf>,
    /// Restore all disks into new files in this directory, as DIR/DISK.FORMAT
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub to: Option<PathBuf>,
    /// Restore only this disk, into this new file or onto this block device; can be given once for each disk
    #[arg(long, value_name = "DISK=FILE", value_parser = parse_disk, value_hint = ValueHint::FilePath)]
    pub disk: Vec<DiskFile>,
    /// The format of what is restored [default: qcow2, and raw on block devices]
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// Replace files that exist; each stays as it is until what replaces it is complete
    #[arg(long)]
    pub force: bool,
}

/// The options of `verify`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("which").args(["backup", "all"]).required(true)))]
pub struct Verify {
    /// The backup's id, or as much of its beginning as no other has; with STORE/ before it, or with --from DOMAIN/, of that one
    pub backup: Option<String>,
    /// Verify all backups of the store, or that you may see
    #[arg(long)]
    pub all: bool,
    /// Read this store's directory, without the service
    #[arg(long, value_name = "STORE_PATH", value_hint = ValueHint::DirPath)]
    pub from: Option<PathBuf>,
}

/// The options of `export`.
#[derive(Debug, Args)]
pub struct Export {
    /// The backup's id, or as much of its beginning as no other has; with STORE/ before it, or with --from DOMAIN/, of that one
    pub backup: String,
    /// Read this store's directory, without the service
    #[arg(long, value_name = "STORE_PATH", value_hint = ValueHint::DirPath)]
    pub from: Option<PathBuf>,
    /// Export only this disk [default: all of them]
    #[arg(long, value_name = "DISK")]
    pub disk: Option<String>,
    /// The UNIX socket to make, which only you can connect to
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub socket: PathBuf,
}
