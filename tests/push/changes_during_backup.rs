//! Backups report the truth even when QEMU, its monitor, its disks, the storage or the service change at the worst
//! moment.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::System;
use crate::common::agent::{Agent, Answer};
use crate::common::caller::{Caller, assert_completed, assert_failed, brief};
use crate::common::clients::USER;
use crate::common::disk::Disk;
use crate::common::process;
use crate::common::proxies::{DomainProxy, JobProxy, Options, error_name, slowly};
use crate::common::proxy::{Hold, Proxy};
use crate::common::storage::{Immutable, LoopDevice, Tmpfs, files_below, holds, identical};
use crate::common::vm::{Builder, Residue, Vm};
use crate::common::wait::{self, until_async, within};
use rustix::process::Signal;
use serde_json::json;
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const OURS: &str = "org.example.Backup1.Error.";

/// A system with a VM `web` that the service reaches through a proxy.
struct Scene {
    system: System,
    vm: Vm,
    proxy: Proxy,
    caller: Caller,
    before: Residue,
}

impl Scene {
    async fn new() -> Self {
        Self::of(
            System::setup()
                .table("[deadlines]\nreconnect-seconds = 2")
                .start(),
        )
        .await
    }

    async fn of(system: System) -> Self {
        let vm = system
            .vm("web")
            .disk(Disk::new("vda", 16 * MIB).fill(0, 8 * MIB, 0x11))
            .disk(Disk::new("vdb", 8 * MIB).fill(0, 4 * MIB, 0x22))
            .running()
            .start();
        let proxy = Proxy::start(&system.dir().join("proxy"), &vm.monitor_path());
        system.write_domain_file("web", &format!("monitor = \"{}\"\n", proxy.path().display()));
        system.wait_for_domain("web");
        let caller = Caller::new(&system).await;
        Self {
            before: vm.residue(),
            system,
            vm,
            proxy,
            caller,
        }
    }

    /// Holds the first of these commands that concerns the backup itself and not its preparation: its jobs have
    /// concluded by then, and QEMU still has the images open.
    fn hold_end(&self, command: &str) -> Hold {
        self.proxy.hold(command, |arguments| {
            let names = ["id", "node-name"].map(|key| arguments[key].as_str().unwrap_or_default());
            names.iter().all(|name| !name.contains("-end"))
        })
    }

    /// Checks that the job fails because its QEMU was lost, sends no other signal, and leaves no file.
    async fn assert_lost(&mut self, job: &JobProxy<'_>) {
        assert_failed(job, "DomainUnreachable", "connection to QEMU was lost").await;
        let signals = brief(&self.caller.signals_until("JobEnded").await);
        let completed = signals.iter().filter(|signal| signal.starts_with("Completed"));
        let completed: Vec<_> = completed.collect();
        assert!(
            completed.len() == 1 && completed[0].starts_with("Completed failed"),
            "{signals:?}"
        );
        assert!(
            !signals
                .iter()
                .any(|signal| signal.starts_with("BlockJobCompleted")),
            "{signals:?}"
        );
        assert!(signals.last().unwrap().ends_with(" failed"), "{signals:?}");
        assert_eq!(job.state().await.unwrap(), "failed");
        for disk in job.disks().await.unwrap() {
            assert!(["cancelled", "failed"].contains(&disk.1.as_str()), "{disk:?}");
        }
        assert_eq!(files_below(&self.system.store()), [""; 0]);
    }
}

/// Starts a VM that the service knows, and a caller.
async fn known(system: System, vm: impl FnOnce(Builder) -> Builder) -> (System, Vm, Caller) {
    let vm = vm(system.vm("web")).running().start();
    system.domain_file("web", &vm);
    system.wait_for_domain("web");
    let caller = Caller::new(&system).await;
    (system, vm, caller)
}

