//! Zeroes that QEMU writes into a part of a node, without a guest: a mirror job copies them from a node that reads as zeroes.

use serde_json::{Value, json};

use super::footprint::Footprint;
use crate::qmp;

/// A part of a node, in bytes.
pub(super) struct Part<'a> {
    pub node: &'a str,
    pub offset: u64,
    pub length: u64,
}

impl Footprint {
    /// Writes zeroes over a part of a node; `index` is one that no other such work has at the time. What is left of it where it
    /// fails is removed by `release`.
    pub(super) async fn write_zeroes(&self, index: usize, part: Part<'_>) -> qmp::Result<()> {
        let names = &self.names;
        let (slice, source, job) = (
            names.mark_slice(index),
            names.mark_source(index),
            names.mark_job(index),
        );
        let client = self.client();
        let execute =
            async |command: &str, arguments: Value| client.execute(command, arguments).await.map(drop);
        let node = json!({
            "driver": "raw", "node-name": slice, "file": part.node, "offset": part.offset, "size": part.length,
        });
        execute("blockdev-add", node).await?;
        let node = json!({
            "driver": "null-co", "node-name": source, "size": part.length, "read-zeroes": true,
        });
        execute("blockdev-add", node).await?;
        // It is no backup job, because those warn in QEMU's log of targets without clusters.
        let mut events = client.events();
        let mirror = json!({
            "job-id": job, "device": source, "target": slice, "sync": "full", "auto-dismiss": false,
        });
        execute("blockdev-mirror", mirror).await?;
        self.becomes(&mut events, &job, &["ready", "concluded"]).await?;
        match execute("job-cancel", json!({ "id": job })).await {
            // It has ended by itself: what it wrote will be looked at.
            Err(error) if error.is_refusal() => drop(self.reached(&mut events, &job, &["concluded"]).await?),
            result => {
                result?;
                self.becomes(&mut events, &job, &["concluded"]).await?;
            }
        }
        execute("job-dismiss", json!({ "id": job })).await?;
        for node in [slice, source] {
            execute("blockdev-del", json!({ "node-name": node })).await?;
        }
        Ok(())
    }
}
