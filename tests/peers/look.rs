//! The service without CAP_SYS_PTRACE: a helper reports the open files of other processes, and a failed query refuses
//! the target.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::common::caller::{Caller, as_user, assert_completed};
use crate::common::disk::Disk;
use crate::common::hanging::{Hanging, Limits, Operation};
use crate::common::helper::{self, Helper};
use crate::common::process::{self, Process};
use crate::common::proxies::{Options, error_name};
use crate::common::proxy::Proxy;
use crate::common::storage::{self, LoopDevice};
use crate::common::vm::Vm;
use crate::common::{System, test_directory, wait};
use backupd::targets::Look;
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
const INVALID: &str = "org.example.Backup1.Error.TargetInvalid";
const INTERNAL: &str = "org.example.Backup1.Error.Internal";
const ANNA: u32 = 1000;

/// A VM with one disk `vda` that is backed up by a service with a helper.
struct Scene {
    system: System,
    vm: Vm,
    caller: Caller,
}

impl Scene {
    async fn new() -> Self {
        let system = System::setup().asking_helper().start();
        let vm = system.configured(system.vm("web").disk(Disk::new("vda", SIZE).fill(0, MIB, 0x11)));
        let caller = Caller::new(&system).await;
        Self { system, vm, caller }
    }

    fn socket(&self) -> PathBuf {
        helper::socket(self.system.dir())
    }

    /// Creates an image that no process has open.
    fn image(&self, name: &str) -> PathBuf {
        let path = self.system.dir().join(name);
        let mut command = process::bound("qemu-img");
        command
            .args(["create", "-q", "-f", "raw"])
            .arg(&path)
            .arg(SIZE.to_string());
        process::run(command).expect_success();
        path
    }

    /// Checks that a backup into an existing target is refused with an error of that name and changes nothing. Returns
    /// the error text.
    async fn refuses(&self, target: &Path, kind: &str, name: &str) -> String {
        let before = fs::read(target).unwrap();
        let residue = self.vm.residue();
        let document = into(target, kind);
        let started = self.caller.try_start("web", &document, &[], reuse()).await;
        let error = started.expect_err("the backup is refused");
        let text = error.to_string();
        assert_eq!(error_name(&error), name, "{text}");
        assert!(fs::read(target).unwrap() == before, "it was changed: {text}");
        assert_eq!(self.vm.residue(), residue);
        text
    }

    async fn completes(&self, target: &Path, kind: &str) {
        let document = into(target, kind);
        assert_completed(&self.caller.start_with("web", &document, &[], reuse()).await).await;
        assert!(storage::holds(target, "raw", 0, MIB, 0x11));
    }
}

fn reuse() -> Options<'static> {
    Options::from([("reuse-external", Variant::from(true))])
}

/// `kind` is "file" or "dev".
fn into(target: &Path, kind: &str) -> String {
    let of_type = if kind == "dev" { " type='block'" } else { "" };
    format!(
        "<domainbackup><disks><disk name='vda'{of_type}><driver type='raw'/><target {kind}='{}'/></disk>\
         </disks></domainbackup>",
        target.display()
    )
}

/// Creates another node of a device, as libvirt does for each QEMU.
fn node_of(device: &Path, path: PathBuf) -> PathBuf {
    let mut command = process::bound("cp");
    command.arg("--archive").args([device, &path]);
    process::run(command).expect_success();
    path
}

/// Answers one question of the next connection, and closes the connection.
fn answer_one(listener: &UnixListener, answer: &[u8]) {
    let (mut stream, _) = listener.accept().unwrap();
    let mut header = [0; 8];
    stream.read_exact(&mut header).unwrap();
    let length = u32::from_le_bytes(header[..4].try_into().unwrap());
    let mut question = vec![0; usize::try_from(length).unwrap()];
    stream.read_exact(&mut question).unwrap();
    stream.write_all(answer).unwrap();
}

