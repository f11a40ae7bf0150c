//! The D-Bus interface: method calls into calls of the service, results into replies, changes into signals.
//!
//! Only this module knows D-Bus, and it takes no decisions. The [`admission`] admits a call. [`object`] looks up its
//! path for the caller. The [`router`] finds the module of its interface, which turns the arguments into a call of the
//! service.

mod admission;
mod backup;
mod call;
mod closer;
mod domain;
mod error;
mod follower;
mod job;
mod leave;
mod manager;
mod methods;
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
pub use methods::{Effect, METHODS, Method, Visibility, visibility_of_properties};

use crate::activity::Activity;
use crate::config::Config;
use crate::job::Job;
use crate::names::ROOT_PATH;
use crate::service::Service;
use admission::Admission;
use follower::Follower;
use peers::Peers;
use signals::Emitter;

/// The shared state of all calls.
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
    /// Whether the bus starts the service on demand.
    pub on_demand: bool,
    admission: Admission,
    receiving: JoinHandle<()>,
    follower: Follower,
    following: JoinHandle<()>,
    closing: JoinHandle<()>,
    watching: JoinHandle<()>,
    lost: CancellationToken,
}

/// Serves `service` on the bus of `connection`, and takes the name when everything is ready. `resumed` are jobs of a
/// previous instance, whose ends are not announced yet. `activity` counts every use of the service from then on.
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
    let emitter = Emitter::new(
        service.clone(),
        peers.clone(),
        connection.clone(),
        config.bus.signals,
    );
    let (follower, work) = follower::new(service.clone(), emitter, activity.clone());
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
    // Without this task the service would miss callers that disconnect.
    watches
        .await
        .map_err(|_| zbus::Error::Failure("the bus does not report disconnected clients".into()))?;
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
    let (admission, incoming) = Admission::new(context, closer, calls);
    let receiving = tokio::spawn(admission.clone().receive(incoming));
    let following = tokio::spawn(work.run());
    let closing = tokio::spawn(closing.run());
    let on_demand = leave::is_started_on_demand(&connection).await?;
    leave::take_name(&connection).await?;
    // After the name is taken, because clients match signals by that name.
    resumed.into_iter().for_each(|job| follower.resume_job(job));
    Ok(Published {
        connection,
        on_demand,
        admission,
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

    /// Returns when the calls in flight have started their work, or after a timeout.
    pub async fn settle_calls(&self) {
        self.admission.settle().await;
    }

    /// Ends the calls in flight. No calls arrive by the name any more (see [`Published::withdraw`]), and calls to the
    /// unique name are refused from now on.
    pub async fn finish_calls(&self) {
        self.admission.close().await;
    }

    /// Announces ended jobs, and leaves the bus.
    pub async fn close(self) {
        self.follower.finish();
        // The task ends by itself, or by a panic, which aborts the process.
        let _ = self.following.await;
        // Without a bus no message can arrive.
        if let Ok(bus) = DBusProxy::new(&self.connection).await {
            let _ = bus.get_id().await;
            self.admission.drain().await;
        }
        for task in [self.receiving, self.watching, self.closing] {
            task.abort();
        }
        let _ = self.connection.close().await;
    }
}

/// The id is a random number, so the path reveals nothing about the domain.
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
    // The root's path, a word and a number: always a valid path.
    ObjectPath::from_string_unchecked(path).into()
}
