//! Signals and introspection reveal no domain to users without the right to read it. A user who loses the right
//! receives no more signals.

use std::fs;
use std::time::{Duration, Instant};

use crate::common::System;
use crate::common::caller::{Caller, Signal, brief};
use crate::common::clients::{OTHER_USER, ROOT, USER};
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::process::Process;
use crate::common::proxies::{JobProxy, error_name, slowly};
use crate::common::vm::Vm;
use crate::common::wait;
use backupd::names::{BUS_NAME, JOB_INTERFACE, ROOT_PATH};
use zbus::Connection;

const MIB: u64 = 1 << 20;
const NO_SUCH_DOMAIN: &str = "org.example.Backup1.Error.NoSuchDomain";
const UNKNOWN_OBJECT: &str = "org.freedesktop.DBus.Error.UnknownObject";
/// The service remembers replies of polkit for half a minute, unless polkit signals a change.
const AT_ONCE: Duration = Duration::from_secs(15);

/// `dbus-monitor` of a user. It asks the bus for all messages; if the bus refuses, as for an ordinary user, it
/// eavesdrops with match rules.
struct Monitor {
    process: Process,
    marker: Connection,
}

impl Monitor {
    async fn start(system: &System, name: &str, uid: u32) -> Self {
        let arguments = ["--address", system.bus().address()];
        let command = system.clients().command(uid, "dbus-monitor", &arguments);
        let monitor = Self {
            process: Process::start(name, system.dir(), command),
            marker: system.connect().await,
        };
        monitor.heard("Ready").await;
        monitor
    }

    /// Returns everything that it received before this word, which no message has contained yet.
    async fn heard(&self, word: &str) -> String {
        wait::until_async("the monitor to listen", async || {
            let (to, path) = (None::<&str>, "/marker");
            let marked = self.marker.emit_signal(to, path, "test.Marker", word, &());
            marked.await.unwrap();
            let heard = self.process.stdout();
            let (before, _) = heard.split_once(&format!("interface=test.Marker; member={word}"))?;
            Some(before.to_owned())
        })
        .await
    }
}

async fn end(job: &JobProxy<'_>, expected: &str) {
    let (result, _, _) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(result, expected);
}

/// Makes three backups of a VM: one completes, one is cancelled, and one fails, because QEMU is killed.
async fn three_backups(caller: &Caller, domain: &str, mut vm: Vm) {
    caller.complete(domain, "").await;
    let job = caller.start_with(domain, "", &[], slowly(MIB)).await;
    job.cancel().await.unwrap();
    end(&job, "cancelled").await;
    let job = caller.start_with(domain, "", &[], slowly(MIB)).await;
    wait::until_async("the copying", async || {
        (job.state().await.unwrap() == "running").then_some(())
    })
    .await;
    vm.kill();
    end(&job, "failed").await;
}

/// Returns the names of signals, in order.
fn names(signals: &[Signal]) -> Vec<&str> {
    signals.iter().map(|signal| signal.name.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_of_the_whole_bus_learns_nothing_of_hidden_domains() {
    let hide = "polkit.addRule(function(action, subject) {
        if (action.id == 'org.example.backup1.domain.getattr' && action.lookup('domain_name') == 'secret'
            && subject.user == 'nobody') return polkit.Result.NO;
    });\n";
    let owner_may = polkit::allow(OTHER_USER, &["service.register-domain", "domain.backup"]);
    let system = System::setup().rules(hide).rules(&owner_may).start();
    let machine = |name: &str, disk: &str| system.vm(name).disk(Disk::new(disk, 64 * MIB)).start();
    let (secret, heirloom) = (machine("vm1", "treasure"), machine("vm2", "jewel"));
    let uuids = [secret.uuid().to_owned(), heirloom.uuid().to_owned()];

    let (root, owner) = (
        Caller::new(&system).await,
        Caller::of_user(&system, OTHER_USER).await,
    );
    let mut nobody = Caller::of_user(&system, USER).await;
    let mut reader = Caller::new(&system).await;
    nobody.manager.subscribe().await.unwrap();
    reader.manager.subscribe().await.unwrap();
    let nobodys = Monitor::start(&system, "nobodys", USER).await;
    assert!(
        nobodys.process.log().contains("eavesdrop"),
        "{}",
        nobodys.process.log()
    );
    let roots = Monitor::start(&system, "roots", ROOT).await;

    let file = system.domain_file("secret", &secret);
    let secret_path = system.wait_for_domain("secret");
    let heirloom_path = owner.register("heirloom", heirloom.monitor_stream().into()).await;
    three_backups(&root, "secret", secret).await;
    three_backups(&owner, "heirloom", heirloom).await;
    fs::remove_file(file).unwrap();
    let read = reader.all_signals_until("DomainRemoved").await;
    let read = [read, reader.all_signals_until("DomainRemoved").await].concat();

    let mut everybodys = Vec::new();
    let (nobodys, roots) = (nobodys.heard("End").await, roots.heard("End").await);
    for (index, result) in ["completed", "cancelled", "failed"]
        .iter()
        .cycle()
        .take(6)
        .enumerate()
    {
        let id = index + 1;
        let job = format!("{ROOT_PATH}/job/{id}");
        everybodys.push(format!("JobStarted {id} {job}"));
        everybodys.push(format!("JobEnded {id} {job} {result}"));
        let arguments = format!("   uint32 {id}\n   object path \"{job}\"\n");
        for signal in [
            format!("member=JobStarted\n{arguments}"),
            format!("member=JobEnded\n{arguments}   string \"{result}\"\n"),
        ] {
            assert!(nobodys.contains(&signal), "{signal:?} in {nobodys}");
        }
    }
    assert_eq!(brief(&nobody.signals_so_far().await), everybodys);
    let (store, heirloom_path) = (system.store(), heirloom_path.unwrap());
    let words = [
        "secret",
        "treasure",
        "heirloom",
        "jewel",
        &uuids[0],
        &uuids[1],
        store.to_str().unwrap(),
        &secret_path,
        heirloom_path.as_str(),
        "DomainAdded",
        "DomainRemoved",
        "PropertiesChanged",
        "BlockJob",
        "member=Completed",
        "CheckAuthorization",
        "org.example.Backup1.Error.",
        "the connection to QEMU was lost",
    ];
    for word in words {
        assert!(!nobodys.contains(word), "{word:?} in {nobodys}");
        // The signal was sent.
        assert!(roots.contains(word), "{word:?} in {roots}");
    }
    // It reached the users with the right.
    let read = format!("{read:?}");
    for word in [
        "treasure",
        "jewel",
        &secret_path,
        heirloom_path.as_str(),
        "was lost",
    ] {
        assert!(read.contains(word), "{word:?} in {read}");
    }
}

