//! Protection from pruning: protected backups, and recent ones.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::chain::{copy, digest, directories, id, increment, manifest, write_manifest};
use crate::common::clients::{ROOT, USER};
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::proxies::{Options, error_name};
use crate::common::vm::Vm;
use crate::common::wait;
use serde_json::Value;
use zbus::wire::{OwnedVariant, Variant};

const MIB: u64 = 1 << 20;
const SERVICE: Option<&str> = Some("org.example.Backup1");
const INTERFACE: &str = "org.example.Backup1.Backup";

fn machine(system: &System) -> Vm {
    let disk = Disk::new("vda", 4 * MIB).fill(0, MIB, 0x11);
    system.configured(system.vm("web").disk(disk).running())
}

fn backups(system: &System) -> Vec<PathBuf> {
    directories(&system.store().join("web"))
}

async fn call<B: serde::Serialize + zbus::DynamicType>(
    caller: &Caller,
    id: &str,
    method: &str,
    body: &B,
) -> zbus::Result<()> {
    let path = caller.manager.get_backup(id).await?;
    let called = caller
        .connection
        .call_method(SERVICE, &path, Some(INTERFACE), method, body);
    wait::within(method, called).await.map(drop)
}

async fn protect(caller: &Caller, id: &str, protected: bool) -> zbus::Result<()> {
    call(caller, id, "Protect", &(protected, Options::new())).await
}

async fn delete(caller: &Caller, id: &str, options: &[&'static str]) -> zbus::Result<()> {
    let options: Options = options.iter().map(|name| (*name, Variant::from(true))).collect();
    call(caller, id, "Delete", &options).await
}

async fn is_protected(caller: &Caller, id: &str) -> bool {
    let path = caller.manager.get_backup(id).await.unwrap();
    let properties = zbus::fdo::PropertiesProxy::new(&caller.connection, "org.example.Backup1", path)
        .await
        .unwrap();
    let interface = INTERFACE.try_into().unwrap();
    let value: OwnedVariant = properties.get(interface, "Protected").await.unwrap();
    bool::try_from(value).unwrap()
}

fn keep_last(count: u64) -> Options<'static> {
    Options::from([("keep-last", Variant::from(count))])
}

/// Returns id, verdict and reason of each.
async fn pruned(caller: &Caller, options: Options<'_>) -> Vec<(String, String, String)> {
    let (judged, _) = caller.manager.prune("web", options).await.unwrap();
    let judged = judged.into_iter();
    judged
        .map(|(_, _, id, _, verdict, reason)| (id, verdict, reason))
        .collect()
}

