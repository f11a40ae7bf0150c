//! Sentinels: bitmaps that show whether a disk was made smaller since a checkpoint.
//!
//! QEMU clears the cut part of every bitmap when a disk is made smaller (`hbitmap_truncate`), and growing it again hides that:
//! the incremental backup would show old data there. So each checkpoint has a second bitmap beside it, disabled and persistent,
//! in which only the disk's last granule is set. If that is clear, the disk was smaller.
//!
//! Only a write sets a bit, and the guest's disk is not written to. So a mirror job writes to the last granule of a node of the
//! same size that stores nothing (`null-co`), and that node's bitmap is merged into the sentinels. Must not know the use
//! of checkpoints.

use std::collections::{BTreeMap, BTreeSet};

use super::Error;
use super::footprint::Footprint;
use super::zeroes::Part;
use crate::domain::Disk;
use crate::plan::{DiskPlan, Mode, Plan, sentinel_name, was_never_smaller};
use crate::qmp;
use crate::qmp::block::{
    BlockDeviceInfo, BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, BlockdevAdd, BlockdevDel,
    BlockdevMirror, BlockdevOptions, Driver, QueryNamedBlockNodes, TransactionAction,
};

/// What one bit of a bitmap stands for, in bytes: as small as the clusters of an incremental backup's image.
pub(super) const GRANULARITY: u64 = 1 << 16;
/// The bitmap of a node that keeps nothing.
const MARK: &str = "end";

/// The nodes whose bitmaps have the last granule set, by their size in bytes.
pub(super) type Marks = BTreeMap<u64, String>;

/// Where the last granule begins, and how long it is.
fn last_granule(size: u64) -> (u64, u64) {
    let start = size.saturating_sub(1) / GRANULARITY * GRANULARITY;
    (start, size - start)
}

/// The actions of a transaction that make a checkpoint of this name and its sentinel on a disk, or neither.
pub(super) fn checkpoint(disk: &DiskPlan, name: &str, marks: &Marks) -> Vec<TransactionAction> {
    let add = |name: &str, disabled: bool| {
        TransactionAction::BlockDirtyBitmapAdd(BlockDirtyBitmapAdd {
            node: disk.node.clone(),
            name: name.to_owned(),
            granularity: Some(GRANULARITY),
            persistent: Some(true),
            disabled: Some(disabled),
        })
    };
    let mut actions = vec![add(name, false)];
    // An empty disk cannot be made smaller.
    if let Some(mark) = marks.get(&disk.virtual_size) {
        let sentinel = sentinel_name(name);
        let merge = |target: &str| {
            let mark = BlockDirtyBitmap {
                node: mark.clone(),
                name: MARK.to_owned(),
            };
            TransactionAction::BlockDirtyBitmapMerge(BlockDirtyBitmapMerge {
                node: disk.node.clone(),
                target: target.to_owned(),
                bitmaps: vec![mark],
            })
        };
        actions.push(add(&sentinel, true));
        actions.push(merge(&sentinel));
        // A cut inside a granule clears nothing: the last one is copied always.
        actions.push(merge(name));
    }
    actions
}

/// Whether no disk was made smaller since the plan was made, so that what the backup goes on from is whole. Asked when the block
/// jobs are there: from then on QEMU refuses to resize the disks.
pub(super) fn check_sizes(plan: &Plan, disks: &[Disk]) -> Result<(), Error> {
    for planned in &plan.disks {
        let Mode::Since(base) = &planned.mode else {
            continue;
        };
        let disk = disks.iter().find(|disk| disk.node == planned.node);
        if disk.is_some_and(|disk| was_never_smaller(disk, &base.bitmap).is_err()) {
            let disk = planned.name.clone();
            return Err(Error::Resized { disk });
        }
    }
    Ok(())
}

impl Footprint {
    /// Makes the nodes for disks of these sizes; 0 needs none. `forget_marks` removes them, and so does `release`.
    pub(super) async fn make_marks(&self, sizes: impl Iterator<Item = u64>) -> qmp::Result<Marks> {
        let mut marks = Marks::new();
        for size in sizes.filter(|size| *size > 0) {
            if !marks.contains_key(&size) {
                let mark = self.make_mark(marks.len(), size).await?;
                marks.insert(size, mark);
            }
        }
        match marks.is_empty() || self.are_marked(&marks).await? {
            true => Ok(marks),
            false => Err(qmp::Error::Refused {
                command: BlockdevMirror::NAME.into(),
                class: "GenericError".into(),
                description: "nothing was written".into(),
            }),
        }
    }

    /// Whether something is set in the bitmap of each.
    async fn are_marked(&self, marks: &Marks) -> qmp::Result<bool> {
        let nodes = self.client().execute(QueryNamedBlockNodes { flat: true }).await?;
        let is_set = |node: &BlockDeviceInfo| node.dirty_bitmaps.iter().any(|bitmap| bitmap.count > 0);
        let set: BTreeSet<String> = nodes
            .into_iter()
            .filter(is_set)
            .map(|node| node.node_name)
            .collect();
        Ok(marks.values().all(|mark| set.contains(mark)))
    }

    async fn make_mark(&self, index: usize, size: u64) -> qmp::Result<String> {
        let (offset, length) = last_granule(size);
        let (client, mark) = (self.client(), self.names.mark(index));
        // Zeroes are written over what is not known to be zero: less would not be written at all.
        let null = Driver::NullCo {
            size,
            read_zeroes: Some(false),
        };
        let node = BlockdevOptions::named(&mark, null);
        client.execute(BlockdevAdd(node)).await?;
        let bitmap = BlockDirtyBitmapAdd {
            node: mark.clone(),
            name: MARK.to_owned(),
            granularity: Some(GRANULARITY),
            persistent: None,
            disabled: None,
        };
        client.execute(bitmap).await?;
        let part = Part {
            node: &mark,
            offset,
            length,
        };
        self.write_zeroes(index, part).await?;
        Ok(mark)
    }

    pub(super) async fn forget_marks(&self, marks: Marks) -> qmp::Result<()> {
        for mark in marks.into_values() {
            self.client().execute(BlockdevDel { node_name: &mark }).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_granule_ends_where_the_disk_does() {
        for (size, expected) in [
            (512, (0, 512)),
            (GRANULARITY, (0, GRANULARITY)),
            (GRANULARITY + 512, (GRANULARITY, 512)),
            (3 * GRANULARITY, (2 * GRANULARITY, GRANULARITY)),
        ] {
            assert_eq!(last_granule(size), expected, "{size}");
        }
    }
}
