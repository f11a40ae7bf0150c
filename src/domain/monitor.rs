//! The supervised monitor of one domain: connect, ask, listen, and connect again.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::disks;
use super::graph::{self, Graph};
use super::outside::{self, Devices};
use super::presence::Presence;
use super::retry::{After, Retry};
use super::{Disk, Domain, Migration, PATIENCE, Snapshot, State};
use crate::names::IN_QEMU;
use crate::qmp::block::{
    BlockDeviceInfo, BlockInfo, JobEvent, QueryBlock, QueryNamedBlockNodes, XDbgBlockGraph,
    XDebugQueryBlockGraph,
};
use crate::qmp::machine::{
    Cont, ObjectPropertyInfo, QomList, QueryStatus, QueryUuid, QueryVersion, VersionTriple,
};
use crate::qmp::{self, Client, Done, Driver, Event, EventsError, Feature, Schema};
use crate::quota::Quota;
use crate::socket::{self, Dialer};
use crate::text::excerpt;

/// The oldest QEMU that can be backed up: `flat` of `query-named-block-nodes` came with it.
pub const OLDEST: &str = "5.0";

/// How long a QEMU that has answered just now may take to list its block nodes.
const GRAPH_PATIENCE: Duration = Duration::from_secs(30);

/// How long the events of one burst take to come.
const BURST: Duration = Duration::from_millis(50);
/// Between two looks at a QEMU that its events cause.
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);
/// How often a failure of them is logged at most, and how many bytes of what the peer said.
const BETWEEN_RECORDS: Duration = Duration::from_secs(60);
const MOST_SAID: usize = 256;

/// A connected monitor.
#[derive(Debug)]
pub struct Link {
    pub client: Client,
    pub schema: Schema,
    /// Who pays for what is known of it, if that is a user.
    memory: Option<(Quota, u32)>,
    /// The VM's, as soon as QEMU was asked: it stays the same as long as QEMU runs.
    uuid: OnceLock<Option<Uuid>>,
    /// Descriptor sets that QEMU kept although they were removed (it does, up to version 8, of a stopped machine).
    pub kept_descriptors: Mutex<BTreeSet<u64>>,
}

/// Who looks at a domain's disks when its monitor has connected, before anybody else can use it.
pub trait Greeter: Send + Sync {
    fn greet<'a>(&'a self, domain: &'a Domain, link: &'a Link, snapshot: &'a Snapshot) -> BoxFuture<'a, ()>;
}

/// The one greeter that there is, as soon as there is one.
pub(super) type Greeters = watch::Sender<Option<Weak<dyn Greeter>>>;

async fn greet(greeters: &Greeters, domain: &Domain, link: &Link, snapshot: &Snapshot) {
    let mut known = greeters.subscribe();
    let greeter = known.wait_for(Option::is_some).await;
    let greeter = greeter.ok().and_then(|greeter| greeter.as_ref()?.upgrade());
    if let Some(greeter) = greeter {
        greeter.greet(domain, link, snapshot).await;
    }
}

/// How far the connection is.
#[derive(Debug, Clone)]
pub enum Phase {
    /// The first try has not ended yet.
    Connecting,
    Up(Arc<Link>),
    /// The last try failed, or the connection ended, with this reason. It is tried again.
    Down {
        why: Arc<str>,
        /// Nobody listens at the monitor's socket: the QEMU that did has ended.
        gone: bool,
    },
}

