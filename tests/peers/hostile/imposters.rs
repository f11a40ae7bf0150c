//! Imposters: peers on a monitor's socket in place of QEMU, each with the expected error.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use crate::common::peer::{GREETING, Peer, schema, schema_with};

const MIB: usize = 1 << 20;

/// The behaviour of an imposter on a connection.
pub type Play = fn(Peer) -> BoxFuture<'static, ()>;

/// Returns the reply of a QEMU without disks.
fn plain(command: &str) -> Value {
    match command {
        "query-uuid" => json!({ "UUID": "7d3c0f3e-52d1-4a4e-9d0c-0f8a3f5a2b10" }),
        "query-status" => json!({ "status": "running", "running": true }),
        "x-debug-query-block-graph" => json!({ "nodes": [], "edges": [] }),
        "query-qmp-schema" => schema(),
        _ => json!([]),
    }
}

fn reply(value: &Value, id: &Value) -> String {
    format!("{}\r\n", json!({ "return": value, "id": id }))
}

/// Sends the greeting, then replies to each command with `answer` of its name and id, until the other end closes.
async fn converse(mut peer: Peer, mut answer: impl FnMut(&str, &Value) -> String) {
    if peer
        .say_bytes(format!("{GREETING}\r\n").as_bytes())
        .await
        .is_err()
    {
        return;
    }
    while let Some(command) = peer.try_receive_at_any_time().await {
        let name = command.name();
        let answer = match name {
            "qmp_capabilities" => reply(&json!({}), &command.command["id"]),
            _ => answer(name, &command.command["id"]),
        };
        if peer.say_bytes(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// Replies to one command with this, and to the others as QEMU would.
async fn converse_but(peer: Peer, but: &'static str, with: Value) {
    converse(peer, |name, id| {
        let value = if name == but { with.clone() } else { plain(name) };
        reply(&value, id)
    })
    .await;
}

/// Sends the same bytes again and again until the other end closes.
async fn say_again_and_again(mut peer: Peer, bytes: Vec<u8>) {
    while peer.say_bytes(&bytes).await.is_ok() {}
}

/// Returns imposters that the service cannot use as a domain, with the expected reasons.
pub const UNREACHABLE: [(&str, Play, &str); 13] = [
    (
        "garbage",
        |peer| Box::pin(say_again_and_again(peer, b"\x00\xff\xfe!\n".to_vec())),
        "does not speak QMP",
    ),
    (
        "endless",
        |peer| Box::pin(say_again_and_again(peer, vec![b' '; 64 << 10])),
        "without a newline",
    ),
    (
        "early-event",
        |peer| Box::pin(say_again_and_again(peer, b"{\"event\": \"STOP\"}\r\n".to_vec())),
        "not a QMP greeting",
    ),
    ("hangs-up", |peer| Box::pin(async { drop(peer) }), "closed"),
    (
        "silent",
        |peer| Box::pin(async { drop(within_a_while(peer.into_stream()).await) }),
        "did not greet",
    ),
    (
        "wrong-ids",
        |peer| {
            Box::pin(converse(peer, |name, id| {
                reply(&plain(name), &json!(id.as_u64().unwrap() + 1000))
            }))
        },
        "did not describe itself in time",
    ),
    (
        "no-ids",
        |peer| {
            Box::pin(converse(peer, |name, _| {
                format!("{}\n", json!({ "return": plain(name) }))
            }))
        },
        "did not describe itself in time",
    ),
    (
        "wrong-type",
        |peer| Box::pin(converse_but(peer, "query-qmp-schema", json!(7))),
        "unexpected reply to query-qmp-schema",
    ),
    (
        "wrong-type-later",
        |peer| {
            Box::pin(converse_but(
                peer,
                "query-status",
                json!({ "status": ["running"] }),
            ))
        },
        "unexpected reply to query-status",
    ),
    (
        "nested",
        |peer| {
            let deep = format!("{}0{}", "[".repeat(1000), "]".repeat(1000));
            Box::pin(converse(peer, move |_, _| {
                format!("{{\"event\": \"DEEP\", \"data\": {deep}}}\n")
            }))
        },
        "recursion",
    ),
    (
        "neither",
        |peer| Box::pin(converse(peer, |_, id| format!("{}\n", json!({ "id": id })))),
        "neither reply nor event",
    ),
    (
        "many-disks",
        |peer| {
            Box::pin(converse_but(
                peer,
                "query-block",
                Value::Array(vec![drive("d"); 10_000]),
            ))
        },
        "query-block: a list with more than 256 elements",
    ),
    (
        "shared-bitmaps",
        |peer| {
            Box::pin(converse(peer, |name, id| {
                let value = match name {
                    "query-block" => Value::Array((0..256).map(|n| drive(&n.to_string())).collect()),
                    "query-named-block-nodes" => serde_json::from_str(&BITMAPS).unwrap(),
                    _ => plain(name),
                };
                reply(&value, id)
            }))
        },
        "reports disks that no QEMU has",
    ),
];

/// Returns imposters that the service accepts as domains despite strange replies; it shows what they report.
pub const REACHABLE: [(&str, Play); 5] = [
    ("twice", |peer| {
        Box::pin(converse(peer, |name, id| reply(&plain(name), id).repeat(2)))
    }),
    ("events-between", |peer| {
        let noise = "{\"event\": \"NOISE\", \"data\": [[], {\"a\": null}]}\n".repeat(200);
        Box::pin(converse(peer, move |name, id| {
            format!("{noise}{}{noise}", reply(&plain(name), id))
        }))
    }),
    // Each event requests another query.
    ("events-that-matter", |peer| {
        Box::pin(converse(peer, |name, id| {
            format!("{}{{\"event\": \"STOP\"}}\n", reply(&plain(name), id))
        }))
    }),
    ("large-schema", |peer| {
        Box::pin(converse_but(peer, "query-qmp-schema", large_schema()))
    }),
    ("large-graph", |peer| {
        Box::pin(converse(peer, |name, id| {
            let value = match name {
                "query-qmp-schema" => {
                    schema_with(json!([{ "name": "x-debug-query-block-graph", "meta-type": "command" }]))
                }
                "query-block" => Value::Array((0..256).map(|n| drive(&n.to_string())).collect()),
                "query-named-block-nodes" => Value::Array((0..2000).map(filter).collect()),
                "x-debug-query-block-graph" => circle(),
                _ => plain(name),
            };
            reply(&value, id)
        }))
    }),
];

/// Returns imposters that fail a running backup, with the expected errors.
pub const FAILING: [(&str, Play, &str); 7] = [
    (
        "no-descriptor-set",
        |peer| Box::pin(converse_as_machine(peer, "add-fd", json!({ "fd": 3 }))),
        "unexpected reply to add-fd",
    ),
    (
        "negative-set",
        |peer| Box::pin(converse_as_machine(peer, "add-fd", json!({ "fdset-id": -1 }))),
        "unexpected reply to add-fd",
    ),
    (
        "no-job",
        |peer| Box::pin(converse_as_machine(peer, "", Value::Null)),
        "no longer has the backup's block jobs",
    ),
    (
        "jobs-of-another-type",
        |peer| Box::pin(converse_as_machine(peer, "query-jobs", json!({ "jobs": [] }))),
        "unexpected reply to query-jobs",
    ),
    (
        "sets-of-another-type",
        |peer| Box::pin(converse_as_machine(peer, "query-fdsets", json!("sets"))),
        "no longer has the backup's block jobs",
    ),
    (
        "hangs-up-on-descriptor",
        |peer| Box::pin(hang_up_on(peer, "add-fd")),
        "closed",
    ),
    (
        "hangs-up-on-node",
        |peer| Box::pin(hang_up_on(peer, "blockdev-add")),
        "closed",
    ),
];

/// Returns a reply of a QEMU with one disk and all features that a backup needs.
fn machine(command: &str) -> Value {
    let command_entity = |name| json!({ "name": name, "meta-type": "command", "arg-type": "a" });
    match command {
        "query-qmp-schema" => schema_with(json!([
            command_entity("transaction"),
            command_entity("blockdev-backup"),
            { "name": "a", "meta-type": "object", "members": [{ "name": "properties" }] },
        ])),
        "query-block" => json!([drive("vda")]),
        "query-named-block-nodes" => {
            let image = json!({ "virtual-size": MIB, "actual-size": MIB });
            json!([{ "node-name": "0", "drv": "qcow2", "file": "/nowhere/vda", "image": image }])
        }
        "add-fd" => json!({ "fdset-id": 0, "fd": 3 }),
        "blockdev-add" | "blockdev-del" | "job-dismiss" | "transaction" => json!({}),
        _ => plain(command),
    }
}

async fn converse_as_machine(peer: Peer, but: &'static str, with: Value) {
    converse(peer, |name, id| {
        let value = if name == but { with.clone() } else { machine(name) };
        reply(&value, id)
    })
    .await;
}

async fn hang_up_on(mut peer: Peer, command: &'static str) {
    peer.greet().await;
    while let Some(received) = peer.try_receive_at_any_time().await {
        if received.name() == command {
            return;
        }
        peer.answer(&received, machine(received.name())).await;
    }
}

/// Waits until the other end closes.
async fn within_a_while(mut stream: tokio::net::UnixStream) -> tokio::net::UnixStream {
    let _ = stream.read_u8().await;
    stream
}

fn drive(id: &str) -> Value {
    json!({ "device": id, "qdev": id, "inserted": { "node-name": "0", "ro": false } })
}

fn filter(number: usize) -> Value {
    json!({ "node-name": number.to_string(), "drv": "throttle", "file": "", "image": { "virtual-size": 1 } })
}

/// Returns one list that many commands share.
fn large_schema() -> Value {
    let members = vec![json!({ "name": "member" }); 5_000];
    let mut entities = vec![json!({ "name": "o", "meta-type": "object", "members": members })];
    entities.extend(
        (0..20_000)
            .map(|number| json!({ "name": number.to_string(), "meta-type": "command", "arg-type": "o" })),
    );
    schema_with(Value::Array(entities))
}

/// Returns an endless stack of filters, behind many unused nodes.
fn circle() -> Value {
    let node = |id: usize| json!({ "id": id, "name": id.to_string(), "type": "block-driver" });
    let edge = |id: usize| json!({ "parent": id, "child": (id + 1) % 2000, "name": "file" });
    let others = (10_000..40_000).map(|id| json!({ "id": id, "name": "other", "type": "block-driver" }));
    json!({
        "nodes": others.chain((0..2000).map(node)).collect::<Vec<_>>(),
        "edges": (0..2000).map(edge).collect::<Vec<_>>(),
    })
}

/// Returns imposters that fill the memory of their client, with each kind in turn.
pub const FLOODS: [Play; 5] = [
    |peer| Box::pin(flood_with_events(peer)),
    |peer| Box::pin(flood_with(peer, "query-qmp-schema", &SCHEMA)),
    |peer| Box::pin(flood_with(peer, "query-named-block-nodes", &BITMAPS)),
    |peer| Box::pin(flood_with_graph(peer, &DRIVE_LISTS, &NODE_LISTS)),
    |peer| Box::pin(flood_with_graph(peer, "[]", &NODES)),
];

/// The number of imposters that have sent everything.
pub static FLOODED: AtomicUsize = AtomicUsize::new(0);

/// Half the maximum length of a line of a registered domain.
const LONG: usize = 2 * MIB;
/// More than any client keeps.
const EVENTS: usize = 1100;

/// The longest value that is kept: numbers, which take 16 times as much memory as text.
static EVENT: LazyLock<String> = LazyLock::new(|| {
    let numbers = vec!["0"; (4 << 10) / 2 - 5].join(",");
    format!("{{\"event\": \"FLOOD\", \"data\": [{numbers}]}}\n")
});

/// Commands that QEMU does not have.
static SCHEMA: LazyLock<String> = LazyLock::new(|| {
    let known = schema().to_string();
    let mut text = known.trim_end_matches(']').to_owned();
    for number in 0.. {
        let entity =
            format!(",{{\"name\":\"made-up-{number}\",\"meta-type\":\"command\",\"arg-type\":\"nodes\"}}");
        if text.len() + entity.len() > LONG {
            break;
        }
        text.push_str(&entity);
    }
    text.push(']');
    text
});

/// Returns an image with the most bitmaps.
static BITMAPS: LazyLock<String> = LazyLock::new(|| {
    let bitmap = "{\"name\":\"b\",\"recording\":true}";
    let bitmaps = vec![bitmap; 65535].join(",");
    format!(
        "[{{\"node-name\":\"0\",\"drv\":\"qcow2\",\"file\":\"/x\",\"image\":{{\"virtual-size\":1}},\
          \"dirty-bitmaps\":[{bitmaps}]}}]"
    )
});

/// Returns a list of as many equal elements as fit.
fn as_many_as_fit(element: &str) -> String {
    format!("[{}]", vec![element; LONG / (element.len() + 1) - 10].join(","))
}

/// Drives and nodes as lists instead of objects: short as text, large in memory.
static DRIVE_LISTS: LazyLock<String> = LazyLock::new(|| as_many_as_fit("[\"\"]"));
static NODE_LISTS: LazyLock<String> = LazyLock::new(|| as_many_as_fit("[\"\",\"\",\"\",[0]]"));

/// The most nodes.
static NODES: LazyLock<String> = LazyLock::new(|| {
    let node = "{\"drv\":\"\",\"file\":\"\",\"image\":{\"virtual-size\":1}}";
    format!("[{}]", vec![node; 16384].join(","))
});

/// Sends large lists of drives and nodes, and does not reply to the query of the graph: the client keeps both while
/// it waits.
async fn flood_with_graph(mut peer: Peer, drives: &str, nodes: &str) {
    peer.greet().await;
    let graph = json!([{ "name": "x-debug-query-block-graph", "meta-type": "command" }]);
    while let Some(command) = peer.try_receive_at_any_time().await {
        let id = &command.command["id"];
        let answer = match command.name() {
            "x-debug-query-block-graph" => continue,
            "query-qmp-schema" => reply(&schema_with(graph.clone()), id),
            "query-block" => format!("{{\"return\": {drives}, \"id\": {id}}}\n"),
            "query-named-block-nodes" => format!("{{\"return\": {nodes}, \"id\": {id}}}\n"),
            name => reply(&plain(name), id),
        };
        if peer.say_bytes(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// Sends events that request a query, and does not reply to it: the client keeps all other events while it waits.
async fn flood_with_events(mut peer: Peer) {
    peer.greet().await;
    let mut looks = 0;
    while looks < 2 {
        let Some(command) = peer.try_receive_at_any_time().await else {
            return;
        };
        looks += usize::from(command.name() == "qom-list");
        peer.answer(&command, plain(command.name())).await;
    }
    peer.event("STOP", json!({})).await;
    for _ in 0..EVENTS {
        if peer.say_bytes(EVENT.as_bytes()).await.is_err() {
            break;
        }
    }
    FLOODED.fetch_add(1, Ordering::SeqCst);
    // The peer neither replies nor closes.
    while peer.try_receive_at_any_time().await.is_some() {}
}

/// Sends a large reply to one command, and an event that requests another query with each reply.
async fn flood_with(peer: Peer, command: &'static str, with: &'static str) {
    converse(peer, move |name, id| {
        let reply = match name {
            _ if name == command => format!("{{\"return\": {with}, \"id\": {id}}}\n"),
            "query-block" => reply(&json!([drive("vda")]), id),
            _ => reply(&plain(name), id),
        };
        format!("{reply}{{\"event\": \"STOP\"}}\n")
    })
    .await;
}
