//! The places, and which of them are occupied by whom.

use std::collections::{BTreeMap, HashMap};

use crate::config::{Config, Limits};
use crate::job::table::ROOT;

/// How many backups run at once.
#[derive(Debug, Clone)]
pub struct Places {
    pub host: usize,
    pub per_user: usize,
    /// The limits of those stores that have one.
    pub stores: BTreeMap<String, usize>,
}

impl Places {
    pub fn of(config: &Config) -> Self {
        let Limits {
            jobs_at_once,
            jobs_at_once_per_user,
            ..
        } = config.limits;
        let stores = config.stores.iter();
        Self {
            host: jobs_at_once.get(),
            per_user: jobs_at_once_per_user.get(),
            stores: stores
                .filter_map(|(name, store)| Some((name.clone(), store.jobs_at_once?.get())))
                .collect(),
        }
    }
}

/// The resources that a backup occupies while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    pub uid: u32,
    /// The unique name of its domain.
    pub domain: String,
    /// `None` if its targets are not in a store.
    pub store: Option<String>,
}

/// The number of running backups, and a counter value of the last time a place was given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share {
    pub running: usize,
    served: u64,
}

/// The occupied places.
#[derive(Debug, Clone, Default)]
pub struct Occupied {
    pub root: Share,
    /// All users except root together, and each user by uid.
    pub others: Share,
    pub users: HashMap<u32, Share>,
    /// For each store: the number of all places, and of root's.
    pub stores: HashMap<String, (usize, usize)>,
    /// Counts the places given so far.
    pub given: u64,
}

impl Occupied {
    pub fn user(&self, uid: u32) -> Share {
        self.users.get(&uid).copied().unwrap_or_default()
    }

    pub fn take(&mut self, claim: &Claim) {
        self.given += 1;
        let served = self.given;
        let of_class = match claim.uid {
            ROOT => &mut self.root,
            _ => &mut self.others,
        };
        for share in [of_class, self.users.entry(claim.uid).or_default()] {
            share.running += 1;
            share.served = served;
        }
        if let Some(store) = &claim.store {
            let (all, root) = self.stores.entry(store.clone()).or_default();
            *all += 1;
            *root += usize::from(claim.uid == ROOT);
        }
    }

    pub fn give_back(&mut self, claim: &Claim) {
        let of_class = match claim.uid {
            ROOT => &mut self.root,
            _ => &mut self.others,
        };
        of_class.running = of_class.running.saturating_sub(1);
        self.give_back_of_user(claim.uid);
        if let Some(store) = &claim.store
            && let Some((all, root)) = self.stores.get_mut(store)
        {
            *all = all.saturating_sub(1);
            *root = root.saturating_sub(usize::from(claim.uid == ROOT));
        }
    }

    /// Frees the place of a backup that still counts for its user.
    pub fn give_place(&mut self, claim: &Claim) {
        let of_user = self.user(claim.uid);
        self.give_back(claim);
        self.users.insert(claim.uid, of_user);
    }

    pub fn give_back_of_user(&mut self, uid: u32) {
        if let Some(share) = self.users.get_mut(&uid) {
            share.running = share.running.saturating_sub(1);
        }
    }

    pub fn has_place(&self, claim: &Claim, places: &Places) -> bool {
        let all = self.root.running + self.others.running;
        let (in_store, of_root) = claim
            .store
            .as_ref()
            .and_then(|store| self.stores.get(store))
            .copied()
            .unwrap_or_default();
        let limit = claim.store.as_ref().and_then(|store| places.stores.get(store));
        let store_has = limit.is_none_or(|limit| in_store < *limit);
        match claim.uid {
            ROOT => (all < places.host || self.root.running == 0) && (store_has || of_root == 0),
            uid => all < places.host && self.user(uid).running < places.per_user && store_has,
        }
    }

    /// The rank of a claim: the lowest is next.
    pub fn rank(&self, claim: &Claim) -> (Share, Share) {
        match claim.uid {
            ROOT => (self.root, Share::default()),
            uid => (self.others, self.user(uid)),
        }
    }
}
