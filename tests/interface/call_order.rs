//! The order in which the calls of one connection take effect, and in which signals reach it.

use std::time::{Duration, Instant};

use crate::common::System;
use crate::common::authority::{Answer, Authority};
use crate::common::caller::{Caller, assert_completed, cancel};
use crate::common::clients::USER;
use crate::common::disk::Disk;
use crate::common::proxies::{Options, slowly};
use crate::common::proxy::Proxy;
use crate::common::vm::Vm;
use crate::common::wait;
use backupd::names::{BUS_NAME, DOMAIN_INTERFACE, JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH};
use futures_util::future::join_all;
use serde::Serialize;
use serde_json::json;
use zbus::Message;
use zbus::message::Flags;
use zbus::wire::DynamicType;

const MIB: u64 = 1 << 20;
/// Calls that are sent without waiting for a reply.
const BURST: u64 = 40;
const ROUNDS: u64 = 5;
/// The limit for later calls behind one that waits for a user.
const PROMPT: Duration = Duration::from_secs(4);

fn machine(system: &System) -> Vm {
    system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", 256 * MIB).fill(0, 64 * MIB, 0x11))
            .running(),
    )
}

fn message<B: Serialize + DynamicType>(
    path: &str,
    interface: &str,
    member: &str,
    flags: Option<Flags>,
    body: &B,
) -> Message {
    let mut message = Message::method_call(path, member)
        .destination(BUS_NAME)
        .interface(interface);
    if let Some(flag) = flags {
        message = message.with_flags(flag);
    }
    message.build(body).expect("a message is made")
}

