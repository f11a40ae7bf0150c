//! Removes a job's objects from QEMU.
//!
//! Uses the job's names and QEMU's lists, not a record of created objects. So a reply lost with a connection, or a
//! crash of the service, makes no difference.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::future::try_join_all;

use super::{Part, QemuObjects};
use crate::domain::poweroff;
use crate::job::Error;
use crate::qmp::block::{
    BlockResize, BlockdevDel, FdsetFdInfo, FdsetInfo, JobCancel, JobDismiss, JobInfo, JobStatus, QueryFdsets,
    QueryNamedBlockNodes, RemoveFd,
};
use crate::qmp::{self, Done};
use crate::targets::WIPED_HEAD;

/// How often the service polls a cancelled job until it has ended.
const POLL: Duration = Duration::from_millis(100);
/// How often the service polls a job that hangs.
const LOOK: Duration = Duration::from_secs(1);

impl QemuObjects {
    /// Dismisses the completed jobs and closes the images of `disks` disks.
    ///
    /// Only the QEMU that wrote the image can close it. The file nodes prove that this is still that QEMU, so they stay
    /// for now.
    pub async fn close_images(&self, disks: usize) -> Result<(), Error> {
        loop {
            match self.try_close_images(disks).await {
                Ok(true) => return Ok(()),
                Ok(false) => return Err(Error::NotClosed),
                Err(error) => self.reconnect_after(error).await?,
            }
        }
    }

    async fn try_close_images(&self, disks: usize) -> qmp::Result<bool> {
        if self.try_dismiss_and_close(disks).await? {
            return Ok(true);
        }
        self.end_jobs().await?;
        let nodes = self.nodes().await?;
        let whole = (0..disks).all(|disk| nodes.contains(&self.names.file_node(disk)));
        if whole {
            let images = (0..disks).map(|disk| self.names.target_node(disk));
            self.delete(images.filter(|node| nodes.contains(node))).await?;
        }
        Ok(whole)
    }

