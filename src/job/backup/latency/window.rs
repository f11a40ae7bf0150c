//! Compares the latency of nearly all recent writes of a disk with the allowed latency.

use std::collections::VecDeque;

use crate::job::qemu::Counts;

/// This many writes suffice to judge the slowest one in a hundred. Older writes are ignored.
const ENOUGH: u64 = 200;
/// The maximum number of intervals. Older ones are dropped.
const LONGEST: usize = 8;

/// The level that 99 of 100 writes did not exceed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// At most three quarters of the allowed latency: the backup may be faster.
    Fast,
    /// At most the allowed latency.
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

    /// Returns `None` without writes. The level is late only if the newest interval has late writes, so that one burst
    /// counts once.
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
    fn few_writes_are_judged_together_with_earlier_ones_and_late_ones_count_once() {
        let before = [counts(99, 0, 0), counts(99, 0, 0)];
        assert_eq!(level(&[before[0], before[1], counts(0, 0, 1)]), Some(Level::Fast));
        assert_eq!(
            level(&[before[0], counts(0, 0, 5), counts(10, 0, 0)]),
            Some(Level::Near)
        );
        // Late writes of earlier intervals do not count again.
        let mut long = vec![counts(0, 0, 100)];
        long.extend([counts(1, 0, 0); LONGEST]);
        assert_eq!(level(&long), Some(Level::Fast));
        assert_eq!(
            level(&[counts(0, 0, 100), counts(ENOUGH, 0, 0)]),
            Some(Level::Fast)
        );
    }

    #[test]
    fn the_window_has_a_bounded_size() {
        let mut window = Window::default();
        (0..1000).for_each(|_| window.push(counts(1, 1, 1)));
        assert_eq!(window.0.len(), LONGEST);
        assert!(window.0.capacity() < 64);
    }
}
