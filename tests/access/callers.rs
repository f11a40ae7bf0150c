//! Permissions of callers, with the real polkitd and real ordinary users.

use crate::common::System;
use crate::common::caller::{Caller, assert_completed};
use crate::common::clients::{OTHER_USER, USER};
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::proxies::{Options, error_name, slowly};
use crate::common::storage::files_below;
use crate::common::vm::Vm;
use crate::common::wait;

const MIB: u64 = 1 << 20;
const DENIED: &str = "org.freedesktop.DBus.Error.AccessDenied";
const BUS: &str = "org.example.Backup1";
const ROOT_PATH: &str = "/org/example/Backup1";

fn machine(system: &System, name: &str) -> Vm {
    let disk = Disk::new("vda", 16 * MIB).fill(0, MIB, 0x11);
    system.configured(system.vm(name).disk(disk))
}

/// `CreateBackup` by a user through `busctl`; returns its standard error if it is refused.
fn create(system: &System, uid: u32, domain: &str, document: &str, flags: &[&str]) -> Result<(), String> {
    let call = [
        "call",
        BUS,
        ROOT_PATH,
        BUS,
        "CreateBackup",
        "ssaha{sv}",
        domain,
        document,
        "0",
        "0",
    ];
    let output = system.clients().busctl(uid, &[flags, &call].concat());
    if output.success() {
        Ok(())
    } else {
        Err(output.stderr)
    }
}

fn wait_for_backup(system: &System, domain: &str) {
    wait::until("the backup", || {
        let files = files_below(&system.store().join(domain));
        files
            .iter()
            .any(|file| !file.starts_with('.') && file.ends_with("manifest.json"))
            .then_some(())
    });
}

#[test]
fn a_user_without_authorisation_is_denied_and_nothing_happens() {
    let system = System::start();
    let vm = machine(&system, "web");
    let before = vm.residue();
    let refused = create(&system, USER, "web", "", &[]).unwrap_err();
    assert!(
        refused.contains("Access denied") || refused.contains("not authorised"),
        "{refused}"
    );
    // Without the flag polkit asks nobody, and the reply says that the flag would help.
    let refused = create(
        &system,
        USER,
        "web",
        "",
        &["--allow-interactive-authorization=no"],
    )
    .unwrap_err();
    assert!(refused.contains("nteractive"), "{refused}");
    assert_eq!(vm.residue(), before);
    assert_eq!(files_below(&system.store()), [""; 0]);
    let output = system
        .clients()
        .backupctl(USER, &["create", "web", "--no-ask-password"]);
    assert_eq!(output.status, 4, "{}", output.stderr);
}

#[test]
fn a_user_that_a_rule_allows_gets_its_backup() {
    let system = System::setup()
        .rules(&polkit::allow(USER, &["domain.backup"]))
        .start();
    let _vm = machine(&system, "web");
    create(&system, USER, "web", "", &[]).unwrap();
    wait_for_backup(&system, "web");
    assert!(
        create(&system, OTHER_USER, "web", "", &[]).is_err(),
        "the rule is for one user"
    );
}

#[test]
fn a_rule_can_restrict_domains_and_targets() {
    let uuid = "7d3c0f3e-52d1-4a4e-9d0c-0f8a3f5a2b10";
    let system = System::setup()
        .rules(&format!(
            "polkit.addRule(function(action, subject) {{
                if (action.id == 'org.example.backup1.domain.backup'
                    && action.lookup('domain_name') == 'web' && action.lookup('domain_uuid') == '{uuid}'
                    && action.lookup('mode') == 'push' && action.lookup('target_kind') == 'store'
                    && action.lookup('target') == 'default')
                    return polkit.Result.YES;
            }});"
        ))
        .start();
    let _web = system.configured(system.vm("web").uuid(uuid).disk(Disk::new("vda", 16 * MIB)));
    let _mail = machine(&system, "mail");
    let elsewhere =
        "<domainbackup><disks><disk name='vda'><target file='/tmp/x'/></disk></disks></domainbackup>";
    assert!(create(&system, USER, "mail", "", &[]).is_err(), "another machine");
    assert!(
        create(&system, USER, "web", elsewhere, &[]).is_err(),
        "another place"
    );
    let store = "<domainbackup><store name='nightly'/></domainbackup>";
    assert!(create(&system, USER, "web", store, &[]).is_err(), "another store");
    create(&system, USER, "web", "", &[]).unwrap();
    wait_for_backup(&system, "web");
}

