//! Pruning by rules of a call and by rules of a store, with real backups and some handmade ones.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::chain::{copy, directories, id, increment};
use crate::common::clients::{ROOT, USER};
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::proxies::{Options, PrunedBackup, error_name};
use crate::common::vm::Vm;
use crate::common::wait;
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;

fn machine(system: &System) -> Vm {
    let disk = Disk::new("vda", 4 * MIB).fill(0, MIB, 0x11);
    system.configured(system.vm("web").disk(disk).running())
}

fn rules(rules: &[(&'static str, u64)]) -> Options<'static> {
    let rules = rules.iter();
    rules.map(|(key, count)| (*key, Variant::from(*count))).collect()
}

/// Returns id, verdict and reason.
fn brief(judged: &[PrunedBackup]) -> Vec<(String, String, String)> {
    let judged = judged.iter();
    judged
        .map(|(_, _, id, _, verdict, reason)| (id.clone(), verdict.clone(), reason.clone()))
        .collect()
}

fn verdict(backup: &Path, verdict: &str, reason: &str) -> (String, String, String) {
    (id(backup), verdict.to_owned(), reason.to_owned())
}

async fn rescan(caller: &Caller) {
    let (_, problems) = caller.manager.rescan(Options::new()).await.unwrap();
    assert_eq!(problems, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_that_no_rule_keeps_are_removed_except_bases_of_kept_ones() {
    let system = System::setup()
        .rules(&polkit::deny(USER, &["backup.delete"]))
        .start();
    let _vm = machine(&system);
    let mut root = Caller::new(&system).await;
    root.complete_full("web", "").await;
    let [newest] = directories(&system.store().join("web")).try_into().unwrap();
    let base = copy(&newest, -100);
    let (first, second) = (copy(&newest, -48), copy(&newest, -24));
    let dropped = increment(&second, 1);
    let kept = increment(&base, 99);
    rescan(&root).await;
    let expected = [
        verdict(&base, "kept", &format!("{} depends on it", id(&kept))),
        verdict(&first, "removed", ""),
        verdict(&second, "removed", ""),
        verdict(&dropped, "removed", ""),
        verdict(&kept, "kept", "last"),
        verdict(&newest, "kept", "last, yearly"),
    ];
    let last = rules(&[("keep-last", 2), ("keep-yearly", 1)]);
    let mut dry = last.clone();
    dry.insert("dry-run", Variant::from(true));
    // A caller with the read right only gets the preview, and removes nothing.
    let user = Caller::of_user(&system, USER).await;
    let (judged, would_free) = user.manager.prune("web", dry).await.unwrap();
    assert_eq!(brief(&judged), expected);
    let denied = user.manager.prune("web", last.clone()).await.unwrap_err();
    assert_eq!(error_name(&denied), "org.freedesktop.DBus.Error.AccessDenied");
    assert_eq!(directories(&system.store().join("web")).len(), 6);

    root.manager.subscribe().await.unwrap();
    let gone = root.manager.get_backup(&id(&dropped)).await.unwrap();
    let (judged, freed) = root.manager.prune("web", last.clone()).await.unwrap();
    assert_eq!(brief(&judged), expected);
    assert!(freed == would_free && freed >= 2 * MIB, "{freed} {would_free}");
    let left = [&base, &kept, &newest].map(Clone::clone);
    assert_eq!(directories(&system.store().join("web")), left);
    let signals = root.signals_until("BackupRemoved").await;
    assert_eq!(signals.last().unwrap().arguments, [gone.to_string()]);

    // A second call has nothing to do, and polkit is not asked.
    let (judged, freed) = user.manager.prune("", last).await.unwrap();
    assert_eq!((judged.len(), freed), (3, 0));
    for (options, error) in [
        (rules(&[("keep-last", 0), ("keep-daily", 0)]), "InvalidArgs"),
        (rules(&[("keep-fortnightly", 1)]), "InvalidArgs"),
        (Options::from([("keep-last", Variant::from("1"))]), "InvalidArgs"),
        (Options::from([("store", Variant::from("x"))]), "NoSuchStore"),
    ] {
        let refused = root.manager.prune("web", options).await.unwrap_err();
        assert!(error_name(&refused).ends_with(error), "{refused}");
    }
    // Without rules nothing is pruned.
    assert_eq!(root.manager.prune("", Options::new()).await.unwrap(), (vec![], 0));
    assert_eq!(directories(&system.store().join("web")), left);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_store_loses_no_backup() {
    let system = System::start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    for _ in 0..2 {
        root.complete_full("web", "").await;
    }
    let aside = system.dir().join("aside");
    fs::rename(system.store(), &aside).unwrap();
    fs::create_dir(system.store()).unwrap();
    let refused = root.manager.prune("web", rules(&[("keep-last", 1)])).await;
    let refused = refused.unwrap_err().to_string();
    assert!(
        refused.contains("is not the store that was used before"),
        "{refused}"
    );
    // Fails if a file was created below a directory that is not the store.
    fs::remove_dir(system.store()).unwrap();
    fs::rename(&aside, system.store()).unwrap();
    let (judged, _) = root
        .manager
        .prune("web", rules(&[("keep-last", 1)]))
        .await
        .unwrap();
    assert_eq!(
        judged.iter().filter(|judged| judged.4 == "removed").count(),
        1,
        "{judged:?}"
    );
    assert_eq!(directories(&system.store().join("web")).len(), 1);
}

fn nightly(system: &System) -> Vec<PathBuf> {
    directories(&system.dir().join("nightly/web"))
}

/// Starts a system with a store that keeps two backups.
fn with_rules() -> System {
    let mut system = System::setup().without_daemon().start();
    let path = system.dir().join("nightly");
    fs::create_dir(&path).unwrap();
    let config = fs::read_to_string(system.config_path()).unwrap();
    let table = format!(
        "[store.nightly]\npath = \"{}\"\nkeep-last = 2\nkeep-at-least = \"0s\"\n",
        path.display()
    );
    fs::write(system.config_path(), config + &table).unwrap();
    system.start_daemon();
    system
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_with_rules_is_pruned_after_each_backup_and_one_without_keeps_all() {
    let system = with_rules();
    let _vm = machine(&system);
    let mut root = Caller::new(&system).await;
    root.manager.subscribe().await.unwrap();
    let document = "<domainbackup><store name='nightly'/></domainbackup>";
    for _ in 0..3 {
        root.complete_full("web", "").await;
    }
    root.complete_full("web", document).await;
    let first = nightly(&system).remove(0);
    root.complete_full("web", document).await;
    assert_eq!(nightly(&system).len(), 2);
    let path = root.manager.get_backup(&id(&first)).await.unwrap();
    root.signals_so_far().await;
    // A backup that is being read stays and is complete.
    let reading = fs::File::open(&first).unwrap();
    flock(&reading, FlockOperation::LockShared).unwrap();
    root.complete_full("web", document).await;
    let output = system.clients().backupctl(ROOT, &["prune", "web"]);
    assert_eq!(output.status, 1, "{output:?}");
    assert!(output.stdout.contains("it is in use"), "{}", output.stdout);
    assert_eq!(nightly(&system).len(), 3);
    drop(reading);
    root.complete_full("web", document).await;
    let mut gone = root.signals_until("BackupRemoved").await;
    gone.extend(root.signals_until("BackupRemoved").await);
    assert!(
        gone.iter().any(|signal| signal.arguments == [path.to_string()]),
        "{gone:?}"
    );
    wait::until_async("the store to keep two backups", || async {
        (nightly(&system).len() == 2).then_some(())
    })
    .await;
    assert_eq!(directories(&system.store().join("web")).len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_shows_what_is_kept_and_why() {
    let system = with_rules();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    for _ in 0..2 {
        root.complete_full("web", "").await;
    }
    let [first, second] = directories(&system.store().join("web")).try_into().unwrap();
    let backupctl = |arguments: &[&str]| system.clients().backupctl(ROOT, arguments).expect_success();
    let text = backupctl(&["prune", "web", "--keep-last", "1", "--dry-run"]);
    let line = |backup: &Path| {
        let id = id(backup);
        text.lines().find(|line| line.contains(&id)).unwrap().to_owned()
    };
    assert!(line(&first).trim_end().ends_with("removed  -"), "{text}");
    assert!(line(&second).ends_with("kept     last"), "{text}");
    assert!(text.contains("1 would be kept, 1 would be removed"), "{text}");
    let shown = backupctl(&[
        "prune",
        "--store",
        "default",
        "--keep-yearly",
        "1",
        "--keep-last",
        "1",
        "--json",
    ]);
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["backups"][0]["verdict"], "removed");
    assert_eq!(shown["backups"][1]["reason"], "last, yearly");
    assert!(
        shown["freed"].as_u64().unwrap() > 0 && !first.exists() && second.exists(),
        "{shown}"
    );
    assert!(backupctl(&["prune", "--store", "default"]).starts_with("Nothing to prune"));
    let nothing = system
        .clients()
        .backupctl(ROOT, &["prune", "web", "--keep-last", "0"]);
    assert_eq!(nothing.status, 1, "{nothing:?}");
    assert!(
        nothing.stderr.contains("the keep rules keep nothing"),
        "{}",
        nothing.stderr
    );
}
