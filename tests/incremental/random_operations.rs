//! Random operations in an order that a seed decides: guest writes, backups of every kind, failures of every kind,
//! restarts, deletions and merges, host restarts, old catalogs, other VMs, another service and a clock that jumps.
//! After every step each existing backup has exactly the content of its point in time, no other is listed, and no
//! residue remains.
//!
//! `BACKUPD_WALK_SEED` repeats a sequence, `BACKUPD_WALK_STEPS` makes it longer.

mod failures;
mod host;
mod ledger;
mod neighbours;
mod removals;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::common::caller::Caller;
use crate::common::clients::ROOT;
use crate::common::dice::Dice;
use crate::common::hanging::{Hanging, Limits};
use crate::common::proxies::{JobProxy, ListedBackup, Options};
use crate::common::recorded::{CLUSTER, DISKS, Recorded, SIZE};
use crate::common::storage::Tmpfs;
use crate::common::vm::Residue;
use crate::common::{System, wait};
use host::Clock;
use ledger::{Content, Ledger, Whose};
use neighbours::Neighbour;
use tempfile::TempDir;
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const SEEDS: [u64; 3] = [0x5eed, 1, 2];
/// The number of steps of all sequences together.
const STEPS: u64 = 2000;
/// Above this number backups are deleted.
const MOST_BACKUPS: usize = 12;
/// The first store is on a file system with all features, the second on one without exchange and links.
const STORES: [&str; 2] = ["walk", "poor"];

/// The number of steps of each kind.
type Made = BTreeMap<&'static str, u32>;

/// Incidents that each sequence contains at least once.
#[derive(Debug, Clone, Copy)]
enum Incident {
    AnotherBoot,
    AnotherBootInMerge,
    StaleCatalog,
    Neighbour,
    MergeByMoving,
    Rename,
    NameReused,
    Clock,
}

impl Incident {
    const ALL: [Self; 8] = [
        Self::Neighbour,
        Self::AnotherBoot,
        Self::Clock,
        Self::StaleCatalog,
        Self::MergeByMoving,
        Self::Rename,
        Self::AnotherBootInMerge,
        Self::NameReused,
    ];
}

/// Sequences of [`STEPS`] steps contain each of these, for any seed.
const KINDS: [&str; 22] = [
    "auto",
    "full",
    "since",
    "cancelled",
    "full store",
    "QEMU killed",
    "service killed",
    "reboot",
    "restart",
    "merge",
    "with-dependents",
    "prune",
    "host restart",
    "host restart during a merge",
    "stale catalog",
    "neighbour",
    "neighbour with our UUID",
    "rename",
    "reused name",
    "clock",
    "backup without exchange and links",
    "merge without exchange and links",
];

struct Walk {
    dice: Dice,
    // Dropped after all that use it.
    _poor: Hanging,
    scene: Recorded,
    neighbour: Neighbour,
    /// The objects in QEMU when it was started.
    residue: Residue,
    store: Tmpfs,
    ledger: Ledger,
    clock: Clock,
    /// The contents of other VMs that temporarily have the name of the tested one, by that name.
    namesakes: BTreeMap<&'static str, Vec<u8>>,
    made: Made,
    // Dropped after everything that is mounted in it.
    _place: TempDir,
}

