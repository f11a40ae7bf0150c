//! The domains: their configuration, their state as QEMU reports it, and a supervised monitor for each.
//!
//! Knows domain files, monitors and disks; not backups, access rights or D-Bus.

mod directory;
mod disks;
mod graph;
mod identity;
mod monitor;
mod outside;
pub mod owner;
pub mod poweroff;
mod presence;
mod registry;
mod retry;

pub use directory::{CheckpointPolicy, Content, Directories, FileError};
pub use disks::{Bitmap, Disk, DiskNameError, find_disks};
pub use identity::{Identity, NOBODY, Reach};
pub use monitor::{Link, OLDEST, OnConnect, Phase, RunState};
pub use owner::name as user_name;
pub use registry::{Change, Registration, Registry};

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use uuid::Uuid;

use crate::error::{Kind, shown};
use crate::model::Outside;
use crate::quota::Share;
use crate::socket::Dialer;
use crate::text::is_invisible;
use crate::{qmp, quota};

/// How long the service waits for a monitor's greeting, and for the reply to a query.
pub const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("no domain '{0}'")]
    NoSuchDomain(String),
    #[error("no domain '{name}': other users have registered {others}. Use one of these names")]
    OnlyOthers { name: String, others: String },
    #[error("several domains have the UUID {0}. Use a name instead")]
    Ambiguous(String),
    #[error("domain '{name}' cannot be reached: {why}")]
    Unreachable { name: String, why: String },
    #[error(
        "'{0}' cannot be a domain's name: use 1 to 128 bytes without '/', control or format characters. A name must \
         not be a UUID or start with '.' or a number and ':'"
    )]
    InvalidName(String),
    #[error("a domain named '{0}' exists already")]
    NameTaken(String),
    #[error("{0}")]
    TooManyRegistered(#[from] quota::Exceeded),
    #[error("domain '{name}': {source}")]
    Monitor { name: String, source: qmp::Error },
    #[error("the monitor of '{name}' is not a connected UNIX stream socket: {why}")]
    NotASocket { name: String, why: String },
    #[error("cannot look up the name of user {uid}: {why}. Try again")]
    OwnerLookup { uid: u32, why: String },
    #[error(
        "user {uid} has no name: a later user can get this number. Give the user a name, and register the domain again"
    )]
    OwnerWithoutName { uid: u32 },
}

impl Error {
    /// The caller may see no domain with this name or UUID.
    pub fn no_such_domain(name: &str) -> Self {
        Self::NoSuchDomain(shown(name))
    }

    pub fn kind(&self) -> Kind {
        match self {
            Self::NoSuchDomain(_) | Self::OnlyOthers { .. } => Kind::NoSuchDomain,
            Self::Unreachable { .. } => Kind::DomainUnreachable,
            Self::Ambiguous(_) | Self::InvalidName(_) | Self::NameTaken(_) | Self::NotASocket { .. } => {
                Kind::InvalidArgs
            }
            Self::TooManyRegistered(_) => Kind::LimitsExceeded,
            Self::OwnerLookup { .. } => Kind::Internal,
            Self::OwnerWithoutName { .. } => Kind::Unsupported,
            Self::Monitor { source, .. } if source.is_refusal() => Kind::QemuError,
            Self::Monitor { .. } => Kind::DomainUnreachable,
        }
    }
}

impl From<Error> for crate::error::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

/// How the service learned of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// A file in one of the domain directories.
    Configured,
    /// A caller passed the socket of its monitor.
    Registered,
}

impl Origin {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Configured => "configured",
            Self::Registered => "registered",
        }
    }

    pub fn parse(word: &str) -> Option<Self> {
        [Self::Configured, Self::Registered]
            .into_iter()
            .find(|origin| origin.as_str() == word)
    }
}

/// The state of a domain, in libvirt's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Running,
    Paused,
    Suspended,
    Crashed,
    ShutOff,
    Unreachable,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Suspended => "suspended",
            Self::Crashed => "crashed",
            Self::ShutOff => "shut off",
            Self::Unreachable => "unreachable",
        }
    }

    /// Maps QEMU's `RunState` (`qapi/run-state.json`). In every state without an arm here the CPUs are stopped.
    fn from_run_state(word: &str) -> Self {
        match word {
            "running" => Self::Running,
            "suspended" => Self::Suspended,
            "guest-panicked" | "internal-error" => Self::Crashed,
            "shutdown" => Self::ShutOff,
            _ => Self::Paused,
        }
    }
}

