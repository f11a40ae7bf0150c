//! Writes one journal record for each decision on a call that changes something. Repeated decisions are counted
//! ([`super::repeats`]).
//!
//! Each fact is a journal field (`BACKUPD_ACTION=`, `BACKUPD_UID=`, …), so that an administrator can filter by it. All
//! text that a caller may have chosen is escaped, so that it cannot look like a record or a part of one.

use super::repeats::{Group, Key, Repeats};
use super::{Caller, Details, Permission};
use crate::text::{abridged, excerpt};

/// The `tracing` target of the records.
const TARGET: &str = "backupd::audit";
/// The longest detail of a record, in bytes.
const MOST_BYTES: usize = 256;
/// The kernel limits the name of a process to 15 bytes (proc_pid_comm(5)).
const MOST_OF_NAME: usize = 64;
const GRANTED: &str = "granted";
/// Keeps these records even if the log filter would drop them.
pub const DIRECTIVE: &str = "backupd::audit=info";

/// The grounds of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Basis {
    /// The authority decided.
    Polkit,
    /// The caller started the job.
    Starter,
    /// The domain is the caller's own, and so is the target.
    Owner,
}

impl Basis {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Polkit => "polkit",
            Self::Starter => "starter",
            Self::Owner => "owner",
        }
    }
}

/// A decision to record.
#[derive(Debug)]
struct Record {
    caller: Caller,
    permission: Permission,
    details: Details,
    basis: Basis,
}

impl Record {
    /// The key of a refusal. It holds no process, because a user could fill the table with processes of its own.
    fn key(&self, outcome: &'static str) -> Key {
        Key {
            uid: self.caller.uid,
            action: self.permission.action(),
            outcome,
            basis: self.basis.as_str(),
            process: None,
            job: None,
        }
    }

    fn write(&self, outcome: &'static str, job: Option<u32>) {
        let action = self.permission.action();
        let (uid, sender) = (self.caller.uid, escaped(&self.caller.name));
        let basis = self.basis.as_str();
        let process = self.caller.process.as_ref();
        let detail = |key| self.details.get(key).map(escaped);
        let name = detail("domain_name");
        // Some permissions do not concern a domain.
        let about = name
            .as_ref()
            .map(|name| format!(", domain '{name}'"))
            .unwrap_or_default();
        tracing::info!(
            target: TARGET,
            action,
            outcome,
            basis,
            uid,
            sender,
            pid = process.map(|process| process.id),
            comm = process.map(|process| excerpt(&process.name, MOST_OF_NAME)),
            job,
            driver = detail("driver"),
            domain_name = name,
            domain_uuid = detail("domain_uuid"),
            domain_owner = detail("domain_owner"),
            mode = detail("mode"),
            target_kind = detail("target_kind"),
            target_name = detail("target"),
            disks = detail("disks"),
            backup_id = detail("backup_id"),
            store = detail("store"),
            "{outcome}: user {uid} ({sender}), {action}{about}",
        );
    }
}

/// A granted permission. It is recorded with the job that it started, or without one when it is dropped.
#[derive(Debug)]
#[must_use = "a grant is recorded when it is dropped"]
pub struct Grant(Option<Record>);

impl Grant {
    pub(super) fn new(caller: &Caller, permission: Permission, details: &Details, basis: Basis) -> Self {
        Self(Some(Record {
            caller: caller.clone(),
            permission,
            details: details.clone(),
            basis,
        }))
    }

    /// Records that the grant started or concerns `job`.
    pub fn record(mut self, job: u32) {
        if let Some(record) = self.0.take() {
            record.write(GRANTED, Some(job));
        }
    }

    /// Whether this is the first grant of its kind for `job`. Later ones are counted.
    pub(super) fn is_first(&self, repeats: &Repeats, job: u32) -> bool {
        let Some(record) = &self.0 else { return false };
        let key = Key {
            process: record.caller.process.as_ref().map(|process| process.id),
            job: Some(job),
            ..record.key(GRANTED)
        };
        repeats.is_first(Group::Grants, key)
    }

    /// Drops the grant without a record, because [`Grant::is_first`] counted it.
    pub fn leave_to_count(mut self) {
        self.0 = None;
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        if let Some(record) = self.0.take() {
            record.write(GRANTED, None);
        }
    }
}

/// Records a refusal: `denied`, `challenge` (a password would help) or `failed` (the authority could not decide).
pub(super) fn refused(
    repeats: &Repeats,
    caller: &Caller,
    permission: Permission,
    details: &Details,
    outcome: &'static str,
    job: Option<u32>,
) {
    let record = Record {
        caller: caller.clone(),
        permission,
        details: details.clone(),
        basis: Basis::Polkit,
    };
    let group = match caller.user {
        Some(_) => Group::Accounts,
        None => Group::Nameless,
    };
    if repeats.is_first(group, record.key(outcome)) {
        record.write(outcome, job);
    }
}

/// Records the number of further decisions of a recorded kind.
pub(super) fn repeated(key: Key, count: u64) {
    let Key {
        uid,
        action,
        outcome,
        basis,
        process,
        job,
    } = key;
    tracing::info!(
        target: TARGET,
        action,
        outcome,
        basis,
        uid,
        pid = process,
        job,
        count,
        "{outcome}: user {uid}, {action}, {count} more times",
    );
}

fn escaped(text: &str) -> String {
    abridged(text, MOST_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_callers_text_cannot_end_a_line() {
        let text = escaped("web\nBACKUPD_OUTCOME=granted\u{1b}[2J\u{2028}\u{202e}");
        assert_eq!(text, "web\\nBACKUPD_OUTCOME=granted\\u{1b}[2J\\u{2028}\\u{202e}");
    }
}
