//! Tests of the fixture itself, without the service.

use crate::common::bus::Bus;
use crate::common::clients::{Clients, OTHER_USER, USER};
use crate::common::disk::{Disk, Kind};
use crate::common::polkit::{self, POLKIT_NAME, Polkit};
use crate::common::process::Output;
use crate::common::storage::{self, LoopDevice, Tmpfs};
use crate::common::vm::Builder;
use crate::common::{System, test_directory};
use serde_json::json;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

/// Asks polkit as an ordinary user about that user, without interaction.
fn check(clients: &Clients, uid: u32, action: &str) -> Output {
    let script = r#"exec gdbus call --system --dest org.freedesktop.PolicyKit1 \
        --object-path /org/freedesktop/PolicyKit1/Authority \
        --method org.freedesktop.PolicyKit1.Authority.CheckAuthorization \
        "('unix-process', {'pid': <uint32 $$>, 'start-time': <uint64 0>})" "$1" "{}" 0 ''"#;
    clients.run(uid, "sh", &["-c", script, "sh", action])
}

/// polkit's reply is `(is_authorized, is_challenge, details)`.
#[track_caller]
fn assert_answer(clients: &Clients, uid: u32, action: &str, expected: &str) {
    let output = check(clients, uid, &format!("org.example.backup1.{action}"));
    let answer = output.clone().expect_success();
    assert!(answer.starts_with(expected), "{action}: {output:?}");
}

#[test]
fn an_ordinary_user_may_look_and_not_back_up() {
    let system = System::setup().without_daemon().start();
    assert_answer(system.clients(), USER, "domain.getattr", "((true, false");
    assert_answer(system.clients(), USER, "domain.backup", "((false, true");
}

#[test]
fn a_rule_allows_one_user_and_no_other() {
    let mut system = System::setup()
        .without_daemon()
        .rules(&polkit::allow(USER, &["domain.backup"]))
        .start();
    assert_answer(system.clients(), USER, "domain.backup", "((true, false");
    assert_answer(system.clients(), OTHER_USER, "domain.backup", "((false, true");

    system.set_rules(&polkit::deny(USER, &["domain.getattr"]));
    assert_answer(system.clients(), USER, "domain.getattr", "((false, false");
    assert_answer(system.clients(), USER, "domain.backup", "((false, true");
}

#[test]
fn polkit_knows_every_action_of_the_policy_and_can_be_taken_away() {
    let mut system = System::setup().without_daemon().start();
    let actions = system
        .clients()
        .gdbus_call(
            USER,
            POLKIT_NAME,
            "/org/freedesktop/PolicyKit1/Authority",
            "org.freedesktop.PolicyKit1.Authority.EnumerateActions",
            &[""],
        )
        .expect_success();
    let text = std::fs::read_to_string(crate::common::bus::project_file(
        "polkit/org.example.backup1.policy",
    ))
    .unwrap();
    let ids: Vec<&str> = text
        .split("<action id=\"")
        .skip(1)
        .map(|rest| rest.split('"').next().unwrap())
        .collect();
    assert_eq!(ids.len(), backupd::access::TABLE.len());
    for id in ids {
        assert!(actions.contains(&format!("'{id}'")), "{id} in {actions}");
    }

    system.stop_polkit();
    assert!(!check(system.clients(), USER, "org.example.backup1.domain.getattr").success());
}

#[test]
fn only_root_may_own_the_name() {
    let system = System::setup().without_daemon().start();
    let request = |uid| {
        let object = "/org/freedesktop/DBus";
        let method = "org.freedesktop.DBus.RequestName";
        system.clients().gdbus_call(
            uid,
            "org.freedesktop.DBus",
            object,
            method,
            &["org.example.Backup1", "0"],
        )
    };
    request(crate::common::clients::ROOT).expect_success();
    let refused = request(USER);
    assert!(refused.stderr.contains("AccessDenied"), "{refused:?}");
}

#[test]
fn polkitd_ends_with_its_bus() {
    let dir = test_directory();
    let mut bus = Bus::start(dir.path());
    let mut polkit = Polkit::start(&bus, dir.path(), "");
    bus.kill();
    polkit.process().unwrap().wait();
}

