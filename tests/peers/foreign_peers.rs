//! The process at the other end of a monitor can belong to another user. Neither its use of the socket nor its open
//! files block the service or other callers.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::common::caller::{Caller, assert_completed};
use crate::common::chain::{directories, id};
use crate::common::clients::{ROOT, USER};
use crate::common::disk::Disk;
use crate::common::peer::{Peer, StandIn};
use crate::common::proxies::Options;
use crate::common::vm::Vm;
use crate::common::wait::{until_async, within};
use crate::common::{System, polkit};
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::Signal;
use tokio::task::JoinHandle;
use zbus::wire::Variant;

const EVENT: &str = "{\"event\": \"RESUME\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 2}}\r\n";
const MIB: u64 = 1 << 20;
/// Longer than any wait in a test.
const LINGER: Duration = Duration::from_secs(600);

/// Starts a stand-in for a QEMU; returns another descriptor of its end of the socket.
fn stand_in(stream: UnixStream) -> (UnixStream, JoinHandle<()>) {
    let same = stream.try_clone().unwrap();
    stream.set_nonblocking(true).unwrap();
    let stream = tokio::net::UnixStream::from_std(stream).unwrap();
    (same, tokio::spawn(Peer::new(stream).play_qemu()))
}

/// Returns a socket whose last close waits for [`LINGER`], and its peer, which reads nothing.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    rustix::net::sockopt::set_socket_linger(&socket, Some(LINGER)).unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 1 << 16]).is_ok() {}
    socket.set_nonblocking(false).unwrap();
    (socket, peer)
}

/// Sends a text with an open file attached.
fn say_with(stream: &UnixStream, text: &str, file: impl AsFd) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
    let sent = sendmsg(
        stream,
        &[IoSlice::new(text.as_bytes())],
        &mut control,
        SendFlags::empty(),
    );
    assert_eq!(sent.unwrap(), text.len());
}

/// Starts a system with a domain `theirs`, registered by a socket, and returns the socket's other ends.
async fn registered() -> (System, Caller, OwnedFd, UnixStream) {
    let system = System::start();
    let caller = Caller::new(&system).await;
    let (ours, theirs) = UnixStream::pair().unwrap();
    let shared = OwnedFd::from(ours.try_clone().unwrap());
    let (theirs, _) = stand_in(theirs);
    caller.register("theirs", ours.into()).await.unwrap();
    (system, caller, shared, theirs)
}

