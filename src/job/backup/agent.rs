//! Connects to the guest's agent.

use std::time::Duration;

use crate::qmp::{self, Agent};
use crate::socket::Dialer;

/// How long the agent may take to answer any command except the freeze.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Connects to the agent and checks that it answers.
pub async fn reach(dialer: &Dialer, patience: Duration) -> qmp::Result<Agent> {
    let stream = dialer.connect(patience).await;
    let stream = stream.map_err(|error| qmp::Error::NotConnected(error.to_string().into()))?;
    Agent::open(stream, patience).await
}
