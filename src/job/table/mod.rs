//! The table of jobs, the queue in front of it, and the right of a job to work on a domain.

mod busy;
mod displace;
mod expiry;
mod jobs;
mod preparation;
mod queue;
mod reservation;
mod waiting;

pub use busy::ROOT;
pub use expiry::{KEEP, KEEP_AT_MOST};
pub use jobs::Jobs;
pub use queue::Claim;
pub use reservation::{Held, Reservation, Shares};
pub use waiting::{Entered, InLine};
