//! Deletion of backups: which are removed, in which order, and how the next service completes an interrupted deletion.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::chain::{directories, id, increment};
use crate::common::clients::{ROOT, USER};
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::proxies::{Options, error_name};
use crate::common::storage::files_below;
use crate::common::vm::Vm;
use crate::common::wait;
use backupd::fault::Point;
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const INTERFACE: &str = "org.example.Backup1.Backup";

fn machine(system: &System) -> Vm {
    let disk = Disk::new("vda", 4 * MIB).fill(0, MIB, 0x11);
    system.configured(system.vm("web").disk(disk).running())
}

/// Makes a full backup and a chain of two on top of it. Returns their directories by time.
async fn chain(system: &System, root: &Caller) -> [PathBuf; 3] {
    let before = match system.store().join("web").exists() {
        true => directories(&system.store().join("web")),
        false => Vec::new(),
    };
    root.complete("web", "").await;
    let mut made = directories(&system.store().join("web"));
    made.retain(|path| !before.contains(path));
    let [full] = made.try_into().unwrap();
    let first = increment(&full, 1);
    let second = increment(&first, 1);
    let (_, problems) = root.manager.rescan(Options::new()).await.unwrap();
    assert_eq!(problems, [""; 0]);
    [full, first, second]
}

/// Returns the listed ids.
async fn listed(caller: &Caller) -> Vec<String> {
    let (backups, _) = caller.manager.list_backups(Options::new()).await.unwrap();
    backups.into_iter().map(|backup| backup.1).collect()
}

