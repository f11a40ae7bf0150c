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
mod manager;
mod object;
pub mod options;
mod peers;
mod router;
mod signals;
mod standard;

use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use zbus::message::Type;
use zbus::wire::{ObjectPath, OwnedObjectPath};
use zbus::{Connection, MatchRule, MessageStream};

use crate::config::Config;
use crate::job::Job;
use crate::names::{BUS_NAME, ROOT_PATH};
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
}

/// The service while it is on the bus.
pub struct Published {
    connection: Connection,
    door: Door,
    receiving: JoinHandle<()>,
    follower: Follower,
    following: JoinHandle<()>,
    closing: JoinHandle<()>,
    watching: JoinHandle<()>,
}

/// Puts `service` on the bus of `connection` and takes the name when everything is there. `resumed` are jobs of a former
/// process, whose ends nobody has heard of.
pub async fn publish(
    connection: Connection,
    service: Arc<Service>,
    config: &Config,
    resumed: Vec<Arc<Job>>,
) -> zbus::Result<Published> {
    let limits = &config.limits;
    let peers = Arc::new(Peers::new(limits.of_calls(), limits.of_subscriptions()));
    let audience = Audience::new(
        service.clone(),
        peers.clone(),
        connection.clone(),
        config.bus.signals,
    );
    let (follower, work) = follower::new(service.clone(), audience);
    let (ready, watches) = oneshot::channel();
    let watching = tokio::spawn(peers::watch(
        connection.clone(),
        peers.clone(),
        service.clone(),
        ready,
    ));
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
    };
    let door = Door::new(context, closer);
    let receiving = tokio::spawn(door.clone().receive(calls));
    let following = tokio::spawn(work.run());
    let closing = tokio::spawn(closing.run());
    connection.request_name(BUS_NAME).await?;
    // Under the name by which listeners know the service.
    resumed.into_iter().for_each(|job| follower.resume_job(job));
    Ok(Published {
        connection,
        door,
        receiving,
        follower,
        following,
        closing,
        watching,
    })
}

impl Published {
    /// Waits until the bus has closed the connection.
    pub async fn lost(&mut self) {
        // It ends with the connection, or by a panic, which aborts.
        let _ = (&mut self.watching).await;
    }

    /// Announces what has ended, as the owner of the name by which listeners know the service, answers what is still to be
    /// answered, and leaves the bus. All jobs have ended.
    pub async fn close(self) {
        self.follower.finish();
        // These end by themselves, or by a panic, which aborts.
        let _ = self.following.await;
        self.door.close().await;
        let _ = self.receiving.await;
        self.watching.abort();
        self.closing.abort();
        // Where the bus is gone, so are name and connection.
        let _ = self.connection.release_name(BUS_NAME).await;
        let _ = self.connection.close().await;
    }
}

/// Says nothing about the domain: an id is a random number.
fn domain_path(id: u64) -> OwnedObjectPath {
    path(format!("{ROOT_PATH}/domain/{id:016x}"))
}

fn job_path(id: u32) -> OwnedObjectPath {
    path(format!("{ROOT_PATH}/job/{id}"))
}

fn path(path: String) -> OwnedObjectPath {
    // The root's path, a word and a number: always a path.
    ObjectPath::from_string_unchecked(path).into()
}
