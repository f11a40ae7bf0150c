//! Host events: a restart that loses data that was not durable, a state directory from an old copy, a clock that
//! jumps.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use backupd::clock;
use backupd::fault::Point;
use jiff::{SignedDuration, Timestamp};
use zbus::wire::Variant;

use super::ledger::Whose;
use super::removals::delete;
use super::{STORES, Walk};
use crate::common::dice::Dice;
use crate::common::proxies::{JobProxy, Options, error_name};
use crate::common::{Setup, wait};

/// Points at which the images of a backup may not be durable.
const NOT_DURABLE: [&str; 5] = [
    "before follow",
    "before close-images",
    "after close-images",
    "before seal",
    "after seal",
];
/// Points at which the images are durable.
const DURABLE: [&str; 4] = ["before publish", "BeforeRename", "Renamed", "after publish"];

/// The catalog's files, as a backup of `/var/lib` has them.
const FILES: [&str; 2] = ["catalog.sqlite", "catalog.sqlite-wal"];
/// The number of copies that are kept.
const COPIES: u64 = 3;

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;

/// The service's clock.
pub struct Clock {
    file: PathBuf,
    offset: i64,
}

impl Clock {
    pub fn new(place: &Path) -> Self {
        let file = place.join("clock");
        Self { file, offset: 0 }
    }

    pub fn set_up(&self, setup: Setup) -> Setup {
        setup.environment(clock::VARIABLE, self.file.to_str().expect("it is text"))
    }

    pub fn now(&self) -> Timestamp {
        Timestamp::now() + SignedDuration::from_secs(self.offset)
    }

    /// Moves the clock forwards or back while the service runs.
    pub fn jump(&mut self, dice: &mut Dice) -> &'static str {
        let offsets = [0, 0, HOUR, -HOUR, DAY, -DAY, -400 * DAY, 4000 * DAY];
        self.offset = offsets[dice.roll(offsets.len() as u64) as usize];
        let new = self.file.with_extension("new");
        fs::write(&new, self.offset.to_string()).unwrap();
        fs::rename(&new, &self.file).unwrap();
        "clock"
    }
}

