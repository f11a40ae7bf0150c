//! VMs for tests: a real QEMU without a guest, stopped before its first instruction (`-S`), with software emulation
//! only. The test performs the guest's writes with [`Vm::write`] through the same devices.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::disk::{Disk, Kind};
use super::guest::{self, Guest};
use super::observer::Observer;
use super::process::{self, Process};
use super::wait;

/// The prefix of the bitmaps that backups into a store keep on purpose.
const CHECKPOINT: &str = "backupd-2";
/// The suffix of the size marker bitmaps beside them.
const SENTINEL: &str = "-end";

/// Returns a UUID that is always the same for this name in this directory.
fn uuid_of(dir: &Path, name: &str) -> String {
    let half = |part: u8| {
        let mut hasher = std::hash::DefaultHasher::new();
        (dir, name, part).hash(&mut hasher);
        hasher.finish()
    };
    uuid::Uuid::from_u64_pair(half(0), half(1)).to_string()
}

/// A VM that is not started yet; from [`super::System::vm`] or [`Builder::new`].
pub struct Builder {
    name: String,
    uuid: String,
    dir: PathBuf,
    disks: Vec<Disk>,
    extra: Vec<String>,
    running: bool,
    guest: bool,
}

impl Builder {
    /// Returns a VM with its own UUID, which it keeps over restarts. Its images, sockets and logs are in a new
    /// directory NAME in `dir` (absolute).
    pub fn new(dir: &Path, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            uuid: uuid_of(dir, name),
            dir: dir.join(name),
            disks: Vec::new(),
            extra: Vec::new(),
            running: false,
            guest: false,
        }
    }

    pub fn uuid(mut self, uuid: &str) -> Self {
        self.uuid = uuid.to_owned();
        self
    }

    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Adds arguments for QEMU, after all others.
    pub fn extra(mut self, arguments: &[&str]) -> Self {
        self.extra
            .extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }

    /// Lets the processor run; there is nothing to boot, so the firmware waits. Otherwise the VM is stopped, and only
    /// the test writes.
    pub fn running(mut self) -> Self {
        self.running = true;
        self
    }

    /// Adds a guest that runs and can power off: see [`Vm::guest`].
    pub fn guest(mut self) -> Self {
        self.guest = true;
        self
    }

    /// Creates the images and starts QEMU; returns when its monitor answers and its guest, if any, has booted.
    #[track_caller]
    pub fn start(self) -> Vm {
        std::fs::create_dir_all(&self.dir).expect("the machine's directory is made");
        let mut command = process::bound(qemu());
        command.args(["-name", &self.name, "-uuid", &self.uuid]);
        command.args(["-machine", "q35", "-accel", "tcg", "-m", "64"]);
        command.args(["-display", "none", "-nodefaults", "-no-user-config"]);
        if !self.running || self.guest {
            command.arg("-S");
        }
        for socket in ["service", "observer"] {
            let path = self.dir.join(socket);
            command.args([
                "-qmp".to_owned(),
                format!("unix:{},server=on,wait=off", path.display()),
            ]);
        }
        if self.disks.iter().any(|disk| disk.kind == Kind::Scsi) {
            command.args(["-device", "virtio-scsi-pci,id=scsi"]);
        }
        let mut paths = Vec::new();
        let mut ide = 0;
        for disk in &self.disks {
            let path = disk
                .path
                .clone()
                .unwrap_or_else(|| self.dir.join(format!("{}.{}", disk.id, disk.format)));
            if disk.kind != Kind::EmptyCdrom {
                disk.create(&path);
            }
            command.args(disk.arguments(&path, &mut ide));
            paths.push(path);
        }
        if self.guest {
            command.args(guest::arguments(&self.dir));
        }
        command.args(&self.extra);
        let mut process = Process::start("qemu", &self.dir, command);
        let observer = wait::until("QEMU's monitor", || {
            process.assert_running();
            Observer::connect(&self.dir.join("observer"))
        });
        let vm = Vm {
            guest: self.guest.then(|| Guest::connect(&self.dir)),
            name: self.name,
            uuid: self.uuid,
            dir: self.dir,
            disks: self.disks.into_iter().zip(paths).collect(),
            observer: Mutex::new(observer),
            process,
        };
        vm.boot()
    }
}

/// Returns the QEMU to test with. Without one the tests fail, because a skipped test proves nothing.
#[track_caller]
pub fn qemu() -> PathBuf {
    if let Some(chosen) = std::env::var_os("BACKUPD_TEST_QEMU").filter(|value| !value.is_empty()) {
        let chosen = PathBuf::from(chosen);
        assert!(
            chosen.is_file(),
            "BACKUPD_TEST_QEMU: there is no {}",
            chosen.display()
        );
        return chosen;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join("qemu-system-x86_64"))
        .find(|candidate| candidate.is_file())
        .expect(
            "these tests need QEMU and there is no qemu-system-x86_64 in PATH: run tests/setup.sh as root, \
             or `make test QEMU=/path/to/qemu-system-x86_64`",
        )
}

