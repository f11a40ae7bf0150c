//! The properties of a job, for display.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use zbus::{DeserializeDict, OwnedObjectPath, Type};

use crate::output::{Table, escape};
use crate::units;

/// The properties of a job, or the changed ones.
#[derive(Debug, Default, DeserializeDict, Type)]
#[zbus(signature = "dict", rename_all = "PascalCase")]
pub struct Properties {
    id: Option<u32>,
    domain: Option<OwnedObjectPath>,
    mode: Option<String>,
    backup: Option<String>,
    #[zbus(rename = "StartedByUID")]
    started_by_uid: Option<u32>,
    start_time: Option<u64>,
    state: Option<String>,
    queue_position: Option<u32>,
    progress: Option<f64>,
    bytes: Option<u64>,
    bytes_done: Option<u64>,
    rate: Option<u64>,
    expected_end_time: Option<u64>,
    frozen_time: Option<u64>,
    quiesce_problem: Option<String>,
    disks: Option<Vec<DiskTuple>>,
    increments: Option<Vec<IncrementTuple>>,
    not_in_backup: Option<Vec<(String, String)>>,
    encrypted: Option<Vec<String>>,
    error_name: Option<String>,
    error_message: Option<String>,
}

/// The note on a disk that QEMU decrypts.
pub const PLAIN_TEXT: &str = "its image is encrypted (LUKS), but this backup is not";

/// An entry of `Disks`: name, state, bytes, bytes done, target, error.
type DiskTuple = (String, String, u64, u64, String, String);

/// An entry of `Increments`: disk, mode, base backup, reason for a full copy.
type IncrementTuple = (String, String, String, String);

/// The extent of a disk's copy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Increment {
    pub disk: String,
    /// `full`, `incremental` or `differential`.
    pub mode: String,
    /// The id of the base, or empty.
    pub since: String,
    /// The reason for a full copy, or empty.
    pub why: String,
}

impl Increment {
    /// A note for the user; `None` if the disk is full because the user asked for that or no base can exist.
    pub fn text(&self) -> Option<String> {
        match (self.mode.as_str(), self.why.as_str()) {
            ("full", "" | "requested" | "outside" | "raw" | "first") => None,
            ("full", why) => Some(format!("full: {why}")),
            (mode, _) => Some(format!("{mode} since {}", self.since)),
        }
    }
}

/// One disk of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disk {
    pub name: String,
    /// `queued`, `preparing`, `running`, `waiting`, `finishing`, `completed`, `failed` or `cancelled`.
    pub state: String,
    /// Bytes to copy.
    pub bytes: u64,
    /// Bytes copied.
    pub done: u64,
    pub target: String,
    /// The error, or empty.
    pub error: String,
}

/// The known state of a job.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    pub id: u32,
    pub path: String,
    /// The object path of its domain.
    pub domain_path: String,
    /// The name of its domain, if the caller may read it.
    pub domain: Option<String>,
    /// `push`, `restore`, `verify` or `export`.
    pub mode: String,
    /// The id of the backup in a store that it writes or reads.
    pub backup: String,
    /// The uid of its starter.
    pub started_by: u32,
    /// The start time, in µs since the epoch.
    pub start_time: u64,
    /// `queued`, `preparing`, `running`, `finishing`, `completed`, `failed` or `cancelled`.
    pub state: String,
    /// The position in the queue when it was read, from 1; 0 if not queued.
    pub position: u32,
    /// From 0 to 1.
    pub progress: f64,
    /// Bytes to copy.
    pub bytes: u64,
    /// Bytes copied.
    pub bytes_done: u64,
    /// Bytes per second.
    pub rate: u64,
    /// The expected end, in µs since the epoch; 0 if not known.
    pub expected_end: u64,
    /// The duration of the guest's file system freeze, in µs.
    pub frozen_time: u64,
    /// The reason why an attempted freeze failed, or empty.
    pub quiesce_problem: String,
    pub disks: Vec<Disk>,
    /// The extent of each disk's copy.
    pub increments: Vec<Increment>,
    /// Devices of the VM that are not in the backup: names and types.
    pub not_in_backup: Vec<(String, String)>,
    /// The disks that QEMU decrypts. The backup contains their plain text.
    pub encrypted: Vec<String>,
    pub error_name: String,
    pub error_message: String,
}

/// The end of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// `completed`, `failed` or `cancelled`.
    pub result: String,
    /// The D-Bus name of the error, or empty.
    pub error_name: String,
    /// The error message, or empty.
    pub message: String,
}

/// The state of a job that waits in the queue.
pub const QUEUED: &str = "queued";

/// The state of a job, with its position in the queue: `queued (3)`.
pub fn state_text(state: &str, position: u32) -> String {
    match position {
        0 => state.to_owned(),
        position => format!("{state} ({position})"),
    }
}

