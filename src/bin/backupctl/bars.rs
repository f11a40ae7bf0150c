//! Progress bars on a terminal, one below the other.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::escape;
use crate::{job, units};

/// The content of one bar.
#[derive(Debug, Clone)]
pub struct Row {
    /// The label before the bar; unique for each bar.
    pub label: String,
    pub done: u64,
    /// Bytes in total.
    pub total: u64,
    pub state: String,
    /// Bytes per second; `None` to measure it.
    pub rate: Option<u64>,
}

/// Progress bars that appear with their first row.
pub struct Bars {
    all: MultiProgress,
    bars: HashMap<String, (ProgressBar, Meter)>,
    width: usize,
    paused: bool,
}

impl Default for Bars {
    fn default() -> Self {
        Self {
            all: MultiProgress::with_draw_target(ProgressDrawTarget::stderr()),
            bars: HashMap::new(),
            width: 0,
            paused: false,
        }
    }
}

impl Bars {
    /// Shows a row in its own bar.
    pub fn set(&mut self, row: Row) {
        let now = Instant::now();
        if !self.bars.contains_key(&row.label) {
            self.add(&row.label);
        }
        let Some((bar, meter)) = self.bars.get_mut(&row.label) else {
            return;
        };
        meter.observe(now, row.done);
        // An empty backup must not look stuck.
        let full = row.total == 0 && row.state == "completed";
        bar.set_length(if full { 1 } else { row.total });
        bar.set_position(if full { 1 } else { row.done });
        let ended = job::has_ended(&row.state);
        let rate = row.rate.or(meter.rate()).filter(|_| row.state == "running");
        bar.set_message(message(&row, rate));
        if self.paused {
            return;
        }
        if ended && !bar.is_finished() {
            bar.abandon();
        } else {
            bar.tick();
        }
    }

    fn add(&mut self, label: &str) {
        let shown = escape(label);
        self.width = self.width.max(shown.chars().count());
        // Not 0, because an empty bar counts as full before its first row.
        let bar = self.all.add(ProgressBar::new(1));
        // The template is constant, so this does not fail.
        if let Ok(style) = ProgressStyle::with_template("{prefix} [{wide_bar}] {percent:>3}% {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(shown);
        self.bars.insert(label.to_owned(), (bar, Meter::default()));
        for (bar, _) in self.bars.values() {
            bar.set_prefix(format!("{:<width$}", bar.prefix().trim_end(), width = self.width));
        }
    }

    /// Removes a bar.
    pub fn remove(&mut self, label: &str) {
        if let Some((bar, _)) = self.bars.remove(label) {
            bar.finish_and_clear();
            self.all.remove(&bar);
        }
    }

    /// Prints a line above the bars.
    pub fn println(&mut self, line: &str) {
        if self.paused || self.bars.is_empty() || self.all.println(line).is_err() {
            crate::output::complain(line);
        }
    }

    /// Keeps the bars, and moves the cursor below them; indicatif leaves it at the end of the last bar.
    pub fn finish(&mut self) {
        if !self.bars.is_empty() && !self.paused {
            // Otherwise dropping the bars would redraw or clear them.
            self.pause();
            crate::output::complain("");
        }
    }

    /// Stops drawing until [`Bars::resume`].
    pub fn pause(&mut self) {
        self.paused = true;
        // The drawn bars remain. The terminal may have printed "^C" behind them, and indicatif cannot clear them after
        // the cursor has moved. [`Bars::resume`] draws new bars below.
        self.all.set_draw_target(ProgressDrawTarget::hidden());
    }

    /// Draws the bars again.
    pub fn resume(&mut self) {
        self.paused = false;
        self.all.set_draw_target(ProgressDrawTarget::stderr());
        for (bar, _) in self.bars.values() {
            bar.tick();
        }
    }
}

/// `1.0 GiB/2.0 GiB  512 MiB/s    ETA 0:08 running`, in columns that leave room for a bar in 80 columns.
fn message(row: &Row, rate: Option<u64>) -> String {
    let bytes = format!("{}/{}", units::size(row.done), units::size(row.total));
    let (speed, left) = match rate {
        Some(rate) if rate > 0 => {
            let left = Duration::from_secs(row.total.saturating_sub(row.done).div_ceil(rate));
            (units::rate(rate), format!("ETA {}", units::countdown(left)))
        }
        _ => (String::new(), String::new()),
    };
    format!("{bytes:>17} {speed:>10} {left:>11} {:<9}", escape(&row.state))
}

/// Measures a rate, smoothed over the last few seconds.
#[derive(Debug, Default)]
pub struct Meter {
    last: Option<(Instant, u64)>,
    rate: Option<f64>,
}

impl Meter {
    /// The period of smoothing, in seconds.
    const SMOOTHING: f64 = 3.0;

