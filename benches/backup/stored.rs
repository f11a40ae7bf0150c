//! Measures operations on stored backups, each in comparison with the tool that does the same by hand: restore, verify,
//! merge.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use zbus::wire::{OwnedObjectPath, Variant};

use crate::common::caller::Caller;
use crate::common::process;
use crate::common::proxies::{JobProxy, Options};
use crate::common::storage::LoopDevice;
use crate::common::vm::Vm;
use crate::methods::make_durable;
use crate::pair::{Pair, timed};
use crate::workspace::{IMAGE_SIZE, Workspace};
use crate::{DISK, LARGE, ON_DEVICE};

const INTERFACE: &str = "org.example.Backup1.Backup";
/// The changes before the incremental backup to merge: 64 stretches of 1 MiB.
const STRETCHES: u64 = 64;
const MIB: u64 = 1 << 20;

/// A backup in the store on the device.
pub struct Stored {
    pub id: String,
    pub image: PathBuf,
}

/// Returns the measurements, taken in rounds that run all of them.
pub async fn measure(caller: &mut Caller, workspace: &Workspace, vm: &Vm, rounds: usize) -> Vec<Pair> {
    let mut file = Pair::new("restore into a qcow2 file / convert + fsync", 1.0);
    let mut device = Pair::new("restore onto a device / convert + fsync", 1.0);
    let mut verify = Pair::new(
        match has_b3sum() {
            true => "verify / b3sum",
            // Without b3sum, this program hashes in one thread for each processor.
            false => "verify / hashing alone (b3sum is not installed)",
        },
        1.0 / 0.9,
    );
    let mut merge = Pair::new("merge / convert + fsync", 1.2);
    let disk = workspace.path().join("device");
    let disk = LoopDevice::attach(&disk, IMAGE_SIZE);
    for _ in 0..rounds {
        let full = back_up(caller, LARGE, "full").await;
        let target = workspace.target();
        for turn in 0..2 {
            workspace.settle();
            warm(&full.image);
            match turn {
                0 => file
                    .ours
                    .push(restore(caller, &full, &new_file(&target), "qcow2").await),
                _ => file.others.push(convert(&full.image, &target, &["-O", "qcow2"])),
            }
            std::fs::remove_file(&target).expect("a copy is removed");
            workspace.settle();
            warm(&full.image);
            match turn {
                0 => {
                    let target = open(disk.device());
                    device.ours.push(restore(caller, &full, &target, "raw").await);
                }
                _ => device
                    .others
                    .push(convert(&full.image, disk.device(), &["-n", "-O", "raw"])),
            }
        }
        for _ in 0..2 {
            warm(&full.image);
            verify.others.push(hash(&full.image));
            verify
                .ours
                .push(job(caller, &full, "Verify", &Options::new()).await);
        }
        for stretch in 0..STRETCHES {
            vm.write(DISK, stretch * (IMAGE_SIZE / STRETCHES), MIB, stretch as u8);
        }
        vm.flush(DISK);
        let incremental = back_up(caller, LARGE, "auto").await;
        workspace.settle();
        for image in [&full.image, &incremental.image] {
            warm(image);
        }
        merge
            .others
            .push(convert(&incremental.image, &target, &["-O", "qcow2"]));
        std::fs::remove_file(&target).expect("a copy is removed");
        workspace.settle();
        for image in [&full.image, &incremental.image] {
            warm(image);
        }
        merge.ours.push(delete(caller, &full, &["merge"]).await);
        delete(caller, &incremental, &[]).await;
    }
    vec![file, device, verify, merge]
}

/// Creates a backup in the store on the device.
pub async fn back_up(caller: &mut Caller, domain: &str, incremental: &'static str) -> Stored {
    let document = format!("<domainbackup><store name='{ON_DEVICE}'/></domainbackup>");
    let options = Options::from([("incremental", incremental.into())]);
    let job = caller.start_with(domain, &document, &[], options).await;
    stored(caller, &job).await
}

/// Returns the backup of a job after it has completed.
pub async fn stored(caller: &mut Caller, job: &JobProxy<'_>) -> Stored {
    completed(caller).await;
    let image = PathBuf::from(&job.disks().await.expect("the job answers")[0].4);
    let id = image
        .parent()
        .and_then(Path::file_name)
        .and_then(|name| name.to_str());
    let id = id.expect("it is in the backup's directory").to_owned();
    Stored { id, image }
}

async fn completed(caller: &mut Caller) {
    let signals = caller.signals_until("Completed").await;
    let last = signals.last().expect("it ends with the signal");
    assert_eq!(last.arguments[0], "completed", "{last:?}");
}

async fn call<B: serde::Serialize + zbus::DynamicType>(
    caller: &Caller,
    backup: &Stored,
    method: &str,
    body: &B,
) -> zbus::Message {
    let path: OwnedObjectPath = caller.manager.get_backup(&backup.id).await.expect("it is there");
    let service = Some("org.example.Backup1");
    let called = caller
        .connection
        .call_method(service, &path, Some(INTERFACE), method, body);
    called.await.unwrap_or_else(|e| panic!("{method}: {e}"))
}

/// Returns the duration of a job, from the call to the signal of its end.
async fn job<B: serde::Serialize + zbus::DynamicType>(
    caller: &mut Caller,
    backup: &Stored,
    method: &str,
    body: &B,
) -> f64 {
    let began = Instant::now();
    call(caller, backup, method, body).await;
    completed(caller).await;
    began.elapsed().as_secs_f64()
}

/// Returns the duration of a restore of the VM's disk, including fsync.
pub async fn restore(caller: &mut Caller, backup: &Stored, target: &File, format: &str) -> f64 {
    let targets = vec![(DISK, zbus::Fd::from(target))];
    let options = Options::from([("format", Variant::from(format))]);
    job(caller, backup, "Restore", &(targets, options)).await
}

pub async fn delete(caller: &Caller, backup: &Stored, options: &[&'static str]) -> f64 {
    let options: Options = options.iter().map(|name| (*name, Variant::from(true))).collect();
    let began = Instant::now();
    call(caller, backup, "Delete", &options).await;
    began.elapsed().as_secs_f64()
}

/// Uses the fastest options, and calls fsync.
pub fn convert(source: &Path, target: &Path, options: &[&str]) -> f64 {
    timed(|| {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-U", "-f", "qcow2", "-W", "-m", "8"]);
        command.args(options).arg(source).arg(target);
        process::run(command).expect_success();
        match target.starts_with("/dev") {
            true => open(target).sync_all().expect("the device is written"),
            false => make_durable(target),
        }
    })
}

fn has_b3sum() -> bool {
    Command::new("b3sum").arg("--version").output().is_ok()
}

fn hash(image: &Path) -> f64 {
    timed(|| {
        if has_b3sum() {
            let mut command = Command::new("b3sum");
            command.arg(image);
            process::run(command).expect_success();
            return;
        }
        let content = std::fs::read(image).expect("it is read");
        let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
        let part = content.len().div_ceil(threads).max(1);
        std::thread::scope(|scope| {
            for part in content.chunks(part) {
                scope.spawn(|| std::hint::black_box(blake3::hash(part)));
            }
        });
    })
}

/// Reads the file into the page cache.
fn warm(file: &Path) {
    std::hint::black_box(std::fs::read(file).expect("it is read").len());
}

pub fn new_file(path: &Path) -> File {
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    options.open(path).expect("a file is made")
}

fn open(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("it is there")
}
