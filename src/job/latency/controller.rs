//! The speed that follows from how long the guest's writes take: additive increase, multiplicative decrease. Pure.

use std::time::Duration;

use super::window::Level;

/// In bytes a second and disk: the lowest speed, so that a backup ends whatever the guest does; and the first one.
const LOWEST: u64 = 1 << 20;
const FIRST: u64 = 16 << 20;
/// More than any device can do, in bytes a second.
const HIGHEST: u64 = 1 << 40;
/// Of the speed before the last decrease, so much is added in a second.
const INCREASE: f64 = 0.16;
/// Of the speed, so much is left after a decrease; and at least so much of the limit, whatever was copied.
const DECREASE: f64 = 0.7;
const LEAST_DECREASE: f64 = 0.25;

/// Sets the limit of one backup, all its disks together, in bytes a second.
#[derive(Debug)]
pub struct Controller {
    limit: u64,
    lowest: u64,
    /// The limit before the last decrease; nothing until the writes have been late once. Until then the limit doubles.
    before: Option<u64>,
    /// Writes that end now may have begun under the former limit.
    settling: bool,
}

/// What came of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stepped {
    pub lowered: bool,
    /// The writes are late, and the limit is the lowest already.
    pub is_hopeless: bool,
}

impl Controller {
    pub fn new(disks: usize) -> Self {
        let disks = disks.max(1) as u64;
        Self {
            limit: FIRST * disks,
            lowest: LOWEST * disks,
            before: None,
            settling: false,
        }
    }

    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Takes in how an interval was: how long it took, what the disk with the slowest writes says, if anything was written, and
    /// how many bytes were copied.
    pub fn step(&mut self, elapsed: Duration, level: Option<Level>, copied: u64) -> Stepped {
        let seconds = elapsed.as_secs_f64().max(0.001);
        let rate = copied as f64 / seconds;
        let settling = std::mem::take(&mut self.settling);
        let mut stepped = Stepped {
            lowered: false,
            is_hopeless: level == Some(Level::Late) && self.limit == self.lowest,
        };
        match level {
            Some(Level::Late) if !settling && self.limit > self.lowest => {
                self.decrease(rate);
                stepped.lowered = true;
            }
            Some(Level::Late | Level::Near) => {}
            // Where something else keeps the backup slower, a higher limit says nothing.
            Some(Level::Fast) | None if rate * 2.0 < self.limit as f64 => {}
            Some(Level::Fast) | None => self.increase(seconds),
        }
        stepped
    }

    fn decrease(&mut self, rate: f64) {
        let limit = self.limit as f64;
        let next = (limit.min(rate) * DECREASE).max(limit * LEAST_DECREASE);
        self.before = Some(self.limit);
        self.limit = (next as u64).max(self.lowest);
        self.settling = true;
    }

    fn increase(&mut self, seconds: f64) {
        let more = match self.before {
            None => self.limit,
            // From above that on it is not known to be too much.
            Some(before) => (before.max(self.limit) as f64 * (INCREASE * seconds).min(1.0)) as u64,
        };
        self.limit = self.limit.saturating_add(more.max(1)).min(HIGHEST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const STEP: Duration = Duration::from_millis(250);

    /// A device that takes so many bytes a second, and is late with the guest's writes while it is given more.
    struct Device {
        controller: Controller,
        capacity: u64,
        level: Option<Level>,
    }

    impl Device {
        fn new(capacity: u64) -> Self {
            Self {
                controller: Controller::new(1),
                capacity,
                level: None,
            }
        }

        /// Returns the rate of each interval.
        fn run(&mut self, seconds: u64) -> Vec<u64> {
            let intervals = seconds * 4;
            let step = |_| {
                let limit = self.controller.limit();
                self.level = Some(match limit {
                    limit if limit > self.capacity => Level::Late,
                    limit if limit > self.capacity * 19 / 20 => Level::Near,
                    _ => Level::Fast,
                });
                let rate = limit.min(self.capacity);
                self.controller.step(STEP, self.level, rate / 4);
                rate
            };
            (0..intervals).map(step).collect()
        }
    }

    fn mean(rates: &[u64]) -> u64 {
        rates.iter().sum::<u64>() / rates.len() as u64
    }

    #[test]
    fn it_settles_near_what_the_device_takes() {
        for capacity in [3 * MIB, 20 * MIB, 700 * MIB, 9000 * MIB] {
            let mut device = Device::new(capacity);
            device.run(20);
            let rates = device.run(60);
            assert!(mean(&rates) >= capacity * 8 / 10, "{capacity}: {}", mean(&rates));
        }
    }

    #[test]
    fn it_recovers_when_the_device_does() {
        let mut device = Device::new(400 * MIB);
        device.run(20);
        device.capacity = 5 * MIB;
        let rates = device.run(20);
        assert!(rates[40..].iter().all(|rate| *rate <= 5 * MIB));
        device.capacity = 400 * MIB;
        device.run(40);
        assert!(mean(&device.run(10)) >= 300 * MIB);
    }

    #[test]
    fn it_never_stands_still() {
        for disks in [0, 1, 7] {
            let mut controller = Controller::new(disks);
            for _ in 0..1000 {
                controller.step(STEP, Some(Level::Late), 0);
                assert!(controller.limit() >= MIB * disks.max(1) as u64);
            }
            assert_eq!(controller.limit(), MIB * disks.max(1) as u64);
            let stepped = controller.step(STEP, Some(Level::Late), 0);
            assert_eq!((stepped.lowered, stepped.is_hopeless), (false, true));
        }
    }

    #[test]
    fn one_bad_moment_costs_one_decrease() {
        let mut controller = Controller::new(1);
        let late = Some(Level::Late);
        assert!(controller.step(STEP, late, 4 * MIB).lowered);
        assert!(!controller.step(STEP, late, 4 * MIB).lowered);
        assert!(controller.step(STEP, late, 4 * MIB).lowered);
        assert!(controller.limit() < FIRST * 6 / 10 && controller.limit() > FIRST * 4 / 10);
    }

    #[test]
    fn a_limit_that_is_not_used_does_not_grow() {
        let mut controller = Controller::new(1);
        for level in [None, Some(Level::Fast), Some(Level::Near)] {
            for _ in 0..100 {
                controller.step(STEP, level, 1);
            }
            assert_eq!(controller.limit(), FIRST);
        }
        // Nothing written is no reason to wait.
        controller.step(STEP, None, FIRST / 4);
        assert_eq!(controller.limit(), 2 * FIRST);
        for _ in 0..1000 {
            controller.step(STEP, None, u64::MAX);
        }
        assert_eq!(controller.limit(), HIGHEST);
        controller.step(Duration::ZERO, Some(Level::Late), 0);
        assert_eq!(controller.limit(), HIGHEST / 4);
    }
}
