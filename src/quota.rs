//! Limits how much of a resource a user holds, and all users together.
//!
//! Code that lets a caller allocate something takes a share first, and keeps it with the allocation. The administrator
//! sets the limits. Root is bound only by the total limits, because root has other ways to exhaust a host. A part of each is
//! reserved for root, so that all other users together do not keep the administrator out.

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

/// One part in so many of each total limit is reserved for root.
const ROOTS: usize = 4;

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

impl Held {
    fn of(&self, uid: u32) -> usize {
        self.by_user.get(&uid).copied().unwrap_or(0)
    }

    /// Units of all users except root.
    fn of_users(&self) -> usize {
        self.in_all - self.of(0)
    }
}

/// The count of one resource.
#[derive(Debug, Clone)]
pub struct Quota {
    key: &'static str,
    limits: Limits,
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
            held: Arc::default(),
            activity: None,
        }
    }

    /// Also counts each share as a use of the service.
    pub fn keeping(mut self, activity: &Activity) -> Self {
        self.activity = Some(activity.clone());
        self
    }

    /// Takes `count` units for a user, or none.
    pub fn take(&self, uid: u32, count: usize) -> Result<Share, Exceeded> {
        let mut held = self.lock();
        self.check(&held, uid, count)?;
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
        self.check(&self.lock(), uid, 1).is_ok()
    }

    fn check(&self, held: &Held, uid: u32, count: usize) -> Result<(), Exceeded> {
        let Limits { per_user, in_all } = self.limits;
        let of_users = in_all - in_all / ROOTS;
        let exceeded = |key: String, limit| Err(Exceeded { key, limit });
        if uid != 0 && held.of(uid) + count > per_user {
            return exceeded(format!("{}-per-user", self.key), per_user);
        }
        if uid != 0 && held.of_users() + count > of_users {
            return exceeded(self.key.to_owned(), of_users);
        }
        if held.in_all + count > in_all {
            return exceeded(self.key.to_owned(), in_all);
        }
        Ok(())
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
    fn a_part_of_the_total_limit_is_reserved_for_root_and_used_first() {
        let limits = Limits {
            per_user: 2,
            in_all: 4,
        };
        let quota = Quota::new("calls", limits);
        let users = [1000, 1001, 1002].map(|uid| quota.take(uid, 1).unwrap());
        let error = quota.take(1003, 1).unwrap_err();
        assert_eq!((error.key.as_str(), error.limit), ("calls", 3));
        assert!(!quota.has_room(1003) && quota.has_room(0));
        let _roots = quota.take(0, 1).unwrap();
        quota.take(0, 1).unwrap_err();
        drop(users);
        // Root's does not count as the users'.
        let _users = [1000, 1001, 1002].map(|uid| quota.take(uid, 1).unwrap());
    }

    #[test]
    fn a_refused_share_takes_nothing() {
        let quota = quota();
        quota.take(1000, 3).unwrap_err();
        drop(quota.take(1000, 2).unwrap());
        assert!(quota.lock().by_user.is_empty() && quota.lock().in_all == 0);
    }
}
