//! Where calls come in: is there room, and who is it.
//!
//! The library's own object server starts a task for whatever arrives, tells apart by itself which objects there are, and
//! holds locks while a property is read: it can neither be kept from growing nor be made to hide anything from one caller
//! and not from another. So the service takes the messages themselves, as the library advises in such a case.

use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use zbus::message::Flags;
use zbus::{DBusError, Message, MessageStream};

use super::Context;
use super::call::Call;
use super::closer::{Closer, Held};
use super::error::{BusError, Result};
use super::peers::Visit;
use crate::error::Kind;

/// The longest call, in bytes: a document of the longest length that can be configured, and as much again. The bus itself
/// lets through 16 times that, and whoever sends it could have 64 at a time.
const MOST_BYTES: usize = 2 << 20;

/// Calls in flight, each in a task of its own.
#[derive(Clone)]
pub struct Door {
    context: Context,
    closer: Closer,
    closing: CancellationToken,
    tasks: TaskTracker,
}

impl Door {
    pub fn new(context: Context, closer: Closer) -> Self {
        Self {
            context,
            closer,
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    /// Takes calls until [`Door::close`], or until the bus is gone. Never waits for anything of the bus but room to write:
    /// what is not taken from the stream keeps every other message waiting.
    pub async fn receive(self, mut messages: MessageStream) {
        while let Some(Some(message)) = self.closing.run_until_cancelled(messages.next()).await {
            // The stream ends after an error.
            if let Ok(message) = message {
                self.admit(message).await;
            }
        }
    }

    /// Answers no more calls, and those that wait for something with an error.
    pub async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn admit(&self, message: Message) {
        let held = Held::of(&message);
        let header = message.header();
        // Who wants no reply would not hear what became of the call, and evades the bus's own limit on calls in flight.
        // There is no method that would be of use to such a caller.
        if header.primary().flags().contains(Flags::NO_REPLY_EXPECTED) {
            tracing::trace!(sender = ?header.sender(), "a call without a reply is left out");
            drop(message);
            return self.closer.close(held);
        }
        let visit = match header.sender() {
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
                self.tasks.spawn(async move {
                    door.serve(message, visit).await;
                    door.closer.close(held);
                });
            }
            Err(error) => {
                self.context.send(error.create_reply(&header)).await;
                drop(message);
                self.closer.close(held);
            }
        }
    }

    async fn serve(&self, message: Message, visit: Visit) {
        let answer = tokio::select! {
            // What is known already is told.
            biased;
            answer = self.answer(message.clone(), visit) => answer,
            () = self.closing.cancelled() => Err(BusError::new(Kind::Busy, "the service is stopping")),
        };
        let reply = match answer {
            Ok(reply) => Ok(reply),
            Err(error) => error.create_reply(&message.header()),
        };
        self.context.send(reply).await;
    }

    async fn answer(&self, message: Message, mut visit: Visit) -> Result<Message> {
        let context = &self.context;
        let uid = context.peers.uid(&context.connection, &mut visit).await?;
        let share = context
            .service
            .hold_descriptors(uid, message.data().fds().len())?;
        context.answer(&Call::new(message, visit, uid, share)).await
    }
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
