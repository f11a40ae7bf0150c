//! A host of idle domains. They are peers in this process that send the replies of a real QEMU.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::caller::Caller;
use crate::common::measure::Activity;
use crate::common::observer::Observer;
use crate::common::peer::{Imposter, Peer};
use crate::common::{System, wait};
use crate::{machines, rss};

const DOMAINS: usize = 500;
/// The time after which an idle service has finished its remaining work.
const SETTLED: Duration = Duration::from_secs(3);
const WATCHED: Duration = Duration::from_secs(20);

/// The commands that the service sends to a QEMU after connecting.
const ASKED: [&str; 7] = [
    "query-qmp-schema",
    "query-version",
    "query-status",
    "query-block",
    "query-named-block-nodes",
    "x-debug-query-block-graph",
    "qom-list",
];

pub struct Idle {
    pub domains: usize,
    /// In KiB.
    pub rss: u64,
    pub wakeups: u64,
    pub watched: Duration,
    /// From the start of the service to the last connection.
    pub connected: Duration,
    /// CPU time of the service until then, in milliseconds.
    pub processor: u64,
}

pub async fn measure() -> Idle {
    let mut system = System::setup().start();
    let answers = Arc::new(answers(&mut system));
    system.stop_daemon();
    let mut peers = Vec::new();
    for number in 0..DOMAINS {
        let name = format!("idle{number:03}");
        let socket = system.dir().join(format!("{name}.monitor"));
        let answers = answers.clone();
        peers.push(Imposter::listen(&socket, move |peer| play(peer, answers.clone())));
        system.write_domain_file(&name, &format!("monitor = \"{}\"\n", socket.display()));
    }
    let began = Instant::now();
    system.start_daemon();
    let service = system.daemon().pid();
    let caller = Caller::new(&system).await;
    wait::until_async("all domains", async || {
        let domains = caller.manager.list_domains().await.ok()?;
        let connected = domains
            .iter()
            .filter(|(.., state)| state != "unreachable")
            .count();
        (connected >= DOMAINS).then_some(())
    })
    .await;
    let connected = began.elapsed();
    let processor = Activity::of(service).processor;
    drop(caller);
    tokio::time::sleep(SETTLED).await;
    let before = Activity::of(service);
    tokio::time::sleep(WATCHED).await;
    Idle {
        domains: DOMAINS,
        wakeups: Activity::of(service).wakeups_since(&before),
        rss: rss(service),
        watched: WATCHED,
        connected,
        processor,
    }
}

fn answers(system: &mut System) -> HashMap<String, Value> {
    let _machines = machines::start(system, 1);
    let mut observer = Observer::connect(&system.dir().join("vm000/observer")).expect("it can be asked");
    let mut ask = |command: &str| {
        let arguments = match command {
            "qom-list" => json!({ "path": "/machine/peripheral" }),
            "query-named-block-nodes" => json!({ "flat": true }),
            _ => json!({}),
        };
        let answer = observer.execute(command, arguments).expect("it is answered");
        (command.to_owned(), answer)
    };
    let answers = ASKED.iter().map(|command| ask(command)).collect();
    system.remove_domain_file("vm000");
    answers
}

async fn play(mut peer: Peer, answers: Arc<HashMap<String, Value>>) {
    peer.greet().await;
    let uuid = uuid::Uuid::new_v4();
    while let Some(command) = peer.try_receive_at_any_time().await {
        let answer = match command.name() {
            "query-uuid" => json!({ "UUID": uuid }),
            name => answers.get(name).cloned().unwrap_or_else(|| json!([])),
        };
        peer.answer(&command, answer).await;
    }
}
