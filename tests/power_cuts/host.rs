//! The host whose power is cut: a Linux in a QEMU, with the service, a bus, polkit and a VM.
//!
//! A cut is a SIGKILL of that QEMU. The Linux loses its page cache. Its disks lose unflushed writes, as a real disk
//! loses its write cache: each disk is a qcow2 overlay, whose new clusters are unreachable until QEMU has written its
//! tables, and it writes these when the Linux flushes.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::bus::{configuration, project_file};
use crate::common::initramfs::{Initramfs, find, parts};
use crate::common::process::{self, Process};
use crate::common::{vm, wait};

const MIB: u64 = 1 << 20;
/// The timeout of each command. Nested emulation is slow, and the host may be busy.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// The write bandwidth of the store disks in bytes a second: so slow that a cut can hit an fsync.
const STORE_RATE: u64 = 6 * MIB;

/// The size of each disk of the VM in the host.
pub const DISK_BYTES: u64 = 16 * MIB;

/// The default store is in the state directory; the other one has its own file system.
pub const STORES: [&str; 2] = ["default", "xfs"];

const CONFIGURATION: &str = r#"
domain-directories = ["/run/domains.d"]
idle-exit-seconds = 0
[store.xfs]
path = "/store"
"#;

/// The file systems in the order in which the host finds their disks: the name of a file, the program that creates
/// one, and whether it contains a store.
const DISKS: [(&str, &[&str], bool); 3] = [
    ("state", &["mke2fs", "-q", "-F", "-t", "ext4"], true),
    ("store", &["mkfs.xfs", "-q"], true),
    ("machine", &["mke2fs", "-q", "-F", "-t", "ext4"], false),
];
/// The size of each, in bytes. Most of it is a hole.
const FILE_SYSTEM_BYTES: u64 = 512 * MIB;

/// The host. Its disks persist over any number of boots.
pub struct Host {
    dir: PathBuf,
    initramfs: PathBuf,
    running: Option<Running>,
}

struct Running {
    qemu: Process,
    port: UnixStream,
    /// Input on the port that is not a complete line yet.
    rest: Vec<u8>,
}

/// The result of a command.
#[derive(Debug)]
pub struct Answer {
    pub status: i32,
    pub output: Vec<String>,
}

impl Host {
    /// Creates the host's disks and programs in `dir`, and does not start it.
    #[track_caller]
    pub fn new(dir: &Path) -> Self {
        for (name, make, _) in DISKS {
            let path = disk(dir, name);
            let file = std::fs::File::create(&path).expect("a disk is made");
            file.set_len(FILE_SYSTEM_BYTES).expect("it has its size");
            let mut command = Command::new(find(make[0]));
            command.args(&make[1..]).arg(&path);
            process::run(command).expect_success();
        }
        Self {
            dir: dir.to_owned(),
            initramfs: initramfs(dir),
            running: None,
        }
    }

    /// Boots the host with the present disks. Returns when it accepts commands.
    #[track_caller]
    pub fn boot(&mut self) {
        let socket = self.dir.join("port");
        let _ = std::fs::remove_file(&socket);
        let mut command = process::bound(vm::qemu());
        command.args(["-name", "host", "-machine", "q35", "-accel", "tcg,thread=multi"]);
        command.args(["-smp", "2", "-m", "1024", "-display", "none", "-nodefaults"]);
        command.args(["-no-user-config", "-no-reboot"]);
        command.arg("-kernel").arg(parts().join("vmlinuz"));
        command.arg("-initrd").arg(&self.initramfs);
        command.args(["-append", "console=ttyS0 quiet panic=-1"]);
        command.arg("-serial");
        command.arg(format!("file:{}", self.console_path().display()));
        command.arg("-chardev");
        command.arg(format!(
            "socket,id=port,path={},server=on,wait=off",
            socket.display()
        ));
        command.args(["-serial", "chardev:port"]);
        for (name, _, has_store) in DISKS {
            let overlay = self.dir.join(format!("{name}.qcow2"));
            let mut create = Command::new("qemu-img");
            // Small clusters, so that unflushed data is lost in small pieces.
            create.args([
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                "cluster_size=4096",
                "-F",
                "raw",
                "-b",
            ]);
            create.arg(disk(&self.dir, name)).arg(&overlay);
            process::run(create).expect_success();
            let rate = match has_store {
                true => format!(",throttling.bps-write={STORE_RATE}"),
                false => String::new(),
            };
            // A flush of the Linux writes the tables. The files need no flush here, because the page cache of the
            // test's own host is not lost.
            command.arg("-drive").arg(format!(
                "file={},format=qcow2,if=none,id={name},cache=unsafe,discard=unmap{rate}",
                overlay.display()
            ));
            command.arg("-device").arg(format!("virtio-blk-pci,drive={name}"));
        }
        let mut qemu = Process::start("host", &self.dir, command);
        let port = wait::until("the host's port", || {
            qemu.assert_running();
            UnixStream::connect(&socket).ok()
        });
        self.running = Some(Running {
            qemu,
            port,
            rest: Vec::new(),
        });
        let answer = self.answer();
        assert_eq!((answer.status, answer.output.as_slice()), (0, [].as_slice()));
    }

    /// Cuts the power at once, in any state.
    pub fn cut(&mut self) {
        let mut running = self.running.take().expect("it runs");
        running.qemu.kill();
        for (name, _, _) in DISKS {
            let overlay = self.dir.join(format!("{name}.qcow2"));
            let mut commit = Command::new("qemu-img");
            commit.args(["commit", "-q", "-d"]).arg(&overlay);
            process::run(commit).expect_success();
            std::fs::remove_file(overlay).expect("an overlay is removed");
        }
    }

