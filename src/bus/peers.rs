//! The clients on the bus: their users, their shares of the limits, and their disconnection.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use futures_util::StreamExt;
use tokio::sync::{OnceCell, oneshot};
use tokio_util::sync::CancellationToken;
use zbus::Connection;
use zbus::fdo::DBusProxy;
use zbus::names::{BusName, UniqueName};

use super::error::{BusError, Result};
use super::follower::Follower;
use super::turn::CallQueue;
use crate::access::{Caller, Process};
use crate::domain::owner;
use crate::error::Kind;
use crate::quota::{Quota, Share};
use crate::service::Service;

/// The most connections that are known at a time. A bus has fewer by default.
const MOST_PEERS: usize = 8192;
/// The most calls in flight of a connection whose user is not known yet: the bus's own default limit.
const MOST_UNKNOWN: usize = 128;

/// Another connection on the bus.
#[derive(Debug)]
pub struct Peer {
    name: String,
    uid: OnceCell<u32>,
    /// The user's name, if the user is lasting (see [`owner::lasting_name`]).
    user: OnceCell<Option<String>>,
    process: OnceLock<Process>,
    calls: AtomicUsize,
    queue: Arc<CallQueue>,
    subscription: Mutex<Option<Share>>,
    disconnected: CancellationToken,
}

impl Peer {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            uid: OnceCell::new(),
            user: OnceCell::new(),
            process: OnceLock::new(),
            calls: AtomicUsize::new(0),
            queue: Arc::default(),
            subscription: Mutex::new(None),
            disconnected: CancellationToken::new(),
        }
    }

    /// The name of the connection's user, unless another user may get the uid soon.
    pub async fn user(&self, uid: u32) -> Option<String> {
        self.user.get_or_init(|| owner::lasting_name(uid)).await.clone()
    }

    /// The process that opened the connection. `None` until the user is known, or if the bus does not know it.
    pub fn process(&self) -> Option<Process> {
        self.process.get().cloned()
    }

    /// The connection's unique name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The connection's calls, in the order in which they take effect.
    pub fn queue(&self) -> &Arc<CallQueue> {
        &self.queue
    }

    /// Waits until the connection has left the bus.
    pub async fn disconnected(&self) {
        self.disconnected.cancelled().await;
    }

    pub fn is_disconnected(&self) -> bool {
        self.disconnected.is_cancelled()
    }

    fn subscription(&self) -> MutexGuard<'_, Option<Share>> {
        self.subscription.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn unsubscribe(&self) {
        self.subscription().take();
    }
}

/// An admitted call while it is in flight.
#[derive(Debug)]
pub struct InFlight {
    pub peer: Arc<Peer>,
    share: Option<Share>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.peer.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All known connections.
pub struct Peers {
    known: Mutex<HashMap<String, Arc<Peer>>>,
    calls: Quota,
    subscriptions: Quota,
}

impl Peers {
    pub fn new(calls: Quota, subscriptions: Quota) -> Self {
        Self {
            known: Mutex::default(),
            calls,
            subscriptions,
        }
    }

    /// Admits a call of this connection if the limits allow it. Does not wait for the bus: the user may not be known
    /// yet.
    pub fn admit(&self, name: &str) -> Result<InFlight> {
        let peer = self.peer_named(name)?;
        let share = match peer.uid.get() {
            Some(uid) => Some(self.calls.take(*uid, 1)?),
            None if peer.calls.load(Ordering::Relaxed) >= MOST_UNKNOWN => {
                let text =
                    format!("{MOST_UNKNOWN} calls arrived before the bus reported their user: try again");
                return Err(BusError::new(Kind::LimitsExceeded, text));
            }
            None => None,
        };
        peer.calls.fetch_add(1, Ordering::Relaxed);
        Ok(InFlight { peer, share })
    }

    /// Whether another call of this connection would be admitted. True if its user is not known.
    pub fn has_room(&self, name: &str) -> bool {
        let peer = self.lock().get(name).cloned();
        let uid = peer.and_then(|peer| peer.uid.get().copied());
        uid.is_none_or(|uid| self.calls.has_room(uid))
    }

    /// The user that authenticated the connection. The bus is asked once for each connection.
    pub async fn uid(&self, connection: &Connection, in_flight: &mut InFlight) -> Result<u32> {
        let peer = in_flight.peer.clone();
        let uid = peer.uid.get_or_try_init(async || {
            let name = UniqueName::try_from(peer.name.as_str())?;
            let bus = DBusProxy::new(connection).await?;
            let credentials = bus.get_connection_credentials(BusName::from(name)).await?;
            if let Some(id) = credentials.process_id() {
                // Only this closure sets it, and it runs until it succeeds.
                let _ = peer.process.set(process(id).await);
            }
            let unknown = || zbus::Error::Failure("it has no UNIX user".to_owned());
            credentials.unix_user_id().ok_or_else(unknown)
        });
        let uid = *uid.await.map_err(|error: zbus::Error| {
            // The connection disconnected before its user was known, and its disconnection may have been handled
            // already.
            self.forget(&peer);
            BusError::new(
                Kind::AccessDenied,
                format!("the bus does not report the caller's user: {error}"),
            )
        })?;
        if in_flight.share.is_none() {
            in_flight.share = Some(self.calls.take(uid, 1)?);
        }
        Ok(uid)
    }