/// Checks that other callers are served while the peer waits, and that the service stops on request.
async fn assert_served(mut system: System, caller: &Caller) {
    for _ in 0..10 {
        within("an answer", caller.manager.list_domains()).await.unwrap();
    }
    assert_eq!(system.stop_daemon(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_made_blocking_delays_nobody() {
    let (system, caller, shared, mut theirs) = registered().await;
    for _ in 0..20 {
        let flags = fcntl_getfl(&shared).unwrap();
        fcntl_setfl(&shared, flags - OFlags::NONBLOCK).unwrap();
        theirs.write_all(EVENT.as_bytes()).unwrap();
        within("an answer", caller.manager.list_domains()).await.unwrap();
    }
    assert_served(system, &caller).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_the_caller_keeps_works_when_the_service_has_ended() {
    let (mut system, _caller, shared, mut theirs) = registered().await;
    assert_eq!(system.stop_daemon(), Some(0));
    theirs.write_all(EVENT.as_bytes()).unwrap();
    let mut shared = UnixStream::from(shared);
    shared.set_nonblocking(false).unwrap();
    let mut heard = vec![0; EVENT.len()];
    shared.read_exact(&mut heard).unwrap();
    assert_eq!(heard, EVENT.as_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unexpected_descriptor_closes_the_connection_and_delays_nobody() {
    let (system, caller, _shared, theirs) = registered().await;
    let (socket, _peer) = lingering();
    say_with(&theirs, EVENT, &socket);
    drop(socket);
    until_async("the domain to be gone", || async {
        caller
            .manager
            .list_domains()
            .await
            .unwrap()
            .is_empty()
            .then_some(())
    })
    .await;
    assert_served(system, &caller).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unread_descriptor_on_a_closed_connection_delays_nobody() {
    let mut system = System::start();
    let caller = Caller::new(&system).await;
    let path = system.dir().join("monitor");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    system.write_domain_file("theirs", &format!("monitor = \"{}\"\n", path.display()));
    let accepted = tokio::task::spawn_blocking(move || listener.accept().unwrap().0);
    let (theirs, _play) = stand_in(within("the service to connect", accepted).await.unwrap());
    system.wait_for_domain("theirs");
    let (socket, _peer) = lingering();
    // The service does not read on after a line that ends the connection. All lines are there before it reads.
    system.daemon().process().signal(Signal::STOP);
    let mut garbage = vec![b'x'; 1 << 16];
    garbage.push(b'\n');
    (&theirs).write_all(&garbage).unwrap();
    say_with(&theirs, EVENT, &socket);
    drop(socket);
    system.daemon().process().signal(Signal::CONT);
    until_async("the connection to end", || async {
        let ended = (&theirs).write_all(b"\n").is_err();
        ended.then_some(())
    })
    .await;
    assert_served(system, &caller).await;
}

/// Starts a system on which an ordinary user has registered domains, `theirs0` and so on, that claim to have an
/// unknown file open. Then every open file of their process would count. The process is this one.
async fn claimed(count: usize) -> (System, Vm, Caller, Vec<StandIn>) {
    let system = System::setup()
        .rules(&polkit::allow(
            USER,
            &["service.register-domain", "domain.export"],
        ))
        .start();
    let disk = Disk::new("vda", 8 * MIB).fill(0, MIB, 0x11);
    let vm = system.configured(system.vm("web").disk(disk).running());
    let user = Caller::of_user(&system, USER).await;
    let mut peers = Vec::new();
    for number in 0..count {
        let (socket, peer) = StandIn::claiming(&["/nonexistent"]);
        user.register(&format!("theirs{number}"), socket).await.unwrap();
        peers.push(peer);
    }
    (system, vm, user, peers)
}

fn into_file(path: &Path) -> String {
    format!(
        "<domainbackup><disks><disk name='vda'><target file='{}'/></disk></disks></domainbackup>",
        path.display()
    )
}

fn reuse() -> Options<'static> {
    Options::from([("reuse-external", Variant::from(true))])
}

#[tokio::test(flavor = "multi_thread")]
async fn false_claims_of_another_users_domain_block_no_backup_or_restore() {
    let (system, _vm, _user, peers) = claimed(3).await;
    let root = Caller::new(&system).await;
    let target = system.dir().join("target.qcow2");
    root.complete("web", &into_file(&target)).await;
    // Open for writing too: this process holds no lock of QEMU on it.
    let held = [
        rustix::fs::open(&target, OFlags::PATH, Mode::empty()).unwrap(),
        File::options()
            .read(true)
            .write(true)
            .open(&target)
            .unwrap()
            .into(),
    ];
    let asked: Vec<usize> = peers.iter().map(StandIn::commands).collect();
    let job = root.start_with("web", &into_file(&target), &[], reuse()).await;
    assert_completed(&job).await;
    assert_eq!(peers.iter().map(StandIn::commands).collect::<Vec<_>>(), asked);
    drop(held);

    root.complete("web", "").await;
    let [backup] = directories(&system.store().join("web")).try_into().unwrap();
    let restored = system.dir().join("restored.raw");
    File::create(&restored).unwrap();
    let _held = rustix::fs::open(&restored, OFlags::PATH, Mode::empty()).unwrap();
    let disk = format!("vda={}", restored.display());
    let arguments = [
        "restore",
        &id(&backup),
        "--format",
        "raw",
        "--force",
        "--disk",
        &disk,
    ];
    system.clients().backupctl(ROOT, &arguments).expect_success();
    assert_eq!(peers.iter().map(StandIn::commands).collect::<Vec<_>>(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_root_learns_which_process_has_a_target_open() {
    let (system, mut vm, user, _peers) = claimed(1).await;
    let root = Caller::new(&system).await;
    let other = system.vm("other").disk(Disk::new("vda", 8 * MIB)).start();
    let locked = into_file(other.source_path("vda"));
    let told = |error: zbus::Error| error.to_string();
    let by = format!("process {}, qemu-system-x86", other.pid());
    let text = told(root.try_start("web", &locked, &[], reuse()).await.unwrap_err());
    assert!(text.contains(&by) && text.contains("of user 0"), "{text}");
    let text = told(user.try_start("web", &locked, &[], reuse()).await.unwrap_err());
    assert!(
        text.contains("open in another QEMU, qemu-img or qemu-storage-daemon. "),
        "{text}"
    );
    let own = into_file(vm.source_path("vda"));
    let text = told(root.try_start("web", &own, &[], reuse()).await.unwrap_err());
    assert!(text.contains("a disk of a running domain (web)"), "{text}");
    let text = told(user.try_start("web", &own, &[], reuse()).await.unwrap_err());
    assert!(text.ends_with("a disk of a running domain"), "{text}");
    vm.quit();
}
