//! A backup by hand over QMP with QEMU's defaults, as other tools do it.

use std::time::Instant;

use serde_json::{Value, json};

use crate::DISK;
use crate::methods::{Sample, make_durable};
use crate::qmp::Monitor;
use crate::workspace::{IMAGE_SIZE, Workspace};

const JOB: &str = "by-hand";

/// Copying ends with the job. The measurement includes QEMU's flushes: those during the job, and the one when it closes
/// the image.
pub fn back_up(monitor: &mut Monitor, workspace: &Workspace) -> Sample {
    monitor.forget_events();
    let file = workspace.target();
    let began = Instant::now();
    create(monitor, json!({ "driver": "file", "filename": file, "size": 0 }));
    let node = json!({ "driver": "file", "node-name": "hand-file", "filename": file });
    monitor.execute("blockdev-add", node);
    create(
        monitor,
        json!({ "driver": "qcow2", "file": "hand-file", "size": IMAGE_SIZE }),
    );
    let node = json!({ "driver": "qcow2", "node-name": "hand-format", "file": "hand-file" });
    monitor.execute("blockdev-add", node);
    let backup = json!({
        "job-id": JOB, "device": format!("{DISK}-format"), "target": "hand-format", "sync": "full",
    });
    monitor.execute("blockdev-backup", backup);
    let completed = monitor.event("BLOCK_JOB_COMPLETED", |data| data["device"] == JOB);
    assert!(completed["data"].get("error").is_none(), "{completed}");
    let copied = began.elapsed().as_secs_f64();
    // The job releases its nodes when it disappears.
    monitor.event("JOB_STATUS_CHANGE", |data| {
        data["id"] == JOB && data["status"] == "null"
    });
    for node in ["hand-format", "hand-file"] {
        monitor.execute("blockdev-del", json!({ "node-name": node }));
    }
    make_durable(&file);
    Sample {
        copied: Some(copied),
        durable: began.elapsed().as_secs_f64(),
    }
}

fn create(monitor: &mut Monitor, options: Value) {
    let job = "by-hand-create";
    monitor.forget_events();
    monitor.execute("blockdev-create", json!({ "job-id": job, "options": options }));
    monitor.event("JOB_STATUS_CHANGE", |data| {
        data["id"] == job && data["status"] == "concluded"
    });
    monitor.execute("job-dismiss", json!({ "id": job }));
}