async fn reaches(job: &JobProxy<'_>, state: &str) {
    until_async(&format!("the backup to be {state}"), || async {
        (job.state().await.unwrap() == state).then_some(())
    })
    .await;
}

fn bandwidth(bytes_per_second: u64) -> Options<'static> {
    slowly(bytes_per_second)
}

fn reuse() -> Options<'static> {
    Options::from([("reuse-external", Variant::from(true))])
}

fn document(disks: &str) -> String {
    format!("<domainbackup><disks>{disks}</disks></domainbackup>")
}

/// Checks that the call is refused because the target is a disk of a VM.
async fn refuses_source(caller: &Caller, document: &str, files: &[OwnedFd]) {
    let refused = caller.try_start("web", document, files, reuse()).await;
    let refused = refused.expect_err("the backup is refused");
    assert_eq!(error_name(&refused), format!("{OURS}TargetInvalid"), "{refused}");
    assert!(
        refused.to_string().contains("a disk of a running domain"),
        "{refused}"
    );
}

async fn image(job: &JobProxy<'_>, disk: usize) -> PathBuf {
    PathBuf::from(&job.disks().await.unwrap()[disk].4)
}

// The monitor's connection is lost when QEMU has reported success but has not closed the images yet.

#[tokio::test(flavor = "multi_thread")]
async fn qemu_killed_before_it_closed_the_images_fails_the_backup() {
    for command in ["job-dismiss", "blockdev-del"] {
        let mut scene = Scene::new().await;
        let hold = scene.hold_end(command);
        let job = scene.caller.start("web", "").await;
        hold.reached();
        assert_eq!(
            files_below(&scene.system.store()).len(),
            2,
            "they are being written"
        );
        scene.vm.kill();
        hold.cut();
        scene.assert_lost(&job).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_lost_for_good_before_the_images_were_closed_fails_the_backup() {
    for command in ["job-dismiss", "blockdev-del"] {
        let mut scene = Scene::new().await;
        let hold = scene.hold_end(command);
        let job = scene.caller.start("web", "").await;
        hold.reached();
        hold.cut_for_good();
        scene.assert_lost(&job).await;
        // The VM itself continues.
        assert_eq!(scene.vm.qmp("query-status", json!({}))["status"], "running");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_that_comes_back_before_the_images_were_closed_changes_nothing() {
    for command in ["job-dismiss", "blockdev-del"] {
        let mut scene = Scene::new().await;
        let hold = scene.hold_end(command);
        let job = scene.caller.start("web", "").await;
        hold.reached();
        assert_ne!(scene.vm.residue(), scene.before);
        hold.cut();
        // It is the same QEMU: it still has the files of the images.
        let (result, _, message) = within("the end", job.wait()).await.unwrap();
        assert_eq!(
            (result.as_str(), message.as_str()),
            ("completed", ""),
            "{command}"
        );
        assert_eq!(scene.vm.residue(), scene.before, "{command}");
        let image = image(&job, 0).await;
        scene.vm.quit();
        assert!(identical(&image, "qcow2", scene.vm.source_path("vda"), "qcow2"));
    }
}

// The domain's file and its disks change.

#[tokio::test(flavor = "multi_thread")]
async fn a_running_backup_of_a_replaced_domain_blocks_backups_under_its_name() {
    let vda = |vm: Builder| vm.disk(Disk::new("vda", 16 * MIB).fill(0, 8 * MIB, 0x11));
    let (system, mut vm, caller) = known(System::start(), vda).await;
    let before = vm.residue();
    let monitor = format!("monitor = \"{}\"\n", vm.monitor_path().display());
    let mut images = Vec::new();
    // The file gets another content, or it is removed and created again.
    for (goes, text) in [
        (false, format!("{monitor}agent = \"/nowhere\"\n")),
        (true, monitor),
    ] {
        let path = caller.manager.get_domain("web").await.unwrap();
        let web = DomainProxy::new(&caller.connection, path).await.unwrap();
        let job = caller.start_with("web", "", &[], bandwidth(65536)).await;
        reaches(&job, "running").await;
        if goes {
            fs::remove_file(system.dir().join("etc/domains.d/web.toml")).unwrap();
            until_async("the domain to be removed", || async { web.state().await.err() }).await;
            let refused = caller.try_start("web", "", &[], Options::new()).await;
            assert_eq!(error_name(&refused.unwrap_err()), format!("{OURS}NoSuchDomain"));
        }
        system.write_domain_file("web", &text);
        until_async("the old domain to be removed", || async {
            web.state().await.err()
        })
        .await;
        until_async("the new domain to appear", || async {
            caller.manager.get_domain("web").await.ok()
        })
        .await;
        let refused = caller.try_start("web", "", &[], Options::new()).await;
        let refused = refused.expect_err("there is a backup of that name");
        let name = error_name(&refused);
        assert!(
            ["Busy", "DomainUnreachable"].contains(&name.trim_start_matches(OURS)),
            "{refused}"
        );
        job.set_speed(0).await.unwrap();
        assert_completed(&job).await;
        assert_eq!(vm.residue(), before);
        images.push(image(&job, 0).await);
        // Its monitor is free for the domain that replaced it.
        system.wait_for_domain("web");
        let job = caller.complete("web", "").await;
        images.push(image(&job, 0).await);
        assert_eq!(vm.residue(), before);
    }
    vm.quit();
    for image in images {
        assert!(
            identical(&image, "qcow2", vm.source_path("vda"), "qcow2"),
            "{}",
            image.display()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_by_another_client_just_before_the_point_in_time_fails_the_backup() {
    let scene = Scene::new().await;
    let hold = scene
        .proxy
        .hold("transaction", |arguments| arguments["properties"].is_object());
    let job = scene.caller.start("web", "").await;
    hold.reached();
    scene.vm.qmp(
        "blockdev-snapshot-sync",
        json!({
            "node-name": "vda-format", "snapshot-node-name": "over", "format": "qcow2",
            "snapshot-file": scene.system.dir().join("over.qcow2"),
        }),
    );
    let mut without_ours = scene.vm.residue();
    without_ours.nodes.retain(|name| !name.starts_with("backupd-"));
    without_ours.fdsets.clone_from(&scene.before.fdsets);
    assert!(without_ours.nodes.contains(&"over".to_owned()));
    scene.vm.write("vda", 10 * MIB, MIB, 0x77);
    hold.pass();
    assert_failed(&job, "Busy", "another image").await;
    let disks = job.disks().await.unwrap();
    assert_eq!(
        disks.iter().map(|disk| disk.1.as_str()).collect::<Vec<_>>(),
        ["failed", "cancelled"]
    );
    assert_eq!(files_below(&scene.system.store()), [""; 0]);
    assert_eq!(scene.vm.residue(), without_ours);
    // The next attempt contains the guest's writes.
    let job = scene.caller.complete("web", "").await;
    let image = image(&job, 0).await;
    assert!(holds(&image, "qcow2", 10 * MIB, MIB, 0x77));
    assert!(holds(&image, "qcow2", 0, 8 * MIB, 0x11));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overlay_below_a_raw_node_is_copied_with_its_backing_files() {
    let system = System::start();
    let [base, top] = ["base.qcow2", "top.qcow2"].map(|name| system.dir().join(name));
    let run = |program: &str, arguments: &[&str]| {
        let mut command = crate::common::process::bound(program);
        command.args(arguments);
        crate::common::process::run(command).expect_success()
    };
    let (base, top) = (base.to_str().unwrap(), top.to_str().unwrap());
    run("qemu-img", &["create", "-q", "-f", "qcow2", base, "16M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -q -P 0x55 0 4M", base]);
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top],
    );
    run("qemu-io", &["-f", "qcow2", "-c", "write -q -P 0x66 8M 1M", top]);
    let node = format!("raw,node-name=d,file.driver=qcow2,file.file.driver=file,file.file.filename={top}");
    let extra = ["-blockdev", &node, "-device", "virtio-blk-pci,drive=d,id=vda"];
    let (_system, mut vm, caller) = known(system, |vm| vm.extra(&extra)).await;
    let mut images = Vec::new();
    for format in ["raw", "qcow2"] {
        let text = document(&format!("<disk name='vda'><driver type='{format}'/></disk>"));
        let image = image(&caller.complete("web", &text).await, 0).await;
        assert!(holds(&image, format, 0, 4 * MIB, 0x55), "{format}");
        assert!(holds(&image, format, 8 * MIB, MIB, 0x66), "{format}");
        images.push((image, format));
    }
    vm.quit();
    for (image, format) in images {
        assert!(identical(&image, format, Path::new(top), "qcow2"), "{format}");
    }
}

// Existing content of targets.

/// Creates a device of 24 MiB that is full of data.
fn full_device(system: &System) -> LoopDevice {
    let file = system.dir().join("device.img");
    fs::write(&file, vec![0xa5; 24 << 20]).unwrap();
    LoopDevice::attach(&file, 24 * MIB)
}

fn to_block(device: &Path, format: &str, quiesce: &str) -> String {
    format!(
        "<domainbackup>{quiesce}<disks><disk name='vda' type='block'><driver type='{format}'/>\
         <target dev='{}'/></disk></disks></domainbackup>",
        device.display()
    )
}

fn assert_untouched(device: &Path) {
    let content = fs::read(device).unwrap();
    assert_eq!(content.len(), 24 << 20);
    let changed = content.iter().position(|byte| *byte != 0xa5);
    assert_eq!(changed, None, "where {} has changed", device.display());
}

fn vda(vm: Builder) -> Builder {
    vm.disk(Disk::new("vda", 16 * MIB).fill(0, 16 * MIB, 0x11))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_is_untouched_by_a_backup_whose_guest_cannot_be_frozen() {
    let (system, vm, mut caller) = known(System::start(), vda).await;
    let before = vm.residue();
    let device = full_device(&system);
    let require = "<quiesce mode='require'/>";
    for format in ["raw", "qcow2"] {
        let text = to_block(device.device(), format, require);
        let job = caller.start("web", &text).await;
        assert_failed(&job, "QuiesceFailed", "no guest agent is configured").await;
        caller.signals_until("JobEnded").await;
        assert_untouched(device.device());
        assert_eq!(vm.residue(), before);
    }
    // The agent refuses to freeze. QEMU has a raw target open by then, and has written nothing to it.
    let path = system.dir().join("qga");
    let _agent = Agent::start(&path, |command| match command {
        "guest-fsfreeze-freeze" => Answer::Refusal("not now"),
        _ => Answer::Proper,
    });
    let (monitor, agent) = (vm.monitor_path(), path.display());
    let old = caller.manager.get_domain("web").await.unwrap();
    let text = format!("monitor = \"{}\"\nagent = \"{agent}\"\n", monitor.display());
    system.write_domain_file("web", &text);
    until_async("the domain with an agent", || async {
        let now = caller.manager.get_domain("web").await.ok()?;
        (now != old).then_some(())
    })
    .await;
    system.wait_for_domain("web");
    let job = caller
        .start("web", &to_block(device.device(), "raw", require))
        .await;
    assert_failed(&job, "QuiesceFailed", "not now").await;
    assert_untouched(device.device());
    assert_eq!(vm.residue(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_written_by_a_cancelled_backup_has_no_image_header() {
    for format in ["raw", "qcow2"] {
        let (system, vm, caller) = known(System::start(), vda).await;
        let before = vm.residue();
        let device = full_device(&system);
        let text = to_block(device.device(), format, "");
        let job = caller.start_with("web", &text, &[], bandwidth(MIB)).await;
        until_async("some of it to be written", || async {
            (job.bytes_done().await.unwrap() > 0).then_some(())
        })
        .await;
        job.cancel().await.unwrap();
        let (result, _, _) = within("the end", job.wait()).await.unwrap();
        assert_eq!(result, "cancelled");
        assert_eq!(vm.residue(), before);
        let mut head = vec![1; 1 << 20];
        let opened = File::open(device.device()).unwrap();
        opened.read_exact_at(&mut head, 0).unwrap();
        assert!(head.iter().all(|byte| *byte == 0), "{format}");
        // The wiping ends there.
        let mut last = vec![0; 1 << 20];
        opened.read_exact_at(&mut last, 23 * MIB).unwrap();
        assert!(last.iter().all(|byte| *byte == 0xa5), "{format}");
    }
}

// Images that a VM has open are refused as targets, under any name.

#[tokio::test(flavor = "multi_thread")]
async fn an_image_just_attached_to_another_vm_is_refused_as_target() {
    let (system, _vm, caller) = known(System::start(), vda).await;
    let other = system.configured(system.vm("other"));
    let added = system.dir().join("added.raw");
    fs::write(&added, vec![0x33; 16 << 20]).unwrap();
    other.qmp(
        "blockdev-add",
        json!({ "driver": "file", "node-name": "added", "filename": added }),
    );
    let text = |format: &str| {
        document(&format!(
            "<disk name='vda'><driver type='{format}'/><target file='{}'/></disk>",
            added.display()
        ))
    };
    for format in ["raw", "qcow2"] {
        refuses_source(&caller, &text(format), &[]).await;
    }
    assert_eq!(fs::read(&added).unwrap(), vec![0x33; 16 << 20]);
    // It is accepted again when it is no longer a source.
    other.qmp("blockdev-del", json!({ "node-name": "added" }));
    let job = caller.start_with("web", &text("raw"), &[], reuse()).await;
    assert_completed(&job).await;
    assert!(holds(&added, "raw", 0, 16 * MIB, 0x11));
}

#[tokio::test(flavor = "multi_thread")]
async fn loop_devices_and_files_behind_a_vms_disks_are_refused_as_targets() {
    let (system, vm, caller) = known(System::start(), vda).await;
    let backing = system.dir().join("backing.img");
    let below = LoopDevice::attach(&backing, 16 * MIB);
    let other = system.configured(
        system
            .vm("other")
            .disk(Disk::new("vda", 16 * MIB).raw())
            .disk(Disk::new("vdb", 16 * MIB).raw().at(below.device())),
    );
    for source in [vm.source_path("vda"), other.source_path("vda")] {
        let above = LoopDevice::attach(source, 0);
        refuses_source(&caller, &to_block(above.device(), "raw", ""), &[]).await;
        let opened = File::options().read(true).write(true).open(above.device());
        let text = document("<disk name='vda' type='fd'><target fd='0'/></disk>");
        refuses_source(&caller, &text, &[opened.unwrap().into()]).await;
    }
    let text = format!("<target file='{}'/>", backing.display());
    let text = document(&format!("<disk name='vda'><driver type='raw'/>{text}</disk>"));
    refuses_source(&caller, &text, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_was_renamed_away_is_still_refused_as_target() {
    let (system, _vm, caller) = known(System::start(), vda).await;
    let other = system.configured(
        system
            .vm("other")
            .disk(Disk::new("vda", 16 * MIB).raw().fill(0, MIB, 0x44)),
    );
    let source = other.source_path("vda");
    let old = File::options().read(true).write(true).open(source).unwrap();
    let new = system.dir().join("new.raw");
    fs::write(&new, vec![0x55; 16 << 20]).unwrap();
    fs::rename(&new, source).unwrap();
    let text = document("<disk name='vda' type='fd'><driver type='raw'/><target fd='0'/></disk>");
    refuses_source(&caller, &text, &[old.try_clone().unwrap().into()]).await;
    let mut head = vec![0; 1 << 20];
    old.read_exact_at(&mut head, 0).unwrap();
    assert!(head.iter().all(|byte| *byte == 0x44));
}

// Limits and slots of the queue.

#[tokio::test(flavor = "multi_thread")]
async fn the_largest_bandwidth_equals_no_limit() {
    let mut scene = Scene::new().await;
    let speeds = |vm: &Vm| {
        let jobs = vm.qmp("query-block-jobs", json!({}));
        let jobs = jobs.as_array().unwrap().iter();
        jobs.map(|job| job["speed"].as_i64().unwrap()).collect::<Vec<_>>()
    };
    let mut images = Vec::new();
    // One disk has the whole limit; two share it.
    for disks in [vec!["vda"], vec!["vda", "vdb"]] {
        let list: String = disks
            .iter()
            .map(|disk| format!("<disk name='{disk}'/>"))
            .collect();
        let text = document(&list);
        let unlimited = |vm: &Vm| {
            let speeds = speeds(vm);
            let none = |speed: &i64| [0, i64::MAX].contains(speed);
            assert!(
                speeds.len() == disks.len() && speeds.iter().all(none),
                "{speeds:?}"
            );
        };
        // QEMU keeps the jobs until they are dismissed.
        let hold = scene.hold_end("job-dismiss");
        let at_once = scene
            .caller
            .start_with("web", &text, &[], bandwidth(u64::MAX))
            .await;
        hold.reached();
        unlimited(&scene.vm);
        hold.pass();
        assert_completed(&at_once).await;

        let hold = scene.hold_end("job-dismiss");
        let later = scene.caller.start_with("web", &text, &[], bandwidth(65536)).await;
        reaches(&later, "running").await;
        assert_eq!(speeds(&scene.vm).iter().sum::<i64>(), 65536);
        later.set_speed(u64::MAX).await.unwrap();
        hold.reached();
        unlimited(&scene.vm);
        hold.pass();
        assert_completed(&later).await;
        for job in [at_once, later] {
            for (index, disk) in disks.iter().enumerate() {
                images.push((*disk, image(&job, index).await));
            }
        }
    }
    scene.vm.quit();
    for (disk, image) in images {
        assert!(identical(&image, "qcow2", scene.vm.source_path(disk), "qcow2"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_waited_for_the_end_can_start_the_next_backup_at_once() {
    let small = |vm: Builder| vm.disk(Disk::new("vda", MIB));
    let (_system, vm, caller) = known(System::start(), small).await;
    let before = vm.residue();
    for _ in 0..20 {
        let job = caller.start("web", "").await;
        assert_completed(&job).await;
    }
    assert_eq!(vm.residue(), before);
}

// The storage fails when all data is copied.

fn remount(path: &Path, options: &str) {
    let mut command = Command::new("mount");
    command.args(["-o", &format!("remount,{options}")]).arg(path);
    process::run(command).expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_full_when_the_backup_is_recorded_fails_it() {
    let dir = crate::common::test_directory();
    let store = Tmpfs::mount(&dir.path().join("store"), 64 * MIB);
    let mut scene = Scene::of(System::setup().store("small", store.path()).start()).await;
    // The last command to QEMU; it has closed the images.
    let hold = scene.proxy.hold("query-fdsets", |_| true);
    let text = "<domainbackup><store name='small'/></domainbackup>";
    let job = scene.caller.start("web", text).await;
    hold.reached();
    // The store runs out of inodes and not of bytes, because the images free the space of their zeroes before the
    // manifest is written.
    let files = rustix::fs::statvfs(store.path()).unwrap();
    let used = files.f_files - files.f_ffree;
    remount(store.path(), &format!("nr_inodes={used}"));
    hold.pass();
    assert_failed(&job, "NoSpace", "manifest.json: No space left on device").await;
    assert_told_as_failed(&mut scene.caller, &job).await;
    remount(store.path(), "nr_inodes=1000");
    assert_eq!(files_below(store.path()), [""; 0]);
    assert_eq!(scene.vm.residue(), scene.before);
    scene.caller.complete("web", text).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_cannot_be_renamed_to_its_final_name_fails() {
    let mut scene = Scene::new().await;
    let hold = scene.proxy.hold("query-fdsets", |_| true);
    let job = scene.caller.start("web", "").await;
    hold.reached();
    let domain = scene.system.store().join("web");
    let immutable = Immutable::make(&domain);
    hold.pass();
    assert_failed(&job, "TargetInvalid", "publish").await;
    assert_told_as_failed(&mut scene.caller, &job).await;
    // No directory has a backup's name, and the remaining files are empty.
    let names = fs::read_dir(&domain).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let named: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
    assert_eq!(named, [""; 0]);
    assert_eq!(files_below(&domain), [""; 0]);
    assert_eq!(scene.vm.residue(), scene.before);
    drop(immutable);
    scene.caller.complete("web", "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_image_is_published_when_one_cannot_be_renamed() {
    let mut scene = Scene::new().await;
    let [one, other] = ["one", "other"].map(|name| scene.system.dir().join(name));
    for dir in [&one, &other] {
        fs::create_dir(dir).unwrap();
    }
    let text = document(&format!(
        "<disk name='vda'><target file='{}/a.qcow2'/></disk><disk name='vdb'><target file='{}/b.qcow2'/></disk>",
        one.display(),
        other.display()
    ));
    let hold = scene.proxy.hold("query-fdsets", |_| true);
    let job = scene.caller.start("web", &text).await;
    hold.reached();
    let immutable = Immutable::make(&other);
    hold.pass();
    assert_failed(&job, "TargetInvalid", "disk 'vdb'").await;
    let signals = brief(&scene.caller.signals_until("JobEnded").await);
    assert!(
        signals.contains(&"BlockJobCancelled vda".to_owned()),
        "{signals:?}"
    );
    assert!(
        signals
            .iter()
            .any(|signal| signal.starts_with("BlockJobError vdb publish ")),
        "{signals:?}"
    );
    let disks = job.disks().await.unwrap();
    assert_eq!((disks[0].1.as_str(), disks[0].5.as_str()), ("cancelled", ""));
    assert_eq!(disks[1].1, "failed");
    assert_eq!(files_below(&one), [""; 0]);
    // Files that could not be removed have no backup's name and are empty.
    for name in files_below(&other) {
        assert_ne!(name, "b.qcow2");
        assert_eq!(fs::metadata(other.join(&name)).unwrap().len(), 0, "{name}");
    }
    assert_eq!(scene.vm.residue(), scene.before);
    drop(immutable);
}

/// Checks that no disk is reported as completed, and that the job is reported as failed.
async fn assert_told_as_failed(caller: &mut Caller, job: &JobProxy<'_>) {
    let signals = brief(&caller.signals_until("JobEnded").await);
    for disk in ["vda", "vdb"] {
        let told = [
            format!("BlockJobCancelled {disk}"),
            format!("BlockJobError {disk}"),
        ];
        assert!(
            signals
                .iter()
                .any(|signal| told.iter().any(|told| signal.starts_with(told))),
            "{signals:?}"
        );
        assert!(
            !signals
                .iter()
                .any(|signal| signal.starts_with(&format!("BlockJobCompleted {disk}"))),
            "{signals:?}"
        );
    }
    assert!(signals.last().unwrap().ends_with(" failed"), "{signals:?}");
    assert_eq!(job.state().await.unwrap(), "failed");
    for disk in job.disks().await.unwrap() {
        assert!(["cancelled", "failed"].contains(&disk.1.as_str()), "{disk:?}");
    }
}

// Callers that may not know of a domain.

#[tokio::test(flavor = "multi_thread")]
async fn the_object_of_a_hidden_domain_replies_like_a_missing_path() {
    let rules = "polkit.addRule(function(action, subject) {
        if (action.lookup('domain_name') == 'secret' && subject.user != 'root') return polkit.Result.NO;
    });";
    let system = System::setup().rules(rules).start();
    let vm = system.vm("secret").disk(Disk::new("vda", MIB)).start();
    system.domain_file("secret", &vm);
    let there = system.wait_for_domain("secret");
    let (parent, _) = there.rsplit_once('/').unwrap();
    let never = format!("{parent}/99999");
    let domain = "org.example.Backup1.Domain";
    let properties = "org.freedesktop.DBus.Properties";
    let ask = |path: &str, method: &str, arguments: &[&str]| {
        let said = system
            .clients()
            .gdbus_call(USER, "org.example.Backup1", path, method, arguments);
        assert!(!said.success(), "{method}: {}", said.stdout);
        assert!(said.stderr.contains(path), "{}", said.stderr);
        said.stderr.replace(path, "PATH")
    };
    let get = format!("{properties}.Get");
    let create = format!("{domain}.CreateBackup");
    let calls: [(&str, &[&str]); 6] = [
        (&create, &["", "@ah []", "@a{sv} {}"]),
        (&create, &["<no", "@ah []", "@a{sv} {}"]),
        (&create, &["", "@ah []", "{'unknown': <1>}"]),
        (&get, &[domain, "Name"]),
        (&get, &[domain, "State"]),
        (&get, &[domain, "Disks"]),
    ];
    for (method, arguments) in calls {
        let hidden = ask(&there, method, arguments);
        assert!(
            hidden.contains("org.freedesktop.DBus.Error.UnknownObject"),
            "{hidden}"
        );
        assert_eq!(hidden, ask(&never, method, arguments), "{method} {arguments:?}");
    }
}

// The service gets SIGTERM.

#[tokio::test(flavor = "multi_thread")]
async fn a_service_stopped_during_preparation_leaves_no_permanent_residue() {
    // While QEMU is asked for its disks (with and without a reply), and when the files exist already.
    for (command, answers) in [("query-block", true), ("query-block", false), ("add-fd", true)] {
        let mut scene = Scene::new().await;
        let hold = scene.proxy.hold(command, |_| true);
        let manager = scene.caller.manager.clone();
        let calling =
            tokio::spawn(async move { manager.create_backup("web", "", Vec::new(), Options::new()).await });
        hold.reached();
        let daemon = scene.system.daemon();
        daemon.process().signal(Signal::TERM);
        wait::until("the service to get the signal", || {
            daemon.log().contains("stopping").then_some(())
        });
        // QEMU responds now, or never: the service ends in either case.
        let kept = match answers {
            true => {
                hold.pass();
                None
            }
            false => Some(hold),
        };
        assert_eq!(daemon.process().wait(), 0, "{command}");
        // The call has a result for the caller too, whether it was refused, or had begun and is left to the next
        // service.
        let _ = within("the call to end", calling).await.unwrap();
        drop(kept);
        let log = scene.system.daemon().log();
        assert!(!log.contains("panicked"), "{log}");
        scene.system.start_daemon();
        scene.system.wait_for_domain("web");
        let caller = Caller::new(&scene.system).await;
        let mut whole = 0;
        for (_, path, ..) in caller.manager.list_jobs().await.unwrap() {
            let (result, ..) = within("the end", caller.job(path).await.wait()).await.unwrap();
            whole += usize::from(result == "completed");
        }
        assert_eq!(scene.vm.residue(), scene.before);
        let files = files_below(&scene.system.store());
        let files = files.iter().filter(|file| !file.is_empty()).count();
        assert_eq!(files, 4 * whole, "{command}");
        Caller::new(&scene.system).await.complete("web", "").await;
    }
}
