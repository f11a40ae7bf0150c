//! A proxy between the service and the monitor of a real QEMU. It forwards everything unchanged, descriptors too, and
//! can hold one command until the test decides about it.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde_json::Value;

use super::wait;

/// The test's decision about a held command.
enum Fate {
    Pass,
    /// The command is dropped, and the connection continues.
    Lost,
    /// The command is dropped with its connection; the proxy serves the next connection.
    Cut,
    /// The command is dropped with its connection, and the proxy stops listening.
    Gone,
}

struct Point {
    name: String,
    fits: Box<dyn FnMut(&Value) -> bool + Send>,
    reached: Sender<()>,
    fate: Receiver<Fate>,
}

struct Shared {
    listener: UnixListener,
    points: Mutex<Vec<Point>>,
    /// The names of the commands that the proxy drops.
    lost: Mutex<Vec<&'static str>>,
    /// Texts that the proxy replaces in QEMU's output.
    translation: Mutex<Option<(&'static str, &'static str)>>,
    /// The names of all received commands.
    heard: Mutex<Vec<String>>,
    /// Both ends of the current connection.
    streams: Mutex<Vec<UnixStream>>,
    /// For the next connection: the bytes of QEMU's output to forward before both ends are closed.
    budget: Mutex<Option<usize>>,
    /// The bytes of QEMU's output that were forwarded over the last connection.
    passed: AtomicUsize,
}

/// The proxy. Dropping it closes both connections.
pub struct Proxy {
    path: PathBuf,
    shared: Arc<Shared>,
}

/// A command to be held. Dropping this forwards the command.
pub struct Hold {
    what: String,
    reached: Receiver<()>,
    fate: Sender<Fate>,
}

impl Proxy {
    /// Listens on `path`, and forwards one connection at a time to `monitor`.
    #[track_caller]
    pub fn start(path: &Path, monitor: &Path) -> Self {
        let listener = UnixListener::bind(path).expect("the proxy's socket is made");
        Self::on(listener, path, monitor)
    }

    /// As [`Proxy::start`], on a socket that listens on `path`.
    pub fn on(listener: UnixListener, path: &Path, monitor: &Path) -> Self {
        let shared = Arc::new(Shared {
            listener,
            points: Mutex::default(),
            lost: Mutex::default(),
            translation: Mutex::default(),
            heard: Mutex::default(),
            streams: Mutex::default(),
            budget: Mutex::default(),
            passed: AtomicUsize::default(),
        });
        let (serving, monitor) = (shared.clone(), monitor.to_owned());
        std::thread::spawn(move || serving.run(&monitor));
        Self {
            path: path.to_owned(),
            shared,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Closes the connection now, and the next one after so many bytes of QEMU's output.
    pub fn cut_after(&self, bytes: usize) {
        *lock(&self.shared.budget) = Some(bytes);
        self.shared.hang_up();
    }

    /// Returns the bytes of QEMU's output that were forwarded over the current or last connection.
    pub fn passed(&self) -> usize {
        self.shared.passed.load(Ordering::SeqCst)
    }

    /// Returns the names of the commands that the service has sent since the last call.
    pub fn take_heard(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.shared.heard))
    }

    /// From now on drops all commands of that name; they get no reply.
    pub fn lose(&self, name: &'static str) {
        lock(&self.shared.lost).push(name);
    }

    /// Replaces `from` with `to` in QEMU's output.
    pub fn translate(&self, from: &'static str, to: &'static str) {
        *lock(&self.shared.translation) = Some((from, to));
    }

    /// Holds the next command of that name with matching arguments.
    pub fn hold(&self, name: &str, fits: impl FnMut(&Value) -> bool + Send + 'static) -> Hold {
        let (reached, was_reached) = channel();
        let (decide, fate) = channel();
        lock(&self.shared.points).push(Point {
            name: name.to_owned(),
            fits: Box::new(fits),
            reached,
            fate,
        });
        Hold {
            what: format!("the service to say {name}"),
            reached: was_reached,
            fate: decide,
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.close();
        self.shared.hang_up();
    }
}

impl Hold {
    /// Waits until the command has come. QEMU has not seen it.
    #[track_caller]
    pub fn reached(&self) {
        wait::until(&self.what, || self.reached.try_recv().ok());
    }

    pub fn pass(self) {
        self.decide(Fate::Pass);
    }

    /// Closes both connections instead. The proxy serves the next connection.
    pub fn cut(self) {
        self.decide(Fate::Cut);
    }