/// A running VM. Dropping it kills QEMU.
pub struct Vm {
    name: String,
    uuid: String,
    dir: PathBuf,
    disks: Vec<(Disk, PathBuf)>,
    observer: Mutex<Observer>,
    guest: Option<Guest>,
    process: Process,
}

/// Everything that a backup could leave behind in QEMU. Two of these are equal when a backup left no residue and
/// removed nothing else. Bitmaps that a backup keeps on purpose are not included: see [`Vm::checkpoints`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Residue {
    pub jobs: Vec<String>,
    pub nodes: Vec<String>,
    /// As `NODE/NAME`; an entry without a name ends with the slash.
    pub bitmaps: Vec<String>,
    pub fdsets: Vec<i64>,
    /// Latency histograms as `DEVICE/KIND`.
    pub histograms: Vec<String>,
}

impl Vm {
    #[track_caller]
    fn boot(mut self) -> Self {
        if self.guest.is_some() {
            self.cont();
            self.guest().wait_for_boot();
        }
        self
    }

    /// Returns the guest of a VM that was created with one.
    #[track_caller]
    pub fn guest(&mut self) -> &mut Guest {
        self.guest.as_mut().expect("the machine has a guest")
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Returns the path of the service's monitor socket. QEMU serves one connection at a time on it.
    pub fn monitor_path(&self) -> PathBuf {
        self.dir.join("service")
    }

    /// Connects to the service's monitor without reading from it, for `RegisterDomain`.
    pub fn monitor_stream(&self) -> UnixStream {
        UnixStream::connect(self.monitor_path()).expect("QEMU's monitor accepts a connection")
    }

    /// Returns the image of a disk. Read it only after QEMU has ended.
    #[track_caller]
    pub fn source_path(&self, disk: &str) -> &Path {
        &self.disk(disk).1
    }

    /// Returns the image's format as in `qemu-img -f`.
    #[track_caller]
    pub fn source_format(&self, disk: &str) -> &'static str {
        self.disk(disk).0.format
    }

    #[track_caller]
    fn disk(&self, id: &str) -> &(Disk, PathBuf) {
        let found = self.disks.iter().find(|(disk, _)| disk.id == id);
        found.unwrap_or_else(|| panic!("{} has no disk {id}", self.name))
    }

    /// Writes as the guest would. Bytes, multiples of 512.
    #[track_caller]
    pub fn write(&self, disk: &str, offset: u64, length: u64, pattern: u8) {
        self.qemu_io(disk, &format!("write -P {pattern} {offset} {length}"));
    }

    /// Writes zeroes as the guest would; the image may store them without data.
    #[track_caller]
    pub fn write_zeroes(&self, disk: &str, offset: u64, length: u64) {
        self.qemu_io(disk, &format!("write -z {offset} {length}"));
    }

    /// Discards as the guest would. The content of the range is undefined afterwards.
    #[track_caller]
    pub fn discard(&self, disk: &str, offset: u64, length: u64) {
        self.qemu_io(disk, &format!("discard {offset} {length}"));
    }

    /// Flushes as the guest would. Until the next write, a copy of the image's file is complete.
    #[track_caller]
    pub fn flush(&self, disk: &str) {
        self.qemu_io(disk, "flush");
    }

    #[track_caller]
    fn qemu_io(&self, disk: &str, what: &str) {
        let line = format!("qemu-io -d {} \"{what}\"", self.disk(disk).0.qom_path());
        let said = self.qmp("human-monitor-command", json!({ "command-line": line }));
        // The monitor's reply is empty on success; "wrote …" goes to QEMU's standard output.
        assert_eq!(said, "", "{line}");
    }

