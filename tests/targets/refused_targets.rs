//! A refused command changes nothing in its targets.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::chain::{directories, id};
use crate::common::clients::{ROOT, USER};
use crate::common::disk::Disk;
use crate::common::process::Output;
use crate::common::proxies::Options;
use crate::common::proxy::Proxy;
use crate::common::storage::{LoopDevice, files_below, holds};
use crate::common::vm::Vm;
use crate::common::wait;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
const MARK: u8 = 0xa5;

/// A device or file with known content.
struct Marked {
    file: PathBuf,
    size: u64,
    device: Option<LoopDevice>,
}

impl Marked {
    fn file(system: &System, name: &str, size: u64) -> Self {
        let file = system.dir().join(name);
        fs::write(&file, vec![MARK; usize::try_from(size).unwrap()]).unwrap();
        Self {
            file,
            size,
            device: None,
        }
    }

    fn device(system: &System, name: &str, size: u64) -> Self {
        let mut marked = Self::file(system, name, size);
        marked.device = Some(LoopDevice::attach(&marked.file, size));
        marked
    }

    fn path(&self) -> &Path {
        self.device.as_ref().map_or(&self.file, |device| device.device())
    }

    /// Returns the present content; a device is read through its cache.
    #[track_caller]
    fn assert_unchanged(&self, after: &str) {
        let found = fs::read(self.path()).unwrap();
        assert_eq!(found.len() as u64, self.size, "{after}");
        let changed = found.iter().filter(|byte| **byte != MARK).count();
        assert_eq!(changed, 0, "{after}: bytes changed");
    }
}

struct Setting {
    system: System,
    vm: Vm,
    backup: String,
    full: PathBuf,
}

async fn setting() -> Setting {
    setting_with(&["vda"]).await
}

async fn setting_with(disks: &[&str]) -> Setting {
    let system = System::start();
    let disks = disks
        .iter()
        .map(|name| Disk::new(name, SIZE).fill(MIB, 4 * MIB, 0x11));
    let machine = disks.fold(system.vm("web"), |machine, disk| machine.disk(disk));
    let vm = system.configured(machine.running());
    Caller::new(&system).await.complete("web", "").await;
    let [full] = directories(&system.store().join("web")).try_into().unwrap();
    Setting {
        backup: id(&full),
        system,
        vm,
        full,
    }
}

impl Setting {
    /// Runs `restore` of the backup as root, through the service and without it.
    fn restore(&self, arguments: &[&str]) -> [(String, Output); 2] {
        let store = self.system.store();
        [None, Some(store.to_str().unwrap())].map(|from| {
            let mut all = vec!["restore", &self.backup];
            all.extend(arguments);
            all.extend(from.iter().flat_map(|store| ["--from", store]));
            let output = self.system.clients().backupctl(ROOT, &all);
            (format!("{all:?}: {}", output.stderr), output)
        })
    }

    /// Checks that both ways refuse, leave the targets unchanged, and create nothing.
    #[track_caller]
    fn assert_refused_with(&self, arguments: &[&str], said: &str, targets: &[&Marked]) {
        let before = files_below(self.system.dir());
        for (what, output) in self.restore(arguments) {
            assert_eq!(output.status, 1, "{what}");
            assert!(output.stderr.contains(said), "{what}");
            targets.iter().for_each(|target| target.assert_unchanged(&what));
            let made = files_below(self.system.dir());
            let made: Vec<_> = made.iter().filter(|file| !before.contains(file)).collect();
            assert!(made.iter().all(|file| *file == "backupctl"), "{what} {made:?}");
        }
    }

