//! The supervised monitor of one domain: it connects, queries QEMU, follows its events, and reconnects.

use std::collections::BTreeSet;
use std::path::PathBuf;
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
use crate::qmp::block::{JobEvent, QueryBlock, QueryNamedBlockNodes, XDebugQueryBlockGraph};
use crate::qmp::machine::{
    Cont, ObjectPropertyInfo, QomList, QueryStatus, QueryUuid, QueryVersion, VersionTriple,
};
use crate::qmp::{self, Client, Done, Driver, Event, EventsError, Feature, Schema};
use crate::quota::Quota;
use crate::socket::{self, Dialer};
use crate::text::excerpt;

/// The oldest supported QEMU: it introduced `flat` of `query-named-block-nodes`.
pub const OLDEST: &str = "5.0";

/// How long a QEMU that answers may take to list its block nodes.
const GRAPH_PATIENCE: Duration = Duration::from_secs(30);

/// The time in which the events of one burst arrive.
const BURST: Duration = Duration::from_millis(50);
/// The least time between two queries that events cause.
const QUERY_INTERVAL: Duration = Duration::from_secs(1);
/// The least time between two log entries about failed queries.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
const MAX_LOGGED: usize = 256;

/// A connected monitor.
#[derive(Debug)]
pub struct Link {
    pub client: Client,
    pub schema: Schema,
    /// The memory quota and the user that its snapshots count against, if a user registered it.
    memory: Option<(Quota, u32)>,
    /// The VM's UUID, queried once. It stays the same as long as QEMU runs.
    uuid: OnceLock<Option<Uuid>>,
    /// Descriptor sets that QEMU kept after their removal. QEMU up to version 8 does so while the VM is stopped.
    pub kept_descriptors: Mutex<BTreeSet<u64>>,
}

/// Inspects a domain's disks when its monitor has connected, before any other code can use the monitor.
pub trait OnConnect: Send + Sync {
    fn connected<'a>(
        &'a self,
        domain: &'a Domain,
        link: &'a Link,
        snapshot: &'a Snapshot,
    ) -> BoxFuture<'a, ()>;
}

/// The code to call when a monitor has connected, once it is set.
pub(super) type OnConnectSlot = watch::Sender<Option<Weak<dyn OnConnect>>>;

async fn tell_connected(slot: &OnConnectSlot, domain: &Domain, link: &Link, snapshot: &Snapshot) {
    let mut known = slot.subscribe();
    let on_connect = known.wait_for(Option::is_some).await;
    let on_connect = on_connect
        .ok()
        .and_then(|on_connect| on_connect.as_ref()?.upgrade());
    if let Some(on_connect) = on_connect {
        on_connect.connected(domain, link, snapshot).await;
    }
}

/// The state of the connection.
#[derive(Debug, Clone)]
pub enum Phase {
    /// The first try to connect has not ended.
    Connecting,
    Up(Arc<Link>),
    /// The last try failed, or the connection ended. The service tries again.
    Down {
        why: Arc<str>,
        /// No process listens at the monitor's socket, so QEMU has ended.
        gone: bool,
    },
}

/// Connects and reconnects until `stop`. Runs once for each configured domain.
pub(super) async fn supervise(
    domain: Arc<Domain>,
    monitor: Dialer,
    presence: Presence,
    slot: Arc<OnConnectSlot>,
    stop: CancellationToken,
) {
    let path = &monitor.address().path;
    let mut retry = Retry::new(&presence, path);
    let mut logged: Arc<str> = "".into();
    loop {
        // On the heap, because hundreds of idle domains would otherwise keep room for the largest state of this
        // future.
        let attempt = stop.run_until_cancelled(async {
            let (link, driver) = Box::pin(connect(&monitor)).await?;
            retry = Retry::new(&presence, path);
            Ok::<_, ConnectError>(Box::pin(serve(&domain, link, driver, &slot)).await)
        });
        let (why, after): (Arc<str>, After) = match attempt.await {
            None => return domain.down("the service is disconnecting it", false),
            Some(Ok(reason)) => (reason, After::Failure),
            Some(Err(error)) => (error.to_string().into(), error.after()),
        };
        match after == After::Refusal && logged != why {
            true => {
                tracing::warn!(domain = domain.name, why = %why, "the service does not connect to the monitor")
            }
            false => tracing::debug!(domain = domain.name, why = %why, "monitor is down"),
        }
        logged = why.clone();
        domain.down(&why, after == After::Absence);
        if stop.run_until_cancelled(retry.wait(after)).await.is_none() {
            return;
        }
    }
}

