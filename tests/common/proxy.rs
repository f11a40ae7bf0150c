//! A go-between on the way from the service to a real QEMU's monitor: it passes everything on as it came, descriptors
//! too, but keeps the command that the test waits for until the test has said what becomes of it.

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

/// What becomes of a command that was kept.
enum Fate {
    Pass,
    /// It is lost, and the connection goes on.
    Lost,
    /// It is lost with its connection; the next connection is served.
    Cut,
    /// It is lost with its connection, and nobody listens any more.
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
    /// The names of the commands that are lost.
    lost: Mutex<Vec<&'static str>>,
    /// What QEMU says is passed on with these words in place of those.
    translation: Mutex<Option<(&'static str, &'static str)>>,
    /// The names of all commands that came.
    heard: Mutex<Vec<String>>,
    /// Both ends of the connection that is served.
    streams: Mutex<Vec<UnixStream>>,
    /// Of the next connection: how much of what QEMU says is passed on before both ends are hung up.
    budget: Mutex<Option<usize>>,
    /// How much of what QEMU said was passed on over the last connection.
    passed: AtomicUsize,
}

/// The go-between; it hangs up on both sides when it is dropped.
pub struct Proxy {
    path: PathBuf,
    shared: Arc<Shared>,
}

/// A command to come. Dropped, it is passed on.
pub struct Hold {
    what: String,
    reached: Receiver<()>,
    fate: Sender<Fate>,
}

impl Proxy {
    /// Listens on `path`, and goes between who connects there and `monitor`, one connection at a time.
    #[track_caller]
    pub fn start(path: &Path, monitor: &Path) -> Self {
        let shared = Arc::new(Shared {
            listener: UnixListener::bind(path).expect("the proxy's socket is made"),
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

    /// Hangs up now, and again when QEMU has said so many bytes over the next connection.
    pub fn cut_after(&self, bytes: usize) {
        *lock(&self.shared.budget) = Some(bytes);
        self.shared.hang_up();
    }

    /// How many bytes of QEMU's were passed on over the connection that is served, or was last.
    pub fn passed(&self) -> usize {
        self.shared.passed.load(Ordering::SeqCst)
    }

    /// The names of the commands that the service has sent since this was asked last.
    pub fn take_heard(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.shared.heard))
    }

    /// From now on no command of that name reaches QEMU, and none is answered.
    pub fn lose(&self, name: &'static str) {
        lock(&self.shared.lost).push(name);
    }

    /// Passes on what QEMU says with `to` in place of `from`.
    pub fn translate(&self, from: &'static str, to: &'static str) {
        *lock(&self.shared.translation) = Some((from, to));
    }

    /// Keeps the next command of that name whose arguments fit.
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

    /// Hangs up on both sides instead. Who connects again is served.
    pub fn cut(self) {
        self.decide(Fate::Cut);
    }

    /// Hangs up on both sides instead, and serves nobody any more.
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
            // Where QEMU is gone, who connected is let go.
            if let Ok(qemu) = UnixStream::connect(monitor) {
                // A connection that is lost on one side is lost on the other: that is all there is to do.
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
                    // First, so that nobody comes in between.
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
                    // Whole lines: one can come in pieces.
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
        let command: Value = serde_json::from_slice(line).expect("the service speaks JSON");
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
        // A test that has ended meanwhile wants nothing any more.
        let _ = point.reached.send(());
        point.fate.recv().unwrap_or(Fate::Pass)
    }

    /// Who connects from now on is refused.
    fn close(&self) {
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }

    fn hang_up(&self) {
        for stream in lock(&self.streams).drain(..) {
            // The other end may have done it before.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no test panics inside")
}

/// The next line and the descriptors that came with it; nothing when the other end has closed. Byte by byte: a larger
/// buffer would not tell where the descriptors lie.
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

/// Sends a line with its descriptors beside its first byte.
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
