//! The guest of a VM whose backup's target fails while the guest writes: a Linux that writes to its disk all the time.
//!
//! QEMU copies a part of the disk to the target before the guest overwrites it. If that fails, the guest's write fails
//! too.

use std::fs;
use std::path::PathBuf;

use crate::common::bus::project_file;
use crate::common::caller::{Caller, assert_failed};
use crate::common::disk::Disk;
use crate::common::initramfs::{Initramfs, parts};
use crate::common::proxies::slowly;
use crate::common::storage::Tmpfs;
use crate::common::vm::Vm;
use crate::common::wait;
use crate::common::{System, test_directory};

const MIB: u64 = 1 << 20;
const DOCUMENT: &str = "<domainbackup><store name='small'/></domainbackup>";

struct Scene {
    system: System,
    store: Tmpfs,
    vm: Vm,
    serial: PathBuf,
    _place: tempfile::TempDir,
}

impl Scene {
    /// Boots the guest; returns when it writes.
    fn boot() -> Self {
        let place = test_directory();
        let store = Tmpfs::mount(&place.path().join("store"), 40 * MIB);
        let system = System::setup().store("small", store.path()).start();
        let dir = system.dir().to_owned();
        let archive = Initramfs::new(&dir, &project_file("tests/push/guest-writer.sh")).pack();
        let serial = dir.join("serial");
        let kernel = parts().join("vmlinuz").display().to_string();
        let vm = system
            .vm("linux")
            .disk(Disk::new("vda", 20 * MIB).raw().fill(0, 20 * MIB, 0x5a))
            .extra(&["-m", "256", "-kernel", &kernel])
            .extra(&["-initrd", &archive.display().to_string()])
            .extra(&["-append", "console=ttyS0 quiet panic=-1"])
            .extra(&["-serial", &format!("file:{}", serial.display())])
            .running();
        let vm = system.configured(vm);
        let scene = Self {
            system,
            store,
            vm,
            serial,
            _place: place,
        };
        scene.writes_on();
        scene
    }

    fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.serial).unwrap_or_default()).into_owned()
    }

    fn written(&self) -> usize {
        self.output()
            .lines()
            .filter(|line| line.starts_with("written "))
            .count()
    }

    /// Waits until the guest has written more.
    fn writes_on(&self) {
        let before = self.written();
        wait::until("the guest to write", || {
            (self.written() > before + 2).then_some(())
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_a_full_target_paused_runs_again_and_loses_no_write() {
    let mut scene = Scene::boot();
    let filler = scene.store.path().join("filler");
    for restarts in [false, true] {
        let mut caller = Caller::new(&scene.system).await;
        // Slow enough that the guest's writes meet the full target first.
        let mut job = caller.start_with("linux", DOCUMENT, &[], slowly(1)).await;
        fs::write(&filler, vec![1; 40 * MIB as usize]).unwrap_err();
        scene.vm.wait_event("BLOCK_IO_ERROR", |data| {
            data["action"] == "stop" && data["nospace"] == true
        });
        if restarts {
            let number = job.id().await.unwrap();
            scene.system.kill_daemon();
            scene.system.start_daemon();
            scene.system.wait_for_domain("linux");
            caller = Caller::new(&scene.system).await;
            job = caller.job(caller.manager.get_job(number).await.unwrap()).await;
        }
        // Now the backup's own copying fails too.
        wait::until_async("the speed to be set", || async { job.set_speed(0).await.ok() }).await;
        assert_failed(&job, "NoSpace", "No space left on device").await;
        scene.writes_on();
        assert!(!scene.output().contains("failed"), "{}", scene.output());
        let status = scene.vm.qmp("query-status", serde_json::json!({}));
        assert_eq!(status["status"], "running");
        assert!(scene.vm.residue().jobs.is_empty());
        fs::remove_file(&filler).unwrap();
    }
}
