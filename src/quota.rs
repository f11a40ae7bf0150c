//! Limits how much of a resource a user holds, and all users together.
//!
//! Code that lets a caller allocate something takes a share first, and keeps it with the allocation. The administrator
//! sets the limits. Root is bound only by the total limits, because root has other ways to exhaust a host.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::activity::{Activity, Use};
use crate::error::Kind;

/// The limits of one resource: for each user, and in total.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub per_user: usize,
    pub in_all: usize,
}

/// The reached limit, by its name in `[limits]` of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the limit '{key}' ({limit}) is reached: try again later, or ask the administrator to raise it in [limits]"
)]
pub struct Exceeded {
    pub key: String,
    pub limit: usize,
}

impl From<Exceeded> for crate::error::Error {
    fn from(error: Exceeded) -> Self {
        Self::new(Kind::LimitsExceeded, error.to_string())
    }
}

#[derive(Debug, Default)]
struct Held {
    by_user: HashMap<u32, usize>,
    in_all: usize,
}

/// The count of one resource.
#[derive(Debug, Clone)]
pub struct Quota {
    key: &'static str,
    limits: Limits,
    /// The part of `in_all` that is reserved for root.
    for_root: usize,
    held: Arc<Mutex<Held>>,
    activity: Option<Activity>,
}

/// Units that a user holds, until it is dropped.
#[derive(Debug)]
#[must_use = "a share ends when it is dropped"]
pub struct Share {
    quota: Quota,
    uid: u32,
    count: usize,
    _use: Option<Use>,
}

impl Quota {
    /// `key` is the name of the total limit. The limit for each user has the suffix `-per-user`.
    pub fn new(key: &'static str, limits: Limits) -> Self {
        Self {
            key,
            limits,
            for_root: 0,
            held: Arc::default(),
            activity: None,
        }
    }

    /// Also counts each share as a use of the service.
    pub fn keeping(mut self, activity: &Activity) -> Self {
        self.activity = Some(activity.clone());
        self
    }

    /// Reserves a part of the total limit for root.
    pub fn for_root(mut self, count: usize) -> Self {
        self.for_root = count;
        self
    }

    fn in_all_for(&self, uid: u32) -> usize {
        match uid {
            0 => self.limits.in_all,
            _ => self.limits.in_all.saturating_sub(self.for_root),
        }
    }

    /// Takes `count` units for a user, or none.
    pub fn take(&self, uid: u32, count: usize) -> Result<Share, Exceeded> {
        let mut held = self.lock();
        let own = held.by_user.get(&uid).copied().unwrap_or(0);
        if uid != 0 && own + count > self.limits.per_user {
            return Err(Exceeded {
                key: format!("{}-per-user", self.key),
                limit: self.limits.per_user,
            });
        }
        let in_all = self.in_all_for(uid);
        if held.in_all + count > in_all {
            return Err(Exceeded {
                key: self.key.to_owned(),
                limit: in_all,
            });
        }
        held.in_all += count;
        if count > 0 {
            *held.by_user.entry(uid).or_default() += count;
        }
        drop(held);
        Ok(Share {
            quota: self.clone(),
            uid,
            count,
            _use: self.activity.as_ref().map(Activity::begin),
        })
    }

    /// Whether the user can take one more unit now.
    pub fn has_room(&self, uid: u32) -> bool {
        let held = self.lock();
        let own = held.by_user.get(&uid).copied().unwrap_or(0);
        (uid == 0 || own < self.limits.per_user) && held.in_all < self.in_all_for(uid)
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut held = self.quota.lock();
        held.in_all -= self.count;
        if let Some(own) = held.by_user.get_mut(&self.uid) {
            *own -= self.count;
            if *own == 0 {
                held.by_user.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota() -> Quota {
        let limits = Limits {
            per_user: 2,
            in_all: 3,
        };
        Quota::new("calls", limits)
    }

    #[test]
    fn a_user_is_limited_until_it_returns_a_share() {
        let quota = quota();
        let first = quota.take(1000, 1).unwrap();
        let _second = quota.take(1000, 1).unwrap();
        assert_eq!(quota.take(1000, 1).unwrap_err().key, "calls-per-user");
        drop(first);
        let _third = quota.take(1000, 1).unwrap();
    }

    #[test]
    fn the_total_limit_binds_root_too() {
        let quota = quota();
        let shares = quota.take(0, 3).unwrap();
        let error = quota.take(1000, 1).unwrap_err();
        assert_eq!((error.key.as_str(), error.limit), ("calls", 3));
        drop(shares);
        let _share = quota.take(1000, 1).unwrap();
    }

    #[test]
    fn a_part_of_the_total_limit_is_reserved_for_root() {
        let quota = quota().for_root(1);
        let _one = quota.take(1000, 1).unwrap();
        let _other = quota.take(1001, 1).unwrap();
        let error = quota.take(1002, 1).unwrap_err();
        assert_eq!((error.key.as_str(), error.limit), ("calls", 2));
        assert!(!quota.has_room(1002) && quota.has_room(0));
        let _roots = quota.take(0, 1).unwrap();
        quota.take(0, 1).unwrap_err();
    }

    #[test]
    fn a_refused_share_takes_nothing() {
        let quota = quota();
        quota.take(1000, 3).unwrap_err();
        drop(quota.take(1000, 2).unwrap());
        assert!(quota.lock().by_user.is_empty() && quota.lock().in_all == 0);
    }
}
