//! The backup of a domain: a journalled state machine, and the loop that runs it from targets to outcome.
//!
//! [`state`] defines the order of the steps; [`driver`] is the loop; [`begin`] and [`end`] perform the actions;
//! [`resume`] handles backups of an earlier instance of the service. [`start`] and [`queued`] are the ways into it.
//! Must not know D-Bus or permissions.

mod agent;
mod begin;
mod candidates;
mod cleanup;
mod directory;
mod driver;
mod end;
mod guard;
pub(super) mod journal;
mod latency;
mod queued;
mod quiesce;
mod resume;
mod running;
mod scan;
mod stall;
mod start;
mod state;
mod track;
#[cfg(test)]
mod walk;
mod writeback;

pub use guard::watch as watch_frozen_guest;
pub use journal::QueuedRequest;
pub use queued::{Making, Planned, Requeued};
pub use start::Start;

pub(super) use end::discard;
pub(super) use resume::thaw;
pub(super) use state::{Ended, State};
