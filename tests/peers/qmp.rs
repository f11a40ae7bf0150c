//! The QMP client, with a peer that misbehaves and with a real QEMU.

use std::fs::File;
use std::future::Future;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use crate::common::command::{raw, raw_as};
use crate::common::disk::Disk;
use crate::common::peer::{GREETING, Peer};
use crate::common::vm::{Builder, Vm};
use crate::common::wait::{self, DEADLINE, within};
use backupd::qmp::{Client, Error, EventsError, MAX_LINE};
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

const MIB: usize = 1 << 20;

/// Returns a client in command mode, its running driver, and the peer at the other end.
async fn connected() -> (Client, JoinHandle<Arc<str>>, Peer) {
    let (ours, peer) = Peer::pair();
    connected_over(ours, peer).await
}

async fn connected_over(ours: UnixStream, mut peer: Peer) -> (Client, JoinHandle<Arc<str>>, Peer) {
    let (opened, ()) = tokio::join!(Client::open(ours, DEADLINE), peer.greet());
    let (client, driver) = opened.expect("the peer greets");
    (client, tokio::spawn(driver.run()), peer)
}

/// Returns the error of opening a connection to a peer that sends this and then waits.
async fn opening(said: &str) -> Error {
    let (ours, mut peer) = Peer::pair();
    let (opened, ()) = tokio::join!(
        within("the opening", Client::open(ours, DEADLINE)),
        peer.say(said)
    );
    opened.map(drop).expect_err("the peer is no QMP server")
}

async fn ended(driver: JoinHandle<Arc<str>>) -> Arc<str> {
    within("the driver to end", driver)
        .await
        .expect("it does not panic")
}

/// Polls a future until it waits, then drops it.
async fn begin_and_drop<F: Future>(future: F) {
    let mut future = pin!(future);
    std::future::poll_fn(|context| {
        assert!(future.as_mut().poll(context).is_pending(), "it waits");
        Poll::Ready(())
    })
    .await;
}

fn assert_not_qmp(error: &Error, word: &str) {
    assert!(matches!(error, Error::NotQmp(_)), "{error:?}");
    assert!(error.to_string().contains(word), "{error}");
}

fn assert_closed(error: &Error, word: &str) {
    assert!(matches!(error, Error::Closed(_)), "{error:?}");
    assert!(error.to_string().contains(word), "{error}");
}

fn is_closed<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::Closed(_)))
}

// The greeting.

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_greet_is_given_up_after_the_given_patience() {
    let (ours, _peer) = Peer::pair();
    let patience = Duration::from_secs(7);
    let began = tokio::time::Instant::now();
    let error = Client::open(ours, patience).await.map(drop).unwrap_err();
    assert!(
        matches!(error, Error::NoGreeting(after) if after == patience),
        "{error:?}"
    );
    assert_eq!(began.elapsed().as_secs(), 7);
}

#[tokio::test]
async fn a_peer_that_greets_and_then_says_nothing_is_given_up_too() {
    let (ours, mut peer) = Peer::pair();
    let (opened, command) = tokio::join!(Client::open(ours, Duration::from_millis(500)), async {
        peer.say(GREETING).await;
        peer.receive().await
    });
    assert_eq!(command.name(), "qmp_capabilities");
    assert!(matches!(opened, Err(Error::NoGreeting(_))));
}

#[tokio::test]
async fn a_greeting_that_is_json_but_not_qmp_is_refused() {
    for said in [
        "{}",
        "[]",
        "null",
        "7",
        r#"{"QGA": {}}"#,
        r#"{"return": {}, "id": 0}"#,
        r#"["QMP"]"#,
    ] {
        assert_not_qmp(&opening(said).await, "greeting");
    }
}

#[tokio::test]
async fn garbage_instead_of_a_greeting_is_refused() {
    for said in [
        "",
        "SSH-2.0-OpenSSH_9.2",
        "{",
        "\0\0\0\0",
        r#"{"QMP": "#,
        "{\"QMP\": {}} trailing",
    ] {
        assert_not_qmp(&opening(said).await, "not a QMP message");
    }
    let (ours, mut peer) = Peer::pair();
    let (opened, said) = tokio::join!(
        Client::open(ours, DEADLINE),
        peer.say_bytes(b"\xff\xfe\xc3\x28\n")
    );
    said.unwrap();
    assert_not_qmp(&opened.map(drop).unwrap_err(), "not a QMP message");
}

#[tokio::test]
async fn a_peer_that_hangs_up_instead_of_greeting_is_closed() {
    let (ours, peer) = Peer::pair();
    drop(peer);
    let error = Client::open(ours, DEADLINE).await.map(drop).unwrap_err();
    assert_closed(&error, "the peer closed it");
}

#[tokio::test]
async fn a_refused_negotiation_says_why() {
    let (ours, mut peer) = Peer::pair();
    let (opened, ()) = tokio::join!(Client::open(ours, DEADLINE), async {
        peer.say(GREETING).await;
        let command = peer.receive().await;
        peer.refuse(&command, "no capabilities today").await;
    });
    assert_not_qmp(&opened.map(drop).unwrap_err(), "no capabilities today");
}

#[tokio::test]
async fn a_refusal_counts_even_if_the_peer_hangs_up_with_it() {
    let (ours, mut peer) = Peer::pair();
    let (opened, ()) = tokio::join!(Client::open(ours, DEADLINE), async move {
        peer.say(GREETING).await;
        let command = peer.receive().await;
        peer.refuse(&command, "no capabilities today").await;
    });
    assert_not_qmp(&opened.map(drop).unwrap_err(), "no capabilities today");
}

