//! The programs that read untrusted images have access only to the files that they receive.

use std::fs::{self, File};
use std::net::{TcpListener, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::chain::{directories, id};
use crate::common::clients::USER;
use crate::common::disk::Disk;
use crate::common::made::{FIRST, Store, backupctl, run, text};
use crate::common::process::{self, Output, Process};
use crate::common::proxies::Options;
use crate::common::stand_in::{HANGS, StandIn};
use crate::common::storage::LoopDevice;
use crate::common::vm::Vm;
use crate::common::wait;
use rustix::process::Pid;
use tempfile::TempDir;
use zbus::wire::{OwnedObjectPath, Variant};

const MIB: u64 = 1 << 20;
const NONE: &str = "0000000000000000";
/// Bit 1 of the mask: see capabilities(7).
const DAC_OVERRIDE: &str = "0000000000000002";

/// Resources that a hostile program could reach. Each exists and is open to root.
struct Surroundings {
    place: TempDir,
    device: LoopDevice,
    bus: PathBuf,
    tcp: TcpListener,
    _udp: UdpSocket,
    _abstract: UnixListener,
}

impl Surroundings {
    fn new(bus: &str) -> Self {
        let place = crate::common::test_directory();
        let file = place.path().join("device");
        File::create(&file).unwrap().set_len(MIB).unwrap();
        let device = LoopDevice::attach(&file, MIB);
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let name = SocketAddr::from_abstract_name(text(place.path())).unwrap();
        let path = bus
            .strip_prefix("unix:path=")
            .expect("the bus is a socket with a path");
        Self {
            bus: path.split(',').next().unwrap().into(),
            device,
            _udp: UdpSocket::bind(tcp.local_addr().unwrap()).unwrap(),
            tcp,
            _abstract: UnixListener::bind_addr(&name).unwrap(),
            place,
        }
    }

    /// Makes a program that tries to reach all of them, with these descriptors besides the standard ones.
    fn hostile(&self, parent: &Path, name: &str, passed: usize, writes: bool) -> StandIn {
        let victim = self.place.path().join("victim");
        fs::write(&victim, "another backup's").unwrap();
        let new = self.place.path().join("new");
        for (names, kind) in [
            (vec!["link", "name", "device", "socket"], "file"),
            (vec!["directory"], "directory"),
        ] {
            for name in names {
                let path = self.place.path().join(format!("new-{name}"));
                let _ = if kind == "file" {
                    fs::remove_file(path)
                } else {
                    fs::remove_dir(path)
                };
            }
        }
        let names = [
            ("VICTIM", text(&victim)),
            ("NEW", text(&new)),
            ("DEVICE", text(self.device.device())),
            ("BUS", text(&self.bus)),
            ("ABSTRACT", text(self.place.path())),
        ];
        let names = names.map(|(name, value)| format!("#define {name} {value:?}\n"));
        let numbers = format!(
            "#define PORT {}\n#define PASSED {passed}\n#define WRITES {}\n",
            self.tcp.local_addr().unwrap().port(),
            u8::from(writes)
        );
        let source = include_str!("confined/hostile.c");
        StandIn::compile(parent, name, &(names.concat() + &numbers + source))
    }

    /// The number of attempts; all succeed as root outside the sandbox.
    #[track_caller]
    fn tries(&self, writes: bool) -> usize {
        let place = crate::common::test_directory();
        let program = self.hostile(place.path(), "unconfined", 0, writes);
        let mut command = Command::new("sh");
        let image = place.path().join("image");
        fs::write(&image, "").unwrap();
        command
            .args(["-c", "exec \"$0\" 3< \"$1\""])
            .args([program.program(), &image]);
        let Output { stdout, stderr, .. } = process::run(command);
        let reached =
            stderr.lines().filter(|line| line.starts_with("reached")).count() + stdout.lines().count();
        let tried = stderr
            .lines()
            .find_map(|line| line.strip_prefix("tried "))
            .unwrap();
        let tried = tried.parse().unwrap();
        assert_eq!(reached, tried, "root reaches all of it: {stderr}");
        tried
    }
}

/// Checks the report of the program, which is in the message of its job.
#[track_caller]
fn assert_reached_nothing(message: &str, tries: usize) {
    assert!(message.contains(&format!("tried {tries}")), "{message}");
    assert!(!message.contains("reached"), "{message}");
}

fn machine(system: &System) -> Vm {
    let disk = Disk::new("vda", MIB).fill(0, MIB, 0x11);
    system.configured(system.vm("web").disk(disk).running())
}

async fn call(
    caller: &Caller,
    backup: &Path,
    method: &str,
    body: &(impl serde::Serialize + zbus::DynamicType),
) -> zbus::Message {
    let object = caller.manager.get_backup(&id(backup)).await.unwrap();
    let interface = Some("org.example.Backup1.Backup");
    let service = Some("org.example.Backup1");
    let connection = &caller.connection;
    connection
        .call_method(service, &object, interface, method, body)
        .await
        .unwrap()
}

async fn restore(caller: &Caller, backup: &Path, target: &File) -> zbus::Message {
    let targets = [("vda", zbus::Fd::from(target))];
    let options = Options::from([("format", Variant::from("raw"))]);
    call(caller, backup, "Restore", &(targets.as_slice(), options)).await
}

async fn failure(caller: &Caller, reply: zbus::Message) -> String {
    let (_, path): (u32, OwnedObjectPath) = reply.body().deserialize().unwrap();
    let job = caller.job(path).await;
    let (result, _, message) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(result, "failed");
    message
}

/// Creates a file of a user that no other user may open.
fn file_of_a_user(path: &Path) -> File {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    chown(path, Some(USER), Some(USER)).unwrap();
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_image_program_of_the_service_reaches_nothing() {
    let place = crate::common::test_directory();
    let system = System::setup()
        .environment("PATH", &StandIn::path_below(place.path()))
        .start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    root.complete("web", "").await;
    let [full] = directories(&system.store().join("web")).try_into().unwrap();
    let around = Surroundings::new(system.bus().address());
    let _checker = around.hostile(place.path(), "qemu-img", 1, false);
    let reply = call(&root, &full, "Verify", &Options::new()).await;
    let message = failure(&root, reply).await;
    assert_reached_nothing(&message, around.tries(false));
    // An image, and two targets: one of root, and one that root can open again only with a capability.
    let tries = around.tries(true);
    let _engine = around.hostile(place.path(), "qemu-storage-daemon", 2, true);
    for (name, owner) in [("roots", 0), ("users", USER)] {
        let path = system.dir().join(name);
        let target = file_of_a_user(&path);
        chown(&path, Some(owner), Some(owner)).unwrap();
        let reply = restore(&root, &full, &target).await;
        assert_reached_nothing(&failure(&root, reply).await, tries);
    }
}

#[test]
fn a_hostile_image_program_of_the_client_reaches_nothing() {
    let store = Store::new();
    let around = Surroundings::new(&format!("unix:path={}", listening(store.dir.path()).display()));
    let hostile = around.hostile(store.dir.path(), "qemu-img", 1, false);
    let verify = |mut command: Command| {
        command.args(["verify", FIRST, "--from", text(&store.path())]);
        command.env("PATH", hostile.path());
        process::run(command).stdout
    };
    let tries = around.tries(false);
    assert_reached_nothing(&verify(backupctl()), tries);
    // A program of an ordinary user runs with that user's rights.
    let mut chown = Command::new("chown");
    chown.args(["-R", &USER.to_string(), text(&store.path())]);
    process::run(chown).expect_success();
    let said = verify(process::bound_as(USER, env!("CARGO_BIN_EXE_backupctl")));
    assert_reached_nothing(&said, tries);
}

/// Listens on a socket like the system bus's and keeps its connections open.
fn listening(directory: &Path) -> PathBuf {
    let path = directory.join("bus");
    // Stays open until the test ends.
    std::mem::forget(UnixListener::bind(&path).unwrap());
    path
}

/// Returns a value of `/proc/PID/status`.
#[track_caller]
fn status(process: Pid, key: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{}/status", process.as_raw_nonzero())).unwrap();
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    value
        .unwrap_or_else(|| panic!("{key}: {status}"))
        .trim()
        .to_owned()
}

#[track_caller]
fn assert_confined(process: Pid, capabilities: &str) {
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(status(process, set), NONE, "{set}");
    }
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(status(process, set), capabilities, "{set}");
    }
    assert_eq!(status(process, "NoNewPrivs"), "1");
    assert_eq!(status(process, "Seccomp"), "2", "a filter");
    let read = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", process.as_raw_nonzero())).unwrap();
    assert_eq!(read("oom_score_adj"), "1000\n");
    assert_eq!(read("environ"), "");
    let limits = read("limits");
    let data = limits
        .lines()
        .find(|line| line.starts_with("Max data size"))
        .unwrap();
    assert!(!data.contains("unlimited"), "{data}");
}

