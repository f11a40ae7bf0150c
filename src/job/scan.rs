//! Proves that QEMU looked for a disk's holes in the disk's own image.
//!
//! With `sync: top` QEMU first looks which clusters the image has, and leaves out the others. If another client makes an
//! external snapshot meanwhile, QEMU looks at the new, empty overlay and leaves out data. It reports neither the end of its
//! look nor the snapshot. But each cluster that it leaves out makes a job's total smaller, and nothing makes it larger again.
//! So if the total is at the end what it was before the disks were last seen without a snapshot, nothing was left out since.

use super::error::Stopped;
use super::footprint::Footprint;
use super::{Error, Job};
use crate::domain::Disk;
use crate::qmp;

/// Whether the disks were those of the plan when QEMU said `now`: no other image was above them.
pub fn check_snapshot(job: &Job, footprint: &Footprint, now: &[Disk]) -> Result<(), Stopped> {
    for (index, planned) in job.plan.disks.iter().enumerate() {
        // By its node: a disk without an id of its own is called like its node, which is our filter just now.
        let filter = footprint.names.filter_node(index);
        let mut disks = now.iter();
        if !disks.any(|disk| disk.node == planned.node || disk.node == filter) {
            let disk = planned.name.clone();
            return Err(Error::Changed { disk }.into());
        }
    }
    Ok(())
}

/// What is known of the look.
#[derive(Debug)]
pub struct Scan {
    /// Whether there is one.
    is_made: bool,
    /// The totals of the jobs, in bytes, just before the disks were last seen without a snapshot.
    proven: Option<Vec<u64>>,
}

impl Scan {
    pub fn new(job: &Job) -> Self {
        Self {
            is_made: job.plan.disks.iter().any(|disk| disk.is_scanned()),
            proven: None,
        }
    }

    /// Whether the disks have not been looked at yet: until then a snapshot fails the backup.
    pub fn is_open(&self) -> bool {
        self.is_made && self.proven.is_none()
    }

    /// Whether nothing was left out since the disks were last seen without a snapshot. `totals` are those of the end.
    pub fn is_proven(&self, totals: &[u64]) -> bool {
        !self.is_made || self.proven.as_deref() == Some(totals)
    }

    /// Looks at the disks if that proves something new. `totals` were asked for before. An error if there is a snapshot,
    /// because then nothing can be proven any more.
    pub async fn look(&mut self, job: &Job, footprint: &Footprint, totals: Vec<u64>) -> Result<(), Stopped> {
        if self.is_proven(&totals) {
            return Ok(());
        }
        match footprint.disks().await {
            // It has much to write before it gets to answers.
            Err(qmp::Error::TimedOut { .. }) => return Ok(()),
            now => check_snapshot(job, footprint, &now.map_err(Error::Lost)?)?,
        }
        self.proven = Some(totals);
        Ok(())
    }
}
