//! A random walk: a guest that writes, backups of every kind, failures of every kind, restarts, deletions and merges, in an
//! order that a seed decides. After every step each backup that is there shows exactly what there was at its instant.
//!
//! `BACKUPD_WALK_SEED` repeats a walk, `BACKUPD_WALK_STEPS` makes it longer.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::caller::Caller;
use common::clients::ROOT;
use common::dice::Dice;
use common::proxies::{JobProxy, Options, slowly};
use common::recorded::{CLUSTER, DISKS, Recorded, SIZE, backup_id, read};
use common::storage::Tmpfs;
use common::{System, wait};
use serde_json::Value;
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const STEPS: u64 = 2000;
/// More than that many backups are made fewer.
const MOST_BACKUPS: usize = 12;

/// What an image's file is, and those that it lies on: as long as this is the same, so is what the image shows.
type Fingerprint = Vec<(u64, u64, i64, i64)>;

struct Walk {
    dice: Dice,
    scene: Recorded,
    store: Tmpfs,
    /// The ids of the backups that are there, in the order in which they were made: their names decide nothing.
    order: Vec<String>,
    /// What was read already.
    checked: HashMap<PathBuf, Fingerprint>,
    /// How often each kind of step was made.
    made: BTreeMap<&'static str, u32>,
    backups: u32,
}

impl Walk {
    fn new(seed: u64) -> Self {
        let place = tempfile::Builder::new()
            .prefix("bkp-walk-")
            .tempdir()
            .unwrap()
            .keep();
        let store = Tmpfs::mount(&place, 256 * MIB);
        let setup = System::setup().store("walk", store.path());
        Self {
            dice: Dice::new(seed),
            scene: Recorded::with(setup),
            store,
            order: Vec::new(),
            checked: HashMap::new(),
            made: BTreeMap::new(),
            backups: 0,
        }
    }

    fn directory(&self) -> PathBuf {
        self.store.path().join("web")
    }

    fn image(&self, id: &str, disk: &str) -> PathBuf {
        self.directory().join(id).join(format!("{disk}.qcow2"))
    }

    fn manifest(&self, id: &str) -> Value {
        let text =
            std::fs::read(self.directory().join(id).join("manifest.json")).expect("a backup has a manifest");
        serde_json::from_slice(&text).expect("a manifest is JSON")
    }

    /// The files that it takes to read an image.
    fn fingerprint(&self, id: &str, disk: &str) -> Fingerprint {
        let (mut id, mut all) = (id.to_owned(), Vec::new());
        loop {
            let meta = self.image(&id, disk).metadata().expect("an image is there");
            all.push((meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()));
            let manifest = self.manifest(&id);
            let disks = manifest["disks"].as_array().expect("it has disks");
            let disk = disks
                .iter()
                .find(|entry| entry["name"] == disk)
                .expect("it has the disk");
            match disk["parent"]["backup"].as_str() {
                Some(parent) => id = parent.to_owned(),
                None => return all,
            }
        }
    }

    /// Every backup that is known is there, no other is, and each shows what there was.
    fn check(&mut self, step: u64, what: &str) {
        let mut there = common::chain::directories_if_any(&self.directory());
        there.retain(|path| path.join("manifest.json").exists());
        let mut there: Vec<&str> = there
            .iter()
            .map(|path| path.file_name().unwrap().to_str().unwrap())
            .collect();
        there.sort_unstable();
        let known: Vec<&str> = self.scene.backups.keys().map(String::as_str).collect();
        assert_eq!(there, known, "step {step}, {what}");
        for (id, disks) in &self.scene.backups {
            for (disk, content) in disks {
                let image = self.image(id, disk);
                let fingerprint = self.fingerprint(id, disk);
                if self.checked.get(&image) == Some(&fingerprint) {
                    continue;
                }
                let shown = read(&image);
                let wrong: Vec<usize> = (0..content.len() / 512)
                    .filter(|at| shown[at * 512..][..512] != content[at * 512..][..512])
                    .collect();
                assert!(
                    wrong.is_empty(),
                    "step {step}, {what}: {} does not show what there was, in {} sectors from {} to {}",
                    image.display(),
                    wrong.len(),
                    wrong[0],
                    wrong[wrong.len() - 1],
                );
                self.checked.insert(image, fingerprint);
            }
        }
    }

