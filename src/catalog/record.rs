//! The record of a job.

use jiff::Timestamp;
use uuid::Uuid;

/// The step of a job that has ended; those before it are the job's own words.
pub(super) const ENDED: &str = "ended";

/// The step of a job that nothing was done for.
pub const QUEUED: &str = "queued";

/// A domain, as it was when its backup began.
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
    /// Names the domain, whatever it is called: by its UUID, or by its name if it has none; among the configured ones or
    /// those of its owner, who is a number and a name. No domain has such a name.
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

/// The user who starts a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Starter {
    pub uid: u32,
    /// Its name, if no other user gets the number soon.
    pub name: Option<String>,
    /// The connection on the bus. Not on record: it does not outlast the service.
    pub connection: Option<String>,
}

impl Starter {
    /// Whether `user` has the rights of who started a job. A number that somebody else may have by now gives none but to the
    /// connection that used it, and only until the job `has_ended`.
    pub fn is_same(&self, user: &Self, has_ended: bool) -> bool {
        if self.uid != user.uid {
            return false;
        }
        match (&self.name, &user.name) {
            (Some(then), Some(now)) => then == now,
            _ if has_ended => false,
            // A former version did not record the name, and a service that was started again does not know the connection.
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
    /// JSON, in a form that only its writer knows.
    pub plan: String,
    pub speed: u64,
    pub state: JobState,
}

/// How far a job is. What it says is durable before the next thing is done.
#[derive(Debug, Clone)]
pub struct JobState {
    /// One word.
    pub step: &'static str,
    /// JSON; the job reads what it wrote.
    pub text: String,
}

/// An outcome, and what may be left.
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

/// All that is known of a job.
#[derive(Debug, Clone)]
pub struct JobRecord {
    pub id: u32,
    pub backup_id: String,
    pub domain: DomainRecord,
    pub started_by: Starter,
    pub start_time: Timestamp,
    pub plan: String,
    pub speed: u64,
    /// One word, see [`JobState`].
    pub step: String,
    /// JSON; the job reads what it wrote.
    pub state: String,
    pub cancel_requested: bool,
    pub end_time: Option<Timestamp>,
    pub result: Option<String>,
    pub error: Option<String>,
    pub disks: Option<String>,
    pub left_in_qemu: bool,
    pub left_on_disk: bool,
    /// It was found in a store: who started it is as the store says, and gives nobody a right.
    pub imported: bool,
}

/// What may be left of an ended job.
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
    fn a_job_belongs_to_a_name_and_a_number_and_to_a_bare_number_only_by_its_connection() {
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
        let of_before = starter(1000, "", "");
        assert!(of_before.is_same(&anna, false) && !of_before.is_same(&anna, true));
    }
}
