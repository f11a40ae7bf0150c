//! The guest agent's protocol: QMP's lines without a greeting, events or ids, on a socket of its own.
//!
//! Only what a backup needs of it. Source of the rules: QEMU's `qga/qapi-schema.json`.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::client::read_line;
use super::message::{Refusal, parse};
use super::wire::Wire;
use super::{Error, Result};

/// An agent that answered just now. The guest's file systems thaw when it is told so, not when this is dropped.
pub struct Agent {
    wire: Wire,
    patience: Duration,
}

impl Agent {
    /// Connects, and waits until the agent answers; `patience` bounds this and each later command.
    pub async fn connect(path: &Path, patience: Duration) -> Result<Self> {
        let stream = tokio::time::timeout(patience, UnixStream::connect(path)).await;
        let stream = stream
            .unwrap_or(Err(std::io::ErrorKind::TimedOut.into()))
            .map_err(|error| Error::Closed(format!("{}: {error}", path.display()).into()))?;
        let mut agent = Self {
            wire: Wire::new(stream),
            patience,
        };
        agent.synchronise().await?;
        Ok(agent)
    }

    /// Freezes the guest's file systems; gives how many.
    pub async fn freeze(&mut self) -> Result<u64> {
        self.count("guest-fsfreeze-freeze").await
    }

    /// Thaws them; gives how many.
    pub async fn thaw(&mut self) -> Result<u64> {
        self.count("guest-fsfreeze-thaw").await
    }

    /// What an earlier client left unread is not taken for an answer to this one.
    async fn synchronise(&mut self) -> Result<()> {
        // Fits into the signed number that the agent reads.
        let token = uuid::Uuid::new_v4().as_u64_pair().0 >> 1;
        let arguments = json!({ "id": token });
        let mut line = vec![0xff];
        line.extend_from_slice(
            json!({ "execute": "guest-sync-delimited", "arguments": arguments })
                .to_string()
                .as_bytes(),
        );
        line.push(b'\n');
        self.wire.queue(0, line, None);
        let wire = &mut self.wire;
        bounded("guest-sync-delimited", self.patience, async {
            loop {
                let reply = answer(wire).await?;
                if reply.get("return").and_then(Value::as_u64) == Some(token) {
                    return Ok(());
                }
            }
        })
        .await
    }

    async fn count(&mut self, command: &'static str) -> Result<u64> {
        self.wire.queue(
            0,
            format!("{}\n", json!({ "execute": command })).into_bytes(),
            None,
        );
        let reply = bounded(command, self.patience, answer(&mut self.wire)).await?;
        match (reply.get("return").and_then(Value::as_u64), reply.get("error")) {
            (Some(count), _) => Ok(count),
            (None, Some(error)) => {
                let word = |key| error[key].as_str().unwrap_or_default();
                Err(Refusal::new(word("class"), word("desc")).of(command))
            }
            (None, None) => Err(Error::UnexpectedReply {
                command: command.to_owned(),
                detail: "no number".into(),
            }),
        }
    }
}

async fn answer(wire: &mut Wire) -> Result<Value> {
    let line = read_line(wire).await?;
    // The agent puts this byte, which is in no JSON, before the answer to guest-sync-delimited.
    let start = line
        .iter()
        .rposition(|byte| *byte == 0xff)
        .map_or(0, |sentinel| sentinel + 1);
    if line[start..].is_empty() {
        Ok(Value::Null)
    } else {
        parse(&line[start..])
    }
}

async fn bounded<T>(
    command: &'static str,
    after: Duration,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::time::timeout(after, work).await.unwrap_or_else(|_| {
        Err(Error::TimedOut {
            command: command.to_owned(),
            after,
        })
    })
}
