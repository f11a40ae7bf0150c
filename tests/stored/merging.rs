//! Deletion of backups with dependents, which are merged first.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::caller::Caller;
use crate::common::chain::{digest, directories};
use crate::common::clients::ROOT;
use crate::common::disk::Disk;
use crate::common::hanging::{Hanging, Limits, Operation};
use crate::common::proxies::{Options, error_name};
use crate::common::vm::Vm;
use crate::common::{System, process, wait};
use backupd::fault::Point;
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const DISKS: [&str; 2] = ["vda", "vdb"];

/// A full backup, and a chain of three on it.
struct Scene {
    // Dropped after all fields that use it.
    _storage: Option<Hanging>,
    system: System,
    vm: Vm,
    ids: Vec<String>,
    /// The content of each image, by id and disk.
    shown: BTreeMap<(String, &'static str), Vec<u8>>,
}

impl Scene {
    async fn new() -> Self {
        Self::of(System::start(), None).await
    }

    /// Uses a store whose file system lacks features.
    async fn limited(limits: Limits) -> Self {
        let mut system = System::setup().without_daemon().start();
        let storage = Hanging::mount(&system.store(), limits);
        system.start_daemon();
        Self::of(system, Some(storage)).await
    }

    async fn of(system: System, storage: Option<Hanging>) -> Self {
        let machine = system.vm("web").running();
        let disk = |name: &&str| Disk::new(name, 4 * MIB).fill(0, 2 * MIB, 0x11);
        let vm = system.configured(
            DISKS
                .iter()
                .map(disk)
                .fold(machine, |machine, disk| machine.disk(disk)),
        );
        let mut scene = Self {
            _storage: storage,
            system,
            vm,
            ids: Vec::new(),
            shown: BTreeMap::new(),
        };
        for pattern in 1..=4 {
            scene.backup(pattern).await;
        }
        scene
    }

    async fn backup(&mut self, pattern: u8) {
        let at = u64::from(pattern) * MIB / 2;
        self.vm.write("vda", at, MIB / 4, pattern);
        self.vm.write_zeroes("vda", at + MIB / 4, MIB / 8);
        self.vm.write("vdb", 4 * MIB - at, 65536, pattern);
        let root = Caller::new(&self.system).await;
        root.complete("web", "").await;
        let made = directories(&self.system.store().join("web"));
        let ids = made
            .iter()
            .map(|path| path.file_name().unwrap().to_str().unwrap());
        let new = ids.filter(|id| !self.ids.iter().any(|known| known == id));
        let [id] = new.collect::<Vec<_>>().try_into().unwrap();
        let id = id.to_owned();
        for disk in DISKS {
            self.shown
                .insert((id.clone(), disk), read(&self.image(&id, disk)));
        }
        self.ids.push(id);
    }

    fn directory(&self, id: &str) -> PathBuf {
        self.system.store().join("web").join(id)
    }

    fn image(&self, id: &str, disk: &str) -> PathBuf {
        self.directory(id).join(format!("{disk}.qcow2"))
    }