/// The position in the queue; `null` if not queued.
pub fn position_json(position: u32) -> Option<u32> {
    (position > 0).then_some(position)
}

/// Whether a job in this state has ended.
pub fn has_ended(state: &str) -> bool {
    matches!(state, "completed" | "failed" | "cancelled")
}

fn set<T>(to: &mut T, from: Option<T>) {
    if let Some(value) = from {
        *to = value;
    }
}

impl Snapshot {
    /// Applies changed properties.
    pub fn apply(&mut self, changed: Properties) {
        set(&mut self.id, changed.id);
        set(&mut self.domain_path, changed.domain.map(|path| path.to_string()));
        set(&mut self.mode, changed.mode);
        set(&mut self.backup, changed.backup);
        set(&mut self.started_by, changed.started_by_uid);
        set(&mut self.start_time, changed.start_time);
        set(&mut self.state, changed.state);
        set(&mut self.position, changed.queue_position);
        if self.state != QUEUED {
            self.position = 0;
        }
        set(&mut self.bytes, changed.bytes);
        set(&mut self.bytes_done, changed.bytes_done);
        // Derived from the other two, because a signal may omit it.
        if self.bytes > 0 {
            self.progress = self.bytes_done as f64 / self.bytes as f64;
        }
        set(&mut self.progress, changed.progress);
        set(&mut self.rate, changed.rate);
        set(&mut self.expected_end, changed.expected_end_time);
        set(&mut self.frozen_time, changed.frozen_time);
        set(&mut self.quiesce_problem, changed.quiesce_problem);
        set(&mut self.error_name, changed.error_name);
        set(&mut self.error_message, changed.error_message);
        set(&mut self.not_in_backup, changed.not_in_backup);
        set(&mut self.encrypted, changed.encrypted);
        if let Some(increments) = changed.increments {
            self.increments = increments
                .into_iter()
                .map(|(disk, mode, since, why)| Increment {
                    disk,
                    mode,
                    since,
                    why,
                })
                .collect();
        }
        if let Some(disks) = changed.disks {
            self.disks = disks
                .into_iter()
                .map(|(name, state, bytes, done, target, error)| Disk {
                    name,
                    state,
                    bytes,
                    done,
                    target,
                    error,
                })
                .collect();
        }
    }

    /// The extent of a disk's copy, if known.
    pub fn increment(&self, disk: &str) -> Option<&Increment> {
        self.increments.iter().find(|increment| increment.disk == disk)
    }

    /// The name of the domain, or its object path. Not escaped.
    pub fn domain_label(&self) -> &str {
        self.domain.as_deref().unwrap_or(&self.domain_path)
    }

    /// The outcome of the job, if its properties contain it.
    pub fn outcome(&self) -> Option<Outcome> {
        has_ended(&self.state).then(|| Outcome {
            result: self.state.clone(),
            error_name: self.error_name.clone(),
            message: self.error_message.clone(),
        })
    }

    /// The time since the start of the job, by this host's clock.
    pub fn age(&self) -> Option<Duration> {
        let started = UNIX_EPOCH.checked_add(Duration::from_micros(self.start_time))?;
        SystemTime::now()
            .duration_since(started)
            .ok()
            .filter(|_| self.start_time > 0)
    }

    /// The remaining time, if the service knows it.
    pub fn remaining(&self) -> Option<Duration> {
        let end = UNIX_EPOCH.checked_add(Duration::from_micros(self.expected_end))?;
        end.duration_since(SystemTime::now()).ok()
    }

    /// `34 % (1.3 GiB of 4.0 GiB), 512 MiB/s, 8 s left`.
    pub fn progress_text(&self) -> String {
        let mut text = format!(
            "{} % ({} of {}), {}",
            units::percent(self.bytes_done, self.bytes),
            units::size(self.bytes_done),
            units::size(self.bytes),
            units::rate(self.rate)
        );
        if let Some(left) = self.remaining() {
            text.push_str(&format!(", {} left", units::remaining(left)));
        }
        text
    }

