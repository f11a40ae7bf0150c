//! The backup of a domain: a journalled state machine, and the loop that runs it from targets to outcome.
//!
//! [`state`] says in which order things are done; [`driver`] is the loop; [`begin`] and [`end`] carry the actions out;
//! [`resume`] finds what an earlier process left. Must not know D-Bus or who may do what.

mod begin;
mod driver;
mod end;
mod resume;
mod state;
#[cfg(test)]
mod walk;

pub(super) use driver::Driver;
pub(super) use end::discard;
pub(super) use resume::{resume, sweep, thaw};
pub(super) use state::{Ended, Fact, State};
