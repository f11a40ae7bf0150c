//! How long nearly all recent writes of a disk took, compared with what is allowed.

use std::collections::VecDeque;

/// So many writes say enough about one in a hundred; older ones do not count.
const ENOUGH: u64 = 200;
/// In intervals: what is older does not count in any case.
const LONGEST: usize = 8;

/// Writes by how long they took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// At most three quarters of what is allowed.
    pub fast: u64,
    /// At most what is allowed.
    pub near: u64,
    pub late: u64,
}

/// How long 99 of 100 writes took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// At most three quarters of what is allowed: the backup may be faster.
    Fast,
    /// At most what is allowed.
    Near,
    Late,
}

/// The writes of the last intervals.
#[derive(Debug, Default)]
pub struct Window(VecDeque<Counts>);

impl Window {
    pub fn push(&mut self, counts: Counts) {
        self.0.truncate(LONGEST - 1);
        self.0.push_front(counts);
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Nothing where nothing was written. It is late only if the newest interval has late writes: those of one moment count
    /// once.
    pub fn level(&self) -> Option<Level> {
        let mut sum = Counts::default();
        for counts in &self.0 {
            sum.fast = sum.fast.saturating_add(counts.fast);
            sum.near = sum.near.saturating_add(counts.near);
            sum.late = sum.late.saturating_add(counts.late);
            if sum.total() >= ENOUGH {
                break;
            }
        }
        let total = sum.total();
        let more_than_one_in_100 = |writes: u64| writes.saturating_mul(100) > total;
        let now = self.0.front().copied().unwrap_or_default();
        match total {
            0 => None,
            _ if now.late > 0 && more_than_one_in_100(sum.late) => Some(Level::Late),
            _ if more_than_one_in_100(sum.late.saturating_add(sum.near)) => Some(Level::Near),
            _ => Some(Level::Fast),
        }
    }
}

impl Counts {
    fn total(&self) -> u64 {
        self.fast.saturating_add(self.near).saturating_add(self.late)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(fast: u64, near: u64, late: u64) -> Counts {
        Counts { fast, near, late }
    }

    fn level(of: &[Counts]) -> Option<Level> {
        let mut window = Window::default();
        of.iter().for_each(|counts| window.push(*counts));
        window.level()
    }

    #[test]
    fn one_late_write_in_a_hundred_is_allowed() {
        assert_eq!(level(&[]), None);
        assert_eq!(level(&[counts(0, 0, 0)]), None);
        assert_eq!(level(&[counts(99, 0, 1)]), Some(Level::Fast));
        assert_eq!(level(&[counts(98, 1, 1)]), Some(Level::Near));
        assert_eq!(level(&[counts(98, 0, 2)]), Some(Level::Late));
        assert_eq!(level(&[counts(0, 0, 1)]), Some(Level::Late));
        assert!(
            level(&[counts(u64::MAX, u64::MAX, u64::MAX)]).is_some(),
            "no overflow"
        );
    }

    #[test]
    fn few_writes_are_judged_with_those_before_them_and_late_ones_count_once() {
        let before = [counts(99, 0, 0), counts(99, 0, 0)];
        assert_eq!(level(&[before[0], before[1], counts(0, 0, 1)]), Some(Level::Fast));
        assert_eq!(
            level(&[before[0], counts(0, 0, 5), counts(10, 0, 0)]),
            Some(Level::Near)
        );
        // Nothing of a time that is past.
        let mut long = vec![counts(0, 0, 100)];
        long.extend([counts(1, 0, 0); LONGEST]);
        assert_eq!(level(&long), Some(Level::Fast));
        assert_eq!(
            level(&[counts(0, 0, 100), counts(ENOUGH, 0, 0)]),
            Some(Level::Fast)
        );
    }

    #[test]
    fn it_takes_no_more_memory_the_longer_it_runs() {
        let mut window = Window::default();
        (0..1000).for_each(|_| window.push(counts(1, 1, 1)));
        assert_eq!(window.0.len(), LONGEST);
        assert!(window.0.capacity() < 64);
    }
}
