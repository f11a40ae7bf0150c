//! Reads a peer's bytes so that no other process can block this one.
//!
//! The user who passed a socket shares its open file description, and can make it blocking. A message can also carry
//! descriptors. Without room for them, the kernel closes them in the reading thread. Closing some takes as long as
//! another process wants, such as a socket with `SO_LINGER` or a FUSE file. So the service receives all descriptors
//! and closes them on a separate thread. QEMU never sends any.

use std::io::{self, IoSliceMut};
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use tokio::net::UnixStream;

/// The size of the control data: room for 253 descriptors (`SCM_MAX_FD` of the kernel), credentials, a security label
/// and a pidfd.
const CONTROL: usize = 8 << 10;
/// A control message with the sender's pidfd. A process that shares the socket can request these. From the kernel's
/// `linux/socket.h`.
const SCM_PIDFD: i32 = 4;
/// The most threads that may hang in close(2): more than the monitors that end at a time. Further descriptors stay
/// open.
const MOST_CLOSING: usize = 1024;
/// The stack of such a thread, in bytes.
const STACK: usize = 64 << 10;

static CLOSING: AtomicUsize = AtomicUsize::new(0);

/// The result of a read.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// The number of bytes. 0 at the end of the stream.
    Bytes(usize),
    /// The message had descriptors, which a thread is closing.
    Descriptors,
}

/// Reads the available bytes into `bytes`. Does not wait.
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

/// A socket whose drop does not block.
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
        // Another process with the same socket can continue to use it. If there is none, the kernel closes the
        // content of its queue.
        if let Some(Ok(socket)) = self.0.take().map(UnixStream::into_std) {
            apart(move || drop(socket));
        }
    }
}

/// Runs work that may hang on a separate thread, because the runtime's threads are limited. If no thread can start,
/// the work is not done, so that nothing blocks.
fn apart(work: impl FnOnce() + Send + 'static) {
    if CLOSING.fetch_add(1, Ordering::Relaxed) >= MOST_CLOSING {
        CLOSING.fetch_sub(1, Ordering::Relaxed);
        tracing::warn!(
            "too many descriptors from peers hang while they are closed: the service leaves this one open"
        );
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
        tracing::warn!(%error, "cannot close a descriptor from a peer");
    }
}

fn close(descriptor: RawFd) {
    // Turn SO_LINGER off, so that closing a socket does not wait. On other files this fails, without effect.
    // `set_socket_linger` needs an owned descriptor, so pidfd_getfd(2) duplicates this one.
    let same = pidfd_open(getpid(), PidfdFlags::empty())
        .and_then(|own| pidfd_getfd(own, descriptor, PidfdGetfdFlags::empty()));
    if let Ok(same) = &same {
        let _ = rustix::net::sockopt::set_socket_linger(same, None);
    }
    if let Err(errno) = nix::unistd::close(descriptor) {
        debug_assert_ne!(errno, Errno::EBADF, "it came just now");
    }
}
