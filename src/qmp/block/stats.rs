//! The latency of the guest's requests.

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::graph::MAX_DRIVES;
use crate::qmp::command::command;
use crate::qmp::list::numbers;
use crate::qmp::{Bounded, Done};

#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryBlockstats {}

command!(QueryBlockstats, "query-blockstats", Bounded<BlockStats, MAX_DRIVES>);

/// The most bins of a histogram. A peer that reports more is not QEMU.
const MAX_BINS: usize = 16384;

/// A device's counters.
#[derive(Debug, Default, Deserialize)]
pub struct BlockStats {
    #[serde(default)]
    pub qdev: Option<String>,
    pub stats: BlockDeviceStats,
}

/// Counters since the device was created. A histogram counts since it was set.
#[derive(Debug, Default, Deserialize)]
pub struct BlockDeviceStats {
    pub wr_operations: u64,
    pub wr_total_time_ns: u64,
    #[serde(default)]
    pub rd_latency_histogram: Option<IgnoredAny>,
    #[serde(default)]
    pub wr_latency_histogram: Option<BlockLatencyHistogramInfo>,
    #[serde(default)]
    pub zone_append_latency_histogram: Option<IgnoredAny>,
    #[serde(default)]
    pub flush_latency_histogram: Option<IgnoredAny>,
}

/// Bin `n` counts the requests that took less than boundary `n`, in nanoseconds. The last bin has the rest.
#[derive(Debug, Deserialize)]
pub struct BlockLatencyHistogramInfo {
    #[serde(deserialize_with = "numbers::<_, MAX_BINS>")]
    pub boundaries: Vec<u64>,
    #[serde(deserialize_with = "numbers::<_, MAX_BINS>")]
    pub bins: Vec<u64>,
}

/// Sets a device's histogram of writes. Without boundaries, removes all histograms of the device.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockLatencyHistogramSet<'a> {
    /// The device's id, or its path in QEMU's object model.
    pub id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boundaries_write: Option<&'a [u64]>,
}

command!(BlockLatencyHistogramSet<'_>, "block-latency-histogram-set", Done);

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_histogram_has_the_name_that_qemu_uses() {
        let histogram = json!({ "boundaries": [10, 50], "bins": [3, 1, 2] });
        let of = |name: &str| {
            let mut stats = json!({ "wr_operations": 6, "wr_total_time_ns": 120, "rd_bytes": 1 });
            stats[name] = histogram.clone();
            let device = json!([{ "qdev": "/machine/x", "node-name": "n", "stats": stats }]);
            let [device] = serde_json::from_value::<[BlockStats; 1]>(device).unwrap();
            device.stats
        };
        assert!(of("rd_latency_histogram").rd_latency_histogram.is_some());
        assert!(of("flush_latency_histogram").flush_latency_histogram.is_some());
        let zones = of("zone_append_latency_histogram");
        assert!(zones.zone_append_latency_histogram.is_some() && zones.wr_latency_histogram.is_none());
        let writes = of("wr_latency_histogram").wr_latency_histogram.unwrap();
        assert_eq!((writes.boundaries, writes.bins), (vec![10, 50], vec![3, 1, 2]));
    }
}
