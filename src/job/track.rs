//! The state of each disk's block job, from QEMU's events and, if some were missed, from `query-jobs`.
//!
//! Pure. In a grouped transaction QEMU ends all jobs together: success is a COMPLETED for each; when one fails, the
//! others are CANCELLED first and the failing one COMPLETED with an error last; when one is cancelled, all are.

use serde::Deserialize;
use serde_json::Value;

use crate::qmp::{self, Event};

/// An entry of `query-jobs`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    pub id: String,
    pub status: String,
    #[serde(default)]
    pub current_progress: u64,
    #[serde(default)]
    pub total_progress: u64,
    #[serde(default, deserialize_with = "qmp::words")]
    pub error: Option<String>,
}

/// Characters that are kept of why a disk's job failed, and of the word for what it did: a job can have 256 disks, and all of that
/// is on record. QEMU's own are the C library's few words for an error number.
const MOST_SAID: usize = 512;
const MOST_OF_OPERATION: usize = 32;

/// How the C library words ECANCELED: all that `query-jobs` says of a cancelled job.
const CANCELED: &str = "Operation canceled";

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Completed,
    Failed {
        operation: String,
        message: String,
    },
    Cancelled,
    /// QEMU never said: another client has dismissed the job.
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Running,
    Waiting,
    Concluded,
}

/// One disk's block job.
#[derive(Debug)]
pub struct Tracked {
    pub job: String,
    pub phase: Phase,
    pub done: u64,
    pub total: u64,
    operation: Option<String>,
    verdict: Option<Verdict>,
}

#[derive(Debug)]
pub struct Tracker(Vec<Tracked>);

impl Tracker {
    pub fn new(jobs: impl IntoIterator<Item = (String, u64)>) -> Self {
        let tracked = jobs.into_iter().map(|(job, total)| Tracked {
            job,
            phase: Phase::Running,
            done: 0,
            total,
            operation: None,
            verdict: None,
        });
        Self(tracked.collect())
    }

    pub fn jobs(&self) -> &[Tracked] {
        &self.0
    }

    /// Bytes of all jobs, done and in all. A peer may claim any.
    pub fn done(&self) -> u64 {
        self.0.iter().fold(0, |sum, job| sum.saturating_add(job.done))
    }

    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, job| sum.saturating_add(job.total))
    }

    pub fn all_concluded(&self) -> bool {
        self.0.iter().all(|job| job.phase == Phase::Concluded)
    }

    /// Takes an event in; true if it changed something.
    pub fn event(&mut self, event: &Event) -> bool {
        let data = event.data();
        let text = |key: &str| data.get(key).and_then(Value::as_str);
        let id = if event.name.starts_with("BLOCK_JOB_") {
            text("device")
        } else {
            text("id")
        };
        let Some(job) = id.and_then(|id| self.0.iter_mut().find(|job| job.job == id)) else {
            return false;
        };
        match event.name.as_str() {
            "BLOCK_JOB_COMPLETED" => {
                job.progress(&data);
                job.verdict = Some(match text("error") {
                    None => Verdict::Completed,
                    Some(message) => job.failed(message),
                });
            }
            "BLOCK_JOB_CANCELLED" => {
                job.progress(&data);
                job.verdict = Some(Verdict::Cancelled);
            }
            "BLOCK_JOB_ERROR" => {
                let operation = text("operation");
                job.operation = operation.map(|text| text.chars().take(MOST_OF_OPERATION).collect());
            }
            "JOB_STATUS_CHANGE" => match text("status") {
                Some("waiting" | "pending") => {
                    job.phase = Phase::Waiting;
                    job.done = job.total;
                }
                Some("concluded") => job.phase = Phase::Concluded,
                _ => return false,
            },
            _ => return false,
        }
        true
    }

    /// Takes the whole truth in.
    pub fn query(&mut self, infos: &[JobInfo]) {
        for job in &mut self.0 {
            let Some(info) = infos.iter().find(|info| info.id == job.job) else {
                job.phase = Phase::Concluded;
                continue;
            };
            if info.total_progress > 0 {
                job.done = info.current_progress.min(info.total_progress);
                job.total = info.total_progress;
            }
            match info.status.as_str() {
                "waiting" | "pending" => job.phase = Phase::Waiting,
                "concluded" => {
                    job.phase = Phase::Concluded;
                    if job.verdict.is_none() {
                        job.verdict = Some(match info.error.as_deref() {
                            None => Verdict::Completed,
                            Some(CANCELED) => Verdict::Cancelled,
                            Some(message) => job.failed(message),
                        });
                    }
                }
                _ => {}
            }
        }
    }

    /// What became of each, in order.
    pub fn verdicts(&self) -> Vec<Verdict> {
        self.0
            .iter()
            .map(|job| job.verdict.clone().unwrap_or(Verdict::Unknown))
            .collect()
    }
}

