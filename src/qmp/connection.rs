//! A monitor on a socket: sends commands to the driver, which owns the socket, and returns replies and events.
//!
//! A command goes over a channel as a whole. So a dropped future leaves no partial line on the wire, and no reply
//! that another command could take for its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::driver::{Bounds, Driver, Failure, Request};
use super::events::{Events, Readers, Speaker};
use super::message::{Message, parse};
use super::monitor::{Call, Monitor, Reply};
use super::wire::{Wire, WireError};
use super::{Error, Result};

/// How many commands of all clients of a connection can wait to be sent. Further callers wait for room.
const QUEUE: usize = 64;
/// The reason if the service ended the connection.
pub(super) const CLOSED: &str = "it was shut down";

/// The client's end of a connection. Dropping it closes the connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// Boxed, because a channel allocates room for dozens of requests at once.
    requests: mpsc::Sender<Box<Request>>,
    readers: Readers,
    next_id: AtomicU64,
    /// Why the connection ended, once it has.
    ended: Arc<OnceLock<Arc<str>>>,
    process: Option<u32>,
    user: Option<u32>,
}

impl Connection {
    pub(super) async fn open(
        bounds: Bounds,
        stream: UnixStream,
        patience: Duration,
    ) -> Result<(Self, Driver)> {
        let (process, user) = peer(&stream);
        let mut wire = Wire::new(stream, bounds.longest);
        tokio::time::timeout(patience, greet(&mut wire))
            .await
            .map_err(|_| Error::NoGreeting(patience))??;
        let (requests, receiver) = mpsc::channel(QUEUE);
        let speaker = Speaker::new();
        let ended = Arc::<OnceLock<Arc<str>>>::default();
        let connection = Self {
            requests,
            readers: speaker.readers(),
            next_id: AtomicU64::new(1),
            ended: ended.clone(),
            process,
            user,
        };
        Ok((connection, Driver::new((wire, bounds), receiver, speaker, ended)))
    }

    async fn exchange(&self, call: Call) -> Result<Reply> {
        let Call {
            command,
            arguments,
            descriptor,
        } = call;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        let request = Box::new(Request {
            id,
            line: line(&command, &arguments, id),
            descriptor,
            reply,
        });
        let closed = || Error::Closed(self.ended.get().cloned().unwrap_or_else(|| CLOSED.into()));
        self.requests.send(request).await.map_err(|_| closed())?;
        answer
            .await
            .map_err(|_| closed())?
            .map_err(|failure| match failure {
                Failure::Refused(refusal) => refusal.of(&command),
                Failure::NotSent { unanswered } => Error::Unanswered { command, unanswered },
                Failure::Closed(reason) => Error::Closed(reason),
            })
    }
}

impl Monitor for Connection {
    fn send(&self, call: Call) -> BoxFuture<'_, Result<Reply>> {
        Box::pin(self.exchange(call))
    }

    fn events(&self) -> Events {
        self.readers.add()
    }

    fn process(&self) -> Option<u32> {
        self.process
    }

    fn user(&self) -> Option<u32> {
        self.user
    }
}

/// Returns the process at the other end and its user.
fn peer(stream: &UnixStream) -> (Option<u32>, Option<u32>) {
    let peer = stream.peer_cred().ok();
    let process = peer.and_then(|peer| u32::try_from(peer.pid()?).ok());
    (
        process.filter(|process| *process != 0),
        peer.map(|peer| peer.uid()),
    )
}

fn line(command: &str, arguments: &RawValue, id: u64) -> Vec<u8> {
    #[derive(Serialize)]
    struct Line<'a> {
        arguments: &'a RawValue,
        execute: &'a str,
        id: u64,
    }

    let line = Line {
        arguments,
        execute: command,
        id,
    };
    let mut line = serde_json::to_vec(&line).expect("a line is a string, JSON and a number");
    line.push(b'\n');
    line
}

async fn greet(wire: &mut Wire) -> Result<()> {
    let greeting = read_line(wire).await?;
    let greeting: Value = parse(&greeting)?;
    if greeting.get("QMP").is_none() {
        return Err(Error::NotQmp("its first line is not a QMP greeting".into()));
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
