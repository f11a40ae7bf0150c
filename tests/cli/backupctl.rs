//! The command-line client with the real service: its output, the files that it creates, and its exit status.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::common::System;
use crate::common::clients::{OTHER_USER, ROOT, USER};
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::process::Output;
use crate::common::storage::{files_below, identical};
use crate::common::vm::Vm;
use crate::common::wait;
use rustix::process::Signal;
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn machine(system: &System) -> Vm {
    system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", 64 * MIB).fill(0, 16 * MIB, 0x11))
            .disk(Disk::new("vdb", 32 * MIB).raw().fill(0, 4 * MIB, 0x22))
            .disk(Disk::empty_cdrom("cd"))
            .running(),
    )
}

fn root(system: &System, arguments: &[&str]) -> Output {
    system.clients().backupctl(ROOT, arguments)
}

fn json(output: &Output) -> Vec<Value> {
    let lines = output.stdout.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

#[test]
fn create_waits_prints_the_paths_of_the_images_and_exits_with_0() {
    let system = System::start();
    let mut vm = machine(&system);
    let output = root(&system, &["create", "web"]);
    assert_eq!(output.status, 0, "{}", output.stderr);
    assert!(
        output.stdout.contains("Job 1 of web completed"),
        "{}",
        output.stdout
    );
    let files = files_below(&system.store().join("web"));
    let image = files.iter().find(|file| file.ends_with("vda.qcow2")).unwrap();
    let image = system.store().join("web").join(image);
    assert!(
        output.stdout.contains(image.to_str().unwrap()),
        "{}",
        output.stdout
    );
    vm.quit();
    assert!(identical(&image, "qcow2", vm.source_path("vda"), "qcow2"));
}

#[test]
fn images_go_to_a_directory_or_to_files_in_the_format_that_is_asked_for() {
    let system = System::start();
    let mut vm = machine(&system);
    let dir = system.dir().join("images");
    fs::create_dir(&dir).unwrap();
    let output = root(
        &system,
        &["create", "web", "--to", dir.to_str().unwrap(), "--format", "raw"],
    );
    assert_eq!(output.status, 0, "{}", output.stderr);
    assert_eq!(files_below(&dir), ["vda.raw", "vdb.raw"]);
    let file = format!("vdb={}/only & one.qcow2", dir.display());
    let output = root(&system, &["create", "web", "--disk", &file, "--compress", "zstd"]);
    assert_eq!(output.status, 0, "{}", output.stderr);
    let output = root(&system, &["create", "web", "--disk", &file]);
    assert_eq!(output.status, 1);
    assert!(output.stderr.contains("exists already"), "{}", output.stderr);
    vm.quit();
    for disk in ["vda", "vdb"] {
        let image = dir.join(format!("{disk}.raw"));
        assert!(
            identical(&image, "raw", vm.source_path(disk), vm.source_format(disk)),
            "{disk}"
        );
    }
    assert!(identical(
        &dir.join("only & one.qcow2"),
        "qcow2",
        vm.source_path("vdb"),
        "raw"
    ));
}

#[test]
fn an_ordinary_user_gets_images_of_its_own() {
    let system = System::setup()
        .rules(&polkit::allow(USER, &["domain.export"]))
        .start();
    let mut vm = machine(&system);
    let dir = system.dir().join("mine");
    fs::create_dir(&dir).unwrap();
    std::os::unix::fs::chown(&dir, Some(USER), Some(USER)).unwrap();
    let arguments = ["create", "web", "--to", dir.to_str().unwrap(), "--own-files"];
    let output = system.clients().backupctl(USER, &arguments);
    assert_eq!(output.status, 0, "{}", output.stderr);
    assert_eq!(fs::metadata(dir.join("vda.qcow2")).unwrap().uid(), USER);
    let other = system
        .clients()
        .backupctl(OTHER_USER, &["create", "web", "--no-ask-password"]);
    assert_eq!(other.status, 4, "{}", other.stderr);
    vm.quit();
    assert!(identical(
        &dir.join("vda.qcow2"),
        "qcow2",
        vm.source_path("vda"),
        "qcow2"
    ));
}

#[test]
fn a_definition_is_passed_as_it_is_and_dumped_as_it_was_resolved() {
    let system = System::start();
    let _vm = machine(&system);
    let definition = system.dir().join("nightly.xml");
    let text = "<domainbackup><name>nightly</name><disks><disk name='vdb'/></disks></domainbackup>";
    fs::write(&definition, text).unwrap();
    let output = root(
        &system,
        &["create", "web", "--definition", definition.to_str().unwrap()],
    );
    assert_eq!(output.status, 0, "{}", output.stderr);
    let dumped = root(&system, &["dump", "1"]).expect_success();
    for words in [
        "<name>nightly</name>",
        "<store name='default'/>",
        "<disk name='vda' backup='no'/>",
    ] {
        assert!(dumped.contains(words), "{dumped}");
    }
    fs::write(&definition, "<domainbackup>\n<disk/>\n</domainbackup>").unwrap();
    let output = root(
        &system,
        &["create", "web", "--definition", definition.to_str().unwrap()],
    );
    assert_eq!(output.status, 1);
    assert!(output.stderr.contains("line 2, column 1"), "{}", output.stderr);
}

#[test]
fn a_dumped_definition_has_references_for_invisible_characters_and_is_the_same_document() {
    let system = System::start();
    let _vm = machine(&system);
    let dir = system.dir().join("a\u{202e}\u{200b}\u{2028}\u{feff}\u{e0001}b");
    fs::create_dir(&dir).unwrap();
    let image = dir.join("vda.qcow2");
    let definition = system.dir().join("backup.xml");
    let text = format!(
        "<domainbackup><disks><disk name='vda'><target file='{}'/></disk></disks></domainbackup>",
        image.display()
    );
    fs::write(&definition, text).unwrap();
    let create = ["create", "web", "--definition", definition.to_str().unwrap()];
    root(&system, &create).expect_success();
    let dumped = root(&system, &["dump", "1"]).expect_success();
    assert!(
        dumped.contains("/a&#x202e;&#x200b;&#x2028;&#xfeff;&#xe0001;b/vda.qcow2"),
        "{dumped}"
    );
    let shown = |c: char| c == '\n' || !backupd::text::is_invisible(c);
    assert!(dumped.chars().all(shown), "{dumped:?}");
    fs::remove_file(&image).unwrap();
    fs::write(&definition, dumped).unwrap();
    root(&system, &create).expect_success();
    assert!(image.exists());
}

#[test]
fn lists_are_printed_as_text_and_as_json() {
    let system = System::start();
    let vm = machine(&system);
    let domains = root(&system, &["domains"]).expect_success();
    assert!(
        domains.contains("web") && domains.contains(vm.uuid()),
        "{domains}"
    );
    root(&system, &["create", "web"]).expect_success();
    let jobs = root(&system, &["jobs"]).expect_success();
    assert!(jobs.contains("web") && jobs.contains("completed"), "{jobs}");
    let shown = root(&system, &["show", "1"]).expect_success();
    assert!(shown.contains("vda") && shown.contains("completed"), "{shown}");
    for arguments in [
        &["--json", "domains"][..],
        &["--json", "jobs"],
        &["--json", "show", "1"],
    ] {
        let output = root(&system, arguments);
        assert_eq!(output.status, 0, "{}", output.stderr);
        assert!(output.stdout.contains("\"web\""), "{}", output.stdout);
        serde_json::from_str::<Value>(&output.stdout).unwrap();
    }
    let events = json(&root(&system, &["--json", "create", "web"]));
    assert_eq!(events.first().unwrap()["event"], "started");
    assert_eq!(events.last().unwrap()["event"], "result");
    assert_eq!(events.last().unwrap()["result"], "completed");
}

#[test]
fn errors_have_their_exit_status_and_a_hint() {
    let system = System::start();
    let _vm = machine(&system);
    let unknown = root(&system, &["create", "ghost"]);
    assert_eq!(unknown.status, 1);
    assert!(
        unknown.stderr.contains("no domain") && unknown.stderr.contains("backupctl domains"),
        "{}",
        unknown.stderr
    );
    assert_eq!(root(&system, &["create"]).status, 2);
    assert_eq!(
        root(&system, &["create", "web", "--store", "a", "--to", "/b"]).status,
        2
    );
    assert_eq!(root(&system, &["show", "99"]).status, 1);
    let denied = system
        .clients()
        .backupctl(USER, &["--json", "create", "web", "--no-ask-password"]);
    assert_eq!(denied.status, 4);
    let error: Value = serde_json::from_str(denied.stderr.lines().next().unwrap()).unwrap();
    assert_eq!(
        error["error"],
        "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
    );
}

#[test]
fn a_detached_backup_is_watched_and_cancelled_from_elsewhere() {
    let system = System::start();
    let vm = machine(&system);
    let before = vm.residue();
    let detached = root(&system, &["create", "web", "--bandwidth", "1M", "--detach"]);
    assert_eq!(detached.status, 0, "{}", detached.stderr);
    assert!(detached.stdout.contains('1'), "{}", detached.stdout);
    let mut watch = system.clients().start_backupctl("watch", ROOT, &["watch", "1"]);
    wait::until("the watcher to see it run", || {
        let running = watch.log().contains("running") || watch.stdout().contains("running");
        running.then_some(())
    });
    assert_eq!(root(&system, &["speed", "1", "2M"]).status, 0);
    let cancelled = root(&system, &["cancel", "1"]);
    assert_eq!(cancelled.status, 0, "{}", cancelled.stderr);
    assert_eq!(watch.wait(), 3, "{}", watch.log());
    assert_eq!(vm.residue(), before);
    assert_eq!(files_below(&system.store()), [""; 0]);
}

#[test]
fn a_waiting_backupctl_reports_the_end_after_a_service_restart() {
    for killed in [true, false] {
        let mut system = System::start();
        let _vm = machine(&system);
        let clients = system.clients();
        let mut all = clients.start_backupctl("all", ROOT, &["watch", "--json"]);
        let mut create = clients.start_backupctl("create", ROOT, &["create", "web", "--bandwidth", "1M"]);
        wait::until("both to see it run", || {
            let seen = create.log().contains("running") && all.stdout().contains("job-started");
            seen.then_some(())
        });
        match killed {
            true => system.kill_daemon(),
            false => assert_eq!(system.stop_daemon(), Some(0)),
        }
        wait::until("all to see it go", || {
            all.stdout().contains("service-gone").then_some(())
        });
        system.start_daemon();
        wait::until("all to see it come back", || {
            all.stdout().contains("service-back").then_some(())
        });
        assert_eq!(root(&system, &["speed", "1", "0"]).status, 0);
        assert_eq!(create.wait(), 0, "{}", create.log());
        assert!(
            create.log().contains("service has left the bus"),
            "{}",
            create.log()
        );
        wait::until("the end to reach all clients", || {
            all.stdout().contains("job-ended").then_some(())
        });
        all.signal(Signal::INT);
        assert_eq!(all.wait(), 0, "{}", all.log());
        assert_eq!(all.stdout().matches("job-ended").count(), 1, "{}", all.stdout());
    }
}

#[test]
fn an_interrupt_without_a_terminal_cancels_and_a_request_to_end_detaches() {
    let system = System::start();
    let _vm = machine(&system);
    for (number, signal, status, state) in [(1, Signal::INT, 3, "cancelled"), (2, Signal::TERM, 1, "running")]
    {
        let name = format!("create-{number}");
        let mut create =
            system
                .clients()
                .start_backupctl(&name, ROOT, &["create", "web", "--bandwidth", "1M"]);
        wait::until("it to run", || {
            (create.log().contains("running") || create.stdout().contains("running")).then_some(())
        });
        create.signal(signal);
        assert_eq!(create.wait(), status, "{}", create.log());
        let shown = root(&system, &["show", &number.to_string()]).expect_success();
        assert!(shown.contains(state), "{shown}");
    }
    root(&system, &["cancel", "2"]).expect_success();
}
