//! Images that other programs have open: disks of VMs that the service does not know, and files of tools.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::common::System;
use crate::common::caller::{Caller, assert_completed};
use crate::common::disk::Disk;
use crate::common::hanging::{Hanging, Limits, Operation};
use crate::common::process::{self, Process};
use crate::common::proxies::{Options, error_name};
use crate::common::proxy::Proxy;
use crate::common::storage::LoopDevice;
use crate::common::vm::Vm;
use crate::common::wait;
use backupd::targets::{Look, is_in_use};
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
const INVALID: &str = "org.example.Backup1.Error.TargetInvalid";

/// A VM that is backed up, with one disk `vda`.
struct Scene {
    system: System,
    vm: Vm,
    caller: Caller,
}

impl Scene {
    async fn new() -> Self {
        let system = System::start();
        let vm = system.configured(system.vm("web").disk(Disk::new("vda", SIZE).fill(0, MIB, 0x11)));
        let caller = Caller::new(&system).await;
        Self { system, vm, caller }
    }

    /// Checks that no backup is written into this target, and that no byte of it changes.
    async fn refuses(&self, target: &Path, kind: &str, format: &str) {
        let before = fs::read(target).unwrap();
        let residue = self.vm.residue();
        for (document, files) in [
            (by_path(target, kind, format), Vec::new()),
            (by_descriptor(format), vec![open(target)]),
        ] {
            let started = self.caller.try_start("web", &document, &files, reuse()).await;
            let error = started.expect_err("the backup is refused");
            let text = error.to_string();
            assert_eq!(error_name(&error), INVALID, "{text}");
            assert!(text.contains("open in another QEMU"), "{text}");
            assert!(
                fs::read(target).unwrap() == before,
                "{}: changed: {text}",
                target.display()
            );
        }
        assert_eq!(self.vm.residue(), residue);
    }
}

fn reuse() -> Options<'static> {
    Options::from([("reuse-external", Variant::from(true))])
}

fn open(path: &Path) -> OwnedFd {
    let file = fs::File::options().read(true).write(true).open(path);
    file.unwrap().into()
}

/// `kind` is "file" or "dev".
fn by_path(target: &Path, kind: &str, format: &str) -> String {
    let of_type = if kind == "dev" { " type='block'" } else { "" };
    format!(
        "<domainbackup><disks><disk name='vda'{of_type}><driver type='{format}'/><target {kind}='{}'/></disk>\
         </disks></domainbackup>",
        target.display()
    )
}

fn by_descriptor(format: &str) -> String {
    format!(
        "<domainbackup><disks><disk name='vda' type='fd'><driver type='{format}'/><target fd='0'/></disk>\
         </disks></domainbackup>"
    )
}

fn image(scene: &Scene, name: &str, format: &str) -> PathBuf {
    let path = scene.system.dir().join(name);
    let mut command = process::bound("qemu-img");
    command
        .args(["create", "-q", "-f", format])
        .arg(&path)
        .arg(SIZE.to_string());
    process::run(command).expect_success();
    path
}

