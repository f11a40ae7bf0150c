//! The first lines of every method: who calls, is there room, may this message do anything.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use zbus::Connection;
use zbus::message::{Flags, Header};

use super::Context;
use super::error::{BusError, Result};
use super::peers::Departure;
use crate::access::Caller;
use crate::error::Kind;

/// Calls in flight: of one connection, and of all together. Waiting for a job's end is a call in flight too.
const MAX_CALLS_PER_SENDER: usize = 64;
const MAX_CALLS: usize = 1024;

/// Counts the calls in flight.
#[derive(Default)]
pub struct Gate(Mutex<HashMap<String, usize>>);

/// One call's place.
struct Place {
    gate: Arc<Gate>,
    sender: String,
}

impl Gate {
    fn enter(self: &Arc<Self>, sender: &str) -> Result<Place> {
        let mut calls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if calls.values().sum::<usize>() >= MAX_CALLS {
            return Err(BusError::new(
                Kind::LimitsExceeded,
                format!("{MAX_CALLS} calls are in flight: try later"),
            ));
        }
        let own = calls.entry(sender.to_owned()).or_default();
        if *own >= MAX_CALLS_PER_SENDER {
            let text =
                format!("{MAX_CALLS_PER_SENDER} calls of this connection are in flight: wait for replies");
            return Err(BusError::new(Kind::LimitsExceeded, text));
        }
        *own += 1;
        Ok(Place {
            gate: self.clone(),
            sender: sender.to_owned(),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut calls = self.gate.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = calls.get_mut(&self.sender) {
            *own -= 1;
            if *own == 0 {
                calls.remove(&self.sender);
            }
        }
    }
}

/// A call that was let in.
pub struct Visit {
    pub caller: Caller,
    departure: Departure,
    _place: Place,
}

impl Visit {
    /// Goes on with `work` only as long as the caller is there.
    pub async fn while_present<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            result = work => result,
            () = self.departure.wait() => Err(BusError::new(Kind::AccessDenied, "the caller has left the bus")),
        }
    }
}

impl Context {
    /// Lets a call in that only looks.
    pub async fn look(&self, header: &Header<'_>, connection: &Connection) -> Result<Visit> {
        let sender = header.sender().ok_or_else(BusError::no_sender)?;
        let place = self.gate.enter(sender.as_str())?;
        // Before the question for its user: then no leaving is missed.
        let departure = self.peers.departure(sender.as_str());
        let uid = self.peers.uid(connection, sender).await?;
        Ok(Visit {
            caller: Caller {
                name: sender.to_string(),
                uid,
                interactive: header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH),
            },
            departure,
            _place: place,
        })
    }

    /// Lets a call in that changes something. One that wants no reply would not hear what became of it, and would
    /// evade the bus's own limit on calls in flight.
    pub async fn act(&self, header: &Header<'_>, connection: &Connection) -> Result<Visit> {
        if header.primary().flags().contains(Flags::NO_REPLY_EXPECTED) {
            return Err(BusError::new(
                Kind::InvalidArgs,
                "this method cannot be called without waiting for its reply",
            ));
        }
        self.look(header, connection).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_has_so_many_places_and_gets_them_back() {
        let gate = Arc::new(Gate::default());
        let places: Vec<_> = (0..MAX_CALLS_PER_SENDER)
            .map(|_| gate.enter(":1.1").ok().unwrap())
            .collect();
        assert!(gate.enter(":1.1").is_err());
        assert!(gate.enter(":1.2").is_ok(), "others are not kept out");
        drop(places);
        assert!(gate.enter(":1.1").is_ok());
        assert!(gate.0.lock().unwrap().is_empty(), "nobody who left is remembered");
    }

    #[test]
    fn all_together_have_so_many_places() {
        let gate = Arc::new(Gate::default());
        let place = |call| gate.enter(&format!(":1.{}", call / MAX_CALLS_PER_SENDER));
        let places: Vec<_> = (0..MAX_CALLS).map(|call| place(call).ok().unwrap()).collect();
        assert!(gate.enter(":2.1").is_err());
        drop(places);
        assert!(gate.enter(":2.1").is_ok());
    }
}
