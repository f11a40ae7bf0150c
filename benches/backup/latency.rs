//! Measures the service's own time: from the call to the transaction, and from QEMU's event to the caller's signal.
//!
//! The disks are small, so that the amount of data does not matter. polkit's time is the time between its requests and
//! its replies on the bus, as a monitor of the bus sees them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use futures_util::StreamExt;
use zbus::message::Type;
use zbus::{MatchRule, MessageStream};

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::proxies::Options;
use crate::common::vm::Vm;
use crate::methods::is_backup_of_service;
use crate::qmp::{seconds_between, time};
use crate::{IN_MEMORY, ON_DEVICE, SMALL};

const TIMES: usize = 20;

/// Measurements in seconds, one for each backup.
#[derive(Debug, Default)]
pub struct Latency {
    /// From the call to the start of QEMU's block job.
    pub start: Vec<f64>,
    /// The part of that time that the service waits for polkit.
    pub polkit: Vec<f64>,
    /// From QEMU's BLOCK_JOB_COMPLETED to the service's `Completed`, with a store for which fsync costs nothing.
    pub signal: Vec<f64>,
    /// The same with a store on the device.
    pub signal_on_device: Vec<f64>,
}

pub async fn measure(system: &System, caller: &mut Caller, vm: &Vm) -> Latency {
    let questions = Questions::watch(system).await;
    let mut latency = Latency::default();
    // The first two warm the caches and do not count.
    for round in 0..TIMES + 2 {
        for store in [IN_MEMORY, ON_DEVICE] {
            questions.forget();
            let one = once(caller, vm, store).await;
            if round < 2 {
                continue;
            }
            latency.start.push(seconds_between(one.called, one.started));
            latency
                .polkit
                .push(questions.waited_between(one.called, one.started));
            let signal = seconds_between(one.completed, one.signalled);
            match store {
                IN_MEMORY => latency.signal.push(signal),
                _ => latency.signal_on_device.push(signal),
            }
        }
    }
    latency
}

struct Once {
    called: SystemTime,
    started: SystemTime,
    completed: SystemTime,
    signalled: SystemTime,
}

async fn once(caller: &mut Caller, vm: &Vm, store: &str) -> Once {
    let document = format!("<domainbackup><store name='{store}'/></domainbackup>");
    let called = SystemTime::now();
    let all = Options::from([("incremental", "full".into())]);
    let started = caller.try_start(SMALL, &document, &[], all).await;
    started.expect("the backup is accepted");
    let signals = caller.signals_until("Completed").await;
    let signalled = SystemTime::now();
    let last = signals.last().expect("it ends with the signal");
    assert_eq!(last.arguments[0], "completed", "{last:?}");
    let created = vm.wait_event("JOB_STATUS_CHANGE", |data| {
        data["status"] == "created" && is_backup_of_service(data)
    });
    let completed = vm.wait_event("BLOCK_JOB_COMPLETED", is_backup_of_service);
    Once {
        called,
        started: time(&created),
        completed: time(&completed),
        signalled,
    }
}

/// Requests to polkit by sender and serial number, with the times of the request and of the reply.
type Asked = HashMap<(String, u32), (SystemTime, Option<SystemTime>)>;

struct Questions(Arc<Mutex<Asked>>);

impl Questions {
    async fn watch(system: &System) -> Self {
        let connection = system.connect().await;
        let monitoring = zbus::fdo::MonitoringProxy::new(&connection)
            .await
            .expect("a proxy is made");
        let rules: [MatchRule<'_>; 0] = [];
        let mut messages = MessageStream::from(&connection);
        monitoring
            .become_monitor(&rules, 0)
            .await
            .expect("root may watch the bus");
        let asked = Arc::new(Mutex::new(Asked::new()));
        let shared = Arc::clone(&asked);
        tokio::spawn(async move {
            // Ends with the bus.
            while let Some(Ok(message)) = messages.next().await {
                note(&mut shared.lock().expect("nobody panics inside"), &message);
            }
        });
        Self(asked)
    }

    fn forget(&self) {
        self.0.lock().expect("nobody panics inside").clear();
    }

    /// Returns the time spent waiting for replies. The service sends one request after the other.
    fn waited_between(&self, from: SystemTime, to: SystemTime) -> f64 {
        let asked = self.0.lock().expect("nobody panics inside");
        let waits = asked.values().filter_map(|(asked, answered)| {
            let answered = (*answered)?;
            (*asked >= from && answered <= to).then(|| seconds_between(*asked, answered))
        });
        waits.sum()
    }
}

fn note(asked: &mut Asked, message: &zbus::Message) {
    let now = SystemTime::now();
    let header = message.header();
    match header.message_type() {
        Type::MethodCall
            if header.member().is_some_and(|name| name == "CheckAuthorization")
                && header.destination().is_some() =>
        {
            let asker = header.sender().map(ToString::to_string).unwrap_or_default();
            asked.insert((asker, header.primary().serial_num().get()), (now, None));
        }
        Type::MethodReturn | Type::Error => {
            if let (Some(asker), Some(serial)) = (header.destination(), header.reply_serial())
                && let Some((_, answered)) = asked.get_mut(&(asker.to_string(), serial.get()))
            {
                *answered = Some(now);
            }
        }
        _ => {}
    }
}
