//! The latency of the guest's writes to a device, from a histogram of QEMU or from its totals. Pure.

use std::time::Duration;

use crate::qmp;
use crate::qmp::Feature;
use crate::qmp::block::{BlockDeviceStats, BlockLatencyHistogramInfo, BlockStats};

/// Histograms of other clients with more bins are ignored.
const MAX_BINS: usize = 1024;
/// The ratio of the 99th percentile to the mean for an exponential distribution: ln 100.
const P99_OF_MEAN: f64 = 4.6;

/// Returns whether this QEMU can report the latency of the guest's writes.
pub fn can_follow_latency(schema: &qmp::Schema) -> bool {
    schema.has(Feature::LatencyHistograms)
}

/// The histogram of one job. A boundary that no other job uses identifies it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram {
    most: Duration,
    pub(super) boundaries: [u64; 3],
}

impl Histogram {
    /// `most`: the allowed latency of a write. `mark`: a number of at most 32 bits that no other job uses.
    pub fn new(most: Duration, mark: u32) -> Self {
        // The boundary is 52 days, longer than any write takes. JSON represents integers exactly up to 2^53.
        const MARK: u64 = 1 << 52;
        let nanoseconds = nanoseconds(most);
        let three_quarters = nanoseconds / 4 * 3;
        // A bin excludes its upper boundary, which must count as in time.
        let boundaries = [three_quarters + 1, nanoseconds + 1, MARK + u64::from(mark)];
        Self { most, boundaries }
    }

