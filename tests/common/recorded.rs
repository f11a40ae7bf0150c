//! A VM with recorded disk contents: those of now, and those at the point in time of each backup.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::caller::{Caller, assert_completed};
use super::disk::Disk;
use super::proxies::{JobProxy, Options};
use super::vm::Vm;
use super::{Setup, System, process};

const MIB: u64 = 1 << 20;
/// The size of each disk, in bytes.
pub const SIZE: u64 = 4 * MIB;
/// The cluster size of the images.
pub const CLUSTER: u64 = 1 << 16;

/// A VM with two disks, whose contents are recorded for each backup.
pub struct Recorded {
    pub system: System,
    pub vm: Option<Vm>,
    /// The domain name in the service.
    pub name: String,
    /// The UUID, if it is not the VM's own.
    uuid: Option<String>,
    pub now: BTreeMap<&'static str, Vec<u8>>,
    /// The contents at each backup, by id.
    pub backups: BTreeMap<String, BTreeMap<&'static str, Vec<u8>>>,
}

pub const DISKS: [&str; 2] = ["vda", "vdb"];

impl Recorded {
    pub fn new() -> Self {
        Self::with(System::setup())
    }

    pub fn with(setup: Setup) -> Self {
        Self::with_uuid(setup, None)
    }

    /// Starts a VM, with the UUID of another one if given.
    pub fn with_uuid(setup: Setup, uuid: Option<String>) -> Self {
        let system = setup.start();
        let mut scene = Self {
            system,
            vm: None,
            name: "web".to_owned(),
            uuid,
            now: DISKS.map(|disk| (disk, vec![0; SIZE as usize])).into(),
            backups: BTreeMap::new(),
        };
        scene.boot();
        for disk in DISKS {
            scene.write(disk, 0, 2 * MIB, 0x11);
        }
        scene
    }

    /// Starts the VM with its present disks.
    pub fn boot(&mut self) {
        let mut machine = self.system.vm("web").running();
        if let Some(uuid) = &self.uuid {
            machine = machine.uuid(uuid);
        }
        let machine = DISKS.iter().fold(machine, |machine, disk| {
            machine.disk(Disk::new(disk, SIZE).discard())
        });
        let vm = machine.start();
        self.system.domain_file(&self.name, &vm);
        self.system.wait_for_domain(&self.name);
        self.vm = Some(vm);
    }

    pub fn vm(&self) -> &Vm {
        self.vm.as_ref().expect("the machine runs")
    }

    /// Renames the domain in the service.
    pub fn rename(&mut self, to: &str) {
        self.system.remove_domain_file(&self.name);
        self.name = to.to_owned();
        self.system.domain_file(to, self.vm());
        self.system.wait_for_domain(to);
    }

    pub fn write(&mut self, disk: &'static str, offset: u64, length: u64, pattern: u8) {
        self.vm().write(disk, offset, length, pattern);
        self.holds(disk, offset, length, pattern);
    }

    pub fn write_zeroes(&mut self, disk: &'static str, offset: u64, length: u64) {
        self.vm().write_zeroes(disk, offset, length);
        self.holds(disk, offset, length, 0);
    }

    /// Discards whole clusters, which then read as zeroes.
    pub fn discard(&mut self, disk: &'static str, offset: u64, length: u64) {
        assert!(offset.is_multiple_of(CLUSTER) && length.is_multiple_of(CLUSTER));
        self.vm().discard(disk, offset, length);
        self.holds(disk, offset, length, 0);
    }

    fn holds(&mut self, disk: &'static str, offset: u64, length: u64, pattern: u8) {
        let content = self.now.get_mut(disk).expect("it is one of the disks");
        content[offset as usize..(offset + length) as usize].fill(pattern);
    }

    /// Stops QEMU and starts it again.
    pub fn reboot(&mut self) {
        self.vm.take().expect("the machine runs").quit();
        self.boot();
    }

    /// Kills QEMU as in a crash, and starts it again. Flushed data is kept.
    pub fn crash(&mut self) {
        let mut vm = self.vm.take().expect("the machine runs");
        DISKS.iter().for_each(|disk| vm.flush(disk));
        vm.kill();
        drop(vm);
        self.boot();
    }

    /// Makes a backup, which must complete; returns its id, and the mode and reason of each disk.
    pub async fn backup(&mut self, options: Options<'_>) -> (String, Vec<String>) {
        let caller = Caller::new(&self.system).await;
        let job = caller.start_with("web", "", &[], options).await;
        assert_completed(&job).await;
        self.record(&job).await
    }

    pub async fn record(&mut self, job: &JobProxy<'_>) -> (String, Vec<String>) {
        let id = backup_id(job).await;
        self.backups.insert(id.clone(), self.now.clone());
        let increments = job.increments().await.unwrap();
        let said = increments
            .into_iter()
            .map(|(disk, mode, since, why)| format!("{disk} {mode} {since}{why}"));
        (id, said.collect())
    }

    pub fn image(&self, id: &str, disk: &str) -> PathBuf {
        self.system
            .store()
            .join("web")
            .join(id)
            .join(format!("{disk}.qcow2"))
    }

    pub fn manifest(&self, id: &str) -> Value {
        let path = self.system.store().join("web").join(id).join("manifest.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    /// Checks that every backup has the contents of its point in time.
    #[track_caller]
    pub fn check(&self) {
        for (id, disks) in &self.backups {
            for (disk, content) in disks {
                let image = self.image(id, disk);
                assert!(read(&image) == *content, "{} has wrong content", image.display());
            }
        }
    }

    /// Checks that the disks have exactly the checkpoints of these backups.
    #[track_caller]
    pub fn assert_checkpoints(&self, ids: &[&str]) {
        for (index, disk) in DISKS.iter().enumerate() {
            let mut names: Vec<String> = ids.iter().map(|id| format!("backupd-{id}-{index}")).collect();
            names.sort();
            assert_eq!(self.vm().checkpoints(disk), names, "{disk}");
            assert_eq!(self.vm().sentinels(disk), names, "{disk}");
        }
    }
}

/// Returns the content of an image as a reader sees it.
#[track_caller]
pub fn read(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("read");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-O", "raw"]).arg(image).arg(&raw);
    process::run(convert).expect_success();
    let content = std::fs::read(&raw).unwrap();
    std::fs::remove_file(&raw).unwrap();
    content
}

/// Returns the id of the backup that a job makes in a store.
pub async fn backup_id(job: &JobProxy<'_>) -> String {
    let disks = job.disks().await.unwrap();
    let target = PathBuf::from(&disks[0].4);
    let directory = target.parent().unwrap().file_name().unwrap();
    directory.to_str().unwrap().to_owned()
}
