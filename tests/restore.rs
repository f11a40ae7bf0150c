//! Stored backups, read by `backupctl` alone: restored to what they were, exported, and verified. The chains are made by
//! `qemu-img`, the manifests by hand, so that what is read is the format and not what this program would write.

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use backupd::definition::Format;
use backupd::image::{self, Chain, Fault, Progress};
use backupd::target::{Sharing, Shelf};
use common::process::{self, Output, Process};
use common::storage::{LoopDevice, files_below, holds, identical};
use common::{test_directory, wait};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const FULL: &str = "20261101T000000Z-aaaaaaaa";
const FIRST: &str = "20261102T000000Z-bbbbbbbb";
const SECOND: &str = "20261103T000000Z-cccccccc";
const DIFFERENTIAL: &str = "20261104T000000Z-dddddddd";
const ALL: [&str; 4] = [FULL, FIRST, SECOND, DIFFERENTIAL];

/// A store with a chain of one domain: a full backup, two incrementals and a differential, of which the full one has a raw
/// disk too.
struct Store {
    dir: tempfile::TempDir,
}

fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = process::bound(program);
    command.args(arguments);
    process::run(command)
}

fn backupctl() -> Command {
    process::bound(env!("CARGO_BIN_EXE_backupctl"))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Store {
    fn new() -> Self {
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

    fn path(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn backup(&self, id: &str) -> PathBuf {
        self.path().join("web").join(id)
    }

    fn vda(&self, id: &str) -> PathBuf {
        self.backup(id).join("vda.qcow2")
    }

    /// A new directory for what is restored.
    fn out(&self) -> PathBuf {
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

    /// The manifest of a backup as its files are now.
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

    fn write_manifest(&self, id: &str, manifest: &Value) {
        fs::write(self.backup(id).join("manifest.json"), manifest.to_string()).unwrap();
    }

    fn change_manifest(&self, id: &str, change: impl FnOnce(&mut Value)) {
        let content = fs::read(self.backup(id).join("manifest.json")).unwrap();
        let mut manifest = serde_json::from_slice(&content).unwrap();
        change(&mut manifest);
        self.write_manifest(id, &manifest);
    }

    /// Has the manifest say what there is now: what was changed on purpose is not found by its checksum.
    fn record(&self, id: &str) {
        let path = self.vda(id);
        let sum = run("sha256sum", &[text(&path)]).expect_success();
        self.change_manifest(id, |manifest| {
            manifest["disks"][0]["length"] = path.metadata().unwrap().len().into();
            manifest["disks"][0]["sha256"] = sum.split_whitespace().next().unwrap().into();
        });
    }

    /// `backupctl COMMAND BACKUP --from STORE …`
    fn run(&self, command: &str, backup: &str, arguments: &[&str]) -> Output {
        let mut run = backupctl();
        run.args([command, backup, "--from", text(&self.path())])
            .args(arguments);
        process::run(run)
    }

    /// What is there, and when it was changed last.
    fn state(&self) -> Vec<(String, u64, i64, i64)> {
        let files = files_below(&self.path()).into_iter();
        files
            .map(|file| {
                let metadata = self.path().join(&file).metadata().unwrap();
                (file, metadata.len(), metadata.mtime(), metadata.mtime_nsec())
            })
            .collect()
    }
}

#[test]
fn every_point_of_a_chain_is_restored_as_it_was_in_either_format() {
    let store = Store::new();
    let before = store.state();
    for id in ALL {
        for format in ["qcow2", "raw"] {
            let out = store.out();
            let arguments = ["--to", text(&out), "--format", format];
            let output = store.run("restore", id, &arguments);
            assert_eq!(output.status, 0, "{}", output.stderr);
            let image = out.join(format!("vda.{format}"));
            assert!(
                identical(&image, format, &store.vda(id), "qcow2"),
                "{id} {format}"
            );
            // Sixty-four for the guest, some ten of them written.
            assert!(
                image.metadata().unwrap().blocks() * 512 < 14 * MIB,
                "{id} {format}"
            );
            assert_eq!(image.metadata().unwrap().mode() & 0o777, 0o600);
            let info = run("qemu-img", &["info", "-U", text(&image)]).expect_success();
            assert!(!info.contains("backing file"), "{info}");
            let names = match id {
                FULL => vec![format!("vda.{format}"), format!("vdb.{format}")],
                _ => vec![format!("vda.{format}")],
            };
            assert_eq!(files_below(&out), names);
            if id == FULL {
                let raw = store.backup(id).join("vdb.raw");
                assert!(identical(&out.join(&names[1]), format, &raw, "raw"));
            }
            fs::remove_dir_all(&out).unwrap();
        }
    }
    let out = store.out();
    store
        .run("restore", SECOND, &["--to", text(&out)])
        .expect_success();
    let image = out.join("vda.qcow2");
    for (offset, length, pattern) in [
        (0, MIB, 0),
        (MIB, MIB, 0x11),
        (4 * MIB, MIB, 0x22),
        (16 * MIB, MIB, 0x33),
    ] {
        assert!(holds(&image, "qcow2", offset, length, pattern), "{offset}");
    }
    assert_eq!(store.state(), before);
}

#[test]
fn a_block_device_gets_the_disk_and_keeps_what_is_behind_it() {
    let store = Store::new();
    let file = store.dir.path().join("device");
    fs::write(&file, vec![0xee; (SIZE + 4 * MIB) as usize]).unwrap();
    let device = LoopDevice::attach(&file, SIZE + 4 * MIB);
    let disk = format!("vda={}", device.device().display());
    let output = store.run("restore", FIRST, &["--disk", &disk]);
    assert_eq!(output.status, 0, "{}", output.stderr);
    drop(device);
    let (head, tail) = (fs::File::open(&file).unwrap(), vec![0xee; (4 * MIB) as usize]);
    let mut found = tail.clone();
    head.read_exact_at(&mut found, SIZE).unwrap();
    assert!(found == tail);
    fs::File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    assert!(identical(&file, "raw", &store.vda(FIRST), "qcow2"));
}

#[test]
fn a_device_that_is_too_small_is_refused() {
    let store = Store::new();
    let device = LoopDevice::attach(&store.dir.path().join("device"), SIZE - MIB);
    let disk = format!("vda={}", device.device().display());
    let output = store.run("restore", FIRST, &["--disk", &disk]);
    assert_eq!(output.status, 1);
    assert!(
        output.stderr.contains("where the disk has 67108864"),
        "{}",
        output.stderr
    );
}

#[test]
fn a_file_that_exists_is_replaced_only_where_that_is_said() {
    let store = Store::new();
    let file = store.out().join("old");
    fs::write(&file, "mine").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&file, Some(1), Some(1)).unwrap();
    let disk = format!("vda={}", file.display());
    let output = store.run("restore", FULL, &["--disk", &disk]);
    assert_eq!(output.status, 1);
    assert!(
        output.stderr.contains("exists") && output.stderr.contains("--force"),
        "{}",
        output.stderr
    );
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    let output = store.run("restore", FULL, &["--disk", &disk, "--format", "raw", "--force"]);
    assert_eq!(output.status, 0, "{}", output.stderr);
    assert!(identical(&file, "raw", &store.vda(FULL), "qcow2"));
    let metadata = file.metadata().unwrap();
    assert_eq!((metadata.uid(), metadata.mode() & 0o777), (1, 0o640));
    assert_eq!(files_below(&store.out()), ["old"]);
}

#[test]
fn a_backup_is_found_by_the_beginning_of_its_id() {
    let store = Store::new();
    let out = store.out();
    for (backup, words) in [
        ("2026", "say more of it"),
        ("2027", "no backup '2027'"),
        ("db/20261101", "no backup"),
        ("..", "no backup"),
        ("", "no backup"),
    ] {
        let output = store.run("restore", backup, &["--to", text(&out)]);
        assert_eq!(output.status, 1, "{backup}");
        assert!(output.stderr.contains(words), "{backup}: {}", output.stderr);
    }
    let output = store.run("restore", "web/20261103", &["--to", text(&out), "--json"]);
    assert_eq!(output.status, 0, "{}", output.stderr);
    let last: Value = serde_json::from_str(output.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(
        (&last["result"], &last["backup"]),
        (&json!("completed"), &json!(SECOND))
    );
    let output = store.run("restore", SECOND, &["--disk", "vdz=x"]);
    assert!(output.stderr.contains("no disk 'vdz'"), "{}", output.stderr);
}

#[test]
fn an_ordinary_user_restores_what_it_can_read() {
    let store = Store::new();
    let copy = store.dir.path().join("backupctl");
    fs::copy(env!("CARGO_BIN_EXE_backupctl"), &copy).unwrap();
    let out = store.out();
    std::os::unix::fs::chown(&out, Some(65534), Some(65534)).unwrap();
    let restore = || {
        let mut command = process::bound_as(65534, &copy);
        command.args([
            "restore",
            SECOND,
            "--from",
            text(&store.path()),
            "--to",
            text(&out),
        ]);
        process::run(command)
    };
    fs::set_permissions(store.vda(FULL), fs::Permissions::from_mode(0o600)).unwrap();
    let output = restore();
    assert_eq!(
        output.status, 1,
        "a right that is missing is no damage: {}",
        output.stderr
    );
    assert!(
        output.stderr.contains(text(&store.vda(FULL))),
        "{}",
        output.stderr
    );
    assert_eq!(files_below(&out), [""; 0]);
    fs::set_permissions(store.vda(FULL), fs::Permissions::from_mode(0o644)).unwrap();
    let output = restore();
    assert_eq!(output.status, 0, "{}", output.stderr);
    assert_eq!(out.join("vda.qcow2").metadata().unwrap().uid(), 65534);
}

#[test]
fn a_backup_that_is_being_changed_is_not_read() {
    let store = Store::new();
    let out = store.out();
    let shelf = Shelf::of_users_store(&store.path()).unwrap();
    let shelf = shelf.below("web").unwrap().unwrap().below(FULL).unwrap().unwrap();
    let held = shelf.hold(Sharing::Exclusive).unwrap();
    for (command, arguments) in [("restore", ["--to", text(&out)].as_slice()), ("verify", &[])] {
        let output = store.run(command, FIRST, arguments);
        assert_eq!(output.status, 1, "{}", output.stderr);
        let said = format!("{}{}", output.stdout, output.stderr);
        assert!(said.contains("others are just reading, changing"), "{said}");
    }
    drop(held);
    store
        .run("restore", FIRST, &["--to", text(&out)])
        .expect_success();
}

/// A QEMU that still has the image open can write to it at any time.
#[test]
fn a_header_that_is_exchanged_after_it_was_checked_gives_nobody_another_file() {
    let store = Store::new();
    let secret = store.dir.path().join("secret");
    fs::write(&secret, vec![0x5e; SIZE as usize]).unwrap();
    let made = store.dir.path().join("made.qcow2");
    let option = format!("data_file={},data_file_raw=on", secret.display());
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &option,
            text(&made),
            &SIZE.to_string(),
        ],
    )
    .expect_success();
    fs::write(&secret, vec![0x5e; SIZE as usize]).unwrap();
    let shelf = Shelf::of_users_store(&store.path()).unwrap();
    let domain = shelf.below("web").unwrap().unwrap();
    let chain = Chain::open(&domain, FULL, Some(&["vda"])).unwrap();
    write_at(&store.vda(FULL), 0, &fs::read(&made).unwrap());
    let target = store.out().join("target");
    let file = fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&target)
        .unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (progress, cancel) = (Progress::default(), CancellationToken::new());
    let disk = &chain.disks()[0];
    let restored = runtime.block_on(image::restore(disk, file.into(), Format::Raw, &progress, &cancel));
    let Err(image::Error::Damaged(finding)) = restored else {
        panic!("{restored:?}");
    };
    assert_eq!(finding.fault, Fault::Exchanged);
    assert_eq!(target.metadata().unwrap().blocks(), 0);
}

#[test]
fn what_is_interrupted_leaves_nothing() {
    let store = Store::new();
    let out = store.out();
    // It never answers, so that the restore is in its middle for as long as it takes.
    let bin = store.dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let script = bin.join("qemu-storage-daemon");
    let started = store.dir.path().join("started");
    let content = format!("#!/bin/sh\necho $$ > {}\nexec sleep 1000\n", started.display());
    fs::write(&script, content).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = backupctl();
    command
        .args([
            "restore",
            FIRST,
            "--from",
            text(&store.path()),
            "--to",
            text(&out),
        ])
        .env("PATH", format!("{}:/usr/bin:/bin", bin.display()));
    let mut restore = Process::start("restore", store.dir.path(), command);
    let child = wait::until("the restore to have begun", || {
        fs::read_to_string(&started).ok()?.trim().parse::<u32>().ok()
    });
    assert_eq!(files_below(&out), [format!(".vda.qcow2.{FIRST}.partial")]);
    restore.signal(Signal::INT);
    assert_eq!(restore.wait(), 3, "{}", restore.log());
    assert_eq!(files_below(&out), [""; 0]);
    wait::until("its child to be gone", || {
        (!Path::new(&format!("/proc/{child}/exe")).exists()).then_some(())
    });
}

#[test]
fn what_is_missing_on_the_machine_is_named() {
    let store = Store::new();
    let out = store.out();
    let bin = store.dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    for (command, words) in [
        (
            ["restore", FIRST, "--to", text(&out)].as_slice(),
            "qemu-system-common",
        ),
        (&["verify", FIRST], "qemu-utils"),
    ] {
        let mut run = Command::new(env!("CARGO_BIN_EXE_backupctl"));
        run.args(command)
            .args(["--from", text(&store.path())])
            .env("PATH", &bin);
        let output = process::run(run);
        assert_eq!(output.status, 1);
        assert!(output.stderr.contains(words), "{}", output.stderr);
    }
    assert_eq!(files_below(&out), [""; 0]);
}

#[test]
fn a_disk_is_served_for_reading_until_it_is_interrupted() {
    let store = Store::new();
    let socket = store.dir.path().join("nbd socket");
    let mut command = backupctl();
    command.args([
        "export",
        FULL,
        "--from",
        text(&store.path()),
        "--socket",
        text(&socket),
    ]);
    let mut export = Process::start("export", store.dir.path(), command);
    let uris = wait::until("both disks to be served", || {
        let said = export.stdout();
        (said.lines().count() == 2).then(|| said.lines().map(str::to_owned).collect::<Vec<_>>())
    });
    assert!(uris[0].starts_with("nbd+unix:///vda?socket=") && uris[0].ends_with("nbd%20socket"));
    assert_eq!(socket.metadata().unwrap().mode() & 0o777, 0o600);
    let compare = |uri: &str, format, image: &Path| {
        run(
            "qemu-img",
            &["compare", "-f", "raw", "-F", format, uri, text(image)],
        )
        .expect_success();
    };
    compare(&uris[0], "qcow2", &store.vda(FULL));
    compare(&uris[1], "raw", &store.backup(FULL).join("vdb.raw"));
    let write = run("qemu-io", &["-f", "raw", "-c", "write 0 4k", &uris[0]]);
    assert_ne!(write.status, 0, "{}", write.stdout);
    export.signal(Signal::INT);
    assert_eq!(export.wait(), 0, "{}", export.log());
    assert!(!socket.exists());
}

#[test]
fn good_backups_are_good() {
    let store = Store::new();
    let before = store.state();
    let all = run(
        env!("CARGO_BIN_EXE_backupctl"),
        &["verify", "--all", "--from", text(&store.path()), "--json"],
    );
    assert_eq!(all.status, 0, "{}{}", all.stdout, all.stderr);
    let events: Vec<Value> = all
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let backups: Vec<_> = events.iter().filter(|event| event["event"] == "backup").collect();
    assert_eq!(backups.len(), 4);
    assert!(backups.iter().all(|backup| backup["state"] == "good"));
    assert_eq!(events.last().unwrap()["good"], 4);
    let one = store.run("verify", SECOND, &[]).expect_success();
    assert_eq!(one.matches(": good,").count(), 3, "{one}");
    assert_eq!(store.state(), before);
    store.change_manifest(FIRST, |manifest| {
        let disk = manifest["disks"][0].as_object_mut().unwrap();
        disk.remove("sha256");
        disk.remove("length");
    });
    let one = store.run("verify", FIRST, &[]).expect_success();
    assert!(one.contains("has no checksum"), "{one}");
}

/// The state of each backup after `verify --all`, and what is said.
fn verified(store: &Store) -> (Vec<(String, String)>, Output) {
    let output = run(
        env!("CARGO_BIN_EXE_backupctl"),
        &["verify", "--all", "--from", text(&store.path()), "--json"],
    );
    let events = output
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    let backups = events.filter(|event: &Value| event["event"] == "backup");
    let mut states: Vec<_> = backups
        .map(|event| {
            (
                event["id"].as_str().unwrap().to_owned(),
                event["state"].as_str().unwrap().to_owned(),
            )
        })
        .collect();
    states.sort();
    (states, output)
}

/// Damages a store; those of `damaged` are found, nothing else, with `words` about it. Restoring the last incremental gives
/// `status`.
fn damage(words: &str, damaged: &[&str], status: i32, change: impl FnOnce(&Store)) {
    let store = Store::new();
    change(&store);
    let (states, output) = verified(&store);
    assert_eq!(output.status, 5, "{words}: {}{}", output.stdout, output.stderr);
    assert!(output.stdout.contains(words), "{words}: {}", output.stdout);
    for (id, state) in states {
        let expected = if damaged.contains(&id.as_str()) {
            "damaged"
        } else {
            "good"
        };
        assert_eq!(state, expected, "{words}: {id}: {}", output.stdout);
    }
    let out = store.out();
    let restored = store.run("restore", SECOND, &["--to", text(&out)]);
    assert_eq!(restored.status, status, "{words}: {}", restored.stderr);
    if status != 0 {
        assert!(restored.stderr.contains(words), "{words}: {}", restored.stderr);
        assert_eq!(files_below(&out), [""; 0]);
    }
}

fn write_at(path: &Path, offset: u64, bytes: &[u8]) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

#[test]
fn a_bit_that_flipped_is_found_with_all_that_lies_on_it() {
    damage("does not have the checksum", &[FIRST, SECOND], 0, |store| {
        let image = store.vda(FIRST);
        let end = image.metadata().unwrap().len();
        write_at(&image, end - 1, &[0x77]);
    });
    damage("does not have the checksum", &ALL, 0, |store| {
        write_at(&store.backup(FULL).join("vdb.raw"), 5000, &[1]);
    });
}

#[test]
fn a_file_that_was_cut_short_or_is_gone_is_found() {
    damage("bytes where its manifest says", &ALL, 5, |store| {
        let image = fs::File::options().write(true).open(store.vda(FULL)).unwrap();
        image.set_len(image.metadata().unwrap().len() - 65536).unwrap();
    });
    damage("its image vda.qcow2 is not there", &[FIRST, SECOND], 5, |store| {
        fs::remove_file(store.vda(FIRST)).unwrap();
    });
    let of_raw = "its raw image has 8388607 bytes";
    damage(of_raw, &ALL, 0, |store| {
        let raw = fs::File::options()
            .write(true)
            .open(store.backup(FULL).join("vdb.raw"))
            .unwrap();
        raw.set_len(8 * MIB - 1).unwrap();
        store.change_manifest(FULL, |manifest| {
            manifest["disks"][1].as_object_mut().unwrap().remove("length");
        });
    });
}

#[test]
fn a_chain_that_is_broken_is_found() {
    damage("which is not there", &[FIRST, SECOND], 5, |store| {
        fs::remove_dir_all(store.backup(FULL)).unwrap();
        fs::remove_dir_all(store.backup(DIFFERENTIAL)).unwrap();
    });
    damage("it lies on itself", &[FIRST, SECOND], 5, |store| {
        store.change_manifest(FIRST, |manifest| {
            manifest["disks"][0]["parent"]["backup"] = SECOND.into();
        });
    });
    damage("does not have", &[FIRST, SECOND], 5, |store| {
        store.change_manifest(FIRST, |manifest| {
            manifest["disks"][0]["parent"]["file"] = "vdz.qcow2".into();
        });
    });
    damage("its manifest is no manifest", &[FIRST, SECOND], 5, |store| {
        fs::write(store.backup(FIRST).join("manifest.json"), "{").unwrap();
    });
    damage("is that of another backup", &[FIRST, SECOND], 5, |store| {
        store.change_manifest(FIRST, |manifest| manifest["id"] = SECOND.into());
    });
}

#[test]
fn a_header_that_names_another_file_is_found() {
    let secret = "/etc/hostname";
    let wrong_name = "names the backing file";
    damage(wrong_name, &[FIRST, SECOND], 5, |store| {
        run(
            "qemu-img",
            &[
                "rebase",
                "-u",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "-b",
                secret,
                text(&store.vda(FIRST)),
            ],
        )
        .expect_success();
        store.record(FIRST);
    });
    damage(wrong_name, &ALL, 5, |store| {
        run(
            "qemu-img",
            &[
                "rebase",
                "-u",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "-b",
                secret,
                text(&store.vda(FULL)),
            ],
        )
        .expect_success();
        store.record(FULL);
    });
    damage(
        "says that its backing file is 'raw'",
        &[FIRST, SECOND],
        5,
        |store| {
            let name = format!("../{FULL}/vda.qcow2");
            run(
                "qemu-img",
                &[
                    "rebase",
                    "-u",
                    "-f",
                    "qcow2",
                    "-F",
                    "raw",
                    "-b",
                    &name,
                    text(&store.vda(FIRST)),
                ],
            )
            .expect_success();
            store.record(FIRST);
        },
    );
    damage("names no backing file", &[FIRST, SECOND], 5, |store| {
        run(
            "qemu-img",
            &["rebase", "-u", "-f", "qcow2", "-b", "", text(&store.vda(FIRST))],
        )
        .expect_success();
        store.record(FIRST);
    });
    damage("names an external data file", &[FIRST, SECOND], 5, |store| {
        // Bit 2 of the incompatible features.
        write_at(&store.vda(FIRST), 79, &[4]);
        store.record(FIRST);
    });
}

#[test]
fn a_header_that_makes_no_sense_is_found() {
    damage("is encrypted", &[FIRST, SECOND], 5, |store| {
        write_at(&store.vda(FIRST), 35, &[2]);
        store.record(FIRST);
    });
    damage("is qcow2 of version 9", &[FIRST, SECOND], 5, |store| {
        write_at(&store.vda(FIRST), 7, &[9]);
        store.record(FIRST);
    });
    damage("is no qcow2 image", &[FIRST, SECOND], 5, |store| {
        write_at(&store.vda(FIRST), 0, b"RAW!");
        store.record(FIRST);
    });
    damage(
        "bytes for the guest where the manifest says",
        &[FIRST, SECOND],
        5,
        |store| {
            store.change_manifest(FIRST, |manifest| {
                manifest["disks"][0]["virtual-size"] = (SIZE - 512).into()
            });
        },
    );
}

#[test]
fn an_image_whose_structure_is_broken_is_found_though_its_checksum_is_right() {
    damage("qemu-img finds", &[DIFFERENTIAL], 0, |store| {
        // The first entry of the refcount block: the header's own cluster counts as free.
        let image = fs::File::open(store.vda(DIFFERENTIAL)).unwrap();
        let mut offset = [0; 8];
        image.read_exact_at(&mut offset, 48).unwrap();
        let table = u64::from_be_bytes(offset);
        image.read_exact_at(&mut offset, table).unwrap();
        write_at(&store.vda(DIFFERENTIAL), u64::from_be_bytes(offset), &[0, 0]);
        store.record(DIFFERENTIAL);
    });
}
