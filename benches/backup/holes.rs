//! Measures a huge disk with almost no data: a hole should cost neither time nor space.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::disk::Disk;
use crate::pair::{Pair, Single};
use crate::stored::{back_up, convert, delete, new_file, restore};
use crate::workspace::Workspace;
use crate::{DISK, HUGE};

const SIZE: u64 = 16 << 40;
const DATA: u64 = 64 << 10;

/// The results: pairs of times and of sizes, and the service's own times.
pub struct Holes {
    pub times: Vec<Pair>,
    pub sizes: Vec<Pair>,
    pub alone: Vec<Single>,
}

pub async fn measure(system: &System, caller: &mut Caller, workspace: &Workspace, rounds: usize) -> Holes {
    let disk = Disk::new(DISK, SIZE)
        .fill(0, DATA, 0x11)
        .fill(SIZE / 2, DATA, 0x22)
        .fill(SIZE - DATA, DATA, 0x33);
    let vm = system.configured(system.vm(HUGE).disk(disk).running());
    let mut full = Single {
        what: "a full backup of 16 TiB with 192 KiB of data",
        limit: 1.0,
        values: Vec::new(),
    };
    let mut incremental = Single {
        what: "the same, incremental, 64 KiB changed",
        limit: 0.3,
        values: Vec::new(),
    };
    let mut size = Pair::new("its full backup's size / convert's", 2.0);
    let mut restored = Pair::new("its restore / convert + fsync", 2.0);
    let mut restored_size = Pair::new("its restored image's size / convert's", 2.0);
    let target = workspace.target();
    for round in 0..rounds {
        let began = Instant::now();
        let backup = back_up(caller, HUGE, "full").await;
        full.values.push(began.elapsed().as_secs_f64());
        size.ours.push(taken(&backup.image));
        convert(vm.source_path(DISK), &target, &["-O", "qcow2"]);
        size.others.push(taken(&target));
        std::fs::remove_file(&target).expect("a copy is removed");
        restored
            .others
            .push(convert(&backup.image, &target, &["-O", "qcow2"]));
        restored_size.others.push(taken(&target));
        std::fs::remove_file(&target).expect("a copy is removed");
        restored
            .ours
            .push(restore(caller, &backup, &new_file(&target), "qcow2").await);
        restored_size.ours.push(taken(&target));
        std::fs::remove_file(&target).expect("a copy is removed");
        vm.write(DISK, SIZE / 4, DATA, round as u8);
        vm.flush(DISK);
        let began = Instant::now();
        let upon = back_up(caller, HUGE, "auto").await;
        incremental.values.push(began.elapsed().as_secs_f64());
        for backup in [&upon, &backup] {
            delete(caller, backup, &[]).await;
        }
    }
    Holes {
        times: vec![restored],
        sizes: vec![size, restored_size],
        alone: vec![full, incremental],
    }
}

/// The allocated size of a file, in bytes.
fn taken(file: &Path) -> f64 {
    (file.metadata().expect("it is there").blocks() * 512) as f64
}
