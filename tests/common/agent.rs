//! A guest agent that the test plays on a UNIX socket, as QEMU's character device offers it: one client at a time,
//! JSON lines, and the byte 0xFF that synchronises the two ends.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

/// The agent's reaction to one command.
pub enum Answer {
    /// The reply of a working agent.
    Proper,
    /// This refusal.
    Refusal(&'static str),
    /// These bytes.
    Raw(Vec<u8>),
    /// These bytes, then the reply of a working agent.
    After(Vec<u8>),
    /// No reply; the connection stays open.
    Silence,
    /// The agent closes the connection.
    HangUp,
}

/// The agent's side of the socket. Its threads end with their connections, and with the test process.
pub struct Agent {
    path: PathBuf,
    seen: Arc<Mutex<Vec<String>>>,
    /// Whether the guest's file systems are frozen.
    frozen: Arc<AtomicBool>,
}

impl Agent {
    /// Listens on `path`. `behave` gets the name of each command and returns the reaction to it.
    pub fn start(path: &Path, mut behave: impl FnMut(&str) -> Answer + Send + 'static) -> Self {
        let listener = UnixListener::bind(path).expect("the agent's socket is made");
        let seen = Arc::<Mutex<Vec<String>>>::default();
        let frozen = Arc::<AtomicBool>::default();
        let (record, state) = (seen.clone(), frozen.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.expect("a connection is accepted");
                // The client deals with a lost connection.
                let _ = serve(stream, &mut behave, &record, &state);
            }
        });
        Self {
            path: path.to_owned(),
            seen,
            frozen,
        }
    }

    /// An agent that executes every command.
    pub fn good(path: &Path) -> Self {
        Self::start(path, |_| Answer::Proper)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Freezes the guest as another tool.
    pub fn freeze(&self) {
        self.frozen.store(true, Ordering::SeqCst);
    }

    /// Thaws the guest as another tool.
    pub fn thaw(&self) {
        self.frozen.store(false, Ordering::SeqCst);
    }

    pub fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::SeqCst)
    }

    /// Returns the received commands in order, without those that only synchronise or query the state.
    pub fn seen(&self) -> Vec<String> {
        let seen = self.seen.lock().expect("no test panics inside");
        let harmless = ["guest-sync-delimited", "guest-fsfreeze-status"];
        let commands = seen.iter().filter(|name| !harmless.contains(&name.as_str()));
        commands.cloned().collect()
    }

    /// Returns all received commands.
    pub fn seen_all(&self) -> Vec<String> {
        self.seen.lock().expect("no test panics inside").clone()
    }
}

fn serve(
    stream: UnixStream,
    behave: &mut impl FnMut(&str) -> Answer,
    seen: &Mutex<Vec<String>>,
    frozen: &AtomicBool,
) -> std::io::Result<()> {
    let mut output = stream.try_clone()?;
    let mut input = BufReader::new(stream);
    let mut line = Vec::new();
    while input.read_until(b'\n', &mut line)? > 0 {
        // The byte makes the agent discard the input before it.
        let start = line.iter().rposition(|byte| *byte == 0xff);
        let command: Value = serde_json::from_slice(&line[start.map_or(0, |at| at + 1)..])?;
        let name = command["execute"].as_str().unwrap_or_default().to_owned();
        seen.lock().expect("no test panics inside").push(name.clone());
        let proper = || match name.as_str() {
            "guest-sync-delimited" if start.is_some() => {
                let mut bytes = vec![0xff];
                bytes.extend_from_slice(&text(json!({ "return": command["arguments"]["id"] })));
                bytes
            }
            "guest-fsfreeze-status" => {
                let state = if frozen.load(Ordering::SeqCst) {
                    "frozen"
                } else {
                    "thawed"
                };
                text(json!({ "return": state }))
            }
            "guest-fsfreeze-freeze" if frozen.swap(true, Ordering::SeqCst) => text(
                json!({ "error": { "class": "CommandNotFound", "desc": "it has been disabled: frozen" } }),
            ),
            "guest-fsfreeze-freeze" => text(json!({ "return": 2 })),
            "guest-fsfreeze-thaw" => {
                let thawed = if frozen.swap(false, Ordering::SeqCst) {
                    2
                } else {
                    0
                };
                text(json!({ "return": thawed }))
            }
            _ => text(refusal("the command has not been found")),
        };
        let bytes = match behave(&name) {
            Answer::Proper => proper(),
            Answer::Refusal(description) => text(refusal(description)),
            Answer::Raw(bytes) => bytes,
            Answer::After(mut bytes) => {
                bytes.extend(proper());
                bytes
            }
            Answer::Silence => Vec::new(),
            Answer::HangUp => return Ok(()),
        };
        output.write_all(&bytes)?;
        line.clear();
    }
    Ok(())
}

fn refusal(description: &str) -> Value {
    json!({ "error": { "class": "GenericError", "desc": description } })
}

fn text(value: Value) -> Vec<u8> {
    format!("{value}\n").into_bytes()
}
