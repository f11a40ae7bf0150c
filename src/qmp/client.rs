//! The client half: commands, their replies, and events, through the driver that owns the socket.
//!
//! Clients send whole commands over a channel, so a dropped future leaves neither half a line on the wire nor a reply
//! that another command could take for its own.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};

use super::driver::{Bounds, Driver, Failure, Reply, Request};
use super::message::{Event, Message, head, parse};
use super::wire::{Wire, WireError};
use super::{Error, Result, Schema};
use crate::fault;

/// Commands that wait for their turn, in all clients of a connection. More make the next caller wait.
const QUEUE: usize = 64;
/// Events that a reader may lag behind before it is notified that it missed some: 1 MiB with the longest ones.
const EVENTS: usize = 256;
/// Why a connection ended that nobody ended.
pub(super) const CLOSED: &str = "it was shut down";

/// What a connection said since [`Client::events`] was called.
pub struct Events(broadcast::Receiver<Arc<Event>>);

/// Why there is no next event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventsError {
    /// Some were missed: ask QEMU how things stand, then go on.
    Missed,
    /// The connection is closed.
    Closed,
}

impl Events {
    /// The next event that is there already: after a reply, all that QEMU said before it.
    pub fn next_now(&mut self) -> Option<Arc<Event>> {
        loop {
            match self.0.try_recv() {
                Ok(event) => return Some(event),
                Err(broadcast::error::TryRecvError::Lagged(_)) => {}
                Err(_) => return None,
            }
        }
    }

    /// Waits for the next event. Cancel-safe.
    pub async fn next(&mut self) -> std::result::Result<Arc<Event>, EventsError> {
        self.0.recv().await.map_err(|error| match error {
            broadcast::error::RecvError::Lagged(_) => EventsError::Missed,
            broadcast::error::RecvError::Closed => EventsError::Closed,
        })
    }
}

/// A handle on a connection. Cloning is cheap; the connection closes when the last one is dropped.
#[derive(Debug, Clone)]
pub struct Client {
    requests: mpsc::Sender<Request>,
    events: broadcast::WeakSender<Arc<Event>>,
    next_id: Arc<AtomicU64>,
    /// Why the connection ended, once it has.
    ended: Arc<OnceLock<Arc<str>>>,
}

impl Client {
    /// Waits for the greeting, negotiates no capability (none is needed), and gives the two halves.
    ///
    /// `patience` bounds the greeting and the negotiation together.
    pub async fn open(stream: UnixStream, patience: Duration) -> Result<(Client, Driver)> {
        Self::open_within(Bounds::default(), stream, patience).await
    }

    /// The same with bounds for what the peer may send.
    pub async fn open_within(
        bounds: Bounds,
        stream: UnixStream,
        patience: Duration,
    ) -> Result<(Client, Driver)> {
        let mut wire = Wire::new(stream, bounds.longest);
        tokio::time::timeout(patience, greet(&mut wire))
            .await
            .map_err(|_| Error::NoGreeting(patience))??;
        let (requests, receiver) = mpsc::channel(QUEUE);
        let (events, _) = broadcast::channel(EVENTS);
        let ended = Arc::<OnceLock<Arc<str>>>::default();
        let client = Client {
            requests,
            events: events.downgrade(),
            next_id: Arc::new(AtomicU64::new(1)),
            ended: ended.clone(),
        };
        Ok((client, Driver::new((wire, bounds), receiver, events, ended)))
    }

    /// Events from now on. To miss none that a command causes, call this before the command.
    pub fn events(&self) -> Events {
        match self.events.upgrade() {
            Some(events) => Events(events.subscribe()),
            None => Events(broadcast::channel(1).1),
        }
    }