    /// Does the same without first listing QEMU's objects. If this QEMU has all jobs and images by name, it wrote them.
    /// Returns false if QEMU refused a command.
    async fn try_dismiss_and_close(&self, disks: usize) -> qmp::Result<bool> {
        let client = self.client();
        for disk in 0..disks {
            let id = &self.names.block_job(disk);
            if is_refused(client.execute(JobDismiss { id }).await)? {
                return Ok(false);
            }
        }
        for disk in 0..disks {
            let node_name = &self.names.target_node(disk);
            if is_refused(client.execute(BlockdevDel { node_name }).await)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Removes the remaining objects of a job whose images have just been closed. Usually only the file nodes remain.
    pub async fn release_closed(&self, disks: usize) -> Result<(), Error> {
        match self.try_release_closed(disks).await {
            Ok(true) => Ok(()),
            // `release` is slower, because it lists QEMU's objects.
            Ok(false) | Err(_) => self.release().await,
        }
    }

    async fn try_release_closed(&self, disks: usize) -> qmp::Result<bool> {
        let Some(sets) = self.passed_sets() else {
            return Ok(false);
        };
        let link = self.link();
        for disk in 0..disks {
            let node_name = &self.names.file_node(disk);
            if is_refused(link.client.execute(BlockdevDel { node_name }).await)? {
                return Ok(false);
            }
        }
        for fdset_id in sets.iter().copied() {
            link.client.execute(RemoveFd { fdset_id }).await?;
        }
        let left = self.query_descriptors().await?;
        let left = left
            .iter()
            .map(|set| set.fdset_id)
            .filter(|set| sets.contains(set));
        link.kept_descriptors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(left);
        self.restore_settings().await?;
        Ok(true)
    }

    /// Returns the descriptor sets of the job. Returns `None` if an earlier backup had to leave some, or if they were
    /// passed over several connections.
    fn passed_sets(&self) -> Option<BTreeSet<u64>> {
        let link = self.link();
        let kept = link
            .kept_descriptors
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
        let (of, sets) = passed.as_ref()?;
        (kept.is_empty() && Arc::ptr_eq(of, &link)).then(|| sets.clone())
    }

    /// Truncates files of passed descriptors through QEMU, so that their content is not mistaken for a backup. A block
    /// device cannot be truncated, so its beginning is overwritten.
    pub async fn empty_files(&self, disks: &[usize]) -> qmp::Result<()> {
        self.end_jobs().await?;
        let nodes = self.drivers().await?;
        for disk in disks {
            let (image, file) = (self.names.target_node(*disk), self.names.file_node(*disk));
            self.delete([image].into_iter().filter(|node| nodes.contains_key(node)))
                .await?;
            match nodes.get(&file).map(String::as_str) {
                Some("host_device") => {
                    let head = Part {
                        node: &file,
                        offset: 0,
                        length: WIPED_HEAD,
                    };
                    self.write_zeroes(*disk, head).await?;
                }
                Some(_) => {
                    let empty = BlockResize {
                        node_name: &file,
                        size: 0,
                    };
                    self.client().execute(empty).await?;
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Removes all objects of this job from QEMU. Succeeds if QEMU has ended.
    pub async fn release(&self) -> Result<(), Error> {
        loop {
            match self.try_release().await {
                Ok(()) => return Ok(()),
                Err(error) => match self.reconnect_after(error).await {
                    Err(Error::Lost(_)) if self.domain.is_gone() => return Ok(()),
                    reconnected => reconnected?,
                },
            }
        }
    }

    /// Like `release`, but waits for each job to make progress before it is cancelled. Cancelling a job whose target
    /// hangs would block QEMU and the guest.
    pub async fn release_gently(&self) -> Result<(), Error> {
        let mut before = Vec::new();
        loop {
            match self.own_jobs().await {
                Ok(now) if now.iter().all(|job| makes_progress(job, &before)) => return self.release().await,
                Ok(now) => {
                    before = now;
                    tokio::time::sleep(LOOK).await;
                }
                Err(error) => match self.reconnect_after(error).await {
                    Err(Error::Lost(_)) if self.domain.is_gone() => return Ok(()),
                    reconnected => reconnected?,
                },
            }
        }
    }

    /// Handles an error: returns `Ok` if the caller can retry over a new connection.
    async fn reconnect_after(&self, error: qmp::Error) -> Result<(), Error> {
        match error {
            qmp::Error::Closed(_) if self.reconnect().await => Ok(()),
            lost @ qmp::Error::Closed(_) => Err(Error::Lost(lost)),
            error => Err(Error::Release(error.to_string())),
        }
    }

    /// Ends the hold on the guest's power-off, if there is one, within `patience`. This does not involve the block
    /// layer, so it works even if storage hangs. `release` repeats it after a failure.
    pub async fn allow_poweroff(&self, patience: Duration) {
        if !self.is_holding_poweroff() {
            return;
        }
        match tokio::time::timeout(patience, poweroff::let_go(&self.link())).await {
            Ok(Ok(())) => self.forget_poweroff_hold(),
            Ok(Err(error)) => tracing::warn!(%error, "cannot allow the guest to power off yet"),
            Err(_) => tracing::warn!("cannot allow the guest to power off yet: QEMU does not answer"),
        }
    }

    async fn try_release(&self) -> qmp::Result<()> {
        self.end_jobs().await?;
        // A target must be deleted before the file node below it: "…-target" sorts after "…-file".
        self.delete(self.nodes().await?.into_iter().rev()).await?;
        self.remove_descriptors().await?;
        self.restore_settings().await
    }

    /// Ends the hold on the guest's power-off, and removes the latency histograms of its disks.
    async fn restore_settings(&self) -> qmp::Result<()> {
        if self.is_holding_poweroff() {
            poweroff::let_go(&self.link()).await?;
            self.forget_poweroff_hold();
        }
        match &self.histogram {
            Some(histogram) => self.remove_histograms(histogram).await,
            None => Ok(()),
        }
    }

    /// Returns the names of the job's nodes.
    async fn nodes(&self) -> qmp::Result<BTreeSet<String>> {
        Ok(self.drivers().await?.into_keys().collect())
    }

    /// Returns the drivers of the job's nodes, by node name.
    async fn drivers(&self) -> qmp::Result<BTreeMap<String, String>> {
        let nodes = self.client().execute(QueryNamedBlockNodes { flat: true }).await?;
        let nodes = nodes.into_iter().map(|node| (node.node_name, node.drv));
        Ok(nodes.filter(|(name, _)| self.names.own(name)).collect())
    }

    async fn delete(&self, nodes: impl Iterator<Item = String>) -> qmp::Result<()> {
        for node in nodes {
            self.client().execute(BlockdevDel { node_name: &node }).await?;
        }
        Ok(())
    }

    /// Removes the job's descriptor sets, and those that earlier backups had to leave on this connection.
    async fn remove_descriptors(&self) -> qmp::Result<()> {
        let link = self.link();
        let kept = || {
            let kept = link.kept_descriptors.lock();
            kept.unwrap_or_else(PoisonError::into_inner)
        };
        let earlier = kept().clone();
        let ours = |set: &FdsetInfo| {
            let own = |fd: &FdsetFdInfo| fd.opaque.as_deref().is_some_and(|opaque| self.names.own(opaque));
            earlier.contains(&set.fdset_id) || set.fds.iter().any(own)
        };
        let sets = self.query_descriptors().await?;
        let removals = sets.iter().filter(|set| ours(set)).map(|set| {
            let fdset_id = set.fdset_id;
            link.client.execute(RemoveFd { fdset_id })
        });
        // Sent concurrently, because there may be one set for each earlier backup.
        try_join_all(removals).await?;
        let left = self.query_descriptors().await?;
        let left = left.iter().filter(|set| ours(set)).map(|set| set.fdset_id);
        *kept() = left.collect();
        Ok(())
    }

    async fn query_descriptors(&self) -> qmp::Result<Vec<FdsetInfo>> {
        Ok(self.client().execute(QueryFdsets {}).await?.into())
    }

    async fn own_jobs(&self) -> qmp::Result<Vec<JobInfo>> {
        let infos = self.query_jobs().await?;
        Ok(infos
            .into_iter()
            .filter(|info| self.names.own(&info.id))
            .collect())
    }

    /// Dismisses the job's block jobs. Cancels those that still run and waits for them. They run only if the service
    /// gave the backup up after its transaction and stopped listening: the connection was lost, or a disk has another
    /// image.
    async fn end_jobs(&self) -> qmp::Result<()> {
        loop {
            let own = self.own_jobs().await?;
            if own.is_empty() {
                return Ok(());
            }
            for info in &own {
                let (client, id) = (self.client(), info.id.as_str());
                let done = match info.status {
                    JobStatus::Concluded => client.execute(JobDismiss { id }).await,
                    _ => client.execute(JobCancel { id }).await,
                };
                // If QEMU refuses, the job has changed its state, and the next query shows that.
                is_refused(done)?;
            }
            if own.iter().any(|info| info.status != JobStatus::Concluded) {
                tokio::time::sleep(POLL).await;
            }
        }
    }
}

/// Returns whether QEMU refused the command; an error if that is unknown.
fn is_refused(result: qmp::Result<Done>) -> qmp::Result<bool> {
    match result {
        Err(error) if error.is_refusal() => Ok(true),
        result => result.map(|Done| false),
    }
}

/// Returns whether a job has made progress since `before`, or is in a state that cannot hang.
fn makes_progress(job: &JobInfo, before: &[JobInfo]) -> bool {
    let then = before.iter().find(|then| then.id == job.id);
    job.status != JobStatus::Running || then.is_some_and(|then| then.current_progress != job.current_progress)
}
