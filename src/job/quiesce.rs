//! Freezing the guest's file systems around the instant of a backup.
//!
//! Never without a guard that thaws them if this process does not. How long they were frozen is counted from when the agent
//! was told to freeze to its answer that they are thawed: the guest cannot write longer than that.

use std::path::Path;
use std::time::{Duration, Instant};

use super::Error;
use super::guard::Guard;
use crate::definition::Quiesce;
use crate::domain::{Domain, State};
use crate::qmp::Agent;

/// How long the agent may take to answer, but for the freeze itself.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// File systems that are frozen, or the knowledge that none are.
pub struct Frozen(Option<Held>);

struct Held {
    agent: Agent,
    guard: Guard,
    since: Instant,
    until: Instant,
}

/// How a freeze ended.
pub struct Thawed {
    /// How long it lasted, as far as is known.
    pub frozen: Duration,
    /// Whether the file systems were frozen at the instant of the backup.
    pub quiesced: Result<bool, Error>,
}

impl Frozen {
    /// Freezes as the plan wants it, for so long at most. Where it only wants it tried, a failure is logged and survived.
    pub async fn freeze(domain: &Domain, wanted: Option<Quiesce>, longest: Duration) -> Result<Self, Error> {
        let Some(wanted) = wanted.filter(|wanted| *wanted != Quiesce::No) else {
            return Ok(Self(None));
        };
        match freeze(domain, longest).await {
            Ok(held) => Ok(Self(Some(held))),
            Err(why) if wanted == Quiesce::Try => {
                tracing::warn!(
                    domain = domain.name,
                    why,
                    "the backup is made without freezing the guest's file systems"
                );
                Ok(Self(None))
            }
            Err(why) => Err(Error::Quiesce(why)),
        }
    }

    /// The result of what makes the instant of the backup; nothing if the freeze must end before.
    pub async fn during<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        match &self.0 {
            Some(held) => tokio::time::timeout_at(held.until.into(), work).await.ok(),
            None => Some(work.await),
        }
    }

    /// Thaws. `in_time`: the instant of the backup has been. A failure is logged, for the guest's sake.
    pub async fn thaw(self, domain: &Domain, wanted: Option<Quiesce>, in_time: bool) -> Thawed {
        let Some(held) = self.0 else {
            return Thawed {
                frozen: Duration::ZERO,
                quiesced: Ok(false),
            };
        };
        let longest = held.until - held.since;
        let (frozen, thawed) = held.thaw(domain).await;
        let why = match thawed {
            Ok(()) if in_time => {
                tracing::info!(domain = domain.name, ?frozen, "file systems are thawed");
                return Thawed {
                    frozen,
                    quiesced: Ok(true),
                };
            }
            Ok(()) => {
                format!("QEMU did not begin within {longest:?} ('freeze-seconds' in the configuration)")
            }
            Err(why) => why,
        };
        tracing::warn!(
            domain = domain.name,
            why,
            ?frozen,
            "the guest's file systems were not frozen at the backup's instant, as far as is known"
        );
        Thawed {
            frozen,
            quiesced: match wanted {
                Some(Quiesce::Require) => Err(Error::Quiesce(why)),
                Some(Quiesce::Try | Quiesce::No) | None => Ok(false),
            },
        }
    }
}

impl Held {
    /// Thaws, and says how long they were frozen, and whether they were until now.
    async fn thaw(self, domain: &Domain) -> (Duration, Result<(), String>) {
        let Self {
            mut agent,
            mut guard,
            since,
            ..
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

/// Whether the guest's agent answers, where the backup is not made without it: asked before any target is changed.
pub async fn check(domain: &Domain, wanted: Option<Quiesce>) -> Result<(), Error> {
    match wanted {
        Some(Quiesce::Require) => connect(domain).await.map(drop).map_err(Error::Quiesce),
        Some(Quiesce::Try | Quiesce::No) | None => Ok(()),
    }
}

/// Whether there is a time at which a backup has the guest frozen.
pub fn may_freeze(wanted: Option<Quiesce>) -> bool {
    matches!(wanted, Some(Quiesce::Try | Quiesce::Require))
}

/// Thaws what a former process of the service may have frozen. What is thawed stays thawed. Nobody has looked at the domain
/// yet: an agent that cannot answer does not.
pub async fn thaw_again(domain: &Domain) {
    let Some(path) = domain.agent.as_deref() else {
        return;
    };
    let thawed = async { Agent::connect(path, PATIENCE).await?.thaw().await };
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

async fn connect(domain: &Domain) -> Result<(Agent, &Path), String> {
    let path = domain
        .agent
        .as_deref()
        .ok_or("no guest agent is configured for the domain")?;
    let state = domain.snapshot().state;
    if state != State::Running {
        let state = state.as_str();
        return Err(format!("the domain is {state}: its agent cannot answer"));
    }
    let agent = Agent::connect(path, PATIENCE).await;
    agent
        .map(|agent| (agent, path))
        .map_err(|error| error.to_string())
}

async fn freeze(domain: &Domain, longest: Duration) -> Result<Held, String> {
    let (mut agent, path) = connect(domain).await?;
    let guard = Guard::post(&domain.name, path, &agent, longest).await;
    let guard = guard.map_err(|error| format!("nobody would thaw them if the service ended: {error}"))?;
    let since = Instant::now();
    let frozen = agent.freeze(longest).await;
    let held = Held {
        agent,
        guard,
        since,
        until: since + longest,
    };
    let why = match frozen {
        Ok(0) => "the agent froze none".to_owned(),
        Ok(count) => {
            tracing::info!(domain = domain.name, count, "file systems are frozen");
            return Ok(held);
        }
        Err(error) => error.to_string(),
    };
    // It may have frozen some, or all and only the answer is missing. Thawed ones stay thawed.
    let _ = held.thaw(domain).await;
    Err(why)
}
