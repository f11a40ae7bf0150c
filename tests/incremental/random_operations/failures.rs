//! Backups that fail, or that complete after an interruption.

use std::fs::File;
use std::io::Write;

use super::{MIB, Walk};
use crate::common::caller::cancel;
use crate::common::proxies::slowly;
use crate::common::recorded::DISKS;
use crate::common::wait;

impl Walk {
    pub async fn cancelled(&mut self) -> &'static str {
        let (caller, store) = (self.caller().await, self.any_store());
        let job = self.start(&caller, store, slowly(1)).await;
        cancel(&job.expect("the backup is accepted")).await;
        "cancelled"
    }

    /// The size of data that does not fit in the store.
    pub async fn full_store(&mut self) -> &'static str {
        let ballast = self.store.path().join("ballast");
        let caller = self.caller().await;
        let job = self
            .start(&caller, "walk", slowly(8 * MIB))
            .await
            .expect("the backup is accepted");
        let held = self.scene.now.clone();
        // QEMU copies until the space is used up.
        let mut file = File::create(&ballast).unwrap();
        while file.write(&[0x5a; 1 << 16]).is_ok() {}
        job.set_speed(0).await.ok();
        self.take(&job, "walk", held).await;
        std::fs::remove_file(&ballast).unwrap();
        "full store"
    }

    pub async fn qemu_dies(&mut self) -> &'static str {
        let (caller, store) = (self.caller().await, self.any_store());
        let job = match self.dice.roll(2) {
            0 => None,
            _ => Some(
                self.start(&caller, store, slowly(1))
                    .await
                    .expect("the backup is accepted"),
            ),
        };
        self.kill_qemu();
        if let Some(job) = job {
            let held = self.scene.now.clone();
            assert!(!self.take(&job, store, held).await, "its QEMU was killed");
        }
        self.boot();
        "QEMU killed"
    }

    /// Kills QEMU. Data that the guest flushed is kept.
    pub fn kill_qemu(&mut self) {
        let mut vm = self.scene.vm.take().expect("the machine runs");
        DISKS.iter().for_each(|disk| vm.flush(disk));
        vm.kill();
    }

    pub fn boot(&mut self) {
        self.scene.boot();
        self.residue = self.scene.vm().residue();
    }

    pub fn start_service(&mut self) {
        self.scene.system.start_daemon();
        self.scene.system.wait_for_domain(&self.scene.name);
    }

    pub fn restart(&mut self) -> &'static str {
        self.scene.system.stop_daemon();
        self.copy_catalog();
        self.start_service();
        "restart"
    }

    pub async fn service_dies(&mut self) -> &'static str {
        let (caller, store) = (self.caller().await, self.any_store());
        let job = self
            .start(&caller, store, slowly(MIB))
            .await
            .expect("the backup is accepted");
        let (id, held) = (job.id().await.unwrap(), self.scene.now.clone());
        if self.dice.roll(3) > 0 {
            wait::until_async("the copying", || async {
                (job.state().await.unwrap() == "running").then_some(())
            })
            .await;
        }
        self.scene.system.kill_daemon();
        if self.dice.roll(2) == 0 {
            self.copy_catalog();
        }
        self.guest(true);
        self.start_service();
        let caller = self.caller().await;
        let path = caller.manager.get_job(id).await.expect("the job is known again");
        let job = caller.job(path).await;
        job.set_speed(0).await.ok();
        self.take(&job, store, held).await;
        "service killed"
    }
}
