//! Admits method calls: checks the limits, finds the caller's user, and runs each call in its own task.
//!
//! The object server of zbus does not fit. It starts a task for every message without a limit. It holds locks while a
//! property is read, and it cannot hide an object from one caller only. zbus advises to read the message stream
//! directly in such a case.

use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use zbus::message::Flags;
use zbus::{DBusError, Message, MessageStream};

use super::Context;
use super::call::Call;
use super::closer::{Closer, HeldMessage};
use super::error::{BusError, Result};
use super::methods::{Effect, effect_of};
use super::peers::InFlight;
use super::turn::Ticket;
use crate::activity::Activity;
use crate::error::Kind;

/// The longest call, in bytes: twice the longest document that can be configured. The bus lets through 16 times that,
/// and a connection may have 64 such calls in flight.
const MOST_BYTES: usize = 2 << 20;

/// How long a call without a reply keeps its share of the user's limit after it was carried out. The bus limits only
/// calls that expect a reply. Without this pause the service would carry out a flood of other calls as fast as it
/// arrives, and delay everybody.
const PAUSE: Duration = Duration::from_millis(50);

/// How long the service waits at its end for calls that wait neither for a job nor for a person.
const LAST_CALLS: Duration = Duration::from_secs(3);

/// The calls in flight.
#[derive(Clone)]
pub struct Admission {
    context: Context,
    closer: Closer,
    /// Requests from [`Admission::drain`].
    checks: mpsc::UnboundedSender<oneshot::Sender<()>>,
    /// Refuses new calls, and ends those that could last for hours.
    closing: CancellationToken,
    /// Ends all remaining calls.
    closed: CancellationToken,
    tasks: TaskTracker,
    /// The calls in flight that may start something.
    calls: Activity,
}

/// Incoming messages, and requests from [`Admission::drain`].
pub struct Incoming {
    pub messages: MessageStream,
    checks: mpsc::UnboundedReceiver<oneshot::Sender<()>>,
}

impl Admission {
    pub fn new(context: Context, closer: Closer, messages: MessageStream) -> (Self, Incoming) {
        let (sender, checks) = mpsc::unbounded_channel();
        let admission = Self {
            context,
            closer,
            checks: sender,
            closing: CancellationToken::new(),
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
            calls: Activity::default(),
        };
        (admission, Incoming { messages, checks })
    }

    /// Takes calls until the bus closes the connection or every `Admission` is dropped. On the bus it waits only for
    /// room to write, because a full stream delays every other message of the connection.
    pub async fn receive(self, mut incoming: Incoming) {
        loop {
            tokio::select! {
                message = incoming.messages.next() => match message {
                    Some(Ok(message)) => self.admit(message).await,
                    // The stream ends after an error.
                    Some(Err(_)) => {}
                    None => return,
                },
                Some(check) = incoming.checks.recv() => {
                    while let Some(Some(message)) = incoming.messages.next().now_or_never() {
                        if let Ok(message) = message {
                            self.admit(message).await;
                        }
                    }
                    // The requester may have been dropped.
                    let _ = check.send(());
                }
            }
        }
    }

    /// Returns when every call is admitted that the connection's reader has read. The reader works in order: after it
    /// has delivered a later message, all earlier calls are admitted.
    pub async fn drain(&self) {
        let (check, done) = oneshot::channel();
        // Without a receiver the bus is gone, and no call can arrive.
        if self.checks.send(check).is_ok() {
            let _ = done.await;
        }
    }

    /// Returns when every admitted call has started its work or waits for a person, or after [`LAST_CALLS`].
    pub async fn settle(&self) {
        // While the name is released, only callers that use the unique name can add calls.
        let _ = tokio::time::timeout(LAST_CALLS, self.calls.rest(Duration::ZERO)).await;
    }

