//! Access control: the permissions of callers on objects.
//!
//! One table of permissions, one question ([`Access::require`] where something is to change, [`Access::look`] where
//! somebody only looks), and an [`Authority`] that answers it. Nothing else in the service knows polkit. Every error is a
//! no; the reason goes to the log, not to the caller.

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
pub use table::{Entry, FREE, Implicit, Permission, TABLE};

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

/// Silent questions at a time, in all and of a user. The authority answers one after the other; with the password dialogs of
/// the default limit these are fewer than the bus allows a connection to have in flight (128 with dbus-daemon).
const TURNS: usize = 96;
const TURNS_OF_A_USER: usize = 48;

/// How long the authority may take for a glance once it is asked: others wait for it.
const GLANCE: Duration = Duration::from_secs(2);
/// The same for a question that needs nobody's password.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same with the wait for a turn.
const WHOLE_PATIENCE: Duration = Duration::from_secs(20);
/// The least time between two complaints about the authority in the log.
const QUIET: Duration = Duration::from_secs(10);
/// How long a question may take that needs a password.
const INTERACTIVE_PATIENCE: Duration = Duration::from_secs(600);

/// Who asks.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The connection's unique name on the bus, which no other connection ever has again.
    pub name: String,
    pub uid: u32,
    /// The user's name, if no other user gets the number soon.
    pub user: Option<String>,
    /// The process that made the connection, as the bus knows it.
    pub process: Option<Process>,
    /// The message allows that its user is asked for a password.
    pub interactive: bool,
    /// Cancelled when the call only waits: what its connection called after it need not wait for it any more.
    pub turn: CancellationToken,
}

/// A process, for the record only: its number can be another's by now, and it chose its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub id: u32,
    /// Its `comm` (proc_pid_comm(5)) at the connection's first call.
    pub name: String,
}

/// Facts about the object and the request, for the administrator's rules: what the service itself verified, and of a domain's
/// UUID and disks what its QEMU says.
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

/// What an authority says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Granted,
    /// Yes, because of a password that somebody gave not long ago.
    GrantedForAWhile,
    /// It would have to ask the user, and was not allowed to.
    Challenge,
    Denied,
    /// It could not say. That is a no.
    Failed(String),
}

/// What comes of a glance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    Allowed,
    Refused,
    /// The authority could not say. That is a no, but nothing to make a list of.
    Unknown,
}

impl Look {
    /// Whether it is a yes; an error if the authority could not say.
    pub fn allowed(self) -> Result<bool, Error> {
        match self {
            Self::Allowed => Ok(true),
            Self::Refused => Ok(false),
            Self::Unknown => Err(Error::Unknown),
        }
    }
}

/// Answers questions about callers. Dropping the answer withdraws the question.
pub trait Authority: Send + Sync {
    fn check<'a>(
        &'a self,
        caller: &'a Caller,
        action: &'static str,
        details: &'a Details,
    ) -> BoxFuture<'a, Decision>;

    /// Another number whenever earlier answers no longer count.
    fn generation(&self) -> u64;
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("not authorised for {}", .0.action())]
    Denied(Permission),
    #[error("{} needs a password: call again and allow interactive authorisation", .0.action())]
    NeedsInteraction(Permission),
    /// Too many wait for a password.
    #[error("{0}")]
    Dialogs(#[from] Exceeded),
    /// The authority did not answer: neither what may be done is known, nor what may be seen.
    #[error(
        "polkit could not be asked or did not answer, so nothing is allowed: check that it runs, then try again"
    )]
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

/// The one place where permissions are asked for.
pub struct Access {
    authority: Arc<dyn Authority>,
    cache: Cache,
    turns: Turns,
    dialogs: Quota,
    repeats: Repeats,
    /// When a failure of the authority was logged last.
    complained: Mutex<Option<Instant>>,
}

impl Access {
    /// `dialogs` counts the questions that wait for somebody's password.
    pub fn new(authority: Arc<dyn Authority>, dialogs: Quota) -> Self {
        Self {
            authority,
            cache: Cache::default(),
            turns: Turns::new(TURNS, TURNS_OF_A_USER),
            dialogs,
            repeats: Repeats::new(audit::repeated),
            complained: Mutex::default(),
        }
    }

