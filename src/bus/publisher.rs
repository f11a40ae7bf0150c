//! Objects on the bus: one task adds and removes them, so that no method ever waits for the object server while it
//! holds a part of it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use zbus::Connection;

use super::domain::DomainObject;
use super::job::JobObject;
use super::peers::Peers;
use super::signals::{Announcement, Audience, announce, follow_domain, follow_job};
use super::{Context, domain_path, job_path};
use crate::domain::Domain;
use crate::job::Job;
use crate::service::Service;

enum Command {
    /// Look for domains that came or went.
    Synchronise(oneshot::Sender<()>),
    AddJob {
        job: Arc<Job>,
        starter: String,
        done: oneshot::Sender<()>,
    },
    Finish,
}

/// Asks for objects.
#[derive(Clone)]
pub struct Publisher {
    commands: mpsc::UnboundedSender<Command>,
    /// Ids of domains whose object is there: no need to ask for it.
    present: Arc<Mutex<HashSet<u64>>>,
}

impl Publisher {
    /// Returns when the domain's object can be called.
    pub async fn add_domain(&self, domain: &Arc<Domain>) {
        if self
            .present
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&domain.id)
        {
            return;
        }
        let (done, added) = oneshot::channel();
        self.ask(Command::Synchronise(done), added).await;
    }

    /// Returns when the job's object can be called and its start was announced.
    pub async fn add_job(&self, job: Arc<Job>, starter: String) {
        let (done, added) = oneshot::channel();
        self.ask(Command::AddJob { job, starter, done }, added).await;
    }

    /// Ends the task when everything that has ended is announced.
    pub fn finish(&self) {
        // It has ended already.
        let _ = self.commands.send(Command::Finish);
    }

    async fn ask(&self, command: Command, done: oneshot::Receiver<()>) {
        // Bounded by the calls in flight; and where the task is gone, the service is leaving the bus.
        if self.commands.send(command).is_ok() {
            let _ = done.await;
        }
    }
}

/// The task's side.
pub struct Work {
    commands: mpsc::UnboundedReceiver<Command>,
    present: Arc<Mutex<HashSet<u64>>>,
    service: Arc<Service>,
    audience: Audience,
    connection: Connection,
}

pub fn new(service: Arc<Service>, peers: Arc<Peers>, connection: Connection) -> (Publisher, Work) {
    let (sender, commands) = mpsc::unbounded_channel();
    let present = Arc::new(Mutex::default());
    let publisher = Publisher {
        commands: sender,
        present: Arc::clone(&present),
    };
    let work = Work {
        commands,
        present,
        audience: Audience::new(service.clone(), peers, connection.clone()),
        service,
        connection,
    };
    (publisher, work)
}

impl Work {
    /// Follows domains and jobs until [`Publisher::finish`].
    pub async fn run(mut self, context: Context) {
        let mut changes = self.service.domains.changes();
        let mut removals = self.service.jobs.removals();
        let mut domains = Domains::new(self.audience.clone());
        let mut job_signals = JoinSet::new();
        self.synchronise(&context, &mut domains).await;
        loop {
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(Command::Synchronise(done)) => {
                        self.synchronise(&context, &mut domains).await;
                        // Who asked may have gone.
                        let _ = done.send(());
                    }
                    Some(Command::AddJob { job, starter, done }) => {
                        let object = JobObject::new(context.clone(), job.clone());
                        added(self.connection.object_server().at(job_path(job.id), object).await);
                        self.audience.job_started(&job).await;
                        job_signals.spawn(follow_job(job, starter, self.audience.clone()));
                        // Who asked may have gone.
                        let _ = done.send(());
                    }
                    Some(Command::Finish) | None => break,
                },
                // Whatever came, went or was missed: what counts is what there is now.
                change = changes.recv() => match change {
                    Err(broadcast::error::RecvError::Closed) => break,
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {
                        self.synchronise(&context, &mut domains).await;
                    }
                },
                Ok(job) = removals.recv() => {
                    removed(self.connection.object_server().remove::<JobObject, _>(job_path(job.id)).await);
                }
                Some(_) = domains.signals.join_next() => {}
                Some(_) = job_signals.join_next() => {}
            }
        }
        // All jobs have ended by now: their last signals are on their way.
        while job_signals.join_next().await.is_some() {}
        domains.signals.shutdown().await;
    }

    /// Makes the domains' objects those of the domains that there are, and announces what changed.
    async fn synchronise(&self, context: &Context, domains: &mut Domains) {
        let server = self.connection.object_server();
        let now: HashMap<u64, Arc<Domain>> = self
            .service
            .domains
            .list()
            .into_iter()
            .map(|domain| (domain.id, domain))
            .collect();
        let gone: Vec<u64> = domains
            .present
            .keys()
            .filter(|id| !now.contains_key(id))
            .copied()
            .collect();
        for id in gone {
            let Some((domain, signals)) = domains.present.remove(&id) else {
                continue;
            };
            signals.abort();
            self.present
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&domain.id);
            removed(server.remove::<DomainObject, _>(domain_path(domain.id)).await);
            domains.announce(Announcement::Removed(domain));
        }
        for (id, domain) in now {
            if domains.present.contains_key(&id) {
                continue;
            }
            added(
                server
                    .at(
                        domain_path(id),
                        DomainObject::new(context.clone(), domain.clone()),
                    )
                    .await,
            );
            self.present
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(id);
            domains.announce(Announcement::Added(domain.clone()));
            let signals = domains
                .signals
                .spawn(follow_domain(domain.clone(), self.audience.clone()));
            domains.present.insert(id, (domain, signals));
        }
    }
}

/// The domains that have an object, with the tasks that tell of their changes.
struct Domains {
    present: HashMap<u64, (Arc<Domain>, AbortHandle)>,
    /// A task of its own tells who came and went: it asks for each listener, and nobody waits for that.
    announcements: mpsc::UnboundedSender<Announcement>,
    signals: JoinSet<()>,
}

impl Domains {
    fn new(audience: Audience) -> Self {
        let (announcements, received) = mpsc::unbounded_channel();
        let mut signals = JoinSet::new();
        signals.spawn(announce(received, audience));
        Self {
            present: HashMap::new(),
            announcements,
            signals,
        }
    }

    fn announce(&self, announcement: Announcement) {
        // Its task ends after this is dropped.
        let _ = self.announcements.send(announcement);
    }
}

fn added<I>(added: zbus::Result<Option<I>>) {
    match added {
        Ok(None) => {}
        Ok(Some(_)) => tracing::error!("an object's path is taken"),
        Err(error) => tracing::error!(%error, "an object cannot be put on the bus"),
    }
}

fn removed(removed: zbus::Result<bool>) {
    if let Err(error) = removed {
        tracing::error!(%error, "an object cannot be taken off the bus");
    }
}
