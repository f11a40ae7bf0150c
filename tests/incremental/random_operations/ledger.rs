//! The expected contents of the stores: every backup, its VM, and its disk contents.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde_json::Value;

use crate::common::chain::manifest;
use crate::common::proxies::JobProxy;
use crate::common::recorded::read;

/// The contents of disks, by name.
pub type Content = BTreeMap<&'static str, Vec<u8>>;

/// An image's file and its backing files: while this is unchanged, so is the content of the image.
type Fingerprint = Vec<(u64, u64, i64, i64)>;

/// The VM of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    Ours,
    /// Another VM, which the same service knows under a former name of the tested one.
    Namesakes(&'static str),
    /// A VM of another service.
    Neighbours,
}

impl Whose {
    /// Whether the tested service makes the backups of the VM.
    pub fn is_own(self) -> bool {
        self != Self::Neighbours
    }
}

/// A complete backup.
pub struct Held {
    pub whose: Whose,
    pub store: &'static str,
    pub directory: PathBuf,
    pub disks: Content,
}

impl Held {
    pub fn image(&self, disk: &str) -> PathBuf {
        self.directory.join(format!("{disk}.qcow2"))
    }

    #[track_caller]
    pub fn manifest(&self) -> Value {
        manifest(&self.directory)
    }

    #[track_caller]
    pub fn instant(&self) -> Timestamp {
        let manifest = self.manifest();
        let instant = manifest["instant"].as_str().expect("it has an instant");
        instant.parse().expect("it is a time")
    }

    /// The number in the order of creation.
    #[track_caller]
    pub fn sequence(&self) -> u64 {
        self.manifest()["sequence"].as_u64().expect("it has a number")
    }

    /// Returns the backups that it depends on.
    pub fn parents(&self) -> BTreeSet<String> {
        let manifest = self.manifest();
        let disks = manifest["disks"].as_array().expect("it has disks").iter();
        let parents = disks.filter_map(|disk| disk["parent"]["backup"].as_str());
        parents.map(str::to_owned).collect()
    }

    #[track_caller]
    fn parent(&self, disk: &str) -> Option<String> {
        let manifest = self.manifest();
        let mut disks = manifest["disks"].as_array().expect("it has disks").iter();
        let disk = disks.find(|entry| entry["name"] == disk);
        let parent = disk.expect("it has the disk")["parent"]["backup"].as_str();
        parent.map(str::to_owned)
    }
}

pub struct Ledger {
    pub stores: BTreeMap<&'static str, PathBuf>,
    pub backups: BTreeMap<String, Held>,
    /// Ids in the order of creation; the ids themselves have no meaning.
    order: Vec<String>,
    /// The images that were read already.
    checked: HashMap<PathBuf, Fingerprint>,
}

impl Ledger {
    pub fn new(stores: BTreeMap<&'static str, PathBuf>) -> Self {
        Self {
            stores,
            backups: BTreeMap::new(),
            order: Vec::new(),
            checked: HashMap::new(),
        }
    }

    /// Records the backup of a job.
    pub async fn take(&mut self, job: &JobProxy<'_>, whose: Whose, store: &'static str, disks: Content) {
        let target = PathBuf::from(&job.disks().await.unwrap()[0].4);
        let directory = target.parent().expect("an image is in a directory").to_owned();
        let id = name(&directory).to_owned();
        self.order.push(id.clone());
        let held = Held {
            whose,
            store,
            directory,
            disks,
        };
        let before = self.backups.insert(id, held);
        assert!(before.is_none(), "an id was assigned twice");
    }

    #[track_caller]
    pub fn remove(&mut self, id: &str) {
        self.backups.remove(id).expect("it was there");
        self.order.retain(|other| other != id);
    }

    /// Returns the backups of a VM in the order of creation.
    pub fn of(&self, whose: Whose) -> Vec<String> {
        let order = self.order.iter();
        order
            .filter(|id| self.backups[*id].whose == whose)
            .cloned()
            .collect()
    }

    /// Returns the VM's backups in a store.
    pub fn of_in(&self, whose: Whose, store: &str) -> Vec<String> {
        let mut ids = self.of(whose);
        ids.retain(|id| self.backups[id].store == store);
        ids
    }

    pub fn is_empty(&self, store: &str) -> bool {
        self.backups.values().all(|held| held.store != store)
    }

    pub fn has_dependents(&self, id: &str) -> bool {
        self.backups.values().any(|held| held.parents().contains(id))
    }

    /// Returns the directories in the stores whose names begin with a dot.
    pub fn hidden(&self) -> Vec<PathBuf> {
        let directories = self.stores.values().flat_map(|store| below(store));
        let hidden = directories.flat_map(|directory| below(&directory));
        hidden.filter(|path| name(path).starts_with('.')).collect()
    }

    /// Returns the files in the stores that belong to no backup, and those that are missing.
    pub fn differences(&self) -> Vec<String> {
        let mut expected = BTreeSet::new();
        for held in self.backups.values() {
            let images = held.disks.keys().map(|disk| held.image(disk));
            let records = ["manifest.json", "backup.xml"].map(|file| held.directory.join(file));
            expected.extend(images.chain(records));
        }
        let mut found = BTreeSet::new();
        for directory in self.stores.values().flat_map(|store| below(store)) {
            for backup in below(&directory) {
                let files = below(&backup);
                match files.is_empty() {
                    true => found.insert(backup),
                    false => {
                        found.extend(files);
                        true
                    }
                };
            }
        }
        let missing = expected.difference(&found);
        let left = found.difference(&expected);
        missing
            .map(|path| format!("{} is not there", path.display()))
            .chain(left.map(|path| format!("{} is there", path.display())))
            .collect()
    }

    /// Checks that every backup has its content.
    pub fn check(&mut self, context: &str) {
        for held in self.backups.values() {
            for (disk, content) in &held.disks {
                let image = held.image(disk);
                let fingerprint = self.fingerprint(held, disk);
                if self.checked.get(&image) == Some(&fingerprint) {
                    continue;
                }
                let shown = read(&image);
                let wrong: Vec<usize> = (0..content.len() / 512)
                    .filter(|at| shown[at * 512..][..512] != content[at * 512..][..512])
                    .collect();
                assert!(
                    wrong.is_empty(),
                    "{context}: {} has wrong content, in {} sectors from {} to {}",
                    image.display(),
                    wrong.len(),
                    wrong[0],
                    wrong[wrong.len() - 1],
                );
                self.checked.insert(image, fingerprint);
            }
        }
    }

    /// Returns the identity of the files that are needed to read an image.
    fn fingerprint<'a>(&'a self, mut held: &'a Held, disk: &str) -> Fingerprint {
        let mut all = Vec::new();
        loop {
            let meta = held.image(disk).metadata().expect("an image is there");
            all.push((meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()));
            match held.parent(disk) {
                Some(parent) => held = &self.backups[&parent],
                None => return all,
            }
        }
    }
}

/// Returns the entries of a directory, without the files that the service keeps in a store for itself; none if the
/// directory does not exist.
fn below(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths.filter(|path| name(path) != ".backupd").collect()
}

fn name(path: &Path) -> &str {
    path.file_name()
        .and_then(|name| name.to_str())
        .expect("it has a name")
}
