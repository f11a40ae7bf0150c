//! QEMU's events about jobs.

use serde::Deserialize;

use super::JobStatus;
use crate::qmp::Event;

/// An event about a job of any client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobEvent {
    StatusChange(JobStatusChange),
    Completed(BlockJobEnd),
    Cancelled(BlockJobEnd),
    /// A block job had an I/O error.
    Error(BlockJobError),
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct JobStatusChange {
    pub id: String,
    pub status: JobStatus,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct BlockJobEnd {
    /// The job's id.
    pub device: String,
    #[serde(rename = "type", default)]
    pub kind: Option<String>,
    /// The bytes to copy, and the bytes copied.
    #[serde(default)]
    pub len: Option<u64>,
    #[serde(default)]
    pub offset: Option<u64>,
    /// Why it failed.
    #[serde(default)]
    pub error: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockJobError {
    /// The job's id.
    pub device: String,
    #[serde(default)]
    pub operation: Option<String>,
}

impl JobEvent {
    /// Returns `None` for an event of another kind, or one that QEMU would not send.
    pub fn of(event: &Event) -> Option<Self> {
        Some(match event.name.as_str() {
            "JOB_STATUS_CHANGE" => Self::StatusChange(event.read()?),
            "BLOCK_JOB_COMPLETED" => Self::Completed(event.read()?),
            "BLOCK_JOB_CANCELLED" => Self::Cancelled(event.read()?),
            "BLOCK_JOB_ERROR" => Self::Error(event.read()?),
            _ => return None,
        })
    }

    /// The job's id.
    pub fn job(&self) -> &str {
        match self {
            Self::StatusChange(change) => &change.id,
            Self::Completed(end) | Self::Cancelled(end) => &end.device,
            Self::Error(error) => &error.device,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn of(name: &str, data: &Value) -> Option<JobEvent> {
        JobEvent::of(&Event::for_test(name, data))
    }

    #[test]
    fn an_event_about_a_job_is_read_whatever_else_is_in_it() {
        let data = json!({ "device": "a", "type": "backup", "len": 10, "offset": 5, "speed": 0, "error": "No space" });
        let end = BlockJobEnd {
            device: "a".into(),
            kind: Some("backup".into()),
            len: Some(10),
            offset: Some(5),
            error: Some("No space".into()),
        };
        assert_eq!(
            of("BLOCK_JOB_COMPLETED", &data),
            Some(JobEvent::Completed(end.clone()))
        );
        assert_eq!(of("BLOCK_JOB_CANCELLED", &data), Some(JobEvent::Cancelled(end)));
        let data = json!({ "device": "b", "operation": "write", "action": "report" });
        let Some(JobEvent::Error(error)) = of("BLOCK_JOB_ERROR", &data) else {
            panic!("it is an error");
        };
        assert_eq!((&*error.device, error.operation.as_deref()), ("b", Some("write")));
        let data = json!({ "id": "c", "status": "concluded" });
        let change = of("JOB_STATUS_CHANGE", &data).unwrap();
        assert_eq!(change.job(), "c");
        let data = json!({ "id": "c", "status": "new in some later version" });
        let change = JobStatusChange {
            id: "c".into(),
            status: JobStatus::Unknown,
        };
        assert_eq!(
            of("JOB_STATUS_CHANGE", &data),
            Some(JobEvent::StatusChange(change))
        );
    }

    #[test]
    fn other_events_and_invalid_events_are_none() {
        assert_eq!(of("BLOCK_JOB_READY", &json!({ "device": "a" })), None);
        assert_eq!(of("JOB_STATUS_CHANGE", &json!({ "id": "a" })), None);
        assert_eq!(of("BLOCK_JOB_COMPLETED", &json!({ "device": 7 })), None);
        assert_eq!(of("BLOCK_JOB_COMPLETED", &Value::Null), None);
    }
}
