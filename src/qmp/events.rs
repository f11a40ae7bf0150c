//! The events of a monitor: each reader has its own queue, whose memory depends on its content.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::message::Event;

/// How many events a reader may lag behind until it loses the oldest ones: 1 MiB with the longest events.
const MOST: usize = 256;
/// An empty queue with more capacity than this frees it.
const KEEP_CAPACITY: usize = 16;

/// The events since [`super::Monitor::events`] was called.
pub struct Events(Arc<Reader>);

/// Why there is no next event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventsError {
    /// The reader missed events. It must query QEMU's state, and can then continue.
    Missed,
    /// The connection is closed.
    Closed,
}

#[derive(Debug, Default)]
struct Reader {
    queue: Mutex<Queue>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Arc<Event>>,
    /// The oldest events were dropped.
    missed: bool,
    closed: bool,
}

impl Queue {
    fn push(&mut self, event: Arc<Event>) {
        if self.events.len() >= MOST {
            self.events.pop_front();
            self.missed = true;
        }
        self.events.push_back(event);
    }

    fn pop(&mut self) -> Option<Arc<Event>> {
        let event = self.events.pop_front();
        if self.events.is_empty() && self.events.capacity() > KEEP_CAPACITY {
            self.events = VecDeque::new();
        }
        event
    }
}

impl Reader {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Events {
    /// Returns the next event without waiting. After a reply, all events that QEMU sent before it are there.
    pub fn next_now(&mut self) -> Option<Arc<Event>> {
        let mut queue = self.0.lock();
        queue.missed = false;
        queue.pop()
    }

    /// Waits for the next event. Cancel-safe.
    pub async fn next(&mut self) -> Result<Arc<Event>, EventsError> {
        // Yields, so that a peer that never stops does not starve other tasks.
        tokio::task::coop::consume_budget().await;
        loop {
            {
                let mut queue = self.0.lock();
                if std::mem::take(&mut queue.missed) {
                    return Err(EventsError::Missed);
                }
                if let Some(event) = queue.pop() {
                    return Ok(event);
                }
                if queue.closed {
                    return Err(EventsError::Closed);
                }
            }
            // `Notify` stores a notification that came since.
            self.0.news.notified().await;
        }
    }
}

/// All readers of a monitor's events, or `None` once the monitor is closed. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Readers(Arc<Mutex<Option<Vec<Arc<Reader>>>>>);

impl Readers {
    /// Adds a reader of the events from now on.
    pub fn add(&self) -> Events {
        let reader = Arc::<Reader>::default();
        match &mut *self.lock() {
            Some(readers) => {
                forget_those_that_left(readers);
                readers.push(reader.clone());
            }
            None => reader.lock().closed = true,
        }
        Events(reader)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<Arc<Reader>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn forget_those_that_left(readers: &mut Vec<Arc<Reader>>) {
    readers.retain(|reader| Arc::strong_count(reader) > 1);
}

/// The sender of the events. Its readers still get the events from before it is dropped.
#[derive(Debug)]
pub(super) struct Speaker(Readers);

impl Speaker {
    pub fn new() -> Self {
        Self(Readers(Arc::new(Mutex::new(Some(Vec::new())))))
    }

    pub fn readers(&self) -> Readers {
        self.0.clone()
    }

    /// Delivers an event to each reader. A slow reader delays no other reader.
    pub fn say(&self, event: Event) {
        let event = Arc::new(event);
        if let Some(readers) = &mut *self.0.lock() {
            forget_those_that_left(readers);
            for reader in readers {
                reader.lock().push(event.clone());
                reader.news.notify_one();
            }
        }
    }
}

impl Drop for Speaker {
    fn drop(&mut self) {
        for reader in self.0.lock().take().into_iter().flatten() {
            reader.lock().closed = true;
            reader.news.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(number: usize) -> Event {
        Event::for_test(&number.to_string(), &json!(null))
    }

    #[tokio::test]
    async fn a_slow_reader_is_notified_and_delays_no_other_reader() {
        let speaker = Speaker::new();
        let (mut slow, mut quick) = (speaker.readers().add(), speaker.readers().add());
        for number in 0..=MOST {
            speaker.say(event(number));
            assert_eq!(quick.next().await.unwrap().name, number.to_string());
        }
        assert_eq!(slow.next().await.unwrap_err(), EventsError::Missed);
        for number in 1..=MOST {
            assert_eq!(slow.next().await.unwrap().name, number.to_string());
        }
        assert_eq!(slow.0.lock().events.capacity(), 0, "the memory is freed");
        for number in 0..=MOST {
            speaker.say(event(number));
        }
        assert_eq!(std::iter::from_fn(|| slow.next_now()).count(), MOST);
        speaker.say(event(8));
        assert_eq!(slow.next().await.unwrap().name, "8");
    }

    #[tokio::test]
    async fn readers_get_the_events_before_the_end_and_dropped_readers_hold_none() {
        let speaker = Speaker::new();
        let readers = speaker.readers();
        let mut stays = readers.add();
        drop(readers.add());
        speaker.say(event(1));
        assert_eq!(readers.lock().as_ref().unwrap().len(), 1);
        drop(speaker);
        assert_eq!(stays.next().await.unwrap().name, "1");
        assert_eq!(stays.next().await.unwrap_err(), EventsError::Closed);
        assert_eq!(readers.add().next().await.unwrap_err(), EventsError::Closed);
    }
}