    /// The stable keys of `--json`.
    pub fn json(&self) -> Value {
        let disks: Vec<Value> = self
            .disks
            .iter()
            .map(|disk| {
                let increment = self.increment(&disk.name).cloned().unwrap_or_default();
                json!({
                    "disk": disk.name, "state": disk.state, "bytes": disk.bytes, "bytes_done": disk.done,
                    "target": disk.target, "error": nothing_if_empty(&disk.error),
                    "mode": nothing_if_empty(&increment.mode), "since": nothing_if_empty(&increment.since),
                    "why": nothing_if_empty(&increment.why),
                })
            })
            .collect();
        json!({
            "id": self.id,
            "path": self.path,
            "domain": self.domain,
            "domain_path": self.domain_path,
            "mode": self.mode,
            "backup": nothing_if_empty(&self.backup),
            "started_by_uid": self.started_by,
            "start_time": self.start_time,
            "state": self.state,
            "queue_position": position_json(self.position),
            "progress": self.progress,
            "bytes": self.bytes,
            "bytes_done": self.bytes_done,
            "rate": self.rate,
            "expected_end_time": self.expected_end,
            "frozen_time": self.frozen_time,
            "quiesce_problem": nothing_if_empty(&self.quiesce_problem),
            "disks": disks,
            "not_in_backup": self.not_in_backup.iter().map(|(name, kind)| json!({ "name": name, "type": kind })).collect::<Value>(),
            "encrypted": self.encrypted,
            "error": nothing_if_empty(&self.error_name),
            "message": nothing_if_empty(&self.error_message),
        })
    }

    /// All properties as text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut field = |name: &str, value: String| {
            text.push_str(&format!("{name:<11}{}\n", escape(&value)));
        };
        field("Job", self.id.to_string());
        field("Domain", self.domain_label().to_owned());
        field("State", state_text(&self.state, self.position));
        field("Mode", self.mode.clone());
        if !self.backup.is_empty() {
            field("Backup", self.backup.clone());
        }
        field(
            "Started",
            format!("{} by uid {}", units::timestamp(self.start_time), self.started_by),
        );
        if has_ended(&self.state) {
            field(
                "Data",
                format!("{} of {}", units::size(self.bytes_done), units::size(self.bytes)),
            );
        } else if self.state != QUEUED {
            field("Progress", self.progress_text());
        }
        if self.frozen_time > 0 {
            let frozen = Duration::from_micros(self.frozen_time);
            field("Frozen", units::brief(frozen));
        }
        if !self.quiesce_problem.is_empty() {
            field("Quiesced", format!("no: {}", self.quiesce_problem));
        }
        if !self.error_name.is_empty() || !self.error_message.is_empty() {
            field("Error", self.error_message.clone());
            field("Error name", self.error_name.clone());
        }
        let mut table = Table::new(&["DISK", "STATE", "DONE", "SIZE", "TARGET"]).right(&[2, 3]);
        for disk in &self.disks {
            let (done, size) = (units::size(disk.done), units::size(disk.bytes));
            table.row([&disk.name, &disk.state, &done, &size, &disk.target]);
        }
        text.push_str(&format!("\n{table}"));
        for increment in &self.increments {
            if let Some(what) = increment.text() {
                text.push_str(&format!("{}: {}\n", escape(&increment.disk), escape(&what)));
            }
        }
        for (name, kind) in &self.not_in_backup {
            text.push_str(&format!(
                "{}: not in the backup ({})\n",
                escape(name),
                escape(kind)
            ));
        }
        for disk in &self.encrypted {
            text.push_str(&format!("{}: {PLAIN_TEXT}\n", escape(disk)));
        }
        for disk in self.disks.iter().filter(|disk| !disk.error.is_empty()) {
            text.push_str(&format!("{}: {}\n", escape(&disk.name), escape(&disk.error)));
        }
        text
    }
}

/// `null` in JSON for an empty text.
pub fn nothing_if_empty(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_keeps_the_other_properties() {
        let mut snapshot = Snapshot {
            id: 7,
            state: "running".into(),
            bytes: 100,
            ..Snapshot::default()
        };
        snapshot.apply(Properties {
            bytes_done: Some(50),
            disks: Some(vec![(
                "vda".into(),
                "running".into(),
                100,
                50,
                "/t".into(),
                "".into(),
            )]),
            ..Properties::default()
        });
        assert_eq!((snapshot.id, snapshot.bytes, snapshot.bytes_done), (7, 100, 50));
        assert_eq!(snapshot.progress, 0.5);
        assert_eq!(snapshot.disks[0].done, 50);
        assert_eq!(snapshot.outcome(), None);
        snapshot.apply(Properties {
            state: Some("cancelled".into()),
            ..Properties::default()
        });
        assert_eq!(snapshot.outcome().unwrap().result, "cancelled");
    }

    #[test]
    fn the_keys_of_json_are_stable() {
        let value = Snapshot::default().json();
        let mut keys: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(
            keys,
            [
                "backup",
                "bytes",
                "bytes_done",
                "disks",
                "domain",
                "domain_path",
                "encrypted",
                "error",
                "expected_end_time",
                "frozen_time",
                "id",
                "message",
                "mode",
                "not_in_backup",
                "path",
                "progress",
                "queue_position",
                "quiesce_problem",
                "rate",
                "start_time",
                "started_by_uid",
                "state",
            ]
        );
    }
}
