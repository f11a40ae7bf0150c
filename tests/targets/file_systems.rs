//! Stores and targets on file systems that lack features: network file systems, FUSE.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::System;
use crate::common::caller::{Caller, assert_completed};
use crate::common::clients::ROOT;
use crate::common::disk::Disk;
use crate::common::hanging::{Hanging, Limits};
use crate::common::proxies::{Options, error_name};
use crate::common::storage::{files_below, holds};
use crate::common::vm::Vm;
use crate::common::{process, wait};

const MIB: u64 = 1 << 20;
const INVALID: &str = "org.example.Backup1.Error.TargetInvalid";

fn into_file(path: &Path) -> String {
    format!(
        "<domainbackup><disks><disk name='vda'><target file='{}'/></disk></disks></domainbackup>",
        path.display()
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_renamed_is_refused_before_anything_is_copied() {
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
    // A descriptor of the caller needs no name.
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
async fn a_file_is_published_by_a_link_where_a_rename_could_overwrite() {
    let system = System::start();
    let _vm = system.configured(
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
async fn a_backup_with_open_images_is_deleted_and_its_directory_follows_on_close() {
    let mut system = System::setup().without_daemon().start();
    let limits = Limits {
        plain_rename: true,
        keeps_open_files: true,
        ..Limits::default()
    };
    let storage = Hanging::mount(&system.store(), limits);
    system.start_daemon();
    let _vm = system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", 4 * MIB).fill(0, MIB, 0x11))
            // QEMU up to version 8 keeps the descriptors while its guest is stopped.
            .running(),
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
    // A scan of the store does not report it.
    let scanned = system.clients().backupctl(ROOT, &["rescan"]);
    assert!(
        scanned.success() && !scanned.stdout.contains(&id),
        "{}{}",
        scanned.stdout,
        scanned.stderr
    );
    drop(reader);
    wait::until_async("the file to be removed", || async {
        let empty = fs::read_dir(domain.join(&removed)).map_or(true, |mut left| left.next().is_none());
        empty.then_some(())
    })
    .await;
    caller.complete("web", "").await;
    assert!(!domain.join(&removed).exists(), "the next backup removes it");
}

/// A bind mount, which ends when this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn bind(directory: &Path, on: &Path) -> Self {
        let mut mount = Command::new("mount");
        mount.arg("--bind").args([directory, on]);
        process::run(mount).expect_success();
        Self(on.to_owned())
    }
}

impl Mounted {
    /// Mounts an overlay on a directory, which is also its lower layer.
    fn overlay(on: &Path, layers: &Path) -> Self {
        let [upper, work] = ["upper", "work"].map(|name| layers.join(name));
        for layer in [&upper, &work] {
            fs::create_dir(layer).unwrap();
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={},redirect_dir=off",
            on.display(),
            upper.display(),
            work.display()
        );
        let mut mount = Command::new("mount");
        mount.args(["-t", "overlay", "-o", &options, "none"]).arg(on);
        process::run(mount).expect_success();
        Self(on.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let mut unmount = Command::new("umount");
        unmount.arg("--lazy").arg(&self.0);
        process::run(unmount);
    }
}

/// A VM, and a store `disk` whose path is a mount point.
struct MountPoint {
    caller: Caller,
    _vm: Vm,
    system: System,
    path: PathBuf,
    _place: tempfile::TempDir,
}

impl MountPoint {
    const STORE: &str = "<domainbackup><store name='disk'/></domainbackup>";

    async fn new() -> Self {
        let place = crate::common::test_directory();
        let path = place.path().join("mnt");
        fs::create_dir(&path).unwrap();
        let system = System::setup().store("disk", &path).start();
        let vm = system.configured(
            system
                .vm("web")
                .disk(Disk::new("vda", 4 * MIB).raw().fill(0, MIB, 0x11)),
        );
        Self {
            caller: Caller::new(&system).await,
            _vm: vm,
            system,
            path,
            _place: place,
        }
    }

    /// Returns a directory to mount there.
    fn disk(&self, name: &str) -> PathBuf {
        let path = self.system.dir().join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    async fn refuses(&self, words: &str) {
        let before = all_below(&self.path);
        let started = self
            .caller
            .try_start("web", Self::STORE, &[], Options::new())
            .await;
        let error = started.expect_err("the backup is refused");
        assert_eq!(error_name(&error), INVALID, "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(all_below(&self.path), before, "nothing is written: {error}");
    }

    fn rescan(&self) -> String {
        let scanned = self.system.clients().backupctl(ROOT, &["rescan"]);
        format!("{}{}", scanned.stdout, scanned.stderr)
    }

    fn delete(&self, id: &str) -> String {
        let deleted = self.system.clients().backupctl(ROOT, &["delete", id]);
        assert!(!deleted.success(), "{}", deleted.stdout);
        deleted.stderr
    }

    /// Returns the ids, of which there may be none.
    fn ids_so_far(&self) -> Vec<String> {
        match self.path.join("web").exists() {
            true => self.ids(),
            false => Vec::new(),
        }
    }

    /// Returns the directories of the VM's backups.
    fn ids(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path.join("web")).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

/// Returns every entry, the service's own too.
fn all_below(path: &Path) -> Vec<PathBuf> {
    let mut find = Command::new("find");
    let found = process::run({
        find.arg(path);
        find
    });
    found.expect_success().lines().map(PathBuf::from).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unmounted_store_gets_no_backup() {
    let scene = MountPoint::new().await;
    let disk = scene.disk("disk");
    let mounted = Mounted::bind(&disk, &scene.path);
    scene.caller.complete("web", MountPoint::STORE).await;
    let [id] = scene.ids().try_into().unwrap();
    drop(mounted);
    scene.refuses("its mark (.backupd/store) is missing").await;
    let refused = scene.delete(&id);
    assert!(refused.contains(".backupd/store"), "{refused}");
    // A scan changes nothing while the store is not mounted.
    let scanned = scene.rescan();
    assert!(scanned.contains("Check that the store is mounted"), "{scanned}");
    scene.refuses("its mark (.backupd/store) is missing").await;
    let _mounted = Mounted::bind(&disk, &scene.path);
    scene.caller.complete("web", MountPoint::STORE).await;
    assert_eq!(scene.ids().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_store_is_used_after_an_administrator_confirms_it() {
    let scene = MountPoint::new().await;
    let first = Mounted::bind(&scene.disk("first"), &scene.path);
    scene.caller.complete("web", MountPoint::STORE).await;
    drop(first);
    // A store that another service uses.
    let marked = scene.disk("marked");
    let own = marked.join(".backupd");
    fs::create_dir(&own).unwrap();
    fs::write(own.join("store"), "0f0e0d0c-0000-4000-8000-000000000000\n").unwrap();
    let second = Mounted::bind(&marked, &scene.path);
    scene.refuses("its mark (.backupd/store) differs").await;
    scene.rescan();
    scene.caller.complete("web", MountPoint::STORE).await;
    drop(second);
    // An empty store, prepared by an administrator.
    let empty = scene.disk("empty");
    let _third = Mounted::bind(&empty, &scene.path);
    scene.refuses("is missing").await;
    fs::create_dir(empty.join(".backupd")).unwrap();
    scene.refuses("is missing").await;
    scene.rescan();
    scene.caller.complete("web", MountPoint::STORE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_in_the_lower_layer_of_an_overlay_is_refused_before_any_other_is_changed() {
    let scene = MountPoint::new().await;
    let back_up = async || {
        let before = scene.ids_so_far();
        scene.caller.complete("web", MountPoint::STORE).await;
        scene.ids().into_iter().find(|id| !before.contains(id)).unwrap()
    };
    let (first, second) = (back_up().await, back_up().await);
    let layers = crate::common::test_directory();
    let _overlay = Mounted::overlay(&scene.path, layers.path());
    let third = back_up().await;
    let before = all_below(&scene.path);
    for arguments in [
        ["--with-dependents", &first],
        ["--merge", &first],
        ["--merge", &second],
    ] {
        let command = [&["delete"], arguments.as_slice()].concat();
        let refused = scene.system.clients().backupctl(ROOT, &command);
        assert!(!refused.success(), "{}", refused.stdout);
        assert!(
            refused.stderr.contains("overlay file system"),
            "{}",
            refused.stderr
        );
        assert_eq!(all_below(&scene.path), before, "{command:?}");
    }
    // A directory that was created above it is removed.
    let deleted = scene.system.clients().backupctl(ROOT, &["delete", &third]);
    assert!(deleted.success(), "{}", deleted.stderr);
    assert!(!scene.ids().contains(&third));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_whose_store_is_not_mounted_is_not_damaged() {
    let scene = MountPoint::new().await;
    let disk = scene.disk("disk");
    let mounted = Mounted::bind(&disk, &scene.path);
    scene.caller.complete("web", MountPoint::STORE).await;
    let [id] = scene.ids().try_into().unwrap();
    drop(mounted);
    let run = |arguments: &[&str]| scene.system.clients().backupctl(ROOT, arguments);
    let from = scene.path.to_str().unwrap();
    for arguments in [["verify", "--all"], ["verify", &id]] {
        let looked = run(&arguments);
        assert_eq!(looked.status, 1, "{}{}", looked.stdout, looked.stderr);
        for words in ["0 good, 0 damaged, 1 unknown", "store 'disk'", ".backupd/store"] {
            assert!(looked.stdout.contains(words), "{words}: {}", looked.stdout);
        }
    }
    let restored = run(&["restore", &id, "--to", scene.system.dir().to_str().unwrap()]);
    assert!(restored.stderr.contains("store 'disk'"), "{}", restored.stderr);
    let alone = run(&["verify", "--all", "--from", from]);
    assert_eq!(alone.status, 1, "{}{}", alone.stdout, alone.stderr);
    assert!(alone.stderr.contains("is it mounted"), "{}", alone.stderr);
    let _mounted = Mounted::bind(&disk, &scene.path);
    let listed = run(&["backups"]).expect_success();
    assert!(listed.contains("complete"), "{listed}");
    assert!(run(&["verify", "--all"]).expect_success().contains("1 good"));
    // An empty store has no problem.
    run(&["delete", &id]).expect_success();
    let alone = run(&["verify", "--all", "--from", from]).expect_success();
    assert!(alone.contains("There are no backups"), "{alone}");
}