#[tokio::test]
async fn this_process_can_connect_to_the_bus() {
    let dir = test_directory();
    let bus = Bus::start(dir.path());
    let connection = bus.connect().await;
    let dbus = zbus::fdo::DBusProxy::new(&connection).await.unwrap();
    let name = connection.unique_name().unwrap().clone();
    assert_eq!(dbus.get_connection_unix_user(name.into()).await.unwrap(), 0);
}

#[test]
fn every_kind_of_disk_is_written_like_a_guest_would() {
    let dir = test_directory();
    let ids = ["vda", "vdb", "vdc", "vdd", "sda", "hda"];
    let mut vm = Builder::new(dir.path(), "kinds")
        .disk(Disk::new("vda", 8 * MIB))
        .disk(Disk::new("vdb", 8 * MIB).raw().throttle_filter())
        .disk(Disk::new("vdc", 8 * MIB).drive_style())
        .disk(Disk::new("vdd", 8 * MIB).slow(64 * MIB))
        .disk(Disk::new("vde", 8 * MIB).read_only().fill(0, MIB, 9))
        .disk(Disk::new("sda", 8 * MIB).kind(Kind::Scsi))
        .disk(Disk::new("hda", 8 * MIB).kind(Kind::Ide).drive_style())
        .disk(Disk::empty_cdrom("cd0"))
        .start();
    for (number, id) in ids.iter().enumerate() {
        vm.write(id, MIB, MIB, number as u8 + 1);
    }
    vm.flush("vda");
    vm.quit();
    for (number, id) in ids.iter().enumerate() {
        let (path, format) = (vm.source_path(id), vm.source_format(id));
        assert!(storage::holds(path, format, MIB, MIB, number as u8 + 1), "{id}");
        assert!(storage::holds(path, format, 0, MIB, 0), "{id}");
        assert!(!storage::holds(path, format, 0, 2 * MIB, 0), "{id}");
    }
    assert!(storage::holds(vm.source_path("vde"), "qcow2", 0, MIB, 9));
}

#[test]
fn residue_equals_itself_and_shows_what_is_added() {
    let dir = test_directory();
    let vm = Builder::new(dir.path(), "web")
        .disk(Disk::new("vda", 8 * MIB))
        .start();
    let before = vm.residue();
    assert_eq!(before.nodes, ["vda-file", "vda-format"]);
    assert_eq!(vm.residue(), before);

    vm.qmp(
        "block-dirty-bitmap-add",
        json!({ "node": "vda-format", "name": "b0" }),
    );
    vm.qmp(
        "blockdev-add",
        json!({ "driver": "null-co", "node-name": "n0", "size": 8 * MIB }),
    );
    let backup = json!({
        "job-id": "j0", "device": "vda-format", "target": "n0", "sync": "full", "auto-dismiss": false
    });
    vm.qmp("blockdev-backup", backup);
    let ended = vm.wait_event("JOB_STATUS_CHANGE", |data| {
        data["id"] == "j0" && data["status"] == "concluded"
    });
    assert!(ended["timestamp"].is_object());
    let with = vm.residue();
    assert_eq!(
        (with.jobs, with.bitmaps),
        (vec!["j0".to_owned()], vec!["vda-format/b0".to_owned()])
    );

    vm.qmp("job-dismiss", json!({ "id": "j0" }));
    vm.qmp("blockdev-del", json!({ "node-name": "n0" }));
    vm.qmp(
        "block-dirty-bitmap-remove",
        json!({ "node": "vda-format", "name": "b0" }),
    );
    assert_eq!(vm.residue(), before);
}

