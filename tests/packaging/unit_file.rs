//! systemd accepts the unit, its sandbox has the documented exposure, and `systemd/README.md` describes every key.
//! `make test-system` tests the service in that sandbox.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::bus::project_file;
use crate::common::{process, test_directory};
use backupd::targets::LOOK_VARIABLE;
use serde::Deserialize;

/// In tenths, as systemd-analyze counts it.
const MOST_EXPOSURE: &str = "13";

/// One line of `systemd-analyze security`. A setting that does not apply to the unit is neither set nor unset.
#[derive(Debug, Deserialize)]
struct Key {
    name: String,
    set: Option<bool>,
    exposure: Option<String>,
}

fn read(path: &str) -> String {
    fs::read_to_string(project_file(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Writes the unit as it is installed, except for the paths of the programs.
fn unit_in(dir: &Path) -> PathBuf {
    installed(dir, "backupd.service")
}

fn installed(dir: &Path, unit: &str) -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_backupd")).parent().unwrap();
    let path = dir.join(unit);
    let mut text = read(&format!("systemd/{unit}"));
    for directory in ["@libexecdir@", "@bindir@"] {
        text = text.replace(directory, built.to_str().unwrap());
    }
    fs::write(&path, text).unwrap();
    path
}

fn analyze(arguments: &[&str], unit: &Path) -> process::Output {
    let mut command = Command::new("systemd-analyze");
    command.args(arguments).arg(unit).env("SYSTEMD_PAGER", "");
    process::run(command)
}

fn keys_of_systemd_analyze(unit: &str) -> Vec<Key> {
    let dir = test_directory();
    let json = analyze(
        &["security", "--offline=yes", "--json=short"],
        &installed(dir.path(), unit),
    )
    .expect_success();
    let keys: Vec<Key> = serde_json::from_str(&json).unwrap();
    assert!(keys.len() > 50, "{keys:?}");
    keys
}

/// Returns the keys of the unit that restrict the service: all from the files section on, except those of `[Install]`.
fn keys_of_the_sandbox() -> BTreeSet<String> {
    let unit = read("systemd/backupd.service");
    let (_, sandbox) = unit
        .split_once("# --- Files ---")
        .expect("the unit has its sections");
    let (sandbox, _) = sandbox
        .split_once("[Install]")
        .expect("the unit has its sections");
    let lines = sandbox.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.split_once('='))
        .map(|(key, _)| key.to_owned())
        .collect()
}

/// The part of `systemd/README.md` below a heading.
fn section(heading: &str) -> String {
    let readme = read("systemd/README.md");
    let (_, section) = readme
        .split_once(&format!("\n## {heading}\n"))
        .unwrap_or_else(|| panic!("there is no section {heading}"));
    section.split("\n## ").next().unwrap().to_owned()
}

#[test]
fn systemd_finds_nothing_wrong_with_the_unit() {
    let dir = test_directory();
    installed(dir.path(), "backupd-look.socket");
    installed(dir.path(), "backupd-look@.service");
    // It succeeds whatever it reports. Missing manual pages are not a fault of the unit.
    let output = analyze(&["verify", "--man=no"], &unit_in(dir.path()));
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("", ""));
}

