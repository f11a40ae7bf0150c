//! Admits calls: checks the limits, and finds the caller's user.
//!
//! The library's own object server starts a task for whatever arrives, tells apart by itself which objects there are, and
//! holds locks while a property is read: it can neither be kept from growing nor be made to hide anything from one caller
//! and not from another. So the service takes the messages themselves, as the library advises in such a case.

use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use zbus::message::Flags;
use zbus::{DBusError, Message, MessageStream};

use super::Context;
use super::call::Call;
use super::closer::{Closer, Held};
use super::error::{BusError, Result};
use super::peers::Visit;
use super::turn::{Place, READING};
use crate::activity::Activity;
use crate::error::Kind;

/// The longest call, in bytes: a document of the longest length that can be configured, and as much again. The bus itself
/// lets through 16 times that, and a caller could have 64 of them at a time.
const MOST_BYTES: usize = 2 << 20;

/// How long a call without a reply keeps its place of its user's after it was carried out. The bus limits only calls that have
/// a reply; without a pause, a flood of others would be carried out as fast as it comes, and everybody would wait behind it.
const PAUSE: Duration = Duration::from_millis(50);

/// How long the end waits for calls that need nothing but their own time.
const LAST_CALLS: Duration = Duration::from_secs(3);

/// Calls in flight, each in a task of its own.
#[derive(Clone)]
pub struct Door {
    context: Context,
    closer: Closer,
    /// Who wants to know when all that has come is let in.
    checks: mpsc::UnboundedSender<oneshot::Sender<()>>,
    /// Nothing more is let in, and what could wait for hours ends.
    closing: CancellationToken,
    /// All that is left ends.
    closed: CancellationToken,
    tasks: TaskTracker,
    /// Those of them that may begin something.
    calls: Activity,
}

/// What comes in at the door.
pub struct Arrivals {
    pub messages: MessageStream,
    checks: mpsc::UnboundedReceiver<oneshot::Sender<()>>,
}

impl Door {
    pub fn new(context: Context, closer: Closer, messages: MessageStream) -> (Self, Arrivals) {
        let (sender, checks) = mpsc::unbounded_channel();
        let door = Self {
            context,
            closer,
            checks: sender,
            closing: CancellationToken::new(),
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
            calls: Activity::default(),
        };
        (door, Arrivals { messages, checks })
    }

    /// Takes calls until the bus is gone, or nobody has the door any more. Never waits for anything of the bus but room to
    /// write: what is not taken from the stream keeps every other message waiting.
    pub async fn receive(self, mut arrivals: Arrivals) {
        loop {
            tokio::select! {
                message = arrivals.messages.next() => match message {
                    Some(Ok(message)) => self.admit(message).await,
                    // The stream ends after an error.
                    Some(Err(_)) => {}
                    None => return,
                },
                Some(check) = arrivals.checks.recv() => {
                    while let Some(Some(message)) = arrivals.messages.next().now_or_never() {
                        if let Ok(message) = message {
                            self.admit(message).await;
                        }
                    }
                    // Who asked has gone.
                    let _ = check.send(());
                }
            }
        }
    }

    /// Returns when every call is let in that the connection's reader has read. It reads in order: if something came
    /// after a call and is known, the call is let in.
    pub async fn let_all_in(&self) {
        let (check, done) = oneshot::channel();
        // Where nobody receives any more, the bus is gone, and nothing is left to be let in.
        if self.checks.send(check).is_ok() {
            let _ = done.await;
        }
    }

    /// Returns when what has been let in has begun what it asks for, or takes its time, as a person who is asked for a password.
    pub async fn settle(&self) {
        // No new ones come while the name is given up, except from callers that use the unique name.
        let _ = tokio::time::timeout(LAST_CALLS, self.calls.rest(Duration::ZERO)).await;
    }

    /// Refuses further calls and ends those in flight. A call that waits for a backup, or for a person, gets the error that
    /// the service is stopping; any other is answered, if it does not take too long.
    pub async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        if tokio::time::timeout(LAST_CALLS, self.tasks.wait()).await.is_err() {
            self.closed.cancel();
            self.tasks.wait().await;
        }
    }

    async fn admit(&self, message: Message) {
        let held = Held::of(&message);
        let header = message.header();
        let own = self.context.connection.unique_name();
        if own.is_some_and(|own| header.sender() == Some(own.inner())) {
            // The service's own question whether it answers.
            let (door, reply) = (self.clone(), Message::method_return(&header).build(&()));
            self.tasks.spawn(async move { door.context.send(reply).await });
            return;
        }
        let member = header.member().map(|member| member.as_str());
        let member = member.unwrap_or_default();
        // The bus limits only calls that have a reply, so others can come by the thousand. One that only reads is nothing without a
        // reply, and nobody hears why one is refused: neither costs more than a look.
        let sender = header.sender().map(|sender| sender.as_str()).unwrap_or_default();
        if !wants_reply(&message) && (READING.contains(&member) || !self.context.peers.has_room(sender)) {
            drop(message);
            return self.closer.close(held);
        }
        let visit = match header.sender() {
            Some(_) if self.closing.is_cancelled() => Err(stopping()),
            Some(_) if message.data().len() > MOST_BYTES => Err(BusError::new(
                Kind::LimitsExceeded,
                format!("a call may have at most {MOST_BYTES} bytes"),
            )),
            Some(sender) => self.context.peers.enter(sender.as_str()),
            None => Err(BusError::no_sender()),
        };
        match visit {
            Ok(visit) => {
                let door = self.clone();
                let place = visit.peer.line().join(member);
                let used = self.context.activity.begin();
                let call = (!waits_for_jobs(&message)).then(|| self.calls.begin());
                self.tasks.spawn(async move {
                    door.serve(message, visit, place).await;
                    door.closer.close(held);
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

    async fn serve(&self, message: Message, visit: Visit, place: Place) {
        let end = match waits_for_others(&message) {
            true => &self.closing,
            false => &self.closed,
        };
        let answer = tokio::select! {
            // A known result is returned.
            biased;
            answer = self.answer(message.clone(), visit, place) => answer,
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

    async fn answer(&self, message: Message, mut visit: Visit, place: Place) -> Result<Message> {
        let context = &self.context;
        let uid = context.peers.uid(&context.connection, &mut visit).await?;
        let share = context
            .service
            .hold_descriptors(uid, message.data().fds().len())?;
        let replies = wants_reply(&message);
        let user = (uid, visit.peer.user(uid).await);
        let call = Call::new(message, visit, user, share, place.turn());
        let answer = place.run(context.answer(&call)).await;
        if !replies {
            tokio::time::sleep(PAUSE).await;
        }
        answer
    }
}

/// Whether the caller waits for an answer (D-Bus specification, "NO_REPLY_EXPECTED": the call is carried out all the same).
fn wants_reply(call: &Message) -> bool {
    let flags = call.header().primary().flags();
    !flags.contains(Flags::NO_REPLY_EXPECTED)
}

/// Whether the call may last as long as a backup, or as a person who is asked for a password.
fn waits_for_others(call: &Message) -> bool {
    call.header()
        .primary()
        .flags()
        .contains(Flags::ALLOW_INTERACTIVE_AUTH)
        || waits_for_jobs(call)
}

/// Whether the call begins nothing, and may last as long as a backup.
fn waits_for_jobs(call: &Message) -> bool {
    call.header()
        .member()
        .is_some_and(|member| member.as_str() == "Wait")
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