    /// Adds a reading.
    pub fn observe(&mut self, now: Instant, done: u64) {
        let Some((then, before)) = self.last else {
            self.last = Some((now, done));
            return;
        };
        let seconds = now.saturating_duration_since(then).as_secs_f64();
        // There is no rate before the first byte.
        if done == 0 {
            self.last = Some((now, 0));
            return;
        }
        // Readings in quick succession measure the clock more than the disk.
        if seconds < 0.2 {
            return;
        }
        let current = done.saturating_sub(before) as f64 / seconds;
        let weight = 1.0 - (-seconds / Self::SMOOTHING).exp();
        self.rate = Some(match self.rate {
            Some(rate) => rate + weight * (current - rate),
            None => current,
        });
        self.last = Some((now, done));
    }

    /// Bytes per second, after two readings.
    pub fn rate(&self) -> Option<u64> {
        self.rate.map(|rate| rate as u64)
    }

    /// The remaining time at this rate; `None` while the rate is 0.
    pub fn left(&self, done: u64, total: u64) -> Option<Duration> {
        let rate = self.rate().filter(|rate| *rate > 0)?;
        Some(Duration::from_secs(total.saturating_sub(done).div_ceil(rate)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_flow_has_its_rate() {
        let start = Instant::now();
        let mut meter = Meter::default();
        assert_eq!(meter.rate(), None);
        for second in 0..5u64 {
            meter.observe(start + Duration::from_secs(second), second * 1000);
        }
        assert_eq!(meter.rate(), Some(1000));
        assert_eq!(meter.left(4000, 6500), Some(Duration::from_secs(3)));
        assert_eq!(Meter::default().left(4000, 6500), None);
    }

    #[test]
    fn readings_at_the_same_time_do_not_count() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.observe(start, 0);
        meter.observe(start, 1000);
        assert_eq!(meter.rate(), None);
        meter.observe(start + Duration::from_secs(1), 1000);
        assert_eq!(meter.rate(), Some(1000));
    }

    #[test]
    fn the_time_before_the_first_byte_is_not_measured() {
        let start = Instant::now();
        let mut meter = Meter::default();
        for second in 0..5u64 {
            meter.observe(start + Duration::from_secs(second), 0);
        }
        assert_eq!(meter.rate(), None);
        meter.observe(start + Duration::from_secs(5), 1000);
        assert_eq!(meter.rate(), Some(1000));
    }

    #[test]
    fn a_stall_shows_soon() {
        let start = Instant::now();
        let mut meter = Meter::default();
        meter.observe(start, 0);
        meter.observe(start + Duration::from_secs(1), 1000);
        meter.observe(start + Duration::from_secs(7), 1000);
        assert!(meter.rate().unwrap() < 200);
    }

    #[test]
    fn a_message_has_size_rate_and_time() {
        let row = Row {
            label: "vda".into(),
            done: 1 << 30,
            total: 2 << 30,
            state: "running".into(),
            rate: None,
        };
        assert_eq!(
            message(&row, Some(128 << 20)),
            "  1.0 GiB/2.0 GiB  128 MiB/s    ETA 0:08 running  "
        );
        assert!(!message(&row, None).contains("ETA"));
    }
}
