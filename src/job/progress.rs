//! Measures the rate of a job and estimates its end, smoothed over the last seconds.

use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

/// The time constant of the smoothing.
const MEMORY: Duration = Duration::from_secs(5);

/// Tracks the number of bytes done over time.
#[derive(Debug)]
pub struct Meter {
    first: Option<Instant>,
    last: Option<(Instant, u64)>,
    rate: Option<f64>,
}

impl Meter {
    pub fn new() -> Self {
        Self {
            first: None,
            last: None,
            rate: None,
        }
    }

    /// Adds a measurement. Returns the rate in bytes a second.
    pub fn measure(&mut self, now: Instant, done: u64) -> u64 {
        if let Some((then, before)) = self.last {
            let seconds = now.duration_since(then).as_secs_f64();
            if seconds <= 0.0 {
                return self.rate();
            }
            let current = done.saturating_sub(before) as f64 / seconds;
            // Until the measurements span this time, use their plain average.
            let past = now.duration_since(*self.first.get_or_insert(then)).as_secs_f64();
            let weight = (1.0 - (-seconds / MEMORY.as_secs_f64()).exp()).max(seconds / past);
            self.rate = Some(self.rate.map_or(current, |rate| rate + weight * (current - rate)));
        }
        self.last = Some((now, done));
        self.rate()
    }

    /// Estimates when `remaining` bytes will be done at this rate; `None` without progress.
    pub fn expected_end(&self, now: Timestamp, remaining: u64) -> Option<Timestamp> {
        let rate = self.rate.filter(|rate| *rate >= 1.0)?;
        let left = SignedDuration::try_from_secs_f64(remaining as f64 / rate).ok()?;
        now.checked_add(left).ok()
    }

    fn rate(&self) -> u64 {
        self.rate.unwrap_or(0.0).round() as u64
    }
}

/// Divides the limit of all disks among those that still run. 0 stays unlimited, and a limit never becomes 0.
pub fn share(bytes_per_second: u64, running: usize) -> u64 {
    match bytes_per_second {
        0 => 0,
        // QEMU expects a signed 64-bit integer.
        limit => (limit / running.max(1) as u64).clamp(1, i64::MAX.unsigned_abs()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_settles_and_the_end_follows_from_it() {
        let mut meter = Meter::new();
        let start = Instant::now();
        for second in 0..20 {
            meter.measure(start + Duration::from_secs(second), second * 1000);
        }
        assert_eq!(meter.rate(), 1000);
        let now = Timestamp::from_second(1_000_000).unwrap();
        assert_eq!(
            meter.expected_end(now, 5000),
            Some(Timestamp::from_second(1_000_005).unwrap())
        );
    }

    #[test]
    fn a_slow_first_moment_does_not_count_for_long() {
        let mut meter = Meter::new();
        let start = Instant::now();
        meter.measure(start, 0);
        meter.measure(start + Duration::from_millis(500), 0);
        meter.measure(start + Duration::from_millis(1500), 1500);
        assert_eq!(meter.rate(), 1000);
    }

    #[test]
    fn no_end_is_estimated_without_progress() {
        let mut meter = Meter::new();
        let start = Instant::now();
        meter.measure(start, 0);
        meter.measure(start + Duration::from_secs(1), 0);
        assert_eq!(meter.expected_end(Timestamp::UNIX_EPOCH, 5000), None);
    }

    #[test]
    fn a_small_limit_never_becomes_unlimited() {
        assert_eq!(share(0, 3), 0);
        assert_eq!(share(9, 3), 3);
        assert_eq!(share(2, 3), 1);
        assert_eq!(share(5, 0), 5);
        assert_eq!(share(u64::MAX, 1), i64::MAX.unsigned_abs());
    }
}
