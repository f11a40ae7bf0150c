//! The other end of a monitor is another user's process: nothing that it does to the socket keeps the service, or anybody
//! else, waiting.

mod common;

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::System;
use common::caller::Caller;
use common::peer::Peer;
use common::wait::{until_async, within};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::Signal;
use tokio::task::JoinHandle;

const EVENT: &str = "{\"event\": \"RESUME\", \"timestamp\": {\"seconds\": 1, \"microseconds\": 2}}\r\n";
/// Longer than anything in a test waits.
const LINGER: Duration = Duration::from_secs(600);

/// A stand-in for a QEMU, and another descriptor of its end of the socket.
fn stand_in(stream: UnixStream) -> (UnixStream, JoinHandle<()>) {
    let same = stream.try_clone().unwrap();
    stream.set_nonblocking(true).unwrap();
    let stream = tokio::net::UnixStream::from_std(stream).unwrap();
    (same, tokio::spawn(Peer::new(stream).play_qemu()))
}

/// A socket whose last close waits for [`LINGER`], and its peer, which reads nothing.
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

/// Says something with an open file beside it.
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

/// A system with a domain `theirs` that is registered by its socket, whose other ends are returned.
async fn registered() -> (System, Caller, OwnedFd, UnixStream) {
    let system = System::start();
    let caller = Caller::new(&system).await;
    let (ours, theirs) = UnixStream::pair().unwrap();
    let shared = OwnedFd::from(ours.try_clone().unwrap());
    let (theirs, _) = stand_in(theirs);
    caller.register("theirs", ours.into()).await.unwrap();
    (system, caller, shared, theirs)
}

/// Others are served while the peer waits, and the service ends when it is asked to.
async fn assert_served(mut system: System, caller: &Caller) {
    for _ in 0..10 {
        within("an answer", caller.manager.list_domains()).await.unwrap();
    }
    assert_eq!(system.stop_daemon(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_is_made_blocking_keeps_nobody_waiting() {
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
async fn an_open_file_beside_a_line_ends_the_connection_and_keeps_nobody_waiting() {
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
async fn a_file_that_nobody_reads_before_the_connection_ends_keeps_nobody_waiting() {
    let mut system = System::start();
    let caller = Caller::new(&system).await;
    let path = system.dir().join("monitor");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    system.write_domain_file("theirs", &format!("monitor = \"{}\"\n", path.display()));
    let accepted = tokio::task::spawn_blocking(move || listener.accept().unwrap().0);
    let (theirs, _play) = stand_in(within("the service to connect", accepted).await.unwrap());
    system.wait_for_domain("theirs");
    let (socket, _peer) = lingering();
    // What comes after a line that ends the connection is not read. All of it is there before the service looks.
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
