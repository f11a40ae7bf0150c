//! Limits concurrent work. Each user can take only a part of all permits, so the requests of one user do not block
//! other users. A quarter of the permits is reserved for root, because all other users together could take the rest. Root
//! uses that quarter first, and then free permits of the users.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

#[derive(Debug)]
pub struct Turns {
    users: Arc<Semaphore>,
    root: Arc<Semaphore>,
    per_user: usize,
    by_user: Mutex<HashMap<u32, Arc<Semaphore>>>,
}

/// A permit for one piece of work.
pub struct Turn {
    _all: OwnedSemaphorePermit,
    _own: OwnedSemaphorePermit,
}

/// A permit of one user's part. Work also needs a permit of all users: see [`Share::turn`].
pub struct Share {
    // `None` never occurs because nothing closes the semaphore.
    own: Option<OwnedSemaphorePermit>,
    users: Arc<Semaphore>,
    /// Only for root.
    reserved: Option<Arc<Semaphore>>,
}

impl Turns {
    /// Allows `all` pieces of work at a time, and `per_user` for each user. Root gets at least one permit.
    pub fn new(all: usize, per_user: usize) -> Self {
        let roots = all / 4;
        Self {
            users: Arc::new(Semaphore::new(all - roots)),
            root: Arc::new(Semaphore::new(roots.max(1))),
            per_user,
            by_user: Mutex::default(),
        }
    }

    /// Waits for a permit for this user.
    pub async fn take(&self, uid: u32) -> Option<Turn> {
        let share = self.share(uid).await;
        Some(Turn {
            _all: share.turn().await?,
            _own: share.own?,
        })
    }

    /// Waits until this user has a free permit of its part. For work that takes and returns a permit repeatedly.
    pub async fn share(&self, uid: u32) -> Share {
        Share {
            own: self.of(uid).acquire_owned().await.ok(),
            users: self.users.clone(),
            reserved: (uid == 0).then(|| self.root.clone()),
        }
    }

    fn of(&self, uid: u32) -> Arc<Semaphore> {
        let mut by_user = self.by_user.lock().unwrap_or_else(PoisonError::into_inner);
        // Each holder of a permit and each waiter holds a reference.
        by_user.retain(|_, turns| Arc::strong_count(turns) > 1);
        let turns = by_user
            .entry(uid)
            .or_insert_with(|| Arc::new(Semaphore::new(self.per_user)));
        turns.clone()
    }
}

impl Share {
    /// Waits for a permit of all users.
    pub async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        let users = self.users.clone().acquire_owned();
        let Some(reserved) = &self.reserved else {
            return users.await.ok();
        };
        let turn = tokio::select! {
            biased;
            turn = reserved.clone().acquire_owned() => turn,
            turn = users => turn,
        };
        turn.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn one_user_cannot_take_all_permits() {
        let turns = Turns::new(6, 3);
        let held: Vec<_> = (0..3).map(|_| turns.take(1000).now_or_never().unwrap()).collect();
        assert!(turns.take(1000).now_or_never().is_none());
        assert!(turns.take(1001).now_or_never().is_some());
        drop(held);
        assert!(turns.take(1000).now_or_never().is_some());
    }

    #[tokio::test]
    async fn all_users_together_do_not_block_root() {
        let turns = Turns::new(4, 1);
        let _users = [1000, 1001, 1002].map(|uid| turns.take(uid).now_or_never().unwrap());
        assert!(turns.take(1003).now_or_never().is_none());
        let _root = turns.take(0).now_or_never().unwrap();
        assert!(turns.take(0).now_or_never().is_none());
    }

    #[tokio::test]
    async fn root_takes_free_permits_of_the_users_after_its_own() {
        let turns = Turns::new(4, 5);
        let own = turns.take(0).now_or_never().unwrap();
        let user = turns.take(1000).now_or_never().unwrap();
        let roots = [(); 2].map(|()| turns.take(0).now_or_never().unwrap());
        let mut waits = Box::pin(turns.take(0));
        assert!(waits.as_mut().now_or_never().is_none());
        drop(user);
        let fourth = waits.now_or_never().unwrap();
        assert!(turns.take(1000).now_or_never().is_none());
        drop(own);
        assert!(
            turns.take(1000).now_or_never().is_none(),
            "the permit is reserved"
        );
        assert!(turns.take(0).now_or_never().is_some());
        drop((roots, fourth));
        assert!(turns.take(1000).now_or_never().is_some());
    }

    #[tokio::test]
    async fn users_without_work_are_not_stored() {
        let turns = Turns::new(6, 3);
        drop(turns.take(1000).await);
        drop(turns.take(1001).await);
        assert_eq!(turns.by_user.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_share_without_a_permit_blocks_no_other_user() {
        let turns = Turns::new(1, 1);
        let idle = turns.share(1000).await;
        assert!(turns.share(1000).now_or_never().is_none());
        let other = turns.share(1001).await;
        let turn = other.turn().await.unwrap();
        assert!(idle.turn().now_or_never().is_none());
        drop(turn);
        assert!(idle.turn().now_or_never().is_some());
    }
}