#[test]
fn two_vms_run_at_once_and_refusals_are_reported() {
    let dir = test_directory();
    let one = Builder::new(dir.path(), "one")
        .disk(Disk::new("vda", MIB))
        .start();
    let mut two = Builder::new(dir.path(), "two")
        .disk(Disk::new("vda", MIB))
        .running()
        .start();
    one.write("vda", 0, MIB, 1);
    two.write("vda", 0, MIB, 2);
    assert_eq!(one.qmp("query-status", json!({}))["running"], false);
    assert_eq!(two.qmp("query-status", json!({}))["running"], true);
    assert_eq!(one.qmp("query-name", json!({}))["name"], "one");
    assert_eq!(one.qmp("query-uuid", json!({}))["UUID"], one.uuid());
    let refused = one.try_qmp("job-dismiss", json!({ "id": "none" })).unwrap_err();
    assert_eq!(refused["class"], "GenericError");
    drop(one.monitor_stream());
    two.kill();
}

#[test]
fn different_images_are_distinguished() {
    let dir = test_directory();
    let mut vm = Builder::new(dir.path(), "web")
        .disk(Disk::new("vda", 4 * MIB).fill(0, MIB, 7))
        .disk(Disk::new("vdb", 4 * MIB).raw().fill(0, MIB, 7))
        .start();
    vm.quit();
    let (vda, vdb) = (vm.source_path("vda"), vm.source_path("vdb"));
    assert!(storage::identical(vda, "qcow2", vdb, "raw"));
    drop(
        Builder::new(dir.path(), "again")
            .disk(Disk::new("vdb", 0).raw().at(vdb).fill(MIB, 512, 1))
            .start(),
    );
    assert!(!storage::identical(vda, "qcow2", vdb, "raw"));
    assert!(storage::files_below(dir.path()).contains(&"web/vda.qcow2".to_owned()));
}

#[test]
fn small_file_systems_and_block_devices_come_and_go() {
    let dir = test_directory();
    let mounted = || {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        mounts.contains(dir.path().to_str().unwrap())
    };
    let tmpfs = Tmpfs::mount(&dir.path().join("small"), MIB);
    assert!(mounted());
    std::fs::write(tmpfs.path().join("large"), vec![1; 2 << 20]).unwrap_err();
    drop(tmpfs);
    assert!(!mounted());

    let backing = dir.path().join("backing");
    let device = LoopDevice::attach(&backing, 4 * MIB);
    let mut vm = Builder::new(dir.path(), "web")
        .disk(Disk::new("vda", 4 * MIB).raw().at(device.device()))
        .start();
    vm.write("vda", MIB, MIB, 5);
    vm.quit();
    assert!(storage::holds(&backing, "raw", MIB, MIB, 5));
}

/// Directories of modules that the programs share or include.
const PARTS: [&str; 4] = ["common", "endurance", "fuzz", "power_cuts"];

/// Returns the Rust files and the directories in a directory.
fn entries(directory: &Path) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let entries = std::fs::read_dir(directory).unwrap();
    let (directories, files): (Vec<_>, Vec<_>) = entries
        .map(|entry| entry.unwrap().path())
        .partition(|path| path.is_dir());
    let is_rust = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "rs");
    (files.into_iter().filter(is_rust).collect(), directories)
}

fn stem(path: &Path) -> &str {
    path.file_stem().unwrap().to_str().unwrap()
}

/// The tests of a file that is part of no program would never run.
#[test]
fn every_file_of_tests_is_part_of_a_program() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let modules = std::fs::read_to_string(root.join("tests/main.rs")).unwrap();
    let (programs, directories) = entries(&root.join("tests"));
    for program in programs {
        let path = format!("path = \"tests/{}.rs\"", stem(&program));
        assert!(
            manifest.contains(&path),
            "{} is no program of Cargo.toml",
            program.display()
        );
    }
    let mut found = 0;
    for directory in directories {
        let (files, _) = entries(&directory);
        if PARTS.contains(&stem(&directory)) || files.is_empty() {
            continue;
        }
        let block = modules.split_once(&format!("\nmod {} {{\n", stem(&directory)));
        let (_, block) = block.unwrap_or_else(|| panic!("{} is not in tests/main.rs", directory.display()));
        let block = block.split("\n}").next().unwrap();
        for file in files {
            found += 1;
            let module = format!("mod {};", stem(&file));
            assert!(
                block.lines().any(|line| line.trim() == module),
                "{} is not in tests/main.rs",
                file.display()
            );
        }
    }
    assert!(found > 70, "{found} files are found");
}
