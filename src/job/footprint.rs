//! What a job makes in QEMU: descriptor sets, block nodes and jobs, all with names that say whose they are, and
//! their removal.
//!
//! Removal goes by the names and what QEMU says is there, not by what was made: a reply that was lost with a
//! connection then makes no difference.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::future::try_join_all;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Error;
use super::track::JobInfo;
use crate::definition::{Compression, Format};
use crate::domain::{Domain, Link, Snapshot};
use crate::plan::DiskPlan;
use crate::qmp::{self, Client, Events, EventsError};
use crate::target::{Media, Target};

/// Large clusters keep metadata small, and a full backup writes whole ones; in bytes.
const CLUSTER_SIZE: u32 = 1 << 20;
/// How long a lost monitor may take to come back, to be rid of what is left in a QEMU that lives.
const RECONNECT: Duration = Duration::from_secs(2);
/// How long QEMU may take to end a cancelled job when it is only looked at, not listened to.
const POLL: Duration = Duration::from_millis(100);

/// The names of one job's things in QEMU. Node names have at most 31 bytes.
#[derive(Debug, Clone)]
pub struct Names(String);

impl Names {
    /// `tag` is 8 characters that no other backup has.
    pub fn new(tag: &str) -> Self {
        Self(format!("backupd-{tag}"))
    }

    pub fn block_job(&self, disk: usize) -> String {
        format!("{}-{disk}", self.0)
    }

    pub fn filter_node(&self, disk: usize) -> String {
        format!("{}-{disk}-filter", self.0)
    }

    pub fn target_node(&self, disk: usize) -> String {
        format!("{}-{disk}-target", self.0)
    }

    fn file_node(&self, disk: usize) -> String {
        format!("{}-{disk}-file", self.0)
    }

    fn create_job(&self, disk: usize) -> String {
        format!("{}-{disk}-create", self.0)
    }

