//! Freezes the guest's file systems around the point in time of a backup.
//!
//! Never without a guard that thaws them if this process does not. Freezes of other tools are not thawed. The frozen time
//! is counted from the agent's answer to the freeze to its answer to the thaw.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::Error;
use super::error::Stopped;
use super::guard::{Guard, Limits};
use crate::definition::Quiesce;
use crate::domain::{Domain, State};
use crate::qmp::{self, Agent};
use crate::socket::Dialer;

/// How long the agent may take to answer, but for the freeze itself.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// What QEMU's agent says of a command that it does not run at all, as that to freeze what is frozen.
const DISABLED: &str = "CommandNotFound";

/// The freeze of one backup, from what it needs to its end.
pub struct Freeze {
    domain: Arc<Domain>,
    wanted: Quiesce,
    limits: Limits,
    held: Option<Held>,
    /// Why there is none, though it was to be tried.
    problem: Option<String>,
}

/// An agent that can freeze, or has.
struct Held {
    agent: Agent,
    guard: Guard,
    /// When it answered that it has.
    since: Instant,
}

/// How a freeze ended.
pub struct Thawed {
    /// How long it lasted, as far as is known.
    pub frozen: Duration,
    /// Whether the file systems were frozen at the backup's point in time. An error where that is required.
    pub quiesced: Result<bool, Error>,
    /// Why not, though it was to be tried.
    pub problem: Option<String>,
}

impl Freeze {
    /// Reaches the agent and posts a guard, if the plan wants a freeze. Nothing is frozen yet.
    pub async fn prepare(
        domain: &Arc<Domain>,
        wanted: Option<Quiesce>,
        limits: Limits,
    ) -> Result<Self, Error> {
        let mut freeze = Self {
            domain: domain.clone(),
            wanted: wanted.unwrap_or(Quiesce::No),
            limits,
            held: None,
            problem: None,
        };
        if freeze.wanted != Quiesce::No {
            match prepare(domain, limits).await {
                Ok(held) => freeze.held = Some(held),
                Err(why) => freeze.fail(why)?,
            }
        }
        Ok(freeze)
    }

    /// Whether the guest may be frozen from here on.
    pub fn may_freeze(&self) -> bool {
        self.held.is_some()
    }

    /// Freezes. Where that is only to be tried, a failure is logged and survived.
    pub async fn begin(&mut self, cancel: &CancellationToken) -> Result<(), Stopped> {
        let Some(mut held) = self.held.take() else {
            return Ok(());
        };
        held.guard.freezing();
        let frozen = cancel
            .run_until_cancelled(held.agent.freeze(self.limits.wait))
            .await;
        held.since = Instant::now();
        let why = match &frozen {
            Some(Ok(count)) if *count > 0 => {
                held.guard.frozen();
                tracing::info!(domain = self.domain.name, count, "file systems are frozen");
                self.held = Some(held);
                return Ok(());
            }
            Some(Ok(_)) => "the agent froze none".to_owned(),
            Some(Err(error)) => error.to_string(),
            None => "the backup was cancelled".to_owned(),
        };
        match &frozen {
            Some(Err(qmp::Error::Refused { class, .. })) if class == DISABLED => held.guard.dismiss().await,
            // It may have frozen some, or all and only the answer is missing. Thawed ones stay thawed.
            _ => drop(held.thaw(&self.domain).await),
        }
        if frozen.is_none() {
            return Err(Stopped::Cancelled);
        }
        Ok(self.fail(why)?)
    }

    /// The result of what makes the backup's point in time; nothing if the freeze must end before.
    pub async fn during<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        match &self.held {
            Some(held) => {
                let until = held.since + self.limits.frozen;
                tokio::time::timeout_at(until.into(), work).await.ok()
            }
            None => Some(work.await),
        }
    }

    /// Thaws. `in_time`: the point in time has been. A failure is logged, for the guest's sake.
    pub async fn end(mut self, in_time: bool) -> Thawed {
        let Some(held) = self.held.take() else {
            return Thawed {
                frozen: Duration::ZERO,
                quiesced: Ok(false),
                problem: self.problem,
            };
        };
        let (frozen, thawed) = held.thaw(&self.domain).await;
        let why = match thawed {
            Ok(()) if in_time => {
                tracing::info!(domain = self.domain.name, ?frozen, "file systems are thawed");
                return Thawed {
                    frozen,
                    quiesced: Ok(true),
                    problem: None,
                };
            }
            Ok(()) => {
                let longest = self.limits.frozen;
                format!("QEMU did not begin within {longest:?} ('freeze-seconds' in the configuration)")
            }
            Err(why) => why,
        };
        Thawed {
            frozen,
            quiesced: self.fail(why).map(|()| false),
            problem: self.problem,
        }
    }

    /// Takes note of why the guest is not quiesced: an error where it has to be.
    fn fail(&mut self, why: String) -> Result<(), Error> {
        tracing::warn!(
            domain = self.domain.name,
            why,
            "the guest's file systems are not frozen at the backup's point in time, as far as is known"
        );
        match self.wanted {
            Quiesce::Require => Err(Error::Quiesce(why)),
            Quiesce::Try | Quiesce::No => {
                self.problem = Some(one_line(&why));
                Ok(())
            }
        }
    }
}

