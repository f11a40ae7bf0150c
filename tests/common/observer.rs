//! The test's own QMP connection: a small blocking client that shares no code with the service's, so that it can check
//! the service's reports.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::wait::DEADLINE;

/// The timeout of one read, short so that several threads can share a connection behind a lock.
const LOOK: Duration = Duration::from_millis(20);

pub struct Observer {
    stream: UnixStream,
    input: Vec<u8>,
    events: Vec<Value>,
    next_id: u64,
}

impl Observer {
    /// Connects, reads the greeting and enters command mode; `None` if no process listens (yet).
    pub fn connect(socket: &Path) -> Option<Self> {
        let stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(LOOK)).expect("a timeout can be set");
        let mut observer = Self {
            stream,
            input: Vec::new(),
            events: Vec::new(),
            next_id: 0,
        };
        let greeting = observer.next_message();
        assert!(greeting.get("QMP").is_some(), "QEMU greets: {greeting}");
        observer
            .execute("qmp_capabilities", json!({}))
            .expect("QEMU enters command mode");
        Some(observer)
    }

    /// Runs a command; QEMU's refusal is the `Err`. Events that arrive before the reply are kept.
    #[track_caller]
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        self.next_id += 1;
        let id = self.next_id;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        // Sent in one write: QEMU executes a command when the object is complete, and after `quit` it reads no late
        // newline.
        self.stream
            .write_all(line.as_bytes())
            .unwrap_or_else(|e| panic!("{command} to QEMU: {e}"));
        loop {
            let mut message = self.next_message();
            if message.get("event").is_some() {
                self.events.push(message);
            } else if message["id"] == id {
                return match message.get_mut("error") {
                    Some(error) => Err(error.take()),
                    None => Ok(message["return"].take()),
                };
            }
        }
    }

    /// Removes and returns the first matching event, after one check for new input.
    pub fn take_event(&mut self, mut fits: impl FnMut(&Value) -> bool) -> Option<Value> {
        while let Some(message) = self.look() {
            self.events.push(message);
        }
        let position = self.events.iter().position(&mut fits)?;
        Some(self.events.remove(position))
    }

    #[track_caller]
    fn next_message(&mut self) -> Value {
        let began = Instant::now();
        loop {
            if let Some(message) = self.look() {
                return message;
            }
            assert!(
                began.elapsed() < DEADLINE,
                "waited for QEMU's answer, {} s",
                DEADLINE.as_secs()
            );
        }
    }

    /// Returns one message, if it is complete within the timeout.
    fn look(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).expect("QEMU speaks JSON"));
            }
            let mut buffer = [0; 65536];
            match self.stream.read(&mut buffer) {
                Ok(0) => panic!("QEMU closed the observer's connection"),
                Ok(count) => self.input.extend_from_slice(&buffer[..count]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return None,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => panic!("reading from QEMU: {e}"),
            }
        }
    }
}