/// Connects, and connects again, until `stop`: the life of a configured domain.
pub(super) async fn supervise(
    domain: Arc<Domain>,
    monitor: Dialer,
    presence: Presence,
    greeters: Arc<Greeters>,
    stop: CancellationToken,
) {
    let path = &monitor.address().path;
    let mut retry = Retry::new(&presence, path);
    let mut told: Arc<str> = "".into();
    loop {
        // On the heap, as what `serve` does now and then: hundreds of domains are idle, and would keep room for all of it.
        let attempt = stop.run_until_cancelled(async {
            let (link, driver) = Box::pin(connect(&monitor)).await?;
            retry = Retry::new(&presence, path);
            Ok::<_, ConnectError>(Box::pin(serve(&domain, link, driver, &greeters)).await)
        });
        let (why, after): (Arc<str>, After) = match attempt.await {
            None => return domain.down("the service is letting it go", false),
            Some(Ok(reason)) => (reason, After::Failure),
            Some(Err(error)) => (error.to_string().into(), error.after()),
        };
        match after == After::Refusal && told != why {
            true => tracing::warn!(domain = domain.name, why = %why, "the monitor is not connected to"),
            false => tracing::debug!(domain = domain.name, why = %why, "monitor is down"),
        }
        told = why.clone();
        domain.down(&why, after == After::Absence);
        if stop.run_until_cancelled(retry.wait(after)).await.is_none() {
            return;
        }
    }
}

/// Serves a connection that was handed over, until it ends or `stop`: the life of a registered domain.
pub(super) async fn serve_once(
    domain: Arc<Domain>,
    link: Link,
    driver: Driver,
    greeters: Arc<Greeters>,
    stop: CancellationToken,
) {
    let serving = serve(&domain, link, driver, &greeters);
    let ended = stop.run_until_cancelled(serving).await;
    // It cannot be connected to again: for code that waits for it, it has ended.
    domain.down(ended.as_deref().unwrap_or("the service is letting it go"), true);
}