impl Walk {
    fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let place = tempfile::Builder::new().prefix("bkp-walk-").tempdir().unwrap();
        let store = Tmpfs::mount(&place.path().join("walk"), 256 * MIB);
        let limits = Limits {
            plain_rename: true,
            no_links: true,
            ..Limits::default()
        };
        let poor = Hanging::mount(&place.path().join("poor"), limits);
        let paths = [store.path().to_owned(), poor.path().to_owned()];
        let stores = STORES.into_iter().zip(paths).collect();
        let clock = Clock::new(place.path());
        let scene = Recorded::with(clock.set_up(with_stores(&stores)));
        let twin = dice.roll(2) == 0;
        let neighbour = Neighbour::new(with_stores(&stores), &scene, twin);
        Self {
            dice,
            _poor: poor,
            residue: scene.vm().residue(),
            scene,
            neighbour,
            store,
            ledger: Ledger::new(stores),
            clock,
            namesakes: BTreeMap::new(),
            made: Made::new(),
            _place: place,
        }
    }

    fn note(&mut self, kind: &'static str) {
        *self.made.entry(kind).or_default() += 1;
    }

    /// Returns the differences from the expected state that are visible without reading images. A service that was
    /// just started may still be removing residue.
    async fn differences(&self) -> Vec<String> {
        let mut all = self.ledger.differences();
        let ours = Caller::new(&self.scene.system).await;
        let theirs = Caller::new(&self.neighbour.scene.system).await;
        for (caller, of_ours) in [(&ours, true), (&theirs, false)] {
            let (listed, next) = caller.manager.list_backups(Options::new()).await.unwrap();
            assert_eq!(next, "", "all are listed at once");
            all.extend(self.mislisted(&listed, of_ours));
            for (number, _, _, state) in caller.manager.list_jobs().await.unwrap() {
                if !["completed", "failed", "cancelled"].contains(&state.as_str()) {
                    all.push(format!("job {number} is {state}"));
                }
            }
        }
        for (what, scene, before) in [
            ("QEMU", &self.scene, &self.residue),
            (
                "the neighbour's QEMU",
                &self.neighbour.scene,
                &self.neighbour.residue,
            ),
        ] {
            let residue = scene.vm().residue();
            if residue != *before {
                all.push(format!("{what} had {before:?} and has {residue:?}"));
            }
        }
        all
    }

    /// Returns the errors in the list of the tested service or of the neighbour. Each lists its own backups. It need
    /// not list those that the other one made since its last scan of the store.
    fn mislisted(&self, listed: &[ListedBackup], by_ours: bool) -> Vec<String> {
        let mut wrong = Vec::new();
        for ListedBackup(_, id, _, _, _, store, _, _, _, state, problem, _, _, own) in listed {
            let fits = match self.ledger.backups.get(id) {
                Some(held) => {
                    held.whose.is_own() == (*own == by_ours) && held.store == store && state == "complete"
                }
                // In an empty store the service keeps its records: the store may not be mounted.
                None => state == "missing" && self.ledger.is_empty(store),
            };
            if !fits {
                wrong.push(format!("{id} is listed: own {own}, {store}, {state}, {problem}"));
            }
        }
        let known = self.ledger.backups.iter();
        let own = known.filter(|(_, held)| held.whose.is_own() == by_ours);
        let unlisted = own.filter(|(id, _)| !listed.iter().any(|backup| backup.1 == **id));
        wrong.extend(unlisted.map(|(id, _)| format!("{id} is not listed")));
        wrong
    }

    /// Checks that every known backup exists and is listed, that no other is, that no residue remains, and that each
    /// has its content.
    async fn check(&mut self, context: &str) {
        let began = Instant::now();
        loop {
            let differences = self.differences().await;
            if differences.is_empty() {
                break;
            }
            assert!(began.elapsed() < wait::DEADLINE, "{context}: {differences:#?}");
            tokio::time::sleep(wait::STEP).await;
        }
        self.ledger.check(context);
    }

    async fn step(&mut self) -> &'static str {
        match self.dice.roll(1000) {
            0..802 => {
                self.guest(false);
                "guest"
            }
            802..900 => self.backup().await,
            900..910 => self.cancelled().await,
            910..920 => self.full_store().await,
            920..929 => self.qemu_dies().await,
            929..940 => self.service_dies().await,
            940..947 => {
                self.scene.reboot();
                self.residue = self.scene.vm().residue();
                "reboot"
            }
            947..955 => self.restart(),
            955..960 => self.delete("merge").await,
            960..964 => self.delete("with-dependents").await,
            964..973 => self.prune().await,
            973..977 => self.incident(Incident::AnotherBoot).await,
            977..980 => self.incident(Incident::AnotherBootInMerge).await,
            980..984 => self.incident(Incident::StaleCatalog).await,
            984..991 => self.incident(Incident::Neighbour).await,
            991 => self.incident(Incident::MergeByMoving).await,
            992 => self.incident(Incident::Rename).await,
            993..995 => self.incident(Incident::NameReused).await,
            _ => self.incident(Incident::Clock).await,
        }
    }

    async fn incident(&mut self, which: Incident) -> &'static str {
        match which {
            Incident::AnotherBoot => self.another_boot().await,
            Incident::AnotherBootInMerge => self.another_boot_in_a_merge().await,
            Incident::StaleCatalog => self.stale_catalog().await,
            Incident::Neighbour => self.neighbour().await,
            Incident::MergeByMoving => self.merge_by_moving().await,
            Incident::Rename => self.rename(),
            Incident::NameReused => self.name_reused().await,
            Incident::Clock => self.clock.jump(&mut self.dice),
        }
    }

    /// Performs a guest operation. QEMU may keep data that is discarded during a backup, so its content is undefined.
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

    /// Chooses a store, mostly the one with all features.
    fn any_store(&mut self) -> &'static str {
        STORES[usize::from(self.dice.roll(4) == 0)]
    }

    async fn start(
        &self,
        caller: &Caller,
        store: &str,
        options: Options<'_>,
    ) -> zbus::Result<JobProxy<'static>> {
        start(caller, &self.scene.name, store, options).await
    }

    /// Records the backup of a job that has ended or will end, if it completes.
    async fn take(&mut self, job: &JobProxy<'_>, store: &'static str, disks: Content) -> bool {
        let (result, _, _) = wait::within("the end of the backup", job.wait()).await.unwrap();
        let good = result == "completed";
        if good {
            self.ledger.take(job, Whose::Ours, store, disks).await;
            if store == "poor" {
                self.note("backup without exchange and links");
            }
        }
        good
    }

    async fn backup(&mut self) -> &'static str {
        if self.ledger.of(Whose::Ours).len() > MOST_BACKUPS {
            return self.delete("merge").await;
        }
        let store = self.any_store();
        let ours = self.ledger.of_in(Whose::Ours, store);
        let some = ours.get(self.dice.roll(MOST_BACKUPS as u64) as usize);
        let (what, word) = match (self.dice.roll(10), some) {
            (0, _) => ("full", "full".to_owned()),
            (1..4, Some(id)) => ("since", id.clone()),
            _ => ("auto", "auto".to_owned()),
        };
        let caller = self.caller().await;
        let options = Options::from([("incremental", Variant::from(word))]);
        match self.start(&caller, store, options).await {
            Ok(job) => {
                let held = self.scene.now.clone();
                assert!(
                    self.take(&job, store, held).await,
                    "a backup failed without a reason"
                );
                what
            }
            // Since a backup whose checkpoint is gone from the disks, or which does not exist.
            Err(error) => {
                let name = crate::common::proxies::error_name(&error);
                assert!(
                    what == "since" && name.ends_with("CannotIncrement"),
                    "{what}: {error}"
                );
                "refused"
            }
        }
    }

    /// Restores and verifies all backups with backupctl from the stores alone.
    fn restore_all(&self, to: &Path) {
        let clients = self.scene.system.clients();
        for (name, store) in &self.ledger.stores {
            if !self.ledger.is_empty(name) {
                let verify = ["verify", "--all", "--from", store.to_str().unwrap()];
                clients.backupctl(ROOT, &verify).expect_success();
            }
        }
        for (id, held) in &self.ledger.backups {
            let (from, to) = (&self.ledger.stores[held.store], to.join(id));
            let (from, place) = (from.to_str().unwrap(), to.to_str().unwrap());
            std::fs::create_dir(&to).unwrap();
            let restore = ["restore", id, "--from", from, "--to", place, "--format", "raw"];
            clients.backupctl(ROOT, &restore).expect_success();
            for (disk, content) in &held.disks {
                let restored = std::fs::read(to.join(format!("{disk}.raw"))).unwrap();
                assert!(restored == *content, "{id}: {disk} is restored as it was");
            }
        }
    }
}

