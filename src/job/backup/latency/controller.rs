//! Derives the speed of a backup from the latency of the guest's writes: additive increase, multiplicative decrease.
//! Pure.

use std::time::Duration;

use super::window::Level;

/// The lowest and the first speed, in bytes a second for each disk. The lowest makes sure that the backup ends.
const LOWEST: u64 = 1 << 20;
const FIRST: u64 = 16 << 20;
/// More than any device can do, in bytes a second.
const HIGHEST: u64 = 1 << 40;
/// The increase each second, as a part of the speed before the last decrease.
const INCREASE: f64 = 0.16;
/// The speed after a decrease, as a part of the previous speed, and its minimum as a part of the previous limit.
const DECREASE: f64 = 0.7;
const LEAST_DECREASE: f64 = 0.25;

/// Computes the limit of one backup, in bytes a second for all disks together.
#[derive(Debug)]
pub struct Controller {
    limit: u64,
    lowest: u64,
    /// The limit before the last decrease. `None` until writes were late for the first time: until then the limit
    /// doubles.
    before: Option<u64>,
    /// The limit was just lowered. Writes that complete now may have begun before.
    settling: bool,
}

/// The result of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stepped {
    pub lowered: bool,
    /// The writes are late although the limit is the lowest.
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

    /// Evaluates an interval: its duration, the level of the disk with the slowest writes (`None` without writes), and
    /// the bytes copied.
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
            // Something else limits the backup, so a higher limit would have no effect.
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
            // Above the limit before the decrease, nothing is known to be too much, so the steps grow.
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

    /// A device with a fixed capacity in bytes a second: the guest's writes are late while it gets more.
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
    fn the_limit_settles_near_the_capacity_of_the_device() {
        for capacity in [3 * MIB, 20 * MIB, 700 * MIB, 9000 * MIB] {
            let mut device = Device::new(capacity);
            device.run(20);
            let rates = device.run(60);
            assert!(mean(&rates) >= capacity * 8 / 10, "{capacity}: {}", mean(&rates));
        }
    }

    #[test]
    fn the_limit_recovers_when_the_device_does() {
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
    fn the_backup_never_stops() {
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
    fn one_burst_of_late_writes_causes_one_decrease() {
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
        // An interval without writes does not delay the increase.
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
