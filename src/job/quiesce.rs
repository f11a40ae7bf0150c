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

    pub fn is_frozen(&self) -> bool {
        self.0.is_some()
    }

    /// Thaws. The backup's instant has passed or will not come: a failure is logged, for the guest's sake.
    pub async fn thaw(self, domain: &Domain) {
        let Some(mut agent) = self.0 else { return };
        if let Err(error) = agent.thaw().await {
            tracing::error!(domain = domain.name, %error, "the guest's file systems may still be frozen");
        }
    }
}

async fn freeze(domain: &Domain) -> Result<Agent, String> {
    let path = domain
        .agent
        .as_deref()
        .ok_or("no guest agent is configured for the domain")?;
    let state = domain.snapshot().state;
    if state != State::Running {
        return Err(format!(
            "the domain is {}: its agent cannot answer",
            state.as_str()
        ));
    }
    let mut agent = Agent::connect(path, PATIENCE)
        .await
        .map_err(|error| error.to_string())?;
    match agent.freeze().await {
        Ok(count) => {
            tracing::info!(domain = domain.name, count, "file systems are frozen");
            Ok(agent)
        }
        Err(error) => {
            // It may have frozen some, or all and only the answer is missing. Thawed ones stay thawed.
            let _ = agent.thaw().await;
            Err(error.to_string())
        }
    }
}
