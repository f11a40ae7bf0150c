//! Follows domains, jobs and backups, and emits signals for their changes. One task spawns a task for each of them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};

use super::peers::Peer;
use super::signals::{Announcement, Emitter, JobListeners, announce, follow_domain, follow_job};
use crate::activity::Activity;
use crate::domain::Domain;
use crate::job::Job;
use crate::service::Service;

enum Command {
    AddJob {
        job: Arc<Job>,
        done: oneshot::Sender<()>,
    },
    /// A job that a previous instance of the service started and announced.
    ResumeJob(Arc<Job>),
    Finish,
}

/// The handle of the task.
#[derive(Clone)]
pub struct Follower {
    commands: mpsc::UnboundedSender<Command>,
    listening: JobListeners,
}

impl Follower {
    /// Returns when the start of the job is announced. `starter` receives all signals of the job.
    pub async fn add_job(&self, job: Arc<Job>, starter: &Peer) {
        self.listening.add(&job, starter);
        let (done, announced) = oneshot::channel();
        // Calls in flight bound the queue. Without the task the service is leaving the bus.
        if self.commands.send(Command::AddJob { job, done }).is_ok() {
            let _ = announced.await;
        }
    }

    /// Emits the remaining signals of a job that a previous instance of the service started.
    pub fn resume_job(&self, job: Arc<Job>) {
        // Without the task the service is leaving the bus.
        let _ = self.commands.send(Command::ResumeJob(job));
    }

    /// Sends all signals of a job also to a caller of the same user that waits for it. The connection that started the
    /// job may be gone.
    pub fn listen(&self, job: &Job, peer: &Peer) {
        self.listening.add(job, peer);
    }

    /// Removes a connection that has disconnected.
    pub fn forget_caller(&self, name: &str) {
        self.listening.leave(name);
    }

    /// Ends the task after it has announced every ended job.
    pub fn finish(&self) {
        // The task may have ended already.
        let _ = self.commands.send(Command::Finish);
    }
}

/// The task.
pub struct Work {
    commands: mpsc::UnboundedReceiver<Command>,
    service: Arc<Service>,
    emitter: Emitter,
    activity: Activity,
}

pub fn new(service: Arc<Service>, emitter: Emitter, activity: Activity) -> (Follower, Work) {
    let (sender, commands) = mpsc::unbounded_channel();
    let listening = emitter.listening().clone();
    let work = Work {
        commands,
        service,
        emitter,
        activity,
    };
    let follower = Follower {
        commands: sender,
        listening,
    };
    (follower, work)
}

impl Work {
    fn follow(&self, job: Arc<Job>) -> impl Future<Output = ()> + use<> {
        // The activity lasts until the end is signalled, which is after the job has ended.
        let used = self.activity.begin();
        let following = follow_job(job, self.emitter.clone());
        async move {
            following.await;
            drop(used);
        }
    }

    /// Follows domains and jobs until [`Follower::finish`].
    pub async fn run(mut self) {
        let mut changes = self.service.domains.changes();
        let mut backups = self.service.backup_changes();
        let mut domains = Domains::new(self.emitter.clone());
        let mut jobs = JoinSet::new();
        domains.synchronise(&self.service, &self.emitter);
        loop {
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(Command::AddJob { job, done }) => {
                        self.emitter.job_started(&job).await;
                        jobs.spawn(self.follow(job));
                        // The caller may have disconnected.
                        let _ = done.send(());
                    }
                    Some(Command::ResumeJob(job)) => {
                        jobs.spawn(self.follow(job));
                    }
                    Some(Command::Finish) | None => break,
                },
                // Changes may have been missed, so only the present state counts.
                change = changes.recv() => match change {
                    Err(broadcast::error::RecvError::Closed) => break,
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {
                        domains.synchronise(&self.service, &self.emitter);
                    }
                },
                // A client that missed signals calls `ListBackups`.
                Ok(change) = backups.recv() => domains.announce(Announcement::Backup(change)),
                Some(_) = domains.tasks.join_next() => {}
                Some(_) = jobs.join_next() => {}
            }
        }
        // Jobs that have ended still emit their last signals. The others continue in QEMU without the service.
        self.emitter.leave();
        while jobs.join_next().await.is_some() {}
        domains.tasks.shutdown().await;
    }
}

/// The followed domains, and the tasks that emit their signals.
struct Domains {
    followed: HashMap<u64, (Arc<Domain>, AbortHandle)>,
    /// `DomainAdded` and `DomainRemoved` have their own task, because it asks polkit about each subscriber.
    announcements: mpsc::UnboundedSender<Announcement>,
    tasks: JoinSet<()>,
}

impl Domains {
    fn new(emitter: Emitter) -> Self {
        let (announcements, received) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(announce(received, emitter));
        Self {
            followed: HashMap::new(),
            announcements,
            tasks,
        }
    }

    /// Follows exactly the current domains, and announces additions and removals.
    fn synchronise(&mut self, service: &Service, emitter: &Emitter) {
        let now = service.domains.list();
        let ids: HashSet<u64> = now.iter().map(|domain| domain.id).collect();
        let gone: Vec<_> = self.followed.extract_if(|id, _| !ids.contains(id)).collect();
        for (_, (domain, changes)) in gone {
            changes.abort();
            self.announce(Announcement::Removed(domain));
        }
        for domain in now {
            if !self.followed.contains_key(&domain.id) {
                self.announce(Announcement::Added(domain.clone()));
                let changes = self.tasks.spawn(follow_domain(domain.clone(), emitter.clone()));
                self.followed.insert(domain.id, (domain, changes));
            }
        }
    }

    fn announce(&self, announcement: Announcement) {
        // The task ends only after this sender is dropped.
        let _ = self.announcements.send(announcement);
    }
}
