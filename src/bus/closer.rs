//! Closes descriptors that came with calls, on a thread that may block.
//!
//! What a caller passes can be anything, and the last close of some things waits: of a connected socket with `SO_LINGER` (see
//! socket(7)) for as long as its sender said. So a message with descriptors is dropped last on a thread that may block.

use tokio::sync::mpsc;
use zbus::fdo::DBusProxy;
use zbus::{Connection, Message};

/// Messages that wait to be dropped; more are dropped at once.
const MOST_PATIENT: usize = 256;

/// A message with descriptors: as long as it is held, to close what was duplicated of it is nothing.
#[derive(Debug)]
pub struct Held(Option<Message>);

impl Held {
    pub fn of(message: &Message) -> Self {
        let holds = !message.data().fds().is_empty();
        Self(holds.then(|| message.clone()))
    }
}

/// The way to the task.
#[derive(Clone)]
pub struct Closer(mpsc::UnboundedSender<Message>);

/// The task's side.
pub struct Work {
    waiting: mpsc::UnboundedReceiver<Message>,
    connection: Connection,
}

pub fn new(connection: Connection) -> (Closer, Work) {
    let (sender, waiting) = mpsc::unbounded_channel();
    (Closer(sender), Work { waiting, connection })
}

impl Closer {
    /// Closes what came with a message that its last user has dropped.
    pub fn close(&self, held: Held) {
        if let Some(message) = held.0 {
            // Without the task the service is about to end.
            let _ = self.0.send(message);
        }
    }
}

impl Work {
    /// Closes until there is no [`Closer`] any more.
    pub async fn run(mut self) {
        while let Some(first) = self.waiting.recv().await {
            let mut messages = vec![first];
            while let Ok(more) = self.waiting.try_recv() {
                messages.push(more);
            }
            // Under a flood of calls, close first and answer later: descriptors run out first.
            if messages.len() < MOST_PATIENT {
                self.let_reader_go_on().await;
            }
            // Not waited for: what hangs keeps nothing else from being closed.
            tokio::task::spawn_blocking(move || messages.into_iter().for_each(close));
        }
    }

    /// The connection's reader may still hold the messages. When it has read the answer to something that was asked after
    /// they came, it does not. What is asked, every bus answers; a ping is refused by some, which log that.
    async fn let_reader_go_on(&self) {
        let answer = async { DBusProxy::new(&self.connection).await?.get_id().await };
        if let Err(error) = answer.await {
            tracing::debug!(%error, "the bus does not answer");
        }
    }
}

fn close(message: Message) {
    for descriptor in message.data().fds() {
        // Nobody waits for what the service does not want. On what is no socket it does nothing.
        let _ = rustix::net::sockopt::set_socket_linger(descriptor, None);
    }
}
