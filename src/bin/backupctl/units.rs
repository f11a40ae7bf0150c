//! Sizes, rates and times: parsed from the command line and formatted for people.

use std::time::Duration;

pub use backupd::size::parse_size;

/// Bytes in IEC units: `0 B`, `1.5 KiB`, `20 GiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // 1023.95 would become "1024.0", so the next unit begins there.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 99.95 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Bytes per second.
pub fn rate(bytes_per_second: u64) -> String {
    format!("{}/s", size(bytes_per_second))
}

/// A duration with about two digits: `0.4 s`, `12 s`, `2 min 05 s`, `1 h 03 min`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..=9 => format!("{:.1} s", time.as_secs_f64()),
        10..=59 => format!("{seconds} s"),
        60..=3599 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// An age in its largest unit: `40 s`, `5 min`, `3 h`, `12 days`.
pub fn age(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// A duration that may be very short: `41 ms`.
pub fn brief(time: Duration) -> String {
    match time.as_micros().div_ceil(1000) {
        milliseconds @ 0..1000 => format!("{milliseconds} ms"),
        _ => duration(time),
    }
}

/// A remaining time, without tenths of a second.
pub fn remaining(time: Duration) -> String {
    duration(Duration::from_secs(time.as_secs_f64().ceil() as u64)).replace(".0 s", " s")
}

/// A remaining time in short form: `0:08`, `12:34`, `1:02:03`.
pub fn countdown(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds % 3600 / 60, seconds % 60);
    match hours {
        0 => format!("{minutes}:{seconds:02}"),
        1..=99 => format!("{hours}:{minutes:02}:{seconds:02}"),
        _ => format!("{} days", hours / 24),
    }
}

/// A time in µs since the epoch, in the user's time zone; `-` for 0, which means unknown.
pub fn timestamp(microseconds: u64) -> String {
    let time = i64::try_from(microseconds)
        .ok()
        .filter(|&time| time > 0)
        .and_then(|time| jiff::Timestamp::from_microsecond(time).ok());
    match time {
        Some(time) => time
            .to_zoned(jiff::tz::TimeZone::system())
            .strftime("%Y-%m-%d %H:%M:%S %z")
            .to_string(),
        None => "-".to_owned(),
    }
}

/// The time of day, in the user's time zone.
pub fn clock() -> String {
    jiff::Zoned::now().strftime("%H:%M:%S").to_string()
}

/// The done part of `total` in whole percent; 100 only if all is done.
pub fn percent(done: u64, total: u64) -> u64 {
    if total == 0 {
        return 0;
    }
    let percent = u128::from(done.min(total)) * 100 / u128::from(total);
    percent as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_in_iec_units() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1024 * 1024 - 1, "1.0 MiB"),
            (200 << 20, "200 MiB"),
            (20 << 30, "20.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn durations_have_two_figures() {
        assert_eq!(duration(Duration::from_millis(430)), "0.4 s");
        assert_eq!(duration(Duration::from_secs(12)), "12 s");
        assert_eq!(brief(Duration::from_micros(40_327)), "41 ms");
        assert_eq!(brief(Duration::from_micros(999_001)), "1.0 s");
        assert_eq!(duration(Duration::from_secs(125)), "2 min 05 s");
        assert_eq!(duration(Duration::from_secs(3790)), "1 h 03 min");
        assert_eq!(age(Duration::from_secs(119)), "119 s");
        assert_eq!(age(Duration::from_secs(7199)), "119 min");
        assert_eq!(age(Duration::from_secs(7200)), "2 h");
        assert_eq!(age(Duration::from_secs(50 * 3600)), "2 days");
        assert_eq!(remaining(Duration::from_millis(1200)), "2 s");
        assert_eq!(countdown(Duration::from_secs(8)), "0:08");
        assert_eq!(countdown(Duration::from_secs(3723)), "1:02:03");
        assert_eq!(countdown(Duration::from_secs(u64::MAX)), "213503982334601 days");
    }

    #[test]
    fn a_hundred_percent_means_all_bytes() {
        assert_eq!(percent(0, 0), 0);
        assert_eq!(percent(999, 1000), 99);
        assert_eq!(percent(1000, 1000), 100);
        assert_eq!(percent(2000, 1000), 100);
        assert_eq!(percent(u64::MAX - 1, u64::MAX), 99);
    }
}
