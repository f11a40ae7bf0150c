//! How many descriptors of other users' processes are looked at, so that nobody makes a look take long.

use std::collections::HashMap;

/// Of one user: those beyond are not seen, so only that user's own images lose the protection of their locks.
const MOST_OF_USER: usize = 64 << 10;
/// Of all users with numbers that no account has traditionally, such as those of containers whose ranges are not known.
const MOST_OF_HIGH: usize = 256 << 10;
const FIRST_HIGH: u32 = 1 << 16;
/// Numbers that are another user's (subuid(5)).
const SUBORDINATES: &str = "/etc/subuid";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Payer {
    User(u32),
    /// All subordinate numbers of the user in that line.
    Subordinates(usize),
}

struct Range {
    first: u32,
    count: u32,
}

/// What is left. Root's processes are not counted.
pub struct Budget {
    ranges: Vec<(Range, Payer)>,
    left: HashMap<Payer, usize>,
    left_of_high: usize,
}

impl Budget {
    /// Reads which numbers are subordinate. Blocks.
    pub fn new() -> Self {
        Self::of(&std::fs::read_to_string(SUBORDINATES).unwrap_or_default())
    }

    /// A line is `USER:FIRST:COUNT`. A user can have several.
    fn of(subordinates: &str) -> Self {
        let mut users = HashMap::new();
        let ranges = subordinates.lines().enumerate().filter_map(|(number, line)| {
            let mut parts = line.trim().splitn(3, ':');
            let user = parts.next()?;
            let range = Range {
                first: parts.next()?.parse().ok()?,
                count: parts.next()?.parse().ok()?,
            };
            Some((range, Payer::Subordinates(*users.entry(user).or_insert(number))))
        });
        Self {
            ranges: ranges.collect(),
            left: HashMap::new(),
            left_of_high: MOST_OF_HIGH,
        }
    }

    /// Whether one more descriptor of this user's may be looked at.
    pub fn take(&mut self, uid: u32) -> bool {
        if uid == 0 {
            return true;
        }
        let mut ranges = self.ranges.iter();
        let range = ranges.find(|(range, _)| uid.checked_sub(range.first).is_some_and(|n| n < range.count));
        let payer = range.map_or(Payer::User(uid), |(_, payer)| *payer);
        let left = self.left.entry(payer).or_insert(MOST_OF_USER);
        let is_high = range.is_none() && uid >= FIRST_HIGH;
        if *left == 0 || (is_high && self.left_of_high == 0) {
            return false;
        }
        *left -= 1;
        self.left_of_high -= usize::from(is_high);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(budget: &mut Budget, users: impl IntoIterator<Item = u32>, each: usize) -> usize {
        let mut taken = 0;
        for uid in users {
            taken += (0..each).filter(|_| budget.take(uid)).count();
        }
        taken
    }

    #[test]
    fn subordinate_numbers_are_one_users() {
        let mut budget = Budget::of("anna:100000:65536\nbob:165536:65536\nanna:300000:10\nnonsense\n");
        assert_eq!(taken(&mut budget, 100_000..165_536, 32), MOST_OF_USER);
        assert!(!budget.take(300_009), "the second range is anna's too");
        assert!(budget.take(165_536) && budget.take(1000) && budget.take(64_055) && budget.take(0));
    }

    #[test]
    fn high_numbers_of_nobody_known_are_bounded_in_sum_and_take_nothing_from_accounts() {
        let mut budget = Budget::of("");
        assert_eq!(taken(&mut budget, 100_000..165_536, 32), MOST_OF_HIGH);
        assert!(!budget.take(200_000));
        assert_eq!(taken(&mut budget, [1000], 2 * MOST_OF_USER), MOST_OF_USER);
        assert_eq!(taken(&mut budget, [0], 2 * MOST_OF_USER), 2 * MOST_OF_USER);
    }
}