    pub fn most(&self) -> Duration {
        self.most
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl BlockStats {
    /// Returns whether this is the device with that QOM path.
    pub fn is(&self, path: &str) -> bool {
        self.qdev.as_deref() == Some(path)
    }

    pub(super) fn has(&self, histogram: &Histogram) -> bool {
        let writes = self.stats.wr_latency_histogram.as_ref();
        writes.is_some_and(|writes| writes.boundaries == histogram.boundaries)
    }

    pub(super) fn has_other_than_of_writes(&self) -> bool {
        let BlockDeviceStats {
            rd_latency_histogram,
            zone_append_latency_histogram,
            flush_latency_histogram,
            ..
        } = &self.stats;
        let others = [
            rd_latency_histogram,
            zone_append_latency_histogram,
            flush_latency_histogram,
        ];
        others.iter().any(|other| other.is_some())
    }

    pub(super) fn has_any(&self) -> bool {
        self.stats.wr_latency_histogram.is_some() || self.has_other_than_of_writes()
    }
}

/// Numbers of writes by latency.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// At most three quarters of the allowed latency.
    pub fast: u64,
    /// At most the allowed latency.
    pub near: u64,
    pub late: u64,
}

/// The writes of a device since it was created or its histogram was set.
#[derive(Debug, PartialEq)]
pub enum Reading {
    /// From a histogram with a boundary near the allowed latency.
    Counted(Counts),
    /// Without such a histogram: only the total time of all writes is known.
    Summed { writes: u64, nanoseconds: u64 },
}

/// Returns the writes of a device, from its histogram if that has a boundary near the allowed latency.
pub fn reading(device: &BlockStats, histogram: &Histogram) -> Reading {
    let counted = device.stats.wr_latency_histogram.as_ref();
    match counted.and_then(|writes| writes.counts(histogram)) {
        Some(counts) => Reading::Counted(counts),
        None => Reading::Summed {
            writes: device.stats.wr_operations,
            nanoseconds: device.stats.wr_total_time_ns,
        },
    }
}

impl BlockLatencyHistogramInfo {
    /// Returns `None` if the histogram cannot distinguish late writes from others.
    fn counts(&self, own: &Histogram) -> Option<Counts> {
        if self.bins.len() != self.boundaries.len() + 1 || self.bins.len() > MAX_BINS {
            return None;
        }
        let [three_quarters, most, _] = own.boundaries;
        // A histogram of another client may distinguish only late writes from the rest.
        let fast = match self.boundaries == own.boundaries {
            true => three_quarters,
            false => self
                .boundaries
                .iter()
                .copied()
                .rfind(|end| (most / 2..=most).contains(end))?,
        };
        let mut counts = Counts::default();
        let ends = self.boundaries.iter().copied().chain([u64::MAX]);
        for (end, bin) in ends.zip(&self.bins) {
            let count = match end {
                end if end <= fast => &mut counts.fast,
                end if end <= most => &mut counts.near,
                _ => &mut counts.late,
            };
            *count = count.saturating_add(*bin);
        }
        Some(counts)
    }
}

impl Reading {
    /// Returns the writes since an earlier reading; `None` if the counters were reset in between.
    pub fn since(&self, earlier: &Self, most: Duration) -> Option<Counts> {
        match (self, earlier) {
            (Self::Counted(now), Self::Counted(then)) => Some(Counts {
                fast: now.fast.checked_sub(then.fast)?,
                near: now.near.checked_sub(then.near)?,
                late: now.late.checked_sub(then.late)?,
            }),
            (
                Self::Summed { writes, nanoseconds },
                Self::Summed {
                    writes: then,
                    nanoseconds: nanoseconds_then,
                },
            ) => {
                let writes = writes.checked_sub(*then)?;
                let nanoseconds = nanoseconds.checked_sub(*nanoseconds_then)?;
                let nearly_all = nanoseconds as f64 / writes.max(1) as f64 * P99_OF_MEAN / 1e9;
                let mut counts = Counts::default();
                *match nearly_all / most.as_secs_f64() {
                    part if part <= 0.75 => &mut counts.fast,
                    part if part <= 1.0 => &mut counts.near,
                    _ => &mut counts.late,
                } = writes;
                Some(counts)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::de::IgnoredAny;

    const MOST: Duration = Duration::from_millis(10);

    fn device(stats: BlockDeviceStats) -> BlockStats {
        BlockStats {
            qdev: Some("/machine/peripheral/a".into()),
            stats,
        }
    }

    fn bins(boundaries: &[u64], bins: &[u64]) -> BlockStats {
        let histogram = BlockLatencyHistogramInfo {
            boundaries: boundaries.into(),
            bins: bins.into(),
        };
        device(BlockDeviceStats {
            wr_latency_histogram: Some(histogram),
            ..BlockDeviceStats::default()
        })
    }

    fn counts(fast: u64, near: u64, late: u64) -> Counts {
        Counts { fast, near, late }
    }

    #[test]
    fn each_job_knows_its_own_histogram() {
        let (one, other) = (Histogram::new(MOST, 1), Histogram::new(MOST, 2));
        let device = bins(&one.boundaries, &[5, 4, 3, 2]);
        assert!(device.has(&one) && !device.has(&other) && device.has_any());
        assert!(!device.has_other_than_of_writes());
        assert_eq!(reading(&device, &one), Reading::Counted(counts(5, 4, 5)));
        let longest = Histogram::new(Duration::from_secs(60), u32::MAX);
        assert!(longest.boundaries.is_sorted() && longest.boundaries[2] < 1 << 53);
        let shortest = Histogram::new(Duration::from_millis(1), 0);
        assert!(shortest.boundaries.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn every_histogram_of_another_client_is_seen() {
        let any = || Some(IgnoredAny);
        let none = BlockDeviceStats::default;
        let others = [
            BlockDeviceStats {
                rd_latency_histogram: any(),
                ..none()
            },
            BlockDeviceStats {
                flush_latency_histogram: any(),
                ..none()
            },
            BlockDeviceStats {
                zone_append_latency_histogram: any(),
                ..none()
            },
        ];
        for stats in others {
            let device = device(stats);
            assert!(device.has_any() && device.has_other_than_of_writes());
        }
        let writes = bins(&[10], &[0, 0]);
        assert!(writes.has_any() && !writes.has_other_than_of_writes());
        assert!(!device(none()).has_any());
    }

    #[test]
    fn another_clients_histogram_is_used_if_it_distinguishes_late_writes() {
        let own = Histogram::new(MOST, 1);
        let useful = bins(&[1_000_000, 6_000_000, 50_000_000], &[7, 5, 3, 1]);
        assert_eq!(reading(&useful, &own), Reading::Counted(counts(12, 0, 4)));
        let coarse = bins(&[9_000_000], &[7, 5]);
        assert_eq!(reading(&coarse, &own), Reading::Counted(counts(7, 0, 5)));
        let sum = Reading::Summed {
            writes: 0,
            nanoseconds: 0,
        };
        for useless in [
            bins(&[1_000_000, 100_000_000], &[1, 2, 3]),
            bins(&[8_000_000], &[1]),
            bins(&vec![8_000_000; MAX_BINS], &vec![0; MAX_BINS + 1]),
            device(BlockDeviceStats::default()),
        ] {
            assert_eq!(reading(&useless, &own), sum);
        }
    }

    #[test]
    fn without_a_histogram_the_slowest_writes_are_estimated_from_the_mean() {
        let sum = |writes, milliseconds: u64| Reading::Summed {
            writes,
            nanoseconds: milliseconds * 1_000_000,
        };
        let since = |now: Reading, then: Reading| now.since(&then, MOST);
        assert_eq!(since(sum(110, 110), sum(10, 10)), Some(counts(100, 0, 0)));
        assert_eq!(since(sum(100, 200), sum(0, 0)), Some(counts(0, 100, 0)));
        assert_eq!(since(sum(100, 300), sum(0, 0)), Some(counts(0, 0, 100)));
        assert_eq!(since(sum(5, 5), sum(5, 5)), Some(counts(0, 0, 0)));
        assert_eq!(since(sum(4, 5), sum(5, 5)), None);
        let counted = |late| Reading::Counted(counts(0, 0, late));
        assert_eq!(counted(3).since(&counted(1), MOST), Some(counts(0, 0, 2)));
        assert_eq!(counted(1).since(&counted(3), MOST), None, "somebody set it anew");
        assert_eq!(counted(1).since(&sum(0, 0), MOST), None);
    }
}
