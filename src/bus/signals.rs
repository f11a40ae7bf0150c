//! Emits signals, and selects their receivers.
//!
//! Detailed signals are unicast to the connection that started a job and to subscribers that may read the domain at
//! that moment. `DomainAdded` and `DomainRemoved` go to subscribers that may see the domain. Broadcast signals carry
//! only a number and a path. On a host with one user the administrator can configure that all signals are broadcast.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use zbus::Connection;
use zbus::names::BusName;
use zbus::wire::{OwnedObjectPath, Type, Variant};

use super::job::{View, result};
use super::peers::{Peer, Peers};
use super::standard::PROPERTIES;
use super::{backup_path, domain, domain_path, job_path};
use crate::access::Caller;
use crate::backups::Change;
use crate::config::Signals;
use crate::domain::{Domain, Snapshot};
use crate::job::{DiskState, Job, Status};
use crate::names::{DOMAIN_INTERFACE, JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH};
use crate::service::Service;

/// The least time between two `PropertiesChanged` of an object.
const PACE: Duration = Duration::from_millis(500);

type Changed = HashMap<&'static str, Variant<'static>>;

/// The receivers of signals.
#[derive(Clone)]
pub struct Emitter {
    service: Arc<Service>,
    peers: Arc<Peers>,
    connection: Connection,
    signals: Signals,
    listeners: JobListeners,
    /// Cancelled when the service leaves the bus. Unfinished jobs continue without it.
    leaving: CancellationToken,
}

/// The connections that receive all signals of a job of their user: the starter and those that wait. By job.
#[derive(Clone, Default)]
pub struct JobListeners(Arc<Mutex<HashMap<u32, HashSet<String>>>>);

/// The most such connections of a job.
const MOST_LISTENERS: usize = 16;

impl JobListeners {
    /// Adds a connection until the job ends or the connection disconnects.
    pub fn add(&self, job: &Job, peer: &Peer) {
        // After the end the call itself returns the outcome.
        if job.status().outcome.is_none() {
            self.insert(job.id, peer.name());
        }
        // Its disconnection may have been handled before it was added.
        if peer.is_disconnected() {
            self.leave(peer.name());
        }
    }

    fn insert(&self, job: u32, name: &str) {
        let mut listening = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let names = listening.entry(job).or_default();
        if names.len() < MOST_LISTENERS {
            names.insert(name.to_owned());
        }
    }

    /// Removes a disconnected connection, which makes room for others.
    pub fn leave(&self, name: &str) {
        let mut listening = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        listening.retain(|_, names| {
            names.remove(name);
            !names.is_empty()
        });
    }

    fn of(&self, job: u32) -> HashSet<String> {
        let listening = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        listening.get(&job).cloned().unwrap_or_default()
    }

    fn end(&self, job: u32) {
        let mut listening = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        listening.remove(&job);
    }
}

/// The receivers of a detailed signal.
enum Listeners {
    All,
    /// By unique name.
    Each(HashSet<String>),
}

impl Listeners {
    fn is_empty(&self) -> bool {
        match self {
            Self::All => false,
            Self::Each(names) => names.is_empty(),
        }
    }
}

impl Emitter {
    pub fn new(service: Arc<Service>, peers: Arc<Peers>, connection: Connection, signals: Signals) -> Self {
        Self {
            service,
            peers,
            connection,
            signals,
            listeners: JobListeners::default(),
            leaving: CancellationToken::new(),
        }
    }

    /// Stops the signals of jobs that have not ended.
    pub fn leave(&self) {
        self.leaving.cancel();
    }

    /// The connections that receive all signals of a job.
    pub fn listening(&self) -> &JobListeners {
        &self.listeners
    }

