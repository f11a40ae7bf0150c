//! The guard: a separate process that thaws a guest if the service that froze it dies or hangs.
//!
//! The service starts it before it freezes: its own program, in another mode. It gets the service's own connection to the
//! agent: the path may be another agent's by then, and QEMU serves one client at
//! a time. It thaws when the service is gone or late, and ends. Only the end of both processes at once keeps a guest
//! frozen, and then the next service thaws first of all. Before the service begins to freeze, it thaws nothing: such a freeze
//! is another tool's.
//!
//! Knows the agent and the service's end of it; nothing of jobs, domains or the bus.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, timeout, timeout_at};

use super::quiesce::{PATIENCE, reach};
use crate::image;
use crate::qmp::{self, Agent};
use crate::socket::{Address, Dialer, Purpose};

/// The switch of the program that makes it a guard.
pub const SWITCH: &str = "thaw-guard";

/// How long a guard may take to be there, and to leave.
const START: Duration = Duration::from_secs(5);
const END: Duration = Duration::from_secs(2);
/// Its watch ends so much later than the service's does: the service comes first.
const GRACE: Duration = Duration::from_secs(1);
/// How long it tries, and how often to connect again where the agent hung up.
const LONGEST: Duration = Duration::from_secs(15);
const TRIES: usize = 3;
const PAUSE: Duration = Duration::from_secs(1);

/// What the two say to each other after the first line.
const READY: u8 = b'r';
const FREEZING: u8 = b'f';
const FROZEN: u8 = b'z';
const THAWING: u8 = b't';
const DONE: u8 = b'd';
const ACTED: u8 = b'a';

/// The orders to a guard. Not in its arguments, which other users can read.
#[derive(Serialize, Deserialize)]
struct Orders {
    domain: String,
    agent: Address,
    limits: Limits,
}

/// How long a freeze may take, at most.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Limits {
    /// From the freeze command to the agent's answer.
    pub wait: Duration,
    /// From then on, until the thaw command.
    pub frozen: Duration,
}

/// The service's end. Dropped, the guard thaws at once if the guest may be frozen.
pub struct Guard {
    child: Child,
    control: UnixStream,
}

impl Guard {
    /// Returns when the guard watches; it thaws by itself a little after the limits.
    pub async fn post(domain: &str, address: &Address, agent: &Agent, limits: Limits) -> io::Result<Self> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        // The very program that runs, though a newer one may have its name.
        let log = ["RUST_LOG", "JOURNAL_STREAM"].into_iter();
        let log = log.filter_map(|name| std::env::var_os(name).map(|value| (name, value)));
        let mut guard = Command::new("/proc/self/exe");
        guard
            .arg0("backupd")
            .arg(format!("--{SWITCH}"))
            .env_clear()
            .envs(log)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(agent.duplicate()?))
            // Not in the way of a terminal's signals.
            .process_group(0);
        let child = image::start_alone(|| guard.spawn())?;
        let mut control = UnixStream::from_std(ours)?;
        let mut orders = serde_json::to_vec(&Orders {
            domain: domain.to_owned(),
            agent: address.clone(),
            limits,
        })?;
        orders.push(b'\n');
        let begin = async {
            control.write_all(&orders).await?;
            control.read_u8().await
        };
        match timeout(START, begin).await {
            Ok(Ok(READY)) => Ok(Self { child, control }),
            Ok(Ok(_)) => Err(ErrorKind::InvalidData.into()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ErrorKind::TimedOut.into()),
        }
    }

    /// The service is about to tell the agent to freeze: from here on the guest may be frozen.
    pub fn freezing(&self) {
        self.say(FREEZING);
    }

    /// The agent has answered that it has frozen.
    pub fn frozen(&self) {
        self.say(FROZEN);
    }

    /// The service thaws now: the guard does so too only if the service dies, or is much later.
    pub fn stand_back(&self) {
        self.say(THAWING);
    }

    /// Whether it has thawed, or ended: then nobody knows whether they are frozen still.
    pub fn has_acted(&self) -> bool {
        // As it is now, which the runtime need not have noticed yet.
        let heard = recv(&self.control, &mut [0; 1], RecvFlags::DONTWAIT);
        heard.map(|_| ()) != Err(Errno::AGAIN)
    }

    /// They are thawed. Returns when the guard has let go of the agent.
    pub async fn dismiss(mut self) {
        self.say(DONE);
        self.ended(END).await;
    }

    /// Returns when a guard that acts has done what it can: two who ask at a time take each other's answers.
    pub async fn done(&mut self) {
        self.ended(LONGEST + END).await;
    }

    async fn ended(&mut self, patience: Duration) {
        if timeout(patience, self.child.wait()).await.is_err() {
            tracing::warn!("a guard of a frozen guest does not end");
        }
    }

    fn say(&self, word: u8) {
        // There is room for it, and who is not there any more need not hear it.
        let _ = send(&self.control, &[word], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}

/// The guard's whole life. Its standard input is the service, its standard output the agent.
pub fn watch() -> ExitCode {
    let watched = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .and_then(|runtime| runtime.block_on(keep_watch()));
    match watched {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "cannot guard a frozen guest");
            ExitCode::FAILURE
        }
    }
}

