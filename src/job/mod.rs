//! Runs jobs. Each kind has a directory or a file: [`backup`], [`restore`], [`verify`], [`export`] and [`rescan`].
//!
//! [`table`] has all jobs, and decides when one may work; [`handle`] is the handle of one job, with its status. A job
//! owns its objects in QEMU and leaves no residue. The catalog records every step that must survive a restart before
//! the next one begins, so that a later instance of the service can resume. Must not know permissions or signals.

mod backup;
mod bandwidth;
mod boot;
mod checkpoint;
mod context;
mod ending;
mod error;
mod export;
mod follow;
mod generation;
mod handle;
mod history;
mod outcome;
mod progress;
mod provisional;
mod qemu;
mod record;
mod recover;
mod rescan;
mod restore;
mod speed;
mod status;
mod stored;
mod table;
mod verify;

pub use backup::{Making, Planned, QueuedRequest, Requeued, Start, watch_frozen_guest};
pub use boot::current as current_boot;
pub use error::Error;
pub use export::Served;
pub use handle::Job;
pub use qemu::can_follow_latency;
pub use recover::Recovered;
pub use rescan::Rescan;
pub use status::{DiskState, DiskStatus, Displaced, Outcome, State, Status};
pub use stored::{Turn, Work};
pub use table::{Claim, Entered, InLine, Jobs, Reservation};
