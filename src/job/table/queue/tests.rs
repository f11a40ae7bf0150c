//! Tests of the queue: which backup gets the next place.

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
    assert!(queue.occupied.users.is_empty(), "no user is remembered");
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
    let occupied = &queue.occupied;
    assert_eq!((occupied.root.running, occupied.others.running), (0, 0));
    assert!(occupied.users.is_empty() && occupied.stores.values().all(|counts| *counts == (0, 0)));
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
    let occupied = &queue.occupied;
    assert_eq!((occupied.root.running, occupied.others.running), (0, 0));
    assert!(occupied.users.is_empty() && occupied.stores.values().all(|counts| *counts == (0, 0)));
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
