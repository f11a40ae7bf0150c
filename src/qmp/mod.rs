//! The QEMU Machine Protocol: JSON lines on a UNIX stream socket, with file descriptors beside them.
//!
//! Knows the protocol; not backups or domains. No code outside this module writes or reads a command's JSON.
//!
//! A [`Client`] executes typed commands over a [`Monitor`], which is a way to reach one QEMU. [`Client::open`]
//! negotiates on a socket and returns a client, which can be cloned, and a [`Driver`]. The driver owns the socket. It
//! runs until the peer closes the connection or breaks the protocol, or the last client is dropped. The code that
//! opens the connection owns the driver and decides where it runs.
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
mod list;
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
pub use list::Bounded;
pub use message::{Event, Message, Refusal, words};
pub use monitor::{Call, Monitor, Reply};
pub use schema::{Feature, Schema};
pub use wire::MAX_LINE;

use std::sync::Arc;
use std::time::Duration;

/// The errors of a command or a connection.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The peer did not greet in time. A second client on a monitor socket gets this error, because QEMU serves one
    /// client at a time.
    #[error("the monitor did not greet within {0:?}: another client may be connected to the same socket")]
    NoGreeting(Duration),
    /// The peer sent bytes that are not QMP.
    #[error("the peer does not speak QMP: {0}")]
    NotQmp(String),
    /// QEMU answered the command with an error.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        command: String,
        class: String,
        description: String,
    },
    /// The connection is closed, so no reply will come. QEMU may have executed the command.
    #[error("the monitor's connection is closed: {0}")]
    Closed(Arc<str>),
    /// There is no connection. Has the reason.
    #[error("{0}")]
    NotConnected(Arc<str>),
    /// The peer does not read or answer, and too many commands wait already. The command was not sent.
    #[error("{command} was not sent: the monitor has not answered {unanswered} commands before it")]
    Unanswered { command: String, unanswered: usize },
    /// No reply came in time. QEMU may still execute the command.
    #[error("no answer to {command} within {after:?}")]
    TimedOut { command: String, after: Duration },
    /// The reply does not have the type that the command promises.
    #[error("unexpected reply to {command}: {detail}")]
    UnexpectedReply { command: String, detail: String },
}

impl Error {
    /// Whether QEMU refused the command. The connection works, and the command was not executed.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

pub type Result<T> = std::result::Result<T, Error>;
