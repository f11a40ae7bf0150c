//! Lines on the socket: a reader, and a writer that puts a descriptor into the same message as the
//! first byte of its command.
//!
//! Knows bytes, lines and descriptors; not commands and replies.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::lines::{LineTooLong, Lines};
use super::receive::{Received, Socket, receive};

/// The longest line that a peer may send, in bytes. QEMU's schema takes 120 kB to 250 kB, a domain with hundreds
/// of block nodes about 1 MiB.
pub const MAX_LINE: usize = 16 << 20;
const READ_CHUNK: usize = 64 << 10;

/// Why the reader stopped.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("the peer closed it")]
    EndOfFile,
    #[error("the peer sent more than {0} bytes without a newline")]
    LineTooLong(usize),
    #[error("what the peer sends is too long while others of the same user do the same")]
    NoTurn,
    #[error("the peer does not end a long line")]
    Slow,
    #[error("the peer sent an open file, which no QEMU does")]
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

/// The socket with what was read but is no line yet, and what is queued but not sent yet.
pub struct Wire {
    stream: Socket,
    incoming: Lines,
    outgoing: VecDeque<Outgoing>,
    longest: usize,
    /// Bytes in `outgoing`, sent ones of its first line too.
    queued: usize,
}

impl Wire {
    /// `longest` bounds a line of the peer's, in bytes.
    pub fn new(stream: UnixStream, longest: usize) -> Self {
        Self {
            stream: Socket::new(stream),
            incoming: Lines::new(longest),
            longest,
            outgoing: VecDeque::new(),
            queued: 0,
        }
    }

    /// The same socket once more.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.stream.as_fd().try_clone_to_owned()
    }

    /// Queues one line; `bytes` ends with a newline. Sent by [`Wire::turn`]. `id` is what [`Wire::unqueue`] calls it.
    pub fn queue(&mut self, id: u64, bytes: Vec<u8>, descriptor: Option<OwnedFd>) {
        self.queued += bytes.len();
        self.outgoing.push_back(Outgoing {
            id,
            bytes,
            sent: 0,
            descriptor,
        });
    }

    /// Bytes of the lines that are not sent whole.
    pub fn queued(&self) -> usize {
        self.queued
    }

    /// Takes back lines of which no byte was sent.
    pub fn unqueue(&mut self, unwanted: impl Fn(u64) -> bool) {
        self.outgoing.retain(|line| line.sent > 0 || !unwanted(line.id));
        self.queued = self.outgoing.iter().map(|line| line.bytes.len()).sum();
    }

    /// Gives back the memory of lines that were taken.
    pub fn forget_taken(&mut self) {
        self.incoming.forget_taken();
    }

    /// Bytes of a line that is not whole, once those that were taken are forgotten.
    pub fn unfinished(&self) -> usize {
        self.incoming.held()
    }

    /// Waits until the socket can be read, or written if something is queued. Cancel-safe: moves no byte.
    pub async fn ready(&self) -> io::Result<()> {
        let interest = if self.outgoing.is_empty() {
            Interest::READABLE
        } else {
            Interest::READABLE | Interest::WRITABLE
        };
        self.stream.ready(interest).await.map(drop)
    }

    /// Sends what can be sent and reads what is there, without waiting. Lines can have come also where this fails.
    pub fn turn(&mut self) -> Result<(), WireError> {
        self.incoming.forget_taken();
        match self.send() {
            // A peer that sends without end gets its lines handled, and its bound checked, between the chunks.
            Ok(()) => self.receive(READ_CHUNK, |stream, chunk| {
                stream.try_io(Interest::READABLE, || receive(stream, chunk))
            }),
            // Who hung up may have said something before, which tokio need not know of yet.
            Err(error) => self.receive(self.longest, receive).and(Err(error)),
        }
    }

    /// Reads until nothing is there, or `enough` bytes are.
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

    /// The next whole line without its newline, if one is there.
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, WireError> {
        self.incoming
            .next_line()
            .map_err(|LineTooLong| WireError::LineTooLong(self.longest))
    }

    fn send(&mut self) -> Result<(), WireError> {
        while let Some(next) = self.outgoing.front_mut() {
            match send_some(&self.stream, &next.bytes[next.sent..], next.descriptor.as_ref()) {
                Ok(count) => {
                    // The kernel has passed it on with the first byte; ours is done.
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
