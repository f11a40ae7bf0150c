//! Connects to a UNIX socket at a path that other users can change. Links of other users are not followed, and the
//! listening program must belong to the socket's owner.
//!
//! Must not know the protocol on the socket.

mod libvirts;

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::FileType;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::path::{self, Found, Links, Trust, find};

/// Path of a socket and the user that must own it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    pub path: PathBuf,
    /// The required owner. If absent, any user may own the socket, but the listener must be its owner or root.
    pub user: Option<User>,
}

/// The service that listens on a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Monitor,
    Agent,
}

/// A user as the administrator wrote it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum User {
    Number(u32),
    Name(String),
}

/// The reasons why no connection is made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: the socket does not exist", path.display())]
    Absent { path: PathBuf },
    #[error("{}: no program listens there", path.display())]
    NobodyListens { path: PathBuf },
    #[error("{0}")]
    Path(path::Error),
    #[error("{}: is not a socket", path.display())]
    NotASocket { path: PathBuf },
    #[error(
        "{}: has several names (hard links), so it may be the socket of another program. Remove the other names",
        path.display()
    )]
    Linked { path: PathBuf },
    #[error(
        "{}: is libvirt's own connection to this VM, and libvirt would hang if the service used it. Give the VM a \
         separate monitor for backups with another '-qmp unix:PATH,server=on,wait=off' in <qemu:commandline>, or \
         configure none while only libvirt manages it",
        path.display()
    )]
    Libvirts { path: PathBuf },
    #[error(
        "{}: belongs to user {owner}, but 'user' in the domain's file names '{user}'",
        path.display()
    )]
    Owner { path: PathBuf, owner: u32, user: String },
    #[error("'user' in the domain's file: user '{0}' does not exist")]
    NoUser(String),
    #[error(
        "{}: belongs to user {owner}, but a program of user {listener} listens there. Remove the socket, and start \
         that program as the socket's owner",
        path.display()
    )]
    Listener {
        path: PathBuf,
        owner: u32,
        listener: u32,
    },
    #[error(
        "{}: another program is connected, and the queue of connections is full. Create a monitor socket for backups \
         only",
        path.display()
    )]
    Full { path: PathBuf },
    #[error("{}: it cannot be opened in time. Check whether its file system responds", path.display())]
    TimedOut { path: PathBuf },
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

impl Error {
    /// Returns true if no program listens at the path now, which is not a fault of the path.
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::Absent { .. } | Self::NobodyListens { .. })
    }

    /// Returns true if retrying cannot help: the administrator has to change something.
    pub fn is_refusal(&self) -> bool {
        !self.is_absence() && !matches!(self, Self::Full { .. } | Self::TimedOut { .. } | Self::Io { .. })
    }
}

/// Connects to one address. Clones resolve the path one at a time, so a hung file system blocks only one thread.
#[derive(Debug, Clone)]
pub struct Dialer {
    address: Address,
    purpose: Purpose,
    turn: Arc<Semaphore>,
}

impl Dialer {
    pub fn new(address: Address, purpose: Purpose) -> Self {
        Self {
            address,
            purpose,
            turn: Arc::new(Semaphore::new(1)),
        }
    }

    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Connects to the program that listens there, within `patience`.
    pub async fn connect(&self, patience: Duration) -> Result<UnixStream, Error> {
        let connected = timeout(patience, self.dial()).await;
        connected.unwrap_or_else(|_| {
            let path = self.address.path.clone();
            Err(Error::TimedOut { path })
        })
    }

    async fn dial(&self) -> Result<UnixStream, Error> {
        let address = self.address.clone();
        let (found, wanted) = self.in_turn(move || look(&address)).await??;
        // Connects to the socket that was checked, even if its path has been replaced since.
        let through = format!("/proc/self/fd/{}", found.file.as_raw_fd());
        let stream = UnixStream::connect(through).await;
        let stream = stream.map_err(|error| self.failed(error))?;
        let listener = stream.peer_cred().map_err(|error| self.failed(error))?;
        check_listener(&self.address.path, listener.uid(), found.stat.st_uid, wanted)?;
        let process = listener.pid().and_then(|pid| u32::try_from(pid).ok());
        if let (Purpose::Monitor, Some(process)) = (self.purpose, process.filter(|pid| *pid != 0)) {
            let path = found.path;
            let is_libvirts = move |path: &Path| libvirts::is_behind(process, path);
            self.in_turn(move || match is_libvirts(&path) {
                true => Err(Error::Libvirts { path }),
                false => Ok(()),
            })
            .await??;
        }
        Ok(stream)
    }

    /// Runs `work`, which may hang, on a blocking thread. Starts no other until it returns.
    async fn in_turn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let turn = self.turn.clone().acquire_owned().await;
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work()
        });
        // A panic aborts the service, and this task is never cancelled.
        done.await.map_err(|error| self.failed(io::Error::other(error)))
    }

    fn failed(&self, error: io::Error) -> Error {
        let path = self.address.path.clone();
        match error.kind() {
            ErrorKind::NotFound => Error::Absent { path },
            ErrorKind::ConnectionRefused => Error::NobodyListens { path },
            // The listener's backlog is full (unix(7)).
            ErrorKind::WouldBlock => Error::Full { path },
            _ => Error::Io { path, error },
        }
    }
}

/// Returns the socket, and the uid of its required owner if one is configured.
fn look(address: &Address) -> Result<(Found, Option<u32>), Error> {
    let path = || address.path.clone();
    // Also refused if it does not exist now, because libvirt may create it later.
    if libvirts::is_one(&address.path) {
        return Err(Error::Libvirts { path: path() });
    }
    let found = find(&address.path, Trust::Named, Links::Administrators).map_err(|error| match error {
        path::Error::NotThere { .. } => Error::Absent { path: path() },
        error => Error::Path(error),
    })?;
    if libvirts::is_one(&found.path) {
        return Err(Error::Libvirts { path: found.path });
    }
    if FileType::from_raw_mode(found.stat.st_mode) != FileType::Socket {
        return Err(Error::NotASocket { path: path() });
    }
    // Users who can write to the directory can hard-link any file into it unless the kernel protects hard links.
    if found.stat.st_nlink > 1 {
        return Err(Error::Linked { path: path() });
    }
    let wanted = address.user.as_ref().map(number).transpose()?;
    let owner = found.stat.st_uid;
    if let (Some(wanted), Some(user)) = (wanted, &address.user)
        && wanted != owner
    {
        let user = match user {
            User::Number(number) => number.to_string(),
            User::Name(name) => name.clone(),
        };
        return Err(Error::Owner {
            path: path(),
            owner,
            user,
        });
    }
    Ok((found, wanted))
}

/// Resolves the user's number. Blocks.
fn number(user: &User) -> Result<u32, Error> {
    match user {
        User::Number(number) => Ok(*number),
        User::Name(name) => match nix::unistd::User::from_name(name) {
            Ok(Some(user)) => Ok(user.uid.as_raw()),
            Ok(None) | Err(_) => Err(Error::NoUser(name.clone())),
        },
    }
}

/// The kernel reports the user that called listen(2) (SO_PEERCRED, socket(7)). Without a required owner, root may
/// listen at another user's socket: service managers do that, and so does a QEMU that root started and that then
/// changed its user.
fn check_listener(path: &Path, listener: u32, owner: u32, wanted: Option<u32>) -> Result<(), Error> {
    if listener == owner || (wanted.is_none() && listener == 0) {
        return Ok(());
    }
    Err(Error::Listener {
        path: path.to_owned(),
        owner,
        listener,
    })
}
