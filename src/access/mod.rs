//! Who may do what to which object.
//!
//! One table of permissions, one question ([`Access::require`]), and an [`Authority`] that answers it. Nothing else in
//! the service knows polkit. Every error is a no; the reason goes to the log, not to the caller.

mod fixed;
mod polkit;

pub use fixed::Fixed;
pub use polkit::Polkit;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;

use crate::error::Kind;

/// What there is to be allowed, on which kind of object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Permission {
    /// Look at the list of domains at all.
    ServiceSearchDomains,
    /// Make a domain known by passing its monitor.
    ServiceRegisterDomain,
    /// Know that a domain exists, its name, UUID and state.
    DomainGetattr,
    /// Know its disks and its jobs.
    DomainRead,
    /// Back it up.
    DomainBackup,
    /// Cancel somebody else's backup of it.
    DomainAbort,
    /// Change the speed of somebody else's backup of it.
    DomainSetSpeed,
}

impl Permission {
    /// The polkit action.
    pub const fn action(self) -> &'static str {
        match self {
            Self::ServiceSearchDomains => "org.example.backup1.service.search-domains",
            Self::ServiceRegisterDomain => "org.example.backup1.service.register-domain",
            Self::DomainGetattr => "org.example.backup1.domain.getattr",
            Self::DomainRead => "org.example.backup1.domain.read",
            Self::DomainBackup => "org.example.backup1.domain.backup",
            Self::DomainAbort => "org.example.backup1.domain.abort",
            Self::DomainSetSpeed => "org.example.backup1.domain.set-speed",
        }
    }
}

/// Every action that is ever asked for; the shipped `.policy` file has these and no others.
pub const ACTIONS: &[&str] = &[
    Permission::ServiceSearchDomains.action(),
    Permission::ServiceRegisterDomain.action(),
    Permission::DomainGetattr.action(),
    Permission::DomainRead.action(),
    Permission::DomainBackup.action(),
    Permission::DomainAbort.action(),
    Permission::DomainSetSpeed.action(),
];

/// How long an answer may take: to a glance, for which others wait; to a question that needs nobody's password; and to
/// one that does.
const GLANCE: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(10);
const INTERACTIVE_PATIENCE: Duration = Duration::from_secs(600);

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The connection's unique name on the bus, which no other connection ever has again.
    pub name: String,
    pub uid: u32,
    /// The message allows that its user is asked for a password.
    pub interactive: bool,
}

/// Facts about the object and the request, for the administrator's rules. Only what the service itself verified.
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
}

/// What an authority says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Granted,
    /// It would have to ask the user, and was not allowed to.
    Challenge,
    Denied,
    /// It could not say. That is a no.
    Failed(String),
}

/// Answers questions about callers. Dropping the answer withdraws the question.
pub trait Authority: Send + Sync {
    fn check<'a>(
        &'a self,
        caller: &'a Caller,
        action: &'static str,
        details: &'a Details,
    ) -> BoxFuture<'a, Decision>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("not authorised for {}", .0.action())]
    Denied(Permission),
    #[error("{} needs a password: call again and allow interactive authorisation", .0.action())]
    NeedsInteraction(Permission),
}

impl Error {
    pub fn kind(self) -> Kind {
        match self {
            Self::Denied(_) => Kind::AccessDenied,
            Self::NeedsInteraction(_) => Kind::InteractiveAuthorizationRequired,
        }
    }
}

impl From<Error> for crate::error::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

/// The one place where permissions are asked for.
#[derive(Clone)]
pub struct Access(Arc<dyn Authority>);

impl Access {
    pub fn new(authority: Arc<dyn Authority>) -> Self {
        Self(authority)
    }

    /// Goes on only if `caller` has `permission`; may ask the caller's user if the caller allows that.
    pub async fn require(
        &self,
        caller: &Caller,
        permission: Permission,
        details: &Details,
    ) -> Result<(), Error> {
        let patience = if caller.interactive {
            INTERACTIVE_PATIENCE
        } else {
            PATIENCE
        };
        self.decide(caller, permission, details, patience).await
    }

