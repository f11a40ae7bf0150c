//! The lines that `backupctl create` and `watch` print at the end of a job.

use std::time::Duration;

use serde_json::{Value, json};

use crate::error::{self, Result, Status};
use crate::job::{Outcome, PLAIN_TEXT, Snapshot, nothing_if_empty};
use crate::output::{self, escape};
use crate::units;

/// The outcome of a job, and its images.
pub struct Summary<'a> {
    /// The last known state of the job.
    pub snapshot: &'a Snapshot,
    pub outcome: &'a Outcome,
    /// The duration, if known.
    pub took: Option<Duration>,
    /// The paths of the files that the client opened itself, by disk.
    pub own_targets: &'a [(String, String)],
}

impl Summary<'_> {
    /// Prints the summary, and returns the exit status.
    pub fn print(&self, json: bool) -> Result<Status> {
        if json {
            output::print_json(&self.json())?;
        } else if self.outcome.result == "completed" {
            output::print(&self.text())?;
        } else {
            output::complain(self.text().trim_end());
        }
        Ok(Status::of_result(&self.outcome.result))
    }

    fn target<'b>(&'b self, disk: &'b crate::job::Disk) -> &'b str {
        let own = self.own_targets.iter().find(|(name, _)| *name == disk.name);
        own.map_or(&disk.target, |(_, path)| path)
    }

    fn rate(&self) -> Option<u64> {
        let seconds = self.took?.as_secs_f64();
        // A rate over less than 0.1 s is meaningless.
        (seconds >= 0.1).then(|| (self.snapshot.bytes_done as f64 / seconds) as u64)
    }

    fn json(&self) -> Value {
        let mut value = self.snapshot.json();
        value["event"] = "result".into();
        value["result"] = self.outcome.result.clone().into();
        value["error"] = json!(nothing_if_empty(&self.outcome.error_name));
        value["message"] = json!(nothing_if_empty(&self.outcome.message));
        value["seconds"] = json!(self.took.map(|took| took.as_secs_f64()));
        value["average_rate"] = json!(self.rate());
        for (index, disk) in self.snapshot.disks.iter().enumerate() {
            value["disks"][index]["target"] = self.target(disk).into();
        }
        value
    }

    fn text(&self) -> String {
        let (snapshot, outcome) = (self.snapshot, self.outcome);
        let domain = escape(snapshot.domain_label());
        let mut text = match outcome.result.as_str() {
            result @ ("completed" | "cancelled") => format!("Job {} of {domain} {result}", snapshot.id),
            _ => format!("backupctl: job {} of {domain} failed", snapshot.id),
        };
        if !outcome.message.is_empty() {
            text.push_str(&format!(": {}", escape(&outcome.message)));
        }
        text.push('\n');
        if let Some(hint) = error::hint_for(&outcome.error_name) {
            text.push_str(&format!("hint: {hint}\n"));
        }
        let mut data = units::size(snapshot.bytes_done);
        if let Some(took) = self.took {
            data.push_str(&format!(" in {}", units::duration(took)));
        }
        if let Some(rate) = self.rate().filter(|&rate| rate > 0) {
            data.push_str(&format!(" ({})", units::rate(rate)));
        }
        let mut lines = vec![("covered".to_owned(), data)];
        if snapshot.frozen_time > 0 {
            let frozen = Duration::from_micros(snapshot.frozen_time);
            lines.push(("frozen".to_owned(), units::brief(frozen)));
        }
        if !snapshot.quiesce_problem.is_empty() {
            let why = format!("no: {}", escape(&snapshot.quiesce_problem));
            lines.push(("quiesced".to_owned(), why));
        }
        if outcome.result == "completed" && !snapshot.backup.is_empty() {
            lines.push(("backup".to_owned(), escape(&snapshot.backup)));
        }
        for disk in &snapshot.disks {
            let what = match (outcome.result.as_str(), disk.error.as_str()) {
                ("completed", _) => {
                    let increment = snapshot
                        .increment(&disk.name)
                        .and_then(|increment| increment.text());
                    let increment = increment.map_or(String::new(), |text| format!(" ({})", escape(&text)));
                    escape(self.target(disk)) + &increment
                }
                (_, "") => escape(&disk.state),
                (_, error) => format!("{}: {}", escape(&disk.state), escape(error)),
            };
            lines.push((escape(&disk.name), what));
        }
        for (name, kind) in &snapshot.not_in_backup {
            lines.push((escape(name), format!("not in the backup ({})", escape(kind))));
        }
        for disk in &snapshot.encrypted {
            lines.push((escape(disk), PLAIN_TEXT.to_owned()));
        }
        let width = lines.iter().map(|(name, _)| name.chars().count()).max();
        for (name, what) in &lines {
            text.push_str(&format!("  {name:<width$}  {what}\n", width = width.unwrap_or(0)));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Disk;

    fn snapshot() -> Snapshot {
        Snapshot {
            id: 7,
            domain: Some("web".into()),
            bytes_done: 2 << 30,
            disks: vec![Disk {
                name: "vda".into(),
                state: "completed".into(),
                target: "/store/vda.qcow2".into(),
                ..Disk::default()
            }],
            ..Snapshot::default()
        }
    }

    fn outcome(result: &str, error_name: &str, message: &str) -> Outcome {
        Outcome {
            result: result.into(),
            error_name: error_name.into(),
            message: message.into(),
        }
    }

    #[test]
    fn the_summary_of_a_completed_backup_names_its_images() {
        let summary = Summary {
            snapshot: &snapshot(),
            outcome: &outcome("completed", "", ""),
            took: Some(Duration::from_secs(16)),
            own_targets: &[],
        };
        assert_eq!(
            summary.text(),
            "Job 7 of web completed\n  covered  2.0 GiB in 16 s (128 MiB/s)\n  vda      /store/vda.qcow2\n"
        );
        assert_eq!(summary.json()["average_rate"], 128 << 20);
    }

    #[test]
    fn the_summary_names_the_base_of_an_incremental_backup() {
        let mut snapshot = snapshot();
        let increment = |mode: &str, since: &str, why: &str| crate::job::Increment {
            disk: "vda".into(),
            mode: mode.into(),
            since: since.into(),
            why: why.into(),
        };
        for (increment, told) in [
            (
                increment("incremental", "A", ""),
                "vda.qcow2 (incremental since A)\n",
            ),
            (increment("full", "", "resized"), "vda.qcow2 (full: resized)\n"),
            (increment("full", "", "first"), "vda.qcow2\n"),
        ] {
            snapshot.increments = vec![increment];
            let summary = Summary {
                snapshot: &snapshot,
                outcome: &outcome("completed", "", ""),
                took: None,
                own_targets: &[],
            };
            assert!(summary.text().ends_with(told), "{}", summary.text());
        }
    }

    #[test]
    fn the_summary_of_a_quiesced_backup_has_the_frozen_time() {
        let mut snapshot = snapshot();
        snapshot.frozen_time = 40_327;
        let summary = Summary {
            snapshot: &snapshot,
            outcome: &outcome("completed", "", ""),
            took: None,
            own_targets: &[],
        };
        assert_eq!(
            summary.text(),
            "Job 7 of web completed\n  covered  2.0 GiB\n  frozen   41 ms\n  vda      /store/vda.qcow2\n"
        );
        assert_eq!(summary.json()["frozen_time"], 40_327);
    }

    #[test]
    fn the_summary_of_an_unquiesced_backup_has_the_reason() {
        let mut snapshot = snapshot();
        snapshot.quiesce_problem = "the agent\nfroze none".into();
        let summary = Summary {
            snapshot: &snapshot,
            outcome: &outcome("completed", "", ""),
            took: None,
            own_targets: &[],
        };
        let text = summary.text();
        assert!(
            text.contains("\n  quiesced  no: the agent\\nfroze none\n"),
            "{text}"
        );
        assert_eq!(summary.json()["quiesce_problem"], "the agent\nfroze none");
    }

    #[test]
    fn the_summary_of_a_failed_backup_has_the_reason_and_no_image() {
        let mut snapshot = snapshot();
        snapshot.disks[0].state = "failed".into();
        snapshot.disks[0].error = "No space\nleft".into();
        let summary = Summary {
            snapshot: &snapshot,
            outcome: &outcome("failed", "org.example.Backup1.Error.NoSpace", "disk vda: full"),
            took: None,
            own_targets: &[],
        };
        assert_eq!(
            summary.text(),
            "backupctl: job 7 of web failed: disk vda: full\n  covered  2.0 GiB\n  vda      failed: No space\\nleft\n"
        );
        assert_eq!(summary.json()["error"], "org.example.Backup1.Error.NoSpace");
    }

    #[test]
    fn own_files_are_named_by_their_paths() {
        let own = [("vda".to_owned(), "/home/me/vda.qcow2".to_owned())];
        let summary = Summary {
            snapshot: &snapshot(),
            outcome: &outcome("completed", "", ""),
            took: None,
            own_targets: &own,
        };
        assert!(summary.text().contains("/home/me/vda.qcow2"));
        assert_eq!(summary.json()["disks"][0]["target"], "/home/me/vda.qcow2");
    }
}