#[test]
fn systemd_finds_nothing_wrong_with_the_nightly_units() {
    let dir = test_directory();
    let service = installed(dir.path(), "backupd-backup@.service");
    installed(dir.path(), "backupd-backup@.timer");
    for unit in ["backupd-backup@web-1.service", "backupd-backup@web-1.timer"] {
        let output = analyze(&["verify", "--man=no"], &dir.path().join(unit));
        assert_eq!(
            (output.stdout.as_str(), output.stderr.as_str()),
            ("", ""),
            "{unit}"
        );
    }
    analyze(&["security", "--offline=yes", "--threshold=10"], &service).expect_success();
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units_of_the_helper() {
    let dir = test_directory();
    installed(dir.path(), "backupd-look.socket");
    installed(dir.path(), "backupd-look@.service");
    for unit in ["backupd-look.socket", "backupd-look@1.service"] {
        let output = analyze(&["verify", "--man=no"], &dir.path().join(unit));
        assert_eq!(
            (output.stdout.as_str(), output.stderr.as_str()),
            ("", ""),
            "{unit}"
        );
    }
}

#[test]
fn the_helper_may_poll_on_every_architecture() {
    let unit = read("systemd/backupd-look@.service");
    let filters = unit
        .lines()
        .filter_map(|line| line.strip_prefix("SystemCallFilter="));
    let calls: BTreeSet<&str> = filters.flat_map(str::split_whitespace).collect();
    // Before main, Rust's standard library aborts if it cannot poll. Architectures without poll have ppoll.
    for call in ["poll", "ppoll", "ppoll_time64"] {
        assert!(calls.contains(call), "{call}");
    }
}

#[test]
fn the_errors_of_the_helper_are_in_the_journal() {
    let unit = read("systemd/backupd-look@.service");
    let value = |key: &str| {
        let mut values = unit
            .lines()
            .filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let value = values.next().unwrap_or_else(|| panic!("{key} is not set"));
        let levels = [
            "emerg", "alert", "crit", "err", "warning", "notice", "info", "debug",
        ];
        levels.iter().position(|level| *level == value)
    };
    // Lines on standard error have this level.
    let level = value("SyslogLevel").expect("a level");
    assert!(level <= value("LogLevelMax").expect("a level"));
}

#[test]
fn the_exposure_is_at_most_one_point_three() {
    let dir = test_directory();
    let threshold = format!("--threshold={MOST_EXPOSURE}");
    for unit in ["backupd.service", "backupd-look@.service"] {
        let unit = installed(dir.path(), unit);
        analyze(&["security", "--offline=yes", &threshold], &unit).expect_success();
    }
}

#[test]
fn the_service_asks_at_the_socket_that_its_unit_starts() {
    let service = read("systemd/backupd.service");
    let socket = read("systemd/backupd-look.socket");
    let path = socket.lines().find_map(|line| line.strip_prefix("ListenStream="));
    let asks = format!("Environment={LOOK_VARIABLE}={}", path.unwrap());
    let starts = ["Wants=backupd-look.socket", "After=backupd-look.socket"];
    for line in starts.into_iter().chain([asks.as_str()]) {
        assert!(service.lines().any(|known| known == line), "{line}");
    }
}

#[test]
fn the_readme_gives_a_reason_for_every_key_that_is_not_set() {
    for (unit, heading) in [
        ("backupd.service", "Settings that would break the service"),
        ("backupd-look@.service", "The helper"),
    ] {
        let section = section(heading);
        let rows: Vec<&str> = section.lines().filter(|line| line.starts_with("| `")).collect();
        for key in keys_of_systemd_analyze(unit) {
            if key.set == Some(true) {
                continue;
            }
            // A bar ends a table's cell.
            let name = format!("| `{}` | ", key.name.replace('|', "\\|"));
            let row = rows.iter().find(|row| row.starts_with(&name));
            let row = row
                .unwrap_or_else(|| panic!("systemd/README.md does not say why {unit} has no {}", key.name));
            let weight = key.exposure.unwrap_or_default();
            assert!(
                row[name.len()..].starts_with(&weight),
                "{row}: systemd-analyze prints {weight}"
            );
        }
    }
}

#[test]
fn the_readme_lists_exactly_the_keys_that_are_set() {
    let readme = read("systemd/README.md");
    let (_, set) = readme.split_once("## Settings\n").expect("the section is there");
    let (set, _) = set.split_once("\n## ").expect("a section follows");
    let told: BTreeSet<String> = set
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split(" | ").next())
        .flat_map(|cell| cell.split(['`', ',']))
        .filter_map(|name| name.trim().split_once('='))
        .map(|(key, _)| key.to_owned())
        .collect();
    let outside: BTreeSet<String> = [
        "StateDirectory",
        "StateDirectoryMode",
        "ConfigurationDirectory",
        "RuntimeDirectory",
        "RuntimeDirectoryPreserve",
        "UMask",
    ]
    .map(str::to_owned)
    .into();
    let unit = read("systemd/backupd.service");
    for key in &outside {
        assert!(unit.contains(&format!("\n{key}=")), "{key}");
    }
    let sandbox: BTreeSet<String> = keys_of_the_sandbox().union(&outside).cloned().collect();
    assert_eq!(told, sandbox);
}

#[test]
fn every_capability_that_is_kept_has_its_reason() {
    for (unit, heading) in [
        ("backupd.service", "Capabilities"),
        ("backupd-look@.service", "The helper"),
    ] {
        let text = read(&format!("systemd/{unit}"));
        let kept = text
            .lines()
            .find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
        let section = section(heading);
        let told: Vec<&str> = section
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
            .filter(|name| name.starts_with("CAP_"))
            .collect();
        assert_eq!(kept.unwrap().split(' ').collect::<Vec<_>>(), told, "{unit}");
    }
}

#[test]
fn the_manual_and_the_readmes_name_the_places_that_can_be_written() {
    let unit = read("systemd/backupd.service");
    let places = unit.lines().find_map(|line| line.strip_prefix("ReadWritePaths="));
    let places: Vec<&str> = places
        .unwrap()
        .split(' ')
        .map(|path| path.trim_start_matches('-'))
        .collect();
    assert!(places.len() > 3, "{places:?}");
    for document in ["docs/man/backupd.8", "systemd/README.md", "README.md"] {
        let text = read(document);
        for place in &places {
            assert!(text.contains(place), "{document} does not name {place}");
        }
    }
}
