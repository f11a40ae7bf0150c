//! Follows domains, jobs and backups and has their changes signalled: one task that starts one for each of them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};

use super::peers::Peer;
use super::signals::{Announcement, Audience, Listening, announce, follow_domain, follow_job};
use crate::activity::Activity;
use crate::domain::Domain;
use crate::job::Job;
use crate::service::Service;

enum Command {
    AddJob {
        job: Arc<Job>,
        done: oneshot::Sender<()>,
    },
    /// One that a former process of the service started, and announced.
    ResumeJob(Arc<Job>),
    Finish,
}

/// The way to the task.
#[derive(Clone)]
pub struct Follower {
    commands: mpsc::UnboundedSender<Command>,
    listening: Listening,
}

impl Follower {
    /// Returns when the job's start was announced. `starter` hears of all that it does.
    pub async fn add_job(&self, job: Arc<Job>, starter: &Peer) {
        self.listening.add(&job, starter);
        let (done, announced) = oneshot::channel();
        // Bounded by the calls in flight; and where the task is gone, the service is leaving the bus.
        if self.commands.send(Command::AddJob { job, done }).is_ok() {
            let _ = announced.await;
        }
    }

    /// Has the rest told of a job that a former process of the service started.
    pub fn resume_job(&self, job: Arc<Job>) {
        // Where the task is gone, the service is leaving the bus.
        let _ = self.commands.send(Command::ResumeJob(job));
    }

    /// Has a caller that waits for a job of its user's hear of all that it does: the connection that started it may be gone.
    pub fn listen(&self, job: &Job, peer: &Peer) {
        self.listening.add(job, peer);
    }

    /// Forgets a connection that has left.
    pub fn forget_caller(&self, name: &str) {
        self.listening.leave(name);
    }

    /// Ends the task when everything that has ended is announced.
    pub fn finish(&self) {
        // It has ended already.
        let _ = self.commands.send(Command::Finish);
    }
}

/// The task's side.
pub struct Work {
    commands: mpsc::UnboundedReceiver<Command>,
    service: Arc<Service>,
    audience: Audience,
    activity: Activity,
}

pub fn new(service: Arc<Service>, audience: Audience, activity: Activity) -> (Follower, Work) {
    let (sender, commands) = mpsc::unbounded_channel();
    let listening = audience.listening().clone();
    let work = Work {
        commands,
        service,
        audience,
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
        // A job ends before its end is signalled.
        let used = self.activity.begin();
        let following = follow_job(job, self.audience.clone());
        async move {
            following.await;
            drop(used);
        }
    }

    /// Follows domains and jobs until [`Follower::finish`].
    pub async fn run(mut self) {
        let mut changes = self.service.domains.changes();
        let mut backups = self.service.backup_changes();
        let mut domains = Domains::new(self.audience.clone());
        let mut jobs = JoinSet::new();
        domains.synchronise(&self.service, &self.audience);
        loop {
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(Command::AddJob { job, done }) => {
                        self.audience.job_started(&job).await;
                        jobs.spawn(self.follow(job));
                        // Who asked may have gone.
                        let _ = done.send(());
                    }
                    Some(Command::ResumeJob(job)) => {
                        jobs.spawn(self.follow(job));
                    }
                    Some(Command::Finish) | None => break,
                },
                // Changes may have been missed: only the present state counts.
                change = changes.recv() => match change {
                    Err(broadcast::error::RecvError::Closed) => break,
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {
                        domains.synchronise(&self.service, &self.audience);
                    }
                },
                // Who missed some lists them.
                Ok(change) = backups.recv() => domains.announce(Announcement::Backup(change)),
                Some(_) = domains.tasks.join_next() => {}
                Some(_) = jobs.join_next() => {}
            }
        }
        // The last signals of jobs that have ended are on their way. The others go on without the service.
        self.audience.leave();
        while jobs.join_next().await.is_some() {}
        domains.tasks.shutdown().await;
    }
}

/// The domains that are followed, with the tasks that tell of their changes.
struct Domains {
    followed: HashMap<u64, (Arc<Domain>, AbortHandle)>,
    /// A task of its own tells who came and went: it asks for each listener, and nobody waits for that.
    announcements: mpsc::UnboundedSender<Announcement>,
    tasks: JoinSet<()>,
}

impl Domains {
    fn new(audience: Audience) -> Self {
        let (announcements, received) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(announce(received, audience));
        Self {
            followed: HashMap::new(),
            announcements,
            tasks,
        }
    }

    /// Follows the domains that there are, and announces which came and went.
    fn synchronise(&mut self, service: &Service, audience: &Audience) {
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
                let changes = self.tasks.spawn(follow_domain(domain.clone(), audience.clone()));
                self.followed.insert(domain.id, (domain, changes));
            }
        }
    }

    fn announce(&self, announcement: Announcement) {
        // Its task ends after this is dropped.
        let _ = self.announcements.send(announcement);
    }
}