/// The agent's words can be whatever the guest likes; the manifest keeps them.
fn one_line(why: &str) -> String {
    let printable = why.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c });
    printable.take(512).collect()
}

impl Held {
    /// Thaws, and returns how long they were frozen, and whether they were until now.
    async fn thaw(self, domain: &Domain) -> (Duration, Result<(), String>) {
        let Self {
            mut agent,
            mut guard,
            since,
        } = self;
        let late = guard.has_acted();
        if late {
            guard.done().await;
        } else {
            guard.stand_back();
        }
        let thawed = agent.thaw().await;
        let frozen = since.elapsed();
        let early = late || guard.has_acted();
        let thawed = match thawed {
            Ok(0) => Err("they had thawed before the instant of the backup".to_owned()),
            Ok(_) if early => Err("they may have been thawed before, by their guard".to_owned()),
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::error!(domain = domain.name, %error, "the guest's file systems may still be frozen");
                if !error.is_refusal() {
                    // The guard goes on trying.
                    return (frozen, Err(error.to_string()));
                }
                Err(error.to_string())
            }
        };
        guard.dismiss().await;
        (frozen, thawed)
    }
}

/// Whether the guest's agent could freeze, where the backup is not made without it: asked before any target is changed.
pub async fn check(domain: &Domain, wanted: Option<Quiesce>) -> Result<(), Error> {
    match wanted {
        Some(Quiesce::Require) => connect(domain).await.map(drop).map_err(Error::Quiesce),
        Some(Quiesce::Try | Quiesce::No) | None => Ok(()),
    }
}

/// Thaws what a former process of the service may have frozen. What is thawed stays thawed. Nobody has looked at the domain
/// yet: an agent that cannot answer does not.
pub async fn thaw_again(domain: &Domain) {
    let Some(dialer) = &domain.agent else {
        return;
    };
    let thawed = async { reach(dialer, PATIENCE).await?.thaw().await };
    match thawed.await {
        Ok(count) => tracing::info!(
            domain = domain.name,
            count,
            "file systems are thawed, of a freeze of before"
        ),
        Err(error) => {
            tracing::error!(domain = domain.name, %error, "the guest's file systems may still be frozen");
        }
    }
}

/// An agent that answers.
pub(super) async fn reach(dialer: &Dialer, patience: Duration) -> qmp::Result<Agent> {
    let stream = dialer.connect(patience).await;
    let stream = stream.map_err(|error| qmp::Error::NotConnected(error.to_string().into()))?;
    Agent::open(stream, patience).await
}

async fn prepare(domain: &Domain, limits: Limits) -> Result<Held, String> {
    let (agent, dialer) = connect(domain).await?;
    let guard = Guard::post(&domain.name, dialer.address(), &agent, limits).await;
    Ok(Held {
        guard: guard.map_err(|error| format!("nobody would thaw them if the service ended: {error}"))?,
        agent,
        since: Instant::now(),
    })
}

/// An agent that answers, and whose file systems are thawed.
async fn connect(domain: &Domain) -> Result<(Agent, &Dialer), String> {
    let dialer = domain
        .agent
        .as_ref()
        .ok_or("no guest agent is configured for the domain")?;
    let state = domain.snapshot().state;
    if state != State::Running {
        let state = state.as_str();
        return Err(format!("the domain is {state}: its agent cannot answer"));
    }
    let mut agent = reach(dialer, PATIENCE).await.map_err(|error| error.to_string())?;
    match agent.is_frozen().await {
        Ok(false) => Ok((agent, dialer)),
        Ok(true) => Err("they are frozen already, not by this backup, and stay so".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
