//! The expected state after a cut, recorded outside the host: the contents of each disk and each backup.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};

use super::host::DISK_BYTES;

pub const DISKS: [&str; 2] = ["vda", "vdb"];

/// The output of sha256sum(1) for the restored disks.
pub type Digests = Vec<String>;

/// A backup in a store, as it is listed.
#[derive(Debug, Clone)]
pub struct Listed {
    pub id: String,
    pub store: String,
    pub parent: String,
    pub state: String,
    pub problem: String,
}

/// The operation that was unfinished at the power cut, or finished just before.
#[derive(Debug, Default)]
pub struct Flight {
    /// The expected contents of a new backup.
    pub new: Option<Digests>,
    /// Backups that may be gone.
    pub removed: BTreeSet<String>,
    /// It is unknown which of these are removed.
    pub any: bool,
    /// The caller has received the success.
    pub told: bool,
}

pub struct Ledger {
    disks: BTreeMap<&'static str, Vec<u8>>,
    pub backups: BTreeMap<String, Digests>,
    /// As they were listed.
    listed: Vec<Listed>,
}

impl Ledger {
    pub fn new() -> Self {
        Self {
            disks: DISKS.map(|disk| (disk, vec![0; DISK_BYTES as usize])).into(),
            backups: BTreeMap::new(),
            listed: Vec::new(),
        }
    }

    pub fn write(&mut self, disk: &'static str, offset: u64, length: u64, pattern: u8) {
        let content = self.disks.get_mut(disk).expect("it is one of the disks");
        content[offset as usize..(offset + length) as usize].fill(pattern);
    }

    /// Returns the expected contents of a backup that begins now.
    pub fn digests(&self) -> Digests {
        let lines = self.disks.iter().map(|(disk, content)| {
            let digest = Sha256::digest(content);
            let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{digest}  {disk}.raw")
        });
        lines.collect()
    }

    /// Returns a backup with all its dependents.
    pub fn with_dependents(&self, id: &str) -> BTreeSet<String> {
        let mut all = BTreeSet::from([id.to_owned()]);
        loop {
            let depends = |backup: &&Listed| all.contains(&backup.parent) && !all.contains(&backup.id);
            let more = self.listed.iter().filter(depends);
            let more: Vec<String> = more.map(|backup| backup.id.clone()).collect();
            if more.is_empty() {
                return all;
            }
            all.extend(more);
        }
    }

    /// Returns the backups in a store without the last one. Their ids begin with the time.
    pub fn all_but_newest(&self, store: &str) -> BTreeSet<String> {
        let there = self.listed.iter().filter(|backup| backup.store == store);
        let mut there: BTreeSet<String> = there.map(|backup| backup.id.clone()).collect();
        there.pop_last();
        there
    }

    /// Compares the listed backups with the expected ones, and records them. Returns the problems.
    pub fn compare(&mut self, listed: &[Listed], flight: Flight) -> Vec<String> {
        let mut problems = Vec::new();
        let mut new = flight.new;
        for backup in listed {
            let id = &backup.id;
            if backup.state != "complete" {
                problems.push(format!("{id} is listed as {}: {}", backup.state, backup.problem));
            }
            if !self.backups.contains_key(id) {
                match new.take() {
                    Some(digests) => {
                        self.backups.insert(id.clone(), digests);
                    }
                    None => problems.push(format!("{id} is listed, and was not requested")),
                }
            } else if flight.told && !flight.any && flight.removed.contains(id) {
                problems.push(format!("{id} is listed, and was reported as removed"));
            }
        }
        if new.is_some() && flight.told {
            problems.push("a backup that was reported as completed is not listed".to_owned());
        }
        let there: BTreeSet<&str> = listed.iter().map(|backup| backup.id.as_str()).collect();
        self.backups.retain(|id, _| {
            let stays = there.contains(id.as_str());
            if !stays && !flight.removed.contains(id) {
                problems.push(format!("{id} is gone"));
            }
            stays
        });
        self.listed = listed.to_vec();
        problems
    }
}