/// The phase of a migration in which this QEMU does not own the disks, or loses them (`qapi/run-state.json`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Migration {
    /// The destination QEMU owns the disks, or is about to.
    Leaving,
    Left,
    /// The source QEMU still owns the disks.
    Coming,
}

impl Migration {
    fn from_run_state(word: &str) -> Option<Self> {
        match word {
            "finish-migrate" => Some(Self::Leaving),
            "postmigrate" => Some(Self::Left),
            "inmigrate" => Some(Self::Coming),
            _ => None,
        }
    }
}

/// The last state that QEMU reported.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub uuid: Option<Uuid>,
    /// QEMU has answered at least once.
    pub reached: bool,
    pub state: State,
    pub migration: Option<Migration>,
    pub disks: Arc<[Disk]>,
    /// Devices whose data is not on any of the disks.
    pub outside: Arc<[Outside]>,
    /// Paths, as QEMU sees them, of each file and device that QEMU's block nodes have open.
    pub files: Arc<[PathBuf]>,
    /// The part of its user's memory quota that it uses.
    share: Option<Arc<Share>>,
}

impl Snapshot {
    fn unknown() -> Self {
        Self {
            uuid: None,
            reached: false,
            state: State::Unreachable,
            migration: None,
            disks: Arc::from([]),
            outside: Arc::from([]),
            files: Arc::from([]),
            share: None,
        }
    }

    /// The approximate size in bytes.
    fn weight(&self) -> usize {
        /// The overhead of an allocation.
        const EACH: usize = 16;
        let bitmaps = self.disks.iter().flat_map(|disk| &disk.bitmaps);
        let bitmaps = bitmaps.map(|bitmap| size_of_val(bitmap) + bitmap.name.len() + EACH);
        let files = self
            .files
            .iter()
            .map(|file| size_of_val(file) + file.as_os_str().len() + EACH);
        size_of_val(&*self.disks) + bitmaps.chain(files).sum::<usize>()
    }
}

/// A virtual machine that the service knows.
#[derive(Debug)]
pub struct Domain {
    /// A random number that is never reused. It does not show how many domains there are.
    pub id: u64,
    pub name: String,
    pub origin: Origin,
    /// The user that configured or registered it.
    pub owner: u32,
    /// The user's name as a part of the domain's identity; see [`owner::shown_name`].
    pub owner_name: String,
    /// The guest agent's socket, if there is one.
    pub agent: Option<Dialer>,
    pub checkpoints: CheckpointPolicy,
    /// The longest time that a write of the guest may take during a backup, in milliseconds. 0 means no limit.
    pub max_latency: Option<u32>,
    /// This is a stand-in for an unknown domain whose name another domain has.
    lost_name: bool,
    /// This is a stand-in for an unknown domain.
    absent: bool,
    snapshot: watch::Sender<Snapshot>,
    phase: watch::Sender<Phase>,
    /// The number of [`Hold`]s, which keep the monitor connected even after the domain was removed.
    holds: watch::Sender<usize>,
}

/// Keeps a domain's monitor connected while a job runs, even if the domain's file is changed or removed.
#[derive(Debug)]
pub struct Hold(Arc<Domain>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.holds.send_modify(|holds| *holds -= 1);
    }
}

impl Domain {
    fn new(id: u64, identity: Identity, phase: Phase) -> Self {
        let snapshot = Snapshot {
            uuid: identity.uuid,
            ..Snapshot::unknown()
        };
        Self {
            id,
            name: identity.name,
            origin: identity.origin,
            owner: identity.owner,
            owner_name: identity.owner_name,
            agent: None,
            checkpoints: CheckpointPolicy::default(),
            max_latency: None,
            lost_name: false,
            absent: false,
            snapshot: watch::Sender::new(snapshot),
            phase: watch::Sender::new(phase),
            holds: watch::Sender::new(0),
        }
    }

