//! The reservation of a domain for one job, with the quotas that the job takes.

use std::sync::Arc;

use tokio_util::task::task_tracker::TaskTrackerToken;

use super::Jobs;
use super::jobs::Refused;
use super::queue::Ticket;
use crate::activity::Use;
use crate::domain::{Domain, Hold};
use crate::job::Error;
use crate::quota::Share;

/// The right to run the only backup of a domain. Dropping it frees the domain.
#[must_use]
pub struct Reservation {
    jobs: Arc<Jobs>,
    uid: u32,
    /// The domains' unique names. There are two if the domain was renamed while its backup waited, or between two
    /// instances of the service.
    domains: Vec<(String, Hold)>,
    /// The ticket among the running backups.
    pub(in crate::job) ticket: Option<Ticket>,
    kept: Kept,
}

/// A user's shares of the quotas of jobs, and of the caller's descriptors that a backup writes to.
pub type Shares = Arc<(Share, Option<Arc<Share>>)>;

/// The quotas and counters that a job occupies from the call to its end.
pub(in crate::job) struct Kept {
    /// `None` for a job that an earlier instance started: it does not count for the user's quota.
    shares: Option<Shares>,
    /// Keeps the service from exiting when idle.
    _use: Use,
    /// Keeps the service from stopping until the reservation is dropped.
    _token: TaskTrackerToken,
}

impl Reservation {
    /// Wraps a domain that this user already occupies.
    pub(in crate::job) fn new(
        jobs: Arc<Jobs>,
        (domain, uid): ((String, Hold), u32),
        ticket: Option<Ticket>,
        kept: Kept,
    ) -> Self {
        Self {
            jobs,
            uid,
            domains: vec![domain],
            ticket,
            kept,
        }
    }

    /// Returns the shares for work on a thread that storage may block for longer than the job runs.
    pub(in crate::job) fn shares(&self) -> Option<Shares> {
        self.kept.shares.clone()
    }

    /// Occupies another domain too, even if it is busy: it is the same VM under its present name.
    pub(in crate::job) fn add(&mut self, domain: &Arc<Domain>) {
        let name = domain.unique_name();
        if !self.has(&name) {
            self.jobs.lock().busy.begin(&name, self.uid);
            self.domains.push((name, domain.hold()));
        }
    }

    /// Occupies another domain too, unless other work on it runs or comes first.
    pub(in crate::job) fn try_add(&mut self, domain: &Arc<Domain>) -> Result<(), Error> {
        let name = domain.unique_name();
        if !self.has(&name) {
            self.jobs
                .take_place(&name, self.uid)
                .map_err(|refused| refused.of(domain))?;
            self.domains.push((name, domain.hold()));
        }
        Ok(())
    }

    fn has(&self, name: &str) -> bool {
        self.domains.iter().any(|(known, _)| known == name)
    }
}

/// The resources that a job holds during its preparation.
pub trait Held: Send + 'static {
    /// Frees the domain and the place for other jobs. The user's quota stays occupied.
    fn make_room(&mut self) {}
}

impl Held for Reservation {
    fn make_room(&mut self) {
        let domains: Vec<_> = self.domains.drain(..).collect();
        let names = domains.iter().map(|(domain, _hold)| domain.as_str());
        self.jobs.give_back(names, self.uid, self.ticket.take());
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.make_room();
    }
}

impl Jobs {
    /// Occupies the domain for a user, together with the descriptors that the caller passed. Fails at once if the
    /// domain is busy.
    pub fn reserve(
        self: &Arc<Self>,
        domain: &Arc<Domain>,
        uid: u32,
        descriptors: Arc<Share>,
    ) -> Result<Reservation, Error> {
        // Taken before the check, so that a concurrent stop waits for this job.
        let token = self.tasks.token();
        if self.context.stop.is_cancelled() {
            return Err(Error::Stopping);
        }
        let share = self.quota.take(uid, 1)?;
        self.take_place(&domain.unique_name(), uid)
            .map_err(|refused| refused.of(domain))?;
        let kept = self.keep(Some((share, Some(descriptors))), token);
        let place = ((domain.unique_name(), domain.hold()), uid);
        Ok(Reservation::new(self.clone(), place, None, kept))
    }

    pub(in crate::job) fn keep(
        &self,
        shares: Option<(Share, Option<Arc<Share>>)>,
        token: TaskTrackerToken,
    ) -> Kept {
        Kept {
            shares: shares.map(Arc::new),
            _use: self.context.activity.begin(),
            _token: token,
        }
    }

    /// Frees these domains, and the place of a backup that ran.
    pub(in crate::job) fn give_back<'a>(
        self: &Arc<Self>,
        domains: impl Iterator<Item = &'a str>,
        uid: u32,
        ticket: Option<Ticket>,
    ) {
        let mut table = self.lock();
        for domain in domains {
            table.busy.end(domain, uid);
        }
        if let Some(ended) = ticket {
            table.queue.end(ended);
            table.tickets.retain(|_, ticket| *ticket != ended);
        }
        drop(table);
        self.give_places();
        self.freed.notify_waiters();
    }

    fn take_place(&self, domain: &str, uid: u32) -> Result<(), Refused> {
        let mut table = self.lock();
        table.check_place(domain, uid)?;
        table.busy.begin(domain, uid);
        Ok(())
    }
}
