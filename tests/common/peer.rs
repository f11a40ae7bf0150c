//! The other end of a monitor's connection, played by the test, for behaviour that a real QEMU does not have, or not
//! on demand.

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

/// The schema of a supported QEMU.
pub fn schema() -> Value {
    json!([
        { "name": "query-named-block-nodes", "meta-type": "command", "arg-type": "nodes" },
        { "name": "nodes", "meta-type": "object", "members": [{ "name": "flat" }] },
    ])
}

/// Returns the schema with further entities.
pub fn schema_with(entities: Value) -> Value {
    let mut all = [schema(), entities];
    Value::Array(
        all.iter_mut()
            .filter_map(Value::as_array_mut)
            .flat_map(std::mem::take)
            .collect(),
    )
}

/// A received line, the descriptors that came with its first byte, and those that came with any other byte.
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

/// A monitor's socket that the test serves, for a configured domain. Dropping it removes the socket.
pub struct Imposter(tokio::task::JoinHandle<()>);

impl Imposter {
    /// Serves one connection after another, as QEMU does.
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

    /// Serves a socket that was created elsewhere.
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

/// A peer that the test plays as the QEMU of a registered domain. Dropping it closes the connection.
pub struct StandIn {
    task: tokio::task::JoinHandle<()>,
    commands: Arc<AtomicUsize>,
}

impl StandIn {
    /// Returns the descriptor for `RegisterDomain`, and the peer.
    pub fn start() -> (OwnedFd, Self) {
        Self::claiming(&[])
    }

    /// Returns a peer that claims to have these files open.
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

    /// Returns how many commands have come, without that of the greeting.
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
    /// Lines that were read and put back.
    kept: VecDeque<Received>,
}

impl Peer {
    /// Returns two connected ends: the one under test, and the peer.
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

    /// Returns the bare socket, for input that is not QMP.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Sends bytes unchanged.
    pub async fn say_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        wait::within("the other end to read", self.stream.write_all(bytes)).await
    }

    /// Sends a line with QEMU's line ending.
    pub async fn say(&mut self, line: impl std::fmt::Display) {
        let line = format!("{line}\r\n");
        self.say_bytes(line.as_bytes())
            .await
            .expect("the other end reads");
    }

    /// Sends the greeting, and accepts any command as `qmp_capabilities`.
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

    /// Replies like a QEMU without disks until the other end closes.
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

    /// Returns the next command; fails if none comes.
    pub async fn receive(&mut self) -> Received {
        self.try_receive().await.expect("the other end stays")
    }

    /// Returns the next command, or `None` if the other end has closed. An incomplete line is a failure.
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
            let Some((byte, descriptors)) = wait::within("the other end to send", self.byte()).await else {
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

    /// Like [`Peer::try_receive`], without a timeout.
    pub async fn try_receive_at_any_time(&mut self) -> Option<Received> {
        let peek = || Ok(recv(&self.stream, &mut [0; 1], RecvFlags::PEEK)?);
        loop {
            self.stream.readable().await.expect("a socket can be waited for");
            // The readiness of the socket may be stale, but an empty socket is certain.
            match self.stream.try_io(Interest::READABLE, peek) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                _ => return self.try_receive().await,
            }
        }
    }

    /// Reads one byte with the descriptors attached to it; a larger buffer would hide their position.
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
                // The other end has closed with unread bytes.
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
