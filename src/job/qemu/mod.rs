//! A job's objects in QEMU: how they are created, changed and removed.

mod histogram;
mod objects;
mod release;
mod set_histograms;
mod zeroes;

pub use histogram::{Counts, Histogram, Reading, can_follow_latency, reading};
pub use objects::{Names, QemuObjects};
pub use zeroes::Part;
