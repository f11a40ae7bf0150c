//! Freezes the guest's file systems around the point in time of a backup.
//!
//! The service never freezes without a guard that thaws if this process does not. It does not thaw freezes of other
//! tools. The frozen time is counted from the agent's answer to the freeze until its answer to the thaw.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::agent::{PATIENCE, reach};
use super::guard::{Guard, Limits};
use crate::definition::Quiesce;
use crate::domain::{Domain, State};
use crate::job::Error;
use crate::job::error::Stopped;
use crate::qmp::{self, Agent};
use crate::socket::Dialer;

/// The error class of the agent for a disabled command, such as a second freeze while frozen.
const DISABLED: &str = "CommandNotFound";

/// The freeze of one backup, from its preparation to its end.
pub struct Freeze {
    domain: Arc<Domain>,
    wanted: Quiesce,
    limits: Limits,
    held: Option<Held>,
    /// Why the guest is not frozen although the request was to try it.
    problem: Option<String>,
}

/// A connected agent and its guard.
struct Held {
    agent: Agent,
    guard: Guard,
    /// When the agent confirmed the freeze.
    since: Instant,
}

/// The result of a freeze.
pub struct Thawed {
    /// How long it lasted, as far as the service knows.
    pub frozen: Duration,
    /// Whether the file systems were frozen at the backup's point in time. An error if the request requires that.
    pub quiesced: Result<bool, Error>,
    /// Why they were not, although the request was to try it.
    pub problem: Option<String>,
}

impl Freeze {
    /// Connects to the agent and starts a guard if the plan requests a freeze. Freezes nothing yet.
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

    /// Returns whether `begin` may freeze the guest.
    pub fn may_freeze(&self) -> bool {
        self.held.is_some()
    }

    /// Freezes the guest. If the request was only to try it, a failure is logged and is not an error.
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
                tracing::info!(domain = self.domain.name, count, "file systems frozen");
                self.held = Some(held);
                return Ok(());
            }
            Some(Ok(_)) => "the agent froze no file system".to_owned(),
            Some(Err(error)) => error.to_string(),
            None => "the backup was cancelled".to_owned(),
        };
        match &frozen {
            Some(Err(qmp::Error::Refused { class, .. })) if class == DISABLED => held.guard.dismiss().await,
            // The agent may have frozen some file systems, or all of them without an answer. Thawing twice is harmless.
            _ => drop(held.thaw(&self.domain).await),
        }
        if frozen.is_none() {
            return Err(Stopped::Cancelled);
        }
        Ok(self.fail(why)?)
    }

    /// Returns the result of `work`, which makes the backup's point in time. Returns `None` if the freeze must end
    /// before.
    pub async fn during<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        match &self.held {
            Some(held) => {
                let until = held.since + self.limits.frozen;
                tokio::time::timeout_at(until.into(), work).await.ok()
            }
            None => Some(work.await),
        }
    }

    /// Thaws the guest. `in_time`: the point in time has passed. Failures are logged in any case.
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
                tracing::info!(domain = self.domain.name, ?frozen, "file systems thawed");
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

    /// Records why the guest is not quiesced. Returns an error if the request requires it.
    fn fail(&mut self, why: String) -> Result<(), Error> {
        tracing::warn!(
            domain = self.domain.name,
            why,
            "the guest's file systems may not have been frozen at the backup's point in time"
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

/// Replaces control characters and truncates, because the guest chooses the agent's error text and the manifest stores
/// it.
fn one_line(why: &str) -> String {
    let printable = why.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c });
    printable.take(512).collect()
}

impl Held {
    /// Thaws the guest. Returns how long the file systems were frozen, and an error if they may have thawed before.
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
            Ok(0) => Err("they had thawed before the backup's point in time".to_owned()),
            Ok(_) if early => Err("the guard may have thawed them too early".to_owned()),
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::error!(domain = domain.name, %error, "the guest's file systems may still be frozen");
                if !error.is_refusal() {
                    // The guard continues to try.
                    return (frozen, Err(error.to_string()));
                }
                Err(error.to_string())
            }
        };
        guard.dismiss().await;
        (frozen, thawed)
    }
}

/// Fails if the request requires a freeze and the agent cannot freeze. The caller calls this before it changes any
/// target.
pub async fn check(domain: &Domain, wanted: Option<Quiesce>) -> Result<(), Error> {
    match wanted {
        Some(Quiesce::Require) => connect(domain).await.map(drop).map_err(Error::Quiesce),
        Some(Quiesce::Try | Quiesce::No) | None => Ok(()),
    }
}

/// Thaws a guest that an earlier instance of the service may have frozen; thawing twice is harmless. The state of the
/// domain is not known yet, so the agent may be unable to answer.
pub async fn thaw_again(domain: &Domain) {
    let Some(dialer) = &domain.agent else {
        return;
    };
    let thawed = async { reach(dialer, PATIENCE).await?.thaw().await };
    match thawed.await {
        Ok(count) => tracing::info!(
            domain = domain.name,
            count,
            "thawed file systems that an earlier instance of the service had frozen"
        ),
        Err(error) => {
            tracing::error!(domain = domain.name, %error, "the guest's file systems may still be frozen");
        }
    }
}

async fn prepare(domain: &Domain, limits: Limits) -> Result<Held, String> {
    let (agent, dialer) = connect(domain).await?;
    let guard = Guard::post(&domain.name, dialer.address(), &agent, limits).await;
    Ok(Held {
        guard: guard.map_err(|error| format!("cannot start the guard that would thaw them: {error}"))?,
        agent,
        since: Instant::now(),
    })
}

/// Connects to the agent, and fails if the file systems are frozen already.
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
        Ok(true) => Err("another tool has frozen them".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
