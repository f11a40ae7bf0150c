//! Commands, replies and events over one connection.
//!
//! One driver owns the socket; clients send it whole commands over a channel, so a dropped future leaves
//! neither half a line on the wire nor a reply that another command could take for its own.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot};

use super::wire::{Wire, WireError};
use super::{Error, Result, Schema};

/// Commands that wait for their turn, in all clients of a connection. More make the next caller wait.
const QUEUE: usize = 64;
/// Events that a reader may lag behind before it is told that it missed some.
const EVENTS: usize = 1024;
/// The longest event, in bytes: so many are kept for each reader that lags behind. QEMU's own take a few hundred.
const MAX_EVENT: usize = 64 << 10;
const CLOSED: &str = "it was shut down";

/// An asynchronous message of QEMU's. Unknown names are kept: a newer QEMU has more of them.
#[derive(Debug, Clone, Deserialize)]
pub struct Event {
    #[serde(rename = "event")]
    pub name: String,
    #[serde(default)]
    pub data: Value,
}

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

#[derive(Debug)]
struct Request {
    id: u64,
    line: Vec<u8>,
    descriptor: Option<OwnedFd>,
    reply: oneshot::Sender<Answer>,
}

/// A reply as it came: who asked knows what to read it as, and some are large.
type Answer = std::result::Result<Box<RawValue>, Failure>;

#[derive(Debug)]
enum Failure {
    Refused { class: String, description: String },
    Closed(Arc<str>),
}

/// Any line of QEMU's. One of the first three is there.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(rename = "return", borrow)]
    value: Option<&'a RawValue>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    #[serde(default)]
    id: Value,
}

#[derive(Deserialize)]
struct Refusal {
    class: String,
    desc: String,
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
        let mut wire = Wire::new(stream);
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
        let driver = Driver {
            wire,
            requests: receiver,
            events,
            ended,
            pending: HashMap::new(),
            descriptor_in_flight: None,
            waiting_for_descriptor: VecDeque::new(),
        };
        Ok((client, driver))
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
        read(command, &reply)
    }

    /// Sends a command and reads its reply as `T`.
    pub async fn query<T: DeserializeOwned>(&self, command: &str, arguments: Value) -> Result<T> {
        let reply = self.send(command, arguments, None).await?;
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
        self.query("query-qmp-schema", json!({})).await.map(Schema::new)
    }

    async fn send(
        &self,
        command: &str,
        arguments: Value,
        descriptor: Option<OwnedFd>,
    ) -> Result<Box<RawValue>> {
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
                Failure::Refused { class, description } => Error::Refused {
                    command: command.to_owned(),
                    class,
                    description,
                },
                Failure::Closed(reason) => Error::Closed(reason),
            })
    }
}

/// Reads a reply as what the command is known to return.
fn read<T: DeserializeOwned>(command: &str, reply: &RawValue) -> Result<T> {
    serde_json::from_str(reply.get()).map_err(|error| Error::UnexpectedReply {
        command: command.to_owned(),
        detail: error.to_string(),
    })
}

