//! Neighbours: another service that uses the same stores, and another VM under a former name of the tested one.

use zbus::wire::Variant;

use super::ledger::Whose;
use super::removals::{delete, prune};
use super::{MIB, Walk, start};
use crate::common::caller::Caller;
use crate::common::disk::Disk;
use crate::common::proxies::{Options, slowly};
use crate::common::recorded::{DISKS, Recorded, SIZE};
use crate::common::vm::{Builder, Residue, Vm};
use crate::common::{Setup, wait};

/// The two names that the tested VM alternates between.
const NAMES: [&str; 2] = ["web", "www"];
/// The number of backups that each neighbour and namesake keeps in a store.
const FEW: u64 = 2;

/// Another service on the same stores, with a VM of its own.
pub struct Neighbour {
    pub scene: Recorded,
    pub residue: Residue,
    /// A copy of the tested VM, with the same UUID.
    pub is_twin: bool,
}

impl Neighbour {
    pub fn new(setup: Setup, ours: &Recorded, is_twin: bool) -> Self {
        let uuid = is_twin.then(|| ours.vm().uuid().to_owned());
        let scene = Recorded::with_uuid(setup, uuid);
        Self {
            residue: scene.vm().residue(),
            scene,
            is_twin,
        }
    }
}

fn other(name: &str) -> &'static str {
    NAMES[usize::from(name == NAMES[0])]
}

impl Walk {
    /// The neighbour makes a backup and removes some of its own, perhaps in the middle of a backup of the tested VM.
    pub async fn neighbour(&mut self) -> &'static str {
        if self.dice.roll(3) == 0 {
            let name = other(&self.neighbour.scene.name);
            self.neighbour.scene.rename(name);
        }
        let disk = DISKS[self.dice.roll(2) as usize];
        let (at, pattern) = (self.dice.roll(SIZE / MIB), 1 + self.dice.roll(255) as u8);
        self.neighbour.scene.write(disk, at * MIB, MIB / 4 + 512, pattern);
        let ours = match self.dice.roll(2) {
            0 => None,
            _ => {
                let (caller, store) = (self.caller().await, self.any_store());
                let job = self.start(&caller, store, slowly(MIB)).await;
                let job = job.expect("the backup is accepted");
                Some((job, store, self.scene.now.clone()))
            }
        };

        let caller = Caller::new(&self.neighbour.scene.system).await;
        let (name, store) = (self.neighbour.scene.name.clone(), self.any_store());
        let mode = ["auto", "auto", "full"][self.dice.roll(3) as usize];
        let options = Options::from([("incremental", Variant::from(mode))]);
        let job = start(&caller, &name, store, options).await.expect("it begins");
        let (result, _, why) = wait::within("the neighbour's backup", job.wait()).await.unwrap();
        assert_eq!(result, "completed", "{why}");
        let held = self.neighbour.scene.now.clone();
        self.ledger.take(&job, Whose::Neighbours, store, held).await;
        match self.dice.roll(2) {
            0 => self.prune_others(&caller, &name, store, Whose::Neighbours).await,
            _ => {
                let theirs = self.ledger.of(Whose::Neighbours);
                let id = &theirs[self.dice.roll(theirs.len() as u64) as usize];
                let gone = delete(&caller, id, "merge").await.expect("it can be deleted");
                assert_eq!(gone, [id.as_str()]);
                self.ledger.remove(id);
            }
        }

        if let Some((job, store, held)) = ours {
            job.set_speed(0).await.ok();
            assert!(
                self.take(&job, store, held).await,
                "the neighbour must not fail the backup"
            );
        }
        match self.neighbour.is_twin {
            true => "neighbour with our UUID",
            false => "neighbour",
        }
    }

    /// Prunes the backups of another VM in a store, and checks that no others are removed.
    async fn prune_others(&mut self, caller: &Caller, name: &str, store: &'static str, whose: Whose) {
        let theirs = self.ledger.of_in(whose, store);
        let judged = prune(caller, name, store, FEW).await;
        for id in theirs.iter().rev().take(FEW as usize) {
            let kept = judged.iter().any(|judged| judged.2 == *id && judged.4 == "kept");
            assert!(kept, "{id} is one of the newest");
        }
        for (_, _, id, _, verdict, reason) in judged {
            let of = self.ledger.backups[&id].whose;
            let same = whose == Whose::Neighbours && self.neighbour.is_twin && of == Whose::Ours;
            assert!(of == whose || same, "{id} is not of {whose:?}");
            if verdict == "removed" {
                assert_eq!(of, whose, "{id}: {reason}");
                self.ledger.remove(&id);
            }
        }
    }

    pub fn rename(&mut self) -> &'static str {
        let name = other(&self.scene.name);
        self.scene.rename(name);
        "rename"
    }

    /// Renames the tested VM, and gives its old name to another VM.
    pub async fn name_reused(&mut self) -> &'static str {
        self.rename();
        let name = other(&self.scene.name);
        let whose = Whose::Namesakes(name);
        let mut vm = self.namesake(name);
        let content = self.namesakes.get_mut(name).expect("it was started");
        let (at, pattern) = (self.dice.roll(MIB / 512 - 8), 1 + self.dice.roll(255) as u8);
        vm.write("vda", at * 512, 8 * 512, pattern);
        content[at as usize * 512..][..8 * 512].fill(pattern);
        let held = [("vda", content.clone())].into();

        let (caller, store) = (self.caller().await, self.any_store());
        let job = start(&caller, name, store, Options::new())
            .await
            .expect("it begins");
        let (result, _, why) = wait::within("its backup", job.wait()).await.unwrap();
        assert_eq!(result, "completed", "{why}");
        self.ledger.take(&job, whose, store, held).await;
        self.prune_others(&caller, name, store, whose).await;
        for (name, whose) in [(name, whose), (self.scene.name.as_str(), Whose::Ours)] {
            let mut expected = self.ledger.of(whose);
            expected.sort_unstable();
            let options = Options::from([("domain", Variant::from(name))]);
            let listed = caller.manager.list_backups(options).await.unwrap().0.into_iter();
            let own = listed.filter(|backup| backup.13 && backup.9 == "complete");
            let mut ids: Vec<String> = own.map(|backup| backup.1).collect();
            ids.sort_unstable();
            assert_eq!(ids, expected, "{name}");
        }
        vm.quit();
        self.scene.system.remove_domain_file(name);
        "reused name"
    }

    /// Returns a VM of that name that the service knows.
    fn namesake(&mut self, name: &'static str) -> Vm {
        let system = &self.scene.system;
        let machine = Builder::new(&system.dir().join("namesakes"), name).running();
        let disk = Disk::new("vda", MIB);
        let vm = system.configured(machine.disk(disk));
        self.namesakes
            .entry(name)
            .or_insert_with(|| vec![0; MIB as usize]);
        vm
    }
}
