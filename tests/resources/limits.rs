//! Limits of resources that callers can use. Each limit of the configuration applies at its value, the error names it,
//! and resources are released when their use ends.

use std::fs;

use crate::common::System;
use crate::common::authority::{Answer, Authority};
use crate::common::caller::{Caller, assert_completed, cancel};
use crate::common::clients::{OTHER_USER, THIRD_USER, USER};
use crate::common::daemon::Daemon;
use crate::common::disk::Disk;
use crate::common::eavesdropper::Eavesdropper;
use crate::common::polkit;
use crate::common::proxies::{Options, assert_limit, slowly};
use crate::common::storage::files_below;
use crate::common::vm::Vm;
use crate::common::wait;
use tokio::task::JoinHandle;
use zbus::wire::OwnedObjectPath;

const MIB: u64 = 1 << 20;

/// Starts a VM whose backup, at the bandwidth of [`slowly`], takes longer than any test.
fn machine(system: &System, name: &str) -> Vm {
    system.configured(system.vm(name).disk(Disk::new("vda", 256 * MIB)).running())
}

async fn try_slowly(caller: &Caller, domain: &str) -> zbus::Result<OwnedObjectPath> {
    caller.try_start(domain, "", &[], slowly(MIB)).await
}

type Waiting = JoinHandle<zbus::Result<(String, String, String)>>;

/// Sends a call of `Wait` that is in flight before any later call.
async fn wait_for(caller: &Caller, job: &OwnedObjectPath, heard: &mut Eavesdropper) -> Waiting {
    let job = caller.job(job.clone()).await;
    let waiting = tokio::spawn(async move { job.wait().await });
    heard.next().await;
    waiting
}

