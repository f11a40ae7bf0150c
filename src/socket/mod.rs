//! Connects to a UNIX socket at a path in which other users may have a hand: no link of theirs leads the service to somebody
//! else's socket, and the program that listens is the owner's.
//!
//! Does not know what is spoken there.

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

/// Where a socket is, and whose it has to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    pub path: PathBuf,
    /// Where it is not said, anybody's: then the listener has to be the socket's owner, or root.
    pub user: Option<User>,
}

/// What listens there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Monitor,
    Agent,
}

/// A user, as the administrator says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum User {
    Number(u32),
    Name(String),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: there is no such socket", path.display())]
    Absent { path: PathBuf },
    #[error("{}: nobody listens there", path.display())]
    NobodyListens { path: PathBuf },
    #[error("{0}")]
    Path(path::Error),
    #[error("{}: is no socket", path.display())]
    NotASocket { path: PathBuf },
    #[error("{}: has other names beside this one (hard links), so it may be another program's socket", path.display())]
    Linked { path: PathBuf },
    #[error(
        "{}: is libvirt's own connection to this VM, and libvirt would hang if it were taken. Give the VM a monitor of its own for backups: \
         a further '-qmp unix:PATH,server=on,wait=off' in <qemu:commandline>, or none while libvirt has to manage it alone",
        path.display()
    )]
    Libvirts { path: PathBuf },
    #[error(
        "{}: belongs to user {owner}, and not to '{user}', whom 'user' in the domain's file names",
        path.display()
    )]
    Owner { path: PathBuf, owner: u32, user: String },
    #[error("'user' in the domain's file: there is no user '{0}'")]
    NoUser(String),
    #[error(
        "{}: belongs to user {owner}, but a program of user {listener} listens there: remove the socket, and start that program as the socket's owner",
        path.display()
    )]
    Listener {
        path: PathBuf,
        owner: u32,
        listener: u32,
    },
    #[error("{}: another program is connected there, and others wait: give the service a socket of its own", path.display())]
    Full { path: PathBuf },
    #[error("{}: it cannot be looked at in time: does its file system answer?", path.display())]
    TimedOut { path: PathBuf },
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

impl Error {
    /// Whether there is no program behind the path now: nothing is wrong with it.
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::Absent { .. } | Self::NobodyListens { .. })
    }

    /// Whether somebody has to change something: nothing else helps.
    pub fn is_refusal(&self) -> bool {
        !self.is_absence() && !matches!(self, Self::Full { .. } | Self::TimedOut { .. } | Self::Io { .. })
    }
}

/// Connects to one address. Clones look for it one after another: where its file system hangs, it keeps one thread.
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

    /// A connection to who listens there, within `patience`.
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
        // The very socket that was looked at, whatever has its name by now.
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

    /// Runs what may hang on a thread. If it does, no other is started until it returns.
    async fn in_turn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let turn = self.turn.clone().acquire_owned().await;
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work()
        });
        // A panic aborts the service, and nothing cancels this.
        done.await.map_err(|error| self.failed(io::Error::other(error)))
    }

    fn failed(&self, error: io::Error) -> Error {
        let path = self.address.path.clone();
        match error.kind() {
            ErrorKind::NotFound => Error::Absent { path },
            ErrorKind::ConnectionRefused => Error::NobodyListens { path },
            // Its backlog is full (unix(7)).
            ErrorKind::WouldBlock => Error::Full { path },
            _ => Error::Io { path, error },
        }
    }
}

/// The socket, and the user whose it has to be if that is said.
fn look(address: &Address) -> Result<(Found, Option<u32>), Error> {
    let path = || address.path.clone();
    // Also one that is not there now: it is still not to be taken when it comes.
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
    // Who may write to a directory can put any file into it by another name, where the kernel does not protect hard links.
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

/// Blocks.
fn number(user: &User) -> Result<u32, Error> {
    match user {
        User::Number(number) => Ok(*number),
        User::Name(name) => match nix::unistd::User::from_name(name) {
            Ok(Some(user)) => Ok(user.uid.as_raw()),
            Ok(None) | Err(_) => Err(Error::NoUser(name.clone())),
        },
    }
}

/// The kernel keeps the user who called listen(2) (SO_PEERCRED, socket(7)). Where no user is said, root may listen at another's
/// socket: service managers do that for programs of users, as does a QEMU that was started by root and has become another user.
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
