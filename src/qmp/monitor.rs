//! A way to send QMP commands to one QEMU, whatever carries them. Must not know which commands there are.

use std::fmt;
use std::os::fd::OwnedFd;

use futures_util::future::BoxFuture;
use serde_json::value::RawValue;

use super::Result;
use super::driver::Turn;
use super::events::Events;

/// One QEMU's monitor.
///
/// It is a trait object, because the ways to reach a QEMU share no type and a command takes milliseconds: one allocation for
/// its future does not matter. [`super::Client`] adds the typed commands.
pub trait Monitor: fmt::Debug + Send + Sync {
    /// Sends a command and returns its reply. Dropped, the command was either sent whole or not at all. Replies come in
    /// the order of their commands.
    fn send(&self, call: Call) -> BoxFuture<'_, Result<Reply>>;

    /// QEMU's events from now on. To miss none that a command causes, call this before the command.
    fn events(&self) -> Events;

    /// The process at the other end, if there is one that this host knows: QEMU, or the program that opened the socket for
    /// it.
    fn process(&self) -> Option<u32>;
}

/// A command as it is sent.
#[derive(Debug)]
pub struct Call {
    pub command: String,
    /// A JSON object.
    pub arguments: Box<RawValue>,
    /// It arrives with the command, as `add-fd` and `getfd` need it.
    pub descriptor: Option<OwnedFd>,
}

/// A reply as it came: the caller knows its type, and some are large.
#[derive(Debug)]
pub struct Reply {
    pub(super) text: Box<RawValue>,
    /// Lasts as long as the text does.
    pub(super) _turn: Option<Turn>,
}

impl Reply {
    /// What a monitor of another kind than the socket received.
    pub fn new(text: Box<RawValue>) -> Self {
        Self { text, _turn: None }
    }
}