async fn delete(caller: &Caller, id: &str, options: &[&'static str]) -> zbus::Result<(Vec<String>, u64)> {
    let path = caller.manager.get_backup(id).await?;
    let options: Options = options.iter().map(|name| (*name, Variant::from(true))).collect();
    let deleted = caller.connection.call_method(
        Some("org.example.Backup1"),
        &path,
        Some(INTERFACE),
        "Delete",
        &options,
    );
    wait::within("Delete", deleted).await?.body().deserialize()
}

async fn refused(caller: &Caller, id: &str, error: &str, text: &str) {
    let refused = delete(caller, id, &[]).await.unwrap_err();
    assert!(error_name(&refused).ends_with(error), "{refused}");
    assert!(refused.to_string().contains(text), "{text:?} in {refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_with_dependents_stays_and_dependents_are_deleted_first() {
    let system = System::start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    let backups = chain(&system, &root).await;
    let ids = backups.each_ref().map(|backup| id(backup));
    refused(
        &root,
        &ids[0],
        "Error.HasDependents",
        &format!("2 other backups depend on backup {}", ids[0]),
    )
    .await;
    refused(&root, &ids[1], "Error.HasDependents", &ids[2]).await;
    assert_eq!(listed(&root).await, ids);

    let (would_go, would_free) = delete(&root, &ids[0], &["dry-run", "with-dependents"])
        .await
        .unwrap();
    assert_eq!(would_go, [&ids[2], &ids[1], &ids[0]].map(Clone::clone));
    assert!(would_free >= MIB, "{would_free}");
    assert_eq!(listed(&root).await, ids);

    let (gone, freed) = delete(&root, &ids[2], &[]).await.unwrap();
    assert_eq!(gone, [ids[2].clone()]);
    assert!(freed > 0 && !backups[2].exists(), "{freed}");
    let never = root.manager.get_backup(&ids[2]).await.unwrap_err();
    assert_eq!(error_name(&never), "org.example.Backup1.Error.NoSuchBackup");
    let (gone, rest) = delete(&root, &ids[0], &["with-dependents"]).await.unwrap();
    assert_eq!(gone, [&ids[1], &ids[0]].map(Clone::clone));
    assert_eq!(freed + rest, would_free);
    assert_eq!(files_below(&system.store()), [""; 0]);
    assert_eq!(listed(&root).await, [""; 0]);
    // Nothing reappears.
    assert_eq!(root.manager.rescan(Options::new()).await.unwrap(), (0, vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_in_use_and_foreign_files_stay() {
    let system = System::start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    let backups = chain(&system, &root).await;
    let ids = backups.each_ref().map(|backup| id(backup));
    let before = files_below(&system.store());
    // A reader has the base open: its dependents are not removed either.
    let reading = fs::File::open(&backups[0]).unwrap();
    flock(&reading, FlockOperation::LockShared).unwrap();
    let busy = delete(&root, &ids[0], &["with-dependents"]).await.unwrap_err();
    assert_eq!(error_name(&busy), "org.example.Backup1.Error.Busy");
    drop(reading);
    let outside = system.dir().join("outside");
    fs::write(&outside, "mine").unwrap();
    let (notes, image) = (backups[2].join("notes"), backups[2].join("vda.qcow2"));
    symlink(&outside, &notes).unwrap();
    refused(
        &root,
        &ids[2],
        "Error.TargetInvalid",
        "notes: does not belong to the backup",
    )
    .await;
    fs::remove_file(&notes).unwrap();
    let aside = backups[2].with_file_name("aside");
    fs::rename(&image, &aside).unwrap();
    symlink(&aside, &image).unwrap();
    refused(
        &root,
        &ids[2],
        "Error.TargetInvalid",
        "vda.qcow2: does not belong to the backup",
    )
    .await;
    fs::remove_file(&image).unwrap();
    fs::rename(&aside, &image).unwrap();
    assert_eq!(files_below(&system.store()), before);
    assert_eq!(fs::read_to_string(&outside).unwrap(), "mine");
    assert_eq!(listed(&root).await, ids);
    // A missing backup is no longer listed.
    fs::remove_dir_all(&backups[2]).unwrap();
    assert_eq!(
        delete(&root, &ids[2], &[]).await.unwrap(),
        (vec![ids[2].clone()], 0)
    );
    assert_eq!(listed(&root).await, ids[..2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_callers_with_the_delete_right_delete() {
    let rule = "polkit.addRule(function(action, subject) {
        if (action.id == 'org.example.backup1.backup.delete' && action.lookup('domain_name') == 'web'
            && action.lookup('store') == 'default' && action.lookup('backup_id') == '@BACKUP' && subject.user == '@USER')
            return polkit.Result.YES;
    });\n";
    let mut system = System::start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    let backups = chain(&system, &root).await;
    let ids = backups.each_ref().map(|backup| id(backup));
    let user = Caller::of_user(&system, USER).await;
    let password = delete(&user, &ids[2], &[]).await.unwrap_err();
    let expected = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired";
    assert_eq!(error_name(&password), expected);
    let (would_go, _) = delete(&user, &ids[2], &["dry-run"]).await.unwrap();
    assert_eq!(would_go, [ids[2].clone()]);
    let rule = rule
        .replace("@BACKUP", &ids[2])
        .replace("@USER", &polkit::user_name(USER));
    system.set_rules(&rule);
    let user = Caller::of_user(&system, USER).await;
    let password = delete(&user, &ids[1], &["with-dependents"]).await.unwrap_err();
    assert_eq!(error_name(&password), expected);
    delete(&user, &ids[2], &[]).await.unwrap();
    assert_eq!(listed(&root).await, ids[..2]);
}

/// Checks that no residue of a removal is in the store or on record.
fn assert_settled(system: &System, what: Point, left: usize) {
    let store = system.store().join("web");
    let hidden: Vec<_> = fs::read_dir(&store)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.'))
        .collect();
    assert_eq!(hidden, [""; 0], "after {what:?}");
    assert_eq!(files_below(&store).len(), left * 3, "after {what:?}");
}

fn removing(system: &System) -> i64 {
    let catalog = rusqlite::Connection::open(system.dir().join("state/catalog.sqlite")).unwrap();
    let count = "SELECT count(*) FROM backups WHERE removing";
    catalog.query_row(count, [], |row| row.get(0)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_deletion_is_finished_by_the_next_service() {
    let mut system = System::start();
    let _vm = machine(&system);
    for point in Point::REMOVAL {
        let root = Caller::new(&system).await;
        let ids = chain(&system, &root).await.map(|backup| id(&backup));
        system.stop_daemon();
        system.start_dying_daemon(point);
        let root = Caller::new(&system).await;
        // The youngest is at that point, and the others are complete.
        delete(&root, &ids[0], &["with-dependents"]).await.unwrap_err();
        system.wait_for_death();
        assert_eq!(removing(&system), 1, "{point:?}");
        system.start_daemon();
        system.wait_for_domain("web");
        let root = Caller::new(&system).await;
        let left = match point {
            // No signal reported the removal, and all its files are there.
            Point::RemovalRecorded => &ids[..],
            _ => &ids[..2],
        };
        wait::until_async("the rest to be done", || async {
            (listed(&root).await == left).then_some(())
        })
        .await;
        // The service ends after it has finished its current work.
        system.stop_daemon();
        assert_eq!(removing(&system), 0, "{point:?}");
        assert_settled(&system, point, left.len());
        system.start_daemon();
        system.wait_for_domain("web");
        let root = Caller::new(&system).await;
        delete(&root, &ids[0], &["with-dependents"]).await.unwrap();
        assert_settled(&system, point, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescan_finishes_deletions_that_are_not_in_the_catalog() {
    let system = System::start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    let backups = chain(&system, &root).await;
    let hidden = backups[2].with_file_name(format!(".{}.removed", id(&backups[2])));
    fs::rename(&backups[2], &hidden).unwrap();
    fs::remove_file(hidden.join("vda.qcow2")).unwrap();
    let empty = backups[2].with_file_name(".20200101T000000Z-00000000.removed");
    fs::create_dir(&empty).unwrap();
    let strange = backups[2].with_file_name(".20200101T000000Z-00000001.removed");
    fs::create_dir(&strange).unwrap();
    fs::write(strange.join("mine"), "mine").unwrap();
    let (found, problems) = root.manager.rescan(Options::new()).await.unwrap();
    assert_eq!((found, problems.len()), (2, 1), "{problems:#?}");
    assert!(
        problems[0].contains("mine: does not belong to the backup"),
        "{problems:#?}"
    );
    assert!(!hidden.exists() && !empty.exists() && strange.join("mine").exists());
    assert_eq!(listed(&root).await.len(), 2);
}

fn backupctl(system: &System, arguments: &[&str]) -> crate::common::process::Output {
    system.clients().backupctl(ROOT, arguments)
}

fn exists(backups: &[PathBuf]) -> Vec<bool> {
    backups
        .iter()
        .map(|backup: &PathBuf| Path::exists(backup))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_deletes_the_named_backups_in_any_order() {
    let system = System::start();
    let _vm = machine(&system);
    let root = Caller::new(&system).await;
    let backups = chain(&system, &root).await;
    let ids = backups.each_ref().map(|backup| id(backup));
    let refused = backupctl(&system, &["delete", &ids[0]]);
    assert_eq!(refused.status, 1);
    assert!(
        refused.stderr.contains("2 other backups depend on") && refused.stderr.contains("--with-dependents"),
        "{}",
        refused.stderr
    );
    // The others depend on the first: it is removed with the second, not with the third.
    let dry = backupctl(&system, &["delete", "--dry-run", &ids[0], &ids[2]]);
    assert_eq!(
        (dry.status, exists(&backups)),
        (1, vec![true; 3]),
        "{}",
        dry.stdout
    );
    let dry = backupctl(&system, &["delete", "--dry-run", &ids[1], &ids[2]]).expect_success();
    assert_eq!(dry.matches("would be deleted").count(), 2, "{dry}");
    assert_eq!(exists(&backups), [true; 3]);
    let shown = backupctl(&system, &["delete", "--json", &ids[1], &ids[2]]).expect_success();
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["removed"].as_array().unwrap().len(), 2);
    assert!(shown["freed"].as_u64().unwrap() > 0, "{shown}");
    assert_eq!(exists(&backups), [true, false, false]);
    // An empty id, the number of a job, and a prefix that is too short.
    for (wanted, words) in [
        ("", "no backup ''"),
        ("1", "'1' is a job, not a backup: job 1 is about backup"),
        ("2026", "too short an id"),
        (&ids[0][..15], "too short an id"),
    ] {
        let refused = backupctl(&system, &["delete", wanted]);
        assert_ne!(refused.status, 0, "{wanted}");
        assert!(refused.stderr.contains(words), "{wanted}: {}", refused.stderr);
    }
    let text = backupctl(&system, &["delete", &ids[0][..18]]).expect_success();
    assert!(
        text.contains(&format!("{}: deleted", ids[0])) && text.contains("freed"),
        "{text}"
    );
    let unknown = backupctl(&system, &["delete", &ids[0]]);
    assert_eq!(unknown.status, 1);
    assert!(unknown.stderr.contains("backupctl backups"), "{}", unknown.stderr);
}

/// Makes a chain of three whose last backup belongs to another domain, which a rule names.
async fn shared_chain(rule: &str) -> (System, Vm, [String; 3]) {
    let user = polkit::user_name(USER);
    let rules = format!(
        "polkit.addRule(function(action, subject) {{
            if (subject.user != '{user}') return;
            var other = action.lookup('domain_name') == 'other';
            {rule}
            if (action.id == 'org.example.backup1.backup.delete' && !other) return polkit.Result.YES;
        }});"
    );
    let mut system = System::setup().rules(&rules).start();
    let vm = machine(&system);
    let root = Caller::new(&system).await;
    let ids = chain(&system, &root).await.map(|path| id(&path));
    system.stop_daemon();
    let catalog = rusqlite::Connection::open(system.dir().join("state/catalog.sqlite")).unwrap();
    let uuid = "7d3c0f3e-52d1-4a4e-9d0c-0f8a3f5a2b10";
    let sql = "UPDATE backups SET domain_name = 'other', domain_uuid = ?1 WHERE id = ?2";
    assert_eq!(catalog.execute(sql, [uuid, &ids[2]]).unwrap(), 1);
    drop(catalog);
    system.start_daemon();
    (system, vm, ids)
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_dependents_needs_the_right_to_delete_each_of_them() {
    let (system, _vm, ids) = shared_chain("").await;
    let user = Caller::of_user(&system, USER).await;
    for option in ["with-dependents", "merge"] {
        let refused = delete(&user, &ids[0], &[option]).await.unwrap_err();
        let name = error_name(&refused);
        assert!(
            name.ends_with("InteractiveAuthorizationRequired"),
            "{option}: {refused}"
        );
    }
    assert_eq!(listed(&user).await.len(), 3);
    let root = Caller::new(&system).await;
    let (gone, _) = delete(&root, &ids[0], &["with-dependents"]).await.unwrap();
    assert_eq!(gone.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn dependents_that_are_hidden_are_counted_and_not_named() {
    let hide = "if (other) return polkit.Result.NO;";
    let (system, _vm, ids) = shared_chain(hide).await;
    let user = Caller::of_user(&system, USER).await;
    assert_eq!(listed(&user).await.len(), 2);
    for options in [
        &[][..],
        &["with-dependents"],
        &["merge"],
        &["with-dependents", "dry-run"],
    ] {
        let refused = delete(&user, &ids[0], options).await.unwrap_err();
        assert!(
            error_name(&refused).ends_with("HasDependents"),
            "{options:?}: {refused}"
        );
        let text = refused.to_string();
        assert!(
            text.contains("2 other backups") && text.contains(&ids[1]),
            "{options:?}: {text}"
        );
        assert!(!text.contains(&ids[2]), "{options:?}: {text}");
    }
    let root = Caller::new(&system).await;
    assert_eq!(listed(&root).await.len(), 3);
}
