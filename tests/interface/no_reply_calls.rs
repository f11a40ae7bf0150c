//! Calls with the flag NO_REPLY_EXPECTED: the service executes them and sends no reply.

use crate::common::System;
use crate::common::authority::{Answer, Authority};
use crate::common::caller::Caller;
use crate::common::clients::USER;
use crate::common::disk::Disk;
use crate::common::proxies::{Options, slowly};
use crate::common::storage::files_below;
use crate::common::vm::Vm;
use crate::common::wait;
use backupd::names::{BUS_NAME, JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH};
use futures_util::StreamExt;
use serde::Serialize;
use serde_json::json;
use zbus::MessageStream;
use zbus::message::{Flags, Type};
use zbus::wire::DynamicType;

const MIB: u64 = 1 << 20;
/// A bandwidth at which a backup runs long enough to be changed and cancelled.
const SPEED: u64 = 16 * MIB;

/// Sends a call with the flag.
async fn send<B: Serialize + DynamicType>(
    caller: &Caller,
    path: &str,
    interface: &str,
    member: &str,
    body: &B,
) {
    let message = zbus::Message::method_call(path, member)
        .destination(BUS_NAME)
        .interface(interface)
        .with_flags(Flags::NO_REPLY_EXPECTED)
        .build(body)
        .unwrap();
    caller.connection.send(&message).await.unwrap();
}

fn machine(system: &System) -> Vm {
    system.configured(system.vm("web").disk(Disk::new("vda", 256 * MIB)).running())
}

/// Returns the number of replies that a connection receives before that to a call that is sent now.
async fn replies(caller: &Caller, messages: &mut MessageStream) -> usize {
    let ping = zbus::Message::method_call("/", "Ping")
        .destination(BUS_NAME)
        .interface("org.freedesktop.DBus.Peer")
        .build(&())
        .unwrap();
    caller.connection.send(&ping).await.unwrap();
    let mut count = 0;
    loop {
        let message = wait::within("an answer", messages.next()).await.unwrap().unwrap();
        if message.header().reply_serial() == Some(ping.primary_header().serial_num()) {
            return count;
        }
        let kind = message.message_type();
        count += usize::from([Type::MethodReturn, Type::Error].contains(&kind));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_made_and_its_caller_gets_no_reply() {
    let system = System::start();
    let _vm = machine(&system);
    let mut caller = Caller::new(&system).await;
    let mut messages = MessageStream::from(&caller.connection);
    // Skips the replies to the finished calls.
    replies(&caller, &mut messages).await;
    let files: Vec<zbus::Fd<'_>> = Vec::new();
    let body = ("web", "", files, Options::new());
    send(&caller, ROOT_PATH, MANAGER_INTERFACE, "CreateBackup", &body).await;
    caller.signals_until("JobEnded").await;
    // A refused call gets no reply either.
    send(&caller, ROOT_PATH, MANAGER_INTERFACE, "Rescan", &()).await;
    assert_eq!(replies(&caller, &mut messages).await, 0);
    let backups = files_below(&system.store());
    assert!(
        backups.iter().any(|file| file.ends_with("manifest.json")),
        "{backups:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_slowed_down_and_cancelled() {
    let system = System::start();
    let vm = machine(&system);
    let caller = Caller::new(&system).await;
    let job = caller.start_with("web", "", &[], slowly(SPEED)).await;
    let path = job.inner().path().to_string();
    send(&caller, &path, JOB_INTERFACE, "SetSpeed", &(2 * SPEED,)).await;
    let speed = || vm.qmp("query-block-jobs", json!({}))[0]["speed"].as_u64();
    wait::until("the new speed", || (speed() == Some(2 * SPEED)).then_some(()));
    send(&caller, &path, JOB_INTERFACE, "Cancel", &()).await;
    let (result, _, _) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(result, "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_begins_and_ends() {
    let system = System::start();
    let _vm = machine(&system);
    let (mut plain, mut subscribed) = (Caller::new(&system).await, Caller::new(&system).await);
    subscribed.manager.subscribe().await.unwrap();
    for (caller, member) in [(&plain, "Subscribe"), (&subscribed, "Unsubscribe")] {
        send(caller, ROOT_PATH, MANAGER_INTERFACE, member, &()).await;
        // When a later call is answered, the service has started on this one.
        caller.manager.list_jobs().await.unwrap();
    }
    Caller::new(&system).await.complete("web", "").await;
    let count = async |caller: &mut Caller| caller.signals_until("JobEnded").await.len();
    assert_eq!(count(&mut plain).await, 4);
    assert_eq!(count(&mut subscribed).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_without_reply_count_as_calls_in_flight_until_they_end() {
    let limits = "[limits]\ncalls-per-user = 3";
    let system = System::setup().without_polkit().table(limits).start();
    let authority = Authority::start(&system, |_| Answer::Yes).await;
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    let job = root.start_with("web", "", &[], slowly(SPEED)).await;
    let path = job.inner().path().to_string();
    let again = Caller::of_user(&system, USER).await;
    again.manager.list_jobs().await.unwrap();
    // Each connection has one call that waits for polkit.
    let action = "org.example.backup1.domain.set-speed";
    authority
        .decide(move |asked| {
            if asked == action {
                Answer::Silence
            } else {
                Answer::Yes
            }
        })
        .await;
    let mut callers = Vec::new();
    for _ in 0..3 {
        let user = Caller::of_user(&system, USER).await;
        user.manager.list_jobs().await.unwrap();
        send(&user, &path, JOB_INTERFACE, "SetSpeed", &(SPEED,)).await;
        callers.push(user);
    }
    wait::until_async("the questions", || async {
        (authority.count(action) == 3).then_some(())
    })
    .await;
    let refused = again.manager.list_jobs().await.unwrap_err();
    assert!(refused.to_string().contains("calls-per-user"), "{refused}");
    wait::until_async("the calls to end", || async {
        again.manager.list_jobs().await.ok()
    })
    .await;
}
