//! The QEMU Machine Protocol: JSON lines on a UNIX stream socket, with file descriptors beside them.
//!
//! This module knows the protocol and nothing about backups or domains; no code outside it writes or reads a command's
//! JSON. A [`Client`] executes typed commands over a [`Monitor`], which is a way to reach one QEMU. [`Client::open`] makes
//! one of a socket: it does the greeting and gives a client, which is cloned freely, and a [`Driver`] that owns the socket
//! and runs until the peer closes, the peer breaks the protocol, or the last client is dropped. The code that opens the
//! connection owns the driver and decides where it runs.
//!
//! Source of the rules: QEMU's `docs/interop/qmp-spec` and `qapi/*.json`.

mod agent;
pub mod block;
mod client;
mod command;
mod connection;
mod driver;
mod events;
#[cfg(test)]
pub(crate) mod fake;
mod lines;
pub mod machine;
mod message;
mod monitor;
mod receive;
mod schema;
mod wire;

pub use agent::Agent;
pub use client::Client;
pub use command::{Command, Done};
pub use driver::{Bounds, Driver};
pub use events::{Events, EventsError};
pub use lines::{LineTooLong, Lines};
pub use message::{Event, Message, Refusal, words};
pub use monitor::{Call, Monitor, Reply};
pub use schema::{Feature, Schema};
pub use wire::MAX_LINE;

use std::sync::Arc;
use std::time::Duration;

/// What can go wrong between a command and its reply.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The peer did not greet in time. A second client on a monitor socket meets this: QEMU serves one at a time.
    #[error("the monitor did not greet within {0:?}: is another client connected to the same socket?")]
    NoGreeting(Duration),
    /// What came is not QMP.
    #[error("the peer does not speak QMP: {0}")]
    NotQmp(String),
    /// QEMU answered the command with an error.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        command: String,
        class: String,
        description: String,
    },
    /// The connection is gone, so no reply will come. The command may have been executed.
    #[error("the monitor's connection is closed: {0}")]
    Closed(Arc<str>),
    /// There is no connection, for this reason.
    #[error("{0}")]
    NotConnected(Arc<str>),
    /// The peer reads or answers nothing while others wait for it already. The command was not sent.
    #[error("{command} was not sent: the monitor has not answered {unanswered} commands before it")]
    Unanswered { command: String, unanswered: usize },
    /// No reply in time. The command may still be executed.
    #[error("no answer to {command} within {after:?}")]
    TimedOut { command: String, after: Duration },
    /// The reply does not have the shape that the command promises.
    #[error("unexpected reply to {command}: {detail}")]
    UnexpectedReply { command: String, detail: String },
}

impl Error {
    /// Whether QEMU itself said no: the connection is fine and the command was not executed.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

pub type Result<T> = std::result::Result<T, Error>;