/// Sends all messages at once, then waits for the reply to the last one.
async fn send(caller: &Caller, messages: &[Message]) {
    for message in messages {
        caller.connection.send(message).await.unwrap();
    }
    caller.manager.list_jobs().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_bandwidth_of_a_burst_stays() {
    let system = System::start();
    let vm = machine(&system);
    let caller = Caller::new(&system).await;
    let job = caller.start_with("web", "", &[], slowly(MIB)).await;
    let path = job.inner().path().to_string();
    let speed = || vm.qmp("query-block-jobs", json!({}))[0]["speed"].as_u64();
    for round in 1..=ROUNDS {
        let calls: Vec<_> = (1..=BURST)
            .map(|step| round * MIB + step)
            .map(|speed| message(&path, JOB_INTERFACE, "SetSpeed", None, &(speed,)))
            .collect();
        send(&caller, &calls).await;
        let last = Some(round * MIB + BURST);
        wait::until("the last speed", || (speed() == last).then_some(()));
        // No other signal follows.
        caller.manager.list_domains().await.unwrap();
        assert_eq!(speed(), last, "round {round}");
    }
    cancel(&job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_of_many_subscribe_and_unsubscribe_calls_counts() {
    let system = System::start();
    let _vm = machine(&system);
    let mut listener = Caller::new(&system).await;
    let root = Caller::new(&system).await;
    for round in 0..ROUNDS {
        for subscribed in [true, false] {
            let mut members: Vec<_> = (0..BURST).flat_map(|_| ["Subscribe", "Unsubscribe"]).collect();
            members.extend(subscribed.then_some("Subscribe"));
            let calls: Vec<_> = members
                .iter()
                .map(|member| message(ROOT_PATH, MANAGER_INTERFACE, member, None, &()))
                .collect();
            send(&listener, &calls).await;
            root.complete_full("web", "").await;
            let heard = listener.signals_until("JobEnded").await;
            let detailed = heard.iter().any(|signal| signal.name == "Completed");
            assert_eq!(detailed, subscribed, "round {round}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_are_made_and_removed_in_the_order_of_the_calls() {
    let system = System::start();
    let _vm = machine(&system);
    let caller = Caller::new(&system).await;
    let domain = system.domain_path("web").unwrap();
    for round in 0..ROUNDS {
        let name = format!("round-{round}");
        let document = format!("<domaincheckpoint><name>{name}</name></domaincheckpoint>");
        let calls = [
            message(
                &domain,
                DOMAIN_INTERFACE,
                "CreateCheckpoint",
                None,
                &(document, Options::new()),
            ),
            message(
                &domain,
                DOMAIN_INTERFACE,
                "DeleteCheckpoint",
                None,
                &(name, Options::new()),
            ),
        ];
        send(&caller, &calls).await;
        let list = message(
            &domain,
            DOMAIN_INTERFACE,
            "ListCheckpoints",
            None,
            &(Options::new(),),
        );
        send(&caller, std::slice::from_ref(&list)).await;
        let domain = crate::common::proxies::DomainProxy::new(&caller.connection, domain.as_str())
            .await
            .unwrap();
        assert_eq!(
            domain.list_checkpoints(Options::new()).await.unwrap(),
            [],
            "round {round}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_waits_for_a_password_or_a_job_delays_no_later_call() {
    let system = System::setup().without_polkit().start();
    let authority = Authority::start(&system, |_| Answer::Yes).await;
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    let job = root.start_with("web", "", &[], slowly(MIB)).await;
    let path = job.inner().path().to_string();
    authority
        .decide_by(
            |question| match (question.action.ends_with("set-speed"), question.interactive) {
                (true, true) => Answer::Silence,
                (true, false) => Answer::Challenge,
                (false, _) => Answer::Yes,
            },
        )
        .await;
    let user = Caller::of_user(&system, USER).await;
    let asking = Some(Flags::ALLOW_INTERACTIVE_AUTH);
    let waiting = message(&path, JOB_INTERFACE, "Wait", None, &());
    user.connection.send(&waiting).await.unwrap();
    let asked = message(&path, JOB_INTERFACE, "SetSpeed", asking, &(7 * MIB,));
    user.connection.send(&asked).await.unwrap();
    let begun = Instant::now();
    let of_user = user.job(job.inner().path().to_owned().into()).await;
    wait::within("the end", of_user.cancel()).await.unwrap();
    assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
    let (result, _, _) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(result, "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_can_be_cancelled_on_the_connection_that_waits_for_it_to_begin() {
    let system = System::start();
    let vm = system
        .vm("web")
        .disk(Disk::new("vda", MIB).fill(0, MIB, 0x11))
        .start();
    let proxy = Proxy::start(&system.dir().join("proxy"), &vm.monitor_path());
    system.write_domain_file("web", &format!("monitor = \"{}\"\n", proxy.path().display()));
    let domain = system.wait_for_domain("web");
    let mut caller = Caller::new(&system).await;
    // QEMU does not get the command that starts the backup.
    let held = proxy.hold("transaction", |arguments| arguments["properties"].is_object());
    let body = ("", Vec::<zbus::Fd<'_>>::new(), Options::new());
    let create = message(&domain, DOMAIN_INTERFACE, "CreateBackup", None, &body);
    caller.connection.send(&create).await.unwrap();
    let started = caller.signals_until("JobStarted").await;
    held.reached();
    let path = zbus::wire::ObjectPath::try_from(started[0].arguments[1].as_str()).unwrap();
    let job = caller.job(path.to_owned().into()).await;
    let begun = Instant::now();
    wait::within("Cancel", job.cancel()).await.unwrap();
    assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
    held.pass();
    let (result, _, _) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(result, "cancelled");
}

/// A subscriber whose check polkit does not answer delays all signals. When a signal is sent, its values must not be
/// older than those that were read before it.
#[tokio::test(flavor = "multi_thread")]
async fn signalled_values_are_never_older_than_values_read_before() {
    let system = System::setup().without_polkit().start();
    let authority = Authority::start(&system, |_| Answer::Yes).await;
    let _vm = machine(&system);
    let slow = Caller::of_user(&system, USER).await;
    slow.manager.subscribe().await.unwrap();
    let name = slow.connection.unique_name().unwrap().to_string();
    let silent = name.clone();
    authority
        .decide_by(move |question| match question.caller == silent {
            true => Answer::Silence,
            false => Answer::Yes,
        })
        .await;
    let mut root = Caller::new(&system).await;
    for round in 0..3 {
        let job = root.start_with("web", "", &[], slowly(4 * MIB)).await;
        root.all_signals_until("PropertiesChanged").await;
        root.signals_so_far().await;
        // The next change is being signalled.
        let asked = || {
            let asked = authority.asked();
            asked.iter().filter(|question| question.caller == name).count()
        };
        let before = asked();
        wait::until_async("polkit to be asked", || async {
            (asked() > before).then_some(())
        })
        .await;
        cancel(&job).await;
        let read = job.bytes_done().await.unwrap();
        let told = root.all_signals_until("JobEnded").await;
        let told: Vec<_> = told
            .iter()
            .filter(|signal| signal.name == "PropertiesChanged")
            .collect();
        assert!(
            told[0].arguments[1].contains("Str(\"State\"): Variant(Str(\"cancelled\"))"),
            "round {round}, {read}: {told:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_client_hears_of_a_job_after_many_waiters_left() {
    let system = System::start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    let job = root.start_with("web", "", &[], slowly(8 * MIB)).await;
    let path = job.inner().path().to_string();
    let waiting = async || {
        let caller = Caller::new(&system).await;
        let wait = message(&path, JOB_INTERFACE, "Wait", None, &());
        send(&caller, &[wait]).await;
        caller
    };
    for leaving in join_all((0..20).map(|_| waiting())).await {
        leaving.connection.close().await.unwrap();
    }
    let mut last = waiting().await;
    job.set_speed(0).await.unwrap();
    assert_completed(&job).await;
    let heard = last.signals_until("JobEnded").await;
    assert!(heard.iter().any(|signal| signal.name == "Completed"), "{heard:?}");
}
