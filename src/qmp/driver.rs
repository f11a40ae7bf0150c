//! The driver owns the socket: it sends commands in order, delivers replies and events, and reports why the
//! connection ended.
//!
//! Memory stays bounded if a peer does not read or answer: the driver drops replies without a waiting caller, and
//! refuses commands beyond a limit.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde_json::value::RawValue;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use super::connection::CLOSED;
use super::events::Speaker;
use super::message::{Message, Refusal};
use super::monitor::Reply;
use super::wire::{MAX_LINE, Wire, WireError};

/// The driver sends no further command beyond this many unanswered commands, or unread bytes. A backup of the most
/// disks has one command of 100 kB; all others are small.
const MAX_UNANSWERED: usize = 1024;
const MAX_QUEUED: usize = 4 << 20;

/// After this many lines at once, the driver yields to other tasks.
const MANY: usize = 256;

#[derive(Debug)]
pub(super) struct Request {
    pub id: u64,
    pub line: Vec<u8>,
    pub descriptor: Option<OwnedFd>,
    pub reply: oneshot::Sender<Answer>,
}

/// Bounds for the memory of a peer's lines.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// The longest line, in bytes.
    pub longest: usize,
    /// Permits to send a long line. Peers that share the semaphore wait for each other.
    pub turns: Option<Arc<Semaphore>>,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            longest: MAX_LINE,
            turns: None,
        }
    }
}

/// The longest line that needs no permit, in bytes. QEMU's schema is shorter.
const SHORT: usize = 256 << 10;
/// How long a peer waits for a permit, and how long it may keep it.
const TURN: Duration = Duration::from_secs(30);

pub(super) type Turn = Arc<OwnedSemaphorePermit>;

pub(super) type Answer = std::result::Result<Reply, Failure>;

#[derive(Debug)]
pub(super) enum Failure {
    Refused(Refusal),
    NotSent { unanswered: usize },
    Closed(Arc<str>),
}

/// The owner of the socket.
pub struct Driver {
    wire: Wire,
    turns: Option<Arc<Semaphore>>,
    /// The permit, and the time at which it expires.
    turn: Option<(Turn, Instant)>,
    requests: mpsc::Receiver<Box<Request>>,
    speaker: Speaker,
    ended: Arc<OnceLock<Arc<str>>>,
    pending: HashMap<u64, oneshot::Sender<Answer>>,
    /// QEMU keeps only the last message's descriptors until a command takes them. So a second command with a
    /// descriptor must wait for the reply to the first.
    descriptor_in_flight: Option<u64>,
    waiting_for_descriptor: VecDeque<Request>,
}

impl Driver {
    pub(super) fn new(
        (wire, bounds): (Wire, Bounds),
        requests: mpsc::Receiver<Box<Request>>,
        speaker: Speaker,
        ended: Arc<OnceLock<Arc<str>>>,
    ) -> Self {
        Self {
            wire,
            turns: bounds.turns,
            turn: None,
            requests,
            speaker,
            ended,
            pending: HashMap::new(),
            descriptor_in_flight: None,
            waiting_for_descriptor: VecDeque::new(),
        }
    }

    /// Runs the connection to its end and returns the reason, with which all waiting commands fail.
    pub async fn run(mut self) -> Arc<str> {
        let reason: Arc<str> = match self.pump().await {
            Ok(()) => CLOSED.into(),
            Err(error) => error.to_string().into(),
        };
        // `run` consumes the driver, so the reason is set once.
        let _ = self.ended.set(reason.clone());
        self.requests.close();
        let queued = std::iter::from_fn(|| self.requests.try_recv().ok().map(|request| *request));
        let unsent = self
            .waiting_for_descriptor
            .drain(..)
            .chain(queued)
            .map(|request| request.reply);
        for reply in self.pending.drain().map(|(_, reply)| reply).chain(unsent) {
            // If the caller has dropped the receiver, it does not need the reply.
            let _ = reply.send(Err(Failure::Closed(reason.clone())));
        }
        reason
    }

