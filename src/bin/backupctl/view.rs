//! Shows the progress of a job: bars on a terminal, lines elsewhere, or JSON.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bars::{Bars, Row};
use crate::job::{Snapshot, state_text};
use crate::output::{self, escape};

/// The least time between two progress lines. Changes of state are shown at once.
pub const PROGRESS_LINES: Duration = Duration::from_secs(5);

/// Shows the progress of a followed job.
pub trait View {
    /// Shows a state that may have changed.
    fn update(&mut self, snapshot: &Snapshot);
    /// Shows a message to the user.
    fn note(&mut self, text: &str);
    /// Ends the output.
    fn finish(&mut self) {}
    /// Stops drawing on the terminal.
    fn pause(&mut self) {}
    /// Draws on the terminal again.
    fn resume(&mut self) {}
}

/// The view for this output.
pub fn choose(json: bool, terminal: bool) -> Box<dyn View> {
    match (json, terminal) {
        (true, _) => Box::new(Json::default()),
        (false, true) => Box::new(Terminal::default()),
        (false, false) => Box::new(Lines::default()),
    }
}

/// Detects changes of state since the last update.
#[derive(Default)]
struct States {
    job: String,
    disks: HashMap<String, String>,
}

impl States {
    /// The indexes of the disks with a changed state, and whether the job's state has changed.
    fn changed(&mut self, snapshot: &Snapshot) -> (Vec<usize>, bool) {
        let job = self.job != snapshot.state;
        self.job.clone_from(&snapshot.state);
        let changed = |(index, disk): (usize, &crate::job::Disk)| {
            let before = self.disks.insert(disk.name.clone(), disk.state.clone());
            (before.as_ref() != Some(&disk.state)).then_some(index)
        };
        (
            snapshot.disks.iter().enumerate().filter_map(changed).collect(),
            job,
        )
    }
}

/// A progress bar for each disk.
#[derive(Default)]
struct Terminal {
    bars: Bars,
}

impl View for Terminal {
    fn update(&mut self, snapshot: &Snapshot) {
        for disk in &snapshot.disks {
            self.bars.set(Row {
                label: disk.name.clone(),
                done: disk.done,
                total: disk.bytes,
                state: disk.state.clone(),
                rate: None,
            });
        }
    }

    fn note(&mut self, text: &str) {
        self.bars.println(text);
    }

    fn finish(&mut self) {
        self.bars.finish();
    }

    fn pause(&mut self) {
        self.bars.pause();
    }

    fn resume(&mut self) {
        self.bars.resume();
    }
}

/// A line for each change of state, and a periodic line for the progress.
#[derive(Default)]
struct Lines {
    states: States,
    progress: Option<Instant>,
    bytes_done: u64,
}

impl View for Lines {
    fn update(&mut self, snapshot: &Snapshot) {
        let (disks, job) = self.states.changed(snapshot);
        for disk in disks.into_iter().map(|index| &snapshot.disks[index]) {
            let error = match disk.error.as_str() {
                "" => String::new(),
                error => format!(": {}", escape(error)),
            };
            output::complain(&format!("{}: {}{error}", escape(&disk.name), escape(&disk.state)));
        }
        if job {
            output::complain(&format!(
                "job {}: {}",
                snapshot.id,
                escape(&state_text(&snapshot.state, snapshot.position))
            ));
        }
        let due = self.progress.is_none_or(|last| last.elapsed() >= PROGRESS_LINES);
        if due && snapshot.state == "running" && snapshot.bytes_done != self.bytes_done {
            self.progress = Some(Instant::now());
            self.bytes_done = snapshot.bytes_done;
            output::complain(&format!("job {}: {}", snapshot.id, snapshot.progress_text()));
        }
    }

    fn note(&mut self, text: &str) {
        output::complain(text);
    }
}

/// One JSON object per event and line, on standard output.
#[derive(Default)]
struct Json {
    states: States,
    last: Option<Value>,
}

impl View for Json {
    fn update(&mut self, snapshot: &Snapshot) {
        let (disks, job) = self.states.changed(snapshot);
        if job {
            event(json!({ "event": "state", "id": snapshot.id, "state": snapshot.state }));
        }
        let value = snapshot.json();
        for index in disks {
            let mut object = value["disks"][index].clone();
            object["event"] = "disk".into();
            object["id"] = snapshot.id.into();
            event(object);
        }
        if self.last.as_ref() != Some(&value) {
            event(progress(value.clone()));
            self.last = Some(value);
        }
    }

    fn note(&mut self, text: &str) {
        event(json!({ "event": "note", "message": text }));
    }
}

/// The event with all properties of a job.
pub fn progress(mut snapshot: Value) -> Value {
    snapshot["event"] = "progress".into();
    snapshot
}

/// Prints an event. A write error does not stop the client from following the job. The final result is printed in the
/// same way, and its error is reported.
pub fn event(value: Value) {
    let _ = output::print_json(&value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Disk;

    #[test]
    fn a_changed_state_is_reported_once() {
        let mut states = States::default();
        let mut snapshot = Snapshot {
            state: "running".into(),
            ..Snapshot::default()
        };
        for name in ["vda", "vdb"] {
            snapshot.disks.push(Disk {
                name: name.into(),
                state: "running".into(),
                ..Disk::default()
            });
        }
        assert_eq!(states.changed(&snapshot), (vec![0, 1], true));
        assert_eq!(states.changed(&snapshot), (vec![], false));
        snapshot.disks[1].state = "waiting".into();
        assert_eq!(states.changed(&snapshot), (vec![1], false));
    }
}
