//! The set of domains: domain files configure some, callers register others. Each has a supervisor.
//!
//! Configured domains and the domains of each user have separate names. So a caller can neither take nor probe the
//! name of a domain that it may not see.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Semaphore, broadcast};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::directory::{DomainFile, Watch};
use super::monitor::{self, Link, OnConnect, OnConnectSlot};
use super::presence::Presence;
use super::{Directories, Domain, Error, Identity, Origin, Phase, check_new_name, owner};
use crate::qmp::{Bounds, Client};
use crate::quota::{Limits, Quota, Share};
use crate::socket::{Dialer, Purpose};

/// How long a monitor that a caller passes may take to greet.
const GREETING: Duration = Duration::from_secs(1);
/// The longest line of a QEMU that a user registers, in bytes: some hundreds of block nodes take 1 MiB.
/// [`LONG_LINES`] is how many monitors of one user may send a long line at a time.
const LONGEST_LINE: usize = 4 << 20;
const LONG_LINES: usize = 1;
/// The memory for the state of the domains that users register, in bytes. A usual domain takes some KiB.
const MEMORY: Limits = Limits {
    per_user: 32 << 20,
    in_all: 256 << 20,
};
/// The number of changes that a receiver may lag behind.
const CHANGES: usize = 1024;

/// A change of the set.
#[derive(Debug, Clone)]
pub enum Change {
    Added(Arc<Domain>),
    Removed(Arc<Domain>),
}

/// A caller's request to register a domain.
#[derive(Debug)]
pub struct Registration<'a> {
    pub name: &'a str,
    pub owner: u32,
    /// The caller's bus connection. The service removes the domain when it closes.
    pub sender: &'a str,
    /// Counts the monitor's descriptor while it is open.
    pub share: Arc<Share>,
}

/// Names are unique among the configured domains, and among the domains of a user.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Configured(String),
    Registered(u32, String),
}

struct Entry {
    domain: Arc<Domain>,
    stop: CancellationToken,
    kind: EntryKind,
}

enum EntryKind {
    Configured(DomainFile),
    Registered { sender: String },
}

type Domains = BTreeMap<Key, Entry>;
/// By identity, and whether another domain has the name.
type Absent = HashMap<(Identity, bool), Arc<Domain>>;

