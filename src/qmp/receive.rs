//! What a peer sends, read so that no other process decides whether this one waits.
//!
//! The user who passed a socket shares its open file description, and can make it block. And a message can carry open files.
//! Without room for them the kernel closes them in the thread that reads; to close some (a socket with `SO_LINGER`, a file of a
//! FUSE file system) takes as long as another process wants. So room is made for all that can come, and it is closed on a thread
//! that nobody waits for. No QEMU sends any.

use std::io::{self, IoSliceMut};
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use tokio::net::UnixStream;

/// Of control data, in bytes: for 253 descriptors (`SCM_MAX_FD` of the kernel), credentials, a security label, a pidfd.
const CONTROL: usize = 8 << 10;
/// A message with the sender's pidfd: who shares the socket can ask for these. From the kernel's `linux/socket.h`.
const SCM_PIDFD: i32 = 4;
/// Threads that may hang in a close: more than there are monitors that end at a time. What comes beyond stays open.
const MOST_CLOSING: usize = 1024;
/// Of each of them, in bytes.
const STACK: usize = 64 << 10;

static CLOSING: AtomicUsize = AtomicUsize::new(0);

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes; none at the end.
    Bytes(usize),
    /// A message with descriptors, which are being closed.
    Descriptors,
}

/// Reads into `bytes` what is there. Does not wait.
pub fn receive(socket: &impl AsRawFd, bytes: &mut [u8]) -> io::Result<Received> {
    let mut control = vec![0; CONTROL];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut into = [IoSliceMut::new(bytes)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut into, Some(&mut control), flags)?;
    let mut descriptors: Vec<RawFd> = Vec::new();
    for part in message.cmsgs()? {
        match part {
            ControlMessageOwned::ScmRights(passed) => descriptors.extend(passed),
            ControlMessageOwned::Unknown(part) if part.cmsg_header.cmsg_type == SCM_PIDFD => {
                let pidfd = part.data_bytes.first_chunk().copied();
                descriptors.extend(pidfd.map(RawFd::from_ne_bytes));
            }
            _ => {}
        }
    }
    if descriptors.is_empty() {
        return Ok(Received::Bytes(message.bytes));
    }
    apart(move || descriptors.into_iter().for_each(close));
    Ok(Received::Descriptors)
}

/// A socket that keeps nobody waiting when it is dropped.
#[derive(Debug)]
pub struct Socket(Option<UnixStream>);

impl Socket {
    pub fn new(stream: UnixStream) -> Self {
        Self(Some(stream))
    }
}

impl Deref for Socket {
    type Target = UnixStream;

    fn deref(&self) -> &UnixStream {
        self.0.as_ref().expect("it is there until this is dropped")
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Another process that has the socket goes on using it. If nobody has, the kernel closes what is still in its queue.
        if let Some(Ok(socket)) = self.0.take().map(UnixStream::into_std) {
            apart(move || drop(socket));
        }
    }
}

/// Runs what may hang on a thread of its own; not in the runtime's, which are counted. Where there can be none, nothing is
/// closed rather than that somebody waits.
fn apart(work: impl FnOnce() + Send + 'static) {
    if CLOSING.fetch_add(1, Ordering::Relaxed) >= MOST_CLOSING {
        CLOSING.fetch_sub(1, Ordering::Relaxed);
        tracing::warn!("what peers of the service have sent does not close: it stays open");
        std::mem::forget(work);
        return;
    }
    let work = ManuallyDrop::new(work);
    let thread = std::thread::Builder::new()
        .name("close".to_owned())
        .stack_size(STACK);
    let spawned = thread.spawn(move || {
        ManuallyDrop::into_inner(work)();
        CLOSING.fetch_sub(1, Ordering::Relaxed);
    });
    if let Err(error) = spawned {
        CLOSING.fetch_sub(1, Ordering::Relaxed);
        tracing::warn!(%error, "what a peer of the service has sent cannot be closed");
    }
}

fn close(descriptor: RawFd) {
    // Nobody waits for what the service does not want; on what is no socket it does nothing. The same socket under another
    // number, for only its owner can set that.
    let same = pidfd_open(getpid(), PidfdFlags::empty())
        .and_then(|own| pidfd_getfd(own, descriptor, PidfdGetfdFlags::empty()));
    if let Ok(same) = &same {
        let _ = rustix::net::sockopt::set_socket_linger(same, None);
    }
    if let Err(errno) = nix::unistd::close(descriptor) {
        debug_assert_ne!(errno, Errno::EBADF, "it came just now");
    }
}