    /// Subscribers that may read `domain` now, and those of `others` that are still connected.
    async fn readers(&self, domain: &Domain, others: HashSet<String>) -> Listeners {
        if self.signals == Signals::Broadcast {
            return Listeners::All;
        }
        let subscribers = self.peers.subscribers();
        let reads = join_all(subscribers.iter().map(|it| self.service.reads(it, domain))).await;
        let readers = allowed(&subscribers, &reads);
        let others = others.into_iter().filter(|name| self.peers.is_there(name));
        Listeners::Each(readers.chain(others).collect())
    }

    /// Subscribers that may see `domain` now.
    async fn viewers(&self, domain: &Domain) -> Listeners {
        if self.signals == Signals::Broadcast {
            return Listeners::All;
        }
        let subscribers = self.peers.subscribers();
        let answers = join_all(subscribers.iter().map(|it| self.service.sees(it, domain))).await;
        Listeners::Each(allowed(&subscribers, &answers).collect())
    }

    async fn emit_to_viewers(&self, domain: &Domain, name: &str) {
        let (viewers, path) = (self.viewers(domain).await, domain_path(domain.id));
        self.emit(&viewers, &root(), MANAGER_INTERFACE, name, &(&path,))
            .await;
    }

    async fn emit_backup_change(&self, change: &Change) {
        let Change::Removed(backup) = change;
        let domain = self.service.domain_of(backup);
        let readers = self.readers(&domain, HashSet::new()).await;
        let path = backup_path(backup.object);
        self.emit(&readers, &root(), MANAGER_INTERFACE, "BackupRemoved", &(&path,))
            .await;
    }

    async fn emit<B>(&self, to: &Listeners, path: &OwnedObjectPath, interface: &str, name: &str, body: &B)
    where
        B: Serialize + Type,
    {
        match to {
            Listeners::All => self.send(None, path, interface, name, body).await,
            Listeners::Each(names) => {
                for name_of in names {
                    self.send(Some(name_of), path, interface, name, body).await;
                }
            }
        }
    }

    async fn broadcast<B: Serialize + Type>(&self, name: &str, body: &B) {
        self.send(None, &root(), MANAGER_INTERFACE, name, body).await;
    }

    async fn send<B>(
        &self,
        to: Option<&String>,
        path: &OwnedObjectPath,
        interface: &str,
        name: &str,
        body: &B,
    ) where
        B: Serialize + Type,
    {
        // Without a destination the bus would broadcast the signal.
        let to = match destination(to) {
            Ok(to) => to,
            Err(error) => {
                tracing::error!(%error, signal = name, "a signal was not sent: its receiver has an invalid bus name");
                return;
            }
        };
        if let Err(error) = self.connection.emit_signal(to, path, interface, name, body).await {
            tracing::warn!(%error, signal = name, "cannot send a signal");
        }
    }

    async fn emit_changes(&self, to: &Listeners, path: &OwnedObjectPath, interface: &str, changed: &Changed) {
        let invalidated: &[&str] = &[];
        self.emit(
            to,
            path,
            PROPERTIES,
            "PropertiesChanged",
            &(interface, changed, invalidated),
        )
        .await;
    }
}

/// The destination of a signal; `None` broadcasts it. An invalid name is an error, because it must not cause a
/// broadcast.
fn destination(to: Option<&String>) -> Result<Option<BusName<'_>>, zbus::Error> {
    to.map(|name| BusName::try_from(name.as_str())).transpose()
}

fn allowed(subscribers: &[Caller], answers: &[bool]) -> impl Iterator<Item = String> {
    let answered = subscribers.iter().zip(answers);
    let allowed = answered.filter(|(_, allowed)| **allowed);
    allowed.map(|(subscriber, _)| subscriber.name.clone())
}

/// Signals of the root object.
impl Emitter {
    /// Broadcast: only the number and the path.
    pub async fn job_started(&self, job: &Job) {
        self.broadcast("JobStarted", &(job.id, job_path(job.id))).await;
    }

    async fn job_ended(&self, job: &Job, word: &str) {
        self.broadcast("JobEnded", &(job.id, job_path(job.id), word))
            .await;
    }
}

