//! The ways to copy that are compared, but for the one by hand: how each is run and where its time begins and ends.

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

/// How long one copy took, in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Until all was copied; nothing where that cannot be told apart.
    pub copied: Option<f64>,
    /// Until it was durable, and its name too.
    pub durable: f64,
}

/// From the call to the signal that all is over, which comes when the backup is durable and has its name. The copying
/// ends where QEMU says so, by its own clock.
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

/// Whether an event with this data is about a block job of the service's.
pub fn is_backup_of_service(data: &Value) -> bool {
    let id = data["device"].as_str().or(data["id"].as_str());
    // The job that makes the image is named "…-0-create".
    id.is_some_and(|id| id.starts_with("backupd-") && id.ends_with("-0"))
}

/// With the options that make it fastest.
pub fn convert(workspace: &Workspace) -> Sample {
    let mut command = Command::new("qemu-img");
    // -U: the machine has the source open, and nothing writes to it.
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

/// What the device takes: the same bytes, from memory, into one file.
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

/// fsync of a file and of its name.
pub fn make_durable(file: &Path) {
    let directory = file.parent().expect("it is in a directory");
    for path in [file, directory] {
        File::open(path)
            .and_then(|file| file.sync_all())
            .unwrap_or_else(|e| panic!("fsync of {}: {e}", path.display()));
    }
}
