//! A host restart in the middle of a backup: data that was written and not durable is lost.
//!
//! The test kills the service at a point, removes from the images what a power cut would, and starts the next service
//! in another boot. `make power-cuts` does the same to a whole host.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::common::System;
use crate::common::caller::{Caller, assert_completed};
use crate::common::disk::Disk;
use crate::common::proxies::Options;
use crate::common::storage::{files_below, identical};
use crate::common::vm::Vm;
use crate::common::wait;

const MIB: u64 = 1 << 20;

struct Scene {
    system: System,
    vm: Vm,
}

impl Scene {
    /// Starts a VM and a backup during which the service dies at `point`, and ends the QEMU.
    async fn cut_at(point: &str) -> Self {
        let mut system = System::start();
        let vm = system.configured(
            system
                .vm("web")
                .disk(Disk::new("vda", 16 * MIB).fill(0, 8 * MIB, 0x11))
                .running(),
        );
        system.stop_daemon();
        system.start_dying_daemon(point);
        system.wait_for_domain("web");
        let caller = Caller::new(&system).await;
        // The service may die before it replies.
        let _ = caller.try_start("web", "", &[], Options::new()).await;
        system.wait_for_death();
        let mut scene = Self { system, vm };
        scene.vm.quit();
        scene
    }

    fn image(&self) -> PathBuf {
        let store = self.system.store();
        let images = files_below(&store);
        let image = images.iter().find(|path| path.ends_with("vda.qcow2"));
        store.join(image.expect("the image is there"))
    }

    /// Removes a page from the file, as if it was only in memory.
    fn lose_a_page(&self) {
        let image = File::options().write(true).open(self.image()).unwrap();
        let middle = image.metadata().unwrap().len() / 2;
        image.write_all_at(&[0; 4096], middle).unwrap();
    }

    /// Returns the outcome of the job after the service has started in another boot.
    async fn outcome_in_another_boot(&mut self) -> (String, String, String) {
        self.system.start_daemon_in_another_boot();
        let caller = Caller::new(&self.system).await;
        let job = caller.manager.get_job(1).await.expect("the job is known");
        let job = caller.job(job).await;
        wait::within("the end", job.wait()).await.unwrap()
    }

    async fn assert_no_backup(&mut self) {
        let (result, error, message) = self.outcome_in_another_boot().await;
        let error = error.rsplit('.').next().unwrap();
        assert_eq!(
            (result.as_str(), error),
            ("failed", "DomainUnreachable"),
            "{message}"
        );
        assert!(message.contains("the host restarted"), "{message}");
        assert!(files_below(&self.system.store()).is_empty());
        let caller = Caller::new(&self.system).await;
        assert!(backups(&caller).await == 0);
    }
}

async fn backups(caller: &Caller) -> usize {
    caller.manager.list_backups(Options::new()).await.unwrap().0.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_were_not_durable_when_the_host_restarted_are_no_backup() {
    for point in [
        "before follow",
        "before close-images",
        "after close-images",
        "before seal",
        "after seal",
    ] {
        let mut scene = Scene::cut_at(point).await;
        scene.lose_a_page();
        scene.assert_no_backup().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_were_durable_when_the_host_restarted_are_published() {
    for point in ["before publish", "BeforeRename", "Renamed", "after publish"] {
        let mut scene = Scene::cut_at(point).await;
        let (result, _, message) = scene.outcome_in_another_boot().await;
        assert_eq!(result, "completed", "{point}: {message}");
        assert!(identical(
            scene.vm.source_path("vda"),
            "qcow2",
            &scene.image(),
            "qcow2"
        ));
        let caller = Caller::new(&scene.system).await;
        assert_eq!(backups(&caller).await, 1, "{point}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_changed_after_they_were_durable_are_no_backup() {
    let mut scene = Scene::cut_at("before publish").await;
    scene.lose_a_page();
    scene.assert_no_backup().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_end_of_the_service_alone_loses_nothing() {
    let mut scene = Scene::cut_at("before seal").await;
    scene.system.start_daemon();
    let caller = Caller::new(&scene.system).await;
    let job = caller.manager.get_job(1).await.expect("the job is known");
    let job = caller.job(job).await;
    assert_completed(&job).await;
}