fn with_stores(stores: &BTreeMap<&'static str, PathBuf>) -> crate::common::Setup {
    let stores = stores.iter();
    stores.fold(System::setup(), |setup, (name, path)| setup.store(name, path))
}

async fn start(
    caller: &Caller,
    domain: &str,
    store: &str,
    options: Options<'_>,
) -> zbus::Result<JobProxy<'static>> {
    let document = format!("<domainbackup><store name='{store}'/></domainbackup>");
    let path = caller.try_start(domain, &document, &[], options).await?;
    Ok(caller.job(path).await)
}

async fn walk(seed: u64, steps: u64) -> Made {
    let mut walk = Walk::new(seed);
    let incidents = Incident::ALL.len() as u64;
    for step in 0..steps {
        let due = (0..incidents).find(|which| step == (which + 1) * steps / (incidents + 1));
        let what = match due {
            Some(which) => walk.incident(Incident::ALL[which as usize]).await,
            None => walk.step().await,
        };
        walk.note(what);
        if what != "guest" {
            let context = format!("BACKUPD_WALK_SEED={seed}, step {step}, {what}");
            println!("{context}");
            walk.check(&context).await;
        }
    }
    let restored = tempfile::tempdir().unwrap();
    walk.restore_all(restored.path());
    println!("BACKUPD_WALK_SEED={seed}, {steps} steps: {:?}", walk.made);
    walk.made
}

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}: '{text}' is not a number")),
    )
}

#[test]
fn every_backup_has_the_expected_content_after_every_step() {
    let seeds = setting("BACKUPD_WALK_SEED").map_or(SEEDS.to_vec(), |seed| vec![seed]);
    let steps = setting("BACKUPD_WALK_STEPS").unwrap_or(STEPS.div_ceil(SEEDS.len() as u64));
    println!("BACKUPD_WALK_SEED={seeds:?}");
    let count = seeds.len() as u64;
    let walks = seeds.into_iter().map(|seed| {
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(walk(seed, steps))
        })
    });
    let walks: Vec<_> = walks.collect();
    let mut made = Made::new();
    for walk in walks {
        for (kind, count) in walk.join().expect("the sequence completes") {
            *made.entry(kind).or_default() += count;
        }
    }
    println!("together: {made:?}");
    if count * steps >= STEPS {
        for kind in KINDS {
            assert!(made.contains_key(kind), "{kind} is among {made:?}");
        }
    }
}