    pub fn subscribe(&self, peer: &Peer, uid: u32) -> Result<()> {
        let mut subscription = peer.subscription();
        if subscription.is_none() {
            *subscription = Some(self.subscriptions.take(uid, 1)?);
        }
        Ok(())
    }

    /// The connections that subscribed to detailed signals.
    pub fn subscribers(&self) -> Vec<Caller> {
        let known = self.lock();
        let subscribed = known.values().filter(|peer| peer.subscription().is_some());
        let callers = subscribed.filter_map(|peer| {
            Some(Caller {
                name: peer.name.clone(),
                uid: *peer.uid.get()?,
                user: peer.user.get().cloned().flatten(),
                process: peer.process(),
                // polkit must not ask for a password because of a signal.
                interactive: false,
                turn: CancellationToken::new(),
            })
        });
        callers.collect()
    }

    /// Whether a connection that has called is still connected.
    pub fn is_there(&self, name: &str) -> bool {
        self.lock().contains_key(name)
    }

    fn peer_named(&self, name: &str) -> Result<Arc<Peer>> {
        let mut known = self.lock();
        if let Some(peer) = known.get(name) {
            return Ok(peer.clone());
        }
        if known.len() >= MOST_PEERS {
            let text = format!("the service already has {MOST_PEERS} clients: try again later");
            return Err(BusError::new(Kind::LimitsExceeded, text));
        }
        let peer = Arc::new(Peer::new(name));
        known.insert(name.to_owned(), peer.clone());
        Ok(peer)
    }

    fn forget(&self, peer: &Arc<Peer>) {
        let mut known = self.lock();
        if known.get(&peer.name).is_some_and(|same| Arc::ptr_eq(same, peer)) {
            known.remove(&peer.name);
        }
        drop(known);
        peer.disconnected.cancel();
    }

    /// Handles the disconnection of a client.
    fn leave(&self, name: &str, service: &Service, follower: &Follower) {
        let peer = self.lock().get(name).cloned();
        if let Some(peer) = peer {
            self.forget(&peer);
            service.forget_caller(name);
            follower.forget_caller(name);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Peer>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn process(id: u32) -> Process {
    let name = tokio::task::spawn_blocking(move || std::fs::read(format!("/proc/{id}/comm")));
    // The process may have ended.
    let name = name.await.ok().and_then(std::io::Result::ok).unwrap_or_default();
    Process {
        id,
        name: String::from_utf8_lossy(name.trim_ascii_end()).into_owned(),
    }
}

/// Follows disconnecting clients until the bus closes the connection. Signals `ready` when it misses none any more.
pub async fn watch(
    connection: Connection,
    peers: Arc<Peers>,
    (service, follower): (Arc<Service>, Follower),
    ready: oneshot::Sender<()>,
) {
    let departures = async {
        let bus = DBusProxy::new(&connection).await?;
        // Argument 2 is the new owner: none.
        bus.receive_name_owner_changed_with_args(&[(2, "")]).await
    };
    let mut departures = match departures.await {
        Ok(departures) => departures,
        Err(error) => {
            tracing::error!(%error, "cannot follow clients that leave the bus");
            return;
        }
    };
    // Without a receiver nobody waits for this.
    let _ = ready.send(());
    while let Some(departure) = departures.next().await {
        if let Ok(args) = departure.args()
            && let BusName::Unique(name) = args.name()
        {
            peers.leave(name.as_str(), &service, &follower);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::Limits;

    fn peers(per_user: usize) -> Peers {
        let limits = Limits {
            per_user,
            in_all: 1000,
        };
        Peers::new(Quota::new("calls", limits), Quota::new("subscriptions", limits))
    }

    #[test]
    fn a_connection_of_an_unknown_user_has_a_limit_of_calls_in_flight() {
        let peers = peers(1);
        let all_in_flight: Vec<_> = (0..MOST_UNKNOWN).map(|_| peers.admit(":1.1").unwrap()).collect();
        assert!(peers.admit(":1.1").is_err());
        assert!(peers.admit(":1.2").is_ok(), "others are not kept out");
        drop(all_in_flight);
        assert!(peers.admit(":1.1").is_ok());
    }

    #[test]
    fn all_connections_of_a_user_share_the_users_limit() {
        let peers = peers(2);
        for name in [":1.1", ":1.2", ":1.3"] {
            peers.peer_named(name).unwrap().uid.set(1000).unwrap();
        }
        let _first = peers.admit(":1.1").unwrap();
        let second = peers.admit(":1.2").unwrap();
        assert!(peers.admit(":1.3").is_err());
        drop(second);
        assert!(peers.admit(":1.3").is_ok());
    }

    #[test]
    fn a_forgotten_peer_is_disconnected_and_holds_no_share() {
        let peers = peers(1);
        let in_flight = peers.admit(":1.1").unwrap();
        let peer = in_flight.peer.clone();
        peer.uid.set(1000).unwrap();
        peers.subscribe(&peer, 1000).unwrap();
        assert_eq!(peers.subscribers().len(), 1);
        peers.forget(&peer);
        assert!(peer.is_disconnected() && peers.subscribers().is_empty() && peers.lock().is_empty());
        drop((in_flight, peer));
        let _share = peers.subscriptions.take(1000, 1).unwrap();
    }
}
