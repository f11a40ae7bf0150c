//! Measurements of the service and of another tool that does the same.

use std::time::Instant;

/// Measurements of both, in seconds or bytes.
#[derive(Debug)]
pub struct Pair {
    pub what: &'static str,
    /// The limit for the service, as a multiple of the other tool.
    pub limit: f64,
    pub ours: Vec<f64>,
    pub others: Vec<f64>,
}

impl Pair {
    pub fn new(what: &'static str, limit: f64) -> Self {
        Self {
            what,
            limit,
            ours: Vec::new(),
            others: Vec::new(),
        }
    }
}

/// A measurement of the service with an absolute limit, in seconds.
#[derive(Debug)]
pub struct Single {
    pub what: &'static str,
    pub limit: f64,
    pub values: Vec<f64>,
}

/// Returns the duration of `work`, in seconds.
pub fn timed(work: impl FnOnce()) -> f64 {
    let began = Instant::now();
    work();
    began.elapsed().as_secs_f64()
}