/// Serves a connection that a caller passed, until it ends or `stop`. Runs once for each registered domain.
pub(super) async fn serve_once(
    domain: Arc<Domain>,
    link: Link,
    driver: Driver,
    slot: Arc<OnConnectSlot>,
    stop: CancellationToken,
) {
    let serving = serve(&domain, link, driver, &slot);
    let ended = stop.run_until_cancelled(serving).await;
    // The service cannot connect to it again, so code that waits for it must see that it has ended.
    domain.down(
        ended.as_deref().unwrap_or("the service is disconnecting it"),
        true,
    );
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
            // QEMU serves another client first.
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
    /// Queries everything that a snapshot holds.
    pub async fn inspect(&self) -> qmp::Result<Snapshot> {
        let mut snapshot = inspect(self).await?;
        if let Some((quota, uid)) = &self.memory {
            let share = quota.take(*uid, snapshot.weight());
            let share = share.map_err(|exceeded| {
                let limit = exceeded.limit >> 20;
                qmp::Error::NotQmp(format!(
                    "the VMs that user {uid} has registered need more than {limit} MiB for their state"
                ))
            })?;
            snapshot.share = Some(Arc::new(share));
        }
        Ok(snapshot)
    }

    /// The user that registered the domain, or else the user of the process at the other end.
    pub fn user(&self) -> Option<u32> {
        let registrant = self.memory.as_ref().map(|(_, uid)| *uid);
        registrant.or_else(|| self.client.user())
    }

    /// Queries the disks only. The result does not show which disks pass the guest's commands through.
    pub async fn disks(&self) -> qmp::Result<Vec<Disk>> {
        Ok(blocks(self).await?.0)
    }

    /// Queries the run state.
    pub async fn run_state(&self) -> qmp::Result<RunState> {
        let status = self.client.execute_within(PATIENCE, QueryStatus {});
        Ok(RunState(status.await?.status))
    }

    /// Resumes the guest.
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

/// Runs the connection: queries QEMU first, then follows its events. Returns the reason of its end.
async fn serve(domain: &Domain, mut link: Link, driver: Driver, slot: &OnConnectSlot) -> Arc<str> {
    let work = async {
        let mut events = link.client.events();
        link.schema = Box::pin(schema(&link)).await?;
        Box::pin(check_version(&link)).await?;
        let first = Box::pin(link.inspect())
            .await
            .map_err(|error| error.to_string())?;
        domain.snapshot.send_modify(|snapshot| snapshot.uuid = first.uuid);
        // A on_connect that hangs does not delay the domain: the next backup meets the same problem.
        let _ = tokio::time::timeout(PATIENCE, Box::pin(tell_connected(slot, domain, &link, &first))).await;
        domain.snapshot.send_replace(first);
        let link = Arc::new(link);
        tracing::info!(domain = domain.name, "monitor is up");
        domain.phase.send_replace(Phase::Up(link.clone()));
        let (mut queried, mut logged) = (Instant::now(), None::<Instant>);
        loop {
            match events.next().await {
                Ok(event) if !changes_something(&event) => {}
                Ok(_) | Err(EventsError::Missed) => {
                    // One query covers all earlier events. The jobs of many disks end at once, and a peer can send
                    // any number of events.
                    let next = (queried + QUERY_INTERVAL).max(Instant::now() + BURST);
                    tokio::time::sleep_until(next).await;
                    while events.next_now().is_some() {}
                    queried = Instant::now();
                    match Box::pin(link.inspect()).await {
                        Ok(fresh) => drop(domain.snapshot.send_replace(fresh)),
                        // A peer can cause any number of failures, with texts of its own.
                        Err(error) if logged.is_none_or(|last| last.elapsed() >= LOG_INTERVAL) => {
                            let error = excerpt(&error.to_string(), MAX_LOGGED);
                            tracing::warn!(domain = domain.name, error, "the domain's state is unknown");
                            logged = Some(Instant::now());
                        }
                        Err(_) => {}
                    }
                }
                Err(EventsError::Closed) => return Err::<std::convert::Infallible, String>("closed".into()),
            }
        }
    };
    tokio::select! {
        // The driver knows why the connection ended; the work only sees that it did.
        biased;
        reason = driver.run() => reason,
        Err(reason) = work => reason.into(),
    }
}

/// Queries the QMP schema. Each QEMU is queried, because a false reply then concerns only its own domain.
async fn schema(link: &Link) -> Result<Schema, String> {
    let asked = tokio::time::timeout(PATIENCE, link.client.schema()).await;
    asked
        .map_err(|_| "it did not describe itself in time".to_owned())?
        .map_err(|error| error.to_string())
}

/// Checks the version: without `flat`, QEMU cannot list its disks.
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

/// Whether the state or the disks may have changed after this event (`qapi/run-state.json`, `qapi/qdev.json`, …).
fn changes_something(event: &Event) -> bool {
    match JobEvent::of(event) {
        // The service's own jobs, and backups of any client, do not change the disks.
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

    /// Whether QEMU paused the guest because one of its I/O requests failed (`werror`, `rerror` of a device). QEMU
    /// repeats the request when the guest resumes.
    pub fn is_io_error(&self) -> bool {
        self.0 == "io-error"
    }

    /// The migration phase in which another QEMU owns the disks, or is about to.
    pub fn migration(&self) -> Option<Migration> {
        Migration::from_run_state(&self.0)
    }
}

async fn inspect(link: &Link) -> qmp::Result<Snapshot> {
    let client = &link.client;
    let (uuid, status) = tokio::try_join!(link.uuid(), client.execute_within(PATIENCE, QueryStatus {}),)?;
    let (mut disks, files) = blocks(link).await?;
    let devices = Devices::of([
        (outside::PERIPHERAL, devices(client, outside::PERIPHERAL).await?),
        (outside::ANONYMOUS, devices(client, outside::ANONYMOUS).await?),
    ]);
    for disk in &mut disks {
        disk.passed_through = devices.passed_through(&disk.device);
    }
    Ok(Snapshot {
        uuid,
        reached: true,
        state: State::from_run_state(&status.status),
        migration: Migration::from_run_state(&status.status),
        disks: disks.into(),
        outside: devices.outside().into(),
        files: files.into(),
        share: None,
    })
}

/// Queries QEMU's block layer, and returns the disks and the host's files below all nodes. A peer may take long to
/// reply to later commands, so the replies are not kept.
async fn blocks(link: &Link) -> qmp::Result<(Vec<Disk>, Vec<PathBuf>)> {
    let client = &link.client;
    // One query after another: with thousands of nodes each takes a while, and every reply is progress.
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
    let graph = Graph::of(&nodes, edges.as_ref());
    let disks = graph.and_then(|graph| disks::disks(drives, &graph));
    let disks = disks.ok_or_else(|| qmp::Error::NotQmp("it reports disks that no QEMU has".into()))?;
    Ok((disks, graph::host_files(&nodes)))
}

async fn devices(client: &Client, path: &str) -> qmp::Result<Vec<ObjectPropertyInfo>> {
    Ok(client.execute_within(PATIENCE, QomList { path }).await?.into())
}

impl Domain {
    fn down(&self, why: &str, gone: bool) {
        let why = why.into();
        self.phase.send_replace(Phase::Down { why, gone });
        self.snapshot
            .send_modify(|snapshot| snapshot.state = State::Unreachable);
    }
}
