//! Starts the write-back to the device during the copying, so that less is left for the end.

use std::convert::Infallible;
use std::time::Duration;

use super::manager::Setting;
use super::{Error, blocking};
use crate::target::Targets;

/// How soon what was copied is sent on its way: a fast disk copies some ten MiB meanwhile.
const SOON: Duration = Duration::from_millis(20);
/// The longest time between two looks when little comes, and between two write-backs to a slow device.
const SELDOM: Duration = Duration::from_secs(1);
/// The part of the time that a busy device has for others' fsyncs.
const REST: u32 = 8;

/// Goes on until it is dropped, or data is lost. Whatever happens here, the data is made durable, and checked for errors, at the
/// end.
pub(super) async fn write_back(targets: &Targets, setting: &Setting) -> Result<Infallible, Error> {
    let mut pause = SOON;
    loop {
        tokio::time::sleep(pause).await;
        let writeback = targets.writeback().clone();
        // A device that can't keep up makes this wait, and it comes to its end when nobody waits for it any more.
        let started = blocking(setting, move || writeback.start()).await;
        pause = match started.map_err(Error::Target)? {
            Some(took) => (took / REST).clamp(SOON, SELDOM),
            None => (pause * 2).min(SELDOM),
        };
    }
}