    /// Goes on only if `caller` has `permission` for something that changes something; may ask the caller's user if the
    /// caller allows that. `job` is the one that it is about, if there is one already. Records the decision.
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
            // It could be asked, and there was nobody to ask: calling again would not help.
            Ok(Decision::Challenge) if !caller.interactive => {
                (Error::NeedsInteraction(permission), "challenge")
            }
            Ok(Decision::Challenge | Decision::Denied) => (Error::Denied(permission), "denied"),
            Ok(Decision::Failed(reason)) => {
                self.complain(&reason, permission);
                (Error::Unknown, "failed")
            }
            Err(exceeded) => (exceeded.into(), "denied"),
        };
        audit::refused(&self.repeats, caller, permission, details, outcome, job);
        Err(error)
    }

    /// What follows from the caller's own part in the object, without asking the authority.
    pub fn implied(&self, caller: &Caller, permission: Permission, details: &Details, basis: Basis) -> Grant {
        Grant::new(caller, permission, details, basis)
    }

    /// Whether `grant` is the first of its kind about `job` in the last minute. Otherwise it is counted, and need not be
    /// recorded.
    pub fn is_first(&self, grant: &Grant, job: u32) -> bool {
        grant.is_first(&self.repeats, job)
    }

    /// Whether `caller` has `permission` as things stand, of an object whose id is never another's; nobody is asked for a
    /// password.
    pub async fn look(
        &self,
        caller: &Caller,
        permission: Permission,
        object: Object,
        details: &Details,
    ) -> Look {
        let generation = self.authority.generation();
        match self.cache.get(&caller.name, permission, object, generation) {
            Some(true) => return Look::Allowed,
            Some(false) => return Look::Refused,
            None => {}
        }
        let (look, decision) = self.look_once(caller, permission, details).await;
        if look != Look::Unknown && decision != Decision::GrantedForAWhile {
            let allowed = look == Look::Allowed;
            self.cache
                .put(&caller.name, permission, object, generation, allowed);
        }
        look
    }

    /// Fails if the authority cannot be asked now. An object is reported missing only after this question, which no
    /// earlier answer stands in for: otherwise a failing authority would show which names exist.
    pub async fn confirm(
        &self,
        caller: &Caller,
        permission: Permission,
        details: &Details,
    ) -> Result<(), Error> {
        self.glance(caller, permission, details).await.allowed().map(drop)
    }

    /// Looks as [`Access::look`] does, and remembers nothing.
    pub async fn glance(&self, caller: &Caller, permission: Permission, details: &Details) -> Look {
        self.look_once(caller, permission, details).await.0
    }

    async fn look_once(
        &self,
        caller: &Caller,
        permission: Permission,
        details: &Details,
    ) -> (Look, Decision) {
        let decision = self.ask_silently(caller, permission, details, GLANCE).await;
        let look = match &decision {
            Decision::Granted | Decision::GrantedForAWhile => Look::Allowed,
            Decision::Challenge | Decision::Denied => Look::Refused,
            Decision::Failed(reason) => {
                self.complain(reason, permission);
                Look::Unknown
            }
        };
        (look, decision)
    }

    /// Logs that the authority failed, not more often than anybody reads it.
    fn complain(&self, reason: &str, permission: Permission) {
        let mut last = self.complained.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_none_or(|last| last.elapsed() >= QUIET) {
            *last = Some(Instant::now());
            tracing::error!(reason, "the authority failed: {} is denied", permission.action());
        }
    }

    /// Writes the counts of repeated decisions that are not on record yet.
    pub fn flush(&self) {
        self.repeats.flush();
    }

    /// Forgets what was decided for a connection that has gone.
    pub fn forget(&self, caller: &str) {
        self.cache.forget(caller);
    }

    /// Asks without a dialog first: most questions need none, and those that do are counted.
    async fn ask(
        &self,
        caller: &Caller,
        permission: Permission,
        details: &Details,
    ) -> Result<Decision, Exceeded> {
        let decision = self.ask_silently(caller, permission, details, PATIENCE).await;
        if decision != Decision::Challenge || !caller.interactive {
            return Ok(decision);
        }
        let _dialog = self.dialogs.take(caller.uid, 1)?;
        caller.turn.cancel();
        let question = self.authority.check(caller, permission.action(), details);
        Ok(within(INTERACTIVE_PATIENCE, question).await)
    }

    async fn ask_silently(
        &self,
        caller: &Caller,
        permission: Permission,
        details: &Details,
        patience: Duration,
    ) -> Decision {
        let silent = Caller {
            interactive: false,
            ..caller.clone()
        };
        // The timeout of the question starts with its turn: a caller with many questions waits, but gets its answers.
        let question = async {
            let Some(_turn) = self.turns.take(caller.uid).await else {
                return Decision::Failed("there are no more questions".into());
            };
            within(
                patience,
                self.authority.check(&silent, permission.action(), details),
            )
            .await
        };
        within(WHOLE_PATIENCE, question).await
    }
}

async fn within(patience: Duration, question: impl Future<Output = Decision>) -> Decision {
    let answer = tokio::time::timeout(patience, question).await;
    answer.unwrap_or_else(|_| Decision::Failed(format!("no answer within {patience:?}")))
}
