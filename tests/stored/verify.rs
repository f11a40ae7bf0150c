//! Stored backups, verified by `backupctl` alone: it finds exactly the damaged ones and their dependents.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::common::made::{
    ALL, DIFFERENTIAL, FIRST, FULL, MIB, SECOND, SIZE, Store, backupctl, run, text, write_at,
};
use crate::common::process::{self, Output, Process};
use crate::common::stand_in::{IS_KILLED, STOPS_AND_FINDS_NOTHING, StandIn, go_on};
use crate::common::storage::files_below;
use serde_json::Value;

#[test]
fn good_backups_pass_the_verification() {
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
    assert!(one.contains("has no digest"), "{one}");
}

/// Returns the state of each backup after `verify --all`, and the output.
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

/// Damages a store and checks that exactly the backups in `damaged` are reported, with `words`. Restoring the last
/// incremental returns `status`.
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

#[test]
fn a_flipped_bit_is_found_with_all_dependents() {
    damage(
        "the checksum of its image differs",
        &[FIRST, SECOND],
        0,
        |store| {
            let image = store.vda(FIRST);
            let end = image.metadata().unwrap().len();
            write_at(&image, end - 1, &[0x77]);
        },
    );
    damage("the checksum of its image differs", &ALL, 0, |store| {
        write_at(&store.backup(FULL).join("vdb.raw"), 5000, &[1]);
    });
}

#[test]
fn a_file_that_was_cut_short_or_is_gone_is_found() {
    damage("bytes, but its manifest records", &ALL, 5, |store| {
        let image = fs::File::options().write(true).open(store.vda(FULL)).unwrap();
        image.set_len(image.metadata().unwrap().len() - 65536).unwrap();
    });
    damage("its image vda.qcow2 is missing", &[FIRST, SECOND], 5, |store| {
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
    damage("is not in the store", &[FIRST, SECOND], 5, |store| {
        fs::remove_dir_all(store.backup(FULL)).unwrap();
        fs::remove_dir_all(store.backup(DIFFERENTIAL)).unwrap();
    });
    damage("it depends on itself", &[FIRST, SECOND], 5, |store| {
        store.change_manifest(FIRST, |manifest| {
            manifest["disks"][0]["parent"]["backup"] = SECOND.into();
        });
    });
    damage("does not contain", &[FIRST, SECOND], 5, |store| {
        store.change_manifest(FIRST, |manifest| {
            manifest["disks"][0]["parent"]["file"] = "vdz.qcow2".into();
        });
    });
    damage("its manifest is invalid", &[FIRST, SECOND], 5, |store| {
        fs::write(store.backup(FIRST).join("manifest.json"), "{").unwrap();
    });
    damage("belongs to another backup", &[FIRST, SECOND], 5, |store| {
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
        "gives its backing file the format 'raw'",
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
    damage("is not a qcow2 image", &[FIRST, SECOND], 5, |store| {
        write_at(&store.vda(FIRST), 0, b"RAW!");
        store.record(FIRST);
    });
    damage("has a virtual size of", &[FIRST, SECOND], 5, |store| {
        store.change_manifest(FIRST, |manifest| {
            manifest["disks"][0]["virtual-size"] = (SIZE - 512).into()
        });
    });
}

#[test]
fn a_qemu_img_that_is_killed_says_nothing_about_an_image() {
    let store = Store::new();
    let killed = StandIn::new(store.dir.path(), "qemu-img", IS_KILLED);
    let verify = || {
        let mut verify = backupctl();
        verify.args(["verify", "--all", "--from", text(&store.path())]);
        verify.env("PATH", killed.path());
        process::run(verify)
    };
    let unknown = verify();
    assert_eq!(unknown.status, 1, "{}{}", unknown.stdout, unknown.stderr);
    assert!(
        unknown.stdout.contains("0 good, 0 damaged, 4 unknown"),
        "{}",
        unknown.stdout
    );
    killed.remove();
    assert!(verify().expect_success().contains("4 good, 0 damaged, 0 unknown"));
}

#[test]
fn a_backup_removed_during_a_verification_is_not_damaged() {
    let store = Store::new();
    // While the first image is checked, the next backup is removed, as a rule would.
    let stopped = StandIn::new(store.dir.path(), "qemu-img", STOPS_AND_FINDS_NOTHING);
    let mut verify = backupctl();
    verify.args(["verify", "--all", "--from", text(&store.path())]);
    verify.env("PATH", stopped.path());
    let mut verify = Process::start("verify", store.dir.path(), verify);
    let first = stopped.wait_for_stop();
    let removed = format!(".{DIFFERENTIAL}.removed");
    let removed = store.backup(DIFFERENTIAL).with_file_name(removed);
    fs::rename(store.backup(DIFFERENTIAL), removed).unwrap();
    stopped.remove();
    go_on(first);
    assert_eq!(verify.wait(), 0, "{}{}", verify.stdout(), verify.log());
    let said = verify.stdout();
    assert!(
        said.contains("3 good, 0 damaged, 0 unknown, 1 removed during the check"),
        "{said}"
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
