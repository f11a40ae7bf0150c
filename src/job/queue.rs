//! The queue of backups: decides how many run at once, and which one is next. Pure: it starts nothing and waits for
//! nothing.
//!
//! The host, each store and each user have limited places. Root and the other users take turns for a free place. Among
//! the other users, the one with the fewest running backups comes first. A user's own backups keep their order. If none
//! of root's backups runs, one of them may exceed the limits.
//!
//! A backup that crawls while others wait frees its place and continues to run. It still counts for its user.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::manager::ROOT;
use crate::config::{Config, Limits};

/// How many backups run at once.
#[derive(Debug, Clone)]
pub struct Places {
    host: usize,
    per_user: usize,
    /// The limits of those stores that have one.
    stores: BTreeMap<String, usize>,
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

/// The number of running backups, and a counter value of the last time a place was given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Share {
    running: usize,
    served: u64,
}

/// The occupied places.
#[derive(Debug, Clone, Default)]
struct Taken {
    root: Share,
    /// All users except root together, and each user by uid.
    others: Share,
    users: HashMap<u32, Share>,
    /// For each store: the number of all places, and of root's.
    stores: HashMap<String, (usize, usize)>,
    /// Counts the places given so far.
    given: u64,
}

impl Taken {
    fn user(&self, uid: u32) -> Share {
        self.users.get(&uid).copied().unwrap_or_default()
    }

