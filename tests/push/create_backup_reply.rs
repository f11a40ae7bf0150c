//! The reply of CreateBackup: when it arrives, the backup has begun.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::System;
use crate::common::caller::{Caller, assert_completed};
use crate::common::disk::Disk;
use crate::common::process;
use crate::common::proxies::{Options, error_name};
use crate::common::storage::files_below;
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;

/// Keeps both processors busy until it is dropped.
struct Load(Arc<AtomicBool>);

impl Load {
    fn begin() -> Self {
        let over = Arc::new(AtomicBool::new(false));
        for _ in 0..2 {
            let over = over.clone();
            std::thread::spawn(move || while !over.load(Ordering::Relaxed) {});
        }
        Self(over)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A program that flushes its database, calls CreateBackup and continues writing relies on this.
#[tokio::test(flavor = "multi_thread")]
async fn writes_after_the_reply_are_in_no_image() {
    let system = System::start();
    let vm = system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", 8 * MIB).fill(0, 4 * MIB, 0xff))
            .running(),
    );
    let caller = Caller::new(&system).await;
    let _load = Load::begin();
    for round in 1..=100_u8 {
        vm.write("vda", 0, 4 * MIB, round);
        let full = Options::from([("incremental", Variant::from("full"))]);
        let job = caller.start_with("web", "", &[], full).await;
        vm.write("vda", 0, 4 * MIB, 0xff);
        assert_completed(&job).await;
        let store = system.store();
        let images = files_below(&store);
        let image = images.iter().find(|path| path.ends_with("vda.qcow2")).unwrap();
        let mut command = Command::new("qemu-io");
        command
            .args(["-r", "-f", "qcow2", "-c", &format!("read -P {round} 0 4M")])
            .arg(store.join(image));
        let read = process::run(command);
        assert!(
            read.success() && !read.stdout.contains("Pattern verification failed"),
            "round {round}: {}{}",
            read.stdout,
            read.stderr
        );
        std::fs::remove_dir_all(store.join("web")).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_cannot_start_returns_the_error_and_leaves_no_residue() {
    let system = System::start();
    let vm = system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", 8 * MIB).fill(0, 4 * MIB, 0x11))
            .running(),
    );
    let before = vm.residue();
    let caller = Caller::new(&system).await;
    let required = Options::from([("quiesce", Variant::from("require"))]);
    let refused = caller.try_start("web", "", &[], required).await.unwrap_err();
    assert!(
        error_name(&refused).starts_with("org.example.Backup1.Error."),
        "{refused}"
    );
    assert!(
        refused.to_string().contains("no guest agent is configured"),
        "{refused}"
    );
    assert_eq!(vm.residue(), before);
    assert_eq!(files_below(&system.store()), [""; 0]);
    // The domain is free for the next backup as soon as the reply is sent.
    caller.complete("web", "").await;
}
