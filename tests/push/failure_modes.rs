//! A VM that changes, stops or ends, or that other tools change, while its backup runs. `docs/failure-modes.md`
//! documents the results for users.

use std::path::PathBuf;

use crate::common::System;
use crate::common::caller::{Caller, assert_completed, assert_failed};
use crate::common::disk::{Disk, Kind};
use crate::common::proxies::{JobProxy, Options, error_name, slowly};
use crate::common::proxy::Proxy;
use crate::common::storage::{files_below, holds};
use crate::common::vm::{Builder, Residue, Vm};
use crate::common::wait::{until_async, within};
use serde_json::{Value, json};
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
/// The virtual sizes of `vda` and `vdb`, which are full of different patterns.
const VDA: u64 = 16 * MIB;
const VDB: u64 = 8 * MIB;

/// A system with a running VM `web`.
struct Scene {
    system: System,
    vm: Vm,
    caller: Caller,
    before: Residue,
}

fn disks(machine: Builder) -> Builder {
    machine
        .disk(Disk::new("vda", VDA).fill(0, VDA, 0x11))
        .disk(Disk::new("vdb", VDB).kind(Kind::Scsi).fill(0, VDB, 0x22))
        .running()
}

impl Scene {
    async fn new(machine: impl FnOnce(Builder) -> Builder) -> Self {
        Self::of(System::start(), machine).await
    }

    async fn of(system: System, machine: impl FnOnce(Builder) -> Builder) -> Self {
        let vm = system.configured(machine(system.vm("web")));
        Self {
            caller: Caller::new(&system).await,
            before: vm.residue(),
            system,
            vm,
        }
    }

    /// Starts a system in which the service reaches the monitor through a proxy.
    async fn with_proxy() -> (Self, Proxy) {
        let system = System::start();
        let vm = disks(system.vm("web")).start();
        let proxy = Proxy::start(&system.dir().join("proxy"), &vm.monitor_path());
        system.write_domain_file("web", &format!("monitor = \"{}\"\n", proxy.path().display()));
        system.wait_for_domain("web");
        let scene = Self {
            caller: Caller::new(&system).await,
            before: vm.residue(),
            system,
            vm,
        };
        (scene, proxy)
    }

    /// Starts a backup that stays in the middle until [`Scene::completes`].
    async fn begin(&self) -> JobProxy<'static> {
        self.begin_with(Options::new()).await
    }

    async fn begin_with(&self, mut options: Options<'_>) -> JobProxy<'static> {
        options.insert("bandwidth", Variant::from(MIB));
        let job = self.caller.start_with("web", "", &[], options).await;
        until_async("some progress", || async {
            (job.progress().await.unwrap() > 0.0).then_some(())
        })
        .await;
        job
    }

    /// Lets the backup continue to its end. It must complete with the contents at its start.
    async fn completes(&self, job: &JobProxy<'_>) {
        job.set_speed(0).await.unwrap();
        assert_completed(job).await;
        for (disk, size, pattern) in [("vda", VDA, 0x11), ("vdb", VDB, 0x22)] {
            let image = image(job, disk).await;
            assert!(holds(&image, "qcow2", 0, size, pattern), "{disk}");
        }
    }

    /// Checks that the VM is as before and can be backed up.
    async fn assert_as_before(&self) {
        assert_eq!(self.vm.residue(), self.before);
        self.caller.complete("web", "").await;
        assert_eq!(self.vm.residue(), self.before);
    }

    async fn domain_state(&self, wanted: &str) {
        until_async(&format!("the machine to be {wanted}"), || async {
            let domains = self.caller.manager.list_domains().await.unwrap();
            domains
                .iter()
                .any(|domain| domain.1 == "web" && domain.3 == wanted)
                .then_some(())
        })
        .await;
    }

    /// Adds an empty image next to the VM's as a node in its QEMU.
    fn add_node(&self, name: &str, size: u64) {
        let path = self.system.dir().join(name);
        let mut create = crate::common::process::bound("qemu-img");
        create
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&path)
            .arg(size.to_string());
        crate::common::process::run(create).expect_success();
        let node = json!({
            "driver": "qcow2", "node-name": name, "file": { "driver": "file", "filename": path },
        });
        self.vm.qmp("blockdev-add", node);
    }
}

async fn image(job: &JobProxy<'_>, disk: &str) -> PathBuf {
    let disks = job.disks().await.unwrap();
    PathBuf::from(&disks.iter().find(|row| row.0 == disk).unwrap().4)
}

fn refusal(result: Result<Value, Value>) -> String {
    result.expect_err("QEMU refuses")["desc"].to_string()
}

