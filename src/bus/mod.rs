//! The service on the bus: messages into calls, results into replies, changes into signals.
//!
//! The only place that knows D-Bus, and no place for decisions. Every method is `&self`; no getter waits for more than
//! one bounded question; objects come and go through the [`publisher`] only, never from a method.

mod domain;
mod error;
mod job;
mod manager;
mod options;
mod peers;
mod publisher;
mod signals;
mod visit;

use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use zbus::Connection;
use zbus::wire::{ObjectPath, OwnedObjectPath};

use crate::names::{BUS_NAME, ROOT_PATH};
use crate::service::Service;
use manager::Manager;
use peers::Peers;
use publisher::Publisher;
use visit::Gate;

/// What every object of the interface works with.
#[derive(Clone)]
struct Context {
    service: Arc<Service>,
    peers: Arc<Peers>,
    gate: Arc<Gate>,
    publisher: Publisher,
}

/// The service while it is on the bus.
pub struct Published {
    connection: Connection,
    publisher: Publisher,
    publishing: JoinHandle<()>,
    watching: JoinHandle<()>,
}

/// Puts `service` on the bus of `connection` and takes the name when everything is there.
pub async fn publish(connection: Connection, service: Arc<Service>) -> zbus::Result<Published> {
    let peers = Arc::new(Peers::default());
    let (publisher, work) = publisher::new(service.clone(), peers.clone(), connection.clone());
    let context = Context {
        service: service.clone(),
        peers: peers.clone(),
        gate: Arc::new(Gate::default()),
        publisher: publisher.clone(),
    };
    let (ready, watches) = oneshot::channel();
    let watching = tokio::spawn(peers::watch(connection.clone(), peers, service, ready));
    // Without it callers that leave would be missed.
    watches
        .await
        .map_err(|_| zbus::Error::Failure("the bus does not tell who leaves".into()))?;
    connection
        .object_server()
        .at(ROOT_PATH, Manager::new(context.clone()))
        .await?;
    let publishing = tokio::spawn(work.run(context));
    connection.request_name(BUS_NAME).await?;
    Ok(Published {
        connection,
        publisher,
        publishing,
        watching,
    })
}

impl Published {
    /// Waits until the bus has closed the connection.
    pub async fn lost(&mut self) {
        // It ends with the connection, or by a panic, which aborts.
        let _ = (&mut self.watching).await;
    }

    /// Announces what has ended, as the owner of the name by which listeners know the service, and leaves the bus.
    pub async fn close(self) {
        self.publisher.finish();
        // It ends by itself, or by a panic, which aborts.
        let _ = self.publishing.await;
        self.watching.abort();
        // Where the bus is gone, so are name and connection.
        let _ = self.connection.release_name(BUS_NAME).await;
        let _ = self.connection.close().await;
    }
}

fn domain_path(id: u64) -> OwnedObjectPath {
    path(format!("{ROOT_PATH}/domain/{id}"))
}

fn job_path(id: u32) -> OwnedObjectPath {
    path(format!("{ROOT_PATH}/job/{id}"))
}

fn path(path: String) -> OwnedObjectPath {
    // The root's path, a word and a number: always a path.
    ObjectPath::from_string_unchecked(path).into()
}