fn verdict(backup: &Path, verdict: &str, reason: &str) -> (String, String, String) {
    (id(backup), verdict.to_owned(), reason.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_protected_backup_stays_until_it_is_not_protected_any_more() {
    let mut system = System::setup()
        .rules(&polkit::deny(USER, &["backup.delete"]))
        .start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    root.complete_full("web", "").await;
    let [newest] = backups(&system).try_into().unwrap();
    let old = copy(&newest, -48);
    let on_it = increment(&old, 1);
    let mut described = manifest(&on_it);
    described["disks"][0]["blake3"] = digest(&on_it.join("vda.qcow2")).into();
    write_manifest(&on_it, &described);
    root.manager.rescan(Options::new()).await.unwrap();
    // A caller without the right to delete may not protect either.
    let user = Caller::of_user(&system, USER).await;
    let denied = protect(&user, &id(&on_it), true).await.unwrap_err();
    assert_eq!(error_name(&denied), "org.freedesktop.DBus.Error.AccessDenied");
    assert!(!is_protected(&user, &id(&on_it)).await);

    protect(&root, &id(&on_it), true).await.unwrap();
    // A second call changes nothing.
    protect(&root, &id(&on_it), true).await.unwrap();
    assert!(is_protected(&user, &id(&on_it)).await);
    for (backup, options) in [
        (&on_it, &[][..]),
        (&on_it, &["dry-run"]),
        (&old, &["with-dependents"]),
    ] {
        let refused = delete(&root, &id(backup), options).await.unwrap_err();
        assert_eq!(error_name(&refused), "org.example.Backup1.Error.Protected");
        let text = format!("backupctl unprotect {}", id(&on_it));
        assert!(refused.to_string().contains(&text), "{refused}");
    }
    let depends = format!("{} depends on it", id(&on_it));
    let kept = [
        verdict(&old, "kept", &depends),
        verdict(&on_it, "kept", "protected"),
        verdict(&newest, "kept", "last"),
    ];
    assert_eq!(pruned(&root, keep_last(1)).await, kept);
    // Its base can still be merged into it, and it stays protected.
    delete(&root, &id(&old), &["merge"]).await.unwrap();
    assert!(on_it.join("protected").exists() && !old.exists());

    // The store records the protection, so it survives the loss of the catalog, and a change in the store takes
    // effect.
    system.stop_daemon();
    for file in ["catalog.sqlite", "catalog.sqlite-wal"] {
        let _ = fs::remove_file(system.dir().join("state").join(file));
    }
    system.start_daemon();
    let root = Caller::new(&system).await;
    root.manager.rescan(Options::new()).await.unwrap();
    assert!(is_protected(&root, &id(&on_it)).await);
    let only = Options::from([("protected", Variant::from(true))]);
    let (listed, _) = root.manager.list_backups(only).await.unwrap();
    let listed: Vec<&str> = listed.iter().map(|backup| backup.1.as_str()).collect();
    assert_eq!(listed, [id(&on_it)]);
    fs::write(newest.join("protected"), "").unwrap();
    let refused = delete(&root, &id(&newest), &[]).await.unwrap_err();
    assert_eq!(error_name(&refused), "org.example.Backup1.Error.Protected");

    for backup in [&on_it, &newest] {
        protect(&root, &id(backup), false).await.unwrap();
        delete(&root, &id(backup), &[]).await.unwrap();
    }
    assert!(backups(&system).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn backupctl_protects_and_shows_it() {
    let system = System::start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    root.complete_full("web", "").await;
    let [backup] = backups(&system).try_into().unwrap();
    let run = |arguments: &[&str]| {
        let output = system
            .clients()
            .run(ROOT, env!("CARGO_BIN_EXE_backupctl"), arguments);
        output.expect_success()
    };
    let id = id(&backup);
    assert_eq!(run(&["protect", &id]), format!("{id}: protected\n"));
    assert!(run(&["backups"]).contains("complete, protected"));
    let listed: Value = serde_json::from_str(&run(&["backups", "--json"])).unwrap();
    assert_eq!(listed[0]["protected"], true);
    let store = system.store();
    let without = run(&["backups", "--from", store.to_str().unwrap(), "--json"]);
    let listed: Value = serde_json::from_str(&without).unwrap();
    assert_eq!(listed[0]["protected"], true);
    run(&["unprotect", &id]);
    assert!(!run(&["backups"]).contains("protected"));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_backups_in_a_row_evict_no_older_ones() {
    let rules = "keep-last = 2\n";
    let system = System::setup()
        .rules(&polkit::allow(USER, &["domain.backup"]))
        .table(rules)
        .start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    root.complete_full("web", "").await;
    let [today] = backups(&system).try_into().unwrap();
    let history = [copy(&today, -72), copy(&today, -48)];
    let outdated = copy(&today, -96);
    root.manager.rescan(Options::new()).await.unwrap();
    let user = Caller::of_user(&system, USER).await;
    for _ in 0..4 {
        user.complete_full("web", "").await;
    }
    // When unprotected old backups are gone, the rules have been applied.
    wait::until("the store to be pruned", || (!outdated.exists()).then_some(()));
    assert!(history.iter().all(|backup| backup.exists()));
    assert_eq!(backups(&system).len(), 2 + 1 + 4);
    // A call with the same rules gets the reason.
    let mut preview = Options::from([("dry-run", Variant::from(true))]);
    let judged = pruned(&root, preview.clone()).await;
    let reasons: Vec<&str> = judged.iter().map(|(_, _, reason)| reason.as_str()).collect();
    let young = ["keep-at-least"; 3];
    assert_eq!(reasons[..2], ["last", "last"]);
    assert_eq!(reasons[2..5], young);
    assert_eq!(reasons[5..], ["last, keep-at-least", "last, keep-at-least"]);
    // Rules in a call are chosen by its caller.
    preview.insert("keep-last", Variant::from(1_u64));
    let judged = pruned(&root, preview).await;
    assert_eq!(
        judged
            .iter()
            .filter(|(_, verdict, _)| verdict == "removed")
            .count(),
        6
    );
}
