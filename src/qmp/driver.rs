//! The driver half owns the socket: it sends commands in order, hands out replies and events, and reports why it ended.
//!
//! A peer that does not read or answer makes nothing grow: replies that nobody waits for are dropped, and
//! beyond a bound commands are refused.

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

/// Commands without a reply, and bytes of commands that the peer has not read, beyond which no other is sent. A backup of
/// as many disks as there can be has one of 100 kB; the rest of it, and all else, is small.
const MAX_UNANSWERED: usize = 1024;
const MAX_QUEUED: usize = 4 << 20;

/// Lines after which others have their turn, if so many come at once.
const MANY: usize = 256;

#[derive(Debug)]
pub(super) struct Request {
    pub id: u64,
    pub line: Vec<u8>,
    pub descriptor: Option<OwnedFd>,
    pub reply: oneshot::Sender<Answer>,
}

/// What the lines of a peer may take of memory.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// The longest line, in bytes.
    pub longest: usize,
    /// Who has one of these may send a long line; who shares them waits for one another.
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

/// A line that needs no turn, in bytes. QEMU's schema is shorter.
const SHORT: usize = 256 << 10;
/// How long a turn is waited for, and lasts.
const TURN: Duration = Duration::from_secs(30);

pub(super) type Turn = Arc<OwnedSemaphorePermit>;

pub(super) type Answer = std::result::Result<Reply, Failure>;

#[derive(Debug)]
pub(super) enum Failure {
    Refused(Refusal),
    NotSent { unanswered: usize },
    Closed(Arc<str>),
}

/// The half that owns the socket.
pub struct Driver {
    wire: Wire,
    turns: Option<Arc<Semaphore>>,
    /// With its end.
    turn: Option<(Turn, Instant)>,
    requests: mpsc::Receiver<Box<Request>>,
    speaker: Speaker,
    ended: Arc<OnceLock<Arc<str>>>,
    pending: HashMap<u64, oneshot::Sender<Answer>>,
    /// QEMU keeps the descriptors of the last message only, until the command takes them: a second command
    /// with a descriptor must wait for the reply to the first.
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

    /// Runs the connection to its end and says why it ended. Everything that waits is failed with that.
    pub async fn run(mut self) -> Arc<str> {
        let reason: Arc<str> = match self.pump().await {
            Ok(()) => CLOSED.into(),
            Err(error) => error.to_string().into(),
        };
        // Set only here, and this runs once.
        let _ = self.ended.set(reason.clone());
        self.requests.close();
        let queued = std::iter::from_fn(|| self.requests.try_recv().ok().map(|request| *request));
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
            // A connection is idle most of the time, and there are many.
            self.wire.forget_taken();
            turned?;
            self.take_turn().await?;
            if handled >= MANY {
                // A peer that never stops lets others have their turn.
                tokio::task::yield_now().await;
            }
        }
    }

    /// Takes a turn for a line that becomes long, and gives it back when that is whole; its text may still be kept.
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
            // A receiver that is gone has stopped waiting.
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

    /// Forgets commands that nobody waits for any more: those that were sent, whose replies would be ignored, and takes
    /// back those that were not.
    fn forget_abandoned(&mut self) {
        let Self {
            wire,
            pending,
            descriptor_in_flight,
            waiting_for_descriptor,
            ..
        } = self;
        waiting_for_descriptor.retain(|request| !request.reply.is_closed());
        // The next descriptor waits for this one's reply, even if its caller has left.
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
            tracing::trace!(id, "a reply to no command that waits was ignored");
            return;
        };
        // A receiver that is gone has stopped waiting.
        let _ = reply.send(result);
        if self.descriptor_in_flight == Some(id) {
            self.descriptor_in_flight = None;
            // One that nobody waits for any more is not sent: nobody would know of its descriptor set.
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
