//! The closing of descriptors that came with calls, where it keeps nobody waiting.
//!
//! What a caller passes can be anything, and the last close of some things waits: of a connected socket with `SO_LINGER` (see
//! socket(7)) for as long as its sender said. So each descriptor is duplicated when it comes, and the duplicate is closed
//! last, on a thread that may block.

use std::os::fd::{AsFd, OwnedFd};

use tokio::sync::mpsc;
use zbus::fdo::PeerProxy;
use zbus::{Connection, Message};

const BUS: &str = "org.freedesktop.DBus";

/// Descriptors of a message: as long as they are held, to close the message's own is nothing.
#[derive(Debug, Default)]
pub struct Held(Vec<OwnedFd>);

impl Held {
    pub fn of(message: &Message) -> Self {
        let data = message.data();
        let duplicates = data
            .fds()
            .iter()
            .map(|fd| rustix::io::fcntl_dupfd_cloexec(fd.as_fd(), 3));
        // One that cannot be duplicated, for want of descriptors, is closed with its message.
        Self(duplicates.filter_map(Result::ok).collect())
    }
}

/// The way to the task.
#[derive(Clone)]
pub struct Closer(mpsc::UnboundedSender<Held>);

/// The task's side.
pub struct Work {
    waiting: mpsc::UnboundedReceiver<Held>,
    connection: Connection,
}

pub fn new(connection: Connection) -> (Closer, Work) {
    let (sender, waiting) = mpsc::unbounded_channel();
    (Closer(sender), Work { waiting, connection })
}

impl Closer {
    /// Closes what came with a message that its last user has dropped.
    pub fn close(&self, held: Held) {
        if !held.0.is_empty() {
            // Without the task the service is about to end.
            let _ = self.0.send(held);
        }
    }
}

impl Work {
    /// Closes until there is no [`Closer`] any more.
    pub async fn run(mut self) {
        while let Some(first) = self.waiting.recv().await {
            let mut descriptors = first.0;
            while let Ok(more) = self.waiting.try_recv() {
                descriptors.extend(more.0);
            }
            self.let_reader_go_on().await;
            // Not waited for: what hangs keeps nothing else from being closed.
            tokio::task::spawn_blocking(move || descriptors.into_iter().for_each(close));
        }
    }

    /// The connection's reader may still hold the messages. When it has read the answer to something that was asked after
    /// they came, it does not.
    async fn let_reader_go_on(&self) {
        let ping = async { PeerProxy::new(&self.connection, BUS, "/").await?.ping().await };
        if let Err(error) = ping.await {
            tracing::debug!(%error, "the bus does not answer");
        }
    }
}

fn close(descriptor: OwnedFd) {
    // Nobody waits for what the service does not want. On what is no socket it does nothing.
    let _ = rustix::net::sockopt::set_socket_linger(&descriptor, None);
    drop(descriptor);
}