/// Returns the child of a process that runs a program of this name.
#[track_caller]
fn child_of(parent: u32, name: &str) -> Pid {
    wait::until(name, || {
        let tasks = fs::read_dir(format!("/proc/{parent}/task")).ok()?;
        let children = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
        let children: Vec<i32> = children
            .flat_map(|list| {
                list.split_whitespace()
                    .map(|pid| pid.parse().unwrap())
                    .collect::<Vec<_>>()
            })
            .collect();
        let running = children
            .into_iter()
            .find(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with(name)));
        Pid::from_raw(running?)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_daemon_that_serves_has_no_rights() {
    let mut system = System::start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    root.complete("web", "").await;
    let [full] = directories(&system.store().join("web")).try_into().unwrap();
    let listener = UnixListener::bind(system.dir().join("nbd")).unwrap();
    call(
        &root,
        &full,
        "Export",
        &("", zbus::Fd::from(&listener), Options::new()),
    )
    .await;
    let engine = child_of(system.daemon().pid(), "qemu-storage-daemon");
    assert_confined(engine, NONE);
    // It locks the image that it reads all the same.
    let image = full.join("vda.qcow2");
    let write = run("qemu-io", &["-f", "qcow2", "-c", "write 0 512", text(&image)]);
    assert!(write.stderr.contains("lock"), "{}{}", write.stdout, write.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_users_file_is_opened_with_one_capability() {
    let place = crate::common::test_directory();
    let path = StandIn::path_below(place.path());
    let system = System::setup().environment("PATH", &path).start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    root.complete("web", "").await;
    let [full] = directories(&system.store().join("web")).try_into().unwrap();
    let engine = StandIn::new(place.path(), "qemu-storage-daemon", HANGS);
    let target = file_of_a_user(&system.dir().join("vda"));
    restore(&root, &full, &target).await;
    assert_confined(engine.wait_for_start(), DAC_OVERRIDE);
}

#[test]
fn a_storage_daemon_of_the_clients_has_no_rights() {
    let store = Store::new();
    let socket = store.dir.path().join("socket");
    let mut export = backupctl();
    export.args([
        "export",
        FIRST,
        "--from",
        text(&store.path()),
        "--socket",
        text(&socket),
    ]);
    let export = Process::start("export", store.dir.path(), export);
    assert_confined(child_of(export.pid(), "qemu-storage-daemon"), NONE);
}
