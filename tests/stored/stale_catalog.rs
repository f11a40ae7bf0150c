//! The store is authoritative. An old copy of the catalog, another service's backups and handmade backups make the
//! service neither discard a backup nor remove the base of one.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::chain::{copy, directories, id, increment, manifest, write_manifest};
use crate::common::clients::ROOT;
use crate::common::disk::Disk;
use crate::common::proxies::{JobProxy, Options, PrunedBackup, error_name, slowly};
use crate::common::storage::files_below;
use crate::common::vm::Vm;
use crate::common::wait;
use backupd::fault::Point;
use serde_json::json;
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;

fn machine(system: &System) -> Vm {
    let disk = Disk::new("vda", 16 * MIB).fill(0, 8 * MIB, 0x11);
    system.configured(system.vm("web").disk(disk).running())
}

/// The catalog's files, as a backup of `/var/lib` has them.
const FILES: [&str; 2] = ["catalog.sqlite", "catalog.sqlite-wal"];

fn copy_catalog(system: &System) -> PathBuf {
    let aside = system.dir().join("aside");
    fs::create_dir(&aside).unwrap();
    for file in FILES {
        // A stopped service leaves no write-ahead log.
        if let Err(error) = fs::copy(system.dir().join("state").join(file), aside.join(file)) {
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
        }
    }
    aside
}

/// Stops the service, restores the copy, and starts it again.
async fn put_back(system: &mut System, aside: &Path) -> Caller {
    system.stop_daemon();
    for file in FILES {
        let path = system.dir().join("state").join(file);
        let _ = fs::remove_file(&path);
        if aside.join(file).exists() {
            fs::copy(aside.join(file), path).unwrap();
        }
    }
    system.start_daemon();
    system.wait_for_domain("web");
    Caller::new(system).await
}

fn backups(system: &System) -> Vec<PathBuf> {
    directories(&system.store().join("web"))
}

/// Returns ids and states of the listed backups.
async fn listed(caller: &Caller) -> Vec<(String, String)> {
    let (backups, _) = caller.manager.list_backups(Options::new()).await.unwrap();
    let backups = backups.into_iter();
    backups.map(|backup| (backup.1, backup.9)).collect()
}

