//! The compared methods, except the one by hand: runs each, and defines the start and the end of its time.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::{Instant, SystemTime};

use serde_json::Value;

use crate::common::caller::Caller;
use crate::common::process;
use crate::common::proxies::Options;
use crate::common::vm::Vm;
use crate::workspace::Workspace;
use crate::{LARGE, ON_DEVICE, qmp};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    Dd,
    Service,
    Convert,
    ByHand,
}

impl Method {
    pub const ALL: [Self; 4] = [Self::Dd, Self::Service, Self::Convert, Self::ByHand];
}

/// The durations of one copy, in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// The time until all data was copied; `None` if the method does not report that.
    pub copied: Option<f64>,
    /// The time until the data and its name were durable.
    pub durable: f64,
}

/// Measures from the call to the signal of the end, which arrives when the backup is durable and published. Copying
/// ends when QEMU reports it, by QEMU's clock.
pub async fn service(caller: &mut Caller, vm: &Vm) -> Sample {
    let document = format!("<domainbackup><store name='{ON_DEVICE}'/></domainbackup>");
    let wall = SystemTime::now();
    let began = Instant::now();
    let all = Options::from([("incremental", "full".into())]);
    let started = caller.try_start(LARGE, &document, &[], all).await;
    started.expect("the backup is accepted");
    let signals = caller.signals_until("Completed").await;
    let durable = began.elapsed().as_secs_f64();
    let last = signals.last().expect("it ends with the signal");
    assert_eq!(last.arguments[0], "completed", "{last:?}");
    let completed = vm.wait_event("BLOCK_JOB_COMPLETED", is_backup_of_service);
    Sample {
        copied: Some(qmp::seconds_between(wall, qmp::time(&completed))),
        durable,
    }
}

/// Returns true if an event with this data concerns a block job of the service.
pub fn is_backup_of_service(data: &Value) -> bool {
    let id = data["device"].as_str().or(data["id"].as_str());
    // The job that creates the image is named "…-0-create".
    id.is_some_and(|id| id.starts_with("backupd-") && id.ends_with("-0"))
}

/// Uses the fastest options.
pub fn convert(workspace: &Workspace) -> Sample {
    let mut command = Command::new("qemu-img");
    // -U, because the VM has the source open; nothing writes to it.
    command.args(["convert", "-U", "-f", "qcow2", "-O", "qcow2", "-W", "-m", "8"]);
    command.arg(workspace.source()).arg(workspace.target());
    let began = Instant::now();
    process::run(command).expect_success();
    let copied = began.elapsed().as_secs_f64();
    make_durable(&workspace.target());
    Sample {
        copied: Some(copied),
        durable: began.elapsed().as_secs_f64(),
    }
}

/// Measures the device: writes the same bytes from memory into one file.
pub fn dd(workspace: &Workspace) -> Sample {
    let mut command = Command::new("dd");
    command.args(["bs=1M", "conv=fsync", "status=none"]);
    command.arg(format!("if={}", workspace.data().display()));
    command.arg(format!("of={}", workspace.target().display()));
    let began = Instant::now();
    process::run(command).expect_success();
    Sample {
        copied: None,
        durable: began.elapsed().as_secs_f64(),
    }
}

/// Calls fsync for a file and its directory.
pub fn make_durable(file: &Path) {
    let directory = file.parent().expect("it is in a directory");
    for path in [file, directory] {
        File::open(path)
            .and_then(|file| file.sync_all())
            .unwrap_or_else(|e| panic!("fsync of {}: {e}", path.display()));
    }
}
