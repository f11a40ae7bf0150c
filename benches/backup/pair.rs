//! The service beside another tool that does the same.

use std::time::Instant;

/// Measurements of both, in seconds or bytes.
#[derive(Debug)]
pub struct Pair {
    pub what: &'static str,
    /// How many times as much as the other the service may take.
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

/// One number of the service's that has a limit of its own, in seconds.
#[derive(Debug)]
pub struct Single {
    pub what: &'static str,
    pub limit: f64,
    pub values: Vec<f64>,
}

/// How long `work` takes, in seconds.
pub fn timed(work: impl FnOnce()) -> f64 {
    let began = Instant::now();
    work();
    began.elapsed().as_secs_f64()
}
