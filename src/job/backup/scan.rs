//! Proves that QEMU scanned a disk's own image for holes, and not an overlay.
//!
//! With `sync: top` QEMU first scans which clusters the image has, and omits the others. If another client creates an
//! external snapshot during the scan, QEMU scans the new, empty overlay and omits data. It reports neither the end of
//! the scan nor the snapshot. But each omitted cluster reduces the job's total, and nothing increases it again. So if
//! the total at the end equals the total before the last check without a snapshot, QEMU has omitted nothing since.

use crate::domain::Disk;
use crate::job::Error;
use crate::job::error::Stopped;
use crate::job::qemu::QemuObjects;
use crate::plan::Plan;
use crate::qmp;

/// Fails unless `now` shows the disks of the plan without another image above them.
pub fn check_snapshot(plan: &Plan, objects: &QemuObjects, now: &[Disk]) -> Result<(), Stopped> {
    for (index, planned) in plan.disks.iter().enumerate() {
        // Compares node names: a disk without an id has the name of its node, which is the job's filter at the moment.
        let filter = objects.names.filter_node(index);
        let mut disks = now.iter();
        if !disks.any(|disk| disk.node == planned.node || disk.node == filter) {
            let disk = planned.name.clone();
            return Err(Error::Changed { disk }.into());
        }
    }
    Ok(())
}

/// The evidence about the scan.
#[derive(Debug)]
pub struct Scan {
    /// Whether QEMU scans any disk.
    is_made: bool,
    /// The totals of the jobs in bytes, read just before the last check that found no snapshot.
    proven: Option<Vec<u64>>,
}

impl Scan {
    pub fn new(plan: &Plan) -> Self {
        Self {
            is_made: plan.disks.iter().any(|disk| disk.is_scanned()),
            proven: None,
        }
    }

    /// Returns whether the disks have not been checked yet. Until then a snapshot fails the backup.
    pub fn is_open(&self) -> bool {
        self.is_made && self.proven.is_none()
    }

    /// Returns whether QEMU omitted nothing since the last check without a snapshot. `totals` are the final ones.
    pub fn is_proven(&self, totals: &[u64]) -> bool {
        !self.is_made || self.proven.as_deref() == Some(totals)
    }

    /// Checks the disks if that proves something new. The caller has read `totals` before. Fails if there is a
    /// snapshot, because nothing can be proven after that.
    pub async fn look(
        &mut self,
        plan: &Plan,
        objects: &QemuObjects,
        totals: Vec<u64>,
    ) -> Result<(), Stopped> {
        if self.is_proven(&totals) {
            return Ok(());
        }
        match objects.disks().await {
            // QEMU is busy writing. A later check may succeed.
            Err(qmp::Error::TimedOut { .. }) => return Ok(()),
            now => check_snapshot(plan, objects, &now.map_err(Error::Lost)?)?,
        }
        self.proven = Some(totals);
        Ok(())
    }
}
