//! The identity of a domain: its UUID, or its name and owner. It outlasts the domain's registration and the service
//! process.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use uuid::Uuid;

use super::{Domain, Link, Origin, Phase, Registry, SEPARATOR, is_domain_name, unique_name};

/// How long the service waits until a user registers a domain again whose connection has ended.
const AGAIN: Duration = Duration::from_secs(60);
/// The most unknown domains for which the registry keeps a stand-in.
const MAX_ABSENT: usize = 4096;

/// The result of waiting for a domain's monitor.
#[derive(Debug)]
pub enum Reach {
    Connected(Arc<Domain>, Arc<Link>),
    /// QEMU has ended, or a user registered it and the service cannot connect to it again.
    Gone,
    /// The monitor was not connected in time.
    Late,
}

/// The properties that stay the same when a domain disappears and comes back, or the service restarts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    pub name: String,
    pub origin: Origin,
    pub owner: u32,
    /// See [`super::owner::shown_name`].
    pub owner_name: String,
    pub uuid: Option<Uuid>,
}

/// The owner of a domain that no user of this host owns. No user has this number.
pub const NOBODY: u32 = u32::MAX;

impl Identity {
    /// Returns the domain of that name and UUID whose backups are in `directory` of a store, or `None` if a domain
    /// cannot have the name. Only the directories of registered domains begin with the owner's number. Such a domain
    /// gets the owner [`NOBODY`], because the user with that number on this host, or today, need not be its owner.
    pub fn in_directory(directory: &str, name: &str, uuid: Option<Uuid>) -> Option<Self> {
        let owner = directory.split_once(SEPARATOR);
        let is_registered = owner.is_some_and(|(owner, _)| is_number(owner));
        let (origin, owner, owner_name) = match is_registered {
            false => (Origin::Configured, 0, "root".to_owned()),
            true => (Origin::Registered, NOBODY, NOBODY.to_string()),
        };
        is_domain_name(name).then(|| Self {
            name: name.to_owned(),
            origin,
            owner,
            owner_name,
            uuid: uuid.filter(|uuid| !uuid.is_nil()),
        })
    }

    pub fn unique_name(&self) -> String {
        unique_name(self.origin, self.owner, &self.name)
    }

    /// Whether this user may use the domain's plain name and UUID. Otherwise a less trusted user could register a
    /// domain under a name that this user expects to be another domain.
    pub fn is_trusted_by(&self, uid: u32) -> bool {
        self.origin == Origin::Configured || self.owner == uid
    }

    /// Whether the name denotes this domain for that user: its name, or `UID:NAME` if a user registered it.
    pub fn is_called(&self, name: &str, uid: u32) -> bool {
        self.is_trusted_by(uid) && self.name == name
            || self.origin == Origin::Registered && self.unique_name() == name
    }

    /// The name that denotes this domain for that user.
    pub fn name_for(&self, uid: u32) -> String {
        match self.is_trusted_by(uid) {
            true => self.name.clone(),
            false => self.unique_name(),
        }
    }
}

impl Domain {
    pub fn identity(&self) -> Identity {
        Identity {
            name: self.name.clone(),
            origin: self.origin,
            owner: self.owner,
            owner_name: self.owner_name.clone(),
            uuid: self.snapshot.borrow().uuid,
        }
    }

    /// Creates a stand-in for an unknown domain. It has no monitor.
    fn absent(identity: Identity, lost_name: bool) -> Arc<Self> {
        let why = "the service does not know the domain any more".into();
        let id = Uuid::new_v4().as_u64_pair().1;
        let mut domain = Self::new(id, identity, Phase::Down { why, gone: false });
        domain.lost_name = lost_name;
        domain.absent = true;
        Arc::new(domain)
    }

    /// Whether both are configured, or the same user registered both. The name is compared too, because another user
    /// can have the number by now.
    fn is_of_kin(&self, identity: &Identity) -> bool {
        let is_owners = || self.owner == identity.owner && self.owner_name == identity.owner_name;
        self.origin == identity.origin && (self.origin == Origin::Configured || is_owners())
    }

    /// The domain's name in polkit's rules. If another domain has the name now, a rule for that domain must not match
    /// this one.
    pub fn told_name(&self) -> String {
        match self.lost_name {
            false => self.name.clone(),
            true => {
                let uuid = self.snapshot.borrow().uuid;
                let uuid = uuid.map(|uuid| uuid.to_string()).unwrap_or_default();
                // A domain name cannot have a slash.
                format!("{}/{uuid}", self.name)
            }
        }
    }
}

impl Registry {
    /// Returns the domain of that name and owner, if it is known.
    pub fn identified(&self, identity: &Identity) -> Option<Arc<Domain>> {
        self.bearer(identity).filter(|domain| domain.is_of_kin(identity))
    }

    /// Whether any domain has the name now, even a different one.
    pub fn has_name_of(&self, identity: &Identity) -> bool {
        self.bearer(identity).is_some()
    }

    fn bearer(&self, identity: &Identity) -> Option<Arc<Domain>> {
        let name = identity.unique_name();
        self.list()
            .into_iter()
            .find(|domain| domain.unique_name() == name)
    }

    /// Returns the domain of that name and owner, or a stand-in.
    pub fn identified_or_absent(&self, identity: Identity) -> Arc<Domain> {
        self.identified(&identity)
            .unwrap_or_else(|| self.absent(identity))
    }

