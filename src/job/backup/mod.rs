//! The backup of a domain: a journalled state machine, and the loop that runs it from targets to outcome.
//!
//! [`state`] defines the order of the steps; [`driver`] is the loop; [`begin`] and [`end`] perform the actions;
//! [`resume`] handles backups of an earlier instance of the service. Must not know D-Bus or permissions.

mod begin;
mod driver;
mod end;
mod resume;
mod state;
#[cfg(test)]
mod walk;

pub(super) use driver::Driver;
pub(super) use end::discard;
pub(super) use resume::{clean_up, find_published, resume, thaw};
pub(super) use state::{Ended, Evidence, Fact, Reached, State};
