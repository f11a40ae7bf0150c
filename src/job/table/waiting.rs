//! The backups that wait for a place: how one joins the queue, gets its place, or leaves.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::jobs::{Place, Refused, Table};
use super::queue::{Claim, Ticket};
use super::reservation::{Kept, Reservation};
use super::{Jobs, ROOT};
use crate::activity::Use;
use crate::domain::Domain;
use crate::job::Error;
use crate::plan::{Destination, Plan};
use crate::quota::Share;

/// The result of [`Jobs::enter`].
pub enum Entered {
    Now(Reservation),
    Later(InLine),
}

/// A backup in the queue. Dropping it removes the backup from the queue.
#[must_use]
pub struct InLine {
    jobs: Arc<Jobs>,
    pub(in crate::job) ticket: Ticket,
    place: oneshot::Receiver<Place>,
    kept: Option<Kept>,
    /// Present if a restart of the service would abort the backup, because the service holds the caller's files.
    _at_stake: Option<Use>,
}

impl Drop for InLine {
    fn drop(&mut self) {
        let mut table = self.jobs.lock();
        // Otherwise the backup has got its place already.
        if table.queue.leave(self.ticket) {
            table.tickets.retain(|_, ticket| *ticket != self.ticket);
        }
        let waiting = table.waiting.remove(&self.ticket);
        drop(table);
        drop(waiting);
        // A waiting backup of root's may have blocked another user's backup of the same domain.
        self.jobs.give_places();
    }
}

impl InLine {
    /// Waits for the place.
    pub(in crate::job) async fn reserve(mut self, domain: &Arc<Domain>) -> Option<Reservation> {
        let place = (&mut self.place).await.ok()?;
        self.into_reservation(place, domain)
    }

    fn into_reservation(mut self, mut place: Place, domain: &Arc<Domain>) -> Option<Reservation> {
        let kept = self.kept.take()?;
        let (ticket, claim) = place.held.take()?;
        let held = ((claim.domain, domain.hold()), claim.uid);
        Some(Reservation::new(self.jobs.clone(), held, Some(ticket), kept))
    }
}

impl Claim {
    /// `store` is the store of the targets, if they are in one.
    pub fn new(uid: u32, domain: &Domain, store: Option<&str>) -> Self {
        Self {
            uid,
            domain: domain.unique_name(),
            store: store.map(str::to_owned),
        }
    }

    pub(in crate::job) fn of(uid: u32, domain: &Domain, plan: &Plan) -> Self {
        match &plan.destination {
            Destination::Store { name, .. } => Self::new(uid, domain, Some(name)),
            Destination::Caller => Self::new(uid, domain, None),
        }
    }
}

impl Jobs {
    /// Occupies the domain and a place among the running backups, or else joins the queue. Fails at once if the domain
    /// accepts no further backup.
    pub fn enter(
        self: &Arc<Self>,
        domain: &Arc<Domain>,
        claim: Claim,
        descriptors: Arc<Share>,
        passes_files: bool,
    ) -> Result<Entered, Error> {
        // Taken before the check, so that a concurrent stop waits for this backup.
        let token = self.tasks.token();
        if self.context.stop.is_cancelled() {
            return Err(Error::Stopping);
        }
        let share = self.quota.take(claim.uid, 1)?;
        let kept = self.keep(Some((share, Some(descriptors))), token);
        let mut table = self.lock();
        // Checking and joining need the same lock, so that only one of two concurrent calls succeeds.
        let free = match table.queue.blocks(&claim.domain, claim.uid) {
            true => Err(Refused::Taken),
            false => table.check_place(&claim.domain, claim.uid),
        };
        free.map_err(|refused| refused.of(domain))?;
        let mut line = self.line_up(&mut table, claim, kept, passes_files);
        drop(table);
        self.give_places();
        match line.place.try_recv() {
            Ok(place) => {
                let reservation = line.into_reservation(place, domain);
                reservation.map(Entered::Now).ok_or(Error::Stopping)
            }
            Err(_) => {
                self.watch_crawling();
                Ok(Entered::Later(line))
            }
        }
    }

    pub(in crate::job) fn line_up(
        self: &Arc<Self>,
        table: &mut Table,
        claim: Claim,
        kept: Kept,
        passes_files: bool,
    ) -> InLine {
        let (sender, place) = oneshot::channel();
        if claim.uid == ROOT {
            table.busy.is_here(&claim.domain);
        }
        let ticket = table.queue.join(claim);
        table.waiting.insert(ticket, sender);
        InLine {
            jobs: self.clone(),
            ticket,
            place,
            kept: Some(kept),
            _at_stake: passes_files.then(|| self.context.at_stake.begin()),
        }
    }

    /// Gives all free places to the next backups.
    pub(in crate::job) fn give_places(self: &Arc<Self>) {
        let mut given = Vec::new();
        let mut guard = self.lock();
        let Table {
            queue, busy, waiting, ..
        } = &mut *guard;
        while let Some((ticket, claim)) = queue.next(|claim| busy.is_free_for(&claim.domain, claim.uid)) {
            busy.begin(&claim.domain, claim.uid);
            let place = Place {
                jobs: self.clone(),
                held: Some((ticket, claim)),
            };
            given.push((waiting.remove(&ticket), place));
        }
        drop(guard);
        for (waiting, place) in given {
            // Dropping an unclaimed place takes the lock again, so the guard is dropped before.
            drop(waiting.map(|waiting| waiting.send(place)));
        }
    }

    /// Stops starting queued backups, and ends all waiting for their start: the service is about to stop.
    pub fn close_queue(&self) {
        self.closed.cancel();
    }

    /// Waits for [`Jobs::close_queue`].
    pub async fn queue_is_closed(&self) {
        self.closed.cancelled().await;
    }

    /// Returns the position of a job in the queue, from 1 on; 0 if it does not wait.
    pub fn position(&self, id: u32) -> u32 {
        let mut table = self.lock();
        let ticket = table.tickets.get(&id).copied();
        ticket
            .and_then(|ticket| table.queue.position(ticket))
            .unwrap_or(0)
    }
}
