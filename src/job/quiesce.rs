//! Freezing the guest's file systems around the instant of a backup.

use std::time::Duration;

use super::Error;
use crate::definition::Quiesce;
use crate::domain::{Domain, State};
use crate::qmp::Agent;

/// How long the agent may take to answer. A guest flushes its caches when it freezes.
const PATIENCE: Duration = Duration::from_secs(10);

/// File systems that are frozen, or the knowledge that none are.
pub struct Frozen(Option<Agent>);

impl Frozen {
    /// Freezes as the plan wants it. Where it only wants it tried, a failure is logged and survived.
    pub async fn freeze(domain: &Domain, wanted: Option<Quiesce>) -> Result<Self, Error> {
        let Some(wanted) = wanted else {
            return Ok(Self(None));
        };
        match freeze(domain).await {
            Ok(agent) => Ok(Self(Some(agent))),
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

    /// Thaws, after the backup's instant, and says whether they were frozen until now. A failure is logged, for the
    /// guest's sake.
    pub async fn thaw(self, domain: &Domain, wanted: Option<Quiesce>) -> Result<bool, Error> {
        let Some(mut agent) = self.0 else {
            return Ok(false);
        };
        let why = match agent.thaw().await {
            Ok(0) => "they had thawed before the instant of the backup".to_owned(),
            Ok(_) => return Ok(true),
            Err(error) => {
                tracing::error!(domain = domain.name, %error, "the guest's file systems may still be frozen");
                error.to_string()
            }
        };
        match wanted {
            Some(Quiesce::Require) => Err(Error::Quiesce(why)),
            Some(Quiesce::Try) | None => Ok(false),
        }
    }
}

/// Whether the guest's agent answers, where the backup is not made without it: asked before any target is changed.
pub async fn check(domain: &Domain, wanted: Option<Quiesce>) -> Result<(), Error> {
    match wanted {
        Some(Quiesce::Require) => connect(domain).await.map(drop).map_err(Error::Quiesce),
        Some(Quiesce::Try) | None => Ok(()),
    }
}

/// Thaws what a former process of the service may have frozen. What is thawed stays thawed.
pub async fn thaw_again(domain: &Domain) {
    if let Ok(mut agent) = connect(domain).await
        && let Err(error) = agent.thaw().await
    {
        tracing::error!(domain = domain.name, %error, "the guest's file systems may still be frozen");
    }
}

async fn connect(domain: &Domain) -> Result<Agent, String> {
    let path = domain
        .agent
        .as_deref()
        .ok_or("no guest agent is configured for the domain")?;
    let state = domain.snapshot().state;
    if state != State::Running {
        let state = state.as_str();
        return Err(format!("the domain is {state}: its agent cannot answer"));
    }
    Agent::connect(path, PATIENCE)
        .await
        .map_err(|error| error.to_string())
}

async fn freeze(domain: &Domain) -> Result<Agent, String> {
    let mut agent = connect(domain).await?;
    let why = match agent.freeze().await {
        Ok(0) => "the agent froze none".to_owned(),
        Ok(count) => {
            tracing::info!(domain = domain.name, count, "file systems are frozen");
            return Ok(agent);
        }
        Err(error) => error.to_string(),
    };
    // It may have frozen some, or all and only the answer is missing. Thawed ones stay thawed.
    let _ = agent.thaw().await;
    Err(why)
}