/// All known domains.
pub struct Registry {
    domains: Mutex<Domains>,
    /// Stand-ins for unknown domains that have jobs or backups.
    absent: Mutex<Absent>,
    changes: broadcast::Sender<Change>,
    quota: Quota,
    memory: Quota,
    /// Permits for long lines, by user.
    turns: Mutex<HashMap<u32, Weak<Semaphore>>>,
    presence: Presence,
    slot: Arc<OnConnectSlot>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Registry {
    /// Reads the directories and follows their changes until [`Registry::shut_down`]. `quota` counts the domains that
    /// callers register.
    pub fn open(mut directories: Directories, quota: Quota) -> io::Result<Arc<Self>> {
        let (presence, news) = Presence::open()?;
        let registry = Arc::new(Self {
            quota,
            memory: Quota::new("monitor-memory", MEMORY),
            turns: Mutex::default(),
            presence: presence.clone(),
            slot: Arc::new(OnConnectSlot::new(None)),
            domains: Mutex::default(),
            absent: Mutex::default(),
            changes: broadcast::Sender::new(CHANGES),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        let stop = registry.stop.clone();
        registry
            .tasks
            .spawn(async move { stop.run_until_cancelled(presence.dispatch(news)).await });
        let watch = directories.watch()?;
        registry.apply(directories.read());
        registry.tasks.spawn(follow(registry.clone(), directories, watch));
        Ok(registry)
    }

    /// Sets the code that inspects the disks of each domain when it connects. Until then, no domain connects.
    pub fn set_on_connect(&self, on_connect: Weak<dyn OnConnect>) {
        self.slot.send_replace(Some(on_connect));
    }

    /// Reports the changes from now on.
    pub fn changes(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }

    /// Returns all domains, sorted by name.
    pub fn list(&self) -> Vec<Arc<Domain>> {
        let domains = self.lock();
        let mut list: Vec<_> = domains.values().map(|entry| entry.domain.clone()).collect();
        drop(domains);
        list.sort_by(|a, b| {
            a.name
                .cmp(&b.name)
                .then(a.origin.cmp(&b.origin))
                .then(a.id.cmp(&b.id))
        });
        list
    }

    pub fn get(&self, id: u64) -> Option<Arc<Domain>> {
        let domains = self.lock();
        let entry = domains.values().find(|entry| entry.domain.id == id)?;
        Some(entry.domain.clone())
    }

    /// Returns every domain that this name or UUID denotes for `uid`, in groups.
    ///
    /// - A match by name comes before a match by UUID, and a configured domain before one of `uid`'s own.
    /// - Several domains in one group are ambiguous.
    /// - The domain of another user has only the name `UID:NAME`, and its UUID does not count. So a user never gets
    ///   it in place of a missing domain.
    pub fn find(&self, name_or_uuid: &str, uid: u32) -> Vec<Vec<Arc<Domain>>> {
        let uuid = Uuid::try_parse(name_or_uuid).ok();
        let mut groups: BTreeMap<(bool, bool), Vec<Arc<Domain>>> = BTreeMap::new();
        for Entry { domain, .. } in self.lock().values() {
            let identity = domain.identity();
            let named = identity.is_called(name_or_uuid, uid);
            if named || uuid.is_some() && identity.uuid == uuid && identity.is_trusted_by(uid) {
                let place = (!named, domain.origin != Origin::Configured);
                groups.entry(place).or_default().push(domain.clone());
            }
        }
        groups.into_values().collect()
    }

    /// Returns the domains with this name or UUID that other users have registered.
    pub fn others(&self, name_or_uuid: &str, uid: u32) -> Vec<Arc<Domain>> {
        let uuid = Uuid::try_parse(name_or_uuid).ok();
        let mut others = self.list();
        others.retain(|domain| {
            let same = domain.name == name_or_uuid || uuid.is_some() && domain.snapshot.borrow().uuid == uuid;
            domain.is_foreign(uid) && same
        });
        others
    }

    /// Takes over the monitor of a caller's own QEMU. `socket` must be connected, and the caller must not have read
    /// from it.
    pub async fn register(
        self: &Arc<Self>,
        registration: Registration<'_>,
        socket: OwnedFd,
    ) -> Result<Arc<Domain>, Error> {
        let (name, uid) = (registration.name, registration.owner);
        check_new_name(name)?;
        check_name(&self.lock(), name, uid)?;
        let place = self.quota.take(uid, 1)?;
        // This duplicate is closed last, on a thread that may block, because closing a socket can take time if its
        // queue has data.
        let last = socket
            .try_clone()
            .map_err(|error| not_a_socket(name, error.to_string()))?;
        let stream = stream(name, socket)?;
        let bounds = Bounds {
            longest: LONGEST_LINE,
            turns: Some(self.turns_of(uid)),
        };
        let opened = Client::open_within(bounds, stream, GREETING).await;
        let (client, driver) = opened.map_err(|source| Error::Monitor {
            name: name.to_owned(),
            source,
        })?;
        let owner_name = owner::identity_name(uid).await?;
        let share = registration.share;
        let kind = EntryKind::Registered {
            sender: registration.sender.to_owned(),
        };
        let (domain, stop) = {
            let mut domains = self.lock();
            // Check again: another domain may have taken the name while the peer was greeting.
            check_name(&domains, name, uid)?;
            self.add(&mut domains, name, (uid, owner_name), kind)
        };
        self.announce(Change::Added(domain.clone()));
        let registry = self.clone();
        let served = domain.clone();
        self.tasks.spawn(async move {
            let memory = Some((registry.memory.clone(), uid));
            let (link, slot) = (Link::new(client, memory), registry.slot.clone());
            monitor::serve_once(served.clone(), link, driver, slot, stop).await;
            registry.remove(|entry| entry.domain.id == served.id);
            // The quota counts until here, because a backup may have kept the monitor after the domain was removed.
            drop((place, share));
            tokio::task::spawn_blocking(move || drop(last));
        });
        // The caller gets a domain that answers, or the reason why it does not answer.
        domain.link().await?;
        Ok(domain)
    }

    fn turns_of(&self, uid: u32) -> Arc<Semaphore> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turns| turns.strong_count() > 0);
        let known = turns.get(&uid).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let new = Arc::new(Semaphore::new(LONG_LINES));
            turns.insert(uid, Arc::downgrade(&new));
            new
        })
    }

    /// Removes the domains that a closed connection registered. Running backups keep the monitor until they end.
    pub fn release(self: &Arc<Self>, sender: &str) {
        self.remove(|entry| matches!(&entry.kind, EntryKind::Registered { sender: of } if of == sender));
    }

    /// Ends all supervisors and waits for them.
    pub async fn shut_down(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn lock(&self) -> MutexGuard<'_, Domains> {
        // A panic aborts the service, so no code sees a half-changed set.
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_absent(&self) -> MutexGuard<'_, Absent> {
        self.absent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(
        &self,
        domains: &mut Domains,
        name: &str,
        (owner, owner_name): (u32, String),
        kind: EntryKind,
    ) -> (Arc<Domain>, CancellationToken) {
        let (key, origin) = match &kind {
            EntryKind::Configured(_) => (Key::Configured(name.to_owned()), Origin::Configured),
            EntryKind::Registered { .. } => (Key::Registered(owner, name.to_owned()), Origin::Registered),
        };
        // Random, so that the ids do not show how many hidden domains there are.
        let id = Uuid::new_v4().as_u64_pair().1;
        let identity = Identity {
            name: name.to_owned(),
            origin,
            owner,
            owner_name,
            uuid: None,
        };
        let mut domain = Domain::new(id, identity, Phase::Connecting);
        if let EntryKind::Configured(file) = &kind {
            let agent = |address| Dialer::new(address, Purpose::Agent);
            (domain.agent, domain.checkpoints) = (file.agent.clone().map(agent), file.checkpoints);
            domain.max_latency = file.max_latency;
        }
        let domain = Arc::new(domain);
        let stop = self.stop.child_token();
        let entry = Entry {
            domain: domain.clone(),
            stop: stop.clone(),
            kind,
        };
        domains.insert(key, entry);
        (domain, stop)
    }

    /// Removes domains.
    fn remove(self: &Arc<Self>, gone: impl Fn(&Entry) -> bool) {
        let mut removed = Vec::new();
        self.lock().retain(|_, entry| {
            let gone = gone(entry);
            if gone {
                removed.push((entry.domain.clone(), entry.stop.clone()));
            }
            !gone
        });
        for (domain, stop) in removed {
            self.retire(domain.clone(), stop);
            self.announce(Change::Removed(domain));
        }
    }

    /// Adds and removes configured domains to match `files`. A domain whose file is unchanged keeps its connection.
    fn apply(self: &Arc<Self>, mut files: BTreeMap<String, DomainFile>) {
        self.remove(|entry| match &entry.kind {
            EntryKind::Configured(file) => files.get(&entry.domain.name) != Some(file),
            EntryKind::Registered { .. } => false,
        });
        let mut come = Vec::new();
        let mut domains = self.lock();
        files.retain(|name, _| !domains.contains_key(&Key::Configured(name.clone())));
        for (name, file) in files {
            let owner = (file.owner, file.owner_name.clone());
            let monitor = Dialer::new(file.monitor.clone(), Purpose::Monitor);
            let (domain, stop) = self.add(&mut domains, &name, owner, EntryKind::Configured(file));
            let (presence, slot) = (self.presence.clone(), self.slot.clone());
            self.tasks
                .spawn(monitor::supervise(domain.clone(), monitor, presence, slot, stop));
            come.push(domain);
        }
        drop(domains);
        come.into_iter()
            .for_each(|domain| self.announce(Change::Added(domain)));
    }

    /// Disconnects a removed domain once no job needs its monitor. A new domain on the same monitor connects after
    /// that, because QEMU serves one client at a time.
    fn retire(&self, domain: Arc<Domain>, stop: CancellationToken) {
        let all = self.stop.clone();
        self.tasks.spawn(async move {
            // At shutdown, the parent token stops this domain too.
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
        // At the start there is no receiver yet.
        let _ = self.changes.send(change);
    }
}

fn check_name(domains: &Domains, name: &str, owner: u32) -> Result<(), Error> {
    match domains.contains_key(&Key::Registered(owner, name.to_owned())) {
        true => Err(Error::NameTaken(name.to_owned())),
        false => Ok(()),
    }
}

fn not_a_socket(name: &str, why: String) -> Error {
    Error::NotASocket {
        name: name.to_owned(),
        why,
    }
}

fn stream(name: &str, socket: OwnedFd) -> Result<tokio::net::UnixStream, Error> {
    let not = |why: String| not_a_socket(name, why);
    let domain = rustix::net::sockopt::socket_domain(&socket).map_err(|error| not(error.to_string()))?;
    let kind = rustix::net::sockopt::socket_type(&socket).map_err(|error| not(error.to_string()))?;
    if domain != rustix::net::AddressFamily::UNIX || kind != rustix::net::SocketType::STREAM {
        return Err(not("its type is not UNIX stream".into()));
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
            tracing::error!(%error, "the domain directories are no longer watched. Restart the service after changes");
            return;
        }
        let read = tokio::task::spawn_blocking(move || {
            let files = directories.read();
            (directories, files)
        });
        // A panic aborts the service, and no code cancels this task.
        let Ok((same, files)) = read.await else { return };
        directories = same;
        registry.apply(files);
    }
}
