//! Transactions: QEMU does all of the actions at one point in time, or none.

use serde::Serialize;

use super::{BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge, OnError};
use crate::qmp::Done;
use crate::qmp::command::command;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Transaction {
    pub actions: Vec<TransactionAction>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub properties: Option<TransactionProperties>,
}

command!(Transaction, "transaction", Done);

impl Transaction {
    /// Creates a transaction whose jobs end independently.
    pub fn of(actions: Vec<TransactionAction>) -> Self {
        Self {
            actions,
            properties: None,
        }
    }

    /// Creates a transaction whose jobs complete together or fail together.
    pub fn grouped(actions: Vec<TransactionAction>) -> Self {
        let completion_mode = CompletionMode::Grouped;
        Self {
            actions,
            properties: Some(TransactionProperties { completion_mode }),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TransactionProperties {
    pub completion_mode: CompletionMode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompletionMode {
    Individual,
    Grouped,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum TransactionAction {
    /// Fails after QEMU has prepared all earlier actions.
    Abort {},
    BlockDirtyBitmapAdd(BlockDirtyBitmapAdd),
    BlockDirtyBitmapRemove(BlockDirtyBitmap),
    BlockDirtyBitmapMerge(BlockDirtyBitmapMerge),
    BlockdevBackup(BlockdevBackup),
}

/// Copies a node as it is at the transaction's point in time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevBackup {
    pub job_id: String,
    pub device: String,
    pub target: String,
    pub filter_node_name: String,
    pub sync: BackupSync,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bitmap_mode: Option<BitmapSyncMode>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compress: Option<bool>,
    /// In bytes per second. 0 means no limit.
    pub speed: u64,
    pub auto_dismiss: bool,
    pub on_source_error: OnError,
    pub on_target_error: OnError,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_perf: Option<BackupPerf>,
}

/// The data to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackupSync {
    /// All data that the node reads.
    Full,
    /// The data of the top image only.
    Top,
    /// The data that is dirty in a bitmap.
    Bitmap,
}

/// When QEMU clears the copied bits in the bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BitmapSyncMode {
    OnSuccess,
    Never,
    Always,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BackupPerf {
    /// How many chunks are copied at a time.
    pub max_workers: u32,
    /// The largest chunk, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_chunk: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{json, to_value};

    #[test]
    fn each_action_is_sent_with_its_type_and_its_data() {
        let (node, name) = ("n".to_owned(), "b".to_owned());
        let bitmap = BlockDirtyBitmap {
            node: node.clone(),
            name: name.clone(),
        };
        let add = BlockDirtyBitmapAdd {
            node: node.clone(),
            name,
            granularity: Some(65536),
            persistent: Some(true),
            disabled: None,
        };
        let merge = BlockDirtyBitmapMerge {
            node,
            target: "t".into(),
            bitmaps: vec![bitmap.clone()],
        };
        let transaction = Transaction::of(vec![
            TransactionAction::BlockDirtyBitmapAdd(add),
            TransactionAction::BlockDirtyBitmapMerge(merge),
            TransactionAction::BlockDirtyBitmapRemove(bitmap),
            TransactionAction::Abort {},
        ]);
        assert_eq!(
            to_value(transaction).unwrap(),
            json!({ "actions": [
                {
                    "type": "block-dirty-bitmap-add",
                    "data": { "node": "n", "name": "b", "granularity": 65536, "persistent": true },
                },
                {
                    "type": "block-dirty-bitmap-merge",
                    "data": { "node": "n", "target": "t", "bitmaps": [{ "node": "n", "name": "b" }] },
                },
                { "type": "block-dirty-bitmap-remove", "data": { "node": "n", "name": "b" } },
                { "type": "abort", "data": {} },
            ] })
        );
    }

    #[test]
    fn a_backup_is_sent_with_the_options_that_are_set_and_no_others() {
        let full = BlockdevBackup {
            job_id: "j".into(),
            device: "d".into(),
            target: "t".into(),
            filter_node_name: "f".into(),
            sync: BackupSync::Top,
            bitmap: None,
            bitmap_mode: None,
            compress: None,
            speed: 7,
            auto_dismiss: false,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            x_perf: None,
        };
        let incremental = BlockdevBackup {
            sync: BackupSync::Bitmap,
            bitmap: Some("b".into()),
            bitmap_mode: Some(BitmapSyncMode::Never),
            compress: Some(true),
            x_perf: Some(BackupPerf {
                max_workers: 1,
                max_chunk: Some(65536),
            }),
            ..full.clone()
        };
        let actions = [full, incremental].map(TransactionAction::BlockdevBackup);
        assert_eq!(
            to_value(Transaction::grouped(actions.into())).unwrap(),
            json!({
                "actions": [
                    { "type": "blockdev-backup", "data": {
                        "job-id": "j", "device": "d", "target": "t", "filter-node-name": "f", "sync": "top", "speed": 7,
                        "auto-dismiss": false, "on-source-error": "report", "on-target-error": "report",
                    } },
                    { "type": "blockdev-backup", "data": {
                        "job-id": "j", "device": "d", "target": "t", "filter-node-name": "f", "sync": "bitmap",
                        "bitmap": "b", "bitmap-mode": "never", "compress": true, "speed": 7, "auto-dismiss": false,
                        "on-source-error": "report", "on-target-error": "report",
                        "x-perf": { "max-workers": 1, "max-chunk": 65536 },
                    } },
                ],
                "properties": { "completion-mode": "grouped" },
            })
        );
    }
}