async fn delete(caller: &Caller, id: &str, options: &[&'static str]) -> zbus::Result<()> {
    let path = caller.manager.get_backup(id).await?;
    let options: Options = options.iter().map(|name| (*name, Variant::from(true))).collect();
    let deleted = caller.connection.call_method(
        Some("org.example.Backup1"),
        &path,
        Some("org.example.Backup1.Backup"),
        "Delete",
        &options,
    );
    wait::within("Delete", deleted).await.map(drop)
}

async fn refused(caller: &Caller, id: &str, options: &[&'static str], error: &str, text: &str) {
    let refused = delete(caller, id, options).await.unwrap_err();
    assert!(error_name(&refused).ends_with(error), "{refused}");
    assert!(refused.to_string().contains(text), "{text:?} in {refused}");
}

/// Returns the mode of the copied disk.
async fn kind(job: &JobProxy<'_>) -> String {
    let [(_, kind, ..)] = job.increments().await.unwrap().try_into().unwrap();
    kind
}

fn last(count: u64) -> Options<'static> {
    Options::from([("keep-last", Variant::from(count))])
}

fn verdicts(judged: &[PrunedBackup]) -> Vec<(String, String, String)> {
    let judged = judged.iter();
    judged
        .map(|(_, _, id, _, verdict, reason)| (id.clone(), verdict.clone(), reason.clone()))
        .collect()
}

/// Starts a backup, copies the catalog while it runs, and completes it.
async fn copied_while_running(system: &System) -> PathBuf {
    let caller = Caller::new(system).await;
    let job = caller.start_with("web", "", &[], slowly(MIB)).await;
    wait::until_async("the copying", || async {
        (job.bytes_done().await.unwrap() > 0).then_some(())
    })
    .await;
    let aside = copy_catalog(system);
    job.set_speed(0).await.unwrap();
    let (result, _, message) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!((result.as_str(), message.as_str()), ("completed", ""));
    aside
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_running_in_an_old_catalog_records_its_complete_backup() {
    let mut system = System::start();
    let vm = machine(&system);
    let before = vm.residue();
    let aside = copied_while_running(&system).await;
    let files = files_below(&system.store());
    let caller = put_back(&mut system, &aside).await;
    let job = caller.manager.get_job(1).await.unwrap();
    let job = caller.job(job).await;
    let (result, _, message) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!((result.as_str(), message.as_str()), ("completed", ""));
    assert_eq!(files_below(&system.store()), files);
    let [backup] = backups(&system).try_into().unwrap();
    let complete = [(id(&backup), "complete".to_owned())];
    assert_eq!(listed(&caller).await, complete);
    // The next backup continues from it.
    let next = caller.complete("web", "").await;
    assert_eq!(kind(&next).await, "incremental");
    assert_eq!(vm.residue(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_an_old_catalog_touches_no_unrelated_backup() {
    let mut system = System::start();
    let _vm = machine(&system);
    let aside = copied_while_running(&system).await;
    let [backup] = backups(&system).try_into().unwrap();
    let mut newer = manifest(&backup);
    newer["version"] = json!(99);
    write_manifest(&backup, &newer);
    let files = files_below(&system.store());
    let caller = put_back(&mut system, &aside).await;
    let job = caller.manager.get_job(1).await.unwrap();
    let job = caller.job(job).await;
    let (result, _, message) = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(result, "failed");
    assert!(message.contains("no valid manifest"), "{message}");
    assert_eq!(files_below(&system.store()), files);
    system.stop_daemon();
    system.start_daemon();
    system.stop_daemon();
    assert_eq!(files_below(&system.store()), files);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_catalog_older_than_an_incremental_does_not_release_its_base() {
    let mut system = System::start();
    let _vm = machine(&system);
    let caller = Caller::new(&system).await;
    caller.complete("web", "").await;
    system.stop_daemon();
    let aside = copy_catalog(&system);
    system.start_daemon();
    system.wait_for_domain("web");
    let caller = Caller::new(&system).await;
    let next = caller.complete("web", "").await;
    assert_eq!(kind(&next).await, "incremental");
    let [full, incremental] = backups(&system).try_into().unwrap();
    let caller = put_back(&mut system, &aside).await;
    refused(&caller, &id(&full), &[], "Error.HasDependents", &id(&incremental)).await;
    assert!(full.exists() && incremental.exists());
    // The service scanned the unknown store without a request.
    let complete = [&full, &incremental].map(|backup| (id(backup), "complete".to_owned()));
    assert_eq!(listed(&caller).await, complete);
    let next = caller.complete("web", "").await;
    assert_eq!(kind(&next).await, "incremental");
    let log = system.daemon().log();
    assert!(log.contains("the catalog does not match the store"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_a_lost_catalog_is_scanned_at_startup() {
    let mut system = System::start();
    let _vm = machine(&system);
    let caller = Caller::new(&system).await;
    caller.complete("web", "").await;
    let [full] = backups(&system).try_into().unwrap();
    let nothing = system.dir().join("nothing");
    let caller = put_back(&mut system, &nothing).await;
    let known = wait::until_async("the backup", || async {
        let listed = listed(&caller).await;
        (!listed.is_empty()).then_some(listed)
    });
    assert_eq!(known.await, [(id(&full), "complete".to_owned())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_base_of_an_unrecorded_backup_stays() {
    let system = System::start();
    let _vm = machine(&system);
    let caller = Caller::new(&system).await;
    caller.complete_full("web", "").await;
    caller.complete_full("web", "").await;
    let [full, newest] = backups(&system).try_into().unwrap();
    // As another host's service leaves it, or `cp`.
    let unknown = increment(&full, -1);
    let files = files_below(&system.store());
    for options in [&[][..], &["with-dependents"], &["merge"]] {
        let text = match options {
            [] => "1 other backup depends on",
            _ => "is not in the catalog",
        };
        refused(&caller, &id(&full), options, "Error.HasDependents", text).await;
        refused(&caller, &id(&full), options, "Error.HasDependents", &id(&unknown)).await;
    }
    let (judged, _) = caller.manager.prune("web", last(1)).await.unwrap();
    let kept = |backup: &Path, why: &str| (id(backup), "kept".to_owned(), why.to_owned());
    let depends = format!("{} depends on it", id(&unknown));
    assert_eq!(verdicts(&judged), [kept(&full, &depends), kept(&newest, "last")]);
    assert_eq!(files_below(&system.store()), files);

    caller.manager.rescan(Options::new()).await.unwrap();
    delete(&caller, &id(&full), &["with-dependents"]).await.unwrap();
    assert_eq!(backups(&system), [newest]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_manifest_format_protects_the_files_beside_it() {
    let system = System::start();
    let _vm = machine(&system);
    let caller = Caller::new(&system).await;
    caller.complete_full("web", "").await;
    let [full] = backups(&system).try_into().unwrap();
    let (second, third) = (copy(&full, 1), copy(&full, 2));
    caller.manager.rescan(Options::new()).await.unwrap();
    let good = manifest(&third);
    let path = third.join("manifest.json");
    let mut newer = good.clone();
    newer["version"] = json!(99);
    write_manifest(&third, &newer);
    let named = path.display().to_string();
    refused(&caller, &id(&full), &[], "Error.Unsupported", &named).await;
    let pruned = caller.manager.prune("web", last(1)).await.unwrap_err();
    assert!(error_name(&pruned).ends_with("Unsupported"), "{pruned}");
    fs::write(&path, "{").unwrap();
    refused(&caller, &id(&full), &[], "Error.ChainBroken", &named).await;
    refused(&caller, &id(&second), &["merge"], "Error.ChainBroken", &named).await;
    assert!(full.exists() && second.exists());
    // It can be deleted itself, and then nothing blocks the removal.
    delete(&caller, &id(&third), &[]).await.unwrap();
    delete(&caller, &id(&full), &[]).await.unwrap();
    assert_eq!(backups(&system), [second]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_damaged_manifests_protect_good_backups_and_not_each_other() {
    let system = System::start();
    let _vm = machine(&system);
    let caller = Caller::new(&system).await;
    caller.complete_full("web", "").await;
    let [full] = backups(&system).try_into().unwrap();
    let (second, third, stranger) = (copy(&full, 1), increment(&full, 2), copy(&full, 3));
    caller.manager.rescan(Options::new()).await.unwrap();
    // One more, which is not on record.
    let unknown = copy(&full, 4);
    let good = manifest(&second);
    for damaged in [&second, &third, &unknown] {
        fs::write(damaged.join("manifest.json"), "{").unwrap();
    }
    // A good backup stays, with or without known dependents.
    for good in [&full, &stranger] {
        let refused = delete(&caller, &id(good), &[]).await.unwrap_err();
        let name = error_name(&refused);
        assert!(
            name.ends_with("ChainBroken") || name.ends_with("HasDependents"),
            "{refused}"
        );
    }
    // So do its dependents, and one whose manifest a newer service may understand.
    refused(
        &caller,
        &id(&full),
        &["with-dependents"],
        "Error.ChainBroken",
        "manifest.json",
    )
    .await;
    refused(
        &caller,
        &id(&second),
        &["merge"],
        "Error.ChainBroken",
        "manifest.json",
    )
    .await;
    let mut newer = good.clone();
    newer["version"] = json!(99);
    write_manifest(&second, &newer);
    refused(&caller, &id(&third), &[], "Error.Unsupported", "manifest.json").await;
    fs::write(second.join("manifest.json"), "{").unwrap();
    // The damaged ones can be removed, each by itself.
    delete(&caller, &id(&second), &[]).await.unwrap();
    let deleted = system.clients().backupctl(ROOT, &["delete", &id(&third)]);
    assert!(deleted.success(), "{}", deleted.stderr);
    assert!(!second.exists() && !third.exists());
    assert!(full.exists() && stranger.exists() && unknown.exists());
    refused(&caller, &id(&full), &[], "Error.ChainBroken", "manifest.json").await;
    fs::remove_dir_all(&unknown).unwrap();
    delete(&caller, &id(&full), &[]).await.unwrap();
    assert_eq!(backups(&system), [stranger]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_another_service_is_noticed_before_anything_is_removed() {
    let first = System::start();
    let _vm = machine(&first);
    let one = Caller::new(&first).await;
    one.complete("web", "").await;
    let second = System::setup().store("shared", &first.store()).start();
    let other = Caller::new(&second).await;
    wait::until_async("the other service to read the store", || async {
        (listed(&other).await.len() == 1).then_some(())
    })
    .await;
    let next = one.complete("web", "").await;
    assert_eq!(kind(&next).await, "incremental");
    let [full, incremental] = backups(&first).try_into().unwrap();
    refused(&other, &id(&full), &[], "Error.HasDependents", &id(&incremental)).await;
    assert_eq!(listed(&other).await.len(), 2);
    // And this service notices the removals of the other one.
    delete(&other, &id(&incremental), &[]).await.unwrap();
    delete(&one, &id(&full), &[]).await.unwrap();
    assert_eq!(listed(&one).await, []);
}

/// Makes a store with a full backup and a dependent one, which another service knows too.
async fn shared() -> (System, System, Vm, Caller) {
    let first = System::start();
    let vm = machine(&first);
    let one = Caller::new(&first).await;
    one.complete("web", "").await;
    one.complete("web", "").await;
    let second = System::setup().store("shared", &first.store()).start();
    let other = Caller::new(&second).await;
    wait::until_async("the other service to read the store", || async {
        (listed(&other).await.len() == 2).then_some(())
    })
    .await;
    (first, second, vm, other)
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_merged_or_removed_by_another_service_are_listed_correctly() {
    let (first, _second, _vm, other) = shared().await;
    let [full, incremental] = backups(&first).try_into().unwrap();
    let one = Caller::new(&first).await;
    delete(&one, &id(&full), &["merge"]).await.unwrap();
    let left = [(id(&incremental), "complete".to_owned())];
    assert_eq!(listed(&other).await, left);
    // A backup that nobody removed on purpose is listed as missing. So are all recorded ones if the store is empty,
    // because it may be another store.
    let image = incremental.join("vda.qcow2");
    fs::File::options()
        .write(true)
        .open(image)
        .unwrap()
        .set_len(512)
        .unwrap();
    assert_eq!(listed(&other).await, [(id(&incremental), "damaged".to_owned())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_was_finished_after_a_restart_is_noticed_by_another_service() {
    for point in [Point::MergeExchanged, Point::Merged] {
        let (mut first, _second, _vm, other) = shared().await;
        let [full, incremental] = backups(&first).try_into().unwrap();
        first.stop_daemon();
        first.start_dying_daemon(point);
        first.wait_for_domain("web");
        let one = Caller::new(&first).await;
        delete(&one, &id(&full), &["merge"]).await.unwrap_err();
        first.wait_for_death();
        first.start_daemon();
        wait::until("the former images to be gone", || {
            let mut names = fs::read_dir(first.store().join("web")).unwrap();
            let hidden = names.any(|entry| entry.unwrap().file_name().to_str().unwrap().starts_with('.'));
            (!hidden).then_some(())
        });
        let both = [&full, &incremental].map(|backup| (id(backup), "complete".to_owned()));
        assert_eq!(listed(&other).await, both, "{point}");
    }
}