/// Signals about domains, and about backups in stores.
pub enum Announcement {
    Added(Arc<Domain>),
    Removed(Arc<Domain>),
    /// A change of a backup in a store.
    Backup(Change),
}

/// Emits signals for domains and backups that are added or removed, in order, until the channel closes.
pub async fn announce(mut announcements: mpsc::UnboundedReceiver<Announcement>, emitter: Emitter) {
    while let Some(announcement) = announcements.recv().await {
        match announcement {
            Announcement::Added(domain) => emitter.emit_to_viewers(&domain, "DomainAdded").await,
            Announcement::Removed(domain) => emitter.emit_to_viewers(&domain, "DomainRemoved").await,
            Announcement::Backup(change) => emitter.emit_backup_change(&change).await,
        }
    }
}

/// Emits `PropertiesChanged` of one domain while it runs.
pub async fn follow_domain(domain: Arc<Domain>, emitter: Emitter) {
    let mut snapshots = domain.snapshots();
    let path = domain_path(domain.id);
    let mut sent = domain_view(&snapshots.borrow_and_update());
    // The domain owns the sender, so this does not fail.
    while snapshots.changed().await.is_ok() {
        // Read the values last: polkit may take long, and a caller may have read newer values by then. The futures are on the heap,
        // because many domains are idle, and these take more memory than the rest of the task.
        let readers = Box::pin(emitter.readers(&domain, HashSet::new())).await;
        let view = domain_view(&snapshots.borrow_and_update());
        let changed = changes([
            ("UUID", view.0 != sent.0, Variant::from(view.0.clone())),
            ("State", view.1 != sent.1, Variant::from(view.1)),
            ("Disks", view.2 != sent.2, Variant::from(view.2.clone())),
            ("Encrypted", view.3 != sent.3, Variant::from(view.3.clone())),
        ]);
        if !changed.is_empty() {
            Box::pin(emitter.emit_changes(&readers, &path, DOMAIN_INTERFACE, &changed)).await;
            sent = view;
            tokio::time::sleep(PACE).await;
        }
    }
}

