//! The connections on the bus that the service deals with: whose they are, who subscribed, and who left.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::StreamExt;
use tokio::sync::{broadcast, oneshot};
use zbus::Connection;
use zbus::fdo::DBusProxy;
use zbus::names::{BusName, UniqueName};

use crate::access::Caller;
use crate::error::Kind;
use crate::service::Service;

use super::error::{BusError, Result};

/// Subscribers at a time.
const MAX_SUBSCRIBERS: usize = 256;
/// Users that are remembered; beyond that they are asked for again.
const MAX_USERS: usize = 1024;
const DEPARTURES: usize = 1024;

struct Known {
    users: HashMap<String, u32>,
    subscribers: HashMap<String, Caller>,
}

/// What is known of other connections.
pub struct Peers {
    known: Mutex<Known>,
    departures: broadcast::Sender<String>,
}

impl Default for Peers {
    fn default() -> Self {
        Self {
            known: Mutex::new(Known {
                users: HashMap::new(),
                subscribers: HashMap::new(),
            }),
            departures: broadcast::Sender::new(DEPARTURES),
        }
    }
}

/// Tells when one connection has left.
pub struct Departure {
    name: String,
    departures: broadcast::Receiver<String>,
}

impl Departure {
    /// Waits until it has.
    pub async fn wait(&mut self) {
        loop {
            match self.departures.recv().await {
                Ok(name) if name != self.name => {}
                // So many have left that one more may be among them: whoever is still there can ask again.
                Ok(_) | Err(_) => return,
            }
        }
    }
}

impl Peers {
    /// Watches for `name` to leave, from now on.
    pub fn departure(&self, name: &str) -> Departure {
        Departure {
            name: name.to_owned(),
            departures: self.departures.subscribe(),
        }
    }

    /// The user that a connection authenticated as, from the bus.
    pub async fn uid(&self, connection: &Connection, name: &UniqueName<'_>) -> Result<u32> {
        if let Some(uid) = self.lock().users.get(name.as_str()) {
            return Ok(*uid);
        }
        let denied = |error: zbus::Error| BusError::new(Kind::AccessDenied, format!("who are you? {error}"));
        let bus = DBusProxy::new(connection).await.map_err(denied)?;
        let asked = bus.get_connection_unix_user(BusName::from(name.clone())).await;
        let uid = asked.map_err(|error| denied(error.into()))?;
        let mut known = self.lock();
        if known.users.len() < MAX_USERS {
            known.users.insert(name.to_string(), uid);
        }
        Ok(uid)
    }

    pub fn subscribe(&self, caller: &Caller) -> Result<()> {
        let mut known = self.lock();
        if known.subscribers.len() >= MAX_SUBSCRIBERS && !known.subscribers.contains_key(&caller.name) {
            let text = format!("at most {MAX_SUBSCRIBERS} connections may be subscribed");
            return Err(BusError::new(Kind::LimitsExceeded, text));
        }
        // Signals ask nobody for a password.
        let caller = Caller {
            interactive: false,
            ..caller.clone()
        };
        known.subscribers.insert(caller.name.clone(), caller);
        Ok(())
    }

    pub fn unsubscribe(&self, caller: &Caller) {
        self.lock().subscribers.remove(&caller.name);
    }

    pub fn subscribers(&self) -> Vec<Caller> {
        self.lock().subscribers.values().cloned().collect()
    }

    fn forget(&self, name: &str) {
        let mut known = self.lock();
        known.users.remove(name);
        known.subscribers.remove(name);
        drop(known);
        // Nobody waits for anybody's leaving.
        let _ = self.departures.send(name.to_owned());
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Follows who leaves, until the bus itself is gone. Says through `ready` when it misses nobody any more.
pub async fn watch(
    connection: Connection,
    peers: Arc<Peers>,
    service: Arc<Service>,
    ready: oneshot::Sender<()>,
) {
    let departures = async {
        let bus = DBusProxy::new(&connection).await?;
        // Argument 2 is the new owner: nobody.
        bus.receive_name_owner_changed_with_args(&[(2, "")]).await
    };
    let mut departures = match departures.await {
        Ok(departures) => departures,
        Err(error) => {
            tracing::error!(%error, "cannot follow who leaves the bus");
            return;
        }
    };
    // Who waits for it has gone: then nobody needs it.
    let _ = ready.send(());
    while let Some(departure) = departures.next().await {
        if let Ok(args) = departure.args()
            && let BusName::Unique(name) = args.name()
        {
            peers.forget(name.as_str());
            service.forget_caller(name.as_str());
        }
    }
}