fn allow_poweroff() -> Options<'static> {
    Options::from([("allow-poweroff", Variant::from(true))])
}

// The guest.

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_reset_is_backed_up_all_the_same() {
    let scene = Scene::new(disks).await;
    let job = scene.begin().await;
    scene.vm.qmp("system_reset", json!({}));
    scene.vm.wait_event("RESET", |_| true);
    scene.completes(&job).await;
    scene.assert_as_before().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_vm_is_backed_up_and_can_continue() {
    let scene = Scene::new(disks).await;
    let job = scene.begin().await;
    scene.vm.stop();
    scene.domain_state("paused").await;
    let done = job.bytes_done().await.unwrap();
    until_async("the backup to continue", || async {
        (job.bytes_done().await.unwrap() > done).then_some(())
    })
    .await;
    scene.vm.cont();
    scene.domain_state("running").await;
    scene.completes(&job).await;
    scene.assert_as_before().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_off_waits_for_its_backup_and_is_off_then() {
    let mut scene = Scene::new(|machine| disks(machine).guest()).await;
    let job = scene.begin().await;
    scene.vm.guest().power_off();
    scene.domain_state("shut off").await;
    scene.completes(&job).await;
    scene.vm.wait_for_end();
    scene.domain_state("unreachable").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_off_during_a_backup_that_is_cancelled_is_off_then() {
    let mut scene = Scene::new(|machine| disks(machine).guest()).await;
    let job = scene.begin().await;
    scene.vm.guest().power_off();
    scene.domain_state("shut off").await;
    crate::common::caller::cancel(&job).await;
    scene.vm.wait_for_end();
    assert_eq!(files_below(&scene.system.store()), [""; 0]);
}

/// Another client uses the backup's target, so it cannot be removed from QEMU.
#[tokio::test(flavor = "multi_thread")]
async fn residue_of_a_backup_in_qemu_does_not_block_the_power_off() {
    let mut scene = Scene::new(|machine| disks(machine).guest()).await;
    let job = scene.begin().await;
    let nodes = scene.vm.qmp("query-named-block-nodes", json!({ "flat": true }));
    let names = nodes.as_array().unwrap().iter();
    let mut names = names.filter_map(|node| node["node-name"].as_str());
    let target = names.find(|name| name.starts_with("backupd-") && name.ends_with("-0-target"));
    scene.vm.qmp(
        "blockdev-add",
        json!({ "driver": "raw", "node-name": "theirs", "file": target, "read-only": true }),
    );
    crate::common::caller::cancel(&job).await;
    assert_ne!(scene.vm.residue(), scene.before);
    scene.vm.guest().power_off();
    scene.vm.wait_for_end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_panics_waits_for_its_backup_and_ends_then() {
    let mut scene = Scene::new(|machine| disks(machine).guest()).await;
    let job = scene.begin().await;
    scene.vm.guest().panic();
    scene.domain_state("crashed").await;
    scene.completes(&job).await;
    scene.vm.wait_for_end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_may_power_off_ends_its_backup() {
    let mut scene = Scene::new(|machine| disks(machine).guest()).await;
    let job = scene.begin_with(allow_poweroff()).await;
    scene.vm.guest().power_off();
    scene.vm.wait_for_end();
    assert_failed(&job, "DomainUnreachable", "QEMU").await;
    assert_eq!(files_below(&scene.system.store()), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_off_after_its_backup_is_off_at_once() {
    let mut scene = Scene::new(|machine| disks(machine).guest()).await;
    scene.assert_as_before().await;
    scene.vm.guest().power_off();
    scene.vm.wait_for_end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_stays_when_its_guest_powers_off_stays_after_a_backup_too() {
    for (extra, panics) in [
        (&["-no-shutdown"][..], false),
        (&["-action", "shutdown=pause"], false),
        (&["-action", "panic=pause"], true),
    ] {
        let mut scene = Scene::new(|machine| disks(machine).guest().extra(extra)).await;
        let job = scene.begin().await;
        let (word, state) = match panics {
            false => {
                scene.vm.guest().power_off();
                ("shutdown", "shut off")
            }
            true => {
                scene.vm.guest().panic();
                ("guest-panicked", "crashed")
            }
        };
        scene.domain_state(state).await;
        scene.completes(&job).await;
        // After all events that the service must handle, and many more.
        scene.caller.complete("web", "").await;
        assert_eq!(
            scene.vm.qmp("query-status", json!({}))["status"],
            word,
            "{extra:?}"
        );
    }
}

// Disks that change.

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_unplugged_is_backed_up_to_its_end() {
    let scene = Scene::new(disks).await;
    let job = scene.begin().await;
    scene.vm.qmp("device_del", json!({ "id": "vdb" }));
    scene
        .vm
        .wait_event("DEVICE_DELETED", |data| data["device"] == "vdb");
    // The manager's next command must wait.
    let node = json!({ "node-name": "vdb-format" });
    let said = refusal(scene.vm.try_qmp("blockdev-del", node.clone()));
    assert!(said.contains("in use"), "{said}");
    scene.completes(&job).await;
    scene.vm.qmp("blockdev-del", node);
    let next = scene.caller.complete("web", "").await;
    let disks = next.disks().await.unwrap();
    assert_eq!(
        disks.iter().map(|row| row.0.as_str()).collect::<Vec<_>>(),
        ["vda"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drive_removed_with_its_device_fails_the_backup() {
    let mut scene = Scene::new(|machine| {
        machine
            .disk(Disk::new("vda", VDA).fill(0, VDA, 0x11))
            .disk(
                Disk::new("vdb", VDB)
                    .kind(Kind::Scsi)
                    .drive_style()
                    .fill(0, VDB, 0x22),
            )
            .running()
    })
    .await;
    let job = scene.begin().await;
    scene.vm.qmp("device_del", json!({ "id": "vdb" }));
    let (result, _, _) = within("the end of the backup", job.wait()).await.unwrap();
    assert_eq!(result, "cancelled");
    assert_eq!(files_below(&scene.system.store()), [""; 0]);
    // QEMU removes the drive's own nodes a moment later.
    scene.before.nodes.retain(|node| node.starts_with("vda"));
    crate::common::wait::until("the drive to be gone", || {
        (scene.vm.residue().nodes == scene.before.nodes).then_some(())
    });
    scene.caller.complete("web", "").await;
    assert_eq!(scene.vm.residue(), scene.before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_the_guest_does_not_release_is_backed_up() {
    let scene = Scene::new(|machine| {
        let port = "pcie-root-port,id=hole,chassis=1";
        let node = "driver=null-co,node-name=plug,size=1048576,read-zeroes=on";
        let device = "virtio-blk-pci,id=plugged,drive=plug,bus=hole";
        disks(machine).extra(&["-device", port, "-blockdev", node, "-device", device])
    })
    .await;
    let job = scene.begin().await;
    scene.vm.qmp("device_del", json!({ "id": "plugged" }));
    scene.completes(&job).await;
    scene.assert_as_before().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_cannot_be_resized_while_it_is_backed_up_and_can_afterwards() {
    let scene = Scene::new(disks).await;
    let job = scene.begin().await;
    for size in [VDA * 2, VDA / 2] {
        let resize = json!({ "node-name": "vda-format", "size": size });
        refusal(scene.vm.try_qmp("block_resize", resize));
    }
    scene.completes(&job).await;
    let resize = json!({ "node-name": "vda-format", "size": VDA * 2 });
    scene.vm.qmp("block_resize", resize);
    let next = scene.caller.complete("web", "").await;
    let grown = image(&next, "vda").await;
    assert!(holds(&grown, "qcow2", VDA, VDA, 0) && holds(&grown, "qcow2", 0, VDA, 0x11));
}

// Other tools.

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_mirrored_by_another_tool_is_reported_as_busy() {
    let scene = Scene::new(disks).await;
    scene.add_node("mirror", VDA);
    let with_node = scene.vm.residue();
    let mirror = json!({
        "job-id": "theirs", "device": "vda-format", "target": "mirror", "sync": "full", "speed": MIB,
    });
    scene.vm.qmp("blockdev-mirror", mirror);
    let job = scene.caller.start("web", "").await;
    assert_failed(&job, "QemuError", "block device is in use by block job: mirror").await;
    assert_eq!(
        scene.vm.residue().jobs,
        ["theirs"],
        "the other tool's job continues"
    );
    assert_eq!(files_below(&scene.system.store()), [""; 0]);
    scene
        .vm
        .qmp("block-job-cancel", json!({ "device": "theirs", "force": true }));
    scene.vm.wait_event("BLOCK_JOB_CANCELLED", |_| true);
    assert_eq!(scene.vm.residue(), with_node);
    scene.caller.complete("web", "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_under_backup_cannot_be_mirrored_but_backed_up_by_other_tools() {
    let scene = Scene::new(disks).await;
    for name in ["mirror", "other"] {
        scene.add_node(name, VDA);
    }
    let job = scene.begin().await;
    let mirror = json!({
        "job-id": "theirs", "device": "vda-format", "target": "mirror", "sync": "full",
    });
    refusal(scene.vm.try_qmp("blockdev-mirror", mirror));
    let backup = json!({
        "job-id": "theirs", "device": "vda-format", "target": "other", "sync": "full", "speed": MIB,
    });
    scene.vm.qmp("blockdev-backup", backup);
    scene.completes(&job).await;
    assert_eq!(
        scene.vm.residue().jobs,
        ["theirs"],
        "the other tool's job continues"
    );
    scene
        .vm
        .qmp("block-job-set-speed", json!({ "device": "theirs", "speed": 0 }));
    let ended = scene
        .vm
        .wait_event("BLOCK_JOB_COMPLETED", |data| data["device"] == "theirs");
    assert_eq!(ended["data"]["error"], Value::Null, "{ended}");
    for name in ["mirror", "other"] {
        scene.vm.qmp("blockdev-del", json!({ "node-name": name }));
    }
    scene.assert_as_before().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_by_another_tool_does_not_change_the_point_in_time() {
    let scene = Scene::new(disks).await;
    let job = scene.begin().await;
    let snapshot = json!({
        "node-name": "vda-format", "snapshot-node-name": "overlay", "format": "qcow2",
        "snapshot-file": scene.system.dir().join("overlay.qcow2"),
    });
    scene.vm.qmp("blockdev-snapshot-sync", snapshot);
    // This write goes to the overlay.
    scene.vm.write("vda", 0, VDA, 0x77);
    scene.completes(&job).await;
    assert!(scene.vm.residue().jobs.is_empty());
    let next = scene.caller.complete("web", "").await;
    assert!(holds(&image(&next, "vda").await, "qcow2", 0, VDA, 0x77));
}

/// QEMU copies allocated data of a disk's top image, and scans for it in the image that is on top at the time.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_before_qemu_has_found_the_holes_fails_the_backup() {
    for format in ["qcow2", "raw"] {
        let (
            Scene {
                system, vm, caller, ..
            },
            proxy,
        ) = Scene::with_proxy().await;
        let overlay = system.dir().join("overlay.qcow2");
        let text = format!(
            "<domainbackup><disks><disk name='vda'><driver type='{format}'/></disk></disks></domainbackup>"
        );
        let start = proxy.hold("transaction", |_| true);
        let started = caller.start_with("web", &text, &[], slowly(MIB));
        let snapshot = tokio::task::spawn_blocking(move || {
            start.reached();
            // The service's query before it examines the disks.
            let look = proxy.hold("query-jobs", |_| true);
            start.pass();
            look.reached();
            let snapshot = json!({
                "node-name": "vda-format", "snapshot-node-name": "overlay", "format": "qcow2",
                "snapshot-file": overlay,
            });
            vm.qmp("blockdev-snapshot-sync", snapshot);
            look.pass();
            (vm, proxy)
        });
        let (job, snapshot) = tokio::join!(started, snapshot);
        assert_failed(&job, "Busy", "another image").await;
        let _running = snapshot.unwrap();
        assert_eq!(files_below(&system.store()), [""; 0]);
        caller.complete("web", &text).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_fails_while_a_backup_runs_and_works_afterwards() {
    let scene = Scene::new(disks).await;
    let job = scene.begin().await;
    let migrate = || {
        scene.vm.qmp("migrate", json!({ "uri": "exec:cat>/dev/null" }));
        crate::common::wait::until("the migration's end", || {
            let status = scene.vm.qmp("query-migrate", json!({}))["status"].clone();
            [json!("completed"), json!("failed")]
                .contains(&status)
                .then_some(status)
        })
    };
    assert_eq!(migrate(), "failed");
    scene.domain_state("running").await;
    scene.completes(&job).await;
    scene.assert_as_before().await;
    assert_eq!(migrate(), "completed");
    // The disks belong to another QEMU now.
    let refused = scene.caller.try_start("web", "", &[], Options::new()).await;
    let refused = refused.expect_err("the backup is refused");
    assert_eq!(
        error_name(&refused),
        "org.example.Backup1.Error.DomainUnreachable"
    );
    assert!(
        refused.to_string().contains("migrated to another host"),
        "{refused}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_destination_of_a_migration_is_not_backed_up() {
    let system = System::start();
    let vm = system.configured(disks(system.vm("web")).extra(&["-incoming", "defer"]));
    let caller = Caller::new(&system).await;
    let refused = caller.try_start("web", "", &[], Options::new()).await;
    let refused = refused.expect_err("the backup is refused");
    assert_eq!(error_name(&refused), "org.example.Backup1.Error.Busy");
    assert!(refused.to_string().contains("being migrated"), "{refused}");
    drop(vm);
}

// QEMU and the connection to it.

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_qemu_blocks_no_other_domain_and_its_backup_continues() {
    let mut scene = Scene::new(disks).await;
    let other = scene.system.configured(disks(scene.system.vm("other")));
    let job = scene.begin().await;
    scene.vm.freeze();
    scene.caller.complete("other", "").await;
    assert_eq!(job.state().await.unwrap(), "running");
    assert_eq!(other.residue().jobs, [""; 0]);
    scene.vm.thaw();
    scene.completes(&job).await;
    scene.assert_as_before().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_stopped_for_too_long_fails_its_backup_and_is_cleaned_up_later() {
    let system = System::setup().table("[deadlines]\nstall-seconds = 2").start();
    let mut scene = Scene::of(system, disks).await;
    let job = scene.begin().await;
    scene.vm.freeze();
    // A job at its initial limit might report no progress for longer.
    job.set_speed(0).await.unwrap();
    assert_failed(&job, "Stalled", "no progress for 2 seconds").await;
    scene.vm.thaw();
    until_async("QEMU to be rid of the backup", || async {
        (scene.vm.residue() == scene.before).then_some(())
    })
    .await;
    assert_eq!(files_below(&scene.system.store()), [""; 0]);
    until_async("the next backup", || async {
        let next = scene.caller.try_start("web", "", &[], Options::new()).await;
        assert_completed(&scene.caller.job(next.ok()?).await).await;
        Some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_stops_during_a_bandwidth_change_fails_its_backup() {
    // Longer than the timeouts of a bandwidth change and of a progress query.
    let system = System::setup().table("[deadlines]\nstall-seconds = 11").start();
    let mut vms = ["web", "db"].map(|name| system.configured(disks(system.vm(name))));
    let caller = Caller::new(&system).await;
    let mut jobs = Vec::new();
    for (name, vm) in ["web", "db"].into_iter().zip(&mut vms) {
        let job = caller.start_with(name, "", &[], slowly(MIB)).await;
        until_async("the copying", async || {
            (job.progress().await.unwrap() > 0.0).then_some(())
        })
        .await;
        vm.freeze();
        job.set_speed(2 * MIB).await.unwrap();
        jobs.push(job);
    }
    jobs[0].cancel().await.unwrap();
    let (ended, ()) = tokio::join!(
        within("the end of the cancelled backup", jobs[0].wait()),
        assert_failed(&jobs[1], "Stalled", "made no progress for 11 seconds"),
    );
    assert_eq!(ended.unwrap().0, "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_lost_and_restored_in_the_middle_does_not_affect_the_backup() {
    let (scene, proxy) = Scene::with_proxy().await;
    let job = scene.begin().await;
    for _ in 0..3 {
        let question = proxy.hold("query-jobs", |_| true);
        // A read of the property makes the service query QEMU.
        job.progress().await.unwrap();
        tokio::task::spawn_blocking(move || {
            question.reached();
            question.cut();
        })
        .await
        .unwrap();
    }
    scene.completes(&job).await;
    scene.assert_as_before().await;
}

// The page for users.

/// Whether the file of tests has that test. The page names the file without its directory.
fn has_test(root: &std::path::Path, file: &str, name: &str) -> bool {
    let tests = root.join("tests");
    let directories = std::fs::read_dir(&tests).unwrap();
    let directories = directories.map(|directory| directory.unwrap().path());
    let codes = directories
        .chain([tests])
        .filter_map(|directory| std::fs::read_to_string(directory.join(format!("{file}.rs"))).ok());
    codes
        .into_iter()
        .any(|code| code.contains(&format!("fn {name}()")))
}

#[test]
fn every_test_named_in_the_documentation_exists() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/failure-modes.md")).unwrap();
    let mut named = 0;
    for row in page.lines().filter(|line| line.starts_with("| ")) {
        // The last cell, which can be empty.
        let cell = row
            .trim_end()
            .trim_end_matches('|')
            .rsplit('|')
            .next()
            .unwrap()
            .trim();
        let mut file = "";
        for part in cell.split(", ") {
            let name = match part.split_once(": `") {
                Some((of, name)) => {
                    file = of;
                    name
                }
                None => part.trim_start_matches('`'),
            };
            let Some(name) = name.strip_suffix('`') else {
                continue;
            };
            assert!(has_test(root, file, name), "{file}: {name}");
            named += 1;
        }
    }
    assert!(named > 30, "{named} tests are found");
}
