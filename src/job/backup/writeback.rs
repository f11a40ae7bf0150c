//! Starts the write-back to the device while QEMU copies, so that less remains for the end.

use std::convert::Infallible;

use crate::job::Error;
use crate::job::context::{JobContext, blocking};
use crate::targets::{Pace, Targets};

/// Runs until it is dropped or data is lost. This is only an optimisation: at the end the data is made durable and
/// checked for errors in any case.
pub(in crate::job) async fn write_back(targets: &Targets, context: &JobContext) -> Result<Infallible, Error> {
    let mut pace = Pace::default();
    loop {
        tokio::time::sleep(pace.pause()).await;
        let writeback = targets.writeback().clone();
        // A slow device delays this call. After the future is dropped, the call ends by itself.
        let started = blocking(context, move || writeback.start()).await;
        pace = pace.after(started.map_err(Error::Target)?);
    }
}
