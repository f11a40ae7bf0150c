//! A blocking QMP connection for the methods by hand. The connection of the tests polls, which would lose time.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

pub struct Monitor {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Monitor {
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("QEMU listens");
        let mut monitor = Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        };
        monitor.message();
        monitor.execute("qmp_capabilities", json!({}));
        monitor
    }

    /// Runs a command, which must succeed.
    pub fn execute(&mut self, command: &str, arguments: Value) {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .expect("QEMU reads");
        loop {
            let message = self.message();
            if message.get("event").is_some() {
                self.events.push(message);
            } else {
                assert!(message.get("return").is_some(), "{command}: {message}");
                return;
            }
        }
    }

    /// Returns the next matching event since [`Monitor::forget_events`].
    pub fn event(&mut self, name: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let fits = |event: &Value| event["event"] == name && fits(&event["data"]);
        if let Some(position) = self.events.iter().position(fits) {
            return self.events.remove(position);
        }
        loop {
            let message = self.message();
            if fits(&message) {
                return message;
            }
            self.events.push(message);
        }
    }

    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    fn message(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("QEMU writes");
        serde_json::from_str(&line).expect("QEMU speaks JSON")
    }
}

/// Returns the time of an event. QEMU's clock is that of this host.
pub fn time(event: &Value) -> SystemTime {
    let number = |key| event["timestamp"][key].as_u64().expect("an event has its time");
    UNIX_EPOCH + Duration::from_secs(number("seconds")) + Duration::from_micros(number("microseconds"))
}

/// Returns the seconds between two times; 0 if the clock was set back in between.
pub fn seconds_between(from: SystemTime, to: SystemTime) -> f64 {
    to.duration_since(from).unwrap_or_default().as_secs_f64()
}
