//! One night: a backup of every VM.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::measure::{Activity, median};
use crate::common::proxies::Options;
use crate::machines::Machines;
use crate::rss;

/// Calls in flight on one connection: the bus allows 128.
const TOGETHER: usize = 50;
const LOOK: Duration = Duration::from_millis(20);

pub struct Night {
    pub machines: usize,
    pub kind: &'static str,
    pub wall: Duration,
    /// CPU time of the service for all VMs, in milliseconds.
    processor: u64,
    /// The maximum RSS, in KiB.
    pub rss: u64,
    /// QMP commands for one VM, from the call until two seconds after the end of the last backup.
    pub commands: usize,
}

impl Night {
    pub fn processor_each(&self) -> f64 {
        self.processor as f64 / self.machines as f64
    }
}

pub async fn night(system: &mut System, machines: &Machines, kind: &'static str) -> Night {
    let service = system.daemon().pid();
    let mut listener = Caller::new(system).await;
    for proxy in &machines.proxies {
        proxy.take_heard();
    }
    let (before, began) = (Activity::of(service), Instant::now());
    let mut calls = Vec::new();
    for group in machines.names.chunks(TOGETHER) {
        let caller = Caller::new(system).await;
        calls.extend(group.iter().map(|name| {
            let (manager, name) = (caller.manager.clone(), name.clone());
            tokio::spawn(async move {
                let options = Options::from([("incremental", kind.into())]);
                manager.create_backup(&name, "", Vec::new(), options).await
            })
        }));
    }
    let most = Arc::new(AtomicU64::new(0));
    let seen = most.clone();
    let watching = tokio::spawn(async move {
        loop {
            seen.fetch_max(rss(service), Ordering::Relaxed);
            tokio::time::sleep(LOOK).await;
        }
    });
    for _ in &machines.names {
        let signals = listener.signals_until("JobEnded").await;
        let last = signals.last().expect("it ends with the signal");
        assert!(last.arguments[2].contains("completed"), "{last:?}");
    }
    let wall = began.elapsed();
    let processor = Activity::of(service).processor - before.processor;
    watching.abort();
    for call in calls {
        call.await.expect("the call ends").expect("the backup begins");
    }
    // Waits for the effects of the last events.
    tokio::time::sleep(Duration::from_secs(2)).await;
    Night {
        machines: machines.names.len(),
        kind,
        wall,
        processor,
        rss: most.load(Ordering::Relaxed),
        commands: median(machines.proxies.iter().map(|proxy| proxy.take_heard().len())),
    }
}