    /// Starts a command. Its output is read line by line, or as its result.
    #[track_caller]
    pub fn begin(&mut self, command: &str) {
        let port = &mut self.running.as_mut().expect("it runs").port;
        writeln!(port, "{command}").expect("the host takes a command");
    }

    /// Runs a command to its end.
    #[track_caller]
    pub fn run(&mut self, command: &str) -> Answer {
        self.begin(command);
        self.answer()
    }

    /// Runs a command that must succeed, and returns its output.
    #[track_caller]
    pub fn must(&mut self, command: &str) -> Vec<String> {
        let answer = self.run(command);
        assert_eq!(
            answer.status,
            0,
            "{command}: {}\n{}",
            answer.output.join("\n"),
            self.console()
        );
        answer.output
    }

    /// Returns the rest of the output of a started command, and its status.
    #[track_caller]
    pub fn answer(&mut self) -> Answer {
        let mut output = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while let Some(line) = self.line(deadline) {
            match line.strip_prefix("= ") {
                Some(status) => {
                    let status = status.parse().expect("a status is a number");
                    return Answer { status, output };
                }
                None => output.push(line),
            }
        }
        panic!("the host does not answer: {output:?}\n{}", self.console());
    }

    /// Returns the next output line, if it comes before that moment.
    #[track_caller]
    pub fn line(&mut self, deadline: Instant) -> Option<String> {
        let running = self.running.as_mut().expect("it runs");
        loop {
            if let Some(end) = running.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = running.rest.drain(..=end).collect();
                return Some(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            // A timeout of zero would mean no timeout.
            let left = left.max(Duration::from_millis(1));
            running.port.set_read_timeout(Some(left)).expect("it has a limit");
            let mut some = [0; 4096];
            match running.port.read(&mut some) {
                Ok(0) => {
                    running.qemu.wait();
                    panic!("the host ended:\n{}", self.console());
                }
                Ok(count) => running.rest.extend_from_slice(&some[..count]),
                Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {
                    return None;
                }
                Err(error) => panic!("the host's port: {error}"),
            }
        }
    }

    fn console_path(&self) -> PathBuf {
        self.dir.join("console")
    }

    /// Returns the output of the kernel and the programs since the boot.
    pub fn console(&self) -> String {
        let said = std::fs::read(self.console_path()).unwrap_or_default();
        String::from_utf8_lossy(&said).into_owned()
    }
}

fn disk(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.raw"))
}

/// Builds the root file system from this host's programs and the tested ones.
fn initramfs(dir: &Path) -> PathBuf {
    let new = Initramfs::new(dir, &project_file("tests/power_cuts/init.sh"));
    for name in ["/var/lib/backupd", "/store", "/machine", "/etc/polkit-1/rules.d"] {
        new.directory(name);
    }
    new.program(env!("CARGO_BIN_EXE_backupd").as_ref(), "/usr/libexec/backupd");
    new.program(env!("CARGO_BIN_EXE_backupctl").as_ref(), "/usr/bin/backupctl");
    for program in ["dbus-daemon", "qemu-img", "qemu-storage-daemon"] {
        new.program(&find(program), &format!("/usr/bin/{program}"));
    }
    let polkitd = Path::new("/usr/lib/polkit-1/polkitd");
    new.program(polkitd, "/usr/lib/polkit-1/polkitd");
    for file in [
        "/etc/passwd",
        "/etc/group",
        "/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf",
        "/usr/share/polkit-1/actions/org.freedesktop.policykit.policy",
    ] {
        new.put(file.as_ref(), file);
    }
    new.directory("/usr/share/polkit-1/rules.d");
    new.put(
        &project_file("polkit/org.example.backup1.policy"),
        "/usr/share/polkit-1/actions/org.example.backup1.policy",
    );
    let policy = "/etc/org.example.Backup1.conf";
    new.put(&project_file("dbus/org.example.Backup1.conf"), policy);
    new.write(
        &configuration("/run/bus".as_ref(), policy.as_ref()),
        "/etc/bus.conf",
    );
    new.write(CONFIGURATION, "/etc/backupd/backupd.toml");
    emulator(&new);
    new.pack()
}

/// Copies the emulator and the files that it loads: its software emulation, if that is a plugin, and the firmware.
fn emulator(new: &Initramfs) {
    let qemu = vm::qemu();
    new.program(&qemu, "/usr/bin/qemu-system-x86_64");
    let prefix = qemu
        .parent()
        .and_then(Path::parent)
        .expect("a program is in a bin");
    for plugins in ["lib/x86_64-linux-gnu/qemu", "lib/qemu"] {
        let plugin = prefix.join(plugins).join("accel-tcg-x86_64.so");
        if plugin.is_file() {
            new.program(&plugin, &format!("/usr/{plugins}/accel-tcg-x86_64.so"));
        }
    }
    let mut directories = Command::new(&qemu);
    directories.args(["-L", "help"]);
    let directories = process::run(directories).expect_success();
    for name in ["bios-256k.bin", "kvmvapic.bin"] {
        let mut found = directories.lines().map(|dir| Path::new(dir).join(name));
        let found = found
            .find(|path| path.is_file())
            .unwrap_or_else(|| panic!("QEMU has no {name}"));
        new.put(&found, &format!("/usr/share/qemu/{name}"));
    }
}
