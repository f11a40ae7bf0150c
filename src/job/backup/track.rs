//! Tracks each disk's block job, using QEMU's events and, if some were missed, `query-jobs`.
//!
//! Pure. In a grouped transaction QEMU ends all jobs together:
//! - Success: each job has an event COMPLETED.
//! - One job fails: the others are CANCELLED first, then the failing one is COMPLETED with an error.
//! - One job is cancelled: all are CANCELLED.

use crate::qmp::block::{BlockJobEnd, JobEvent, JobInfo, JobStatus};

/// The maximum lengths of QEMU's error text and operation, in characters. They bound the record of a job with up to 256
/// disks. QEMU's own texts are short messages of the C library.
const MAX_MESSAGE: usize = 512;
const MAX_OPERATION: usize = 32;

/// The C library's text for ECANCELED. `query-jobs` reports a cancelled job only by this text.
const CANCELED: &str = "Operation canceled";

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Completed,
    Failed {
        operation: String,
        message: String,
    },
    Cancelled,
    /// QEMU never reported a result, because another client dismissed the job.
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

    /// The bytes done of all jobs. A malicious QEMU may report any numbers, so the sum saturates.
    pub fn done(&self) -> u64 {
        self.0.iter().fold(0, |sum, job| sum.saturating_add(job.done))
    }

    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, job| sum.saturating_add(job.total))
    }

    pub fn all_concluded(&self) -> bool {
        self.0.iter().all(|job| job.phase == Phase::Concluded)
    }

    /// Processes an event. Returns whether it changed anything.
    pub fn event(&mut self, event: &JobEvent) -> bool {
        let Some(job) = self.0.iter_mut().find(|job| job.job == event.job()) else {
            return false;
        };
        match event {
            JobEvent::Completed(end) => {
                job.progress(end);
                job.verdict = Some(match &end.error {
                    None => Verdict::Completed,
                    Some(message) => job.failed(message),
                });
            }
            JobEvent::Cancelled(end) => {
                job.progress(end);
                job.verdict = Some(Verdict::Cancelled);
            }
            JobEvent::Error(error) => {
                let operation = error.operation.as_ref();
                job.operation = operation.map(|text| text.chars().take(MAX_OPERATION).collect());
            }
            JobEvent::StatusChange(change) => match change.status {
                JobStatus::Waiting | JobStatus::Pending => {
                    job.phase = Phase::Waiting;
                    job.done = job.total;
                }
                JobStatus::Concluded => job.phase = Phase::Concluded,
                _ => return false,
            },
        }
        true
    }

    /// Processes the complete list of jobs.
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
            match info.status {
                JobStatus::Waiting | JobStatus::Pending => job.phase = Phase::Waiting,
                JobStatus::Concluded => {
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

    /// Returns the result of each job, in order.
    pub fn verdicts(&self) -> Vec<Verdict> {
        self.0
            .iter()
            .map(|job| job.verdict.clone().unwrap_or(Verdict::Unknown))
            .collect()
    }
}

impl Tracked {
    fn failed(&self, message: &str) -> Verdict {
        let message: String = message.chars().take(MAX_MESSAGE).collect();
        Verdict::Failed {
            operation: self.operation.clone().unwrap_or_else(|| "copy".into()),
            message: message.replace('\0', "\u{fffd}"),
        }
    }

    fn progress(&mut self, end: &BlockJobEnd) {
        if let (Some(total), Some(done)) = (end.len, end.offset) {
            self.total = total;
            self.done = done.min(total);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::block::{BlockJobError, JobStatusChange};

    fn tracker() -> Tracker {
        Tracker::new([("a".into(), 10), ("b".into(), 20)])
    }

    fn status(id: &str, status: JobStatus) -> JobEvent {
        JobEvent::StatusChange(JobStatusChange {
            id: id.into(),
            status,
        })
    }

    fn end(id: &str) -> BlockJobEnd {
        BlockJobEnd {
            device: id.into(),
            ..BlockJobEnd::default()
        }
    }

    fn info(id: &str, error: Option<&str>) -> JobInfo {
        JobInfo {
            id: id.into(),
            status: JobStatus::Concluded,
            current_progress: 5,
            total_progress: 10,
            error: error.map(str::to_owned),
        }
    }

    fn conclude(tracker: &mut Tracker) {
        for id in ["a", "b"] {
            tracker.event(&status(id, JobStatus::Concluded));
        }
        assert!(tracker.all_concluded());
    }

    #[test]
    fn a_disk_that_copied_all_is_cancelled_with_the_others() {
        let mut tracker = tracker();
        tracker.event(&status("a", JobStatus::Waiting));
        assert_eq!(
            (tracker.jobs()[0].phase, tracker.jobs()[0].done),
            (Phase::Waiting, 10)
        );
        for id in ["a", "b"] {
            tracker.event(&JobEvent::Cancelled(BlockJobEnd {
                len: Some(10),
                offset: Some(10),
                ..end(id)
            }));
        }
        conclude(&mut tracker);
        assert_eq!(tracker.verdicts(), [Verdict::Cancelled, Verdict::Cancelled]);
    }

    #[test]
    fn a_failure_has_its_operation_and_the_others_are_cancelled() {
        let mut tracker = tracker();
        tracker.event(&JobEvent::Error(BlockJobError {
            device: "b".into(),
            operation: Some("write".into()),
        }));
        tracker.event(&JobEvent::Cancelled(end("a")));
        tracker.event(&JobEvent::Completed(BlockJobEnd {
            error: Some("No space left on device".into()),
            ..end("b")
        }));
        conclude(&mut tracker);
        let failed = Verdict::Failed {
            operation: "write".into(),
            message: "No space left on device".into(),
        };
        assert_eq!(tracker.verdicts(), [Verdict::Cancelled, failed]);
    }

    #[test]
    fn a_query_makes_up_for_missed_events() {
        let mut tracker = tracker();
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
    fn absurd_numbers_and_texts_are_bounded() {
        let mut tracker = tracker();
        let infos = ["a", "b"].map(|id| JobInfo {
            current_progress: u64::MAX,
            total_progress: u64::MAX,
            ..info(id, Some(&"x".repeat(1 << 20)))
        });
        tracker.query(&infos);
        assert_eq!((tracker.done(), tracker.total()), (u64::MAX, u64::MAX));
        for verdict in tracker.verdicts() {
            assert!(matches!(verdict, Verdict::Failed { message, .. } if message.len() == MAX_MESSAGE));
        }
    }

    #[test]
    fn other_jobs_change_nothing() {
        let mut tracker = tracker();
        assert!(!tracker.event(&JobEvent::Cancelled(end("other"))));
        assert_eq!(tracker.verdicts(), [Verdict::Unknown, Verdict::Unknown]);
    }
}