#[test]
fn every_target_of_a_request_is_authorized() {
    let system = System::setup()
        .rules(
            "polkit.addRule(function(action, subject) {
                if (action.id == 'org.example.backup1.domain.export' && action.lookup('target') == '/tmp/allowed')
                    return polkit.Result.YES;
            });",
        )
        .start();
    let _vm = system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", MIB))
            .disk(Disk::new("vdb", MIB)),
    );
    let both = "<domainbackup><disks><disk name='vda'><target file='/tmp/allowed'/></disk>
        <disk name='vdb'><target file='/tmp/forbidden'/></disk></disks></domainbackup>";
    assert!(create(&system, USER, "web", both, &[]).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_caller_has_any_right_without_polkit() {
    let mut system = System::start();
    let vm = machine(&system, "web");
    let caller = Caller::new(&system).await;
    system.stop_polkit();
    let error = caller
        .try_start("web", "", &[], Options::new())
        .await
        .unwrap_err();
    assert_eq!(error_name(&error), DENIED, "{error}");
    let error = caller.manager.list_domains().await.unwrap_err();
    assert_eq!(error_name(&error), DENIED);
    assert_eq!(vm.residue().jobs, [""; 0]);
    system.set_rules("");
    wait::until_async("polkit to be asked again", || async {
        caller.manager.get_domain("web").await.ok()
    })
    .await;
    caller.complete("web", "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_starter_of_a_backup_may_cancel_it_and_others_need_permission() {
    let rules = polkit::allow(USER, &["domain.backup"]) + &polkit::allow(2, &["domain.abort"]);
    let system = System::setup().rules(&rules).start();
    let disk = Disk::new("vda", 64 * MIB).fill(0, 64 * MIB, 0x11).slow(16 * MIB);
    let _vm = system.configured(system.vm("web").disk(disk));
    let caller = Caller::new(&system).await;
    for (uid, may) in [(OTHER_USER, false), (USER, true), (2, true)] {
        create(&system, USER, "web", "", &[]).unwrap();
        let (id, path, _, _) = caller.manager.list_jobs().await.unwrap().pop().unwrap();
        let cancel = ["call", BUS, path.as_str(), "org.example.Backup1.Job", "Cancel"];
        let output = system.clients().busctl(uid, &cancel);
        assert_eq!(output.success(), may, "user {uid}, job {id}: {}", output.stderr);
        if !may {
            caller.manager.get_job(id).await.unwrap();
            caller.job(path.clone()).await.cancel().await.unwrap();
        }
        let (result, _, _) = wait::within("the end", caller.job(path).await.wait())
            .await
            .unwrap();
        assert_eq!(result, "cancelled");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hidden_domain_replies_like_a_missing_one() {
    let rules = "polkit.addRule(function(action, subject) {
        if (action.lookup('domain_name') == 'secret' && subject.user != 'root') return polkit.Result.NO;
    });";
    let system = System::setup().rules(rules).start();
    let _secret = machine(&system, "secret");
    let _web = machine(&system, "web");
    let ask = |domain: &str| {
        let get = system
            .clients()
            .busctl(USER, &["call", BUS, ROOT_PATH, BUS, "GetDomain", "s", domain]);
        assert!(!get.success());
        let create = create(&system, USER, domain, "", &[]).unwrap_err();
        (get.stderr.replace(domain, "X"), create.replace(domain, "X"))
    };
    assert_eq!(ask("secret"), ask("nowhere"));
    let listed = system
        .clients()
        .busctl(USER, &["call", BUS, ROOT_PATH, BUS, "ListDomains"])
        .stdout;
    assert!(listed.contains("web") && !listed.contains("secret"), "{listed}");
    // Its jobs are hidden too.
    let caller = Caller::new(&system).await;
    let job = caller.complete("secret", "").await;
    let jobs = system
        .clients()
        .busctl(USER, &["call", BUS, ROOT_PATH, BUS, "ListJobs"])
        .stdout;
    assert_eq!(jobs.trim(), "a(uoss) 0");
    let path = job.inner().path().as_str();
    for property in ["State", "Disks"] {
        let arguments = ["get-property", BUS, path, "org.example.Backup1.Job", property];
        let read = system.clients().busctl(USER, &arguments);
        assert!(!read.success(), "{}", read.stdout);
        assert!(!read.stderr.contains("secret"), "{}", read.stderr);
    }
    let domain = caller.manager.get_domain("secret").await.unwrap();
    let arguments = [
        "get-property",
        BUS,
        domain.as_str(),
        "org.example.Backup1.Domain",
        "Name",
    ];
    let read = system.clients().busctl(USER, &arguments);
    assert!(
        !read.success() && !read.stdout.contains("secret"),
        "{}",
        read.stdout
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn others_hear_only_that_a_job_began_and_ended() {
    let system = System::start();
    let _vm = machine(&system, "web");
    let command = system
        .clients()
        .command(USER, "gdbus", &["monitor", "--system", "--dest", BUS]);
    let monitor = crate::common::process::Process::start("gdbus-monitor", system.dir(), command);
    let monitor_says = |what: &str| {
        wait::until(&format!("the monitor to receive {what:?}"), || {
            monitor.stdout().contains(what).then_some(())
        });
    };
    monitor_says("is owned by");
    let caller = Caller::new(&system).await;
    let options = slowly(8 * MIB);
    let job = caller.start_with("web", "", &[], options).await;
    assert_completed(&job).await;
    monitor_says("JobEnded");
    let heard = monitor.stdout();
    let signals: Vec<&str> = heard.lines().filter(|line| line.starts_with('/')).collect();
    assert_eq!(signals.len(), 2, "{heard}");
    assert!(signals[0].contains("JobStarted (uint32 1, objectpath"), "{heard}");
    assert!(signals[1].contains("'completed')"), "{heard}");
    assert!(!heard.contains("vda") && !heard.contains("web"), "{heard}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_hears_of_backups_that_others_started() {
    let system = System::start();
    let _vm = machine(&system, "web");
    let starter = Caller::new(&system).await;
    let mut subscriber = Caller::new(&system).await;
    subscriber.manager.subscribe().await.unwrap();
    starter.complete("web", "").await;
    let names = |signals: Vec<crate::common::caller::Signal>| {
        signals.into_iter().map(|signal| signal.name).collect::<Vec<_>>()
    };
    let heard = names(subscriber.signals_until("JobEnded").await);
    assert_eq!(
        heard,
        ["JobStarted", "BlockJobCompleted", "Completed", "JobEnded"]
    );
    subscriber.manager.unsubscribe().await.unwrap();
    starter.complete("web", "").await;
    let heard = names(subscriber.signals_until("JobEnded").await);
    assert_eq!(heard, ["JobStarted", "JobEnded"]);
}

#[test]
fn the_bus_policy_lets_only_root_own_the_name_and_passes_only_methods() {
    let system = System::start();
    let output = system
        .clients()
        .busctl(USER, &["call", BUS, ROOT_PATH, BUS, "Frobnicate"]);
    assert!(
        output.stderr.contains("Access denied") || output.stderr.contains("rejected"),
        "{}",
        output.stderr
    );
    let arguments = [
        "call",
        "org.freedesktop.DBus",
        "/",
        "org.freedesktop.DBus",
        "RequestName",
        "su",
        BUS,
        "0",
    ];
    let output = system.clients().busctl(USER, &arguments);
    assert!(!output.success());
}