    async fn decide(
        &self,
        caller: &Caller,
        permission: Permission,
        details: &Details,
        patience: Duration,
    ) -> Result<(), Error> {
        let question = self.0.check(caller, permission.action(), details);
        let decision = tokio::time::timeout(patience, question).await;
        match decision.unwrap_or_else(|_| Decision::Failed(format!("no answer within {patience:?}"))) {
            Decision::Granted => {
                tracing::debug!(?caller, action = permission.action(), ?details, "granted");
                Ok(())
            }
            // It could be asked, and there was nobody to ask: calling again would not help.
            Decision::Challenge if caller.interactive => {
                tracing::info!(
                    ?caller,
                    action = permission.action(),
                    ?details,
                    "denied: nobody to ask"
                );
                Err(Error::Denied(permission))
            }
            Decision::Challenge => {
                tracing::info!(
                    ?caller,
                    action = permission.action(),
                    ?details,
                    "needs a password"
                );
                Err(Error::NeedsInteraction(permission))
            }
            Decision::Denied => {
                tracing::info!(?caller, action = permission.action(), ?details, "denied");
                Err(Error::Denied(permission))
            }
            Decision::Failed(reason) => {
                tracing::error!(
                    ?caller,
                    action = permission.action(),
                    ?details,
                    reason,
                    "denied: the authority failed"
                );
                Err(Error::Denied(permission))
            }
        }
    }

    /// Whether `caller` has `permission` as things stand; nobody is asked for a password.
    pub async fn allows(&self, caller: &Caller, permission: Permission, details: &Details) -> bool {
        let silent = Caller {
            interactive: false,
            ..caller.clone()
        };
        let decision = self.decide(&silent, permission, details, GLANCE).await;
        decision.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller() -> Caller {
        Caller {
            name: ":1.7".into(),
            uid: 1000,
            interactive: false,
        }
    }

    async fn ask(decision: Decision) -> Result<(), Error> {
        let access = Access::new(Arc::new(
            Fixed::default().with(Permission::DomainBackup.action(), decision),
        ));
        access
            .require(&caller(), Permission::DomainBackup, &Details::default())
            .await
    }

    #[tokio::test]
    async fn what_nothing_is_known_of_is_a_no() {
        let granted = Fixed::default().with(Permission::DomainAbort.action(), Decision::Granted);
        let access = Access::new(Arc::new(granted));
        let answer = access
            .require(&caller(), Permission::DomainBackup, &Details::default())
            .await;
        assert_eq!(answer, Err(Error::Denied(Permission::DomainBackup)));
    }

    #[tokio::test]
    async fn every_answer_but_granted_is_a_no() {
        assert_eq!(ask(Decision::Granted).await, Ok(()));
        assert_eq!(
            ask(Decision::Denied).await,
            Err(Error::Denied(Permission::DomainBackup))
        );
        assert_eq!(
            ask(Decision::Failed("down".into())).await,
            Err(Error::Denied(Permission::DomainBackup))
        );
        assert_eq!(
            ask(Decision::Challenge).await,
            Err(Error::NeedsInteraction(Permission::DomainBackup))
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_authority_that_never_answers_is_a_no() {
        struct Silent;
        impl Authority for Silent {
            fn check<'a>(
                &'a self,
                _: &'a Caller,
                _: &'static str,
                _: &'a Details,
            ) -> BoxFuture<'a, Decision> {
                Box::pin(std::future::pending())
            }
        }
        let access = Access::new(Arc::new(Silent));
        let answer = access
            .require(&caller(), Permission::DomainBackup, &Details::default())
            .await;
        assert_eq!(answer, Err(Error::Denied(Permission::DomainBackup)));
    }

    #[test]
    fn every_permission_has_an_action_of_its_own() {
        let mut actions = ACTIONS.to_vec();
        actions.sort_unstable();
        actions.dedup();
        assert_eq!(actions.len(), ACTIONS.len());
    }
}
