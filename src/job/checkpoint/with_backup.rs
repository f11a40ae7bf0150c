//! Creates the checkpoints of a backup, before its block jobs start.

use super::sentinel;
use crate::checkpoint::bitmap_name;
use crate::job::qemu::QemuObjects;
use crate::job::{Error, Job};
use crate::plan::{DiskPlan, Plan};
use crate::qmp;
use crate::qmp::block::Transaction;

impl QemuObjects {
    /// Creates the checkpoints of the plan. QEMU refuses `block-dirty-bitmap-add` in a grouped transaction
    /// (`ActionCompletionMode` in qapi/transaction.json), so the bitmaps come first. The next backup therefore copies the writes in between again. If QEMU refuses a bitmap, the
    /// disk is still backed up, and its next backup is full. If the request describes the checkpoint, the backup fails
    /// instead.
    pub async fn make_checkpoints(&self, job: &Job, plan: &Plan) -> Result<(), Error> {
        let planned = plan.disks.iter().enumerate();
        let disks: Vec<(usize, &DiskPlan)> = planned.filter(|(_, disk)| disk.checkpoint).collect();
        let Some((_, first)) = disks.first() else {
            return Ok(());
        };
        let sizes = disks.iter().map(|(_, disk)| disk.virtual_size);
        let marks = match self.make_marks(sizes).await {
            Ok(marks) => marks,
            // `release` removes the nodes together with the other objects.
            Err(error) => return without_checkpoint((job, plan), first, error),
        };
        for (index, disk) in disks {
            let actions = sentinel::checkpoint(disk, &bitmap_name(&job.backup_id, index), &marks);
            if let Err(error) = self.client().execute(Transaction::of(actions)).await {
                without_checkpoint((job, plan), disk, error)?;
            }
        }
        self.forget_marks(marks).await.map_err(Error::Lost)
    }
}

/// Handles a disk on which QEMU cannot create the checkpoint.
fn without_checkpoint((job, plan): (&Job, &Plan), disk: &DiskPlan, source: qmp::Error) -> Result<(), Error> {
    if !source.is_refusal() {
        return Err(Error::Lost(source));
    }
    if plan.checkpoint.is_some() {
        let disk = disk.name.clone();
        return Err(Error::Checkpoint { disk, source });
    }
    tracing::warn!(
        job = job.id,
        disk = disk.name,
        error = %source,
        "cannot create the checkpoint of the disk; its next backup will be full"
    );
    Ok(())
}
