//! The service on the bus: messages into calls, results into replies, changes into signals.
//!
//! The only place that knows D-Bus, and no place for decisions. A call comes in at the [`door`]; its path is looked up for
//! its caller ([`object`]); the [`router`] finds the module of its interface, which turns the arguments into a call of the
//! service.

mod backup;
mod call;
mod closer;
mod domain;
mod door;
mod error;
mod follower;
mod job;
mod leave;
mod manager;
mod object;
pub mod options;
mod peers;
mod router;
mod signals;
mod standard;
mod stored;
mod turn;

use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use zbus::fdo::DBusProxy;
use zbus::message::Type;
use zbus::wire::{ObjectPath, OwnedObjectPath};
use zbus::{Connection, MatchRule, MessageStream};

pub use leave::Prober;

use crate::activity::Activity;
use crate::config::Config;
use crate::job::Job;
use crate::names::ROOT_PATH;
use crate::service::Service;
use door::Door;
use follower::Follower;
use peers::Peers;
use signals::Audience;

/// What every call works with.
#[derive(Clone)]
struct Context {
    connection: Connection,
    service: Arc<Service>,
    peers: Arc<Peers>,
    follower: Follower,
    activity: Activity,
}

/// The service while it is on the bus.
pub struct Published {
    connection: Connection,
    /// Whether the bus starts the service for a call.
    pub on_demand: bool,
    door: Door,
    receiving: JoinHandle<()>,
    follower: Follower,
    following: JoinHandle<()>,
    closing: JoinHandle<()>,
    watching: JoinHandle<()>,
    lost: CancellationToken,
}

/// Puts `service` on the bus of `connection` and takes the name when everything is there. `resumed` are jobs of a former
/// process, whose ends nobody has heard of. Whoever needs the service from then on is counted in `activity`.
pub async fn publish(
    connection: Connection,
    service: Arc<Service>,
    config: &Config,
    resumed: Vec<Arc<Job>>,
    activity: &Activity,
) -> zbus::Result<Published> {
    let limits = &config.limits;
    let subscriptions = limits.of_subscriptions().keeping(activity);
    let peers = Arc::new(Peers::new(limits.of_calls(), subscriptions));
    let audience = Audience::new(
        service.clone(),
        peers.clone(),
        connection.clone(),
        config.bus.signals,
    );
    let (follower, work) = follower::new(service.clone(), audience, activity.clone());
    let (ready, watches) = oneshot::channel();
    let lost = CancellationToken::new();
    let (watch, end) = (
        peers::watch(
            connection.clone(),
            peers.clone(),
            (service.clone(), follower.clone()),
            ready,
        ),
        lost.clone(),
    );
    let watching = tokio::spawn(async move {
        watch.await;
        end.cancel();
    });
    // Without it callers that leave would be missed.
    watches
        .await
        .map_err(|_| zbus::Error::Failure("the bus does not tell who leaves".into()))?;
    let rule = MatchRule::builder().msg_type(Type::MethodCall).build()?;
    let calls = MessageStream::for_match_rule(rule, &connection, None).await?;
    let (closer, closing) = closer::new(connection.clone());
    let context = Context {
        connection: connection.clone(),
        service,
        peers,
        follower: follower.clone(),
        activity: activity.clone(),
    };
    let (door, arrivals) = Door::new(context, closer, calls);
    let receiving = tokio::spawn(door.clone().receive(arrivals));
    let following = tokio::spawn(work.run());
    let closing = tokio::spawn(closing.run());
    let on_demand = leave::is_started_on_demand(&connection).await?;
    leave::take_name(&connection).await?;
    // Under the name by which listeners know the service.
    resumed.into_iter().for_each(|job| follower.resume_job(job));
    Ok(Published {
        connection,
        on_demand,
        door,
        receiving,
        follower,
        following,
        closing,
        watching,
        lost,
    })
}

impl Published {
    /// Waits until the bus has closed the connection.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// Returns when the calls in flight have begun what they ask for, or take long.
    pub async fn settle_calls(&self) {
        self.door.settle().await;
    }

    /// Brings the calls in flight to their end. Nothing comes by the name any more (see [`Published::withdraw`]); what comes
    /// by the unique name is refused from now on.
    pub async fn finish_calls(&self) {
        self.door.close().await;
    }

    /// Announces what has ended, and leaves the bus.
    pub async fn close(self) {
        self.follower.finish();
        // It ends by itself, or by a panic, which aborts.
        let _ = self.following.await;
        // Where the bus is gone, so is whatever could come.
        if let Ok(bus) = DBusProxy::new(&self.connection).await {
            let _ = bus.get_id().await;
            self.door.let_all_in().await;
        }
        for task in [self.receiving, self.watching, self.closing] {
            task.abort();
        }
        let _ = self.connection.close().await;
    }
}

/// Says nothing about the domain: an id is a random number.
fn domain_path(id: u64) -> OwnedObjectPath {
    path(format!("{ROOT_PATH}/domain/{id:016x}"))
}

fn backup_path(object: u64) -> OwnedObjectPath {
    path(format!("{ROOT_PATH}/backup/{object:016x}"))
}

fn job_path(id: u32) -> OwnedObjectPath {
    path(format!("{ROOT_PATH}/job/{id}"))
}

fn path(path: String) -> OwnedObjectPath {
    // The root's path, a word and a number: always a path.
    ObjectPath::from_string_unchecked(path).into()
}
