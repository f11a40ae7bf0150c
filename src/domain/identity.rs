//! Which domain a domain is, for as long as the service may not know it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use uuid::Uuid;

use super::{Domain, Link, Origin, Phase, Registry, SEPARATOR, is_domain_name, owner, unique_name};

/// Domains that are not known and are remembered.
const MAX_ABSENT: usize = 4096;

/// What became of waiting for a domain's monitor.
#[derive(Debug)]
pub enum Reach {
    Connected(Arc<Domain>, Arc<Link>),
    /// The domain is known, and its QEMU has ended.
    Gone,
    /// It did not come in time.
    Late,
}

/// What stays the same when a domain goes and comes again, or the service does.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    pub name: String,
    pub origin: Origin,
    pub owner: u32,
    pub owner_name: String,
    pub uuid: Option<Uuid>,
}

/// The owner of a domain that no user here owns. No user has this number.
pub const NOBODY: u32 = u32::MAX;

impl Identity {
    /// Whose [`Identity::unique_name`] that is, if it is one of a domain of that name; of a configured one, as far as can be
    /// known. Blocks.
    pub fn of_unique_name(unique_name: &str, name: &str, uuid: Option<Uuid>) -> Option<Self> {
        let (origin, owner) = match unique_name.strip_suffix(name)? {
            "" => (Origin::Configured, 0),
            owner => (Origin::Registered, owner.strip_suffix(SEPARATOR)?.parse().ok()?),
        };
        let identity = Self {
            name: name.to_owned(),
            origin,
            owner,
            owner_name: owner::name(owner),
            uuid,
        };
        (is_domain_name(name) && identity.unique_name() == unique_name).then_some(identity)
    }

    pub fn unique_name(&self) -> String {
        unique_name(self.origin, self.owner, &self.name)
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

    /// What stands for a domain that is not known now. It has no monitor.
    fn absent(identity: Identity) -> Arc<Self> {
        let why = "the domain is not known any more".into();
        let id = Uuid::new_v4().as_u64_pair().1;
        Arc::new(Self::new(id, identity, None, Phase::Down { why, gone: false }))
    }
}

impl Registry {
    /// The domain of that name and owner, if it is known.
    pub fn identified(&self, identity: &Identity) -> Option<Arc<Domain>> {
        let name = identity.unique_name();
        self.list()
            .into_iter()
            .find(|domain| domain.unique_name() == name)
    }

    /// The same, or something that stands for it.
    pub fn identified_or_absent(&self, identity: Identity) -> Arc<Domain> {
        self.identified(&identity)
            .unwrap_or_else(|| self.absent(identity))
    }

    /// The domain that it was, if it is known and is not another machine by now; or something that stands for it.
    pub fn same_or_absent(&self, identity: Identity) -> Arc<Domain> {
        let same = |known: &Arc<Domain>| match (known.snapshot.borrow().uuid, identity.uuid) {
            (Some(now), Some(then)) => now == then,
            _ => true,
        };
        match self.identified(&identity).filter(same) {
            Some(known) => known,
            None => self.absent(identity),
        }
    }

    /// What stands for a domain that is not known now: always the same for the same one, so that what is known of it, and
    /// of who may see it, lasts.
    fn absent(&self, identity: Identity) -> Arc<Domain> {
        let mut absent = self.lock_absent();
        if absent.len() >= MAX_ABSENT && !absent.contains_key(&identity) {
            absent.clear();
        }
        let stands = || Domain::absent(identity.clone());
        absent.entry(identity.clone()).or_insert_with(stands).clone()
    }

    /// Waits until the domain is known and its monitor is connected.
    pub async fn reach(&self, identity: &Identity, patience: Duration) -> Reach {
        let connected = async {
            loop {
                let domain = self.appears(identity).await?;
                tokio::select! {
                    link = domain.next_link(None, Duration::MAX) => return match link {
                        Some(link) => Some(Reach::Connected(domain.clone(), link)),
                        None => domain.is_gone().then_some(Reach::Gone),
                    },
                    // Another one may come in its place.
                    () = self.disappears(&domain) => {}
                }
            }
        };
        let reached = tokio::time::timeout(patience, connected).await;
        reached.ok().flatten().unwrap_or(Reach::Late)
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
            if let Some(domain) = self.identified(identity) {
                return Some(domain);
            }
            // Whatever changed: what counts is what there is now.
            if let Err(RecvError::Closed) = changes.recv().await {
                return None;
            }
        }
    }
}