    #[track_caller]
    fn assert_restore_refused(&self, disk: &str, target: &Marked, more: &[&str], status: i32) {
        let disk = format!("{disk}={}", target.path().display());
        let before = files_below(self.system.dir());
        for (what, output) in self.restore(&[&["--disk", &disk], more].concat()) {
            assert_eq!(output.status, status, "{what}");
            target.assert_unchanged(&what);
            let made = files_below(self.system.dir());
            let made: Vec<_> = made.iter().filter(|file| !before.contains(file)).collect();
            assert!(made.iter().all(|file| *file == "backupctl"), "{what} {made:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_restore_changes_no_byte_of_a_device() {
    let setting = setting().await;
    let system = &setting.system;
    let small = Marked::device(system, "small", SIZE / 2);
    setting.assert_restore_refused("vda", &small, &[], 1);
    setting.assert_restore_refused("vda", &small, &["--force"], 1);
    let device = Marked::device(system, "device", 2 * SIZE);
    setting.assert_restore_refused("vdx", &device, &[], 1);
    // The disk of another running VM that the service knows.
    let live = Marked::device(system, "live", SIZE);
    let other = system
        .vm("db")
        .disk(Disk::new("vda", SIZE).raw().at(live.path()))
        .running();
    let mut other = system.configured(other);
    for more in [&[][..], &["--force"]] {
        setting.assert_restore_refused("vda", &live, more, 1);
    }
    other.quit();
    // An image without its end.
    fs::File::options()
        .write(true)
        .open(setting.full.join("vda.qcow2"))
        .unwrap()
        .set_len(1 << 16)
        .unwrap();
    setting.assert_restore_refused("vda", &device, &[], 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_restore_changes_no_byte_of_a_file() {
    let setting = setting().await;
    let system = &setting.system;
    let file = Marked::file(system, "file", SIZE);
    setting.assert_restore_refused("vda", &file, &[], 1);
    setting.assert_restore_refused("vdx", &file, &["--force"], 1);
    fs::File::options()
        .write(true)
        .open(setting.full.join("vda.qcow2"))
        .unwrap()
        .set_len(1 << 16)
        .unwrap();
    setting.assert_restore_refused("vda", &file, &["--force"], 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_too_small_leaves_the_other_targets_unchanged() {
    let setting = setting_with(&["vda", "vdb"]).await;
    let large = Marked::device(&setting.system, "large", 2 * SIZE);
    let small = Marked::device(&setting.system, "small", 2 * MIB);
    let vda = format!("vda={}", large.path().display());
    let vdb = format!("vdb={}", small.path().display());
    let disks = ["--disk", &vda, "--disk", &vdb];
    let said = "has 2097152 bytes, but the disk has 8388608";
    setting.assert_refused_with(&disks, said, &[&large, &small]);
    let said = "has 2097152 bytes of free space";
    let disks = [&disks[..], &["--format", "qcow2"]].concat();
    setting.assert_refused_with(&disks, said, &[&large, &small]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_disks_are_not_restored_into_one_target() {
    let setting = setting_with(&["vda", "vdb"]).await;
    let system = &setting.system;
    let (file, device) = (
        Marked::file(system, "file", SIZE),
        Marked::device(system, "device", 2 * SIZE),
    );
    let (other, aside) = (system.dir().join("other"), system.dir().join("aside"));
    fs::hard_link(file.path(), &other).unwrap();
    std::os::unix::fs::symlink(system.dir(), &aside).unwrap();
    let link = system.dir().join("link");
    std::os::unix::fs::symlink(device.path(), &link).unwrap();
    for (first, second) in [
        (system.dir().join("new"), system.dir().join("new")),
        (system.dir().join("new"), aside.join("new")),
        (file.path().to_owned(), file.path().to_owned()),
        (file.path().to_owned(), other),
        (device.path().to_owned(), device.path().to_owned()),
        (device.path().to_owned(), link),
    ] {
        let vda = format!("vda={}", first.display());
        let vdb = format!("vdb={}", second.display());
        let arguments = ["--disk", &vda, "--disk", &vdb, "--force"];
        let said = "disks 'vda' and 'vdb' have the same target";
        setting.assert_refused_with(&arguments, said, &[&file, &device]);
        setting.assert_refused_with(&arguments[..4], said, &[&file, &device]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_made_of_a_file_of_a_store_is_not_written() {
    let setting = setting().await;
    let image = setting.full.join("vda.qcow2");
    let content = fs::read(&image).unwrap();
    let device = LoopDevice::attach(&image, 0);
    // The same bytes under another name.
    let above = LoopDevice::attach(device.device(), 0);
    for device in [&device, &above] {
        let disk = format!("vda={}", device.device().display());
        for format in ["raw", "qcow2"] {
            let arguments = ["--disk", &disk, "--format", format];
            setting.assert_refused_with(&arguments, "is in the store", &[]);
            for more in [&[][..], &["--own-files", "--reuse-external"]] {
                let command = [&["create", "web"], &arguments[..], more].concat();
                let output = setting.system.clients().backupctl(ROOT, &command);
                assert_ne!(output.status, 0, "{command:?}");
                assert!(
                    output.stderr.contains("is in the store"),
                    "{command:?}: {}",
                    output.stderr
                );
            }
        }
    }
    assert!(fs::read(&image).unwrap() == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_without_the_restore_right_changes_no_byte_of_its_own_device() {
    let setting = setting().await;
    let system = &setting.system;
    let device = Marked::device(system, "users", 2 * SIZE);
    let mode = |mode| fs::set_permissions(device.path(), fs::Permissions::from_mode(mode)).unwrap();
    mode(0o666);
    let disk = format!("vda={}", device.path().display());
    for command in [
        [
            "restore",
            setting.backup.as_str(),
            "--disk",
            &disk,
            "--no-ask-password",
        ],
        ["create", "web", "--disk", &disk, "--no-ask-password"],
    ] {
        let output = system.clients().backupctl(USER, &command);
        assert_ne!(output.status, 0, "{command:?}");
        device.assert_unchanged(&format!("{command:?}: {}", output.stderr));
    }
    mode(0o660);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_backup_changes_no_byte_of_its_targets() {
    let setting = setting().await;
    let system = &setting.system;
    let small = Marked::device(system, "small", SIZE / 2);
    let live = Marked::device(system, "live", SIZE);
    let device = Marked::device(system, "device", 2 * SIZE);
    let file = Marked::file(system, "file", SIZE);
    let other = system
        .vm("db")
        .disk(Disk::new("vda", SIZE).raw().at(live.path()))
        .running();
    let _other = system.configured(other);
    for (disk, target, more) in [
        ("vda", &small, &["--format", "raw"][..]),
        ("vda", &live, &["--format", "raw"]),
        ("vda", &live, &["--format", "qcow2"]),
        ("vdx", &device, &["--format", "raw"]),
        ("vda", &file, &["--format", "raw"]),
        ("vda", &file, &["--format", "qcow2", "--reuse-external"]),
    ] {
        let disk = format!("{disk}={}", target.path().display());
        let command = [&["create", "web", "--disk", &disk], more].concat();
        let output = system.clients().backupctl(ROOT, &command);
        assert_ne!(output.status, 0, "{command:?}");
        target.assert_unchanged(&format!("{command:?}: {}", output.stderr));
    }
    // QEMU itself refuses the transaction: the disk is being mirrored.
    let mirror = system.dir().join("mirror");
    fs::write(&mirror, "").unwrap();
    fs::File::options()
        .write(true)
        .open(&mirror)
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    setting.vm.qmp(
        "drive-mirror",
        serde_json::json!({
            "job-id": "theirs", "device": setting.vm.node_name("vda"), "target": mirror,
            "format": "raw", "sync": "none", "mode": "existing",
        }),
    );
    let qcow2 = Marked::device(system, "qcow2", 2 * SIZE);
    for (target, more) in [
        (&device, &["--format", "raw"][..]),
        (&qcow2, &["--format", "qcow2"]),
        (&file, &["--format", "raw", "--reuse-external"]),
    ] {
        let disk = format!("vda={}", target.path().display());
        let command = [&["create", "web", "--disk", &disk], more].concat();
        let output = system.clients().backupctl(ROOT, &command);
        assert_ne!(output.status, 0, "{}", output.stdout);
        assert!(output.stderr.contains("mirror"), "{}", output.stderr);
        target.assert_unchanged(&format!("{command:?}: {}", output.stderr));
    }
}

/// Until QEMU and the guest have accepted the backup, an existing target keeps its content.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_fails_before_it_writes_changes_no_byte_of_its_target() {
    let mut system = System::start();
    let disk = Disk::new("vda", SIZE).fill(MIB, 4 * MIB, 0x11);
    let vm = system.vm("web").disk(disk).running().start();
    let proxy = Proxy::start(&system.dir().join("proxy"), &vm.monitor_path());
    // No agent replies for the guest.
    let agent = system.dir().join("agent");
    let domain = format!("monitor = {:?}\nagent = {agent:?}\n", proxy.path());
    system.write_domain_file("web", &domain);
    system.wait_for_domain("web");
    let file = Marked::file(&system, "file", SIZE);
    let disk = format!("vda={}", file.path().display());
    let command = [
        "create",
        "web",
        "--reuse-external",
        "--format",
        "raw",
        "--disk",
        &disk,
    ];
    let refused = |system: &System, more: &[&str]| {
        let output = system
            .clients()
            .backupctl(ROOT, &[&command[..], &["--quiesce"], more].concat());
        assert_ne!(output.status, 0, "{more:?} {}", output.stdout);
        file.assert_unchanged(&format!("{more:?}: {}", output.stderr));
        output.stderr
    };
    let said = refused(&system, &["require"]);
    assert!(said.contains("guest"), "{said}");
    // QEMU ends while it opens the file.
    let hold = proxy.hold("blockdev-add", |_| true);
    let cut = std::thread::spawn(move || {
        hold.reached();
        hold.cut();
    });
    refused(&system, &["no"]);
    cut.join().unwrap();
    for point in ["before check-targets", "after check-targets"] {
        system.stop_daemon();
        system.start_dying_daemon(point);
        system.wait_for_domain("web");
        let caller = Caller::new(&system).await;
        let options = Options::from([("reuse-external", true.into())]);
        let document = format!(
            "<domainbackup><disks><disk name='vda' type='file'><driver type='raw'/><target file='{}'/></disk></disks></domainbackup>",
            file.path().display()
        );
        caller
            .try_start("web", &document, &[], options)
            .await
            .unwrap_err();
        system.wait_for_death();
        system.start_daemon();
        system.wait_for_domain("web");
        let caller = Caller::new(&system).await;
        wait::until_async("the job to be over", || async {
            let jobs = caller.manager.list_jobs().await.unwrap();
            jobs.iter()
                .all(|(_, _, _, state)| state == "failed")
                .then_some(())
        })
        .await;
        file.assert_unchanged(point);
    }
    let output = system.clients().backupctl(ROOT, &command);
    assert_eq!(output.status, 0, "{}", output.stderr);
    assert!(holds(file.path(), "raw", MIB, 4 * MIB, 0x11));
}

/// Starts another VM, on a raw image or device, which the service knows or does not.
fn machine(system: &System, name: &str, image: &Path) -> Vm {
    let node = &serde_json::json!({
        "driver": "raw", "node-name": "n0",
        "file": { "driver": "file", "filename": image, "locking": "on" },
    })
    .to_string();
    let extra = ["-blockdev", node, "-device", "virtio-blk-pci,drive=n0,id=vda"];
    system.vm(name).extra(&extra).start()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_replaces_no_image_of_a_vm_that_runs() {
    let setting = setting().await;
    let system = &setting.system;
    let image = Marked::file(system, "unknown.raw", SIZE);
    let mut unknown = machine(system, "unknown", image.path());
    let link = system.dir().join("link");
    std::os::unix::fs::symlink(image.path(), &link).unwrap();
    for path in [image.path(), &link] {
        let disk = format!("vda={}", path.display());
        for (what, output) in setting.restore(&["--disk", &disk, "--force"]) {
            assert_eq!(output.status, 1, "{what}");
            assert!(output.stderr.contains("is open in QEMU"), "{what}");
            image.assert_unchanged(&what);
        }
    }
    unknown.quit();
    // The source image of the backup, used by the VM that the service knows.
    let image = setting.vm.source_path("vda").to_owned();
    let before = fs::metadata(&image).unwrap();
    let directory = image.parent().unwrap().to_str().unwrap().to_owned();
    for (what, output) in setting.restore(&["--to", &directory, "--force"]) {
        assert_eq!(output.status, 1, "{what}");
    }
    use std::os::unix::fs::MetadataExt;
    let after = fs::metadata(&image).unwrap();
    assert_eq!((before.ino(), before.mtime()), (after.ino(), after.mtime()));
}

/// Starts a VM on a raw image or device whose QEMU holds no locks on it.
fn without_locks(system: &System, name: &str, image: &Marked, how: &str) -> Vm {
    let driver = if image.device.is_some() {
        "host_device"
    } else {
        "file"
    };
    let mut node = serde_json::json!({
        "driver": "raw", "node-name": "n0", "auto-read-only": true,
        "file": { "driver": driver, "filename": image.path(), "auto-read-only": true },
    });
    if how == "without locking" {
        node["file"]["locking"] = "off".into();
    }
    let node = node.to_string();
    let mut extra = vec!["-blockdev", &node, "-device", "virtio-blk-pci,drive=n0,id=vda"];
    if how == "waits for a migration" {
        extra.extend(["-incoming", "defer"]);
    }
    let machine = system.vm(name).extra(&extra);
    if how != "has migrated" {
        return machine.start();
    }
    let vm = machine.running().start();
    vm.qmp("migrate", serde_json::json!({ "uri": "exec:cat >/dev/null" }));
    wait::until("the migration to be complete", || {
        let migration = vm.qmp("query-migrate", serde_json::json!({}));
        (migration["status"] == "completed").then_some(())
    });
    vm
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_replaces_no_image_of_a_vm_that_holds_no_locks() {
    let setting = setting().await;
    let system = &setting.system;
    for (number, how) in ["waits for a migration", "without locking", "has migrated"]
        .into_iter()
        .enumerate()
    {
        for image in [
            Marked::file(system, &format!("file{number}"), SIZE),
            Marked::device(system, &format!("device{number}"), SIZE),
        ] {
            let name = format!("other{number}");
            let mut other = without_locks(system, &name, &image, how);
            let said = format!("(process {})", other.pid());
            let disk = format!("vda={}", image.path().display());
            let arguments = ["--disk", &disk, "--force", "--format", "raw"];
            setting.assert_refused_with(&arguments, &said, &[&image]);
            other.kill();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_restored_into_a_store_or_backed_up_over_its_files() {
    let setting = setting().await;
    let system = &setting.system;
    let before = files_below(&system.store());
    let content = fs::read(setting.full.join("vda.qcow2")).unwrap();
    let full = setting.full.to_str().unwrap();
    let store = system.store();
    let inside = store.join("web/new.qcow2");
    let inside = format!("vda={}", inside.display());
    let image = format!("vda={full}/vda.qcow2");
    for arguments in [
        ["--to", full, "--force"].as_slice(),
        &["--to", full],
        &["--to", full, "--format", "raw"],
        &["--disk", &image, "--force"],
        &["--disk", &inside],
    ] {
        for (what, output) in setting.restore(arguments) {
            assert_eq!(output.status, 1, "{what}");
        }
    }
    for arguments in [
        ["create", "web", "--disk", &image, "--reuse-external"].as_slice(),
        &[
            "create",
            "web",
            "--disk",
            &image,
            "--reuse-external",
            "--own-files",
        ],
        &["create", "web", "--disk", &inside],
    ] {
        let output = system.clients().backupctl(ROOT, arguments);
        assert_ne!(output.status, 0, "{arguments:?}");
        assert!(
            output.stderr.contains("is in the store"),
            "{arguments:?}: {}",
            output.stderr
        );
    }
    assert_eq!(files_below(&system.store()), before);
    assert!(fs::read(setting.full.join("vda.qcow2")).unwrap() == content);
}