    fn manifest(&self, id: &str) -> Value {
        let text = std::fs::read(self.directory(id).join("manifest.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }

    async fn delete(&self, id: &str, options: &[&'static str]) -> zbus::Result<(Vec<String>, u64)> {
        let root = Caller::new(&self.system).await;
        let path = root.manager.get_backup(id).await?;
        let options: Options = options.iter().map(|name| (*name, Variant::from(true))).collect();
        let interface = Some("org.example.Backup1.Backup");
        let call =
            root.connection
                .call_method(Some("org.example.Backup1"), &path, interface, "Delete", &options);
        wait::within("Delete", call).await?.body().deserialize()
    }

    /// Checks that exactly these backups exist, have their content, match their manifests, and are listed as complete.
    async fn assert_there(&self, ids: &[&str]) {
        let there = directories(&self.system.store().join("web"));
        let mut names: Vec<&str> = there
            .iter()
            .map(|path| path.file_name().unwrap().to_str().unwrap())
            .collect();
        names.sort_unstable();
        let mut expected = ids.to_vec();
        expected.sort_unstable();
        assert_eq!(names, expected);
        let hidden = std::fs::read_dir(self.system.store().join("web")).unwrap();
        assert_eq!(hidden.count(), ids.len(), "other entries remain");
        for id in ids {
            for disk in DISKS {
                let image = self.image(id, disk);
                assert!(
                    read(&image) == self.shown[&((*id).to_owned(), disk)],
                    "{}",
                    image.display()
                );
            }
            let manifest = self.manifest(id);
            for disk in manifest["disks"].as_array().unwrap() {
                let image = self.directory(id).join(disk["file"].as_str().unwrap());
                assert_eq!(disk["length"], image.metadata().unwrap().len());
                assert_eq!(disk["blake3"], digest(&image));
            }
        }
        let root = Caller::new(&self.system).await;
        let (listed, _) = root.manager.list_backups(Options::new()).await.unwrap();
        let complete = listed
            .iter()
            .filter(|backup| format!("{backup:?}").contains("complete"));
        assert_eq!(complete.count(), ids.len(), "{listed:?}");
    }
}

#[track_caller]
fn read(image: &Path) -> Vec<u8> {
    let raw = tempfile::NamedTempFile::new().unwrap();
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-O", "raw"]).arg(image).arg(raw.path());
    process::run(convert).expect_success();
    std::fs::read(raw.path()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn dependents_of_a_deleted_backup_keep_their_content() {
    let scene = Scene::new().await;
    let [first, second, third, fourth] = scene.ids.clone().try_into().unwrap();
    let before = scene.manifest(&third);
    let (would_go, _) = scene.delete(&first, &["merge", "dry-run"]).await.unwrap();
    assert_eq!(would_go, [first.as_str()]);
    scene.assert_there(&[&first, &second, &third, &fourth]).await;
    let (gone, freed) = scene.delete(&first, &["merge"]).await.unwrap();
    assert_eq!(gone, [first.as_str()]);
    assert!(freed > 2 * MIB, "{freed}");
    scene.assert_there(&[&second, &third, &fourth]).await;
    let manifest = scene.manifest(&second);
    assert_eq!(manifest["kind"], "full");
    assert_eq!(manifest["disks"][0]["parent"], Value::Null);
    assert_eq!(scene.manifest(&third), before);
    let mode = scene.image(&second, "vda").metadata().unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
    // In the middle of a chain, with backupctl.
    let deleted = scene
        .system
        .clients()
        .backupctl(ROOT, &["delete", "--merge", &third[..]])
        .expect_success();
    assert!(deleted.contains(&third), "{deleted}");
    scene.assert_there(&[&second, &fourth]).await;
    assert_eq!(scene.manifest(&fourth)["kind"], "full");
    // The next backup continues from the newest, which has other images now.
    let mut scene = scene;
    scene.backup(5).await;
    let fifth = scene.ids.last().unwrap().clone();
    assert_eq!(scene.manifest(&fifth)["disks"][0]["parent"]["backup"], fourth);
    scene.assert_there(&[&second, &fourth, &fifth]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_backup_keeps_its_content_at_each_point_where_the_service_dies() {
    dies_and_goes_on(Scene::new().await, &Point::MERGE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_backup_keeps_its_content_without_renameat2_exchange_too() {
    let limits = Limits {
        plain_rename: true,
        no_links: true,
        ..Limits::default()
    };
    dies_and_goes_on(Scene::limited(limits).await, &Point::MERGE_BY_MOVING).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dependents_keep_their_content_in_a_store_with_links_and_without_exchange() {
    let limits = Limits {
        plain_rename: true,
        ..Limits::default()
    };
    let scene = Scene::limited(limits).await;
    let [first, second, third, fourth] = scene.ids.clone().try_into().unwrap();
    scene.delete(&second, &["merge"]).await.unwrap();
    scene.assert_there(&[&first, &third, &fourth]).await;
}

/// Deletes the oldest backup once for each point at which the service dies then.
async fn dies_and_goes_on(mut scene: Scene, merge: &[Point]) {
    for point in merge.iter().copied().chain(Point::REMOVAL) {
        let oldest = scene.ids[0].clone();
        scene.system.stop_daemon();
        scene.system.start_dying_daemon(point);
        scene.system.wait_for_domain("web");
        scene.delete(&oldest, &["merge"]).await.unwrap_err();
        scene.system.wait_for_death();
        // Every existing backup is good. While one is moved aside, its dependents cannot be read.
        for (id, disk) in scene.shown.keys() {
            let image = scene.image(id, disk);
            if image.exists() && point != Point::MergeMovedAside {
                assert!(
                    read(&image) == scene.shown[&(id.clone(), *disk)],
                    "{point:?}: {}",
                    image.display()
                );
            }
        }
        scene.system.start_daemon();
        scene.system.wait_for_domain("web");
        // The service finishes an operation that it can finish; otherwise the caller repeats the call.
        let parent = scene.system.store().join("web");
        wait::until(&format!("the residue after {point:?} to be removed"), || {
            let names = std::fs::read_dir(&parent)
                .unwrap()
                .map(|entry| entry.unwrap().file_name());
            let hidden = names.filter(|name| name.to_str().unwrap().starts_with('.'));
            (hidden.count() == 0).then_some(())
        });
        if scene.directory(&oldest).exists() {
            scene.delete(&oldest, &["merge"]).await.unwrap();
        }
        scene.ids.remove(0);
        let left: Vec<&str> = scene.ids.iter().map(String::as_str).collect();
        scene.assert_there(&left).await;
        let pattern = 10 + scene.shown.len() as u8;
        scene.backup(pattern % 7 + 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_in_use_or_damaged_is_not_merged_and_nothing_changes() {
    let scene = Scene::new().await;
    let [first, second, third, fourth] = scene.ids.clone().try_into().unwrap();
    let all = [first.as_str(), &second, &third, &fourth];
    let reader = std::fs::File::open(scene.directory(&second)).unwrap();
    flock(&reader, FlockOperation::LockShared).unwrap();
    let busy = scene.delete(&first, &["merge"]).await.unwrap_err();
    assert!(error_name(&busy).ends_with("Busy"), "{busy}");
    scene.assert_there(&all).await;
    drop(reader);
    let both = scene
        .delete(&first, &["merge", "with-dependents"])
        .await
        .unwrap_err();
    assert!(error_name(&both).ends_with("InvalidArgs"), "{both}");
    // A damaged image does not become a good one.
    let image = scene.image(&second, "vda");
    let whole = std::fs::read(&image).unwrap();
    std::fs::write(&image, &whole[..whole.len() - 1]).unwrap();
    let damaged = scene.delete(&first, &["merge"]).await.unwrap_err();
    assert!(damaged.to_string().contains(&second), "{damaged}");
    std::fs::write(&image, &whole).unwrap();
    scene.assert_there(&all).await;
    // Neither does one that only its checksum shows as damaged.
    let image = scene.image(&first, "vda");
    let mut whole = std::fs::read(&image).unwrap();
    let place = whole.len() - 4096;
    whole[place] ^= 1;
    std::fs::write(&image, &whole).unwrap();
    let damaged = scene.delete(&first, &["merge"]).await.unwrap_err();
    assert!(damaged.to_string().contains("checksum"), "{damaged}");
    whole[place] ^= 1;
    std::fs::write(&image, &whole).unwrap();
    scene.assert_there(&all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_is_refused_has_changed_no_dependent() {
    let scene = Scene::new().await;
    let [first, second, third, fourth] = scene.ids.clone().try_into().unwrap();
    let all = [first.as_str(), &second, &third, &fourth];
    let images = || {
        let inode = |id: &&str| scene.image(id, "vda").metadata().unwrap().ino();
        all.iter().map(inode).collect::<Vec<_>>()
    };
    let before = images();
    let protect = |command: &str| {
        let clients = scene.system.clients();
        clients.backupctl(ROOT, &[command, &first]).expect_success();
    };
    protect("protect");
    let refused = scene.delete(&first, &["merge"]).await.unwrap_err();
    assert!(error_name(&refused).ends_with("Protected"), "{refused}");
    assert_eq!(images(), before);
    protect("unprotect");
    // A foreign file in the backup that is deleted, and in one that would get another directory.
    for id in [&first, &second] {
        let note = scene.directory(id).join("note.txt");
        std::fs::write(&note, "mine").unwrap();
        let refused = scene.delete(&first, &["merge"]).await.unwrap_err();
        assert!(refused.to_string().contains("note.txt"), "{refused}");
        assert_eq!(images(), before, "{id}");
        std::fs::remove_file(&note).unwrap();
    }
    // A reader of the backup that is deleted.
    let reader = std::fs::File::open(scene.directory(&first)).unwrap();
    flock(&reader, FlockOperation::LockShared).unwrap();
    let refused = scene.delete(&first, &["merge"]).await.unwrap_err();
    assert!(error_name(&refused).ends_with("Busy"), "{refused}");
    assert_eq!(images(), before);
    drop(reader);
    scene.assert_there(&all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_dependent_keeps_its_base_while_others_are_merged() {
    let mut scene = Scene::new().await;
    let [first, second, third, fourth] = scene.ids.clone().try_into().unwrap();
    scene.vm.write("vda", 0, MIB, 0x77);
    let root = Caller::new(&scene.system).await;
    let since = Options::from([
        ("incremental", Variant::from(first.as_str())),
        ("bandwidth", Variant::from(1u64)),
    ]);
    let job = root.start_with("web", "", &[], since).await;
    let busy = scene.delete(&first, &["merge"]).await.unwrap_err();
    assert!(error_name(&busy).ends_with("Busy"), "{busy}");
    // Recorded dependents count too, even if no lock is held.
    let (directory, aside) = (scene.directory(&first), scene.system.dir().join("aside"));
    std::fs::rename(&directory, &aside).unwrap();
    let mut copy = Command::new("cp");
    copy.arg("-a").arg(&aside).arg(&directory);
    process::run(copy).expect_success();
    let busy = scene.delete(&first, &["merge"]).await.unwrap_err();
    assert!(error_name(&busy).ends_with("Busy"), "{busy}");
    assert!(busy.to_string().contains("as its base"), "{busy}");
    job.set_speed(0).await.unwrap();
    crate::common::caller::assert_completed(&job).await;
    let target = PathBuf::from(&job.disks().await.unwrap()[0].4);
    let fifth = target
        .parent()
        .unwrap()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    for disk in DISKS {
        scene
            .shown
            .insert((fifth.clone(), disk), read(&scene.image(&fifth, disk)));
    }
    assert_eq!(scene.manifest(&fifth)["disks"][0]["parent"]["backup"], first);
    scene
        .assert_there(&[&first, &second, &third, &fourth, &fifth])
        .await;
    scene.delete(&first, &["merge"]).await.unwrap();
    scene.assert_there(&[&second, &third, &fourth, &fifth]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_that_makes_progress_has_no_timeout() {
    let limit = std::time::Duration::from_secs(3);
    let setup = System::setup().table("[deadlines]\nstall-seconds = 3");
    let mut system = setup.without_daemon().start();
    let no_links = Limits {
        no_links: true,
        ..Limits::default()
    };
    let storage = Hanging::mount(&system.store(), no_links);
    system.start_daemon();
    let vm = system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", 4 * MIB).fill(0, 65536, 0x11))
            .disk(Disk::new("vdb", 24 * MIB).fill(0, 24 * MIB, 0x22))
            .running(),
    );
    let root = Caller::new(&system).await;
    let only_vda = "<domainbackup><disks><disk name='vda'/></disks></domainbackup>";
    root.complete("web", only_vda).await;
    let [first] = directories(&system.store().join("web")).try_into().unwrap();
    vm.write("vda", MIB, 65536, 0x33);
    root.complete("web", "").await;
    let both = directories(&system.store().join("web"));
    let [second] = both
        .into_iter()
        .filter(|path| *path != first)
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    let of = |disk: &str| read(&second.join(format!("{disk}.qcow2")));
    let shown = [of("vda"), of("vdb")];
    storage.slow_down(Operation::Write, std::time::Duration::from_millis(40));
    let since = std::time::Instant::now();
    let id = first.file_name().unwrap().to_str().unwrap();
    let deleted = system.clients().backupctl(ROOT, &["delete", "--merge", id]);
    let took = since.elapsed();
    storage.heal();
    assert!(deleted.success(), "{}", deleted.stderr);
    assert!(took > 2 * limit, "it took no longer than the limit: {took:?}");
    let left = directories(&system.store().join("web"));
    assert_eq!(left, std::slice::from_ref(&second));
    assert_eq!([of("vda"), of("vdb")], shown);
}
