//! Measures incremental backups of disks of several sizes with the same amount of changed data.

use std::time::Instant;

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::disk::Disk;
use crate::common::proxies::Options;
use crate::common::vm::Vm;
use crate::{DISK, ON_DEVICE};

/// Sizes of the disks, in GiB.
pub const SIZES: [u64; 3] = [1, 16, 64];
/// Bytes that change between two backups, in stretches that are spread evenly over the disk.
const CHANGED: u64 = 64 << 20;
const STRETCHES: u64 = 64;

/// One backup.
#[derive(Debug, Clone, Copy)]
pub struct Increment {
    /// Duration from the call to the signal of the durable backup.
    pub seconds: f64,
    /// Bytes that QEMU copied, and the size of the image.
    pub copied: u64,
    pub image: u64,
}

/// Measures incremental backups of an unchanged disk, from the call to the signal, in seconds.
pub async fn unchanged(caller: &mut Caller, vm: &Vm, rounds: usize) -> Vec<f64> {
    back_up(caller, vm, "full").await;
    let mut measured = Vec::new();
    // Many, because they are short.
    for _ in 0..rounds * 5 {
        measured.push(back_up(caller, vm, "auto").await.seconds);
    }
    measured
}

/// Returns the measurements of each size, in the order of [`SIZES`].
pub async fn measure(system: &System, caller: &mut Caller, rounds: usize) -> [Vec<Increment>; 3] {
    let machines: Vec<Vm> = SIZES.iter().map(|gib| machine(system, *gib)).collect();
    for vm in &machines {
        back_up(caller, vm, "full").await;
    }
    let mut measured = [const { Vec::new() }; 3];
    for round in 0..rounds {
        for turn in 0..SIZES.len() {
            // Varies the order, so that none always follows the same other one.
            let index = (turn + round) % SIZES.len();
            change(&machines[index], SIZES[index] << 30, round as u8 + 1);
            measured[index].push(back_up(caller, &machines[index], "auto").await);
        }
    }
    measured
}

fn machine(system: &System, gib: u64) -> Vm {
    let disk = Disk::new(DISK, gib << 30).fill(0, 256 << 20, 0x5a);
    system.configured(system.vm(&format!("gib{gib}")).disk(disk).running())
}

fn change(vm: &Vm, size: u64, pattern: u8) {
    for stretch in 0..STRETCHES {
        vm.write(DISK, stretch * (size / STRETCHES), CHANGED / STRETCHES, pattern);
    }
    vm.flush(DISK);
}

async fn back_up(caller: &mut Caller, vm: &Vm, incremental: &'static str) -> Increment {
    let document = format!("<domainbackup><store name='{ON_DEVICE}'/></domainbackup>");
    let options = Options::from([("incremental", incremental.into())]);
    rustix::fs::sync();
    let began = Instant::now();
    let job = caller.start_with(vm.name(), &document, &[], options).await;
    let signals = caller.signals_until("Completed").await;
    let seconds = began.elapsed().as_secs_f64();
    let last = signals.last().expect("it ends with the signal");
    assert_eq!(last.arguments[0], "completed", "{last:?}");
    let disks = job.disks().await.expect("the job answers");
    let image = std::fs::metadata(&disks[0].4).expect("the image is there");
    Increment {
        seconds,
        copied: disks[0].3,
        image: image.len(),
    }
}
