//! The events of a monitor, as a reader of its own receives them.

use std::sync::Arc;

use tokio::sync::broadcast;

use super::Event;

/// The events since [`super::Monitor::events`] was called.
pub struct Events(pub(super) broadcast::Receiver<Arc<Event>>);

/// Why there is no next event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventsError {
    /// Some were missed: ask QEMU how things stand, then go on.
    Missed,
    /// The connection is closed.
    Closed,
}

impl Events {
    /// The events of a connection that is closed.
    pub(super) fn closed() -> Self {
        Self(broadcast::channel(1).1)
    }

    /// The next event that is there already: after a reply, all that QEMU sent before it.
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
    pub async fn next(&mut self) -> Result<Arc<Event>, EventsError> {
        self.0.recv().await.map_err(|error| match error {
            broadcast::error::RecvError::Lagged(_) => EventsError::Missed,
            broadcast::error::RecvError::Closed => EventsError::Closed,
        })
    }
}
