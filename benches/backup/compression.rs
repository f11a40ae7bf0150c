//! Compares compressed backups with `qemu-img convert -c`.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::disk::Disk;
use crate::common::proxies::Options;
use crate::pair::Pair;
use crate::stored::{convert, delete, stored};
use crate::workspace::{SOFT as SOFT_SIZE, Workspace};
use crate::{DISK, ON_DEVICE, SOFT};

/// Returns the times and the sizes.
pub async fn measure(
    system: &System,
    caller: &mut Caller,
    workspace: &Workspace,
    rounds: usize,
) -> (Vec<Pair>, Vec<Pair>) {
    let source = workspace.soft();
    let vm = system.configured(
        system
            .vm(SOFT)
            .disk(Disk::new(DISK, SOFT_SIZE).at(&source))
            .running(),
    );
    let mut time = Pair::new("a zstd backup / convert -c with zstd + fsync", 1.0);
    let mut size = Pair::new("its size / convert's", 1.05);
    let document = format!(
        "<domainbackup><store name='{ON_DEVICE}'/><disks><disk name='{DISK}'>\
         <driver type='qcow2' compress='zstd'/></disk></disks></domainbackup>"
    );
    let target = workspace.target();
    for _ in 0..rounds {
        workspace.settle();
        let began = Instant::now();
        let options = Options::from([("incremental", "full".into())]);
        let job = caller.start_with(SOFT, &document, &[], options).await;
        let backup = stored(caller, &job).await;
        time.ours.push(began.elapsed().as_secs_f64());
        size.ours.push(length(&backup.image));
        delete(caller, &backup, &[]).await;
        workspace.settle();
        let options = ["-c", "-O", "qcow2", "-o", "compression_type=zstd"];
        time.others.push(convert(&source, &target, &options));
        size.others.push(length(&target));
        std::fs::remove_file(&target).expect("a copy is removed");
    }
    drop(vm);
    (vec![time], vec![size])
}

fn length(file: &Path) -> f64 {
    (file.metadata().expect("it is there").blocks() * 512) as f64
}
