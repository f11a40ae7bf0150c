//! A running Linux with QEMU's agent and a file system under constant writes: its backups with and without quiescing.
//!
//! `tests/setup.sh` fetches the kernel, agent and shell from Debian packages, and installs nothing of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::common::System;
use crate::common::bus::project_file;
use crate::common::caller::Caller;
use crate::common::disk::Disk;
use crate::common::initramfs::{Initramfs, find, parts};
use crate::common::process;
use crate::common::proxies::Options;
use crate::common::vm::Vm;
use crate::common::wait;

const MIB: u64 = 1 << 20;
/// Without quiescing, a backup is in the state after a power cut: the journal must be replayed.
const UNCLEAN: &str = "needs_recovery";

fn run(program: &str, arguments: &[&Path]) -> process::Output {
    let mut command = Command::new(find(program));
    command.args(arguments);
    process::run(command)
}

/// Returns a root file system in memory: a shell, an agent with its libraries, modules.
fn initramfs(parts: &Path, dir: &Path) -> PathBuf {
    let initramfs = Initramfs::new(dir, &project_file("tests/freeze/guest-init.sh"));
    for name in ["sbin", "data", "var/run"] {
        initramfs.directory(name);
    }
    initramfs.program(&parts.join("qemu-ga"), "/sbin/qemu-ga");
    initramfs.pack()
}

struct Scene {
    system: System,
    vm: Vm,
    caller: Caller,
    serial: PathBuf,
}

impl Scene {
    /// Boots the guest; returns when it writes.
    async fn boot() -> Self {
        let parts = parts();
        let system = System::start();
        let dir = system.dir().to_owned();
        let archive = initramfs(&parts, &dir);
        let disk = dir.join("root.raw");
        fs::File::create(&disk).unwrap().set_len(48 * MIB).unwrap();
        let make = ["-q", "-F", "-t", "ext4"].map(Path::new);
        run("mke2fs", &[&make[..], &[&disk]].concat()).expect_success();
        let (serial, agent) = (dir.join("serial"), dir.join("qga"));
        let kernel = parts.join("vmlinuz");
        let arguments = [
            ("-m", "256".to_owned()),
            ("-kernel", kernel.display().to_string()),
            ("-initrd", archive.display().to_string()),
            ("-append", "console=ttyS0 quiet panic=-1".to_owned()),
            ("-serial", format!("file:{}", serial.display())),
            ("-device", "virtio-serial-pci".to_owned()),
            (
                "-chardev",
                format!("socket,id=qga,path={},server=on,wait=off", agent.display()),
            ),
            (
                "-device",
                "virtserialport,chardev=qga,name=org.qemu.guest_agent.0".to_owned(),
            ),
        ];
        let arguments: Vec<&str> = arguments
            .iter()
            .flat_map(|(key, value)| [*key, value.as_str()])
            .collect();
        let vm = system
            .vm("linux")
            .disk(Disk::new("vda", 0).raw().at(&disk))
            .extra(&arguments)
            .running()
            .start();
        let monitor = vm.monitor_path();
        system.write_domain_file("linux", &format!("monitor = {monitor:?}\nagent = {agent:?}\n"));
        system.wait_for_domain("linux");
        let scene = Self {
            caller: Caller::new(&system).await,
            system,
            vm,
            serial,
        };
        scene.writes_on();
        scene
    }

    fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.serial).unwrap_or_default()).into_owned()
    }

    /// Returns the number of files that the guest has written so far.
    fn written(&self) -> u64 {
        let said = self.said();
        // The last line may be incomplete.
        let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let last = whole
            .lines()
            .rev()
            .find_map(|line| line.trim().strip_prefix("written "));
        last.map_or(0, |count| count.parse().unwrap())
    }

    /// Waits until the guest has written more, that is, is not frozen.
    fn writes_on(&self) {
        let before = self.written();
        let began = Instant::now();
        while self.written() < before + 3 {
            assert!(
                began.elapsed() < wait::DEADLINE,
                "the guest does not write:\n{}",
                self.said()
            );
            std::thread::sleep(wait::STEP);
        }
    }

    /// Makes a backup and restores its image; returns the path, and how many µs the guest was frozen.
    async fn backup(&self, document: &str) -> (PathBuf, u64) {
        let job = self.caller.complete("linux", document).await;
        let frozen = job.frozen_time().await.unwrap();
        let image = PathBuf::from(&job.disks().await.unwrap()[0].4);
        let restored = self
            .system
            .dir()
            .join(format!("restored-{}", job.id().await.unwrap()));
        let mut restore = Command::new("qemu-img");
        restore.args(["convert", "-O", "raw"]).args([&image, &restored]);
        process::run(restore).expect_success();
        (restored, frozen)
    }
}

/// Returns the features in the superblock of an ext4.
fn features(image: &Path) -> String {
    let told = run("dumpe2fs", &[Path::new("-h"), image]).expect_success();
    let line = told.lines().find(|line| line.starts_with("Filesystem features:"));
    line.unwrap_or_else(|| panic!("{told}")).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_system_of_a_linux_is_clean_in_a_quiesced_backup_and_the_guest_writes_on() {
    let mut scene = Scene::boot().await;

    // The state after a power cut.
    let (image, frozen) = scene.backup("").await;
    assert_eq!(frozen, 0);
    assert!(features(&image).contains(UNCLEAN), "{}", features(&image));
    scene.writes_on();

    let (image, frozen) = scene
        .backup("<domainbackup><quiesce mode='require'/></domainbackup>")
        .await;
    assert!((1..5_000_000).contains(&frozen), "{frozen} µs");
    println!("frozen for {frozen} µs");
    scene.writes_on();
    assert!(!features(&image).contains(UNCLEAN), "{}", features(&image));
    let check = run("e2fsck", &[Path::new("-fn"), &image]);
    assert_eq!(check.status, 0, "{}{}", check.stdout, check.stderr);

    // The service is killed with the guest frozen, and is not started again.
    scene.system.stop_daemon();
    scene.system.start_dying_daemon("frozen");
    scene.system.wait_for_domain("linux");
    let options = Options::from([("quiesce", "require".into())]);
    let caller = Caller::new(&scene.system).await;
    let _ = caller.try_start("linux", "", &[], options).await;
    scene.system.wait_for_death();
    scene.writes_on();
    assert!(scene.vm.residue().jobs.is_empty());
}