/// Returns a frame of the protocol.
fn frame(version: u32, text: &str) -> Vec<u8> {
    let length = u32::try_from(text.len()).unwrap();
    [&length.to_le_bytes()[..], &version.to_le_bytes(), text.as_bytes()].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_another_vm_has_open_through_another_node_is_refused() {
    let scene = Scene::new().await;
    let _helper = Helper::start(scene.system.dir());
    let device = |name: &str| LoopDevice::attach(&scene.system.dir().join(name), SIZE);
    let (theirs, free) = (device("theirs.img"), device("free.img"));
    let node = node_of(theirs.device(), scene.system.dir().join("node"));
    let disk = Disk::new("vda", SIZE).raw().fill(0, MIB, 0x77).at(&node);
    let _unknown = scene.system.vm("unknown").disk(disk).start();
    let text = scene.refuses(theirs.device(), "dev", INVALID).await;
    assert!(
        text.contains("open in another QEMU") && text.contains("process "),
        "{text}"
    );
    scene.completes(free.device(), "dev").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_a_known_vm_has_open_is_refused_under_any_name() {
    let scene = Scene::new().await;
    let _helper = Helper::start(scene.system.dir());
    let disk = Disk::new("vda", SIZE).raw().fill(0, MIB, 0x77);
    let other = scene.system.configured(scene.system.vm("other").disk(disk));
    let path = other.source_path("vda");
    let text = scene.refuses(path, "file", INVALID).await;
    assert!(text.contains("a disk of a running domain (other)"), "{text}");
    // The path that QEMU reports leads to another file now.
    let moved = scene.system.dir().join("moved");
    fs::rename(path, &moved).unwrap();
    fs::write(path, "").unwrap();
    let text = scene.refuses(&moved, "file", INVALID).await;
    assert!(text.contains("a disk of a running domain (other)"), "{text}");
    scene.completes(&scene.image("free"), "file").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_existing_target_is_overwritten_without_the_helper() {
    let scene = Scene::new().await;
    let target = scene.image("target");
    let device = LoopDevice::attach(&scene.system.dir().join("loop.img"), SIZE);
    let refused = async || {
        for (path, kind) in [(target.as_path(), "file"), (device.device(), "dev")] {
            let text = scene.refuses(path, kind, INTERNAL).await;
            let advice = "systemctl restart backupd-look.socket";
            assert!(
                text.contains("cannot find out whether other VMs") && text.contains(advice),
                "{text}"
            );
        }
    };
    assert!(!scene.socket().exists());
    refused().await;
    let mut helper = Helper::start(scene.system.dir());
    scene.completes(&target, "file").await;
    scene.completes(device.device(), "dev").await;
    helper.kill();
    assert!(scene.socket().exists());
    refused().await;
    // No process can have a new file open.
    let new = scene.system.dir().join("new");
    let document = into(&new, "file");
    let job = scene
        .caller
        .start_with("web", &document, &[], Options::new())
        .await;
    assert_completed(&job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_helper_does_not_block_the_backup() {
    let scene = Scene::new().await;
    let target = scene.image("target");
    // The kernel accepts the connection, and the process does not.
    let listener = UnixListener::bind(scene.socket()).unwrap();
    let text = scene.refuses(&target, "file", INTERNAL).await;
    assert!(text.contains("has not answered for 10 s"), "{text}");
    drop(listener);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_helper_without_the_capability_replies_with_an_error() {
    let scene = Scene::new().await;
    let target = scene.image("target");
    let _helper = Helper::start_without(scene.system.dir(), "sys_ptrace");
    let text = scene.refuses(&target, "file", INTERNAL).await;
    assert!(text.contains("needs both CAP_SYS_PTRACE and"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unusable_reply_of_the_helper_refuses_the_backup() {
    let scene = Scene::new().await;
    let target = scene.image("target");
    let listener = UnixListener::bind(scene.socket()).unwrap();
    let answers = [
        (Vec::new(), "it closed the connection"),
        (
            frame(1, "{\"open-files\":[]}")[..20].to_vec(),
            "it closed the connection",
        ),
        (frame(2, "{\"open-files\":[]}"), "another version"),
        (frame(1, "{\"locker\":null}"), "another question"),
        (frame(1, "{\"failed\":\"out of order\"}"), "out of order"),
        (frame(1, "nonsense"), "cannot be asked"),
    ];
    for (answer, why) in answers {
        let listener = listener.try_clone().unwrap();
        let answering = std::thread::spawn(move || {
            answer_one(&listener, &answer);
        });
        let text = scene.refuses(&target, "file", INTERNAL).await;
        assert!(text.contains(why), "{why}: {text}");
        answering.join().unwrap();
    }
}

#[test]
fn questions_continue_after_a_helper_has_ended() {
    let dir = test_directory();
    let socket = dir.path().join("look");
    let listener = UnixListener::bind(&socket).unwrap();
    let answering = std::thread::spawn(move || {
        for _ in 0..2 {
            answer_one(&listener, &frame(1, "{\"open-files\":[]}"));
        }
    });
    let look = Look::Helper(socket);
    let mut session = look.session();
    for question in 0..2 {
        let files = session.open_files(std::process::id(), None);
        assert!(files.is_ok_and(|files| files.is_empty()), "question {question}");
    }
    answering.join().unwrap();
    assert!(session.open_files(std::process::id(), None).is_err());
}

#[test]
fn a_series_of_questions_waits_for_a_hanging_helper_only_once() {
    let dir = test_directory();
    let socket = dir.path().join("look");
    let listener = UnixListener::bind(&socket).unwrap();
    let look = Look::Helper(socket);
    let mut session = look.session();
    for _ in 0..2 {
        let error = session.open_files(std::process::id(), None).unwrap_err();
        assert!(error.to_string().contains("has not answered for 10 s"), "{error}");
    }
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_ok());
    assert!(listener.accept().is_err(), "a second connection");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_helper_serves_only_root_and_its_own_version() {
    let system = System::setup().without_daemon().start();
    let helper = Helper::start(system.dir());
    let process = std::process::id();
    let question = format!("{{\"open-files\":{{\"process\":{process},\"owner\":null}}}}");
    let ask = |uid: u32, version: u32| {
        let socket = helper::socket(system.dir());
        let mut stream = as_user(uid, || UnixStream::connect(socket).unwrap());
        // The helper may have ended already.
        let _ = stream.write_all(&frame(version, &question));
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        answer
    };
    let text = |answer: Vec<u8>| String::from_utf8_lossy(&answer).into_owned();
    let answer = text(ask(0, 1));
    assert!(answer.contains("{\"open-files\":[{"), "{answer}");
    // A service of another version, as the helper sees it.
    let answer = ask(0, 2);
    assert_eq!(answer[4..8], 1_u32.to_le_bytes());
    assert!(text(answer.clone()).contains("failed"), "{answer:?}");
    assert!(ask(ANNA, 1).is_empty());
    assert!(
        helper.log().contains("cannot answer user 1000"),
        "{}",
        helper.log()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn one_helper_answers_for_all_targets_of_a_backup() {
    let scene = Scene::new().await;
    let helper = Helper::start(scene.system.dir());
    let disks = ["vda", "vdb"].map(|name| Disk::new(name, SIZE).fill(0, MIB, 0x11));
    let [first, second] = disks;
    let _two = scene
        .system
        .configured(scene.system.vm("two").disk(first).disk(second));
    let devices = ["a.img", "b.img", "c.img"];
    let devices = devices.map(|name| LoopDevice::attach(&scene.system.dir().join(name), SIZE));
    let disk = |name: &str, device: &LoopDevice| {
        let device = device.device().display();
        format!("<disk name='{name}' type='block'><driver type='raw'/><target dev='{device}'/></disk>")
    };
    let connections = async |disks: String| {
        let before = helper.connections();
        let document = format!("<domainbackup><disks>{disks}</disks></domainbackup>");
        let job = scene
            .caller
            .start_with("two", &document, &[], Options::new())
            .await;
        assert_completed(&job).await;
        helper.connections() - before
    };
    let [a, b, c] = &devices;
    let of_one = connections(disk("vda", a) + "<disk name='vdb' backup='no'/>").await;
    assert_eq!(connections(disk("vda", b) + &disk("vdb", c)).await, of_one);
    assert!(of_one > 0);
}

#[test]
fn an_image_that_a_user_has_open_is_not_read_for_the_estimate() {
    let dir = test_directory();
    let storage = Hanging::mount(&dir.path().join("fuse"), Limits::default());
    let path = storage.path().join("image");
    fs::write(&path, vec![1; 16 << 20]).unwrap();
    let has_open = |uid: u32| {
        let mut command = process::bound("sh");
        command
            .args([
                "-c",
                "exec setpriv --reuid=$0 --clear-groups sleep infinity 9< \"$1\"",
            ])
            .arg(uid.to_string())
            .arg(&path);
        Process::start(&format!("sleep-{uid}"), dir.path(), command)
    };
    let (anna, root) = (has_open(ANNA), has_open(0));
    for holder in [&anna, &root] {
        wait::until("the program to start", || {
            let name = fs::read_to_string(format!("/proc/{}/comm", holder.pid())).unwrap();
            (name == "sleep\n").then_some(())
        });
    }
    let data = {
        let path = path.clone();
        move |process| Look::Own.session().data_at_least(process, &path).unwrap()
    };
    assert!(data(root.pid()) > 0);
    // A server that never answers would hang the reader, and nothing would be found. Programs of other tests, which look
    // at all processes, may hang there too.
    storage.hang(Operation::Any);
    let (sender, found) = std::sync::mpsc::channel();
    let process = anna.pid();
    std::thread::spawn(move || sender.send(data(process)));
    let found = found.recv_timeout(wait::DEADLINE);
    storage.heal();
    assert_eq!(found, Ok(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_file_is_read_for_the_estimate_if_a_user_listens_at_the_monitor() {
    let system = System::start();
    let disk = Disk::new("vda", SIZE).raw().fill(0, 4 * MIB, 0x11);
    let vm = system.configured(system.vm("web").disk(disk));
    let caller = Caller::new(&system).await;
    let small = storage::Tmpfs::mount(&system.dir().join("small"), MIB);
    let refusal = async |domain: &str, target: &str| {
        let document = format!(
            "<domainbackup><disks><disk name='vda'><target file='{}'/></disk></disks></domainbackup>",
            small.path().join(target).display()
        );
        let started = caller.try_start(domain, &document, &[], Options::new()).await;
        started.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let estimated = |text: &str| text.contains("bytes of free space");
    let text = refusal("web", "a").await;
    assert!(estimated(&text), "{text}");

    // A user's process has listened at the monitor, and runs as root now: it has executed a set-user-ID program.
    let _open = fs::File::open(vm.source_path("vda")).unwrap();
    let directory = system.dir().join("anna");
    fs::create_dir(&directory).unwrap();
    std::os::unix::fs::chown(&directory, Some(ANNA), None).unwrap();
    let path = directory.join("monitor");
    let listening = path.clone();
    let listener = as_user(ANNA, || UnixListener::bind(listening).unwrap());
    let proxy = Proxy::on(listener, &path, &vm.monitor_path());
    system.remove_domain_file("web");
    system.write_domain_file("anna", &format!("monitor = \"{}\"\n", path.display()));
    system.wait_for_domain("anna");
    let text = refusal("anna", "b").await;
    assert!(!estimated(&text), "{text}");
    drop(proxy);
}