/// Waits until a program has locked the file that it opens.
fn wait_for_lock(path: &Path) {
    wait::until("an image to be locked", || {
        is_in_use(&mut Look::Own.session(), &open(path))
            .unwrap()
            .then_some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_an_unknown_vm_is_not_overwritten() {
    let scene = Scene::new().await;
    let file = scene.system.dir().join("loop.img");
    let device = LoopDevice::attach(&file, SIZE);
    let unknown = scene
        .system
        .vm("unknown")
        .disk(Disk::new("vda", SIZE).fill(0, MIB, 0x77))
        .disk(Disk::new("vdb", SIZE).raw().fill(0, MIB, 0x78))
        .disk(
            Disk::new("vdc", SIZE)
                .raw()
                .fill(0, MIB, 0x79)
                .at(device.device()),
        )
        .disk(Disk::new("vdd", SIZE).raw().read_only())
        .start();
    scene.refuses(unknown.source_path("vda"), "file", "qcow2").await;
    scene.refuses(unknown.source_path("vdb"), "file", "raw").await;
    scene.refuses(unknown.source_path("vdd"), "file", "raw").await;
    scene.refuses(device.device(), "dev", "raw").await;
    // The same bytes under another name.
    scene.refuses(&file, "file", "raw").await;
    let above = LoopDevice::attach(unknown.source_path("vdb"), SIZE);
    scene.refuses(above.device(), "dev", "raw").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loop_device_whose_storage_does_not_answer_keeps_no_backup_waiting() {
    let scene = Scene::new().await;
    let target = image(&scene, "target.raw", "raw");
    let storage = Hanging::mount(&scene.system.dir().join("theirs"), Limits::default());
    let theirs = LoopDevice::attach(&storage.path().join("disk"), SIZE);
    storage.hang(Operation::Any);
    let document = by_path(&target, "file", "raw");
    let started = scene.caller.start_with("web", &document, &[], reuse());
    let job = wait::within("the backup to begin", started).await;
    assert_completed(&job).await;
    assert!(
        !storage.is_hanging(),
        "the service accessed the hanging file system"
    );
    storage.heal();
    drop(theirs);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_a_tool_has_open_is_not_written() {
    let scene = Scene::new().await;
    let served = image(&scene, "served", "qcow2");
    let node = format!(
        "driver=qcow2,node-name=disk,file.driver=file,file.filename={}",
        served.display()
    );
    let mut command = process::bound("qemu-storage-daemon");
    command.args(["--blockdev", &node]);
    let mut daemon = Process::start("storage-daemon", scene.system.dir(), command);
    wait_for_lock(&served);
    scene.refuses(&served, "file", "qcow2").await;
    daemon.kill();

    let read = image(&scene, "read", "raw");
    let mut command = process::bound("qemu-img");
    command
        .args(["bench", "-f", "raw", "-c", "1000000000"])
        .arg(&read);
    let mut reader = Process::start("qemu-img", scene.system.dir(), command);
    wait_for_lock(&read);
    scene.refuses(&read, "file", "raw").await;
    reader.kill();

    // Both are free now.
    for (path, format) in [(&served, "qcow2"), (&read, "raw")] {
        let document = by_path(path, "file", format);
        assert_completed(&scene.caller.start_with("web", &document, &[], reuse()).await).await;
        assert!(crate::common::storage::holds(path, format, 0, MIB, 0x11));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_starts_during_preparation_cannot_open_the_target() {
    let system = System::start();
    let vm = system
        .vm("web")
        .disk(Disk::new("vda", SIZE).fill(0, MIB, 0x11))
        .start();
    let proxy = Proxy::start(&system.dir().join("proxy"), &vm.monitor_path());
    system.write_domain_file("web", &format!("monitor = \"{}\"\n", proxy.path().display()));
    system.wait_for_domain("web");
    let caller = Caller::new(&system).await;
    let scene = Scene { system, vm, caller };
    let write = |path: &Path, format: &str| {
        let mut command = process::bound("qemu-io");
        command
            .args(["-f", format, "-c", "write -q -P 1 4M 512"])
            .arg(path);
        process::run(command)
    };
    for format in ["raw", "qcow2"] {
        let target = image(&scene, format, format);
        for command in ["add-fd", "transaction"] {
            let held = proxy.hold(command, |_| true);
            // By its path: the proxy is this process, and its open files count as those of its domain.
            let document = by_path(&target, "file", format);
            // The call returns when the backup has begun.
            let start = scene.caller.start_with("web", &document, &[], reuse());
            let tried = tokio::task::spawn_blocking(move || {
                held.reached();
                held
            });
            let passed = async {
                let held = tried.await.unwrap();
                let refused = write(&target, format);
                assert!(
                    !refused.success() && refused.stderr.contains("lock"),
                    "{format}, before {command}: {}{}",
                    refused.stdout,
                    refused.stderr
                );
                held.pass();
            };
            let (job, ()) = tokio::join!(start, passed);
            assert_completed(&job).await;
            assert!(crate::common::storage::holds(&target, format, 0, MIB, 0x11));
        }
        // QEMU up to version 8 still has the descriptor, because its guest is stopped, so a remaining lock would be
        // visible.
        write(&target, format).expect_success();
    }
}
