//! A crash of the client or of the service leaves no QEMU process, no lock and no staging file.

use std::fs;

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::chain::{directories, id};
use crate::common::disk::Disk;
use crate::common::made::{FIRST, Store, backupctl, run, text};
use crate::common::process::{self, Process};
use crate::common::proxies::Options;
use crate::common::stand_in::{HANGS, StandIn, wait_for_end};
use crate::common::storage::{files_below, identical};
use crate::common::wait;
use rustix::process::Signal;
use zbus::wire::Variant;

#[test]
fn a_client_that_dies_leaves_no_process_and_no_file() {
    for (program, command) in [("qemu-storage-daemon", "restore"), ("qemu-img", "verify")] {
        for signal in [Signal::HUP, Signal::TERM, Signal::KILL] {
            let store = Store::new();
            let hanging = StandIn::new(store.dir.path(), program, HANGS);
            let out = store.out();
            // The shell that runs the tests may ignore SIGHUP (nohup), and the client would ignore it, too.
            let mut client = process::bound("env");
            client
                .args(["--default-signal=HUP", env!("CARGO_BIN_EXE_backupctl")])
                .args([command, FIRST, "--from", text(&store.path())])
                .env("PATH", hanging.path());
            if command == "restore" {
                client.args(["--to", text(&out)]);
            }
            let mut client = Process::start("client", store.dir.path(), client);
            let pid = hanging.wait_for_start();
            client.signal(signal);
            let status = client.wait();
            if signal != Signal::KILL {
                assert_eq!(status, 3, "{signal:?}: {}", client.log());
            }
            wait_for_end(pid);
            assert_eq!(files_below(&out), [""; 0], "{command} {signal:?}");
            let again = store.run("restore", FIRST, &["--to", text(&out)]);
            assert_eq!(again.status, 0, "{}", again.stderr);
            assert!(identical(
                &out.join("vda.qcow2"),
                "qcow2",
                &store.vda(FIRST),
                "qcow2"
            ));
        }
    }
}

#[test]
fn a_hangup_that_was_ignored_at_the_start_stays_ignored() {
    let store = Store::new();
    let hanging = StandIn::new(store.dir.path(), "qemu-storage-daemon", HANGS);
    let mut client = process::bound("nohup");
    client
        .arg(env!("CARGO_BIN_EXE_backupctl"))
        .args([
            "restore",
            FIRST,
            "--from",
            text(&store.path()),
            "--to",
            text(&store.out()),
        ])
        .env("PATH", hanging.path());
    let mut client = Process::start("client", store.dir.path(), client);
    hanging.wait_for_start();
    let status = fs::read_to_string(format!("/proc/{}/status", client.pid())).unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = u64::from_str_radix(mask.unwrap().trim(), 16).unwrap();
    assert_eq!(mask & 1, 1, "signal 1, SIGHUP, is ignored");
    client.signal(Signal::TERM);
    assert_eq!(client.wait(), 3, "{}", client.log());
}

#[test]
fn a_socket_that_nobody_listens_on_any_more_is_replaced() {
    let store = Store::new();
    let socket = store.dir.path().join("socket");
    let serve = || {
        let mut export = backupctl();
        export.args([
            "export",
            FIRST,
            "--from",
            text(&store.path()),
            "--socket",
            text(&socket),
        ]);
        Process::start("export", store.dir.path(), export)
    };
    let mut killed = serve();
    wait::until("the disk to be served", || {
        (killed.stdout().lines().count() == 1).then_some(())
    });
    let mut second = serve();
    assert_eq!(
        second.wait(),
        2,
        "one that is served is not taken: {}",
        second.log()
    );
    killed.signal(Signal::KILL);
    killed.wait();
    assert!(socket.exists());
    let mut next = serve();
    wait::until("the disk to be served again", || {
        (next.stdout().lines().count() == 2).then_some(())
    });
    let uri = next.stdout().lines().last().unwrap().to_owned();
    run(
        "qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "qcow2",
            &uri,
            text(&store.vda(FIRST)),
        ],
    )
    .expect_success();
    next.signal(Signal::TERM);
    assert_eq!(next.wait(), 0, "{}", next.log());
    assert!(!socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_dies_leaves_no_process() {
    let place = crate::common::test_directory();
    let hanging = StandIn::new(place.path(), "qemu-storage-daemon", HANGS);
    let mut system = System::setup().environment("PATH", &hanging.path()).start();
    let disk = Disk::new("vda", 1 << 20).fill(0, 1 << 20, 0x11);
    let _vm = system.configured(system.vm("web").disk(disk).running());
    let root = Caller::new(&system).await;
    root.complete("web", "").await;
    let [full] = directories(&system.store().join("web")).try_into().unwrap();
    let backup = root.manager.get_backup(&id(&full)).await.unwrap();
    let file = tempfile::tempfile().unwrap();
    let targets = [("vda", zbus::Fd::from(&file))];
    let options = Options::from([("format", Variant::from("raw"))]);
    let (service, interface) = (Some("org.example.Backup1"), Some("org.example.Backup1.Backup"));
    root.connection
        .call_method(
            service,
            &backup,
            interface,
            "Restore",
            &(targets.as_slice(), options),
        )
        .await
        .unwrap();
    let pid = hanging.wait_for_start();
    tokio::task::block_in_place(|| system.kill_daemon());
    wait_for_end(pid);
}
