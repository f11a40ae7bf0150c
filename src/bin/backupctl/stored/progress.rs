//! The progress of a restore or a verification: bars on a terminal, lines elsewhere, or JSON.

use std::future::Future;
use std::io::{self, IsTerminal};
use std::pin::pin;
use std::time::{Duration, Instant};

use backupd::image::{self, Progress};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::bars::{Bars, Meter, Row};
use crate::interrupt::Interrupts;
use crate::output::{self, escape};
use crate::units;
use crate::view::{self, PROGRESS_LINES};

const LOOK: Duration = Duration::from_millis(200);

/// Shows progress.
pub struct Show {
    way: Way,
    meter: Meter,
}

enum Way {
    Json(Option<(u64, u64)>),
    Bars(Bars),
    Lines(Instant),
}

impl Show {
    pub fn choose(json: bool) -> Self {
        let way = match (json, io::stderr().is_terminal()) {
            (true, _) => Way::Json(None),
            (false, true) => Way::Bars(Bars::default()),
            (false, false) => Way::Lines(Instant::now()),
        };
        let meter = Meter::default();
        Self { way, meter }
    }

    fn update(&mut self, label: &str, (done, total): (u64, u64), state: &str) {
        self.meter.observe(Instant::now(), done);
        let left = self.meter.left(done, total).filter(|_| state == "running");
        match &mut self.way {
            Way::Json(last) if *last != Some((done, total)) => {
                *last = Some((done, total));
                view::event(json!({
                    "event": "progress", "of": label, "state": state, "bytes_done": done, "bytes": total,
                    "seconds_left": left.map(|left| left.as_secs()),
                }));
            }
            Way::Bars(bars) => bars.set(Row {
                label: label.to_owned(),
                done,
                total,
                state: state.to_owned(),
                rate: None,
            }),
            Way::Lines(last) if last.elapsed() >= PROGRESS_LINES => {
                *last = Instant::now();
                let (done, total) = (units::size(done), units::size(total));
                let left = left.map(|left| format!(", {} left", units::remaining(left)));
                let left = left.unwrap_or_default();
                output::complain(&format!("{}: {done} of {total}{left}", escape(label)));
            }
            Way::Json(_) | Way::Lines(_) => {}
        }
    }

    pub fn finish(&mut self) {
        if let Way::Bars(bars) = &mut self.way {
            bars.finish();
        }
    }
}

/// Waits for `work` and shows its progress. The first signal cancels it, and then it ends soon.
pub async fn follow<T>(
    show: &mut Show,
    label: &str,
    progress: &Progress,
    interrupts: &mut Interrupts,
    cancel: &CancellationToken,
    work: impl Future<Output = Result<T, image::Error>>,
) -> Result<T, image::Error> {
    let mut work = pin!(work);
    let mut tick = tokio::time::interval(LOOK);
    let result = loop {
        tokio::select! {
            result = &mut work => break result,
            _ = interrupts.next() => cancel.cancel(),
            _ = tick.tick() => show.update(label, progress.get(), "running"),
        }
    };
    let state = match &result {
        Ok(_) => "completed",
        Err(image::Error::Cancelled) => "cancelled",
        Err(_) => "failed",
    };
    show.update(label, progress.get(), state);
    result
}
