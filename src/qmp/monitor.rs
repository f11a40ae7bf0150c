//! A way to send QMP commands to one QEMU over any transport. Must not know individual commands.

use std::fmt;
use std::os::fd::OwnedFd;

use futures_util::future::BoxFuture;
use serde_json::value::RawValue;

use super::Result;
use super::driver::Turn;
use super::events::Events;

/// One QEMU's monitor.
///
/// Used as a trait object, because the transports share no type. A command takes milliseconds, so the allocation for
/// its future does not matter. [`super::Client`] adds the typed commands.
pub trait Monitor: fmt::Debug + Send + Sync {
    /// Sends a command and returns its reply. If the future is dropped, the command was either sent whole or not at
    /// all. Replies come in the order of their commands.
    fn send(&self, call: Call) -> BoxFuture<'_, Result<Reply>>;

    /// Returns QEMU's events from now on. A caller that needs the events of a command calls this before the command.
    fn events(&self) -> Events;

    /// Returns the process at the other end if this host knows it: QEMU, or the program that opened the socket for
    /// QEMU.
    fn process(&self) -> Option<u32>;

    /// Returns the user of that process. The kernel recorded it when the socket was opened.
    fn user(&self) -> Option<u32>;
}

/// A command, ready to be sent.
#[derive(Debug)]
pub struct Call {
    pub command: String,
    /// A JSON object.
    pub arguments: Box<RawValue>,
    /// A descriptor to pass with the command, as `add-fd` and `getfd` need it.
    pub descriptor: Option<OwnedFd>,
}

/// An unparsed reply: the caller knows its type, and some replies are large.
#[derive(Debug)]
pub struct Reply {
    pub(super) text: Box<RawValue>,
    /// The permit for a long line, held as long as the text exists.
    pub(super) _turn: Option<Turn>,
}

impl Reply {
    /// Creates a reply that came over another transport than the socket.
    pub fn new(text: Box<RawValue>) -> Self {
        Self { text, _turn: None }
    }
}