    /// Refuses further calls and ends those in flight. A call that waits for a job or for a person gets the error that
    /// the service is stopping. The others have [`LAST_CALLS`] to be answered.
    pub async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        if tokio::time::timeout(LAST_CALLS, self.tasks.wait()).await.is_err() {
            self.closed.cancel();
            self.tasks.wait().await;
        }
    }

    async fn admit(&self, message: Message) {
        let held = HeldMessage::of(&message);
        let header = message.header();
        let own = self.context.connection.unique_name();
        if own.is_some_and(|own| header.sender() == Some(own.inner())) {
            // The service's own liveness probe, see [`super::Prober`].
            let (admission, reply) = (self.clone(), Message::method_return(&header).build(&()));
            self.tasks
                .spawn(async move { admission.context.send(reply).await });
            return;
        }
        let effect = effect(&message);
        // The bus limits only calls that expect a reply, so others can arrive by the thousand. Without a reply, a
        // reading call has no effect and a refusal reaches nobody. So both are dropped here.
        let sender = header.sender().map(|sender| sender.as_str()).unwrap_or_default();
        if !wants_reply(&message) && (effect != Effect::Changes || !self.context.peers.has_room(sender)) {
            drop(message);
            return self.closer.close(held);
        }
        let in_flight = match header.sender() {
            Some(_) if self.closing.is_cancelled() => Err(stopping()),
            Some(_) if message.data().len() > MOST_BYTES => Err(BusError::new(
                Kind::LimitsExceeded,
                format!("the call is longer than {} MiB", MOST_BYTES >> 20),
            )),
            Some(sender) => self.context.peers.admit(sender.as_str()),
            None => Err(BusError::no_sender()),
        };
        match in_flight {
            Ok(in_flight) => {
                let admission = self.clone();
                let ticket = in_flight.peer.queue().join(effect);
                let used = self.context.activity.begin();
                let call = (effect != Effect::Waits).then(|| self.calls.begin());
                self.tasks.spawn(async move {
                    admission.serve(message, in_flight, ticket).await;
                    admission.closer.close(held);
                    drop((used, call));
                });
            }
            Err(error) => {
                if wants_reply(&message) {
                    self.context.send(error.create_reply(&header)).await;
                }
                drop(message);
                self.closer.close(held);
            }
        }
    }

    async fn serve(&self, message: Message, in_flight: InFlight, ticket: Ticket) {
        let end = match waits_for_others(&message) {
            true => &self.closing,
            false => &self.closed,
        };
        let answer = tokio::select! {
            // If both are ready, the caller gets the result.
            biased;
            answer = self.answer(message.clone(), in_flight, ticket) => answer,
            () = end.cancelled() => Err(stopping()),
        };
        if !wants_reply(&message) {
            return;
        }
        let reply = match answer {
            Ok(reply) => Ok(reply),
            Err(error) => error.create_reply(&message.header()),
        };
        self.context.send(reply).await;
    }

    async fn answer(&self, message: Message, mut in_flight: InFlight, ticket: Ticket) -> Result<Message> {
        let context = &self.context;
        let uid = context.peers.uid(&context.connection, &mut in_flight).await?;
        let share = context
            .service
            .hold_descriptors(uid, message.data().fds().len())?;
        let replies = wants_reply(&message);
        let user = (uid, in_flight.peer.user(uid).await);
        let call = Call::new(message, in_flight, user, share, ticket.turn());
        let answer = ticket.run(context.answer(&call)).await;
        if !replies {
            tokio::time::sleep(PAUSE).await;
        }
        answer
    }
}

/// Whether the caller expects a reply. A call with `NO_REPLY_EXPECTED` is carried out all the same (D-Bus
/// specification).
fn wants_reply(call: &Message) -> bool {
    let flags = call.header().primary().flags();
    !flags.contains(Flags::NO_REPLY_EXPECTED)
}

/// Whether the call may last as long as a job, or until a person has entered a password.
fn waits_for_others(call: &Message) -> bool {
    call.header()
        .primary()
        .flags()
        .contains(Flags::ALLOW_INTERACTIVE_AUTH)
        || effect(call) == Effect::Waits
}

fn effect(call: &Message) -> Effect {
    let header = call.header();
    let interface = header.interface().map(|interface| interface.as_str());
    let member = header.member().map(|member| member.as_str());
    effect_of(interface, member.unwrap_or_default())
}

fn stopping() -> BusError {
    BusError::new(Kind::Busy, "the service is stopping: call again")
}

impl Context {
    async fn send(&self, reply: zbus::Result<Message>) {
        let sent = match reply {
            Ok(reply) => self.connection.send(&reply).await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = sent {
            tracing::debug!(%error, "a reply could not be sent");
        }
    }
}