#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error("{0}")]
    Socket(#[from] socket::Error),
    #[error("{0}")]
    Monitor(#[from] qmp::Error),
}

impl ConnectError {
    fn after(&self) -> After {
        match self {
            Self::Socket(error) if error.is_absence() => After::Absence,
            Self::Socket(error) if error.is_refusal() => After::Refusal,
            // Somebody else has it, and is served first.
            Self::Socket(socket::Error::Full { .. }) | Self::Monitor(qmp::Error::NoGreeting(_)) => {
                After::Silence
            }
            Self::Socket(_) | Self::Monitor(_) => After::Failure,
        }
    }
}

async fn connect(monitor: &Dialer) -> Result<(Link, Driver), ConnectError> {
    let stream = monitor.connect(PATIENCE).await?;
    let (client, driver) = Client::open(stream, PATIENCE).await?;
    Ok((Link::new(client, None), driver))
}

impl Link {
    /// Asks QEMU for all that a snapshot holds.
    pub async fn inspect(&self) -> qmp::Result<Snapshot> {
        let mut snapshot = inspect(self).await?;
        if let Some((quota, uid)) = &self.memory {
            let share = quota.take(*uid, snapshot.weight());
            let share = share.map_err(|exceeded| {
                let limit = exceeded.limit >> 20;
                qmp::Error::NotQmp(format!(
                    "the VMs that user {uid} has registered say more of themselves than {limit} MiB"
                ))
            })?;
            snapshot.share = Some(Arc::new(share));
        }
        Ok(snapshot)
    }

    /// Asks QEMU for its disks only. What it passes through of the guest's commands is not known then.
    pub async fn disks(&self) -> qmp::Result<Vec<Disk>> {
        let (drives, nodes, edges) = blocks(self).await?;
        disks_of(drives, &nodes, edges.as_ref(), &Devices::of([]))
    }

    /// Asks QEMU what it does with the guest.
    pub async fn run_state(&self) -> qmp::Result<RunState> {
        let status = self.client.execute_within(PATIENCE, QueryStatus {});
        Ok(RunState(status.await?.status))
    }

    /// Lets the guest run.
    pub async fn resume_guest(&self) -> qmp::Result<()> {
        let Done = self.client.execute_within(PATIENCE, Cont {}).await?;
        Ok(())
    }

    async fn uuid(&self) -> qmp::Result<Option<Uuid>> {
        if let Some(known) = self.uuid.get() {
            return Ok(*known);
        }
        let reply = self.client.execute_within(PATIENCE, QueryUuid {});
        let uuid = Some(reply.await?.uuid).filter(|uuid| !uuid.is_nil());
        Ok(*self.uuid.get_or_init(|| uuid))
    }

    pub(super) fn new(client: Client, memory: Option<(Quota, u32)>) -> Self {
        Self {
            client,
            memory,
            schema: Schema::default(),
            uuid: OnceLock::new(),
            kept_descriptors: Mutex::default(),
        }
    }
}

/// Runs the connection: asks first, then follows QEMU's events. Gives the reason of its end.
async fn serve(domain: &Domain, mut link: Link, driver: Driver, greeters: &Greeters) -> Arc<str> {
    let work = async {
        let mut events = link.client.events();
        link.schema = Box::pin(schema(&link)).await?;
        Box::pin(check_version(&link)).await?;
        let first = Box::pin(link.inspect())
            .await
            .map_err(|error| error.to_string())?;
        domain.snapshot.send_modify(|snapshot| snapshot.uuid = first.uuid);
        // What hangs then, a backup will meet.
        let _ = tokio::time::timeout(PATIENCE, Box::pin(greet(greeters, domain, &link, &first))).await;
        domain.snapshot.send_replace(first);
        let link = Arc::new(link);
        tracing::info!(domain = domain.name, "monitor is up");
        domain.phase.send_replace(Phase::Up(link.clone()));
        let (mut looked, mut told) = (Instant::now(), None::<Instant>);
        loop {
            match events.next().await {
                Ok(event) if !changes_something(&event) => {}
                Ok(_) | Err(EventsError::Missed) => {
                    // One look tells of all that came before it: the jobs of many disks end at once, and a peer can send as many as
                    // it likes.
                    let next = (looked + BETWEEN_LOOKS).max(Instant::now() + BURST);
                    tokio::time::sleep_until(next).await;
                    while events.next_now().is_some() {}
                    looked = Instant::now();
                    match Box::pin(link.inspect()).await {
                        Ok(fresh) => drop(domain.snapshot.send_replace(fresh)),
                        // A peer can fail as often as it likes, with words of its own.
                        Err(error) if told.is_none_or(|told| told.elapsed() >= BETWEEN_RECORDS) => {
                            let error = excerpt(&error.to_string(), MOST_SAID);
                            tracing::warn!(domain = domain.name, error, "the domain's state is unknown");
                            told = Some(Instant::now());
                        }
                        Err(_) => {}
                    }
                }
                Err(EventsError::Closed) => return Err::<std::convert::Infallible, String>("closed".into()),
            }
        }
    };
    tokio::select! {
        // The driver knows why the connection ended; the work only notices.
        biased;
        reason = driver.run() => reason,
        Err(reason) = work => reason.into(),
    }
}

/// Asks the QEMU what it can do. Each is asked: its answer may be false, and then concerns only its own domain.
async fn schema(link: &Link) -> Result<Schema, String> {
    let asked = tokio::time::timeout(PATIENCE, link.client.schema()).await;
    asked
        .map_err(|_| "it did not describe itself in time".to_owned())?
        .map_err(|error| error.to_string())
}

/// What every look at a QEMU needs: without it its disks cannot even be listed.
async fn check_version(link: &Link) -> Result<(), String> {
    if link.schema.has(Feature::FlatNodeList) {
        return Ok(());
    }
    let version = link.client.execute_within(PATIENCE, QueryVersion {});
    let VersionTriple { major, minor, micro } = version.await.map_err(|error| error.to_string())?.qemu;
    Err(format!(
        "QEMU {major}.{minor}.{micro} is too old: version {OLDEST} or later is needed"
    ))
}

/// Events after which the state or the disks may be others (`qapi/run-state.json`, `qapi/qdev.json`, …).
fn changes_something(event: &Event) -> bool {
    match JobEvent::of(event) {
        // The service's own jobs leave the disks as they are, and so does any backup.
        Some(JobEvent::Completed(end) | JobEvent::Cancelled(end)) => {
            !end.device.starts_with(IN_QEMU) && end.kind.as_deref() != Some("backup")
        }
        Some(JobEvent::StatusChange(_) | JobEvent::Error(_)) => false,
        None => is_change(&event.name),
    }
}

fn is_change(event: &str) -> bool {
    matches!(
        event,
        "STOP"
            | "RESUME"
            | "SHUTDOWN"
            | "POWERDOWN"
            | "RESET"
            | "SUSPEND"
            | "WAKEUP"
            | "GUEST_PANICKED"
            | "DEVICE_DELETED"
            | "DEVICE_TRAY_MOVED"
            | "BLOCK_JOB_COMPLETED"
            | "BLOCK_JOB_CANCELLED"
    )
}

/// QEMU's `RunState` (`qapi/run-state.json`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunState(String);

impl RunState {
    pub fn is_running(&self) -> bool {
        self.0 == "running"
    }

    /// Whether QEMU paused the guest because an I/O request of it failed (`werror`, `rerror` of a device). It repeats the
    /// request when the guest runs again.
    pub fn is_io_error(&self) -> bool {
        self.0 == "io-error"
    }

    /// Whether QEMU's disks are, or will be, another's.
    pub fn migration(&self) -> Option<Migration> {
        Migration::from_run_state(&self.0)
    }
}

async fn inspect(link: &Link) -> qmp::Result<Snapshot> {
    let client = &link.client;
    let (uuid, status) = tokio::try_join!(link.uuid(), client.execute_within(PATIENCE, QueryStatus {}),)?;
    let (drives, nodes, edges) = blocks(link).await?;
    let devices = Devices::of([
        (outside::PERIPHERAL, devices(client, outside::PERIPHERAL).await?),
        (outside::ANONYMOUS, devices(client, outside::ANONYMOUS).await?),
    ]);
    let disks = disks_of(drives, &nodes, edges.as_ref(), &devices)?;
    Ok(Snapshot {
        uuid,
        reached: true,
        state: State::from_run_state(&status.status),
        migration: Migration::from_run_state(&status.status),
        disks: disks.into(),
        outside: devices.outside().into(),
        files: graph::host_files(&nodes).into(),
        share: None,
    })
}

/// What QEMU says of its block layer.
async fn blocks(link: &Link) -> qmp::Result<(Vec<BlockInfo>, Vec<BlockDeviceInfo>, Option<XDbgBlockGraph>)> {
    let client = &link.client;
    // One after another: QEMU takes a while for each where there are thousands of nodes, and every answer is progress.
    let drives = client.execute_within(GRAPH_PATIENCE, QueryBlock {}).await?;
    let nodes = QueryNamedBlockNodes { flat: true };
    let nodes = client.execute_within(GRAPH_PATIENCE, nodes).await?;
    let edges = match link.schema.has(Feature::BlockGraph) {
        true => Some(
            client
                .execute_within(GRAPH_PATIENCE, XDebugQueryBlockGraph {})
                .await?,
        ),
        false => None,
    };
    Ok((drives, nodes, edges))
}

fn disks_of(
    drives: Vec<BlockInfo>,
    nodes: &[BlockDeviceInfo],
    edges: Option<&XDbgBlockGraph>,
    devices: &Devices,
) -> qmp::Result<Vec<Disk>> {
    let graph = Graph::of(nodes, edges);
    let disks = graph.and_then(|graph| disks::disks(drives, &graph, devices));
    disks.ok_or_else(|| qmp::Error::NotQmp("it claims disks that no QEMU has".into()))
}

async fn devices(client: &Client, path: &str) -> qmp::Result<Vec<ObjectPropertyInfo>> {
    client.execute_within(PATIENCE, QomList { path }).await
}

impl Domain {
    fn down(&self, why: &str, gone: bool) {
        let why = why.into();
        self.phase.send_replace(Phase::Down { why, gone });
        self.snapshot
            .send_modify(|snapshot| snapshot.state = State::Unreachable);
    }
}
