//! Access control: decides which permissions a caller has on an object.
//!
//! A table lists the permissions. [`Access::require`] checks one before a change, [`Access::check_read`] before a read. An
//! [`Authority`] answers. No other module knows polkit. An error denies the permission; its reason goes to the log and
//! not to the caller.

mod audit;
mod cache;
mod polkit;
mod repeats;
mod table;
#[cfg(test)]
mod tests;

pub use audit::{Basis, DIRECTIVE as AUDIT_DIRECTIVE, Grant};
pub use cache::Object;
pub use polkit::Polkit;
pub use table::{Entry, Implicit, Permission, TABLE};

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::Kind;
use crate::quota::{Exceeded, Quota};
use crate::turns::Turns;
use cache::Cache;
use repeats::Repeats;

/// The most silent questions in flight, in total and for a user. The authority answers sequentially. Together with the
/// default limit of password dialogs these are fewer calls than the bus allows a connection (128 with dbus-daemon).
const TURNS: usize = 96;
const TURNS_OF_A_USER: usize = 48;

/// Timeout of a read question once the authority is asked. It is short because other callers wait.
const READ_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout of other questions without a password dialog.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout of a question including the wait for its turn.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(20);
/// The least time between two log messages about a failing authority.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Timeout of a question with a password dialog.
const DIALOG_TIMEOUT: Duration = Duration::from_secs(600);

/// The sender of a call.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The connection's unique bus name. The bus never reuses it.
    pub name: String,
    pub uid: u32,
    /// The user's name, unless another user may get the uid soon.
    pub user: Option<String>,
    /// The process that opened the connection, as the bus reports it.
    pub process: Option<Process>,
    /// Whether the message allows a password dialog (`ALLOW_INTERACTIVE_AUTHORIZATION`).
    pub interactive: bool,
    /// Cancelled when the call only waits. Later calls of the connection need not wait for it any more.
    pub turn: CancellationToken,
}

/// A process, for audit records only: the pid may be reused, and the process chose its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub id: u32,
    /// Its `comm` (proc_pid_comm(5)) at the first call of the connection.
    pub name: String,
}

/// Facts about the object and the request, for the administrator's polkit rules. The service verified them, except a
/// domain's UUID and disks, which its QEMU reports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Details(Vec<(&'static str, String)>);

impl Details {
    pub fn with(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.0.push((key, value.into()));
        self
    }

    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(key, value)| (*key, value.as_str()))
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.iter()
            .find(|(found, _)| *found == key)
            .map(|(_, value)| value)
    }
}

/// An authority's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Granted,
    /// Granted because of a password that was given recently.
    GrantedForAWhile,
    /// The authority would have to ask the user, but the caller did not allow that.
    Challenge,
    Denied,
    /// The authority could not decide. The permission is denied.
    Failed(String),
}

/// The result of a read question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadAnswer {
    Allowed,
    Refused,
    /// The authority could not decide. The permission is denied, and lists fail because they could be incomplete.
    Unknown,
}

impl ReadAnswer {
    /// Whether the permission is granted; an error if the authority could not decide.
    pub fn allowed(self) -> Result<bool, Error> {
        match self {
            Self::Allowed => Ok(true),
            Self::Refused => Ok(false),
            Self::Unknown => Err(Error::Unknown),
        }
    }
}

/// Answers questions about callers. Dropping the future withdraws the question.
pub trait Authority: Send + Sync {
    fn check<'a>(
        &'a self,
        caller: &'a Caller,
        action: &'static str,
        details: &'a Details,
    ) -> BoxFuture<'a, Decision>;

    /// A number that changes when earlier answers become invalid.
    fn generation(&self) -> u64;
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("not authorised for {}", .0.action())]
    Denied(Permission),
    #[error("{} needs a password: call again and allow interactive authorisation", .0.action())]
    NeedsInteraction(Permission),
    /// Too many questions wait for a password.
    #[error("{0}")]
    Dialogs(#[from] Exceeded),
    /// The authority did not answer, so it is unknown what the caller may do or see.
    #[error("polkit did not answer, so the service allows nothing: check that polkit runs, then try again")]
    Unknown,
}

impl Error {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Denied(_) | Self::Unknown => Kind::AccessDenied,
            Self::NeedsInteraction(_) => Kind::InteractiveAuthorizationRequired,
            Self::Dialogs(_) => Kind::LimitsExceeded,
        }
    }
}

impl From<Error> for crate::error::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

/// Checks permissions. The only place that asks the authority.
pub struct Access {
    authority: Arc<dyn Authority>,
    cache: Cache,
    turns: Turns,
    dialogs: Quota,
    repeats: Repeats,
    /// When a failure of the authority was last logged.
    last_logged: Mutex<Option<Instant>>,
}

impl Access {
    /// `dialogs` limits the questions that wait for a password.
    pub fn new(authority: Arc<dyn Authority>, dialogs: Quota) -> Self {
        Self {
            authority,
            cache: Cache::default(),
            turns: Turns::new(TURNS, TURNS_OF_A_USER),
            dialogs,
            repeats: Repeats::new(audit::repeated),
            last_logged: Mutex::default(),
        }
    }

