//! The record of a job.

use jiff::Timestamp;
use uuid::Uuid;

/// The step of a job that has ended. `job` defines the other steps.
pub(super) const ENDED: &str = "ended";

/// The step of a job that has not begun.
pub const QUEUED: &str = "queued";

/// A domain as it was when its backup began.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DomainRecord {
    pub name: String,
    /// `configured` or `registered`.
    pub source: String,
    pub owner: u32,
    pub owner_name: String,
    pub uuid: Option<Uuid>,
}

impl DomainRecord {
    /// Identifies the domain independently of renaming: by its UUID, or by its name if it has none. Registered domains
    /// are distinguished by the uid and the name of their owner. No domain can have such a name.
    pub fn key(&self) -> String {
        let owner = match self.source == "configured" {
            true => String::new(),
            // No user's name has a colon (passwd(5)).
            false => format!("{}:{}:", self.owner, self.owner_name),
        };
        match self.uuid {
            Some(uuid) => format!("{owner}:{uuid}"),
            None => format!("{owner}{}", self.name),
        }
    }
}

/// The user who started a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Starter {
    pub uid: u32,
    /// The user's name. `None` if the uid may soon belong to another user.
    pub name: Option<String>,
    /// The unique bus name. Not on record, because it does not outlive the service.
    pub connection: Option<String>,
}

impl Starter {
    /// Returns true if `user` has the rights of the user who started a job. A uid without a name grants them only to
    /// the same bus connection, and only until the job has ended.
    pub fn is_same(&self, user: &Self, has_ended: bool) -> bool {
        if self.uid != user.uid {
            return false;
        }
        match (&self.name, &user.name) {
            (Some(then), Some(now)) => then == now,
            _ if has_ended => false,
            // Earlier versions did not record the name, and a restarted service does not know the connection.
            (None, Some(_)) => self.connection.is_none() || self.connection == user.connection,
            (_, None) => self.connection.is_some() && self.connection == user.connection,
        }
    }
}

/// A job that is about to begin.
#[derive(Debug, Clone)]
pub struct NewJob {
    pub backup_id: String,
    pub domain: DomainRecord,
    pub started_by: Starter,
    pub start_time: Timestamp,
    /// JSON that only `job` interprets.
    pub plan: String,
    pub speed: u64,
    pub state: JobState,
}

/// The state of a job, which is durable before the next action.
#[derive(Debug, Clone)]
pub struct JobState {
    /// The step: one word.
    pub step: &'static str,
    /// JSON that only `job` interprets.
    pub text: String,
}

/// An outcome and the possible residue.
#[derive(Debug, Clone)]
pub struct Ended {
    pub time: Timestamp,
    /// `completed`, `failed` or `cancelled`.
    pub result: String,
    /// JSON.
    pub error: Option<String>,
    pub disks: String,
    /// JSON; see [`JobState::text`].
    pub state: String,
    pub left_in_qemu: bool,
    pub left_on_disk: bool,
}

/// The record of a job.
#[derive(Debug, Clone)]
pub struct JobRecord {
    pub id: u32,
    pub backup_id: String,
    pub domain: DomainRecord,
    pub started_by: Starter,
    pub start_time: Timestamp,
    pub plan: String,
    pub speed: u64,
    /// The step: one word, see [`JobState`].
    pub step: String,
    /// JSON that only `job` interprets.
    pub state: String,
    pub cancel_requested: bool,
    pub end_time: Option<Timestamp>,
    pub result: Option<String>,
    pub error: Option<String>,
    pub disks: Option<String>,
    pub left_in_qemu: bool,
    pub left_on_disk: bool,
    /// The job was imported from a store. Its starter is as the store records, and grants no rights.
    pub imported: bool,
}

/// The residue that an ended job may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leftover {
    InQemu,
    OnDisk,
}

impl JobRecord {
    pub fn has_ended(&self) -> bool {
        self.step == ENDED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn starter(uid: u32, name: &str, connection: &str) -> Starter {
        let known = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Starter {
            uid,
            name: known(name),
            connection: known(connection),
        }
    }

    #[test]
    fn a_job_belongs_to_a_uid_with_its_name_or_to_the_connection_of_a_bare_uid() {
        let anna = starter(1000, "anna", ":1.1");
        assert!(anna.is_same(&starter(1000, "anna", ":1.9"), true));
        for other in [
            starter(1000, "bob", ":1.9"),
            starter(1001, "anna", ":1.9"),
            starter(1000, "", ":1.9"),
        ] {
            assert!(
                !anna.is_same(&other, false) && !anna.is_same(&other, true),
                "{other:?}"
            );
        }
        let service = starter(61234, "", ":1.1");
        assert!(service.is_same(&service, false));
        assert!(!service.is_same(&service, true), "the job has ended");
        assert!(!service.is_same(&starter(61234, "", ":1.2"), false));
        let resumed = starter(61234, "", "");
        assert!(!resumed.is_same(&service, false));
        let recorded_without_name = starter(1000, "", "");
        assert!(recorded_without_name.is_same(&anna, false) && !recorded_without_name.is_same(&anna, true));
    }
}