    async fn step(&mut self) -> &'static str {
        match self.dice.roll(100) {
            0..82 => {
                self.guest(false);
                "guest"
            }
            82..92 => self.backup().await,
            92 => self.cancelled().await,
            93 => self.full_store().await,
            94 => self.qemu_dies().await,
            95 => self.service_dies().await,
            96 => {
                self.scene.reboot();
                "reboot"
            }
            97 => {
                self.scene.system.start_daemon();
                self.scene.system.wait_for_domain("web");
                "restart"
            }
            98 => match self.dice.roll(2) {
                0 => self.delete("merge").await,
                _ => self.delete("with-descendants").await,
            },
            _ => self.prune().await,
        }
    }

    /// Something that a guest does. What it discards while a backup runs QEMU may keep: what is there then is not certain.
    fn guest(&mut self, a_backup_runs: bool) {
        let disk = DISKS[self.dice.roll(2) as usize];
        let clusters = SIZE / CLUSTER;
        match self.dice.roll(8) {
            0 if !a_backup_runs => {
                let (at, length) = (self.dice.roll(clusters - 4), 1 + self.dice.roll(4));
                self.scene.discard(disk, at * CLUSTER, length * CLUSTER);
            }
            1 | 2 => {
                let (at, length) = (self.dice.roll(SIZE / 512 - 256), 1 + self.dice.roll(256));
                self.scene.write_zeroes(disk, at * 512, length * 512);
            }
            _ => {
                let (at, length) = (self.dice.roll(SIZE / 512 - 256), 1 + self.dice.roll(256));
                let pattern = 1 + self.dice.roll(255) as u8;
                self.scene.write(disk, at * 512, length * 512, pattern);
            }
        }
    }

    async fn caller(&self) -> Caller {
        Caller::new(&self.scene.system).await
    }

    async fn start(&self, caller: &Caller, options: Options<'_>) -> zbus::Result<JobProxy<'static>> {
        let document = "<domainbackup><store name='walk'/></domainbackup>";
        let path = caller.try_start("web", document, &[], options).await?;
        Ok(caller.job(path).await)
    }

    /// What a job that has ended or will made, if it is good.
    async fn take(&mut self, job: &JobProxy<'_>, held: BTreeMap<&'static str, Vec<u8>>) -> bool {
        let (result, _, _) = wait::within("the end of the backup", job.wait()).await.unwrap();
        let good = result == "completed";
        if good {
            let id = backup_id(job).await;
            self.order.push(id.clone());
            self.scene.backups.insert(id, held);
            self.backups += 1;
        }
        good
    }

    async fn backup(&mut self) -> &'static str {
        if self.scene.backups.len() > MOST_BACKUPS {
            return self.delete("merge").await;
        }
        let some = self.order.get(self.dice.roll(MOST_BACKUPS as u64) as usize);
        let (what, word) = match (self.dice.roll(10), some) {
            (0, _) => ("full", "full".to_owned()),
            (1..4, Some(id)) => ("since", id.clone()),
            _ => ("auto", "auto".to_owned()),
        };
        let caller = self.caller().await;
        let options = Options::from([("incremental", Variant::from(word))]);
        match self.start(&caller, options).await {
            Ok(job) => {
                let held = self.scene.now.clone();
                assert!(
                    self.take(&job, held).await,
                    "a backup without a reason to fail is good"
                );
                what
            }
            // Since a backup that the disks have no checkpoint of any more, or that is not there.
            Err(error) => {
                let name = common::proxies::error_name(&error);
                assert!(
                    what == "since" && name.ends_with("ChainBroken"),
                    "{what}: {error}"
                );
                "refused"
            }
        }
    }

    async fn cancelled(&mut self) -> &'static str {
        let caller = self.caller().await;
        let job = self
            .start(&caller, slowly(1))
            .await
            .expect("the backup is accepted");
        common::caller::cancel(&job).await;
        "cancelled"
    }

    /// What is too much for the store.
    async fn full_store(&mut self) -> &'static str {
        let ballast = self.store.path().join("ballast");
        let caller = self.caller().await;
        let job = self
            .start(&caller, slowly(8 * MIB))
            .await
            .expect("the backup is accepted");
        let held = self.scene.now.clone();
        // As much as there is room for; what the backup has by then, it has.
        let mut file = std::fs::File::create(&ballast).unwrap();
        while std::io::Write::write(&mut file, &[0x5a; 1 << 16]).is_ok() {}
        job.set_speed(0).await.ok();
        self.take(&job, held).await;
        std::fs::remove_file(&ballast).unwrap();
        "full store"
    }

    async fn qemu_dies(&mut self) -> &'static str {
        let caller = self.caller().await;
        let job = match self.dice.roll(2) {
            0 => None,
            _ => Some(
                self.start(&caller, slowly(1))
                    .await
                    .expect("the backup is accepted"),
            ),
        };
        let mut vm = self.scene.vm.take().expect("the machine runs");
        DISKS.iter().for_each(|disk| vm.flush(disk));
        vm.kill();
        drop(vm);
        if let Some(job) = job {
            let held = self.scene.now.clone();
            assert!(!self.take(&job, held).await, "its QEMU died");
        }
        self.scene.boot();
        "QEMU dies"
    }

    async fn service_dies(&mut self) -> &'static str {
        let caller = self.caller().await;
        let job = self
            .start(&caller, slowly(MIB))
            .await
            .expect("the backup is accepted");
        let (id, held) = (job.id().await.unwrap(), self.scene.now.clone());
        if self.dice.roll(3) > 0 {
            wait::until_async("the copying", || async {
                (job.state().await.unwrap() == "running").then_some(())
            })
            .await;
        }
        self.scene.system.kill_daemon();
        self.guest(true);
        self.scene.system.start_daemon();
        self.scene.system.wait_for_domain("web");
        let caller = self.caller().await;
        let path = caller.manager.get_job(id).await.expect("the job is known again");
        let job = caller.job(path).await;
        job.set_speed(0).await.ok();
        self.take(&job, held).await;
        "service dies"
    }

    async fn delete(&mut self, how: &'static str) -> &'static str {
        let count = self.scene.backups.len() as u64;
        if count == 0 {
            return "nothing to delete";
        }
        let chosen = self.order[self.dice.roll(count) as usize].clone();
        let caller = self.caller().await;
        let path = caller.manager.get_backup(&chosen).await.expect("it is there");
        let options = Options::from([(how, Variant::from(true))]);
        let interface = Some("org.example.Backup1.Backup");
        let call =
            caller
                .connection
                .call_method(Some("org.example.Backup1"), &path, interface, "Delete", &options);
        let reply = wait::within("Delete", call).await.expect("it can be deleted");
        let (gone, _): (Vec<String>, u64) = reply.body().deserialize().unwrap();
        assert!(gone.contains(&chosen));
        assert!(how != "merge" || gone.len() == 1, "{gone:?}");
        for id in &gone {
            self.scene.backups.remove(id).expect("it was there");
            self.order.retain(|other| other != id);
        }
        how
    }

    /// The newest few stay, and what they lie on.
    async fn prune(&mut self) -> &'static str {
        let newest = 1 + self.dice.roll(4);
        let caller = self.caller().await;
        let rules = Options::from([
            ("keep-last", Variant::from(newest)),
            ("store", Variant::from("walk")),
        ]);
        let (judged, _) = caller
            .manager
            .prune("web", rules)
            .await
            .expect("it can be pruned");
        assert_eq!(judged.len(), self.scene.backups.len());
        for (_, _, id, _, verdict, reason) in judged {
            let place = self.order.iter().position(|other| *other == id);
            let age = self.order.len() - place.expect("it is one of them");
            match verdict.as_str() {
                "removed" => {
                    self.scene.backups.remove(&id);
                }
                "kept" => assert!(
                    age as u64 <= newest || reason.contains("lies on it"),
                    "{age}: {reason}"
                ),
                other => panic!("{id}: {other}, {reason}"),
            }
        }
        let left = &self.scene.backups;
        self.order.retain(|id| left.contains_key(id));
        "prune"
    }

    /// The client restores and verifies all of them from the store alone.
    fn restore_all(&self, to: &Path) {
        let store = self.store.path().to_str().unwrap();
        let clients = self.scene.system.clients();
        if !self.scene.backups.is_empty() {
            clients
                .backupctl(ROOT, &["verify", "--all", "--from", store])
                .expect_success();
        }
        for (id, disks) in &self.scene.backups {
            let to = to.join(id);
            let place = to.to_str().unwrap();
            std::fs::create_dir(&to).unwrap();
            let restore = ["restore", id, "--from", store, "--to", place, "--format", "raw"];
            clients.backupctl(ROOT, &restore).expect_success();
            for (disk, content) in disks {
                let restored = std::fs::read(to.join(format!("{disk}.raw"))).unwrap();
                assert!(restored == *content, "{id}: {disk} is restored as it was");
            }
        }
    }
}

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}: '{text}' is no number")),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn after_every_step_each_backup_shows_what_there_was() {
    let seed = setting("BACKUPD_WALK_SEED").unwrap_or(0x5eed);
    let steps = setting("BACKUPD_WALK_STEPS").unwrap_or(STEPS);
    println!("BACKUPD_WALK_SEED={seed}");
    let mut walk = Walk::new(seed);
    for step in 0..steps {
        let what = walk.step().await;
        *walk.made.entry(what).or_default() += 1;
        if what != "guest" {
            walk.check(step, what);
        }
    }
    println!("{steps} steps, {} good backups: {:?}", walk.backups, walk.made);
    // Of a walk of that length the seed leaves none out.
    if steps >= STEPS {
        for kind in [
            "auto",
            "full",
            "since",
            "cancelled",
            "full store",
            "QEMU dies",
            "service dies",
            "reboot",
            "restart",
            "merge",
            "with-descendants",
            "prune",
        ] {
            assert!(walk.made.contains_key(kind), "{kind} is among {:?}", walk.made);
        }
    }
    let restored = tempfile::tempdir().unwrap();
    walk.restore_all(restored.path());
}
