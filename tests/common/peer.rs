//! The other end of a monitor's connection, played by the test: what a real QEMU would not do, or not when the test
//! wants it.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recv, recvmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};

use super::wait;

pub const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#;

/// What a QEMU says of itself that is not too old.
pub fn schema() -> Value {
    json!([
        { "name": "query-named-block-nodes", "meta-type": "command", "arg-type": "nodes" },
        { "name": "nodes", "meta-type": "object", "members": [{ "name": "flat" }] },
    ])
}

/// The same with further entities.
pub fn schema_with(entities: Value) -> Value {
    let mut all = [schema(), entities];
    Value::Array(
        all.iter_mut()
            .filter_map(Value::as_array_mut)
            .flat_map(std::mem::take)
            .collect(),
    )
}

/// A line that came, and the descriptors that came with its first byte and with any other byte of it.
pub struct Received {
    pub command: Value,
    pub descriptors: Vec<OwnedFd>,
    pub late_descriptors: Vec<OwnedFd>,
}

impl Received {
    pub fn name(&self) -> &str {
        self.command["execute"].as_str().unwrap_or_default()
    }
}

/// A monitor's socket with the test behind it, for a domain that a file configures; gone when this is dropped.
pub struct Imposter(tokio::task::JoinHandle<()>);

impl Imposter {
    /// Plays each connection, one after another as QEMU would.
    #[track_caller]
    pub fn listen<P: Future<Output = ()> + Send>(
        path: &Path,
        play: impl Fn(Peer) -> P + Send + 'static,
    ) -> Self {
        Self::on(
            std::os::unix::net::UnixListener::bind(path).expect("a socket is made"),
            play,
        )
    }

    /// The same on a socket that was made by somebody else.
    #[track_caller]
    pub fn on<P: Future<Output = ()> + Send>(
        listener: std::os::unix::net::UnixListener,
        play: impl Fn(Peer) -> P + Send + 'static,
    ) -> Self {
        listener.set_nonblocking(true).expect("a socket can be asked");
        let listener = UnixListener::from_std(listener).expect("a socket can be waited for");
        Self(tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                play(Peer::new(stream)).await;
            }
        }))
    }
}

impl Drop for Imposter {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What the test plays in place of a QEMU that a caller registers; gone when this is dropped.
pub struct StandIn {
    task: tokio::task::JoinHandle<()>,
    commands: Arc<AtomicUsize>,
}

impl StandIn {
    /// Returns the end for `RegisterDomain` too.
    pub fn start() -> (OwnedFd, Self) {
        Self::claiming(&[])
    }

    /// One that says that it has these files open.
    pub fn claiming(files: &[&str]) -> (OwnedFd, Self) {
        let (ours, theirs) = Peer::pair();
        let ours = ours.into_std().expect("a socket can be handed over");
        let commands = Arc::new(AtomicUsize::new(0));
        let counting = commands.clone();
        let count = move || {
            counting.fetch_add(1, Ordering::SeqCst);
        };
        let node = |(number, file): (usize, &&str)| {
            json!({
                "node-name": format!("node{number}"), "drv": "file", "file": file,
                "image": { "virtual-size": 1 << 20 },
            })
        };
        let nodes = files.iter().enumerate().map(node).collect();
        let task = tokio::spawn(theirs.play_counted_qemu(count, nodes));
        (ours.into(), Self { task, commands })
    }

    /// How many commands have come, without that of the greeting.
    pub fn commands(&self) -> usize {
        self.commands.load(Ordering::SeqCst)
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub struct Peer {
    stream: UnixStream,
    /// Lines that were looked at and put back.
    kept: VecDeque<Received>,
}

impl Peer {
    /// Two connected ends: the one under test, and this one.
    pub fn pair() -> (UnixStream, Self) {
        let (ours, theirs) = UnixStream::pair().expect("sockets are made");
        (ours, Self::new(theirs))
    }

    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            kept: VecDeque::new(),
        }
    }

    /// The bare socket, for what is no dialogue.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Says bytes as they are.
    pub async fn say_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        wait::within("the other end to read", self.stream.write_all(bytes)).await
    }

