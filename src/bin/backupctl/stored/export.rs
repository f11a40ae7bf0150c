//! `backupctl export`: serves the disks of a backup read-only over NBD, until the user interrupts it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use backupd::image;
use rustix::fs::Mode;
use serde_json::json;

use super::args::Export;
use super::{open_chain, open_store};
use crate::error::{Error, Result, Status};
use crate::interrupt::Interrupts;
use crate::output;

/// The socket's file. Dropping removes it.
pub struct Socket(PathBuf);

impl Socket {
    /// Prints the NBD URI of a disk.
    pub fn print(&self, disk: &str, json: bool) -> Result<()> {
        let uri = format!(
            "nbd+unix:///{}?socket={}",
            encoded(disk.as_bytes(), ""),
            encoded(self.0.as_os_str().as_bytes(), "/")
        );
        match json {
            true => output::print_json(&json!({ "event": "export", "disk": disk, "uri": uri }))?,
            false => output::print(&format!("{uri}\n"))?,
        }
        Ok(())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Another process may have removed it.
        let _ = fs::remove_file(&self.0);
    }
}

/// Serves until the user interrupts it.
pub async fn run(args: &Export, from: &Path, json: bool) -> Result<Status> {
    let mut interrupts = Interrupts::catch().map_err(Error::Setup)?;
    let store = open_store(from)?;
    let wanted: Vec<&str> = args.disk.iter().map(String::as_str).collect();
    let wanted = (!wanted.is_empty()).then_some(wanted.as_slice());
    let (_, chain) = open_chain(&*store, &args.backup, wanted)?;
    let (socket, listener) = listen(&args.socket)?;
    let mut export = tokio::select! {
        export = image::Export::start(chain, listener) => export?,
        _ = interrupts.next() => return Ok(Status::Completed),
    };
    for disk in export.chain().disks() {
        socket.print(&disk.disk, json)?;
    }
    tokio::select! {
        error = export.ended() => Err(error.into()),
        _ = interrupts.next() => Ok(Status::Completed),
    }
}

/// Creates a socket that no other user can connect to.
pub fn listen(path: &Path) -> Result<(Socket, OwnedFd)> {
    let fail = |error| Error::Usage(format!("cannot listen on {}: {error}", path.display()));
    let path = std::path::absolute(path).map_err(fail)?;
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let mut listener = UnixListener::bind(&path);
    if listener
        .as_ref()
        .is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
        && is_abandoned(&path)
    {
        listener = fs::remove_file(&path).and_then(|()| UnixListener::bind(&path));
    }
    rustix::process::umask(before);
    let listener = listener.map_err(fail)?;
    Ok((Socket(path), listener.into()))
}

/// Whether the socket is a leftover of a killed program, so that nobody listens on it.
fn is_abandoned(path: &Path) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|there| there.file_type().is_socket());
    is_socket
        && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Percent-encodes bytes, except those in `kept`.
fn encoded(bytes: &[u8], kept: &str) -> String {
    let encode = |byte: &u8| match char::from(*byte) {
        plain if plain.is_ascii_alphanumeric() || "-._~".contains(plain) || kept.contains(plain) => {
            plain.to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    bytes.iter().map(encode).collect()
}