    fn take(&mut self, claim: &Claim) {
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

    fn give_back(&mut self, claim: &Claim) {
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
    fn give_place(&mut self, claim: &Claim) {
        let of_user = self.user(claim.uid);
        self.give_back(claim);
        self.users.insert(claim.uid, of_user);
    }

    fn give_back_of_user(&mut self, uid: u32) {
        if let Some(share) = self.users.get_mut(&uid) {
            share.running = share.running.saturating_sub(1);
        }
    }

    fn has_place(&self, claim: &Claim, places: &Places) -> bool {
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
    fn rank(&self, claim: &Claim) -> (Share, Share) {
        match claim.uid {
            ROOT => (self.root, Share::default()),
            uid => (self.others, self.user(uid)),
        }
    }
}

/// The running and the waiting backups.
#[derive(Debug)]
pub struct Queue {
    places: Places,
    taken: Taken,
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
            taken: Taken::default(),
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
                && self.taken.has_place(&waiting.claim, &self.places)
                // Root's backup of a domain comes before another user's.
                && (waiting.claim.uid == ROOT || !self.waits_as_root(&waiting.claim.domain))
        };
        let index = first(
            &self.taken,
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
        self.taken.take(&claim);
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
            true => self.taken.give_back_of_user(claim.uid),
            false => self.taken.give_back(&claim),
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
        self.taken.give_place(&running.claim);
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
        let (taken, waiting) = (&self.taken, &self.waiting);
        let positions = self.positions.get_or_insert_with(|| order(taken, waiting));
        positions.get(&ticket).copied()
    }

    /// Forgets users without running backups. While backups wait, the last turn of each user decides the order.
    fn forget_users(&mut self) {
        if self.waiting.is_empty() {
            self.taken.users.retain(|_, share| share.running > 0);
        }
    }
}

/// The positions in the order in which all would start now.
fn order(taken: &Taken, waiting: &VecDeque<Waiting>) -> HashMap<Ticket, u32> {
    let mut taken = taken.clone();
    let mut waiting: Vec<_> = waiting.iter().collect();
    let mut positions = HashMap::new();
    for position in 1.. {
        let Some(index) = first(&taken, waiting.iter().map(|waiting| Some(&waiting.claim))) else {
            break;
        };
        let next = waiting.remove(index);
        positions.insert(next.ticket, position);
        taken.take(&next.claim);
    }
    positions
}

/// Returns the index of the claim with the lowest rank; among equal ranks, the earliest.
fn first<'a>(taken: &Taken, claims: impl Iterator<Item = Option<&'a Claim>>) -> Option<usize> {
    let ranked = claims
        .enumerate()
        .filter_map(|(index, claim)| Some((taken.rank(claim?), index)));
    ranked.min().map(|(_, index)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(host: usize, per_user: usize, stores: &[(&str, usize)]) -> Queue {
        let stores = stores.iter().map(|(name, limit)| ((*name).to_owned(), *limit));
        Queue::new(Places {
            host,
            per_user,
            stores: stores.collect(),
        })
    }

    fn claim(uid: u32, domain: &str, store: &str) -> Claim {
        Claim {
            uid,
            domain: domain.to_owned(),
            store: Some(store.to_owned()),
        }
    }

    /// Starts all backups that can start now, and returns them in order.
    fn start(queue: &mut Queue) -> Vec<Claim> {
        std::iter::from_fn(|| Some(queue.next(|_| true)?.1)).collect()
    }

    /// Returns the ticket of the domain's running backup.
    fn running(queue: &Queue, domain: &str) -> Option<Ticket> {
        let mut running = queue.running.iter();
        let (ticket, _) = running.find(|(_, running)| running.claim.domain == domain)?;
        Some(*ticket)
    }

    fn end(queue: &mut Queue, domain: &str) {
        let ticket = running(queue, domain).unwrap();
        queue.end(ticket);
    }

    fn crawl(queue: &mut Queue, domain: &str) -> bool {
        running(queue, domain).is_some_and(|ticket| queue.crawl(ticket))
    }

    fn domains(claims: &[Claim]) -> String {
        claims
            .iter()
            .map(|claim| claim.domain.as_str())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn users_take_turns_regardless_of_earlier_backups() {
        let mut queue = queue(1, 1, &[]);
        for domain in ["a1", "a2", "a3", "a4"] {
            queue.join(claim(1000, domain, "s"));
        }
        for domain in ["b1", "b2"] {
            queue.join(claim(1001, domain, "s"));
        }
        queue.join(claim(1002, "c1", "s"));
        let mut order = Vec::new();
        loop {
            let started = start(&mut queue);
            let [one] = started.as_slice() else { break };
            order.push(one.clone());
            end(&mut queue, &one.domain);
        }
        assert_eq!(domains(&order), "a1 b1 c1 a2 b2 a3 a4");
        assert!(queue.taken.users.is_empty(), "no user is remembered");
    }

    #[test]
    fn a_user_that_queues_again_and_again_delays_no_other() {
        let mut queue = queue(1, 1, &[]);
        queue.join(claim(1000, "a1", "s"));
        queue.join(claim(1000, "a2", "s"));
        queue.join(claim(1001, "b", "s"));
        let mut order = Vec::new();
        for uid in [1002, 1001, 1002, 1001] {
            queue.join(claim(uid, "again", "s"));
            let started = start(&mut queue);
            end(&mut queue, &started[0].domain);
            order.extend(started);
        }
        assert_eq!(domains(&order), "a1 b again a2");
    }

    #[test]
    fn root_gets_every_second_place_and_one_beyond_the_limits() {
        let mut queue = queue(2, 2, &[]);
        for uid in 1000..1006 {
            queue.join(claim(uid, &format!("u{uid}"), "s"));
        }
        assert_eq!(domains(&start(&mut queue)), "u1000 u1001");
        for domain in ["r1", "r2", "r3"] {
            queue.join(claim(ROOT, domain, "s"));
        }
        assert_eq!(domains(&start(&mut queue)), "r1", "beside the users'");
        end(&mut queue, "u1000");
        assert_eq!(domains(&start(&mut queue)), "", "two run");
        end(&mut queue, "r1");
        assert_eq!(domains(&start(&mut queue)), "r2");
        end(&mut queue, "u1001");
        assert_eq!(
            domains(&start(&mut queue)),
            "u1002",
            "a backup of root already runs"
        );
        end(&mut queue, "r2");
        assert_eq!(domains(&start(&mut queue)), "r3");
    }

    #[test]
    fn users_and_stores_never_exceed_their_limits() {
        let mut queue = queue(8, 3, &[("slow", 1)]);
        for domain in ["a1", "a2"] {
            queue.join(claim(1000, domain, "slow"));
        }
        for domain in ["a3", "a4", "a5"] {
            queue.join(claim(1000, domain, "s"));
        }
        queue.join(claim(1001, "b1", "slow"));
        assert_eq!(domains(&start(&mut queue)), "a1 a3 a4");
        end(&mut queue, "a1");
        assert_eq!(domains(&start(&mut queue)), "b1 a5");
        queue.join(claim(ROOT, "r1", "slow"));
        assert_eq!(
            domains(&start(&mut queue)),
            "r1",
            "one of root's runs beyond the limit"
        );
        end(&mut queue, "b1");
        assert_eq!(domains(&start(&mut queue)), "", "the store has root's");
        end(&mut queue, "r1");
        assert_eq!(domains(&start(&mut queue)), "", "the user has its two others");
        end(&mut queue, "a3");
        assert_eq!(domains(&start(&mut queue)), "a2");
    }

    #[test]
    fn a_backup_that_crawls_gives_its_place_to_others_and_counts_for_its_user() {
        let mut queue = queue(2, 1, &[("s", 2)]);
        queue.join(claim(1000, "a", "s"));
        queue.join(claim(1001, "b", "s"));
        assert_eq!(domains(&start(&mut queue)), "a b");
        queue.join(claim(1000, "a2", "s"));
        queue.join(claim(1002, "c", "s"));
        queue.join(claim(ROOT, "r1", "s"));
        queue.join(claim(ROOT, "r2", "s"));
        assert_eq!(domains(&start(&mut queue)), "r1");
        assert!(crawl(&mut queue, "a") && !crawl(&mut queue, "a") && !crawl(&mut queue, "c"));
        assert_eq!(domains(&start(&mut queue)), "", "root's has the place");
        assert!(crawl(&mut queue, "b"));
        assert_eq!(domains(&start(&mut queue)), "c");
        assert!(!crawl(&mut queue, "r1"), "not more than the host has places");
        end(&mut queue, "a");
        assert!(crawl(&mut queue, "r1"));
        assert_eq!(domains(&start(&mut queue)), "r2");
        end(&mut queue, "c");
        assert_eq!(
            domains(&start(&mut queue)),
            "a2",
            "the first of its user has ended"
        );
        for domain in ["r1", "r2", "b", "a2"] {
            end(&mut queue, domain);
        }
        let taken = &queue.taken;
        assert_eq!((taken.root.running, taken.others.running), (0, 0));
        assert!(taken.users.is_empty() && taken.stores.values().all(|counts| *counts == (0, 0)));
    }

    #[test]
    fn two_running_backups_of_one_domain_count_separately() {
        let mut queue = queue(2, 2, &[("s", 2)]);
        let first = queue.resume(claim(1000, "web", "s"));
        let second = queue.resume(claim(ROOT, "web", "other"));
        assert!(queue.crawl(first));
        for ticket in [second, first, first] {
            queue.end(ticket);
        }
        let taken = &queue.taken;
        assert_eq!((taken.root.running, taken.others.running), (0, 0));
        assert!(taken.users.is_empty() && taken.stores.values().all(|counts| *counts == (0, 0)));
    }

    #[test]
    fn a_domain_runs_one_backup_at_a_time_and_roots_comes_first() {
        let mut queue = queue(4, 4, &[]);
        queue.join(claim(1000, "web", "s"));
        assert!(queue.blocks("web", 1000) && queue.blocks("web", 1001));
        assert!(!queue.blocks("web", ROOT) && !queue.blocks("db", 1000));
        queue.join(claim(ROOT, "web", "s"));
        assert!(queue.blocks("web", ROOT));
        assert_eq!(queue.next(|_| false), None);
        let (_, first) = queue.next(|_| true).unwrap();
        assert_eq!(first.uid, ROOT);
        assert_eq!(
            queue.next(|claim| claim.domain != "web"),
            None,
            "the domain is busy"
        );
        end(&mut queue, &first.domain);
        assert_eq!(queue.next(|_| true).unwrap().1.uid, 1000);
    }

    #[test]
    fn positions_are_the_order_of_starts() {
        let mut queue = queue(1, 1, &[]);
        queue.join(claim(1000, "a1", "s"));
        assert_eq!(domains(&start(&mut queue)), "a1");
        let tickets: Vec<_> = [
            (1000, "a2"),
            (1000, "a3"),
            (1001, "b1"),
            (ROOT, "r1"),
            (ROOT, "r2"),
        ]
        .into_iter()
        .map(|(uid, domain)| (queue.join(claim(uid, domain, "s")), domain))
        .collect();
        let mut order: Vec<_> = tickets
            .iter()
            .map(|(ticket, domain)| (queue.position(*ticket).unwrap(), *domain))
            .collect();
        order.sort_unstable();
        assert_eq!(order, [(1, "r1"), (2, "b1"), (3, "r2"), (4, "a2"), (5, "a3")]);
        queue.leave(tickets[2].0);
        assert_eq!(queue.position(tickets[2].0), None);
        assert_eq!(queue.position(tickets[0].0), Some(2));
    }
}
