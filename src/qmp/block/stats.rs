//! The latency of the guest's requests.

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::qmp::Done;
use crate::qmp::command::command;

#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryBlockstats {}

command!(QueryBlockstats, "query-blockstats", Vec<BlockStats>);

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
    pub boundaries: Vec<u64>,
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
