//! Starts the write-back to the device during the copying, so that less is left for the end.

use std::convert::Infallible;

use super::manager::Setting;
use super::{Error, blocking};
use crate::target::{Pace, Targets};

/// Goes on until it is dropped, or data is lost. Whatever happens here, the data is made durable, and checked for errors, at the
/// end.
pub(super) async fn write_back(targets: &Targets, setting: &Setting) -> Result<Infallible, Error> {
    let mut pace = Pace::default();
    loop {
        tokio::time::sleep(pace.pause()).await;
        let writeback = targets.writeback().clone();
        // A device that can't keep up makes this wait, and it comes to its end when nobody waits for it any more.
        let started = blocking(setting, move || writeback.start()).await;
        pace = pace.after(started.map_err(Error::Target)?);
    }
}