impl Tracked {
    fn failed(&self, message: &str) -> Verdict {
        let message: String = message.chars().take(MOST_SAID).collect();
        Verdict::Failed {
            operation: self.operation.clone().unwrap_or_else(|| "copy".into()),
            message: message.replace('\0', "\u{fffd}"),
        }
    }

    fn progress(&mut self, data: &Value) {
        let number = |key| data.get(key).and_then(Value::as_u64);
        if let (Some(total), Some(done)) = (number("len"), number("offset")) {
            self.total = total;
            self.done = done.min(total);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tracker() -> Tracker {
        Tracker::new([("a".into(), 10), ("b".into(), 20)])
    }

    fn event(name: &str, data: Value) -> Event {
        Event::for_test(name, &data)
    }

    fn conclude(tracker: &mut Tracker) {
        for id in ["a", "b"] {
            tracker.event(&event(
                "JOB_STATUS_CHANGE",
                json!({ "id": id, "status": "concluded" }),
            ));
        }
        assert!(tracker.all_concluded());
    }

    #[test]
    fn a_disk_that_copied_all_is_cancelled_with_the_others() {
        let mut tracker = tracker();
        tracker.event(&event(
            "JOB_STATUS_CHANGE",
            json!({ "id": "a", "status": "waiting" }),
        ));
        assert_eq!(
            (tracker.jobs()[0].phase, tracker.jobs()[0].done),
            (Phase::Waiting, 10)
        );
        for id in ["a", "b"] {
            tracker.event(&event(
                "BLOCK_JOB_CANCELLED",
                json!({ "device": id, "len": 10, "offset": 10 }),
            ));
        }
        conclude(&mut tracker);
        assert_eq!(tracker.verdicts(), [Verdict::Cancelled, Verdict::Cancelled]);
    }

    #[test]
    fn a_failure_has_its_operation_and_the_others_are_cancelled() {
        let mut tracker = tracker();
        tracker.event(&event(
            "BLOCK_JOB_ERROR",
            json!({ "device": "b", "operation": "write", "action": "report" }),
        ));
        tracker.event(&event("BLOCK_JOB_CANCELLED", json!({ "device": "a" })));
        tracker.event(&event(
            "BLOCK_JOB_COMPLETED",
            json!({ "device": "b", "error": "No space left on device" }),
        ));
        conclude(&mut tracker);
        let failed = Verdict::Failed {
            operation: "write".into(),
            message: "No space left on device".into(),
        };
        assert_eq!(tracker.verdicts(), [Verdict::Cancelled, failed]);
    }

    #[test]
    fn missed_events_are_made_up_for_by_asking() {
        let mut tracker = tracker();
        let info = |id: &str, error: Option<&str>| JobInfo {
            id: id.into(),
            status: "concluded".into(),
            current_progress: 5,
            total_progress: 10,
            error: error.map(str::to_owned),
        };
        tracker.query(&[
            info("a", Some(CANCELED)),
            info("b", Some("Input/output error")),
            info("other", None),
        ]);
        assert!(tracker.all_concluded());
        assert_eq!(tracker.verdicts()[0], Verdict::Cancelled);
        assert!(
            matches!(&tracker.verdicts()[1], Verdict::Failed { message, .. } if message == "Input/output error")
        );
    }

    #[test]
    fn numbers_and_words_that_no_qemu_says_are_bounded() {
        let mut tracker = tracker();
        let infos = ["a", "b"].map(|id| {
            let info = json!({
                "id": id, "status": "concluded", "error": "x".repeat(1 << 20),
                "current-progress": u64::MAX, "total-progress": u64::MAX,
            });
            serde_json::from_value(info).unwrap()
        });
        tracker.query(&infos);
        assert_eq!((tracker.done(), tracker.total()), (u64::MAX, u64::MAX));
        for verdict in tracker.verdicts() {
            assert!(matches!(verdict, Verdict::Failed { message, .. } if message.len() == MOST_SAID));
        }
    }

    #[test]
    fn jobs_of_others_and_unknown_events_change_nothing() {
        let mut tracker = tracker();
        assert!(!tracker.event(&event("BLOCK_JOB_CANCELLED", json!({ "device": "other" }))));
        assert!(!tracker.event(&event("BLOCK_JOB_READY", json!({ "device": "a" }))));
        assert!(!tracker.event(&event("SOMETHING_NEW", json!({ "id": "a" }))));
        assert_eq!(tracker.verdicts(), [Verdict::Unknown, Verdict::Unknown]);
    }
}