    async fn pump(&mut self) -> std::result::Result<(), WireError> {
        loop {
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(request) => self.accept(*request),
                    None => return Ok(()),
                },
                ready = self.wire.ready() => ready?,
                () = until(self.turn.as_ref().map(|(_, end)| *end)) => return Err(WireError::Slow),
            }
            let turned = self.wire.turn();
            let mut handled = 0;
            while let Some(line) = self.wire.next_line()? {
                self.dispatch(&line)?;
                handled += 1;
            }
            // Many connections are idle most of the time.
            self.wire.forget_taken();
            turned?;
            self.take_turn().await?;
            if handled >= MANY {
                // Yields, so that a peer that never stops does not starve other tasks.
                tokio::task::yield_now().await;
            }
        }
    }

    /// Takes a permit for a line that becomes long, and drops it when the line is complete. The reply may keep it
    /// longer.
    async fn take_turn(&mut self) -> std::result::Result<(), WireError> {
        let Some(turns) = &self.turns else { return Ok(()) };
        if self.wire.unfinished() <= SHORT {
            self.turn = None;
        } else if self.turn.is_none() {
            let turn = timeout(TURN, turns.clone().acquire_owned()).await;
            let turn = turn.ok().and_then(std::result::Result::ok);
            self.turn = Some((Arc::new(turn.ok_or(WireError::NoTurn)?), Instant::now() + TURN));
        }
        Ok(())
    }

    fn accept(&mut self, request: Request) {
        if self.is_full() {
            self.forget_abandoned();
        }
        if self.is_full() {
            let unanswered = self.unanswered();
            // If the caller has dropped the receiver, it does not need the reply.
            let _ = request.reply.send(Err(Failure::NotSent { unanswered }));
            return;
        }
        if request.descriptor.is_some() {
            if self.descriptor_in_flight.is_some() {
                self.waiting_for_descriptor.push_back(request);
                return;
            }
            self.descriptor_in_flight = Some(request.id);
        }
        self.submit(request);
    }

    fn submit(&mut self, request: Request) {
        self.pending.insert(request.id, request.reply);
        self.wire.queue(request.id, request.line, request.descriptor);
    }

    fn unanswered(&self) -> usize {
        self.pending.len() + self.waiting_for_descriptor.len()
    }

    fn is_full(&self) -> bool {
        self.unanswered() >= MAX_UNANSWERED || self.wire.queued() >= MAX_QUEUED
    }

    /// Removes commands whose callers have gone. Replies to commands that were sent are ignored; unsent commands are
    /// never sent.
    fn forget_abandoned(&mut self) {
        let Self {
            wire,
            pending,
            descriptor_in_flight,
            waiting_for_descriptor,
            ..
        } = self;
        waiting_for_descriptor.retain(|request| !request.reply.is_closed());
        // The next descriptor waits for this command's reply, even if its caller has gone.
        let abandoned =
            |id, reply: &oneshot::Sender<Answer>| reply.is_closed() && *descriptor_in_flight != Some(id);
        wire.unqueue(|id| pending.get(&id).is_some_and(|reply| abandoned(id, reply)));
        pending.retain(|id, reply| !abandoned(*id, reply));
    }

    fn dispatch(&mut self, line: &[u8]) -> std::result::Result<(), WireError> {
        let message = Message::parse(line).map_err(|error| WireError::Io(std::io::Error::other(error)))?;
        match message {
            Message::Event(event) => {
                tracing::trace!(event = event.name, data = %event.data(), "QMP event");
                self.speaker.say(event);
            }
            Message::Reply { id, answer } => {
                let turn = self.turn.as_ref().map(|(turn, _)| turn.clone());
                let reply = |text: &RawValue| Reply {
                    text: text.to_owned(),
                    _turn: turn,
                };
                let answer = answer.map(reply).map_err(Failure::Refused);
                self.settle(id, answer);
            }
        }
        Ok(())
    }

    fn settle(&mut self, id: Option<u64>, result: Answer) {
        let Some((id, reply)) = id.and_then(|id| self.pending.remove_entry(&id)) else {
            tracing::trace!(id, "ignored a reply without a waiting command");
            return;
        };
        // If the caller has dropped the receiver, it does not need the reply.
        let _ = reply.send(result);
        if self.descriptor_in_flight == Some(id) {
            self.descriptor_in_flight = None;
            // A command whose caller has gone is not sent, because no code would know its descriptor set.
            while let Some(next) = self.waiting_for_descriptor.pop_front() {
                if !next.reply.is_closed() {
                    self.descriptor_in_flight = Some(next.id);
                    self.submit(next);
                    break;
                }
            }
        }
    }
}

async fn until(end: Option<Instant>) {
    match end {
        Some(end) => sleep_until(end).await,
        None => std::future::pending().await,
    }
}