    /// Runs a QMP command on the test's own connection; it must succeed.
    #[track_caller]
    pub fn qmp(&self, command: &str, arguments: Value) -> Value {
        self.try_qmp(command, arguments)
            .unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Runs a QMP command; QEMU's refusal is the `Err`.
    #[track_caller]
    pub fn try_qmp(&self, command: &str, arguments: Value) -> Result<Value, Value> {
        self.observer
            .lock()
            .expect("no test panics inside")
            .execute(command, arguments)
    }

    /// Waits for a matching event among all events since the start that were not taken yet, and takes it. Other
    /// threads can use the VM while this waits.
    #[track_caller]
    pub fn wait_event(&self, name: &str, mut fits: impl FnMut(&Value) -> bool) -> Value {
        wait::until(&format!("QEMU's {name}"), || {
            let mut observer = self.observer.lock().expect("no test panics inside");
            observer.take_event(|event| event["event"] == name && fits(&event["data"]))
        })
    }

    /// Returns the objects of the kinds that a backup creates in QEMU.
    #[track_caller]
    pub fn residue(&self) -> Residue {
        let list = |command| match self.qmp(command, json!({})) {
            Value::Array(list) => list,
            other => panic!("{command}: {other}"),
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut residue = Residue {
            jobs: list("query-jobs").iter().map(|job| text(&job["id"])).collect(),
            nodes: Vec::new(),
            bitmaps: Vec::new(),
            fdsets: list("query-fdsets")
                .iter()
                .filter_map(|set| set["fdset-id"].as_i64())
                .collect(),
            histograms: self.histograms().into_keys().collect(),
        };
        for node in list("query-named-block-nodes") {
            let name = text(&node["node-name"]);
            for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
                let bitmap = text(&bitmap["name"]);
                if !bitmap.starts_with(CHECKPOINT) {
                    residue.bitmaps.push(format!("{name}/{bitmap}"));
                }
            }
            residue.nodes.push(name);
        }
        residue.jobs.sort();
        residue.nodes.sort();
        residue.bitmaps.sort();
        residue.fdsets.sort();
        residue
    }

    /// Returns the boundaries of the latency histograms in ns, by `DEVICE/KIND`, such as `vda/wr`.
    #[track_caller]
    pub fn histograms(&self) -> BTreeMap<String, Vec<u64>> {
        let devices = self.qmp("query-blockstats", json!({}));
        let mut found = BTreeMap::new();
        for device in devices.as_array().into_iter().flatten() {
            let path = device["qdev"].as_str().unwrap_or_default();
            let id = path.strip_prefix("/machine/peripheral/").unwrap_or(path);
            let id = id.split('/').next().unwrap_or_default();
            for (key, value) in device["stats"].as_object().into_iter().flatten() {
                if let Some(kind) = key.strip_suffix("_latency_histogram") {
                    let boundaries = serde_json::from_value(value["boundaries"].clone());
                    found.insert(format!("{id}/{kind}"), boundaries.expect("they are numbers"));
                }
            }
        }
        found
    }

    /// Returns QEMU's path of the device of a disk.
    #[track_caller]
    pub fn device_path(&self, disk: &str) -> String {
        self.disk(disk).0.qom_path()
    }

    /// Returns the checkpoints on a disk by name, in order.
    #[track_caller]
    pub fn checkpoints(&self, disk: &str) -> Vec<String> {
        let mut names = self.own_bitmaps(disk);
        names.retain(|name| !name.ends_with(SENTINEL));
        names
    }

    /// Returns the checkpoints on a disk that have a size marker bitmap, which shows whether the disk was smaller
    /// since.
    #[track_caller]
    pub fn sentinels(&self, disk: &str) -> Vec<String> {
        let names = self.own_bitmaps(disk);
        let names = names.iter().filter_map(|name| name.strip_suffix(SENTINEL));
        names.map(str::to_owned).collect()
    }

    #[track_caller]
    fn own_bitmaps(&self, disk: &str) -> Vec<String> {
        let node = self.node(disk);
        let bitmaps = node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
        let names = bitmaps.iter().filter_map(|bitmap| bitmap["name"].as_str());
        let mut names: Vec<String> = names
            .filter(|name| name.starts_with(CHECKPOINT))
            .map(str::to_owned)
            .collect();
        names.sort();
        names
    }

    /// Returns the node that the guest writes to, for a disk in `-blockdev` style.
    #[track_caller]
    fn node(&self, disk: &str) -> Value {
        let drives = self.qmp("query-block", json!({}));
        let path = self.disk(disk).0.qom_path();
        let drive = drives
            .as_array()
            .into_iter()
            .flatten()
            .find(|drive| drive["qdev"] == path);
        drive
            .map(|drive| drive["inserted"].clone())
            .expect("the disk has a node")
    }

    /// Returns the name of that node.
    #[track_caller]
    pub fn node_name(&self, disk: &str) -> String {
        let node = self.node(disk);
        node["node-name"].as_str().expect("a node has a name").to_owned()
    }

    /// Starts or resumes the processor.
    #[track_caller]
    pub fn cont(&self) {
        self.qmp("cont", json!({}));
    }

    /// Stops the processor; the block layer, and so a backup, continues.
    #[track_caller]
    pub fn stop(&self) {
        self.qmp("stop", json!({}));
    }

    /// Stops QEMU (SIGSTOP): its monitors stay connected and do not respond.
    pub fn freeze(&mut self) {
        self.process.signal(Signal::STOP);
    }

    /// Ends [`Vm::freeze`].
    pub fn thaw(&mut self) {
        self.process.signal(Signal::CONT);
    }

    /// Kills QEMU (SIGKILL), as in a crash.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Waits until QEMU has ended by itself with success.
    #[track_caller]
    pub fn wait_for_end(&mut self) {
        let status = self.process.wait();
        assert_eq!(status, 0, "QEMU ends in order: {}", self.process.log());
    }

    /// Stops QEMU with `quit`, so that its images are closed and can be compared.
    #[track_caller]
    pub fn quit(&mut self) {
        self.qmp("quit", json!({}));
        self.wait_for_end();
    }
}
