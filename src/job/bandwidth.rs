//! Divides the bandwidth of a store among the backups that copy into it.
//!
//! Together they never copy more than the store's bandwidth: a backup gets more only after QEMU has confirmed that
//! another one copies less. A backup with a lower limit of its own leaves the rest to the others. Only computes speeds,
//! and sends no command.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Job;
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
    job: Arc<Job>,
    /// The speed that it may use.
    granted: u64,
    /// The speed that QEMU may still use.
    in_qemu: u64,
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
    job: Arc<Job>,
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
        let pool = match &job.plan.destination {
            Destination::Store { name, .. } => self.0.get(name).cloned(),
            Destination::Caller => None,
        };
        let number = pool.as_ref().map_or(0, |pool| pool.add(job, in_qemu(pool.limit)));
        let job = job.clone();
        Part { pool, number, job }
    }
}

impl Part {
    /// Returns the speed that the caller is about to send to QEMU.
    pub fn claim(&self) -> u64 {
        let Some(pool) = &self.pool else {
            return self.job.speed.limits().effective();
        };
        let mut members = pool.lock();
        // The backup's own limit may have changed.
        members.divide(pool.limit);
        let speed = self.job.speed.limits().effective();
        if let Some(member) = members.by_number.get_mut(&self.number) {
            member.in_qemu = member.in_qemu.max(speed);
        }
        speed
    }

    /// Reports that QEMU has confirmed the speed.
    pub fn confirm(&self, speed: u64) {
        if let Some(pool) = &self.pool {
            let mut members = pool.lock();
            if let Some(member) = members.by_number.get_mut(&self.number) {
                member.in_qemu = speed;
            }
            members.divide(pool.limit);
        }
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
    fn add(&self, job: &Arc<Job>, in_qemu: u64) -> u64 {
        let mut members = self.lock();
        members.came += 1;
        let number = members.came;
        let member = Member {
            job: job.clone(),
            granted: 0,
            in_qemu,
        };
        members.by_number.insert(number, member);
        members.divide(self.limit);
        number
    }

    fn lock(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Members {
    /// Lowers speeds at once, and raises them only by what is free.
    fn divide(&mut self, limit: u64) {
        let own: Vec<u64> = self
            .by_number
            .values()
            .map(|member| member.job.speed.limits().without_share())
            .collect();
        let shares = shares(limit, &own);
        for (member, share) in self.by_number.values_mut().zip(&shares) {
            member.granted = member.granted.min(*share);
        }
        let in_use = self
            .by_number
            .values()
            .map(Member::in_use)
            .fold(0, u64::saturating_add);
        let mut free = limit.saturating_sub(in_use);
        for (member, share) in self.by_number.values_mut().zip(&shares) {
            let before = member.in_use();
            member.granted = (*share).min(before.saturating_add(free));
            free -= member.in_use() - before;
            // For QEMU, 0 means unlimited.
            member.job.speed.set_share(member.granted.max(1));
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
}