type DomainView = (String, &'static str, Vec<domain::DiskTuple>, Vec<String>);

fn domain_view(snapshot: &Snapshot) -> DomainView {
    (
        domain::uuid(snapshot),
        snapshot.state.as_str(),
        domain::disks(snapshot),
        domain::encrypted(snapshot),
    )
}

/// Emits the signals of one job until its end: `PropertiesChanged` while it runs, then each disk's signal, `Completed`,
/// and `JobEnded`.
pub async fn follow_job(job: Arc<Job>, emitter: Emitter) {
    let mut statuses = job.statuses();
    let path = job_path(job.id);
    let mut sent = View::of(&job, &statuses.borrow_and_update());
    loop {
        // Read the values last: polkit may take long, and a caller may have read newer values by then.
        let to = emitter.readers(&job.domain, emitter.listeners.of(job.id)).await;
        let status = statuses.borrow_and_update().clone();
        let view = View::of(&job, &status);
        if !to.is_empty() && status.outcome.is_none() {
            job.look_on();
        }
        let changed = job_changes(&sent, &view);
        if !changed.is_empty() {
            emitter.emit_changes(&to, &path, JOB_INTERFACE, &changed).await;
            sent = view;
        }
        if let Some(outcome) = &status.outcome {
            end_disks(&status, &to, &path, &emitter).await;
            emitter
                .emit(&to, &path, JOB_INTERFACE, "Completed", &result(&status))
                .await;
            emitter.job_ended(&job, outcome.as_str()).await;
            emitter.listeners.end(job.id);
            return;
        }
        if emitter.leaving.is_cancelled() {
            return;
        }
        let next = async {
            if changed.is_empty() {
                // The job owns the sender, so this does not fail.
                let _ = statuses.changed().await;
            } else {
                // The next change waits for the pace. The end of the job does not.
                let end = statuses.wait_for(|status| status.outcome.is_some());
                let _ = tokio::time::timeout(PACE, end).await;
            }
        };
        // The loop reads the current state in either case.
        let _ = emitter.leaving.run_until_cancelled(next).await;
    }
}

async fn end_disks(status: &Status, to: &Listeners, path: &OwnedObjectPath, emitter: &Emitter) {
    for disk in &status.disks {
        let name = &disk.name;
        match &disk.state {
            DiskState::Completed => {
                emitter
                    .emit(to, path, JOB_INTERFACE, "BlockJobCompleted", &(name, disk.done))
                    .await;
            }
            DiskState::Failed { operation, message } => {
                emitter
                    .emit(
                        to,
                        path,
                        JOB_INTERFACE,
                        "BlockJobError",
                        &(name, operation, message),
                    )
                    .await;
            }
            _ => {
                emitter
                    .emit(to, path, JOB_INTERFACE, "BlockJobCancelled", &(name,))
                    .await
            }
        }
    }
}

fn job_changes(sent: &View, view: &View) -> Changed {
    changes([
        (
            "Domain",
            view.domain != sent.domain,
            Variant::from(view.domain.clone()),
        ),
        (
            "Increments",
            view.increments != sent.increments,
            Variant::from(view.increments.clone()),
        ),
        (
            "NotInBackup",
            view.not_in_backup != sent.not_in_backup,
            Variant::from(view.not_in_backup.clone()),
        ),
        (
            "Encrypted",
            view.encrypted != sent.encrypted,
            Variant::from(view.encrypted.clone()),
        ),
        ("State", view.state != sent.state, Variant::from(view.state)),
        (
            "Progress",
            view.progress != sent.progress,
            Variant::from(view.progress),
        ),
        ("Bytes", view.bytes != sent.bytes, Variant::from(view.bytes)),
        (
            "BytesDone",
            view.bytes_done != sent.bytes_done,
            Variant::from(view.bytes_done),
        ),
        ("Rate", view.rate != sent.rate, Variant::from(view.rate)),
        (
            "ExpectedEndTime",
            view.expected_end_time != sent.expected_end_time,
            Variant::from(view.expected_end_time),
        ),
        (
            "FrozenTime",
            view.frozen_time != sent.frozen_time,
            Variant::from(view.frozen_time),
        ),
        (
            "QuiesceProblem",
            view.quiesce_problem != sent.quiesce_problem,
            Variant::from(view.quiesce_problem.clone()),
        ),
        (
            "Disks",
            view.disks != sent.disks,
            Variant::from(view.disks.clone()),
        ),
        (
            "ErrorName",
            view.error_name != sent.error_name,
            Variant::from(view.error_name),
        ),
        (
            "ErrorMessage",
            view.error_message != sent.error_message,
            Variant::from(view.error_message.clone()),
        ),
    ])
}

fn changes<const N: usize>(properties: [(&'static str, bool, Variant<'static>); N]) -> Changed {
    let changed = properties.into_iter().filter(|(_, changed, _)| *changed);
    changed.map(|(name, _, value)| (name, value)).collect()
}

fn root() -> OwnedObjectPath {
    super::path(ROOT_PATH.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_receiver_name_does_not_cause_a_broadcast() {
        assert!(destination(Some(&"nobody".to_owned())).is_err());
        assert!(destination(Some(&String::new())).is_err());
        assert!(destination(Some(&":1.7".to_owned())).unwrap().is_some());
        assert!(destination(None).unwrap().is_none());
    }

    #[test]
    fn disconnected_listeners_make_room_for_others() {
        let listening = JobListeners::default();
        for number in 0..=MOST_LISTENERS {
            listening.insert(1, &format!(":1.{number}"));
        }
        assert_eq!(listening.of(1).len(), MOST_LISTENERS);
        listening.leave(":1.0");
        listening.insert(1, ":1.99");
        assert!(listening.of(1).contains(":1.99") && !listening.of(1).contains(":1.0"));
        for name in listening.of(1) {
            listening.leave(&name);
        }
        assert!(listening.0.lock().unwrap().is_empty());
    }
}