async fn greet(wire: &mut Wire) -> Result<()> {
    let greeting = read_line(wire).await?;
    let greeting: Value = parse(&greeting)?;
    if greeting.get("QMP").is_none() {
        return Err(Error::NotQmp("its first line is no QMP greeting".into()));
    }
    wire.queue(b"{\"execute\":\"qmp_capabilities\",\"id\":0}\n".to_vec(), None);
    loop {
        let line = read_line(wire).await?;
        let message: Message = parse(&line)?;
        if let Some(error) = message.error {
            return Err(Error::NotQmp(format!(
                "it refused qmp_capabilities: {}",
                error.desc
            )));
        }
        if message.value.is_some() && message.id == json!(0) {
            return Ok(());
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

pub(super) fn closed(error: WireError) -> Error {
    Error::Closed(error.to_string().into())
}

pub(super) fn parse<'a, T: Deserialize<'a>>(line: &'a [u8]) -> Result<T> {
    serde_json::from_slice(line).map_err(|error| Error::NotQmp(format!("a line is no message: {error}")))
}

/// The half that owns the socket.
pub struct Driver {
    wire: Wire,
    requests: mpsc::Receiver<Request>,
    events: broadcast::Sender<Arc<Event>>,
    ended: Arc<OnceLock<Arc<str>>>,
    pending: HashMap<u64, oneshot::Sender<Answer>>,
    /// QEMU keeps the descriptors of the last message only, until the command takes them: a second command
    /// with a descriptor must wait for the reply to the first.
    descriptor_in_flight: Option<u64>,
    waiting_for_descriptor: VecDeque<Request>,
}

impl Driver {
    /// Runs the connection to its end and says why it ended. Everything that waits is failed with that.
    pub async fn run(mut self) -> Arc<str> {
        let reason: Arc<str> = match self.pump().await {
            Ok(()) => CLOSED.into(),
            Err(error) => error.to_string().into(),
        };
        // Set only here, and this runs once.
        let _ = self.ended.set(reason.clone());
        self.requests.close();
        let queued = std::iter::from_fn(|| self.requests.try_recv().ok());
        let unsent = self
            .waiting_for_descriptor
            .drain(..)
            .chain(queued)
            .map(|request| request.reply);
        for reply in self.pending.drain().map(|(_, reply)| reply).chain(unsent) {
            // A receiver that is gone has stopped waiting.
            let _ = reply.send(Err(Failure::Closed(reason.clone())));
        }
        reason
    }

    async fn pump(&mut self) -> std::result::Result<(), WireError> {
        loop {
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(request) => self.accept(request),
                    None => return Ok(()),
                },
                ready = self.wire.ready() => ready?,
            }
            let turned = self.wire.turn();
            while let Some(line) = self.wire.next_line()? {
                self.dispatch(&line)?;
            }
            turned?;
        }
    }

    fn accept(&mut self, request: Request) {
        if request.descriptor.is_some() {
            if self.descriptor_in_flight.is_some() {
                self.waiting_for_descriptor.push_back(request);
                return;
            }
            self.descriptor_in_flight = Some(request.id);
        }
        self.pending.insert(request.id, request.reply);
        self.wire.queue(request.line, request.descriptor);
    }

    fn dispatch(&mut self, line: &[u8]) -> std::result::Result<(), WireError> {
        let broken = |error| WireError::Io(std::io::Error::other(error));
        let message: Message = parse(line).map_err(broken)?;
        if let Some(name) = message.event {
            if line.len() > MAX_EVENT {
                let why = format!("the event {name:.64} has {} bytes", line.len());
                return Err(WireError::Io(std::io::Error::other(why)));
            }
            let event = Event {
                name,
                data: message.data,
            };
            tracing::trace!(event = event.name, data = %event.data, "QMP event");
            // Nobody listens: nobody needs it.
            let _ = self.events.send(Arc::new(event));
        } else if let Some(error) = message.error {
            let failure = Failure::Refused {
                class: error.class,
                description: error.desc,
            };
            self.settle(&message.id, Err(failure));
        } else if let Some(value) = message.value {
            self.settle(&message.id, Ok(value.to_owned()));
        } else {
            return Err(broken(Error::NotQmp("a line is neither reply nor event".into())));
        }
        Ok(())
    }

    fn settle(&mut self, id: &Value, result: Answer) {
        let Some((id, reply)) = id.as_u64().and_then(|id| self.pending.remove_entry(&id)) else {
            tracing::warn!(%id, "a reply to no command of ours was ignored");
            return;
        };
        // A receiver that is gone has stopped waiting.
        let _ = reply.send(result);
        if self.descriptor_in_flight == Some(id) {
            self.descriptor_in_flight = None;
            // One that nobody waits for any more is not sent: nobody would know of its descriptor set.
            while let Some(next) = self.waiting_for_descriptor.pop_front() {
                if !next.reply.is_closed() {
                    self.accept(next);
                    break;
                }
            }
        }
    }
}