    /// Says lines, each with the line end that QEMU uses.
    pub async fn say(&mut self, line: impl std::fmt::Display) {
        let line = format!("{line}\r\n");
        self.say_bytes(line.as_bytes())
            .await
            .expect("the other end reads");
    }

    /// Greets, and accepts whatever comes as `qmp_capabilities`.
    pub async fn greet(&mut self) {
        self.say(GREETING).await;
        let received = self.receive().await;
        assert_eq!(received.name(), "qmp_capabilities");
        self.answer(&received, json!({})).await;
    }

    pub async fn answer(&mut self, to: &Received, value: Value) {
        self.say(json!({ "return": value, "id": to.command["id"] })).await;
    }

    pub async fn refuse(&mut self, to: &Received, description: &str) {
        let error = json!({ "class": "GenericError", "desc": description });
        self.say(json!({ "error": error, "id": to.command["id"] })).await;
    }

    pub async fn event(&mut self, name: &str, data: Value) {
        let timestamp = json!({ "seconds": 1, "microseconds": 2 });
        self.say(json!({ "event": name, "data": data, "timestamp": timestamp }))
            .await;
    }

    /// Answers as a QEMU without disks does, until the other end closes.
    pub async fn play_qemu(self) {
        self.play_counted_qemu(|| (), Vec::new()).await;
    }

    async fn play_counted_qemu(mut self, count: impl Fn(), nodes: Vec<Value>) {
        self.greet().await;
        while let Some(command) = self.try_receive_at_any_time().await {
            count();
            let answer = match command.name() {
                "query-uuid" => json!({ "UUID": uuid::Uuid::new_v4() }),
                "query-status" => json!({ "status": "running", "running": true }),
                "query-qmp-schema" => schema(),
                "query-named-block-nodes" => json!(nodes),
                _ => json!([]),
            };
            self.answer(&command, answer).await;
        }
    }

    /// The next command; one must come.
    pub async fn receive(&mut self) -> Received {
        self.try_receive().await.expect("the other end stays")
    }

    /// The next command; nothing where the other end has closed. Half a line is a failure.
    pub async fn try_receive(&mut self) -> Option<Received> {
        if let Some(kept) = self.kept.pop_front() {
            return Some(kept);
        }
        let mut line = Vec::new();
        let mut received = Received {
            command: Value::Null,
            descriptors: Vec::new(),
            late_descriptors: Vec::new(),
        };
        loop {
            let Some((byte, descriptors)) = wait::within("the other end to speak", self.byte()).await else {
                assert!(line.is_empty(), "half a line: {}", String::from_utf8_lossy(&line));
                return None;
            };
            if line.is_empty() {
                received.descriptors.extend(descriptors);
            } else {
                received.late_descriptors.extend(descriptors);
            }
            if byte == b'\n' {
                break;
            }
            line.push(byte);
        }
        received.command = serde_json::from_slice(&line)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&line)));
        Some(received)
    }

    /// The same, however long the other end has nothing to say.
    pub async fn try_receive_at_any_time(&mut self) -> Option<Received> {
        let peek = || Ok(recv(&self.stream, &mut [0; 1], RecvFlags::PEEK)?);
        loop {
            self.stream.readable().await.expect("a socket can be waited for");
            // What is said of the socket may be old; that it is empty is certain.
            match self.stream.try_io(Interest::READABLE, peek) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                _ => return self.try_receive().await,
            }
        }
    }

    /// One byte, with the descriptors that lie exactly there; a larger buffer would not tell where.
    async fn byte(&mut self) -> Option<(u8, Vec<OwnedFd>)> {
        loop {
            self.stream.readable().await.expect("a socket can be waited for");
            let mut byte = [0];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let read = self.stream.try_io(Interest::READABLE, || {
                let mut buffers = [IoSliceMut::new(&mut byte)];
                Ok(recvmsg(&self.stream, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes)
            });
            match read {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                // It closed with bytes of ours unread.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("reading from the other end: {error}"),
            }
            let rights = control.drain().filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            });
            return Some((byte[0], rights.flatten().collect()));
        }
    }
}
