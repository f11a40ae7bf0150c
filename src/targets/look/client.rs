//! The service's end of a connection to the helper.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::Error;
use super::protocol::{Answer, MOST_ANSWER, MOST_QUESTION, Question, Received, receive, send};

/// How long the helper may be silent. It reports every second that it is at work, so a silent helper hangs. The time
/// is shorter than the timeout of a call that waits for its backup to begin, so that the caller gets the error.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A connection to a helper.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    path: PathBuf,
}

impl Connection {
    /// Connects to the helper at `path`, which must run as root.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let stream = connected(path).map_err(|error| failed(path, &error))?;
        let path = path.to_owned();
        Ok(Self { stream, path })
    }

    pub fn ask(&self, question: &Question) -> Result<Answer, Error> {
        let failed = |error: io::Error| failed(&self.path, &error);
        send(&self.stream, question, MOST_QUESTION).map_err(failed)?;
        loop {
            match receive(&self.stream, MOST_ANSWER).map_err(failed)? {
                Received::Message(Answer::Failed(why)) => return Err(Error::Failed(why)),
                Received::Message(answer) => return Ok(answer),
                Received::Working => {}
                Received::OtherVersion => return Err(Error::Version),
            }
        }
    }
}

fn failed(path: &Path, error: &io::Error) -> Error {
    let why = match error.kind() {
        // The timeouts of the socket (socket(7)).
        ErrorKind::WouldBlock | ErrorKind::TimedOut => return Error::stalled(path),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            "it closed the connection".to_owned()
        }
        _ => error.to_string(),
    };
    let path = path.to_owned();
    Error::Unreachable { path, why }
}

fn connected(path: &Path) -> io::Result<UnixStream> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // Set them before connecting, because connect(2) waits until the helper accepts.
    for timeout in [Timeout::Send, Timeout::Recv] {
        set_socket_timeout(&socket, timeout, Some(PATIENCE))?;
    }
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    if !socket_peercred(&socket)?.uid.is_root() {
        return Err(io::Error::other("it does not run as root"));
    }
    Ok(UnixStream::from(socket))
}