    /// A name that no other domain has at the same time, fit for a directory. A domain that a user registers cannot
    /// have the unique name of a configured domain, or of another user's domain.
    pub fn unique_name(&self) -> String {
        unique_name(self.origin, self.owner, &self.name)
    }

    /// The name that this user sees and uses; see [`Identity::name_for`].
    pub fn name_for(&self, uid: u32) -> String {
        self.identity().name_for(uid)
    }

    fn was_reached(&self) -> bool {
        self.snapshot.borrow().reached
    }

    /// Whether a user other than this one, given by number and lasting name, registered it. The connection that
    /// registered a known domain proves its user. For an unknown domain, only the name does.
    pub fn is_foreign_to(&self, uid: u32, name: Option<&str>) -> bool {
        self.is_foreign(uid)
            || self.origin == Origin::Registered && self.absent && name != Some(self.owner_name.as_str())
    }

    /// Whether this is a stand-in: the service knows only what the catalog has.
    pub fn is_absent(&self) -> bool {
        self.absent
    }

    /// Whether another user registered it.
    pub fn is_foreign(&self, uid: u32) -> bool {
        self.origin == Origin::Registered && self.owner != uid
    }

    /// The owner's name in polkit's rules: the name, or the number if there is no name.
    pub fn shown_owner(&self) -> &str {
        owner::shown_name(&self.owner_name)
    }

    /// Whether the same owner can be recognised after the registration has ended.
    pub fn has_lasting_owner(&self) -> bool {
        self.origin == Origin::Configured || owner::has_name(self.owner, &self.owner_name)
    }

    /// Refuses to make something that outlasts the registration if its owner could not be recognised later.
    pub fn require_lasting_owner(&self) -> Result<(), Error> {
        match self.has_lasting_owner() {
            true => Ok(()),
            false => Err(Error::OwnerWithoutName { uid: self.owner }),
        }
    }

    /// Whether that user registered it.
    pub fn is_own(&self, uid: u32) -> bool {
        self.origin == Origin::Registered && self.owner == uid
    }

    pub fn hold(self: &Arc<Self>) -> Hold {
        self.holds.send_modify(|holds| *holds += 1);
        Hold(self.clone())
    }

    /// Waits until there is no [`Hold`].
    async fn released(&self) {
        // `self` owns the sender, so the wait cannot fail.
        let _ = self.holds.subscribe().wait_for(|holds| *holds == 0).await;
    }