    /// Returns the domain with that UUID, even under another name. If the identity has no UUID, returns the domain of
    /// that name.
    pub fn same(&self, identity: &Identity) -> Option<Arc<Domain>> {
        let uuid = |known: &Domain| known.snapshot.borrow().uuid;
        if let Some(named) = self.identified(identity)
            // The UUID of a QEMU is unknown until the service has reached it once. Until then, a domain that reports
            // this UUID under another name does not get the backups of this one.
            && (uuid(&named) == identity.uuid || !named.was_reached())
        {
            return Some(named);
        }
        identity.uuid?;
        let is_it = |known: &Arc<Domain>| uuid(known) == identity.uuid && known.is_of_kin(identity);
        self.list().into_iter().find(is_it)
    }

    /// Returns the same domain, or a stand-in. The stand-in has no name if another domain has the name now.
    pub fn same_or_absent(&self, identity: Identity) -> Arc<Domain> {
        match self.same(&identity) {
            Some(known) => known,
            None => {
                let renamed = self.has_name_of(&identity);
                self.stand_in(identity, renamed)
            }
        }
    }

    fn absent(&self, identity: Identity) -> Arc<Domain> {
        self.stand_in(identity, false)
    }

    /// Returns the stand-in of an unknown domain. The same identity always gets the same stand-in, so that its state
    /// and its access rights last.
    fn stand_in(&self, identity: Identity, lost_name: bool) -> Arc<Domain> {
        let mut absent = self.lock_absent();
        let key = (identity, lost_name);
        if absent.len() >= MAX_ABSENT && !absent.contains_key(&key) {
            absent.clear();
        }
        let stands = || Domain::absent(key.0.clone(), lost_name);
        absent.entry(key.clone()).or_insert_with(stands).clone()
    }

    /// Waits until the domain is known, under any name, and its monitor is connected. A registered domain has ended
    /// with its connection unless its user registers it again soon, because the service has no path to connect to.
    pub async fn reach(&self, identity: &Identity, patience: Duration) -> Reach {
        let (patience, otherwise) = match identity.origin {
            Origin::Configured => (patience, Reach::Late),
            Origin::Registered => (patience.min(AGAIN), Reach::Gone),
        };
        let connected = async {
            loop {
                let domain = self.appears(identity).await?;
                tokio::select! {
                    link = domain.next_link(None, Duration::MAX) => match link {
                        // Until the service has reached it, only its name is known.
                        Some(_) if !self.is_same(&domain, identity) => {}
                        Some(link) => return Some(Reach::Connected(domain.clone(), link)),
                        None => return domain.is_gone().then_some(Reach::Gone),
                    },
                    // Another domain can replace it.
                    () = self.disappears(&domain) => {}
                }
            }
        };
        let reached = tokio::time::timeout(patience, connected).await;
        reached.ok().flatten().unwrap_or(otherwise)
    }

    fn is_same(&self, domain: &Arc<Domain>, identity: &Identity) -> bool {
        self.same(identity).is_some_and(|same| Arc::ptr_eq(&same, domain))
    }

    async fn disappears(&self, domain: &Domain) {
        let mut changes = self.changes();
        while self.get(domain.id).is_some() {
            if let Err(RecvError::Closed) = changes.recv().await {
                return;
            }
        }
    }

    async fn appears(&self, identity: &Identity) -> Option<Arc<Domain>> {
        let mut changes = self.changes();
        loop {
            if let Some(domain) = self.same(identity) {
                return Some(domain);
            }
            // The receiver may have missed changes, so only the present state counts.
            tokio::select! {
                changed = changes.recv() => if let Err(RecvError::Closed) = changed {
                    return None;
                },
                () = self.has_uuid(identity) => {}
            }
        }
    }

    /// Waits until a known domain with the same origin and owner reports that UUID, under any name.
    async fn has_uuid(&self, identity: &Identity) {
        let kin = self
            .list()
            .into_iter()
            .filter(|domain| domain.is_of_kin(identity));
        let wanted = identity.uuid;
        let says = kin.map(|domain| {
            let mut snapshots = domain.snapshots();
            Box::pin(async move {
                let said = snapshots
                    .wait_for(|snapshot| snapshot.uuid == wanted)
                    .await
                    .is_ok();
                if !said {
                    // The domain was removed.
                    std::future::pending::<()>().await;
                }
            })
        });
        let says: Vec<_> = says.collect();
        match wanted.is_some() && !says.is_empty() {
            true => drop(futures_util::future::select_all(says).await),
            false => std::future::pending().await,
        }
    }
}

/// Whether the text is a user's number as the service writes it. `parse` also accepts a sign.
fn is_number(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<u32>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_directory_that_begins_with_a_users_number_is_of_a_registered_domain() {
        let origin = |owner: &str| {
            let directory = format!("{owner}{SEPARATOR}web");
            Identity::in_directory(&directory, "web", None).unwrap().origin
        };
        for owner in ["0", "7", "1000", "4294967295"] {
            assert_eq!(origin(owner), Origin::Registered, "{owner}");
        }
        for owner in ["+7", "-0", "", " 7", "4294967296", "seven"] {
            assert_eq!(origin(owner), Origin::Configured, "{owner}");
        }
    }
}
