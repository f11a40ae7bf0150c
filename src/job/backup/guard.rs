//! The guard: a separate process that thaws a guest if the service that froze it dies or hangs.
//!
//! The service starts the guard (its own program in another mode) before it freezes. The guard inherits the service's
//! connection to the agent, for two reasons: QEMU serves one client at a time, and the path may belong to another agent
//! later. It thaws the guest when the service dies or exceeds a limit, and exits. A guest stays frozen only if both
//! processes die at once; then the next instance of the service thaws it first. Before the service begins to freeze,
//! the guard thaws nothing, because such a freeze belongs to another tool.
//!
//! Knows the agent and the service's end of the connection. Must not know jobs, domains or the bus.

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

use super::agent::{PATIENCE, reach};
use crate::qmp::{self, Agent};
use crate::socket::{Address, Dialer, Purpose};

/// The command line option that starts the guard.
pub const SWITCH: &str = "thaw-guard";

/// How long a guard may take to start, and to exit.
const START: Duration = Duration::from_secs(5);
const END: Duration = Duration::from_secs(2);
/// The guard's limits are this much longer than the service's, so that the service acts first.
const GRACE: Duration = Duration::from_secs(1);
/// How long the guard tries to thaw, and how often it reconnects after the agent closed the connection.
const LONGEST: Duration = Duration::from_secs(15);
const TRIES: usize = 3;
const PAUSE: Duration = Duration::from_secs(1);

/// The one-byte messages between service and guard that follow the first line.
const READY: u8 = b'r';
const FREEZING: u8 = b'f';
const FROZEN: u8 = b'z';
const THAWING: u8 = b't';
const DONE: u8 = b'd';
const ACTED: u8 = b'a';

/// The parameters of a guard. They are not arguments, because other users can read those.
#[derive(Serialize, Deserialize)]
struct Orders {
    domain: String,
    agent: Address,
    limits: Limits,
}

/// The limits of a freeze.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Limits {
    /// From the freeze command to the agent's answer.
    pub wait: Duration,
    /// From that answer to the thaw command.
    pub frozen: Duration,
}

/// The service's end. If it is dropped while the guest may be frozen, the guard thaws at once.
pub struct Guard {
    child: Child,
    control: UnixStream,
}

impl Guard {
    /// Starts a guard and returns when it watches. It thaws by itself shortly after the limits.
    pub async fn post(domain: &str, address: &Address, agent: &Agent, limits: Limits) -> io::Result<Self> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        // The running program, even if its file was replaced by a newer version.
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
            // Keeps signals of the terminal away from the guard.
            .process_group(0);
        let child = guard.spawn()?;
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

    /// The service is about to send the freeze command, so the guest may be frozen from now on.
    pub fn freezing(&self) {
        self.say(FREEZING);
    }

    /// The agent has confirmed the freeze.
    pub fn frozen(&self) {
        self.say(FROZEN);
    }

    /// The service thaws now. The guard acts only if the service dies or takes much longer.
    pub fn stand_back(&self) {
        self.say(THAWING);
    }

    /// Returns whether the guard has thawed the guest or ended. The file systems may then be thawed already.
    pub fn has_acted(&self) -> bool {
        // Reads from the socket itself, because the runtime may not have noticed the data yet.
        let heard = recv(&self.control, &mut [0; 1], RecvFlags::DONTWAIT);
        heard.map(|_| ()) != Err(Errno::AGAIN)
    }

    /// The file systems are thawed. Returns when the guard has closed the agent's connection.
    pub async fn dismiss(mut self) {
        self.say(DONE);
        self.ended(END).await;
    }

    /// Waits until a guard that acts has finished. Two clients of one agent at the same time would read each other's
    /// answers.
    pub async fn done(&mut self) {
        self.ended(LONGEST + END).await;
    }

    async fn ended(&mut self, patience: Duration) {
        if timeout(patience, self.child.wait()).await.is_err() {
            tracing::warn!("the guard of a frozen guest does not exit");
        }
    }

    fn say(&self, word: u8) {
        // The socket's buffer has room for one byte, and a dead guard needs no message.
        let _ = send(&self.control, &[word], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}

/// The main function of the guard. Its standard input is the service, its standard output the agent.
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
    // A signal that ends the service must not end the guard, because the guest would stay frozen.
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
    tracing::warn!(domain, why, "the guard thaws the guest's file systems");
    // Sent before the thaw, because a service that is only late must know. A dead service cannot receive it.
    let _ = control.write_u8(ACTED).await;
    let dialer = Dialer::new(orders.agent, Purpose::Agent);
    match timeout(patience, thaw(agent, &dialer, patience)).await {
        Ok(Ok(count)) => tracing::info!(domain, count, "file systems thawed"),
        Ok(Err(error)) => tracing::error!(domain, %error, "the guest's file systems may still be frozen"),
        Err(_) => tracing::error!(
            domain,
            "the guest's agent does not answer: its file systems may still be frozen"
        ),
    }
    Ok(())
}

/// Waits for the service. Returns the reason to thaw, and the timeout of the agent; `None` if no thaw is needed.
async fn wait(control: &mut BufReader<UnixStream>, limits: Limits) -> Option<(&'static str, Duration)> {
    // The service has sent no freeze yet: no limit applies, and its death needs no thaw.
    match control.read_u8().await {
        Ok(FREEZING) => {}
        _ => return None,
    }
    // An agent executes one command at a time, so it thaws only after it has frozen.
    let (mut deadline, mut patience) = (Instant::now() + limits.wait + GRACE, limits.wait + LONGEST);
    let why = loop {
        match timeout_at(deadline, control.read_u8()).await {
            Ok(Ok(DONE)) => return None,
            Ok(Ok(FROZEN)) => (deadline, patience) = (Instant::now() + limits.frozen + GRACE, LONGEST),
            Ok(Ok(THAWING)) => deadline = Instant::now() + PATIENCE + GRACE,
            Ok(Ok(_)) => break "the service sent an unknown message",
            Ok(Err(_)) => break "the service has died or could not thaw them",
            Err(_) => break "the service is late",
        }
    };
    Some((why, patience))
}

async fn thaw(agent: UnixStream, dialer: &Dialer, patience: Duration) -> qmp::Result<u64> {
    let mut thawed = Agent::over(agent, patience).thaw().await;
    for _ in 0..TRIES {
        // Reconnect only if the agent closed the connection. A silent agent has already received the command.
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

/// systemd sends SIGTERM to the remaining processes of a dead service, and SIGABRT to a hung one.
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
