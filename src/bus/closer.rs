//! Closes the descriptors of calls on a thread that may block.
//!
//! A caller can pass any descriptor, and the last close of some blocks: a connected socket with `SO_LINGER` blocks for
//! as long as its sender set (socket(7)). So the last reference to a message with descriptors is dropped on a blocking
//! thread.

use tokio::sync::mpsc;
use zbus::fdo::DBusProxy;
use zbus::{Connection, Message};

/// While fewer messages than this wait, the task waits for the connection's reader before it drops them.
const MOST_PATIENT: usize = 256;

/// A message with descriptors. While it is held, closing a duplicate of its descriptors cannot block.
#[derive(Debug)]
pub struct HeldMessage(Option<Message>);

impl HeldMessage {
    pub fn of(message: &Message) -> Self {
        let holds = !message.data().fds().is_empty();
        Self(holds.then(|| message.clone()))
    }
}

/// The sending side: any number of these.
#[derive(Clone)]
pub struct Closer(mpsc::UnboundedSender<Message>);

/// The task.
pub struct Work {
    waiting: mpsc::UnboundedReceiver<Message>,
    connection: Connection,
}

pub fn new(connection: Connection) -> (Closer, Work) {
    let (sender, waiting) = mpsc::unbounded_channel();
    (Closer(sender), Work { waiting, connection })
}

impl Closer {
    /// Queues a message for closing. The caller has dropped all its other references to the message.
    pub fn close(&self, held: HeldMessage) {
        if let Some(message) = held.0 {
            // Without the task the service is about to end.
            let _ = self.0.send(message);
        }
    }
}

impl Work {
    /// Closes messages until every [`Closer`] is dropped.
    pub async fn run(mut self) {
        while let Some(first) = self.waiting.recv().await {
            let mut messages = vec![first];
            while let Ok(more) = self.waiting.try_recv() {
                messages.push(more);
            }
            // Under a flood of calls, descriptors run out first, so closing must not wait for the bus.
            if messages.len() < MOST_PATIENT {
                self.let_reader_go_on().await;
            }
            // Not awaited: a close that hangs must not delay the others.
            tokio::task::spawn_blocking(move || messages.into_iter().for_each(close));
        }
    }

    /// The connection's reader may still hold the messages. It has dropped them once it has read the reply to a later
    /// request. Every bus answers `GetId`. Some buses refuse `Ping`, and log that.
    async fn let_reader_go_on(&self) {
        let answer = async { DBusProxy::new(&self.connection).await?.get_id().await };
        if let Err(error) = answer.await {
            tracing::debug!(%error, "the bus does not answer");
        }
    }
}

fn close(message: Message) {
    for descriptor in message.data().fds() {
        // With lingering disabled, close(2) of a socket returns at once. Descriptors that are not sockets refuse the
        // option.
        let _ = rustix::net::sockopt::set_socket_linger(descriptor, None);
    }
}