    /// Sends a command and waits for its reply. Cancel-safe: dropped, the command was either sent whole or not at all.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        self.query(command, arguments).await
    }

    /// Sends a command with a descriptor in the same message, as `add-fd` and `getfd` want it.
    pub async fn execute_with_descriptor(
        &self,
        command: &str,
        arguments: Value,
        descriptor: OwnedFd,
    ) -> Result<Value> {
        let reply = self.send(command, arguments, Some(descriptor)).await?;
        fault::answered(command);
        read(command, &reply)
    }

    /// Sends a command and reads its reply as `T`.
    pub async fn query<T: DeserializeOwned>(&self, command: &str, arguments: Value) -> Result<T> {
        let reply = self.send(command, arguments, None).await?;
        fault::answered(command);
        read(command, &reply)
    }

    /// [`Client::query`] with an end to its patience.
    pub async fn query_within<T: DeserializeOwned>(
        &self,
        after: Duration,
        command: &str,
        arguments: Value,
    ) -> Result<T> {
        let reply = tokio::time::timeout(after, self.query(command, arguments)).await;
        reply.unwrap_or_else(|_| {
            Err(Error::TimedOut {
                command: command.to_owned(),
                after,
            })
        })
    }

    /// What this QEMU can do, from `query-qmp-schema`.
    pub async fn schema(&self) -> Result<Schema> {
        const COMMAND: &str = "query-qmp-schema";
        let reply = self.send(COMMAND, json!({}), None).await?;
        fault::answered(COMMAND);
        Schema::read(reply.text.get()).map_err(|error| unexpected(COMMAND, &error))
    }

    async fn send(&self, command: &str, arguments: Value, descriptor: Option<OwnedFd>) -> Result<Reply> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id })
            .to_string()
            .into_bytes();
        line.push(b'\n');
        let (reply, answer) = oneshot::channel();
        let request = Request {
            id,
            line,
            descriptor,
            reply,
        };
        let closed = || Error::Closed(self.ended.get().cloned().unwrap_or_else(|| CLOSED.into()));
        self.requests.send(request).await.map_err(|_| closed())?;
        answer
            .await
            .map_err(|_| closed())?
            .map_err(|failure| match failure {
                Failure::Refused(refusal) => refusal.of(command),
                Failure::NotSent { unanswered } => Error::Unanswered {
                    command: command.to_owned(),
                    unanswered,
                },
                Failure::Closed(reason) => Error::Closed(reason),
            })
    }
}

/// Reads a reply as what the command is known to return.
fn read<T: DeserializeOwned>(command: &str, reply: &Reply) -> Result<T> {
    serde_json::from_str(reply.text.get()).map_err(|error| unexpected(command, &error))
}

fn unexpected(command: &str, error: &serde_json::Error) -> Error {
    Error::UnexpectedReply {
        command: command.to_owned(),
        detail: head(&error.to_string(), 512),
    }
}

async fn greet(wire: &mut Wire) -> Result<()> {
    let greeting = read_line(wire).await?;
    let greeting: Value = parse(&greeting)?;
    if greeting.get("QMP").is_none() {
        return Err(Error::NotQmp("its first line is no QMP greeting".into()));
    }
    wire.queue(0, b"{\"execute\":\"qmp_capabilities\",\"id\":0}\n".to_vec(), None);
    loop {
        let line = read_line(wire).await?;
        match Message::parse(&line)? {
            Message::Reply {
                answer: Err(refusal), ..
            } => {
                let why = format!("it refused qmp_capabilities: {}", refusal.description);
                return Err(Error::NotQmp(why));
            }
            Message::Reply { id: Some(0), .. } => return Ok(()),
            Message::Reply { .. } | Message::Event(_) => {}
        }
    }
}

pub(super) async fn read_line(wire: &mut Wire) -> Result<Vec<u8>> {
    let mut turned = Ok(());
    loop {
        if let Some(line) = wire.next_line().map_err(closed)? {
            return Ok(line);
        }
        turned.map_err(closed)?;
        wire.ready().await.map_err(|error| closed(error.into()))?;
        turned = wire.turn();
    }
}

fn closed(error: WireError) -> Error {
    Error::Closed(error.to_string().into())
}