/// Starts a system with a VM `web`, and a user who subscribed.
async fn with_subscriber() -> (System, Vm, Caller, Caller) {
    let system = System::start();
    let vm = system.configured(system.vm("web").disk(Disk::new("vda", 64 * MIB)).running());
    let user = Caller::of_user(&system, USER).await;
    user.manager.subscribe().await.unwrap();
    let root = Caller::new(&system).await;
    (system, vm, root, user)
}

/// Waits until the domain is visible to the caller, or hidden.
async fn wait_for_sight(user: &Caller, seen: bool) {
    let began = Instant::now();
    wait::until_async(&format!("the domain to be seen: {seen}"), async || {
        match user.manager.get_domain("web").await {
            Ok(_) => seen.then_some(()),
            Err(error) => {
                assert_eq!(error_name(&error), NO_SUCH_DOMAIN);
                (!seen).then_some(())
            }
        }
    })
    .await;
    assert!(began.elapsed() < AT_ONCE, "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_polkit_rules_apply_at_once() {
    let (system, _vm, _root, user) = with_subscriber().await;
    // The service would remember each reply for longer than this takes.
    for _ in 0..2 {
        wait_for_sight(&user, true).await;
        assert_eq!(user.manager.list_domains().await.unwrap().len(), 1);
        system.write_further_rules(Some(&polkit::deny(USER, &["domain.getattr"])));
        wait_for_sight(&user, false).await;
        assert_eq!(user.manager.list_domains().await.unwrap(), []);
        system.write_further_rules(None);
    }
    wait_for_sight(&user, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_without_the_read_right_hears_nothing_more() {
    let (system, _vm, root, mut user) = with_subscriber().await;
    let job = root.start_with("web", "", &[], slowly(MIB)).await;
    // The user receives the signal, and has the right to read.
    user.all_signals_until("PropertiesChanged").await;
    let looked_at = user.job(job.inner().path().to_owned().into()).await;
    looked_at.state().await.unwrap();
    system.write_further_rules(Some(&polkit::deny(USER, &["domain.read"])));
    wait::until_async("the job to be hidden", async || {
        let error = looked_at.state().await.err()?;
        assert_eq!(error_name(&error), UNKNOWN_OBJECT);
        Some(())
    })
    .await;
    user.signals_so_far().await;
    job.set_speed(0).await.unwrap();
    end(&job, "completed").await;
    assert_eq!(names(&user.all_signals_until("JobEnded").await), ["JobEnded"]);
    root.complete("web", "").await;
    let heard = user.all_signals_until("JobEnded").await;
    assert_eq!(names(&heard), ["JobStarted", "JobEnded"]);

    system.write_further_rules(None);
    wait::until_async("the job to be seen", async || looked_at.state().await.ok()).await;
    root.complete("web", "").await;
    let heard = user.signals_until("JobEnded").await;
    assert_eq!(
        names(&heard),
        ["JobStarted", "BlockJobCompleted", "Completed", "JobEnded"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_polkit_decides_about_subscribers() {
    let (mut system, _vm, root, mut user) = with_subscriber().await;
    wait_for_sight(&user, true).await;
    system.set_rules(&polkit::deny(USER, &["domain.getattr"]));
    wait_for_sight(&user, false).await;
    root.manager.get_domain("web").await.unwrap();
    user.signals_so_far().await;
    root.complete("web", "").await;
    // Nor that the domain is removed.
    fs::remove_file(system.dir().join("etc/domains.d/web.toml")).unwrap();
    system.wait_for_no_domain("web");
    assert_eq!(names(&user.signals_so_far().await), ["JobStarted", "JobEnded"]);
}

/// Returns the signals that an ordinary user receives about a VM that appears, is backed up and disappears: without a
/// subscription, and with one.
async fn heard_of_a_machine(system: System) -> [Vec<Signal>; 2] {
    let mut plain = Caller::of_user(&system, USER).await;
    let mut subscribed = Caller::of_user(&system, USER).await;
    subscribed.manager.subscribe().await.unwrap();
    let vm = system.vm("web").disk(Disk::new("vda", 64 * MIB)).start();
    let file = system.domain_file("web", &vm);
    // The signal that it is connected now.
    let mut heard = subscribed.all_signals_until("PropertiesChanged").await;
    Caller::new(&system).await.complete("web", "").await;
    heard.extend(subscribed.all_signals_until("JobEnded").await);
    fs::remove_file(file).unwrap();
    heard.extend(subscribed.all_signals_until("DomainRemoved").await);
    heard.extend(subscribed.signals_so_far().await);
    [plain.signals_so_far().await, heard]
}

const ALL_OF_A_MACHINE: [&str; 6] = [
    "DomainAdded",
    "JobStarted",
    "BlockJobCompleted",
    "Completed",
    "JobEnded",
    "DomainRemoved",
];

/// Every signal, each once.
#[track_caller]
fn assert_all_of_a_machine(mut heard: Vec<Signal>) {
    let changed = heard.extract_if(.., |signal| signal.name == "PropertiesChanged");
    let changed: Vec<Signal> = changed.collect();
    assert_eq!(names(&heard), ALL_OF_A_MACHINE);
    assert!(changed.iter().any(|signal| signal.path == heard[0].arguments[0]));
    let job = &heard[1].arguments[1];
    assert!(changed.iter().any(|signal| signal.path == *job));
    assert!(changed.windows(2).all(|two| two[0] != two[1]), "{changed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_without_subscription_sees_only_the_start_and_end_of_a_job() {
    let [plain, subscribed] = heard_of_a_machine(System::start()).await;
    assert_eq!(names(&plain), ["JobStarted", "JobEnded"]);
    assert_all_of_a_machine(subscribed);
}

#[tokio::test(flavor = "multi_thread")]
async fn public_signals_reach_listeners_and_subscribers_once_each() {
    let setup = System::setup().table("[bus]\nsignals = \"broadcast\"");
    let [plain, subscribed] = heard_of_a_machine(setup.start()).await;
    assert_eq!(plain, subscribed);
    assert_all_of_a_machine(plain);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_object_tree_shows_each_user_only_visible_objects() {
    let rules = "polkit.addRule(function(action, subject) {
        if (action.lookup('domain_name') == 'secret' && subject.user != 'root') return polkit.Result.NO;
    });";
    let system = System::setup().rules(rules).start();
    let root = Caller::new(&system).await;
    let mut paths = Vec::new();
    let mut machines = Vec::new();
    for name in ["web", "secret"] {
        let vm = system.vm(name).disk(Disk::new("vda", MIB)).start();
        system.domain_file(name, &vm);
        machines.push(vm);
        let domain = system.wait_for_domain(name);
        let job = root.complete(name, "").await;
        paths.push([domain, job.inner().path().to_string()]);
    }
    let tree = |uid| {
        let listed = system.clients().busctl(uid, &["--list", "tree", BUS_NAME]);
        listed.expect_success()
    };
    let (users, roots) = (tree(USER), tree(ROOT));
    let has = |tree: &str, path: &String| tree.lines().any(|line| line == path);
    let [web, secret] = paths.as_slice() else {
        panic!("two machines");
    };
    for path in web {
        assert!(has(&users, path) && has(&roots, path), "{path}: {users}{roots}");
    }
    for path in secret {
        assert!(!has(&users, path) && has(&roots, path), "{path}: {users}{roots}");
    }
    let introspect = |path| system.clients().busctl(USER, &["introspect", BUS_NAME, path]);
    assert!(introspect(&web[1]).stdout.contains(JOB_INTERFACE));
    let hidden = introspect(&secret[1]);
    assert!(!hidden.success() && hidden.stdout.is_empty(), "{}", hidden.stdout);
}
