//! Stored backups, read by `backupctl` alone: restored and exported.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::common::made::{ALL, FIRST, FULL, MIB, SECOND, SIZE, Store, backupctl, run, text, write_at};
use crate::common::process::{self, Process};
use crate::common::stand_in::{HANGS, StandIn, wait_for_end};
use crate::common::storage::{LoopDevice, Tmpfs, files_below, holds, identical};
use crate::common::wait;
use backupd::image::{self, Chain, Control, Fault, Output, Progress};
use backupd::model::Format;
use backupd::store::{self, BackupName, LockKind};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

fn name(id: &str) -> BackupName<'_> {
    BackupName { domain: "web", id }
}

#[test]
fn every_point_in_time_of_a_chain_is_restored_in_either_format() {
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
            // Sixty-four for the guest, about ten of them written.
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
    let note = "is larger than the disk: its last 4.0 MiB keep their old content";
    assert!(output.stdout.contains(note), "{}", output.stdout);
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
        output.stderr.contains("but the disk has 67108864"),
        "{}",
        output.stderr
    );
}

#[test]
fn an_existing_file_is_replaced_only_on_request() {
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
fn disks_with_many_images_together_are_restored_one_by_one() {
    let store = Store::new();
    let last = store.deep_chain(60, 10);
    let out = store.out();
    let output = store.run("restore", &last, &["--to", text(&out)]);
    assert_eq!(output.status, 0, "{}", output.stderr);
    assert_eq!(files_below(&out).len(), 10);
    let socket = store.dir.path().join("socket");
    let output = store.run("export", &last, &["--socket", text(&socket)]);
    assert_eq!(output.status, 1);
    let limit = "requires 600 open images, but the limit is 512. Name one disk";
    assert!(output.stderr.contains(limit), "{}", output.stderr);
}

#[test]
fn overwriting_a_device_requires_the_date_and_time_of_a_backup() {
    let store = Store::new();
    let device = LoopDevice::attach(&store.dir.path().join("device"), SIZE);
    let disk = format!("vda={}", device.device().display());
    let file = store.out().join("vda.qcow2");
    fs::write(&file, "mine").unwrap();
    for arguments in [
        ["--disk", &disk, "--json"],
        ["--to", text(&store.out()), "--force"],
    ] {
        let output = store.run("restore", "20261102", &arguments);
        assert_eq!(output.status, 2, "{}", output.stderr);
        assert!(output.stderr.contains("its date and time"), "{}", output.stderr);
    }
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    assert_eq!(files_below(&store.out()), ["vda.qcow2"]);
    let out = store.out();
    store
        .run("restore", "20261102T000000Z", &["--to", text(&out), "--force"])
        .expect_success();
}

#[test]
fn a_restore_that_does_not_fit_leaves_no_residue() {
    let store = Store::new();
    let small = Tmpfs::mount(&store.dir.path().join("small"), 4 * MIB);
    for format in ["qcow2", "raw"] {
        let output = store.run(
            "restore",
            SECOND,
            &["--to", text(small.path()), "--format", format],
        );
        assert_eq!(output.status, 1, "{}", output.stderr);
        assert!(output.stderr.contains("no space left"), "{}", output.stderr);
        assert_eq!(files_below(small.path()), [""; 0]);
    }
}

#[test]
fn a_backup_is_found_by_the_beginning_of_its_id() {
    let store = Store::new();
    let out = store.out();
    for (backup, words) in [
        ("2026", "Use a longer prefix"),
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
    // In a separate process: a file that this process had open for writing while another thread forks cannot be
    // executed.
    run("cp", &[env!("CARGO_BIN_EXE_backupctl"), text(&copy)]).expect_success();
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
        "a missing right is not damage: {}",
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
fn a_backup_under_change_is_not_read() {
    let store = Store::new();
    let out = store.out();
    let opened = store::open_users(&store.path()).unwrap();
    let backup = opened.open(name(FULL)).unwrap().unwrap();
    let held = backup.lock(LockKind::Exclusive).unwrap();
    for (command, arguments) in [("restore", ["--to", text(&out)].as_slice()), ("verify", &[])] {
        let output = store.run(command, FIRST, arguments);
        assert_eq!(output.status, 1, "{}", output.stderr);
        let said = format!("{}{}", output.stdout, output.stderr);
        assert!(said.contains("it is in use: another job or program"), "{said}");
    }
    drop(held);
    store
        .run("restore", FIRST, &["--to", text(&out)])
        .expect_success();
}

/// A QEMU that still has the image open can write to it at any time.
#[test]
fn a_header_exchanged_after_its_check_exposes_no_other_file() {
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
    let opened = store::open_users(&store.path()).unwrap();
    let chain = Chain::open(&*opened, name(FULL), Some(&["vda"])).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let disk = runtime.block_on(chain.disks()[0].open()).unwrap();
    write_at(&store.vda(FULL), 0, &fs::read(&made).unwrap());
    let target = store.out().join("target");
    let file = fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&target)
        .unwrap();
    let (progress, cancel) = (Progress::default(), CancellationToken::new());
    let written = AtomicBool::new(false);
    let control = Control {
        progress: &progress,
        cancel: &cancel,
        stall: Duration::from_secs(60),
    };
    let output = Output {
        file: file.into(),
        format: Format::Raw,
        kept: false,
        written: &written,
    };
    let restored = runtime.block_on(image::restore(&disk, output, control));
    let Err(image::Error::Damaged(finding)) = restored else {
        panic!("{restored:?}");
    };
    assert_eq!(finding.fault, Fault::Exchanged);
    assert_eq!(target.metadata().unwrap().blocks(), 0);
}

#[test]
fn an_interrupted_restore_leaves_no_residue() {
    let store = Store::new();
    let out = store.out();
    // It never responds, so the restore stays in the middle.
    let hanging = StandIn::new(store.dir.path(), "qemu-storage-daemon", HANGS);
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
        .env("PATH", hanging.path());
    let mut restore = Process::start("restore", store.dir.path(), command);
    let child = hanging.wait_for_start();
    assert_eq!(files_below(&out), [""; 0]);
    restore.signal(Signal::INT);
    assert_eq!(restore.wait(), 3, "{}", restore.log());
    assert_eq!(files_below(&out), [""; 0]);
    wait_for_end(child);
}

#[test]
fn missing_programs_are_named_in_the_error() {
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
