//! Writes zeroes into a part of a node without a guest: a mirror job copies them from a node that reads as zeroes.

use super::QemuObjects;
use crate::qmp;
use crate::qmp::block::{
    BlockdevAdd, BlockdevDel, BlockdevMirror, BlockdevOptions, Driver, JobCancel, JobDismiss, JobStatus,
    MirrorSync,
};

/// A part of a node, in bytes.
pub struct Part<'a> {
    pub node: &'a str,
    pub offset: u64,
    pub length: u64,
}

impl QemuObjects {
    /// Writes zeroes into a part of a node. The caller passes an `index` that no concurrent call uses. After a failure,
    /// `release` removes the remaining objects.
    pub(in crate::job) async fn write_zeroes(&self, index: usize, part: Part<'_>) -> qmp::Result<()> {
        let names = &self.names;
        let (slice, source, job) = (
            names.mark_slice(index),
            names.mark_source(index),
            names.mark_job(index),
        );
        let client = self.client();
        let zeroes = Driver::NullCo {
            size: part.length,
            read_zeroes: Some(true),
        };
        let part = Driver::Raw {
            file: part.node.to_owned().into(),
            offset: Some(part.offset),
            size: Some(part.length),
        };
        for (node, driver) in [(&slice, part), (&source, zeroes)] {
            let node = BlockdevOptions::named(node, driver);
            client.execute(BlockdevAdd(node)).await?;
        }
        // A mirror instead of a backup job: backup jobs log warnings in QEMU about targets without clusters.
        let mut events = client.events();
        let mirror = BlockdevMirror {
            job_id: &job,
            device: &source,
            target: &slice,
            sync: MirrorSync::Full,
            auto_dismiss: false,
            on_source_error: None,
            on_target_error: None,
        };
        client.execute(mirror).await?;
        let ended = [JobStatus::Concluded];
        self.becomes(&mut events, &job, &[JobStatus::Ready, JobStatus::Concluded])
            .await?;
        match client.execute(JobCancel { id: &job }).await {
            // The job has ended by itself. The caller checks its result in the bitmap.
            Err(error) if error.is_refusal() => drop(self.reached(&mut events, &job, &ended).await?),
            result => {
                result?;
                self.becomes(&mut events, &job, &ended).await?;
            }
        }
        client.execute(JobDismiss { id: &job }).await?;
        for node_name in [&slice, &source] {
            client.execute(BlockdevDel { node_name }).await?;
        }
        Ok(())
    }
}