    /// Requires `permission` for a change, and records the decision. If the caller allows it, the authority may ask the
    /// caller's user for a password. `job` is the existing job that the change concerns.
    pub async fn require(
        &self,
        caller: &Caller,
        permission: Permission,
        details: &Details,
        job: Option<u32>,
    ) -> Result<Grant, Error> {
        let (error, outcome) = match self.ask(caller, permission, details).await {
            Ok(Decision::Granted | Decision::GrantedForAWhile) => {
                return Ok(Grant::new(caller, permission, details, Basis::Polkit));
            }
            // The authority would ask, but nobody answers dialogs for this caller. Calling again would not help.
            Ok(Decision::Challenge) if !caller.interactive => {
                (Error::NeedsInteraction(permission), "challenge")
            }
            Ok(Decision::Challenge | Decision::Denied) => (Error::Denied(permission), "denied"),
            Ok(Decision::Failed(reason)) => {
                self.log_failure(&reason, permission);
                (Error::Unknown, "failed")
            }
            Err(exceeded) => (exceeded.into(), "denied"),
        };
        audit::refused(&self.repeats, caller, permission, details, outcome, job);
        Err(error)
    }

    /// Grants a permission without asking the authority, because the caller owns or started the object.
    pub fn implied(&self, caller: &Caller, permission: Permission, details: &Details, basis: Basis) -> Grant {
        Grant::new(caller, permission, details, basis)
    }

    /// Whether `grant` is the first of its kind for `job` within a minute. Later ones are counted and need no record.
    pub fn is_first(&self, grant: &Grant, job: u32) -> bool {
        grant.is_first(&self.repeats, job)
    }

    /// Whether `caller` has a read permission. No password dialog appears. The answer is cached, so ids of objects must
    /// be unique for ever.
    pub async fn check_read(
        &self,
        caller: &Caller,
        permission: Permission,
        object: Object,
        details: &Details,
    ) -> ReadAnswer {
        let generation = self.authority.generation();
        match self.cache.get(&caller.name, permission, object, generation) {
            Some(true) => return ReadAnswer::Allowed,
            Some(false) => return ReadAnswer::Refused,
            None => {}
        }
        let (answer, decision) = self.ask_read(caller, permission, details).await;
        if answer != ReadAnswer::Unknown && decision != Decision::GrantedForAWhile {
            let allowed = answer == ReadAnswer::Allowed;
            self.cache
                .put(&caller.name, permission, object, generation, allowed);
        }
        answer
    }

    /// Fails if the authority cannot be asked now. The service asks this, uncached, before it reports an object as
    /// missing. Otherwise a failing authority would reveal which names exist.
    pub async fn confirm(
        &self,
        caller: &Caller,
        permission: Permission,
        details: &Details,
    ) -> Result<(), Error> {
        self.check_read_uncached(caller, permission, details)
            .await
            .allowed()
            .map(drop)
    }

    /// As [`Access::check_read`], but without the cache.
    pub async fn check_read_uncached(
        &self,
        caller: &Caller,
        permission: Permission,
        details: &Details,
    ) -> ReadAnswer {
        self.ask_read(caller, permission, details).await.0
    }

    async fn ask_read(
        &self,
        caller: &Caller,
        permission: Permission,
        details: &Details,
    ) -> (ReadAnswer, Decision) {
        let decision = self.ask_silently(caller, permission, details, READ_TIMEOUT).await;
        let answer = match &decision {
            Decision::Granted | Decision::GrantedForAWhile => ReadAnswer::Allowed,
            Decision::Challenge | Decision::Denied => ReadAnswer::Refused,
            Decision::Failed(reason) => {
                self.log_failure(reason, permission);
                ReadAnswer::Unknown
            }
        };
        (answer, decision)
    }

    /// Logs a failure of the authority, at most once in [`LOG_INTERVAL`].
    fn log_failure(&self, reason: &str, permission: Permission) {
        let mut last = self.last_logged.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| last.elapsed() >= LOG_INTERVAL) {
            *last = Some(Instant::now());
            tracing::error!(reason, "polkit failed, so {} is denied", permission.action());
        }
    }

    /// Records the pending counts of repeated decisions.
    pub fn flush(&self) {
        self.repeats.flush();
    }

    /// Drops the cached answers for a disconnected caller.
    pub fn forget(&self, caller: &str) {
        self.cache.forget(caller);
    }

    /// Asks without a dialog first, because most questions need none. Questions with a dialog are counted.
    async fn ask(
        &self,
        caller: &Caller,
        permission: Permission,
        details: &Details,
    ) -> Result<Decision, Exceeded> {
        let decision = self.ask_silently(caller, permission, details, TIMEOUT).await;
        if decision != Decision::Challenge || !caller.interactive {
            return Ok(decision);
        }
        let _dialog = self.dialogs.take(caller.uid, 1)?;
        caller.turn.cancel();
        let question = self.authority.check(caller, permission.action(), details);
        Ok(within(DIALOG_TIMEOUT, question).await)
    }

    async fn ask_silently(
        &self,
        caller: &Caller,
        permission: Permission,
        details: &Details,
        timeout: Duration,
    ) -> Decision {
        let silent = Caller {
            interactive: false,
            ..caller.clone()
        };
        // The timeout of the question starts with its turn, so that a caller with many questions gets all its answers.
        let question = async {
            let Some(_turn) = self.turns.take(caller.uid).await else {
                return Decision::Failed("the service is stopping".into());
            };
            within(
                timeout,
                self.authority.check(&silent, permission.action(), details),
            )
            .await
        };
        within(TOTAL_TIMEOUT, question).await
    }
}

async fn within(timeout: Duration, question: impl Future<Output = Decision>) -> Decision {
    let answer = tokio::time::timeout(timeout, question).await;
    answer.unwrap_or_else(|_| Decision::Failed(format!("no answer within {timeout:?}")))
}