    fn own(&self, name: &str) -> bool {
        name.strip_prefix(&self.0)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FdsetInfo {
    fdset_id: u64,
    fds: Vec<FdInfo>,
}

#[derive(Deserialize)]
struct FdInfo {
    #[serde(default)]
    opaque: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct NodeName {
    #[serde(default)]
    node_name: String,
}

/// What one job has in one QEMU.
pub struct Footprint {
    domain: Arc<Domain>,
    link: Arc<Link>,
    pub names: Names,
}

impl Footprint {
    pub fn new(domain: Arc<Domain>, link: Arc<Link>, names: Names) -> Self {
        Self { domain, link, names }
    }

    pub fn client(&self) -> &Client {
        &self.link.client
    }

    /// Hands a target to QEMU and makes the node that the backup writes to.
    pub async fn open_target(&self, index: usize, target: &Target, disk: &DiskPlan) -> Result<(), Error> {
        let prepare = |source| Error::Prepare {
            disk: disk.name.clone(),
            source,
        };
        let descriptor = target.descriptor().map_err(|error| Error::Descriptor {
            disk: disk.name.clone(),
            why: error.to_string(),
        })?;
        let client = self.client();
        let arguments = json!({ "opaque": self.names.block_job(index) });
        let added = client
            .execute_with_descriptor("add-fd", arguments, descriptor)
            .await
            .map_err(prepare)?;
        let set = added.get("fdset-id").and_then(Value::as_u64).ok_or_else(|| {
            prepare(qmp::Error::UnexpectedReply {
                command: "add-fd".into(),
                detail: "no fdset-id".into(),
            })
        })?;
        let driver = match target.media {
            Media::Regular => "file",
            Media::Block => "host_device",
        };
        let file = self.names.file_node(index);
        // The service makes the data durable itself, once, before it publishes: QEMU's flushes on the way only cost.
        let cache = json!({ "no-flush": true });
        let node = json!({
            "driver": driver, "node-name": file, "filename": format!("/dev/fdset/{set}"),
            "cache": cache, "discard": "unmap",
        });
        client.execute("blockdev-add", node).await.map_err(prepare)?;
        let mut node = json!({
            "driver": disk.format.as_str(), "node-name": self.names.target_node(index), "file": file,
            "cache": cache, "discard": "unmap", "detect-zeroes": "unmap",
        });
        match disk.format {
            Format::Qcow2 => {
                target.mark_written();
                self.format(index, disk, &file).await?;
                // Null, or QEMU would open what a header names.
                node["backing"] = Value::Null;
            }
            // A device may be larger than the disk, and QEMU wants equal sizes.
            Format::Raw if target.media == Media::Block => node["size"] = json!(disk.virtual_size),
            Format::Raw => {}
        }
        client.execute("blockdev-add", node).await.map_err(prepare)?;
        Ok(())
    }

    /// Makes an empty image in the file node.
    async fn format(&self, index: usize, disk: &DiskPlan, file: &str) -> Result<(), Error> {
        let prepare = |source| Error::Prepare {
            disk: disk.name.clone(),
            source,
        };
        let mut options = json!({
            "driver": "qcow2", "file": file, "size": disk.virtual_size, "cluster-size": CLUSTER_SIZE,
        });
        if let Some(compression) = disk.compress {
            options["compression-type"] = json!(match compression {
                Compression::Zstd => "zstd",
                Compression::Zlib => "zlib",
            });
        }
        let job = self.names.create_job(index);
        let mut events = self.client().events();
        let arguments = json!({ "job-id": job, "options": options });
        self.client()
            .execute("blockdev-create", arguments)
            .await
            .map_err(prepare)?;
        let failed = self.concluded(&mut events, &job).await.map_err(prepare)?;
        self.client()
            .execute("job-dismiss", json!({ "id": job }))
            .await
            .map_err(prepare)?;
        match failed {
            None => Ok(()),
            Some(message) => Err(Error::Format {
                disk: disk.name.clone(),
                message,
            }),
        }
    }

    /// Waits for the end of a job that no events but its status tell of; gives its error.
    async fn concluded(&self, events: &mut Events, job: &str) -> qmp::Result<Option<String>> {
        loop {
            let infos = self.query_jobs().await?;
            match infos.into_iter().find(|info| info.id == job) {
                Some(info) if info.status == "concluded" => return Ok(info.error),
                Some(_) => {}
                None => return Ok(Some("the job is gone".into())),
            }
            loop {
                match events.next().await {
                    Ok(event) if event.name == "JOB_STATUS_CHANGE" && event.data["id"] == job => break,
                    Ok(_) => {}
                    // The query tells what happened, or that the connection is gone.
                    Err(EventsError::Missed | EventsError::Closed) => break,
                }
            }
        }
    }

    /// What the domain's QEMU says of itself now.
    pub async fn inspect(&self) -> qmp::Result<Snapshot> {
        self.link.inspect().await
    }

    pub async fn query_jobs(&self) -> qmp::Result<Vec<JobInfo>> {
        self.client().query("query-jobs", json!({})).await
    }

    /// Removes everything of this job from QEMU.
    ///
    /// An image is whole when QEMU has closed it, so a connection that is lost on the way is a failure, even if it comes
    /// back and all is removed over the new one: what is there then may be another QEMU.
    pub async fn release(&mut self) -> Result<(), Error> {
        match self.try_release().await {
            Ok(()) => Ok(()),
            Err(lost @ qmp::Error::Closed(_)) => {
                if let Some(link) = self.domain.next_link(&self.link, RECONNECT).await {
                    self.link = link;
                    self.try_release()
                        .await
                        .map_err(|error| Error::Release(error.to_string()))?;
                }
                Err(Error::Lost(lost))
            }
            Err(error) => Err(Error::Release(error.to_string())),
        }
    }

    async fn try_release(&self) -> qmp::Result<()> {
        let client = self.client();
        self.end_jobs().await?;
        let nodes: Vec<NodeName> = client
            .query("query-named-block-nodes", json!({ "flat": true }))
            .await?;
        let nodes: BTreeSet<String> = nodes
            .into_iter()
            .map(|node| node.node_name)
            .filter(|name| self.names.own(name))
            .collect();
        // A target goes before the file below it: "…-target" sorts after "…-file".
        for node in nodes.iter().rev() {
            client
                .execute("blockdev-del", json!({ "node-name": node }))
                .await?;
        }
        self.remove_descriptors().await
    }

    /// Removes our descriptor sets, and those that earlier backups had to leave over this connection.
    async fn remove_descriptors(&self) -> qmp::Result<()> {
        let kept = || {
            let kept = self.link.kept_descriptors.lock();
            kept.unwrap_or_else(PoisonError::into_inner)
        };
        let earlier = kept().clone();
        let ours = |set: &FdsetInfo| {
            let own = |fd: &FdInfo| fd.opaque.as_deref().is_some_and(|opaque| self.names.own(opaque));
            earlier.contains(&set.fdset_id) || set.fds.iter().any(own)
        };
        let sets = self.query_descriptors().await?;
        let removals = sets.iter().filter(|set| ours(set)).map(|set| {
            let arguments = json!({ "fdset-id": set.fdset_id });
            self.client().execute("remove-fd", arguments)
        });
        // All at once: what had to be left can be as many as there were backups.
        try_join_all(removals).await?;
        let left = self.query_descriptors().await?;
        let left = left.iter().filter(|set| ours(set)).map(|set| set.fdset_id);
        *kept() = left.collect();
        Ok(())
    }

    async fn query_descriptors(&self) -> qmp::Result<Vec<FdsetInfo>> {
        self.client().query("query-fdsets", json!({})).await
    }

    /// Dismisses our jobs; cancels and waits for those that still run, which they do only if the backup was given up after
    /// its transaction without anybody listening to them: the connection was lost, or a disk has another image.
    async fn end_jobs(&self) -> qmp::Result<()> {
        loop {
            let infos = self.query_jobs().await?;
            let own: Vec<_> = infos
                .into_iter()
                .filter(|info| self.names.own(&info.id))
                .collect();
            if own.is_empty() {
                return Ok(());
            }
            for info in &own {
                let (command, arguments) = match info.status.as_str() {
                    "concluded" => ("job-dismiss", json!({ "id": info.id })),
                    _ => ("job-cancel", json!({ "id": info.id })),
                };
                match self.client().execute(command, arguments).await {
                    // It went on meanwhile; the next look tells.
                    Err(error) if error.is_refusal() => {}
                    result => drop(result?),
                }
            }
            if own.iter().any(|info| info.status != "concluded") {
                tokio::time::sleep(POLL).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_into_qemu_and_are_only_our_own() {
        let names = Names::new("0123abcd");
        for name in [
            names.filter_node(999),
            names.target_node(999),
            names.file_node(999),
        ] {
            assert!(name.len() <= 31 && names.own(&name), "{name}");
        }
        assert!(!names.own("backupd-0123abcde-0") && !names.own("backupd-0123abc") && !names.own("vda"));
        assert!(
            names.target_node(3) > names.file_node(3),
            "a node is removed before the one below it"
        );
    }
}