#[tokio::test]
async fn an_event_before_the_greeting_is_no_greeting() {
    let error = opening(r#"{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}"#).await;
    assert_not_qmp(&error, "greeting");
}

#[tokio::test]
async fn events_and_strange_replies_inside_the_negotiation_do_not_disturb_it() {
    let (ours, mut peer) = Peer::pair();
    let (opened, ()) = tokio::join!(Client::open(ours, DEADLINE), async {
        peer.say(GREETING).await;
        peer.event("RESUME", json!({})).await;
        let command = peer.receive().await;
        peer.event("NEVER_HEARD_OF", json!({ "a": [1, 2, 3] })).await;
        peer.say(json!({ "return": {}, "id": "another's" })).await;
        peer.answer(&command, json!({})).await;
    });
    let (client, driver) = opened.unwrap();
    let driver = tokio::spawn(driver.run());
    let (reply, ()) = tokio::join!(client.execute(raw("query-status", json!({}))), async {
        let command = peer.receive().await;
        peer.answer(&command, json!({ "status": "running" })).await;
    });
    assert_eq!(reply.unwrap()["status"], "running");
    drop(client);
    ended(driver).await;
}

// Lines.

/// Sends a line without end, up to 100 MiB, and returns how much the client read.
async fn say_endlessly(mut stream: UnixStream) -> usize {
    let chunk = vec![b' '; 64 << 10];
    let mut said = 0;
    while said < 100 * MIB {
        match within("the driver to read or to hang up", stream.write(&chunk)).await {
            Ok(count) => said += count,
            Err(_) => break,
        }
    }
    said
}

#[tokio::test]
async fn an_endless_line_is_an_error_and_takes_no_memory() {
    let (client, driver, peer) = connected().await;
    let (reply, said, reason) = tokio::join!(
        client.execute(raw("query-status", json!({}))),
        say_endlessly(peer.into_stream()),
        ended(driver)
    );
    assert!(reason.contains("without a newline"), "{reason}");
    assert_closed(&reply.unwrap_err(), "without a newline");
    // The client's buffer, and the socket's.
    assert!(
        (MAX_LINE..MAX_LINE + MIB).contains(&said),
        "the client accepted {said} bytes"
    );
}

#[tokio::test]
async fn an_endless_greeting_is_an_error_and_takes_no_memory() {
    let (ours, peer) = Peer::pair();
    let (opened, said) = tokio::join!(Client::open(ours, DEADLINE), say_endlessly(peer.into_stream()));
    assert_closed(&opened.map(drop).unwrap_err(), "without a newline");
    assert!(said < MAX_LINE + MIB, "the client accepted {said} bytes");
}

/// Returns a reply to `id` with exactly that many bytes before its newline.
fn reply_of_length(id: &Value, length: usize) -> Vec<u8> {
    let frame = json!({ "return": "", "id": id }).to_string();
    let mut line = json!({ "return": "x".repeat(length - frame.len()), "id": id })
        .to_string()
        .into_bytes();
    assert_eq!(line.len(), length);
    line.push(b'\n');
    line
}

#[tokio::test]
async fn a_line_of_the_greatest_length_is_read_and_a_longer_one_is_not() {
    let (client, driver, mut peer) = connected().await;
    let (reply, ()) = tokio::join!(client.execute(raw("query-status", json!({}))), async {
        let command = peer.receive().await;
        let line = reply_of_length(&command.command["id"], MAX_LINE);
        peer.say_bytes(&line).await.unwrap();
    });
    assert!(reply.unwrap().as_str().unwrap().len() > MAX_LINE - 100);
    let (reply, ()) = tokio::join!(client.execute(raw("query-status", json!({}))), async {
        let command = peer.receive().await;
        let line = reply_of_length(&command.command["id"], MAX_LINE + 1);
        // The driver may close the connection before it has read the end.
        let _ = peer.say_bytes(&line).await;
    });
    assert_closed(&reply.unwrap_err(), "without a newline");
    assert!(ended(driver).await.contains("without a newline"));
}

#[tokio::test]
async fn garbage_between_replies_ends_the_connection_with_a_reason() {
    for garbage in [
        "",
        "{",
        "nonsense",
        "[1, 2]",
        "{}",
        r#"{"return": {}, "id": }"#,
        "\u{1}",
    ] {
        let (client, driver, mut peer) = connected().await;
        let (reply, ()) = tokio::join!(client.execute(raw("query-status", json!({}))), async {
            peer.receive().await;
            peer.say(garbage).await;
        });
        assert_closed(&reply.unwrap_err(), "does not speak QMP");
        assert!(ended(driver).await.contains("does not speak QMP"), "{garbage}");
    }
}

#[tokio::test]
async fn endlessly_nested_json_is_an_error_and_no_crash() {
    for (open, close) in [("[", "]"), (r#"{"a":"#, "}")] {
        let (client, driver, mut peer) = connected().await;
        let mut events = client.events();
        let nested = |depth: usize| {
            let data = format!("{}0{}", open.repeat(depth), close.repeat(depth));
            format!(r#"{{"event": "DEEP", "data": {data}}}"#)
        };
        peer.say(nested(100)).await;
        assert_eq!(within("the event", events.next()).await.unwrap().name, "DEEP");
        // As a reply it has no reader, and the connection continues.
        let (reply, ()) = tokio::join!(client.execute(raw("query-status", json!({}))), async {
            let command = peer.receive().await;
            let data = format!("{}0{}", open.repeat(500_000), close.repeat(500_000));
            peer.say(format!(
                r#"{{"return": {data}, "id": {}}}"#,
                command.command["id"]
            ))
            .await;
        });
        let error = reply.unwrap_err();
        assert!(
            matches!(&error, Error::UnexpectedReply { detail, .. } if detail.contains("recursion")),
            "{error:?}"
        );
        for (depth, word) in [(1_000, "recursion"), (500_000, "DEEP has")] {
            let (client, driver, mut peer) = connected().await;
            let (reply, ()) = tokio::join!(client.execute(raw("query-status", json!({}))), async {
                peer.receive().await;
                peer.say(nested(depth)).await;
            });
            assert_closed(&reply.unwrap_err(), word);
            ended(driver).await;
        }
        drop(client);
        ended(driver).await;
    }
}

#[tokio::test]
async fn error_texts_of_qemu_are_truncated_in_reports() {
    let (client, _driver, mut peer) = connected().await;
    let (reply, ()) = tokio::join!(client.execute(raw("query-status", json!({}))), async {
        let command = peer.receive().await;
        peer.refuse(&command, &"é".repeat(4 * MIB)).await;
    });
    let text = reply.unwrap_err().to_string();
    assert!(text.contains("refused query-status: ééé") && text.len() < 20_000);
    let (reply, ()) = tokio::join!(client.execute(raw_as::<u64>("query-status", json!({}))), async {
        let command = peer.receive().await;
        peer.answer(&command, json!("x".repeat(4 * MIB))).await;
    });
    assert!(reply.unwrap_err().to_string().len() < 2000);
}

// Replies.

#[tokio::test]
async fn many_commands_at_once_answered_in_any_order_get_their_own_replies() {
    let (client, _driver, mut peer) = connected().await;
    let count = 300;
    let commands = (0..count).map(|number| client.execute(raw("echo", json!({ "number": number }))));
    let (replies, ()) = tokio::join!(join_all(commands), async {
        let mut received = Vec::new();
        for _ in 0..count {
            received.push(peer.receive().await);
        }
        // In reverse order, and between the two ends.
        for index in (0..count / 2).rev().chain((count / 2..count).rev()) {
            let command = &received[index];
            let number = command.command["arguments"]["number"].clone();
            if number.as_u64().unwrap() % 3 == 0 {
                peer.refuse(command, &number.to_string()).await;
            } else {
                peer.answer(command, number).await;
            }
            peer.event("NOISE", json!({})).await;
        }
    });
    for (number, reply) in replies.into_iter().enumerate() {
        match reply {
            Ok(value) => assert_eq!(value, number),
            Err(Error::Refused {
                command, description, ..
            }) => {
                assert_eq!((command.as_str(), description), ("echo", number.to_string()));
                assert_eq!(number % 3, 0);
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn replies_to_no_command_are_ignored() {
    let (client, _driver, mut peer) = connected().await;
    let (reply, ()) = tokio::join!(client.execute(raw("query-status", json!({}))), async {
        let command = peer.receive().await;
        for id in [
            json!(4711),
            json!(-1),
            json!(1.5),
            json!("1"),
            json!(null),
            json!([1]),
            json!({}),
        ] {
            peer.say(json!({ "return": "wrong", "id": id })).await;
            peer.say(json!({ "error": { "class": "GenericError", "desc": "wrong" }, "id": id }))
                .await;
        }
        // QEMU replies without an id if it cannot parse a command.
        peer.say(json!({ "error": { "class": "GenericError", "desc": "wrong" } }))
            .await;
        peer.answer(&command, json!("right")).await;
        peer.answer(&command, json!("twice")).await;
    });
    assert_eq!(reply.unwrap(), "right");
    let (reply, ()) = tokio::join!(client.execute(raw("query-status", json!({}))), async {
        let command = peer.receive().await;
        peer.answer(&command, json!("next")).await;
    });
    assert_eq!(reply.unwrap(), "next");
}

#[tokio::test]
async fn a_reply_of_another_shape_is_an_error_and_the_connection_goes_on() {
    let (client, _driver, mut peer) = connected().await;
    for (value, good) in [(json!("text"), false), (json!(7), true)] {
        let (reply, ()) = tokio::join!(client.execute(raw_as::<u64>("query-number", json!({}))), async {
            let command = peer.receive().await;
            peer.answer(&command, value).await;
        });
        match reply {
            Ok(number) => assert!(good && number == 7),
            Err(Error::UnexpectedReply { command, .. }) => assert!(!good && command == "query-number"),
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test]
async fn a_command_fails_at_its_timeout_and_its_late_reply_is_ignored() {
    let (client, _driver, mut peer) = connected().await;
    let patience = Duration::from_millis(100);
    let late = client
        .execute_within(patience, raw("query-slow", json!({})))
        .await;
    assert!(
        matches!(late, Err(Error::TimedOut { command, after }) if command == "query-slow" && after == patience)
    );
    let (reply, ()) = tokio::join!(client.execute(raw("query-status", json!({}))), async {
        let slow = peer.receive().await;
        let command = peer.receive().await;
        peer.answer(&slow, json!("late")).await;
        peer.answer(&command, json!("mine")).await;
    });
    assert_eq!(reply.unwrap(), "mine");
}

// Events.

#[tokio::test]
async fn an_unknown_event_is_delivered_with_all_its_data() {
    let (client, _driver, mut peer) = connected().await;
    let mut events = client.events();
    let data = json!({ "of": ["a", { "later": "QEMU" }], "number": 18_446_744_073_709_551_615_u64 });
    peer.event("NEVER_HEARD_OF", data.clone()).await;
    // An event may have no data, and may have unknown members.
    peer.say(r#"{"event": "BARE", "timestamp": {}, "x-new": {"return": 1, "id": 1}}"#)
        .await;
    let event = within("the event", events.next()).await.unwrap();
    assert_eq!((event.name.as_str(), event.data()), ("NEVER_HEARD_OF", data));
    let event = within("the event", events.next()).await.unwrap();
    assert_eq!((event.name.as_str(), event.data()), ("BARE", Value::Null));
}

#[tokio::test]
async fn every_reader_gets_every_event_since_it_asked() {
    let (client, _driver, mut peer) = connected().await;
    let mut first = client.events();
    peer.event("ONE", json!({})).await;
    assert_eq!(within("the event", first.next()).await.unwrap().name, "ONE");
    let mut second = client.clone().events();
    peer.event("TWO", json!({})).await;
    peer.event("THREE", json!({})).await;
    for events in [&mut first, &mut second] {
        for name in ["TWO", "THREE"] {
            assert_eq!(within("the event", events.next()).await.unwrap().name, name);
        }
    }
}

/// Waits until all earlier events have been delivered: the reply to this command comes after them.
async fn in_step(client: &Client, peer: &mut Peer) {
    let (reply, ()) = tokio::join!(client.execute(raw("query-status", json!({}))), async {
        let command = peer.receive().await;
        peer.answer(&command, json!({})).await;
    });
    reply.expect("the connection is there");
}

#[tokio::test]
async fn a_lagging_reader_learns_that_it_missed_events_and_continues() {
    let (client, _driver, mut peer) = connected().await;
    let mut lagging = client.events();
    let mut following = client.events();
    for number in 0..2000 {
        peer.event("NUMBER", json!(number)).await;
        assert_eq!(
            within("the event", following.next()).await.unwrap().data(),
            number
        );
    }
    in_step(&client, &mut peer).await;
    assert_eq!(lagging.next().await.map(drop), Err(EventsError::Missed));
    let mut expected = within("the event", lagging.next())
        .await
        .unwrap()
        .data()
        .as_u64()
        .unwrap();
    assert!(expected > 0, "some were missed");
    while expected < 1999 {
        expected += 1;
        assert_eq!(
            within("the event", lagging.next()).await.unwrap().data(),
            expected
        );
    }
}

// The end.

#[tokio::test]
async fn a_lost_connection_fails_everything_that_waits_with_the_reason() {
    let (client, driver, mut peer) = connected().await;
    let mut events = client.events();
    let file = || OwnedFd::from(File::open("/dev/null").unwrap());
    let commands = join_all((0..100).map(|_| client.execute(raw("query-status", json!({})))));
    // The second one waits for the reply to the first.
    let descriptors =
        join_all((0..2).map(|_| client.execute_with_descriptor(raw("add-fd", json!({})), file())));
    let (replies, added, next, ()) = tokio::join!(commands, descriptors, events.next(), async {
        for _ in 0..101 {
            peer.receive().await;
        }
        drop(peer);
    });
    for reply in replies.into_iter().chain(added) {
        assert_closed(&reply.unwrap_err(), "the peer closed it");
    }
    assert_eq!(next.map(drop), Err(EventsError::Closed));
    assert_eq!(&*ended(driver).await, "the peer closed it");
    let after = within("the answer", client.execute(raw("query-status", json!({})))).await;
    assert_closed(&after.unwrap_err(), "the peer closed it");
    assert_eq!(client.events().next().await.map(drop), Err(EventsError::Closed));
}

#[tokio::test]
async fn messages_sent_before_a_hangup_still_count() {
    // The driver may see its own command or the peer's end first, so the test runs both orders often.
    for _ in 0..50 {
        let (client, driver, mut peer) = connected().await;
        let mut events = client.events();
        let first = client.execute(raw("quit", json!({})));
        let mut first = pin!(first);
        let command = tokio::select! {
            _ = &mut first => panic!("completed without a reply"),
            command = peer.receive() => command,
        };
        peer.answer(&command, json!("bye")).await;
        peer.event("SHUTDOWN", json!({})).await;
        drop(peer);
        let second = client.execute(raw("query-status", json!({})));
        let (first, second) = tokio::join!(first, second);
        assert_eq!(first.unwrap(), "bye");
        assert!(is_closed(&second));
        assert_eq!(within("the event", events.next()).await.unwrap().name, "SHUTDOWN");
        assert_eq!(events.next().await.map(drop), Err(EventsError::Closed));
        ended(driver).await;
    }
}

#[tokio::test]
async fn the_connection_closes_with_the_last_client() {
    let (client, driver, mut peer) = connected().await;
    let other = client.clone();
    let mut events = client.events();
    drop(client);
    in_step(&other, &mut peer).await;
    drop(other);
    assert_eq!(&*ended(driver).await, "it was shut down");
    assert!(peer.try_receive().await.is_none());
    assert_eq!(events.next().await.map(drop), Err(EventsError::Closed));
}

#[tokio::test]
async fn a_driver_that_is_dropped_fails_what_waits() {
    let (client, driver, mut peer) = connected().await;
    let (reply, ()) = tokio::join!(client.execute(raw("query-status", json!({}))), async {
        peer.receive().await;
        driver.abort();
    });
    assert!(is_closed(&reply));
    assert!(peer.try_receive().await.is_none());
}

/// Runs one session in which the peer closes the connection after it has sent `says` and read `reads` bytes. Returns
/// its progress.
async fn dialogue(says: usize, reads: usize) -> (bool, bool, usize, usize) {
    let lines = [
        format!("{GREETING}\r\n"),
        "{\"return\": {}, \"id\": 0}\r\n".to_owned(),
        "{\"event\": \"STOP\", \"data\": {}}\r\n{\"return\": \"good\", \"id\": 1}\r\n".to_owned(),
    ];
    let (ours, peer) = Peer::pair();
    let mut stream = peer.into_stream();
    let peer = async move {
        let (mut said, mut read) = (0, 0);
        for (number, line) in lines.iter().enumerate() {
            if number > 0 {
                loop {
                    if read == reads {
                        return (said, read);
                    }
                    match stream.read_u8().await {
                        Ok(byte) => {
                            read += 1;
                            if byte == b'\n' {
                                break;
                            }
                        }
                        Err(_) => return (said, read),
                    }
                }
            }
            let part = &line.as_bytes()[..line.len().min(says - said)];
            if stream.write_all(part).await.is_err() {
                return (said, read);
            }
            said += part.len();
            if said == says {
                return (said, read);
            }
        }
        (said, read)
    };
    let client = async {
        let Ok((client, driver)) = Client::open(ours, DEADLINE).await else {
            return (false, false);
        };
        let driver = tokio::spawn(driver.run());
        let mut events = client.events();
        let reply = client.execute(raw("query-status", json!({}))).await;
        let good = match &reply {
            Ok(value) => value == "good",
            Err(error) => !matches!(error, Error::Closed(_)),
        };
        drop(client);
        ended(driver).await;
        while events.next().await.is_ok() {}
        (true, good)
    };
    let ((said, read), (opened, good)) = within("the dialogue", async { tokio::join!(peer, client) }).await;
    (opened, good, said, read)
}

#[tokio::test]
async fn a_peer_that_hangs_up_at_any_byte_is_survived() {
    let (opened, good, all_said, all_read) = dialogue(usize::MAX, usize::MAX).await;
    assert!(opened && good);
    let greeting = GREETING.len() + 2;
    for says in 0..=all_said {
        let (opened, good, ..) = dialogue(says, usize::MAX).await;
        // The carriage returns do not belong to the messages; the newlines do.
        assert_eq!(good, says == all_said, "{says} bytes said");
        assert!(!opened || says > greeting, "{says} bytes said");
    }
    for reads in 0..=all_read {
        let (_, good, ..) = dialogue(usize::MAX, reads).await;
        assert_eq!(good, reads == all_read, "{reads} bytes read");
    }
}

// Writing.

/// Returns a pair whose sending end accepts little at a time.
fn narrow_pair() -> (UnixStream, Peer) {
    let (ours, peer) = Peer::pair();
    rustix::net::sockopt::set_socket_send_buffer_size(&ours, 1).expect("a buffer can be small");
    (ours, peer)
}

#[tokio::test]
async fn a_peer_that_reads_slowly_gets_whole_lines() {
    let (ours, peer) = narrow_pair();
    let (client, _driver, mut peer) = connected_over(ours, peer).await;
    let count = 20;
    let commands = (0..count).map(|number| {
        let text = char::from(b'a' + number).to_string().repeat(20_000);
        client.execute(raw("echo", json!({ "number": number, "text": text })))
    });
    let (replies, ()) = tokio::join!(join_all(commands), async {
        for number in 0..count {
            let command = peer.receive().await;
            let arguments = &command.command["arguments"];
            assert_eq!(arguments["number"], number);
            let text = arguments["text"].as_str().unwrap();
            assert!(text.len() == 20_000 && text.bytes().all(|byte| byte == b'a' + number));
            peer.answer(&command, json!(number)).await;
        }
    });
    for (number, reply) in replies.into_iter().enumerate() {
        assert_eq!(reply.unwrap(), number);
    }
}

#[tokio::test]
async fn replies_and_events_are_read_while_the_peer_does_not_read() {
    let (ours, peer) = narrow_pair();
    let (client, _driver, mut peer) = connected_over(ours, peer).await;
    let mut events = client.events();
    let long = client.execute(raw("echo", json!({ "text": "x".repeat(MIB) })));
    let ((), reply) = tokio::join!(
        async {
            for number in 0..500 {
                peer.event("NUMBER", json!({ "number": number, "text": "y".repeat(1000) }))
                    .await;
                assert_eq!(
                    within("the event", events.next()).await.unwrap().data()["number"],
                    number
                );
            }
            let command = peer.receive().await;
            peer.answer(&command, json!("read")).await;
        },
        long
    );
    assert_eq!(reply.unwrap(), "read");
}

#[tokio::test]
async fn a_command_that_is_dropped_halfway_leaves_no_half_line() {
    let (ours, peer) = narrow_pair();
    let (client, _driver, mut peer) = connected_over(ours, peer).await;
    for round in 0..5 {
        // Too long for the socket: the driver is in the middle of it when the future is dropped.
        let dropped = client.execute(raw("dropped", json!({ "text": "x".repeat(100_000) })));
        tokio::select! {
            biased;
            _ = dropped => panic!("completed without a reply"),
            () = async { for _ in 0..10 { tokio::task::yield_now().await } } => {}
        }
        // And one that the driver has not even seen.
        begin_and_drop(client.execute(raw("unseen", json!({})))).await;
        let (reply, ()) = tokio::join!(client.execute(raw("echo", json!({ "round": round }))), async {
            let dropped = peer.receive().await;
            assert_eq!(dropped.name(), "dropped");
            assert_eq!(
                dropped.command["arguments"]["text"].as_str().unwrap().len(),
                100_000
            );
            let unseen = peer.receive().await;
            let command = peer.receive().await;
            assert_eq!(command.command["arguments"]["round"], round);
            peer.answer(&unseen, json!("late")).await;
            peer.answer(&dropped, json!("late")).await;
            peer.answer(&command, json!(round)).await;
        });
        assert_eq!(reply.unwrap(), round);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_peer_that_never_stops_talking_lets_others_have_their_turn() {
    for line in ["{\"event\":\"NOISE\"}\n", "{\"return\":{},\"id\":4711}\n"] {
        let (client, driver, peer) = connected().await;
        let talking = Arc::new(AtomicBool::new(true));
        let mut stream = peer.into_stream().into_std().unwrap();
        stream.set_nonblocking(false).unwrap();
        let (goes_on, said) = (talking.clone(), line.repeat(4000));
        let sent = Arc::new(AtomicUsize::new(0));
        let counted = sent.clone();
        // On a thread of its own, so that it sends also while the only worker is busy.
        let talker = std::thread::spawn(move || {
            while goes_on.load(Ordering::Relaxed) && stream.write_all(said.as_bytes()).is_ok() {
                counted.fetch_add(said.len(), Ordering::Relaxed);
            }
        });
        let turns = 100;
        let others = tokio::spawn(async move {
            let before = sent.load(Ordering::Relaxed);
            for _ in 0..turns {
                tokio::task::yield_now().await;
            }
            sent.load(Ordering::Relaxed) - before
        });
        // In bytes, because a busy host makes every turn slower. Without yielding, a turn of the driver takes some MiB.
        let between = within("the others", others).await.unwrap();
        assert!(between < turns << 20, "{between} bytes in {turns} turns");
        drop(client);
        assert_eq!(&*ended(driver).await, "it was shut down");
        talking.store(false, Ordering::Relaxed);
        talker.join().unwrap();
    }
}

// Commands without a reply.

#[tokio::test]
async fn a_peer_that_answers_nothing_is_asked_no_more_than_so_much() {
    let (client, _driver, mut peer) = connected().await;
    let asked = 1024;
    let waiting = join_all((0..asked).map(|number| client.execute(raw("echo", json!({ "number": number })))));
    let (replies, ()) = tokio::join!(waiting, async {
        let mut received = Vec::new();
        for _ in 0..asked {
            received.push(peer.receive().await);
        }
        let refused = within("the refusal", client.execute(raw("one-more", json!({})))).await;
        match refused {
            Err(Error::Unanswered { command, unanswered }) => {
                assert_eq!((command.as_str(), unanswered), ("one-more", asked));
            }
            other => panic!("{other:?}"),
        }
        // No byte of it was sent, and no waiting command is lost.
        for command in &received {
            peer.answer(command, command.command["arguments"]["number"].clone())
                .await;
        }
    });
    for (number, reply) in replies.into_iter().enumerate() {
        assert_eq!(reply.unwrap(), number);
    }
    in_step(&client, &mut peer).await;
}

#[tokio::test]
async fn a_peer_that_reads_nothing_makes_nothing_grow() {
    let (ours, peer) = narrow_pair();
    let (client, driver, peer) = connected_over(ours, peer).await;
    let text = "x".repeat(MIB);
    // Simulates callers that time out: at most ten times the length of the queue.
    for _ in 0..40 {
        tokio::select! {
            biased;
            _ = client.execute(raw("echo", json!({ "text": text }))) => panic!("completed without a reply or a full queue"),
            () = async { for _ in 0..10 { tokio::task::yield_now().await } } => {}
        }
    }
    let waiting = join_all((0..20).map(|_| client.execute(raw("echo", json!({ "text": text })))));
    let (replies, ()) = tokio::join!(waiting, async {
        let refused = within("the refusal", client.execute(raw("one-more", json!({})))).await;
        assert!(matches!(refused, Err(Error::Unanswered { .. })), "{refused:?}");
        drop(peer);
    });
    let (refused, closed): (Vec<_>, Vec<_>) = replies
        .into_iter()
        .partition(|reply| matches!(reply, Err(Error::Unanswered { .. })));
    assert!(closed.iter().all(is_closed), "{closed:?}");
    assert!(
        (2..=5).contains(&closed.len()),
        "{} were queued, {} refused",
        closed.len(),
        refused.len()
    );
    ended(driver).await;
}

#[tokio::test]
async fn commands_that_nobody_waits_for_leave_room_for_others() {
    let (client, _driver, mut peer) = connected().await;
    let mut received = Vec::new();
    for number in 0..5000 {
        let abandoned = client.execute(raw("echo", json!({ "number": number })));
        tokio::select! {
            _ = abandoned => panic!("completed without a reply"),
            command = peer.receive() => received.push(command),
        }
    }
    // Late replies must not be delivered to other commands.
    let (reply, ()) = tokio::join!(client.execute(raw("last", json!({}))), async {
        let last = peer.receive().await;
        for command in &received {
            peer.answer(command, json!("late")).await;
        }
        peer.answer(&last, json!("mine")).await;
    });
    assert_eq!(reply.unwrap(), "mine");
}

#[tokio::test]
async fn a_descriptor_that_nobody_waits_for_still_keeps_the_next_one_waiting() {
    let (client, _driver, mut peer) = connected().await;
    let file = || OwnedFd::from(File::open("/dev/null").unwrap());
    let first = client.execute_with_descriptor(raw("add-fd", json!({ "opaque": "first" })), file());
    let first = tokio::select! {
        _ = first => panic!("completed without a reply"),
        command = peer.receive() => command,
    };
    // So many that abandoned commands are removed from the queue.
    for _ in 0..1100 {
        let abandoned = client.execute(raw("echo", json!({})));
        tokio::select! {
            _ = abandoned => panic!("completed without a reply"),
            _ = peer.receive() => {}
        }
    }
    let second = client.execute_with_descriptor(raw("add-fd", json!({ "opaque": "second" })), file());
    let (reply, ()) = tokio::join!(second, async {
        in_step(&client, &mut peer).await;
        peer.answer(&first, json!({ "fdset-id": 1 })).await;
        let second = peer.receive().await;
        assert_eq!(second.command["arguments"]["opaque"], "second");
        assert_eq!(second.descriptors.len(), 1);
        peer.answer(&second, json!({ "fdset-id": 2 })).await;
    });
    assert_eq!(reply.unwrap()["fdset-id"], 2);
}

// Descriptors.

/// Returns a file with this text.
fn file_of(text: &str) -> OwnedFd {
    use std::io::Seek;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.rewind().unwrap();
    file.into()
}

fn content(descriptor: OwnedFd) -> String {
    let mut text = String::new();
    File::from(descriptor).read_to_string(&mut text).unwrap();
    text
}

#[tokio::test]
async fn a_descriptor_comes_with_the_first_byte_of_its_command_and_no_copy_is_kept() {
    let (client, _driver, mut peer) = connected().await;
    let (reader, writer) = std::io::pipe().unwrap();
    // Lines without a descriptor are before and after it in the socket.
    let (before, added, after, ()) = tokio::join!(
        client.execute(raw("before", json!({}))),
        client.execute_with_descriptor(raw("add-fd", json!({ "opaque": "o" })), writer.into()),
        client.execute(raw("after", json!({}))),
        async {
            for name in ["before", "add-fd", "after"] {
                let mut command = peer.receive().await;
                assert_eq!(command.name(), name);
                assert_eq!(command.descriptors.len(), usize::from(name == "add-fd"), "{name}");
                assert_eq!(command.late_descriptors.len(), 0, "{name}");
                command.descriptors.clear();
                peer.answer(&command, json!(name)).await;
            }
        }
    );
    assert_eq!(
        [before, added, after].map(Result::unwrap),
        ["before", "add-fd", "after"]
    );
    // All ends for writing are closed: the one that the peer got, and the client's.
    assert_eq!(rustix::io::read(&reader, &mut [0u8; 1]), Ok(0));
}

#[tokio::test]
async fn a_descriptor_of_a_long_line_comes_once_and_first() {
    let (ours, peer) = narrow_pair();
    let (client, _driver, mut peer) = connected_over(ours, peer).await;
    let arguments = json!({ "opaque": "x".repeat(100_000) });
    let (reply, ()) = tokio::join!(
        client.execute_with_descriptor(raw("add-fd", arguments), file_of("long")),
        async {
            let mut command = peer.receive().await;
            assert_eq!(
                (command.descriptors.len(), command.late_descriptors.len()),
                (1, 0)
            );
            assert_eq!(content(command.descriptors.remove(0)), "long");
            peer.answer(&command, json!({})).await;
        }
    );
    reply.unwrap();
}

#[tokio::test]
async fn the_next_descriptor_is_not_sent_before_the_last_one_was_answered() {
    let (client, _driver, mut peer) = connected().await;
    let add =
        |text: &str| client.execute_with_descriptor(raw("add-fd", json!({ "opaque": text })), file_of(text));
    let (first, second, third, other, ()) = tokio::join!(
        add("first"),
        add("second"),
        add("third"),
        client.execute(raw("other", json!({}))),
        async {
            for name in ["first", "second", "third"] {
                let mut command = peer.receive().await;
                assert_eq!(command.command["arguments"]["opaque"], name);
                assert_eq!(command.descriptors.len(), 1);
                assert_eq!(content(command.descriptors.remove(0)), name);
                if name == "first" {
                    // A command without a descriptor overtakes the waiting ones.
                    let other = peer.receive().await;
                    assert_eq!(other.name(), "other");
                    peer.answer(&other, json!({})).await;
                }
                if name == "second" {
                    peer.refuse(&command, "not this one").await;
                } else {
                    peer.answer(&command, json!(name)).await;
                }
            }
        }
    );
    assert_eq!(first.unwrap(), "first");
    assert!(second.unwrap_err().is_refusal());
    assert_eq!(third.unwrap(), "third");
    other.unwrap();
}

#[tokio::test]
async fn a_dropped_descriptor_keeps_the_others_waiting_until_it_was_answered() {
    let (client, _driver, mut peer) = connected().await;
    let add =
        |text: &str| client.execute_with_descriptor(raw("add-fd", json!({ "opaque": text })), file_of(text));
    let dropped = tokio::select! {
        _ = add("dropped") => panic!("completed without a reply"),
        command = peer.receive() => command,
    };
    let (next, other, ()) = tokio::join!(add("next"), client.execute(raw("other", json!({}))), async {
        let other = peer.receive().await;
        assert_eq!(other.name(), "other");
        peer.answer(&other, json!({})).await;
        in_step_without_descriptors(&client, &mut peer).await;
        peer.answer(&dropped, json!("late")).await;
        let command = peer.receive().await;
        assert_eq!(
            (
                command.command["arguments"]["opaque"].as_str(),
                command.descriptors.len()
            ),
            (Some("next"), 1)
        );
        peer.answer(&command, json!("mine")).await;
    });
    assert_eq!(next.unwrap(), "mine");
    other.unwrap();
}

/// Waits until the driver has processed all earlier input and sent no descriptor.
async fn in_step_without_descriptors(client: &Client, peer: &mut Peer) {
    let (reply, ()) = tokio::join!(client.execute(raw("query-status", json!({}))), async {
        let command = peer.receive().await;
        assert_eq!(command.name(), "query-status");
        peer.answer(&command, json!({})).await;
    });
    reply.unwrap();
}

// A real QEMU.

fn machine(dir: &Path) -> Vm {
    Builder::new(dir, "web").disk(Disk::new("vda", 8 << 20)).start()
}

async fn real(vm: &Vm) -> (Client, JoinHandle<Arc<str>>) {
    let stream = vm.monitor_stream();
    stream.set_nonblocking(true).unwrap();
    let opened = Client::open(UnixStream::from_std(stream).unwrap(), DEADLINE).await;
    let (client, driver) = opened.expect("QEMU greets");
    (client, tokio::spawn(driver.run()))
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_replies_refuses_and_sends_events() {
    let dir = crate::common::test_directory();
    let vm = machine(dir.path());
    let (client, driver) = real(&vm).await;
    assert_eq!(client.process(), Some(vm.pid()));
    let mut events = client.events();
    let status: Value = client.execute(raw("query-status", json!({}))).await.unwrap();
    assert_eq!(status["running"], false);
    let error = client
        .execute(raw("no-such-command", json!({})))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Refused { class, .. } if class == "CommandNotFound"),
        "{error:?}"
    );
    let error = client
        .execute(raw("job-dismiss", json!({ "id": "none" })))
        .await
        .unwrap_err();
    assert!(
        error.is_refusal() && error.to_string().contains("job-dismiss"),
        "{error}"
    );
    vm.cont();
    while within("RESUME", events.next()).await.unwrap().name != "RESUME" {}
    drop(client);
    assert_eq!(&*ended(driver).await, "it was shut down");
    // QEMU accepts the next client.
    let (client, _driver) = real(&vm).await;
    client.execute(raw("query-status", json!({}))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_client_on_a_monitor_gets_no_greeting_until_the_first_has_gone() {
    let dir = crate::common::test_directory();
    let vm = machine(dir.path());
    let (client, driver) = real(&vm).await;
    let stream = vm.monitor_stream();
    stream.set_nonblocking(true).unwrap();
    let second = Client::open(UnixStream::from_std(stream).unwrap(), Duration::from_millis(300)).await;
    let error = second.map(drop).unwrap_err();
    assert!(matches!(error, Error::NoGreeting(_)), "{error:?}");
    assert!(error.to_string().contains("another client"), "{error}");
    client.execute(raw("query-status", json!({}))).await.unwrap();
    drop(client);
    ended(driver).await;
    real(&vm)
        .await
        .0
        .execute(raw("query-status", json!({})))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_schema_of_qemu_lists_its_features() {
    let dir = crate::common::test_directory();
    let vm = machine(dir.path());
    let (client, _driver) = real(&vm).await;
    let schema = client.schema().await.unwrap();
    for command in [
        "blockdev-backup",
        "blockdev-create",
        "transaction",
        "query-qmp-schema",
        "add-fd",
    ] {
        assert!(schema.has_command(command), "{command}");
    }
    for (command, argument) in [
        ("transaction", "properties"),
        ("transaction", "actions"),
        ("blockdev-backup", "auto-dismiss"),
        ("blockdev-backup", "filter-node-name"),
        ("blockdev-backup", "x-perf"),
        ("add-fd", "opaque"),
        ("blockdev-add", "node-name"),
    ] {
        assert!(schema.command_takes(command, argument), "{command} {argument}");
    }
    // An event, a type and an unknown name.
    for command in ["BLOCK_JOB_COMPLETED", "BlockdevBackup", "made-up", ""] {
        assert!(!schema.has_command(command), "{command}");
    }
    for (command, argument) in [
        ("transaction", "made-up"),
        ("transaction", ""),
        ("made-up", "properties"),
        // A feature of a member's type, not of the command.
        ("transaction", "completion-mode"),
        ("query-status", "status"),
    ] {
        assert!(!schema.command_takes(command, argument), "{command} {argument}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn descriptors_that_are_passed_at_once_land_each_in_its_own_set() {
    let dir = crate::common::test_directory();
    let vm = machine(dir.path());
    let (client, _driver) = real(&vm).await;
    let paths: Vec<_> = (0..40)
        .map(|number| dir.path().join(format!("file-{number}")))
        .collect();
    let adding = paths.iter().map(|path| {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .unwrap();
        client.execute_with_descriptor(raw("add-fd", json!({ "opaque": path })), file.into())
    });
    // Other clients use QEMU at the same time.
    let others = join_all((0..40).map(|_| client.execute(raw("query-status", json!({})))));
    let (added, others) = within("the replies", async { tokio::join!(join_all(adding), others) }).await;
    assert!(others.iter().all(Result::is_ok));
    let mut sets = std::collections::BTreeSet::new();
    for (path, added) in paths.iter().zip(added) {
        let added = added.unwrap();
        assert!(
            sets.insert(added["fdset-id"].as_i64().unwrap()),
            "two descriptors have the same set"
        );
        // The same file, in QEMU's own table.
        let link = std::fs::read_link(format!("/proc/{}/fd/{}", vm.pid(), added["fd"])).unwrap();
        assert_eq!(&link, path);
    }
    let listed: Value = client.execute(raw("query-fdsets", json!({}))).await.unwrap();
    assert_eq!(listed.as_array().unwrap().len(), paths.len());
    for set in listed.as_array().unwrap() {
        assert_eq!(set["fds"].as_array().unwrap().len(), 1, "{set}");
        let opaque = set["fds"][0]["opaque"].as_str().unwrap();
        assert!(paths.iter().any(|path| path.to_str() == Some(opaque)), "{set}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_is_killed_fails_what_waits() {
    let dir = crate::common::test_directory();
    let mut vm = machine(dir.path());
    let (client, driver) = real(&vm).await;
    let mut events = client.events();
    // QEMU stays connected and does not reply.
    vm.freeze();
    let (reply, ()) = tokio::join!(client.execute(raw("query-status", json!({}))), async {
        tokio::task::yield_now().await;
        tokio::task::block_in_place(|| vm.kill());
    });
    assert!(is_closed(&reply), "{reply:?}");
    assert!(!ended(driver).await.is_empty());
    loop {
        match within("the end of the events", events.next()).await {
            Err(EventsError::Closed) => break,
            other => drop(other.unwrap()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_events_of_a_qemu_that_quits_are_delivered() {
    let dir = crate::common::test_directory();
    let vm = machine(dir.path());
    let (client, driver) = real(&vm).await;
    let mut events = client.events();
    client.execute(raw("quit", json!({}))).await.unwrap();
    let mut names = Vec::new();
    while let Ok(event) = within("an event", events.next()).await {
        names.push(event.name.clone());
    }
    assert!(names.contains(&"SHUTDOWN".to_owned()), "{names:?}");
    ended(driver).await;
    drop(wait::until("QEMU's end", || {
        std::os::unix::net::UnixStream::connect(vm.monitor_path()).err()
    }));
}