impl Walk {
    /// Restarts the host at some point of a backup.
    pub async fn another_boot(&mut self) -> &'static str {
        let at = self.dice.roll((NOT_DURABLE.len() + DURABLE.len()) as u64) as usize;
        let durable = at.checked_sub(NOT_DURABLE.len());
        let point = durable.map_or_else(|| NOT_DURABLE[at], |at| DURABLE[at]);
        let store = self.any_store();
        let mode = ["auto", "full"][self.dice.roll(2) as usize];
        self.start_dying_service(point);
        let (caller, held) = (self.caller().await, self.scene.now.clone());
        // The service may die before it replies.
        let options = Options::from([("incremental", Variant::from(mode))]);
        let _ = self.start(&caller, store, options).await;
        self.host_goes_down();
        if durable.is_none() {
            self.lose_pages();
        }
        self.host_boots();
        let job = self.newest_job().await;
        let good = self.take(&job, store, held).await;
        assert_eq!(good, durable.is_some(), "the host went down {point}");
        "host restart"
    }

    /// Restarts the host at some point of a deletion.
    pub async fn another_boot_in_a_merge(&mut self) -> &'static str {
        let ours = self.ledger.of(Whose::Ours);
        if ours.is_empty() {
            return self.another_boot().await;
        }
        let with_dependents: Vec<&String> = ours.iter().filter(|id| self.ledger.has_dependents(id)).collect();
        let (id, points) = match with_dependents.len() as u64 {
            0 => {
                let id = &ours[self.dice.roll(ours.len() as u64) as usize];
                (id, Point::REMOVAL.to_vec())
            }
            count => {
                let id = with_dependents[self.dice.roll(count) as usize];
                let merge = match self.ledger.backups[id].store == STORES[0] {
                    true => Point::MERGE.to_vec(),
                    false => Point::MERGE_BY_MOVING.to_vec(),
                };
                (id, [merge, Point::REMOVAL.to_vec()].concat())
            }
        };
        let point = points[self.dice.roll(points.len() as u64) as usize];
        self.start_dying_service(point);
        let caller = self.caller().await;
        let died = delete(&caller, id, "merge").await;
        died.expect_err("the service dies before it answers");
        self.host_goes_down();
        // Later the new images are durable.
        if point == Point::MergeMade {
            self.lose_pages();
        }
        self.host_boots();
        wait::until(&format!("the residue after {point:?} to be removed"), || {
            self.ledger.hidden().is_empty().then_some(())
        });
        // The service finishes an operation that it can finish; otherwise the caller repeats the call.
        if let Err(error) = delete(&self.caller().await, id, "merge").await {
            let name = error_name(&error);
            assert!(name.ends_with("NoSuchBackup"), "{point:?}: {error}");
        }
        self.ledger.remove(id);
        "host restart during a merge"
    }

    fn start_dying_service(&mut self, point: impl std::fmt::Display) {
        self.scene.system.stop_daemon();
        self.scene.system.start_dying_daemon(point);
        self.scene.system.wait_for_domain(&self.scene.name);
    }

    fn host_goes_down(&mut self) {
        self.scene.system.wait_for_death();
        self.kill_qemu();
    }

    fn host_boots(&mut self) {
        self.scene.system.enter_another_boot();
        self.scene.system.start_daemon();
        self.boot();
    }

    /// Removes pages of an unfinished backup's images, as if they were only in memory.
    fn lose_pages(&mut self) {
        for directory in self.ledger.hidden() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                let file = File::options().write(true).open(path).unwrap();
                let length = file.metadata().unwrap().len();
                match self.dice.roll(3) {
                    0 => file.set_len(self.dice.roll(length + 1)).unwrap(),
                    _ => {
                        let page = self.dice.roll(length / 4096 + 1);
                        let bytes = (length - page * 4096).min(4096);
                        file.write_all_at(&vec![0; bytes as usize], page * 4096).unwrap();
                    }
                }
            }
        }
    }

    async fn newest_job(&self) -> JobProxy<'static> {
        let caller = self.caller().await;
        let jobs = caller.manager.list_jobs().await.unwrap();
        let newest = jobs.into_iter().max_by_key(|(number, ..)| *number);
        caller.job(newest.expect("there is a job").1).await
    }

    fn copies(&self) -> PathBuf {
        self.scene.system.dir().join("copies")
    }

    fn catalog(&self, file: &str) -> PathBuf {
        self.scene.system.dir().join("state").join(file)
    }

    /// Copies the catalog of a stopped service over an earlier copy.
    pub fn copy_catalog(&mut self) {
        let copy = self.copies().join(self.dice.roll(COPIES).to_string());
        fs::create_dir_all(&copy).unwrap();
        for file in FILES {
            copy_if_there(&self.catalog(file), &copy.join(file));
        }
    }

    /// Replaces the state directory by an old copy.
    pub async fn stale_catalog(&mut self) -> &'static str {
        if !self.copies().exists() {
            self.restart();
            self.backup().await;
        }
        let mut copies: Vec<_> = fs::read_dir(self.copies()).unwrap().flatten().collect();
        copies.sort_by_key(fs::DirEntry::file_name);
        let copy = copies[self.dice.roll(copies.len() as u64) as usize].path();
        self.scene.system.stop_daemon();
        for file in FILES {
            copy_if_there(&copy.join(file), &self.catalog(file));
        }
        self.start_service();
        "stale catalog"
    }
}

/// Copies a file, or removes the copy if there is no original.
fn copy_if_there(from: &Path, to: &Path) {
    let done = match from.exists() {
        true => fs::copy(from, to).map(drop),
        false => fs::remove_file(to),
    };
    if let Err(error) = done {
        assert_eq!(error.kind(), ErrorKind::NotFound, "{}", to.display());
    }
}
