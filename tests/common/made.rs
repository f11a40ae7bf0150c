//! A store that was made without the service: images by `qemu-img`, manifests by hand. Readers are so tested against
//! the format and not against the service's own output.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::process::{self, Output};
use super::storage::files_below;
use super::test_directory;

pub const MIB: u64 = 1 << 20;
pub const SIZE: u64 = 64 * MIB;
pub const FULL: &str = "20261101T000000Z-aaaaaaaa";
pub const FIRST: &str = "20261102T000000Z-bbbbbbbb";
pub const SECOND: &str = "20261103T000000Z-cccccccc";
pub const DIFFERENTIAL: &str = "20261104T000000Z-dddddddd";
pub const ALL: [&str; 4] = [FULL, FIRST, SECOND, DIFFERENTIAL];

/// A store with a chain of one domain: a full backup, two incrementals and a differential. The full one has a raw disk
/// too.
pub struct Store {
    pub dir: tempfile::TempDir,
}

pub fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = process::bound(program);
    command.args(arguments);
    process::run(command)
}

pub fn backupctl() -> Command {
    process::bound(env!("CARGO_BIN_EXE_backupctl"))
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Store {
    pub fn new() -> Self {
        let store = Self {
            dir: test_directory(),
        };
        store.image(FULL, None, &["write -q -P 0x11 0 8M", "write -q -P 0x12 40M 1M"]);
        store.image(FIRST, Some(FULL), &["write -q -P 0x22 4M 1M", "write -q -z 0 1M"]);
        store.image(SECOND, Some(FIRST), &["write -q -P 0x33 16M 1M"]);
        store.image(DIFFERENTIAL, Some(FULL), &["write -q -P 0x44 2M 1M"]);
        let raw = fs::File::create(store.backup(FULL).join("vdb.raw")).unwrap();
        raw.set_len(8 * MIB).unwrap();
        raw.write_all_at(&[0x55; 4096], MIB).unwrap();
        store.manifest(FULL, "full", None, true);
        store.manifest(FIRST, "incremental", Some(FULL), false);
        store.manifest(SECOND, "incremental", Some(FIRST), false);
        store.manifest(DIFFERENTIAL, "differential", Some(FULL), false);
        store
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub fn backup(&self, id: &str) -> PathBuf {
        self.path().join("web").join(id)
    }

    pub fn vda(&self, id: &str) -> PathBuf {
        self.backup(id).join("vda.qcow2")
    }

    /// Returns a new directory for restored files.
    pub fn out(&self) -> PathBuf {
        let out = self.dir.path().join("out");
        fs::create_dir_all(&out).unwrap();
        out
    }

    fn image(&self, id: &str, parent: Option<&str>, writes: &[&str]) {
        fs::create_dir_all(self.backup(id)).unwrap();
        let image = self.vda(id);
        let mut create = process::bound("qemu-img");
        create
            .current_dir(self.backup(id))
            .args(["create", "-q", "-f", "qcow2"]);
        if let Some(parent) = parent {
            create.args(["-F", "qcow2", "-b", &format!("../{parent}/vda.qcow2")]);
        }
        create.args([text(&image), &SIZE.to_string()]);
        process::run(create).expect_success();
        for write in writes {
            run("qemu-io", &["-f", "qcow2", "-c", write, text(&image)]).expect_success();
        }
    }

    /// Returns the manifest of a backup for its present files.
    fn manifest(&self, id: &str, kind: &str, parent: Option<&str>, raw: bool) {
        let disk = |name: &str, format: &str, size: u64| {
            let file = format!("{name}.{format}");
            let path = self.backup(id).join(&file);
            let sum = run("sha256sum", &[text(&path)]).expect_success();
            json!({
                "name": name, "file": file, "format": format, "virtual-size": size,
                "length": path.metadata().unwrap().len(), "sha256": sum.split_whitespace().next().unwrap(),
            })
        };
        let mut disks = vec![disk("vda", "qcow2", SIZE)];
        if let Some(parent) = parent {
            disks[0]["parent"] = json!({ "backup": parent, "file": "vda.qcow2" });
        }
        if raw {
            disks.push(disk("vdb", "raw", 8 * MIB));
        }
        let manifest = json!({
            "version": 1, "id": id, "job": 1, "started-by": 0, "domain": { "name": "web", "uuid": null },
            "kind": kind, "started": "2026-11-01T00:00:00Z", "instant": "2026-11-01T00:00:01Z",
            "quiesced": false, "disks": disks,
        });
        self.write_manifest(id, &manifest);
    }

    /// Adds a chain of so many backups of one empty disk. The last one has `disks` disks, all on the same chain.
    /// Returns the id of the last.
    pub fn deep_chain(&self, length: usize, disks: usize) -> String {
        let ids: Vec<String> = (0..length)
            .map(|number| format!("20270101T00{:02}{:02}Z-eeeeeeee", number / 60, number % 60))
            .collect();
        for (number, id) in ids.iter().enumerate() {
            let parent = number.checked_sub(1).map(|before| ids[before].as_str());
            self.image(id, parent, &[]);
            let kind = parent.map_or("full", |_| "incremental");
            self.manifest(id, kind, parent, false);
        }
        let last = ids.last().expect("a chain has a backup").clone();
        self.change_manifest(&last, |manifest| {
            let first = manifest["disks"][0].clone();
            for number in 1..disks {
                let (mut disk, file) = (first.clone(), format!("vda{number}.qcow2"));
                fs::copy(self.vda(&last), self.backup(&last).join(&file)).unwrap();
                (disk["name"], disk["file"]) = (format!("vda{number}").into(), file.into());
                manifest["disks"].as_array_mut().unwrap().push(disk);
            }
        });
        last
    }

    fn write_manifest(&self, id: &str, manifest: &Value) {
        fs::write(self.backup(id).join("manifest.json"), manifest.to_string()).unwrap();
    }

    pub fn change_manifest(&self, id: &str, change: impl FnOnce(&mut Value)) {
        let content = fs::read(self.backup(id).join("manifest.json")).unwrap();
        let mut manifest = serde_json::from_slice(&content).unwrap();
        change(&mut manifest);
        self.write_manifest(id, &manifest);
    }

    /// Updates the manifest to the present files, so that the checksum does not reveal a deliberate change.
    pub fn record(&self, id: &str) {
        let path = self.vda(id);
        let sum = run("sha256sum", &[text(&path)]).expect_success();
        self.change_manifest(id, |manifest| {
            manifest["disks"][0]["length"] = path.metadata().unwrap().len().into();
            manifest["disks"][0]["sha256"] = sum.split_whitespace().next().unwrap().into();
        });
    }

    /// `backupctl COMMAND BACKUP --from STORE …`
    pub fn run(&self, command: &str, backup: &str, arguments: &[&str]) -> Output {
        let mut run = backupctl();
        run.args([command, backup, "--from", text(&self.path())])
            .args(arguments);
        process::run(run)
    }

    /// Returns the files with their modification times.
    pub fn state(&self) -> Vec<(String, u64, i64, i64)> {
        let files = files_below(&self.path()).into_iter();
        files
            .map(|file| {
                let metadata = self.path().join(&file).metadata().unwrap();
                (file, metadata.len(), metadata.mtime(), metadata.mtime_nsec())
            })
            .collect()
    }
}

pub fn write_at(path: &Path, offset: u64, bytes: &[u8]) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}
