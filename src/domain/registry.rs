//! The set of domains: those that files configure and those that callers register, each with its supervisor.
//!
//! A configured domain is what the administrator said; a registered one can neither take its name nor stay in
//! its way.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::directory::{DomainFile, Watch};
use super::monitor::{self, Link};
use super::{Directories, Domain, Error, Origin, PATIENCE, Phase, Snapshot, check_new_name};
use crate::qmp::Client;

/// Registered domains at a time, of all users together and of one user.
pub const MAX_REGISTERED: usize = 256;
pub const MAX_REGISTERED_PER_OWNER: usize = 32;
/// Changes that a listener may lag behind.
const CHANGES: usize = 1024;

/// What happened to the set.
#[derive(Debug, Clone)]
pub enum Change {
    Added(Arc<Domain>),
    Removed(Arc<Domain>),
}

struct Entry {
    domain: Arc<Domain>,
    file: Option<DomainFile>,
    stop: CancellationToken,
}

#[derive(Default)]
struct Domains {
    by_name: BTreeMap<String, Entry>,
    next_id: u64,
}

/// All domains that are known now.
pub struct Registry {
    domains: Mutex<Domains>,
    changes: broadcast::Sender<Change>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Registry {
    /// Reads the directories and follows them from now on, until [`Registry::shut_down`].
    pub fn open(mut directories: Directories) -> io::Result<Arc<Self>> {
        let registry = Arc::new(Self {
            domains: Mutex::default(),
            changes: broadcast::Sender::new(CHANGES),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        let watch = directories.watch()?;
        registry.apply(directories.read());
        registry.tasks.spawn(follow(registry.clone(), directories, watch));
        Ok(registry)
    }

    /// What comes and goes from now on.
    pub fn changes(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }

    /// All domains, by name.
    pub fn list(&self) -> Vec<Arc<Domain>> {
        self.lock()
            .by_name
            .values()
            .map(|entry| entry.domain.clone())
            .collect()
    }

    /// Finds a domain by its name, or by its UUID where only one has it.
    ///
    /// What a registered domain says of itself is its owner's word: only `uid`'s own are found by their UUID, and none
    /// that a configured domain has.
    pub fn find(&self, name_or_uuid: &str, uid: u32) -> Option<Arc<Domain>> {
        let domains = self.lock();
        if let Some(entry) = domains.by_name.get(name_or_uuid) {
            return Some(entry.domain.clone());
        }
        let uuid = Uuid::try_parse(name_or_uuid).ok()?;
        let named = domains
            .by_name
            .values()
            .map(|entry| &entry.domain)
            .filter(|domain| domain.snapshot.borrow().uuid == Some(uuid));
        let (configured, registered): (Vec<_>, Vec<_>) =
            named.partition(|domain| domain.origin == Origin::Configured);
        let own = registered.into_iter().filter(|domain| domain.owner == uid);
        let candidates = if configured.is_empty() {
            own.collect()
        } else {
            configured
        };
        match candidates.as_slice() {
            [one] => Some(Arc::clone(one)),
            _ => None,
        }
    }

    /// Takes over the monitor of a caller's own QEMU: `socket` must be connected, and nobody may have read from it.
    pub async fn register(
        self: &Arc<Self>,
        name: &str,
        socket: OwnedFd,
        owner: u32,
    ) -> Result<Arc<Domain>, Error> {
        check_new_name(name)?;
        self.check_room(name, owner)?;
        let stream = stream(name, socket)?;
        let peer = monitor::peer(&stream);
        let opened = Client::open(stream, PATIENCE).await;
        let (client, driver) = opened.map_err(|source| Error::Monitor {
            name: name.to_owned(),
            source,
        })?;
        let (domain, stop) = self.insert(name, owner)?;
        let registry = self.clone();
        let served = domain.clone();
        self.tasks.spawn(async move {
            monitor::serve_once(served.clone(), Link::new(client, peer), driver, stop).await;
            registry.remove(&served);
        });
        // The caller gets a domain that answers, or the reason why it does not.
        domain.link().await?;
        Ok(domain)
    }

    /// Ends all supervisors and waits for them.
    pub async fn shut_down(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn lock(&self) -> MutexGuard<'_, Domains> {
        // A panic aborts the service; there is no half-changed set to be met.
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_room(&self, name: &str, owner: u32) -> Result<(), Error> {
        check_room(&self.lock(), name, owner)
    }

    fn insert(&self, name: &str, owner: u32) -> Result<(Arc<Domain>, CancellationToken), Error> {
        let mut domains = self.lock();
        // Once more: others may have come while the peer was greeting.
        check_room(&domains, name, owner)?;
        let stop = self.stop.child_token();
        let domain = domains.add(name, Origin::Registered, owner, None, None, stop.clone());
        drop(domains);
        self.announce(Change::Added(domain.clone()));
        Ok((domain, stop))
    }

    fn remove(&self, domain: &Arc<Domain>) {
        let mut domains = self.lock();
        let same = domains
            .by_name
            .get(&domain.name)
            .is_some_and(|entry| entry.domain.id == domain.id);
        let entry = if same {
            domains.by_name.remove(&domain.name)
        } else {
            None
        };
        drop(domains);
        if let Some(entry) = entry {
            entry.stop.cancel();
            self.announce(Change::Removed(entry.domain));
        }
    }

    /// Makes the configured domains those that `files` say. One whose file did not change goes on undisturbed.
    fn apply(self: &Arc<Self>, mut files: BTreeMap<String, DomainFile>) {
        let mut gone = Vec::new();
        let mut come = Vec::new();
        let mut domains = self.lock();
        domains.by_name.retain(|name, entry| {
            let keep = match (&entry.file, files.get(name)) {
                (Some(old), Some(new)) => old == new,
                (None, Some(_)) => {
                    tracing::warn!(domain = name, "a registered domain gives way to a configured one");
                    false
                }
                (Some(_), None) => false,
                (None, None) => true,
            };
            if keep {
                files.remove(name);
            } else {
                gone.push((entry.domain.clone(), entry.stop.clone()));
            }
            keep
        });
        for (name, file) in files {
            let stop = self.stop.child_token();
            let (owner, agent, monitor) = (file.owner, file.agent.clone(), file.monitor.clone());
            let domain = domains.add(&name, Origin::Configured, owner, agent, Some(file), stop.clone());
            self.tasks
                .spawn(monitor::supervise(domain.clone(), monitor, stop));
            come.push(domain);
        }
        drop(domains);
        for (domain, stop) in gone {
            self.retire(domain.clone(), stop);
            self.announce(Change::Removed(domain));
        }
        come.into_iter()
            .for_each(|domain| self.announce(Change::Added(domain)));
    }

    /// Disconnects a domain that is not known any more, once no backup of it needs its monitor. A domain that comes in
    /// its place on the same monitor is connected after that: QEMU serves one client at a time.
    fn retire(&self, domain: Arc<Domain>, stop: CancellationToken) {
        let all = self.stop.clone();
        self.tasks.spawn(async move {
            // When all stop, this one does without being told.
            if all.run_until_cancelled(domain.released()).await.is_some() {
                stop.cancel();
            }
        });
    }

    fn announce(&self, change: Change) {
        match &change {
            Change::Added(domain) => tracing::info!(domain = domain.name, "domain added"),
            Change::Removed(domain) => tracing::info!(domain = domain.name, "domain removed"),
        }
        // Nobody listens yet, at the start.
        let _ = self.changes.send(change);
    }
}

impl Domains {
    fn add(
        &mut self,
        name: &str,
        origin: Origin,
        owner: u32,
        agent: Option<PathBuf>,
        file: Option<DomainFile>,
        stop: CancellationToken,
    ) -> Arc<Domain> {
        self.next_id += 1;
        let domain = Arc::new(Domain {
            id: self.next_id,
            name: name.to_owned(),
            origin,
            owner,
            agent,
            snapshot: watch::Sender::new(Snapshot::unknown()),
            phase: watch::Sender::new(Phase::Connecting),
            holds: watch::Sender::new(0),
        });
        let entry = Entry {
            domain: domain.clone(),
            file,
            stop,
        };
        self.by_name.insert(name.to_owned(), entry);
        domain
    }
}

fn check_room(domains: &Domains, name: &str, owner: u32) -> Result<(), Error> {
    if domains.by_name.contains_key(name) {
        return Err(Error::NameTaken(name.to_owned()));
    }
    let mut owners: HashMap<u32, usize> = HashMap::new();
    for entry in domains.by_name.values().filter(|entry| entry.file.is_none()) {
        *owners.entry(entry.domain.owner).or_default() += 1;
    }
    if owners
        .get(&owner)
        .is_some_and(|count| *count >= MAX_REGISTERED_PER_OWNER)
    {
        return Err(Error::TooManyRegistered {
            limit: MAX_REGISTERED_PER_OWNER,
            scope: "by one user",
        });
    }
    if owners.values().sum::<usize>() >= MAX_REGISTERED {
        return Err(Error::TooManyRegistered {
            limit: MAX_REGISTERED,
            scope: "in all",
        });
    }
    Ok(())
}

fn stream(name: &str, socket: OwnedFd) -> Result<tokio::net::UnixStream, Error> {
    let not = |why: String| Error::NotASocket {
        name: name.to_owned(),
        why,
    };
    let domain = rustix::net::sockopt::socket_domain(&socket).map_err(|error| not(error.to_string()))?;
    let kind = rustix::net::sockopt::socket_type(&socket).map_err(|error| not(error.to_string()))?;
    if domain != rustix::net::AddressFamily::UNIX || kind != rustix::net::SocketType::STREAM {
        return Err(not("it is a socket of another kind".into()));
    }
    let stream = std::os::unix::net::UnixStream::from(socket);
    stream.peer_addr().map_err(|error| not(error.to_string()))?;
    stream
        .set_nonblocking(true)
        .map_err(|error| not(error.to_string()))?;
    tokio::net::UnixStream::from_std(stream).map_err(|error| not(error.to_string()))
}

async fn follow(registry: Arc<Registry>, mut directories: Directories, mut watch: Watch) {
    let stop = registry.stop.clone();
    while let Some(changed) = stop.run_until_cancelled(watch.changed()).await {
        if let Err(error) = changed {
            tracing::error!(%error, "the domain directories are no longer watched: changes need a restart");
            return;
        }
        let read = tokio::task::spawn_blocking(move || {
            let files = directories.read();
            (directories, files)
        });
        // A panic aborts the service, and nothing cancels this task.
        let Ok((same, files)) = read.await else { return };
        directories = same;
        registry.apply(files);
    }
}
