//! Decides when a copy counts as stalled. Pure: the caller passes the time, and this sends no command.
//!
//! Only progress resets the timeout. A changed speed, a lost connection or a QEMU that does not answer must not reset
//! it. Otherwise a caller or a QEMU could delay the end for ever by repeating them. The job would keep its place and
//! its part of a store's bandwidth.

use std::time::{Duration, Instant};

/// The largest chunk that QEMU copies at a time, in bytes. Under a speed limit, QEMU may show no progress while it
/// waits for one.
const CHUNK: u64 = 64 << 20;

/// Tracks how long a copy has made no progress.
#[derive(Debug)]
pub struct Stall {
    /// The longest time without progress, or without an answer.
    limit: Duration,
    /// The part of `limit` that the time without progress has used up. While more time is allowed, it is used up more
    /// slowly.
    spent: Duration,
    /// `spent` includes the time up to here.
    counted: Instant,
    /// Since when QEMU has not confirmed a speed, even if it answers other commands.
    unconfirmed: Option<Instant>,
    cancelled: Option<Instant>,
}

impl Stall {
    pub fn new(limit: Duration, now: Instant) -> Self {
        Self {
            limit,
            spent: Duration::ZERO,
            counted: now,
            unconfirmed: None,
            cancelled: None,
        }
    }

    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Reports that the copy made progress or is paused.
    pub fn moved(&mut self, now: Instant) {
        (self.spent, self.counted) = (Duration::ZERO, now);
    }

    /// Reports that the service sends a speed to QEMU. A repeated report changes nothing.
    pub fn sends(&mut self, now: Instant) {
        self.unconfirmed.get_or_insert(now);
    }

    pub fn confirmed(&mut self) {
        self.unconfirmed = None;
    }

    /// Reports that the copy is cancelled. It must end within the limit, and progress no longer counts.
    pub fn cancel(&mut self, now: Instant) {
        self.cancelled.get_or_insert(now);
    }

    /// Counts the time since the last call. Returns the stalled part and its timeout, if one stalled. `pace` is the
    /// speed limit of one disk in bytes a second, or 0 without a limit. It is `None` while QEMU does not answer,
    /// because QEMU answers under any limit.
    pub fn check(&mut self, now: Instant, pace: Option<u64>) -> Option<(&'static str, Duration)> {
        let chunk = match pace {
            None | Some(0) => Duration::ZERO,
            Some(limit) => Duration::from_secs(CHUNK / limit),
        };
        let allowed = self.limit.max(chunk);
        let passed = now.saturating_duration_since(self.counted);
        self.spent += passed.mul_f64(self.limit.as_secs_f64() / allowed.as_secs_f64());
        self.counted = now;
        let over = |since: Option<Instant>| {
            since.is_some_and(|since| now.saturating_duration_since(since) >= self.limit)
        };
        if self.cancelled.is_some() {
            return over(self.cancelled).then_some(("the cancelled copying", self.limit));
        }
        if over(self.unconfirmed) {
            return Some(("QEMU", self.limit));
        }
        (self.spent >= self.limit).then_some(("the copying", allowed))
    }

    /// Returns how long QEMU may still take for an answer.
    pub fn left(&self, now: Instant) -> Duration {
        let since = |since: Option<Instant>| match since {
            Some(since) => self.limit.saturating_sub(now.saturating_duration_since(since)),
            None => self.limit,
        };
        let idle = self.limit.saturating_sub(self.spent);
        idle.min(since(self.unconfirmed)).min(since(self.cancelled))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    struct Clock(Instant, Stall);

    impl Clock {
        fn new() -> Self {
            let now = Instant::now();
            Self(now, Stall::new(LIMIT, now))
        }

        fn after(&mut self, seconds: u64, pace: Option<u64>) -> Option<&'static str> {
            self.0 += Duration::from_secs(seconds);
            self.1.check(self.0, pace).map(|(what, _)| what)
        }
    }

    #[test]
    fn a_copy_without_progress_is_stalled_and_progress_starts_the_wait_again() {
        let mut clock = Clock::new();
        assert_eq!(clock.after(9, Some(0)), None);
        clock.1.moved(clock.0);
        assert_eq!(clock.after(9, Some(0)), None);
        assert_eq!(clock.1.left(clock.0).as_secs(), 1);
        assert_eq!(clock.after(1, Some(0)), Some("the copying"));
    }

    #[test]
    fn a_limit_allows_more_time_only_while_qemu_answers() {
        let mut clock = Clock::new();
        assert_eq!(clock.after(60, Some(1 << 20)), None);
        assert_eq!(clock.after(4, Some(1 << 20)), Some("the copying"));
        let mut clock = Clock::new();
        assert_eq!(clock.after(1000, Some(1)), None);
        assert_eq!(clock.after(9, None), None);
        assert_eq!(clock.after(1, None), Some("the copying"));
    }

    #[test]
    fn a_changed_speed_does_not_start_the_wait_again() {
        let mut clock = Clock::new();
        for pace in 0..9 {
            clock.1.sends(clock.0);
            clock.1.confirmed();
            assert_eq!(clock.after(1, Some(pace << 30)), None);
        }
        assert_eq!(clock.after(1, Some(0)), Some("the copying"));
    }

    #[test]
    fn a_speed_that_is_not_confirmed_stalls_a_copy_whose_progress_is_reported() {
        let mut clock = Clock::new();
        for _ in 0..9 {
            clock.1.sends(clock.0);
            assert_eq!(clock.after(1, None), None);
            clock.1.moved(clock.0);
        }
        assert_eq!(clock.after(1, None), Some("QEMU"));
    }

    #[test]
    fn the_timeout_of_a_cancelled_copy_starts_at_the_cancellation() {
        let mut clock = Clock::new();
        assert_eq!(clock.after(50_000, Some(1)), None);
        for _ in 0..9 {
            clock.1.cancel(clock.0);
            clock.1.moved(clock.0);
            clock.1.sends(clock.0);
            assert_eq!(clock.after(1, Some(1)), None);
        }
        assert_eq!(clock.after(1, Some(1)), Some("the cancelled copying"));
    }
}
