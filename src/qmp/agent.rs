//! The guest agent's protocol: QMP's lines, without greeting, events or ids, on a separate socket.
//!
//! Has only the commands that a backup needs. Source of the rules: QEMU's `qga/qapi-schema.json`.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::connection::read_line;
use super::message::{Refusal, parse};
use super::wire::{MAX_LINE, Wire};
use super::{Error, Result};

const SYNC: &str = "guest-sync-delimited";
const STATUS: &str = "guest-fsfreeze-status";
const FREEZE: &str = "guest-fsfreeze-freeze";
const THAW: &str = "guest-fsfreeze-thaw";

/// A connection to a guest agent. Dropping it does not thaw the guest's file systems; only the thaw command does.
pub struct Agent {
    wire: Wire,
    patience: Duration,
}

impl Agent {
    /// Waits until the agent answers on a new connection. `patience` bounds this and each later command.
    pub async fn open(stream: UnixStream, patience: Duration) -> Result<Self> {
        let mut agent = Self::over(stream, patience);
        let token = agent.queue_sync();
        bounded(SYNC, patience, agent.synchronise(token)).await?;
        Ok(agent)
    }

    /// Uses a connection on which another client may have sent commands before.
    pub fn over(stream: UnixStream, patience: Duration) -> Self {
        Self {
            wire: Wire::new(stream, MAX_LINE),
            patience,
        }
    }

    /// Duplicates the connection's descriptor, because QEMU serves one connection at a time.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.wire.duplicate()
    }

    /// Whether the guest's file systems are frozen, by any program.
    pub async fn is_frozen(&mut self) -> Result<bool> {
        self.queue(STATUS);
        let patience = self.patience;
        let status = async {
            match self.reply(STATUS).await?.as_str() {
                Some("frozen") => Ok(true),
                Some("thawed") => Ok(false),
                _ => Err(unexpected(STATUS, "it has no state")),
            }
        };
        bounded(STATUS, patience, status).await
    }

    /// Freezes the guest's file systems within `patience`, and returns how many it froze. The guest may continue to
    /// freeze after this future is dropped.
    pub async fn freeze(&mut self, patience: Duration) -> Result<u64> {
        self.queue(FREEZE);
        bounded(FREEZE, patience, self.count(FREEZE)).await
    }

    /// Thaws the guest's file systems, and returns how many. The command is sent at once, even if earlier commands
    /// have no reply yet.
    pub async fn thaw(&mut self) -> Result<u64> {
        let (token, patience) = (self.queue_sync(), self.patience);
        self.queue(THAW);
        let thaw = async {
            // The replies to earlier commands can be anything.
            while let Err(error) = self.synchronise(token).await {
                if let Error::Closed(_) = error {
                    return Err(error);
                }
            }
            self.count(THAW).await
        };
        bounded(THAW, patience, thaw).await
    }

    fn queue(&mut self, command: &'static str) {
        let line = format!("{}\n", json!({ "execute": command }));
        self.wire.queue(0, line.into_bytes(), None);
    }

    fn queue_sync(&mut self) -> u64 {
        // The agent reads a signed 64-bit number.
        let token = uuid::Uuid::new_v4().as_u64_pair().0 >> 1;
        let arguments = json!({ "id": token });
        let mut line = vec![0xff];
        line.extend_from_slice(
            json!({ "execute": SYNC, "arguments": arguments })
                .to_string()
                .as_bytes(),
        );
        line.push(b'\n');
        self.wire.queue(0, line, None);
        token
    }

    /// Skips replies that an earlier client left unread.
    async fn synchronise(&mut self, token: u64) -> Result<()> {
        loop {
            let reply = answer(&mut self.wire).await?;
            if reply.get("return").and_then(Value::as_u64) == Some(token) {
                return Ok(());
            }
        }
    }

    async fn count(&mut self, command: &'static str) -> Result<u64> {
        let count = self.reply(command).await?.as_u64();
        count.ok_or_else(|| unexpected(command, "it has no number"))
    }

    async fn reply(&mut self, command: &'static str) -> Result<Value> {
        let mut reply = answer(&mut self.wire).await?;
        if let Some(error) = reply.get("error") {
            let word = |key| error[key].as_str().unwrap_or_default();
            return Err(Refusal::new(word("class"), word("desc")).of(command));
        }
        let value = reply.get_mut("return").map(Value::take);
        value.ok_or_else(|| unexpected(command, "it has no result"))
    }
}

fn unexpected(command: &str, detail: &str) -> Error {
    Error::UnexpectedReply {
        command: command.to_owned(),
        detail: detail.into(),
    }
}

async fn answer(wire: &mut Wire) -> Result<Value> {
    let line = read_line(wire).await?;
    // The agent sends this byte, which JSON never has, before its reply to guest-sync-delimited.
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