/// Returns a caller that the service knows already: its calls are counted in order.
async fn known(system: &System, uid: u32) -> Caller {
    let caller = Caller::of_user(system, uid).await;
    caller.manager.list_domains().await.unwrap();
    caller
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_in_flight_are_counted_over_all_connections_of_a_user_until_they_are_answered() {
    let system = System::setup()
        .table("[limits]\ncalls-per-user = 2\ncalls = 5")
        .start();
    let _vm = machine(&system, "web");
    let root = known(&system, 0).await;
    let path = try_slowly(&root, "web").await.unwrap();
    let mut heard = Eavesdropper::start(&system, path.as_str()).await;
    let (one, two) = (known(&system, USER).await, known(&system, USER).await);
    let other = known(&system, OTHER_USER).await;

    let first = wait_for(&one, &path, &mut heard).await;
    one.manager.list_domains().await.unwrap();
    let second = wait_for(&two, &path, &mut heard).await;
    assert_limit("calls-per-user", one.manager.list_domains().await);
    assert_limit("calls-per-user", two.manager.subscribe().await);
    // Another connection does not help either.
    let third = Caller::of_user(&system, USER).await;
    assert_limit("calls-per-user", third.manager.list_domains().await);
    other.manager.list_domains().await.unwrap();

    // Root has a higher limit than a user, but not above the total.
    let mut waiting = vec![first];
    for _ in 0..3 {
        root.manager.list_domains().await.unwrap();
        waiting.push(wait_for(&root, &path, &mut heard).await);
    }
    assert_limit("calls", root.manager.list_domains().await);
    assert_limit("calls", other.manager.list_domains().await);
    let stranger = Caller::of_user(&system, THIRD_USER).await;
    assert_limit("calls", stranger.manager.list_domains().await);

    // A closed connection releases its share.
    two.connection.close().await.unwrap();
    assert!(second.await.unwrap().is_err());
    wait::until_async("room for a call", async || one.manager.list_domains().await.ok()).await;
    root.job(path.clone()).await.cancel().await.unwrap();
    for waiting in waiting {
        let (result, _, _) = wait::within("the answer", waiting).await.unwrap().unwrap();
        assert_eq!(result, "cancelled");
    }
    // As many calls in flight as before.
    let path = try_slowly(&root, "web").await.unwrap();
    let mut heard = Eavesdropper::start(&system, path.as_str()).await;
    let _first = wait_for(&one, &path, &mut heard).await;
    one.manager.list_domains().await.unwrap();
    let _second = wait_for(&third, &path, &mut heard).await;
    assert_limit("calls-per-user", one.manager.list_domains().await);
}

/// As root's timers do.
#[tokio::test(flavor = "multi_thread")]
async fn root_is_served_while_other_users_fill_their_limits() {
    let system = System::setup()
        .table("[limits]\ncalls-per-user = 2\ncalls = 4")
        .start();
    let _web = machine(&system, "web");
    let root = Caller::new(&system).await;
    let path = try_slowly(&root, "web").await.unwrap();
    let mut heard = Eavesdropper::start(&system, path.as_str()).await;
    let one = known(&system, USER).await;
    let other = known(&system, OTHER_USER).await;
    let third = known(&system, THIRD_USER).await;
    let mut waiting = Vec::new();
    for caller in [&one, &one, &other] {
        waiting.push(wait_for(caller, &path, &mut heard).await);
    }
    for caller in [&other, &third] {
        assert_limit("calls", caller.manager.list_domains().await);
    }
    root.manager.list_domains().await.unwrap();
    root.job(path.clone()).await.cancel().await.unwrap();
    for waiting in waiting {
        let (result, _, _) = wait::within("the answer", waiting).await.unwrap().unwrap();
        assert_eq!(result, "cancelled");
    }
    third.manager.list_domains().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_under_way_are_counted_until_they_end() {
    let rules = [USER, OTHER_USER].map(|uid| polkit::allow(uid, &["domain.backup"]));
    let system = System::setup()
        .rules(&rules.concat())
        .table("[limits]\njobs-per-user = 1\njobs = 2")
        .start();
    let machines = ["a", "b", "c"].map(|name| machine(&system, name));
    let before = machines[2].residue();
    let root = Caller::new(&system).await;
    let user = Caller::of_user(&system, USER).await;
    let other = Caller::of_user(&system, OTHER_USER).await;
    let nothing_of_c = async |jobs: usize| {
        assert_eq!(root.manager.list_jobs().await.unwrap().len(), jobs);
        assert_eq!(machines[2].residue(), before);
        assert!(!system.store().join("c").exists());
    };

    let users = user.start_with("a", "", &[], slowly(MIB)).await;
    assert_limit("jobs-per-user", try_slowly(&user, "c").await);
    // Over another connection too.
    let again = Caller::of_user(&system, USER).await;
    assert_limit("jobs-per-user", try_slowly(&again, "c").await);
    nothing_of_c(1).await;
    let others = other.start_with("b", "", &[], slowly(MIB)).await;
    assert_limit("jobs", try_slowly(&root, "c").await);
    nothing_of_c(2).await;

    cancel(&users).await;
    cancel(&others).await;
    // A backup continues after its starter disconnects, so it still counts.
    let left = again.start_with("a", "", &[], slowly(MIB)).await;
    let left = root.job(left.inner().path().to_owned().into()).await;
    again.connection.close().await.unwrap();
    assert_limit("jobs-per-user", try_slowly(&user, "c").await);
    cancel(&left).await;

    // Root may use the whole total.
    let mut jobs = Vec::new();
    for domain in ["a", "b"] {
        jobs.push(root.start_with(domain, "", &[], slowly(MIB)).await);
    }
    assert_limit("jobs", try_slowly(&user, "c").await);
    assert_limit("jobs", try_slowly(&root, "c").await);
    nothing_of_c(5).await;
    // A successful backup releases its share as a failed one does.
    jobs[0].set_speed(0).await.unwrap();
    assert_completed(&jobs[0]).await;
    cancel(&user.start_with("c", "", &[], slowly(MIB)).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriptions_are_counted_by_connection_until_they_end() {
    let system = System::setup()
        .table("[limits]\nsubscriptions-per-user = 1\nsubscriptions = 4")
        .start();
    let (mut one, two) = (
        Caller::of_user(&system, USER).await,
        Caller::of_user(&system, USER).await,
    );
    let other = Caller::of_user(&system, OTHER_USER).await;
    let third = Caller::of_user(&system, THIRD_USER).await;
    let mut roots = Vec::new();
    for _ in 0..3 {
        roots.push(Caller::new(&system).await);
    }
    one.manager.subscribe().await.unwrap();
    // A second subscription of one connection does not count.
    one.manager.subscribe().await.unwrap();
    assert_limit("subscriptions-per-user", two.manager.subscribe().await);
    other.manager.subscribe().await.unwrap();
    roots[0].manager.subscribe().await.unwrap();
    roots[1].manager.subscribe().await.unwrap();
    assert_limit("subscriptions", roots[2].manager.subscribe().await);
    assert_limit("subscriptions", third.manager.subscribe().await);

    one.manager.unsubscribe().await.unwrap();
    one.manager.unsubscribe().await.unwrap();
    two.manager.subscribe().await.unwrap();
    assert_limit("subscriptions-per-user", one.manager.subscribe().await);
    two.connection.close().await.unwrap();
    wait::until_async("room for a subscription", async || {
        one.manager.subscribe().await.ok()
    })
    .await;

    // A refused caller gets no signal. The first announcement has reached all subscribers when the second arrives.
    let mut refused = roots.pop().unwrap();
    assert_limit("subscriptions", refused.manager.subscribe().await);
    let file = system.write_domain_file("web", "monitor = \"/nowhere\"\n");
    one.signals_until("DomainAdded").await;
    fs::remove_file(file).unwrap();
    one.signals_until("DomainRemoved").await;
    assert_eq!(refused.signals_so_far().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_is_longer_than_the_limit_is_refused_to_root_too() {
    let system = System::setup()
        .rules(&polkit::allow(USER, &["domain.backup"]))
        .table("[limits]\ndocument-bytes = 100")
        .start();
    let vm = machine(&system, "web");
    let before = vm.residue();
    let document = |bytes: usize| format!("{:bytes$}", "<domainbackup/>");
    for (jobs, uid) in [0, USER].into_iter().enumerate() {
        let caller = Caller::of_user(&system, uid).await;
        let refused = caller.try_start("web", &document(101), &[], Options::new()).await;
        assert_limit("document-bytes", refused);
        // The empty document does not bypass the limit.
        let refused = caller
            .try_start("web", &" ".repeat(101), &[], Options::new())
            .await;
        assert_limit("document-bytes", refused);
        assert_eq!(vm.residue(), before);
        assert_eq!(files_below(&system.store()), [""; 0]);
        assert_eq!(caller.manager.list_jobs().await.unwrap().len(), jobs);
        caller.complete("web", &document(100)).await;
        fs::remove_dir_all(system.store().join("web")).unwrap();
    }
}

#[test]
fn a_configuration_with_a_bad_value_is_refused_by_key_and_line() {
    let system = System::setup().without_daemon().start();
    let bad = [
        ("jobs-per-user = -1", "limits"),
        ("jobs = \"many\"", "limits"),
        ("calls = 1.5", "limits"),
        ("descriptors = 99999999999999999999", "limits"),
        ("subscriptions-per-users = 3", "limits"),
        ("signals = \"loud\"", "bus"),
        ("signals = true", "bus"),
        ("signal = \"private\"", "bus"),
    ];
    for (index, (line, table)) in bad.into_iter().enumerate() {
        let dir = system.dir().join(format!("bad-{index}"));
        fs::create_dir(&dir).unwrap();
        let config = dir.join("backupd.toml");
        let text = format!(
            "state-directory = \"{0}/state\"\n\n[{table}]\n# why\n{line}\n",
            dir.display()
        );
        fs::write(&config, text).unwrap();
        let mut daemon = Daemon::start_unready(system.bus(), &dir, &config);
        assert_eq!(daemon.process().wait(), 78, "{line}: {}", daemon.log());
        let log = daemon.log();
        let key = line.split(' ').next().unwrap();
        for word in [config.to_str().unwrap(), "line 5", key] {
            assert!(log.contains(word), "{line}: {word:?} in {log}");
        }
        assert!(!dir.join("state").exists(), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_lists_of_one_user_delay_no_other_user() {
    let system = System::setup().without_polkit().start();
    let authority = Authority::start(&system, |_| Answer::Yes).await;
    let _vm = machine(&system, "web");
    let root = Caller::new(&system).await;
    root.complete("web", "").await;
    let user = Caller::of_user(&system, USER).await;
    let name = user.connection.unique_name().unwrap().to_string();
    authority
        .decide_by(move |question| {
            match question.caller == name && question.action.ends_with("domain.read") {
                true => Answer::Silence,
                false => Answer::Yes,
            }
        })
        .await;
    let lists = (0..60).map(|_| user.manager.list_backups(Options::new()));
    let mut waiting = Box::pin(futures_util::future::join_all(lists));
    let listed = async {
        authority
            .wait_for_question("org.example.backup1.domain.read")
            .await;
        root.manager.list_backups(Options::new()).await.unwrap()
    };
    let listed = tokio::select! {
        _ = &mut waiting => panic!("polkit does not answer"),
        (listed, _) = wait::within("the list", listed) => listed,
    };
    assert_eq!(listed.len(), 1);
}
