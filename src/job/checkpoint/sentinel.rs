//! Sentinels: bitmaps that show whether a disk shrank since a checkpoint.
//!
//! When a disk shrinks, QEMU clears the removed part of every bitmap (`hbitmap_truncate`). After the disk grows again,
//! an incremental backup would show old data there. So each checkpoint has a second bitmap, disabled and persistent, in
//! which only the disk's last granule is set. If that bit is clear, the disk was smaller.
//!
//! Only a write sets a bit, and the service must not write to the guest's disk. So a mirror job writes to the last
//! granule of a node of the same size that stores nothing (`null-co`). QEMU then merges that node's bitmap into the
//! sentinels. Must not know how checkpoints are used.

use std::collections::{BTreeMap, BTreeSet};

use crate::checkpoint::{Mode, sentinel_name, was_never_smaller};
use crate::domain::Disk;
use crate::job::Error;
use crate::job::qemu::{Part, QemuObjects};
use crate::plan::{DiskPlan, Plan};
use crate::qmp;
use crate::qmp::block::{
    BlockDeviceInfo, BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, BlockdevAdd, BlockdevDel,
    BlockdevMirror, BlockdevOptions, Driver, QueryNamedBlockNodes, TransactionAction,
};

/// The granularity of bitmaps in bytes, equal to the cluster size of an incremental backup's image.
pub const GRANULARITY: u64 = 1 << 16;
/// The name of the bitmap on a `null-co` node.
const MARK: &str = "end";

/// The names of nodes whose bitmaps have the last granule set, by their size in bytes.
pub type Marks = BTreeMap<u64, String>;

/// Returns the start and the length of the last granule.
fn last_granule(size: u64) -> (u64, u64) {
    let start = size.saturating_sub(1) / GRANULARITY * GRANULARITY;
    (start, size - start)
}

/// Returns the actions that create a checkpoint of this name and its sentinel on a disk. The caller puts them into one
/// transaction.
pub fn checkpoint(disk: &DiskPlan, name: &str, marks: &Marks) -> Vec<TransactionAction> {
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
    // An empty disk cannot shrink.
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
        // A shrink within the last granule clears no bit, so that granule is always copied.
        actions.push(merge(name));
    }
    actions
}

/// Fails if a disk shrank since the plan was made, because the bitmap of its base is then incomplete. The caller calls
/// this after the block jobs have started: from then on QEMU refuses to resize the disks.
pub fn check_sizes(plan: &Plan, disks: &[Disk]) -> Result<(), Error> {
    for planned in &plan.disks {
        let Mode::Incremental(base) = &planned.mode else {
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

impl QemuObjects {
    /// Creates a `null-co` node with a set bitmap for each of these sizes, except 0. `forget_marks` removes them, and
    /// so does `release`.
    pub(in crate::job) async fn make_marks(&self, sizes: impl Iterator<Item = u64>) -> qmp::Result<Marks> {
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

    /// Returns whether each node's bitmap has a set bit.
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
        // Without `read-zeroes`, QEMU writes the zeroes, because the node is not known to read as zeroes. Otherwise it
        // would skip the write.
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

    pub(in crate::job) async fn forget_marks(&self, marks: Marks) -> qmp::Result<()> {
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
