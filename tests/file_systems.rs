//! Stores and targets on file systems that cannot do everything: network file systems, FUSE.

mod common;

use std::fs;
use std::path::Path;

use common::System;
use common::caller::{Caller, assert_completed};
use common::clients::ROOT;
use common::disk::Disk;
use common::hanging::{Hanging, Limits};
use common::proxies::{Options, error_name};
use common::storage::{files_below, holds};
use common::wait;

const MIB: u64 = 1 << 20;

fn into_file(path: &Path) -> String {
    format!(
        "<domainbackup><disks><disk name='vda'><target file='{}'/></disk></disks></domainbackup>",
        path.display()
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_could_not_be_given_its_name_is_refused_before_anything_is_copied() {
    let system = System::start();
    let vm = system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", 4 * MIB).fill(0, MIB, 0x11)),
    );
    let caller = Caller::new(&system).await;
    let before = vm.residue();
    let limits = Limits {
        plain_rename: true,
        no_links: true,
        ..Limits::default()
    };
    let storage = Hanging::mount(&system.dir().join("poor"), limits);
    let target = storage.path().join("a.qcow2");
    let refused = caller
        .try_start("web", &into_file(&target), &[], Options::new())
        .await;
    let error = refused.expect_err("the backup is refused");
    assert_eq!(
        error_name(&error),
        "org.example.Backup1.Error.TargetInvalid",
        "{error}"
    );
    assert!(error.to_string().contains("hard links"), "{error}");
    assert!(files_below(storage.path()).is_empty());
    assert_eq!(vm.residue(), before);
    // What somebody opened needs no name.
    let file = fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&target)
        .unwrap();
    let document =
        "<domainbackup><disks><disk name='vda' type='fd'><target fd='0'/></disk></disks></domainbackup>";
    assert_completed(
        &caller
            .start_with("web", document, &[file.into()], Options::new())
            .await,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_gets_its_name_by_a_link_where_renaming_could_replace() {
    let system = System::start();
    let vm = system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", 4 * MIB).fill(0, MIB, 0x11)),
    );
    let caller = Caller::new(&system).await;
    let limits = Limits {
        plain_rename: true,
        ..Limits::default()
    };
    let storage = Hanging::mount(&system.dir().join("links"), limits);
    let target = storage.path().join("a.qcow2");
    assert_completed(&caller.start("web", &into_file(&target)).await).await;
    assert_eq!(files_below(storage.path()), ["a.qcow2"]);
    assert!(holds(&target, "qcow2", 0, MIB, 0x11));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_goes_though_its_images_are_open_and_its_directory_goes_when_they_are_closed() {
    let mut system = System::setup().without_daemon().start();
    let limits = Limits {
        plain_rename: true,
        keeps_open_files: true,
        ..Limits::default()
    };
    let storage = Hanging::mount(&system.store(), limits);
    system.start_daemon();
    let vm = system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", 4 * MIB).fill(0, MIB, 0x11)),
    );
    let caller = Caller::new(&system).await;
    caller.complete("web", "").await;
    let domain = storage.path().join("web");
    let names = || {
        let entries = fs::read_dir(&domain).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect::<Vec<_>>()
    };
    let [id] = names().try_into().unwrap();
    let reader = fs::File::open(domain.join(&id).join("vda.qcow2")).unwrap();
    let deleted = system.clients().backupctl(ROOT, &["delete", &id]);
    assert!(deleted.success(), "{}", deleted.stderr);
    let (listed, _) = caller.manager.list_backups(Options::new()).await.unwrap();
    assert!(listed.is_empty(), "{listed:?}");
    let [removed] = names().try_into().unwrap();
    assert_eq!(removed, format!(".{id}.removed"));
    let left = fs::read_dir(domain.join(&removed)).unwrap();
    assert!(left.count() > 0, "a program has an image open");
    // A search of the store says nothing of it.
    let scanned = system.clients().backupctl(ROOT, &["rescan"]);
    assert!(
        scanned.success() && !scanned.stdout.contains(&id),
        "{}{}",
        scanned.stdout,
        scanned.stderr
    );
    drop(reader);
    wait::until_async("the file to go", || async {
        let empty = fs::read_dir(domain.join(&removed)).map_or(true, |mut left| left.next().is_none());
        empty.then_some(())
    })
    .await;
    caller.complete("web", "").await;
    assert!(!domain.join(&removed).exists(), "the next backup removes it");
}
