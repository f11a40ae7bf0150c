//! Lines on the socket: a reader, and a writer that sends a descriptor in the same message as the first byte of its
//! command.
//!
//! Knows bytes, lines and descriptors; not commands or replies.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::lines::{LineTooLong, Lines};
use super::receive::{Received, Socket, receive};

/// The longest line of a peer, in bytes. QEMU's schema takes 120 kB to 250 kB, and the nodes of a domain with
/// hundreds of block nodes about 1 MiB.
pub const MAX_LINE: usize = 16 << 20;
const READ_CHUNK: usize = 64 << 10;

/// Why the reader stopped.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("the peer closed it")]
    EndOfFile,
    #[error("the peer sent more than {0} bytes without a newline")]
    LineTooLong(usize),
    #[error("the peer sends a long line while other monitors of the same user do so")]
    NoTurn,
    #[error("the peer did not end a long line in time")]
    Slow,
    #[error("the peer sent a file descriptor, which QEMU never does")]
    Descriptor,
    #[error("{0}")]
    Io(#[from] io::Error),
}

struct Outgoing {
    id: u64,
    bytes: Vec<u8>,
    sent: usize,
    descriptor: Option<OwnedFd>,
}

/// The socket, the bytes that are not a complete line yet, and the queued lines that are not sent yet.
pub struct Wire {
    stream: Socket,
    incoming: Lines,
    outgoing: VecDeque<Outgoing>,
    longest: usize,
    /// Bytes in `outgoing`, including the sent ones of its first line.
    queued: usize,
}

impl Wire {
    /// `longest` is the peer's longest line, in bytes.
    pub fn new(stream: UnixStream, longest: usize) -> Self {
        Self {
            stream: Socket::new(stream),
            incoming: Lines::new(longest),
            longest,
            outgoing: VecDeque::new(),
            queued: 0,
        }
    }

    /// Duplicates the socket's descriptor.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.stream.as_fd().try_clone_to_owned()
    }

    /// Queues one line for [`Wire::turn`]. `bytes` ends with a newline. `id` identifies the line in
    /// [`Wire::unqueue`].
    pub fn queue(&mut self, id: u64, bytes: Vec<u8>, descriptor: Option<OwnedFd>) {
        self.queued += bytes.len();
        self.outgoing.push_back(Outgoing {
            id,
            bytes,
            sent: 0,
            descriptor,
        });
    }

    /// Returns the bytes of the lines that are not completely sent.
    pub fn queued(&self) -> usize {
        self.queued
    }

    /// Removes queued lines of which no byte was sent.
    pub fn unqueue(&mut self, unwanted: impl Fn(u64) -> bool) {
        self.outgoing.retain(|line| line.sent > 0 || !unwanted(line.id));
        self.queued = self.outgoing.iter().map(|line| line.bytes.len()).sum();
    }

    /// Frees the memory of returned lines.
    pub fn forget_taken(&mut self) {
        self.incoming.forget_taken();
    }

    /// Returns the bytes of the incomplete line. The caller calls [`Wire::forget_taken`] first.
    pub fn unfinished(&self) -> usize {
        self.incoming.held()
    }

    /// Waits until the socket is readable, or writable if lines are queued. Cancel-safe: moves no byte.
    pub async fn ready(&self) -> io::Result<()> {
        let interest = if self.outgoing.is_empty() {
            Interest::READABLE
        } else {
            Interest::READABLE | Interest::WRITABLE
        };
        self.stream.ready(interest).await.map(drop)
    }

    /// Sends and reads as much as possible without waiting. Lines may have arrived even if this fails.
    pub fn turn(&mut self) -> Result<(), WireError> {
        self.incoming.forget_taken();
        match self.send() {
            // Reads one chunk at a time, so that the lines of a peer that never stops are handled and bounded in
            // between.
            Ok(()) => self.receive(READ_CHUNK, |stream, chunk| {
                stream.try_io(Interest::READABLE, || receive(stream, chunk))
            }),
            // The peer may have sent data before it hung up, and tokio may not have reported it yet.
            Err(error) => self.receive(self.longest, receive).and(Err(error)),
        }
    }

    /// Reads until no bytes are available, or `enough` bytes are held.
    fn receive(
        &mut self,
        enough: usize,
        read: impl Fn(&UnixStream, &mut [u8]) -> io::Result<Received>,
    ) -> Result<(), WireError> {
        let mut chunk = [0u8; READ_CHUNK];
        loop {
            match read(&self.stream, &mut chunk) {
                Ok(Received::Bytes(0)) => return Err(WireError::EndOfFile),
                Ok(Received::Descriptors) => return Err(WireError::Descriptor),
                Ok(Received::Bytes(count)) => self.incoming.push(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
            if self.incoming.held() >= enough {
                return Ok(());
            }
        }
    }

    /// Returns the next complete line without its newline, if there is one.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, WireError> {
        self.incoming
            .next_line()
            .map_err(|LineTooLong| WireError::LineTooLong(self.longest))
    }

    fn send(&mut self) -> Result<(), WireError> {
        while let Some(next) = self.outgoing.front_mut() {
            match send_some(&self.stream, &next.bytes[next.sent..], next.descriptor.as_ref()) {
                Ok(count) => {
                    // The kernel has passed the descriptor with the first byte, so this one can be closed.
                    next.descriptor = None;
                    next.sent += count;
                    if next.sent == next.bytes.len() {
                        self.queued -= next.bytes.len();
                        self.outgoing.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn send_some(stream: &UnixStream, bytes: &[u8], descriptor: Option<&OwnedFd>) -> io::Result<usize> {
    stream.try_io(Interest::WRITABLE, || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.map(|descriptor| [descriptor.as_fd()]);
        if let Some(descriptors) = &descriptors
            && !control.push(SendAncillaryMessage::ScmRights(descriptors))
        {
            return Err(io::Error::other("no room for a descriptor beside the message"));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags)?)
    })
}