async fn keep_watch() -> io::Result<()> {
    // What ends the service, or all that is left of it, is no reason to leave a guest frozen.
    let _ignored = ignore_signals()?;
    let mut control = BufReader::new(stream(io::stdin().as_fd().try_clone_to_owned()?)?);
    let agent = stream(io::stdout().as_fd().try_clone_to_owned()?)?;
    let mut orders = String::new();
    control.read_line(&mut orders).await?;
    let orders: Orders = serde_json::from_str(&orders)?;
    control.write_u8(READY).await?;
    let Some((why, patience)) = wait(&mut control, orders.limits).await else {
        return Ok(());
    };
    let domain = &orders.domain;
    tracing::warn!(domain, why, "the guest's file systems are thawed by the guard");
    // Before it is done: a service that is only late must know. One that is gone need not.
    let _ = control.write_u8(ACTED).await;
    let dialer = Dialer::new(orders.agent, Purpose::Agent);
    match timeout(patience, thaw(agent, &dialer, patience)).await {
        Ok(Ok(count)) => tracing::info!(domain, count, "file systems are thawed"),
        Ok(Err(error)) => tracing::error!(domain, %error, "the guest's file systems may still be frozen"),
        Err(_) => tracing::error!(
            domain,
            "the guest's agent does not answer: its file systems may still be frozen"
        ),
    }
    Ok(())
}

/// Why the guest is to be thawed, and how long the agent may take for that; nothing where it is not.
async fn wait(control: &mut BufReader<UnixStream>, limits: Limits) -> Option<(&'static str, Duration)> {
    // No freeze has been sent yet: the service has no timeout, and its end needs no thaw.
    match control.read_u8().await {
        Ok(FREEZING) => {}
        _ => return None,
    }
    // An agent does one thing at a time: it thaws when it has frozen.
    let (mut deadline, mut patience) = (Instant::now() + limits.wait + GRACE, limits.wait + LONGEST);
    let why = loop {
        match timeout_at(deadline, control.read_u8()).await {
            Ok(Ok(DONE)) => return None,
            Ok(Ok(FROZEN)) => (deadline, patience) = (Instant::now() + limits.frozen + GRACE, LONGEST),
            Ok(Ok(THAWING)) => deadline = Instant::now() + PATIENCE + GRACE,
            Ok(Ok(_)) => break "the service talks nonsense",
            Ok(Err(_)) => break "the service is gone, or could not thaw them",
            Err(_) => break "the service is late",
        }
    };
    Some((why, patience))
}

async fn thaw(agent: UnixStream, dialer: &Dialer, patience: Duration) -> qmp::Result<u64> {
    let mut thawed = Agent::over(agent, patience).thaw().await;
    for _ in 0..TRIES {
        // Only who hung up can be there again; who is silent has been told.
        if !matches!(thawed, Err(qmp::Error::Closed(_) | qmp::Error::NotConnected(_))) {
            break;
        }
        tokio::time::sleep(PAUSE).await;
        thawed = match reach(dialer, LONGEST).await {
            Ok(mut agent) => agent.thaw().await,
            Err(error) => Err(error),
        };
    }
    thawed
}

/// SIGTERM is what systemd sends to what a dead service left, SIGABRT what it sends when the service is stuck.
fn ignore_signals() -> io::Result<Vec<Signal>> {
    const SIGABRT: i32 = 6;
    let kinds = [
        SignalKind::hangup(),
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::from_raw(SIGABRT),
    ];
    kinds.into_iter().map(signal).collect()
}

fn stream(descriptor: OwnedFd) -> io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(descriptor);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}
