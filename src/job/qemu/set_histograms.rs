//! Sets and removes latency histograms in QEMU: `block-latency-histogram-set` and `query-blockstats`, since QEMU 4.0.
//!
//! QEMU can only remove all histograms of a device at once. So the service sets none on a device that already has one.

use std::time::Duration;

use super::{Histogram, QemuObjects};
use crate::qmp::block::{BlockLatencyHistogramSet, BlockStats, QueryBlockstats};
use crate::qmp::{self, Done};

/// The timeout of QEMU's answer.
const ANSWER: Duration = Duration::from_secs(5);

impl QemuObjects {
    pub async fn query_devices(&self) -> qmp::Result<Vec<BlockStats>> {
        Ok(self
            .client()
            .execute_within(ANSWER, QueryBlockstats {})
            .await?
            .into())
    }

    /// Sets the histogram on those of the devices that have none.
    pub async fn set_histograms(&self, histogram: &Histogram, devices: &[&str]) -> qmp::Result<()> {
        let found = self.query_devices().await?;
        for device in found
            .iter()
            .filter(|found| devices.iter().any(|path| found.is(path)))
        {
            let Some(path) = device.qdev.as_deref().filter(|_| !device.has(histogram)) else {
                continue;
            };
            if device.has_any() {
                tracing::info!(
                    device = path,
                    "the device already has a latency histogram of another client, which stays"
                );
                continue;
            }
            let set = BlockLatencyHistogramSet {
                id: path,
                boundaries_write: Some(&histogram.boundaries),
            };
            // The device is being unplugged. Until then, the mean latency of its writes is used.
            if let Some(error) = self.change_histograms(set).await? {
                tracing::warn!(device = path, %error, "cannot count the guest's writes by how long they take");
            }
        }
        Ok(())
    }

    /// Removes the histogram from every device that has it.
    pub async fn remove_histograms(&self, histogram: &Histogram) -> qmp::Result<()> {
        let found = self.query_devices().await?;
        for device in found.iter().filter(|device| device.has(histogram)) {
            let Some(path) = device.qdev.as_deref() else {
                continue;
            };
            if device.has_other_than_of_writes() {
                tracing::warn!(
                    device = path,
                    "another client set latency histograms during the backup. QEMU can only remove \
                     all of them, so the service removes none"
                );
                continue;
            }
            let remove = BlockLatencyHistogramSet {
                id: path,
                boundaries_write: None,
            };
            if let Some(error) = self.change_histograms(remove).await? {
                // Usually the device is gone, together with its histogram.
                tracing::info!(device = path, %error, "cannot remove the latency histogram");
            }
        }
        Ok(())
    }

    /// Returns QEMU's error if it refused.
    async fn change_histograms(
        &self,
        change: BlockLatencyHistogramSet<'_>,
    ) -> qmp::Result<Option<qmp::Error>> {
        match self.client().execute_within(ANSWER, change).await {
            Ok(Done) => Ok(None),
            Err(error) if error.is_refusal() => Ok(Some(error)),
            Err(error) => Err(error),
        }
    }
}
