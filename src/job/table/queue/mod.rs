//! The queue of backups: decides how many run at once, and which one is next. Pure: it starts nothing and waits for
//! nothing.
//!
//! The host, each store and each user have limited places. Root and the other users take turns for a free place. Among
//! the other users, the one with the fewest running backups comes first. A user's own backups keep their order. If none
//! of root's backups runs, one of them may exceed the limits.
//!
//! A backup that crawls while others wait frees its place and continues to run. It still counts for its user.

mod occupied;
#[cfg(test)]
mod tests;

pub use occupied::{Claim, Places};

use std::collections::{HashMap, VecDeque};

use occupied::Occupied;

use super::ROOT;

/// Identifies a waiting or running backup. After a restart of the service a domain can have two running ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

#[derive(Debug)]
struct Waiting {
    ticket: Ticket,
    claim: Claim,
}

#[derive(Debug)]
struct Running {
    claim: Claim,
    /// It runs without a place. The number of such backups is limited to the number of the host's places.
    crawls: bool,
}

/// The running and the waiting backups.
#[derive(Debug)]
pub struct Queue {
    places: Places,
    occupied: Occupied,
    /// In the order of arrival.
    waiting: VecDeque<Waiting>,
    came: u64,
    running: HashMap<Ticket, Running>,
    /// The position of each waiting backup. Any change resets it.
    positions: Option<HashMap<Ticket, u32>>,
}

impl Queue {
    pub fn new(places: Places) -> Self {
        Self {
            places,
            occupied: Occupied::default(),
            waiting: VecDeque::new(),
            came: 0,
            running: HashMap::new(),
            positions: None,
        }
    }

    /// Adds a backup at the end.
    pub fn join(&mut self, claim: Claim) -> Ticket {
        self.positions = None;
        let ticket = self.ticket();
        self.waiting.push_back(Waiting { ticket, claim });
        ticket
    }

    fn ticket(&mut self) -> Ticket {
        self.came += 1;
        Ticket(self.came)
    }

    /// Removes a waiting backup. Returns whether it waited.
    pub fn leave(&mut self, ticket: Ticket) -> bool {
        self.positions = None;
        let before = self.waiting.len();
        self.waiting.retain(|waiting| waiting.ticket != ticket);
        self.forget_users();
        self.waiting.len() < before
    }

    /// Gives a place to the next backup that can have one. `is_free` returns whether the domain of a claim is free for
    /// its user.
    pub fn next(&mut self, is_free: impl Fn(&Claim) -> bool) -> Option<(Ticket, Claim)> {
        let can_start = |waiting: &Waiting| {
            is_free(&waiting.claim)
                && self.occupied.has_place(&waiting.claim, &self.places)
                // Root's backup of a domain comes before another user's.
                && (waiting.claim.uid == ROOT || !self.waits_as_root(&waiting.claim.domain))
        };
        let index = first(
            &self.occupied,
            self.waiting
                .iter()
                .map(|waiting| can_start(waiting).then_some(&waiting.claim)),
        )?;
        let Waiting { ticket, claim } = self.waiting.remove(index)?;
        self.run(ticket, claim.clone());
        Some((ticket, claim))
    }

    /// Adds a backup that already runs.
    pub fn resume(&mut self, claim: Claim) -> Ticket {
        let ticket = self.ticket();
        self.run(ticket, claim);
        ticket
    }

    fn run(&mut self, ticket: Ticket, claim: Claim) {
        self.positions = None;
        self.occupied.take(&claim);
        let running = Running { claim, crawls: false };
        self.running.insert(ticket, running);
    }

    /// Frees the place of a running backup.
    pub fn end(&mut self, ticket: Ticket) {
        let Some(Running { claim, crawls }) = self.running.remove(&ticket) else {
            return;
        };
        self.positions = None;
        match crawls {
            true => self.occupied.give_back_of_user(claim.uid),
            false => self.occupied.give_back(&claim),
        }
        self.forget_users();
    }

    /// Frees the place of a backup that continues to run. Returns whether it had a place.
    pub fn crawl(&mut self, ticket: Ticket) -> bool {
        let crawling = self.running.values().filter(|running| running.crawls).count();
        let Some(running) = self.running.get_mut(&ticket) else {
            return false;
        };
        if running.crawls || crawling >= self.places.host {
            return false;
        }
        running.crawls = true;
        self.positions = None;
        self.occupied.give_place(&running.claim);
        true
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Returns whether a waiting backup of the domain keeps this user from joining. At most one backup of each domain
    /// waits, and one more of root's.
    pub fn blocks(&self, domain: &str, uid: u32) -> bool {
        match uid {
            ROOT => self.waits_as_root(domain),
            _ => self.waiting.iter().any(|waiting| waiting.claim.domain == domain),
        }
    }

    fn waits_as_root(&self, domain: &str) -> bool {
        let mut waiting = self.waiting.iter();
        waiting.any(|waiting| waiting.claim.domain == domain && waiting.claim.uid == ROOT)
    }

    /// Returns the position of a waiting backup in the order in which all would start now; 1 is the next. Later backups
    /// pass one whose store, domain or user has no free place.
    pub fn position(&mut self, ticket: Ticket) -> Option<u32> {
        let (occupied, waiting) = (&self.occupied, &self.waiting);
        let positions = self.positions.get_or_insert_with(|| order(occupied, waiting));
        positions.get(&ticket).copied()
    }

    /// Forgets users without running backups. While backups wait, the last turn of each user decides the order.
    fn forget_users(&mut self) {
        if self.waiting.is_empty() {
            self.occupied.users.retain(|_, share| share.running > 0);
        }
    }
}

/// The positions in the order in which all would start now.
fn order(occupied: &Occupied, waiting: &VecDeque<Waiting>) -> HashMap<Ticket, u32> {
    let mut occupied = occupied.clone();
    let mut waiting: Vec<_> = waiting.iter().collect();
    let mut positions = HashMap::new();
    for position in 1.. {
        let Some(index) = first(&occupied, waiting.iter().map(|waiting| Some(&waiting.claim))) else {
            break;
        };
        let next = waiting.remove(index);
        positions.insert(next.ticket, position);
        occupied.take(&next.claim);
    }
    positions
}

/// Returns the index of the claim with the lowest rank; among equal ranks, the earliest.
fn first<'a>(occupied: &Occupied, claims: impl Iterator<Item = Option<&'a Claim>>) -> Option<usize> {
    let ranked = claims
        .enumerate()
        .filter_map(|(index, claim)| Some((occupied.rank(claim?), index)));
    ranked.min().map(|(_, index)| index)
}
