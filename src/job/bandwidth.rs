//! Divides the bandwidth of a store among the backups that copy into it.
//!
//! Together they never copy more than the store's bandwidth: a backup gets more only after QEMU has confirmed that
//! another one copies less. A backup with a lower limit of its own leaves the rest to the others. An ended backup that
//! QEMU may still copy has no share. Only computes speeds, and sends no command.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Job;
use super::speed::Speed;
use crate::config::Store;
use crate::plan::Destination;

/// The stores that have a limit.
#[derive(Debug)]
pub struct Bandwidth(BTreeMap<String, Arc<Pool>>);

#[derive(Debug)]
struct Pool {
    /// Bytes a second.
    limit: u64,
    members: Mutex<Members>,
}

#[derive(Debug, Default)]
struct Members {
    came: u64,
    by_number: BTreeMap<u64, Member>,
}

/// A backup that copies, or is about to.
#[derive(Debug)]
struct Member {
    speed: Arc<Speed>,
    /// The speed that it may use.
    granted: u64,
    /// The speed that QEMU may still use; 0 while QEMU cannot copy.
    in_qemu: u64,
    /// The job has failed or was cancelled. Nothing raises its speed.
    ended: bool,
}

impl Member {
    fn in_use(&self) -> u64 {
        self.granted.max(self.in_qemu)
    }
}

/// A backup's part of the bandwidth. The owner drops it, which returns it, only after QEMU has stopped copying.
#[derive(Debug)]
pub struct Part {
    pool: Option<Arc<Pool>>,
    number: u64,
    speed: Arc<Speed>,
}

impl Bandwidth {
    pub fn of(stores: &BTreeMap<String, Store>) -> Self {
        let limited = stores.iter().filter_map(|(name, store)| {
            let pool = Pool {
                limit: store.bandwidth?.get(),
                members: Mutex::default(),
            };
            Some((name.clone(), Arc::new(pool)))
        });
        Self(limited.collect())
    }

    /// Adds a backup that has not begun to copy.
    pub fn join(&self, job: &Arc<Job>) -> Part {
        self.add(job, |_| 0)
    }

    /// Adds a backup that an earlier instance began. Until QEMU has confirmed another speed, the backup may copy with
    /// the store's whole bandwidth.
    pub fn resume(&self, job: &Arc<Job>) -> Part {
        self.add(job, |limit| limit)
    }

    fn add(&self, job: &Arc<Job>, in_qemu: impl FnOnce(u64) -> u64) -> Part {
        let pool = match job.plan().map(|plan| &plan.destination) {
            Some(Destination::Store { name, .. }) => self.0.get(name).cloned(),
            Some(Destination::Caller) | None => None,
        };
        match pool {
            Some(pool) => {
                let in_qemu = in_qemu(pool.limit);
                pool.add(&job.speed, in_qemu)
            }
            None => Part {
                pool: None,
                number: 0,
                speed: job.speed.clone(),
            },
        }
    }
}

impl Part {
    /// Returns the speed that the caller is about to send to QEMU.
    pub fn claim(&self) -> u64 {
        let Some(pool) = &self.pool else {
            return self.speed.limits().effective();
        };
        let mut members = pool.lock();
        // The backup's own limit may have changed.
        members.divide(pool.limit);
        let speed = self.speed.limits().effective();
        if let Some(member) = members.by_number.get_mut(&self.number) {
            member.in_qemu = member.in_qemu.max(speed);
        }
        speed
    }

    /// Reports that QEMU has confirmed the speed; 0: QEMU has refused to copy.
    pub fn confirm(&self, speed: u64) {
        if let Some(pool) = &self.pool {
            let mut members = pool.lock();
            if let Some(member) = members.by_number.get_mut(&self.number) {
                member.in_qemu = speed;
            }
            members.divide(pool.limit);
        }
    }

    /// Returns false if QEMU was never sent a speed, or has refused to copy.
    pub fn may_be_in_use(&self) -> bool {
        let Some(pool) = &self.pool else { return true };
        let members = pool.lock();
        members
            .by_number
            .get(&self.number)
            .is_some_and(|member| member.in_qemu != 0)
    }

    /// Ends the backup's share, because its job has failed or was cancelled. Returns the part that QEMU may still use.
    /// `None` if QEMU was never sent a speed, or has refused it.
    pub fn end(self) -> Option<Self> {
        let in_qemu = {
            let mut members = self.pool.as_ref()?.lock();
            let member = members.by_number.get_mut(&self.number)?;
            (member.ended, member.granted) = (true, 0);
            member.in_qemu
        };
        if in_qemu == 0 {
            return None;
        }
        if let Some(pool) = &self.pool {
            pool.lock().divide(pool.limit);
        }
        Some(self)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            let mut members = pool.lock();
            members.by_number.remove(&self.number);
            members.divide(pool.limit);
        }
    }
}