    /// Returns the last known state without waiting.
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot.borrow().clone()
    }

    /// Reports every new snapshot.
    pub fn snapshots(&self) -> watch::Receiver<Snapshot> {
        self.snapshot.subscribe()
    }

    /// Returns the monitor after the first try to connect has ended.
    pub async fn link(&self) -> Result<Arc<Link>, Error> {
        let mut phase = self.phase.subscribe();
        let settled = phase.wait_for(|phase| !matches!(phase, Phase::Connecting)).await;
        match settled.as_deref() {
            Ok(Phase::Up(link)) => Ok(link.clone()),
            Ok(Phase::Down { why, .. }) => Err(self.unreachable(why)),
            Ok(Phase::Connecting) | Err(_) => Err(self.unreachable("the domain is being removed")),
        }
    }

    /// The process at the other end of a connected monitor; see [`crate::qmp::Monitor::process`].
    pub fn process(&self) -> Option<u32> {
        match &*self.phase.borrow() {
            Phase::Up(link) => link.client.process(),
            Phase::Connecting | Phase::Down { .. } => None,
        }
    }

    /// The same process, if root listens there. Otherwise another user chose it, whatever user it runs as now: it can
    /// execute a set-user-ID program and keep its open files.
    pub fn process_of_root(&self) -> Option<u32> {
        match &*self.phase.borrow() {
            Phase::Up(link) if link.client.user() == Some(0) => link.client.process(),
            _ => None,
        }
    }

    /// Returns the monitor's next connection after `lost`, or any connection without `lost`. Returns `None` if there
    /// is none within `patience`, or if QEMU has ended.
    pub async fn next_link(&self, lost: Option<&Arc<Link>>, patience: Duration) -> Option<Arc<Link>> {
        if self.origin == Origin::Registered && lost.is_some() {
            // The caller passed a connected socket, so the service cannot connect again.
            return None;
        }
        let mut phase = self.phase.subscribe();
        let next = phase.wait_for(|phase| match phase {
            Phase::Up(link) => lost.is_none_or(|lost| !Arc::ptr_eq(link, lost)),
            Phase::Down { gone, .. } => *gone,
            Phase::Connecting => false,
        });
        match tokio::time::timeout(patience, next).await.ok()?.ok().as_deref() {
            Some(Phase::Up(link)) => Some(link.clone()),
            _ => None,
        }
    }

    /// Whether the service knows that QEMU has ended.
    pub fn is_gone(&self) -> bool {
        matches!(&*self.phase.borrow(), Phase::Down { gone: true, .. })
    }

    /// Waits until the monitor is connected or the last try has failed, for at most `patience`.
    pub async fn settled(&self, patience: Duration) {
        // The result does not matter here: callers read the phase.
        let _ = tokio::time::timeout(patience, self.link()).await;
    }

    /// Asks QEMU for its state and disks now, and stores the reply.
    pub async fn refresh(&self) -> Result<Snapshot, Error> {
        let link = self.link().await?;
        let fresh = link.inspect().await.map_err(|source| Error::Monitor {
            name: self.name.clone(),
            source,
        })?;
        self.snapshot.send_replace(fresh.clone());
        Ok(fresh)
    }

    fn unreachable(&self, why: &str) -> Error {
        Error::Unreachable {
            name: self.name.clone(),
            why: why.to_owned(),
        }
    }
}

fn unique_name(origin: Origin, owner: u32, name: &str) -> String {
    match origin {
        Origin::Configured => name.to_owned(),
        Origin::Registered => format!("{owner}{SEPARATOR}{name}"),
    }
}

/// Splits `UID:NAME`. A domain's own name cannot have this form.
pub fn registered(name: &str) -> Option<(u32, &str)> {
    let (owner, name) = name.split_once(SEPARATOR)?;
    Some((owner.parse().ok()?, name))
}

/// Separates the user's number from the name in [`Domain::unique_name`].
const SEPARATOR: char = ':';

/// Whether `name` is a valid domain name. A store has a directory of that name, so a name that looks like the
/// directory of a registered domain is not valid.
pub fn is_domain_name(name: &str) -> bool {
    let bad = |c: char| c == '/' || c.is_control();
    let number = |text: &str| text.chars().all(|c| c.is_ascii_digit());
    (1..=128).contains(&name.len())
        && !name.starts_with('.')
        && !name.contains(bad)
        && !name.split_once(SEPARATOR).is_some_and(|(head, _)| number(head))
}

/// Checks whether a caller may register a domain under this name. A UUID could be mistaken for that of another
/// domain.
pub fn check_new_name(name: &str) -> Result<(), Error> {
    // With invisible characters, a dialog or a list would show it as another name.
    if is_domain_name(name) && Uuid::try_parse(name).is_err() && !name.contains(is_invisible) {
        return Ok(());
    }
    Err(Error::InvalidName(shown(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_cannot_register_a_uuid_as_name_but_a_file_can_have_it() {
        let uuid = "7d3c0f3e-52d1-4a4e-9d0c-0f8a3f5a2b10";
        assert!(is_domain_name(uuid));
        assert!(check_new_name(uuid).is_err() && check_new_name("web").is_ok());
    }

    #[test]
    fn a_name_that_cannot_be_a_directory_is_refused() {
        for name in [
            "",
            ".",
            "1000:web",
            ":web",
            "..",
            ".hidden",
            "a/b",
            "a\nb",
            "a\0b",
            &"x".repeat(129),
        ] {
            assert!(!is_domain_name(name), "{name:?}");
        }
        for name in [
            "web",
            "a:b",
            "a&b",
            "Fedora 40",
            "vm-1.2_3",
            "ü",
            &"x".repeat(128),
        ] {
            assert!(is_domain_name(name), "{name:?}");
        }
    }
}
