//! Signals, and their receivers.
//!
//! Detailed signals go to the connection that started a job and to subscribers that may read the domain at that moment,
//! each by itself; `DomainAdded` and `DomainRemoved` to those that may see it. Signals for everybody carry a number and a path.
//! On a host with one user the administrator can send every signal to everybody.

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

/// Those who listen.
#[derive(Clone)]
pub struct Audience {
    service: Arc<Service>,
    peers: Arc<Peers>,
    connection: Connection,
    signals: Signals,
    listeners: Listening,
    /// The service leaves: what has not ended goes on without it.
    leaving: CancellationToken,
}

/// The connections that hear all of a job of their user's, by job: who started it, and who waits for it.
#[derive(Clone, Default)]
pub struct Listening(Arc<Mutex<HashMap<u32, HashSet<String>>>>);

/// How many of them.
const MOST_LISTENERS: usize = 16;

impl Listening {
    /// Adds a connection, until the job has ended or the connection has left.
    pub fn add(&self, job: &Job, peer: &Peer) {
        // Whoever comes after the end has the answer from the call itself.
        if job.status().outcome.is_none() {
            self.insert(job.id, peer.name());
        }
        // Its leaving may have been dealt with before it was added.
        if peer.has_left() {
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

    /// Makes room for others.
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

/// Whom a detailed signal goes to.
enum Listeners {
    All,
    /// By their unique names.
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

impl Audience {
    pub fn new(service: Arc<Service>, peers: Arc<Peers>, connection: Connection, signals: Signals) -> Self {
        Self {
            service,
            peers,
            connection,
            signals,
            listeners: Listening::default(),
            leaving: CancellationToken::new(),
        }
    }

    /// Has nothing more told of jobs that have not ended.
    pub fn leave(&self) {
        self.leaving.cancel();
    }

    /// Who hears all of a job of its own.
    pub fn listening(&self) -> &Listening {
        &self.listeners
    }

    /// Subscribers that may read `domain` now, and those of these others that have not left.
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

    /// Subscribers that may know of `domain` now.
    async fn seers(&self, domain: &Domain) -> Listeners {
        if self.signals == Signals::Broadcast {
            return Listeners::All;
        }
        let subscribers = self.peers.subscribers();
        let sees = join_all(subscribers.iter().map(|it| self.service.sees(it, domain))).await;
        Listeners::Each(allowed(&subscribers, &sees).collect())
    }

    async fn tell_seers(&self, domain: &Domain, name: &str) {
        let (seers, path) = (self.seers(domain).await, domain_path(domain.id));
        self.tell(&seers, &root(), MANAGER_INTERFACE, name, &(&path,))
            .await;
    }

    async fn tell_of_backup(&self, change: &Change) {
        let Change::Removed(backup) = change;
        let domain = self.service.domain_of(backup);
        let readers = self.readers(&domain, HashSet::new()).await;
        let path = backup_path(backup.object);
        self.tell(&readers, &root(), MANAGER_INTERFACE, "BackupRemoved", &(&path,))
            .await;
    }

    async fn tell<B>(&self, to: &Listeners, path: &OwnedObjectPath, interface: &str, name: &str, body: &B)
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

    async fn tell_all<B: Serialize + Type>(&self, name: &str, body: &B) {
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
        // Without a destination it would go to everybody.
        let to = match destination(to) {
            Ok(to) => to,
            Err(error) => {
                tracing::error!(%error, signal = name, "a signal was not sent: its receiver has no name of the bus");
                return;
            }
        };
        if let Err(error) = self.connection.emit_signal(to, path, interface, name, body).await {
            tracing::warn!(%error, signal = name, "a signal could not be sent");
        }
    }

    async fn tell_changed(&self, to: &Listeners, path: &OwnedObjectPath, interface: &str, changed: &Changed) {
        let invalidated: &[&str] = &[];
        self.tell(
            to,
            path,
            PROPERTIES,
            "PropertiesChanged",
            &(interface, changed, invalidated),
        )
        .await;
    }
}

/// The one connection that a signal goes to, or everybody: an error is not everybody.
fn destination(to: Option<&String>) -> Result<Option<BusName<'_>>, zbus::Error> {
    to.map(|name| BusName::try_from(name.as_str())).transpose()
}

fn allowed(subscribers: &[Caller], answers: &[bool]) -> impl Iterator<Item = String> {
    let answered = subscribers.iter().zip(answers);
    let allowed = answered.filter(|(_, allowed)| **allowed);
    allowed.map(|(subscriber, _)| subscriber.name.clone())
}

/// What the root object tells.
impl Audience {
    /// To everybody: nothing but number and path.
    pub async fn job_started(&self, job: &Job) {
        self.tell_all("JobStarted", &(job.id, job_path(job.id))).await;
    }

    async fn job_ended(&self, job: &Job, word: &str) {
        self.tell_all("JobEnded", &(job.id, job_path(job.id), word)).await;
    }
}

/// Signals about domains, and about backups in stores.
pub enum Announcement {
    Added(Arc<Domain>),
    Removed(Arc<Domain>),
    /// Of a backup in a store.
    Backup(Change),
}

/// Tells of domains and backups that come and go, in the order in which they do, until nothing more can come.
pub async fn announce(mut announcements: mpsc::UnboundedReceiver<Announcement>, audience: Audience) {
    while let Some(announcement) = announcements.recv().await {
        match announcement {
            Announcement::Added(domain) => audience.tell_seers(&domain, "DomainAdded").await,
            Announcement::Removed(domain) => audience.tell_seers(&domain, "DomainRemoved").await,
            Announcement::Backup(change) => audience.tell_of_backup(&change).await,
        }
    }
}

/// `PropertiesChanged` of one domain, for as long as this runs.
pub async fn follow_domain(domain: Arc<Domain>, audience: Audience) {
    let mut snapshots = domain.snapshots();
    let path = domain_path(domain.id);
    let mut told = domain_view(&snapshots.borrow_and_update());
    // The sender is the domain's own.
    while snapshots.changed().await.is_ok() {
        // What is sent is read last: polkit may take its time, and a caller may have read newer values by then.
        let readers = audience.readers(&domain, HashSet::new()).await;
        let view = domain_view(&snapshots.borrow_and_update());
        let changed = changes([
            ("UUID", view.0 != told.0, Variant::from(view.0.clone())),
            ("State", view.1 != told.1, Variant::from(view.1)),
            ("Disks", view.2 != told.2, Variant::from(view.2.clone())),
            ("Encrypted", view.3 != told.3, Variant::from(view.3.clone())),
        ]);
        if !changed.is_empty() {
            audience
                .tell_changed(&readers, &path, DOMAIN_INTERFACE, &changed)
                .await;
            told = view;
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

/// Signals of one job, to its end: `PropertiesChanged` while it goes on; then each disk's signal, `Completed`, and
/// `JobEnded`, in that order.
pub async fn follow_job(job: Arc<Job>, audience: Audience) {
    let mut statuses = job.statuses();
    let path = job_path(job.id);
    let mut told = View::of(&job, &statuses.borrow_and_update());
    loop {
        // What is sent is read last: polkit may take its time, and a caller may have read newer values by then.
        let to = audience.readers(&job.domain, audience.listeners.of(job.id)).await;
        let status = statuses.borrow_and_update().clone();
        let view = View::of(&job, &status);
        if !to.is_empty() && status.outcome.is_none() {
            job.look_on();
        }
        let changed = job_changes(&told, &view);
        if !changed.is_empty() {
            audience.tell_changed(&to, &path, JOB_INTERFACE, &changed).await;
            told = view;
        }
        if let Some(outcome) = &status.outcome {
            end_disks(&status, &to, &path, &audience).await;
            audience
                .tell(&to, &path, JOB_INTERFACE, "Completed", &result(&status))
                .await;
            audience.job_ended(&job, outcome.as_str()).await;
            audience.listeners.end(job.id);
            return;
        }
        if audience.leaving.is_cancelled() {
            return;
        }
        let next = async {
            if changed.is_empty() {
                // The sender is the job's own.
                let _ = statuses.changed().await;
            } else {
                // The next change waits for its turn; the end does not.
                let end = statuses.wait_for(|status| status.outcome.is_some());
                let _ = tokio::time::timeout(PACE, end).await;
            }
        };
        // Either way the loop looks at what there is.
        let _ = audience.leaving.run_until_cancelled(next).await;
    }
}

async fn end_disks(status: &Status, to: &Listeners, path: &OwnedObjectPath, audience: &Audience) {
    for disk in &status.disks {
        let name = &disk.name;
        match &disk.state {
            DiskState::Completed => {
                audience
                    .tell(to, path, JOB_INTERFACE, "BlockJobCompleted", &(name, disk.done))
                    .await;
            }
            DiskState::Failed { operation, message } => {
                audience
                    .tell(
                        to,
                        path,
                        JOB_INTERFACE,
                        "BlockJobError",
                        &(name, operation, message),
                    )
                    .await;
            }
            _ => {
                audience
                    .tell(to, path, JOB_INTERFACE, "BlockJobCancelled", &(name,))
                    .await
            }
        }
    }
}

fn job_changes(told: &View, view: &View) -> Changed {
    changes([
        (
            "Domain",
            view.domain != told.domain,
            Variant::from(view.domain.clone()),
        ),
        (
            "Increments",
            view.increments != told.increments,
            Variant::from(view.increments.clone()),
        ),
        (
            "NotInBackup",
            view.not_in_backup != told.not_in_backup,
            Variant::from(view.not_in_backup.clone()),
        ),
        (
            "Encrypted",
            view.encrypted != told.encrypted,
            Variant::from(view.encrypted.clone()),
        ),
        ("State", view.state != told.state, Variant::from(view.state)),
        (
            "Progress",
            view.progress != told.progress,
            Variant::from(view.progress),
        ),
        ("Bytes", view.bytes != told.bytes, Variant::from(view.bytes)),
        (
            "BytesDone",
            view.bytes_done != told.bytes_done,
            Variant::from(view.bytes_done),
        ),
        ("Rate", view.rate != told.rate, Variant::from(view.rate)),
        (
            "ExpectedEndTime",
            view.expected_end_time != told.expected_end_time,
            Variant::from(view.expected_end_time),
        ),
        (
            "FrozenTime",
            view.frozen_time != told.frozen_time,
            Variant::from(view.frozen_time),
        ),
        (
            "QuiesceProblem",
            view.quiesce_problem != told.quiesce_problem,
            Variant::from(view.quiesce_problem.clone()),
        ),
        (
            "Disks",
            view.disks != told.disks,
            Variant::from(view.disks.clone()),
        ),
        (
            "ErrorName",
            view.error_name != told.error_name,
            Variant::from(view.error_name),
        ),
        (
            "ErrorMessage",
            view.error_message != told.error_message,
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
    fn a_receiver_whose_name_is_none_makes_no_signal_one_for_everybody() {
        assert!(destination(Some(&"nobody".to_owned())).is_err());
        assert!(destination(Some(&String::new())).is_err());
        assert!(destination(Some(&":1.7".to_owned())).unwrap().is_some());
        assert!(destination(None).unwrap().is_none());
    }

    #[test]
    fn connections_that_left_keep_nobody_from_hearing_of_a_job() {
        let listening = Listening::default();
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
