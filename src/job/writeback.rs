//! Starts the writeback to the device during the copying, so that less is left for the end.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::blocking;
use super::manager::Setting;
use crate::target::Targets;

/// How often what was copied is sent on its way: a fast disk copies some ten MiB meanwhile.
const PACE: Duration = Duration::from_millis(20);

/// Goes on until it is dropped. Whatever happens here, the data is made durable, and checked for errors, at the end.
pub(super) async fn write_back(targets: &Targets, setting: &Setting) -> Infallible {
    let writeback = Arc::new(targets.writeback());
    if writeback.is_empty() {
        return std::future::pending().await;
    }
    let mut pace = tokio::time::interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        pace.tick().await;
        let writeback = Arc::clone(&writeback);
        // A device that cannot keep up makes this wait.
        blocking(setting, move || writeback.start()).await;
    }
}