impl Pool {
    fn add(self: Arc<Self>, speed: &Arc<Speed>, in_qemu: u64) -> Part {
        let mut members = self.lock();
        members.came += 1;
        let number = members.came;
        let member = Member {
            speed: speed.clone(),
            granted: 0,
            in_qemu,
            ended: false,
        };
        members.by_number.insert(number, member);
        members.divide(self.limit);
        drop(members);
        Part {
            pool: Some(self),
            number,
            speed: speed.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Members {
    /// Lowers speeds at once, and raises them only by what is free.
    ///
    /// All ended backups together count for at most half of the bandwidth. A user's own "QEMU" can let any number of
    /// backups fail and never stop them, and ended jobs are not limited by `jobs-at-once-per-user`.
    fn divide(&mut self, limit: u64) {
        let ended = self.by_number.values().filter(|member| member.ended);
        let ended = ended.map(|member| member.in_qemu).fold(0, u64::saturating_add);
        let limit = limit - ended.min(limit / 2);
        let mut members: Vec<&mut Member> = self
            .by_number
            .values_mut()
            .filter(|member| !member.ended)
            .collect();
        let own: Vec<u64> = members
            .iter()
            .map(|member| member.speed.limits().without_share())
            .collect();
        let shares = shares(limit, &own);
        for (member, share) in members.iter_mut().zip(&shares) {
            member.granted = member.granted.min(*share);
        }
        let in_use = members
            .iter()
            .map(|member| member.in_use())
            .fold(0, u64::saturating_add);
        let mut free = limit.saturating_sub(in_use);
        for (member, share) in members.iter_mut().zip(&shares) {
            let before = member.in_use();
            member.granted = (*share).min(before.saturating_add(free));
            free -= member.in_use() - before;
            // For QEMU, 0 means unlimited.
            member.speed.set_share(member.granted.max(1));
        }
    }
}

/// Returns the share of each backup, given the backups' own limits; 0 means no own limit.
fn shares(limit: u64, own: &[u64]) -> Vec<u64> {
    let bound = |own: u64| if own == 0 { u64::MAX } else { own };
    let mut order: Vec<usize> = (0..own.len()).collect();
    order.sort_by_key(|index| bound(own[*index]));
    let mut shares = vec![0; own.len()];
    let mut rest = limit;
    for (done, index) in order.into_iter().enumerate() {
        let fair = rest / (own.len() - done) as u64;
        shares[index] = fair.min(bound(own[index]));
        rest -= shares[index];
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_with_a_low_limit_leaves_the_rest_to_the_others() {
        assert_eq!(shares(100, &[]), [0; 0]);
        assert_eq!(shares(100, &[0]), [100]);
        assert_eq!(shares(100, &[0, 0, 0]), [33, 33, 34]);
        assert_eq!(shares(100, &[0, 10, 0]), [45, 10, 45]);
        assert_eq!(shares(100, &[60, 10, 0]), [45, 10, 45]);
        assert_eq!(shares(100, &[30, 10, 0]), [30, 10, 60]);
        assert_eq!(shares(100, &[200]), [100]);
        assert_eq!(shares(1, &[0, 0]), [0, 1]);
    }

    /// A backup of which QEMU has confirmed the speed that it may use.
    fn copying(pool: &Arc<Pool>) -> Part {
        let part = pool.clone().add(&Arc::new(Speed::new(0)), 0);
        settle(&[&part]);
        part
    }

    /// Sends the present speeds to QEMU, which confirms them.
    fn settle(parts: &[&Part]) {
        // The first round lowers speeds, and the second raises others.
        for _ in 0..2 {
            for part in parts {
                part.confirm(part.claim());
            }
        }
    }

    fn share(part: &Part) -> u64 {
        part.speed.limits().share
    }

    fn pool() -> Arc<Pool> {
        Arc::new(Pool {
            limit: 100,
            members: Mutex::default(),
        })
    }

    #[test]
    fn a_backup_that_fails_before_it_copies_gives_its_part_back_at_once() {
        let pool = pool();
        let first = copying(&pool);
        let waiting = pool.clone().add(&Arc::new(Speed::new(0)), 0);
        settle(&[&first]);
        assert_eq!((share(&first), share(&waiting)), (50, 50));
        assert!(!waiting.may_be_in_use());
        assert!(waiting.end().is_none());
        assert_eq!(share(&first), 100);
        // The same if QEMU refused the transaction.
        let refused = pool.clone().add(&Arc::new(Speed::new(0)), 0);
        settle(&[&first]);
        assert_eq!(refused.claim(), 50);
        assert!(refused.may_be_in_use());
        refused.confirm(0);
        assert!(!refused.may_be_in_use());
        assert!(refused.end().is_none());
        assert_eq!(share(&first), 100);
    }

    #[test]
    fn an_ended_backup_counts_with_the_speed_that_qemu_may_still_use() {
        let pool = pool();
        let first = copying(&pool);
        let (second, third) = (copying(&pool), copying(&pool));
        settle(&[&first, &second, &third]);
        let speeds = [&first, &second, &third].map(share);
        assert_eq!(speeds.iter().sum::<u64>(), 100);
        let ended = second.end().expect("QEMU may still copy");
        let left = speeds[1];
        settle(&[&first, &third]);
        assert_eq!(share(&first) + share(&third) + left, 100);
        // Not raised when another backup leaves.
        drop(third);
        assert_eq!((share(&first), share(&ended)), (100 - left, left));
        drop(ended);
        assert_eq!(share(&first), 100);
    }

    #[test]
    fn all_ended_backups_together_take_at_most_half() {
        let pool = pool();
        // QEMU may still use the whole bandwidth for each.
        let resume = || pool.clone().add(&Arc::new(Speed::new(0)), 100);
        let ended: Vec<Part> = (0..5).filter_map(|_| resume().end()).collect();
        assert_eq!(ended.len(), 5);
        let running = copying(&pool);
        assert_eq!(share(&running), 50);
        let another = copying(&pool);
        settle(&[&running, &another]);
        assert_eq!((share(&running), share(&another)), (25, 25));
        drop(ended);
        assert_eq!((share(&running), share(&another)), (50, 50));
    }
}