    /// Closes both connections instead, and refuses new ones.
    pub fn cut_for_good(self) {
        self.decide(Fate::Gone);
    }

    fn decide(self, fate: Fate) {
        self.fate.send(fate).expect("the proxy waits for it");
    }
}

impl Shared {
    fn run(self: &Arc<Self>, monitor: &Path) {
        while let Ok((service, _)) = self.listener.accept() {
            // Without QEMU, the client's connection is closed.
            if let Ok(qemu) = UnixStream::connect(monitor) {
                // A connection that is lost on one side is closed on the other.
                let _ = self.serve(&service, &qemu);
                self.hang_up();
            }
        }
    }

    fn serve(self: &Arc<Self>, service: &UnixStream, qemu: &UnixStream) -> io::Result<()> {
        *lock(&self.streams) = vec![service.try_clone()?, qemu.try_clone()?];
        let (from, to) = (qemu.try_clone()?, service.try_clone()?);
        let budget = lock(&self.budget).take().unwrap_or(usize::MAX);
        self.passed.store(0, Ordering::SeqCst);
        let shared = self.clone();
        std::thread::spawn(move || {
            let _ = shared.pass_on(&from, &to, budget);
            let _ = to.shutdown(Shutdown::Both);
        });
        while let Some((line, descriptors)) = receive(service)? {
            match self.fate(&line) {
                Fate::Pass => send(qemu, &line, &descriptors)?,
                Fate::Lost => {}
                Fate::Cut => break,
                Fate::Gone => {
                    // Done first, so that no connection is accepted in between.
                    self.close();
                    break;
                }
            }
        }
        Ok(())
    }

    fn pass_on(&self, mut from: &UnixStream, mut to: &UnixStream, budget: usize) -> io::Result<()> {
        let mut chunk = [0; 4096];
        let mut said = Vec::new();
        let mut passed = 0;
        while passed < budget {
            let count = from.read(&mut chunk)?.min(budget - passed);
            if count == 0 {
                break;
            }
            passed += count;
            let translation = *lock(&self.translation);
            match translation {
                None => to.write_all(&chunk[..count])?,
                Some((words, others)) => {
                    // Whole lines, because a text can arrive in pieces.
                    said.extend_from_slice(&chunk[..count]);
                    let whole = said
                        .iter()
                        .rposition(|byte| *byte == b'\n')
                        .map_or(0, |last| last + 1);
                    let lines: Vec<u8> = said.drain(..whole).collect();
                    let lines = String::from_utf8(lines).expect("QEMU speaks UTF-8");
                    to.write_all(lines.replace(words, others).as_bytes())?;
                }
            }
            self.passed.store(passed, Ordering::SeqCst);
        }
        Ok(())
    }

    fn fate(&self, line: &[u8]) -> Fate {
        let command: Value = serde_json::from_slice(line).expect("the service sends JSON");
        let name = command["execute"].as_str().unwrap_or_default();
        lock(&self.heard).push(name.to_owned());
        if lock(&self.lost).contains(&name) {
            return Fate::Lost;
        }
        let mut points = lock(&self.points);
        let found = points
            .iter_mut()
            .position(|point| command["execute"] == *point.name && (point.fits)(&command["arguments"]));
        let point = found.map(|index| points.remove(index));
        drop(points);
        let Some(point) = point else {
            return Fate::Pass;
        };
        // The test may have ended.
        let _ = point.reached.send(());
        point.fate.recv().unwrap_or(Fate::Pass)
    }

    /// From now on connections are refused.
    fn close(&self) {
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }

    fn hang_up(&self) {
        for stream in lock(&self.streams).drain(..) {
            // The other end may have closed it before.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no test panics inside")
}

/// Returns the next line and its descriptors; `None` when the other end has closed. Reads byte by byte, because a
/// larger buffer would hide the position of the descriptors.
fn receive(stream: &UnixStream) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let (mut line, mut descriptors) = (Vec::new(), Vec::new());
    loop {
        let mut byte = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(&mut byte)];
        if recvmsg(stream, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes == 0 {
            return Ok(None);
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        line.push(byte[0]);
        if byte[0] == b'\n' {
            return Ok(Some((line, descriptors)));
        }
    }
}

/// Sends a line with the descriptors attached to its first byte.
fn send(mut stream: &UnixStream, line: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    }
    let sent = sendmsg(stream, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?;
    stream.write_all(&line[sent..])
}
