//! An idle service does nothing: it waits for events and polls nothing.

mod common;

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::System;
use common::caller::Caller;
use common::peer::{Imposter, Peer};
use common::wait;

const DOMAINS: usize = 200;
/// How often the service retries an absent monitor before it waits for events only.
const TRIES: usize = 5;
/// How long the idle service is observed.
const WATCHED: Duration = Duration::from_secs(5);

fn monitor(directory: &Path, number: usize) -> PathBuf {
    directory.join(format!("{number}.qmp"))
}

fn name(number: usize) -> String {
    format!("vm{number:03}")
}

/// Returns how often each thread of the service went to sleep, and so was woken up.
fn wakeups(pid: u32) -> HashMap<OsString, u64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of_thread = |thread: fs::DirEntry| {
        // A thread that ends during the scan is not woken up any more.
        let status = fs::read_to_string(thread.path().join("status")).ok()?;
        let mut lines = status.lines();
        let count = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        Some((thread.file_name(), count.trim().parse().unwrap()))
    };
    threads.filter_map(|thread| of_thread(thread.unwrap())).collect()
}

async fn wait_for_state(caller: &Caller, number: usize, state: &str) {
    let what = format!("{} to be {state}", name(number));
    wait::until_async(&what, async || {
        let domains = caller.manager.list_domains().await.unwrap();
        let mut domains = domains.into_iter();
        let (_, _, _, now) = domains.find(|(_, its, _, _)| *its == name(number))?;
        (now == state).then_some(())
    })
    .await;
}

fn tries(system: &mut System) -> usize {
    let log = system.daemon().process().log();
    log.lines()
        .filter(|line| line.contains("monitor is down"))
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn absent_monitors_cost_nothing_and_are_connected_when_they_appear() {
    let mut system = System::setup().without_daemon().start();
    let (present, absent) = (system.dir().join("vms"), system.dir().join("not/yet"));
    fs::create_dir(&present).unwrap();
    for number in 0..DOMAINS {
        // Some sockets share a directory, and some have a directory of their own that does not exist either.
        let monitor = match number % 2 {
            0 => monitor(&present, number),
            _ => monitor(&absent.join(number.to_string()), number),
        };
        let file = format!("monitor = \"{}\"\n", monitor.display());
        system.write_domain_file(&name(number), &file);
    }
    // A process listened here earlier.
    drop(std::os::unix::net::UnixListener::bind(monitor(&present, 4)).unwrap());
    system.start_daemon();
    wait::until("every monitor to have been tried", || {
        (tries(&mut system) >= DOMAINS * TRIES).then_some(())
    });
    let pid = system.daemon().process().pid();
    let before = wakeups(pid);
    tokio::time::sleep(WATCHED).await;
    let after = wakeups(pid).into_iter();
    let woken = after.map(|(thread, count)| count - before.get(&thread).unwrap_or(&0));
    let woken: u64 = woken.sum();
    println!("{DOMAINS} absent monitors: woken up {woken} times in {WATCHED:?}");
    assert_eq!(tries(&mut system), DOMAINS * TRIES);

    let caller = Caller::new(&system).await;
    for (number, directory) in [(2, present.clone()), (3, absent.join("3")), (4, present.clone())] {
        let path = monitor(&directory, number);
        fs::create_dir_all(&directory).unwrap();
        // Nothing for the monitor without a listener.
        let _ = fs::remove_file(&path);
        let machine = Imposter::listen(&path, Peer::play_qemu);
        wait_for_state(&caller, number, "running").await;
        // The next socket under the same name is a new one.
        drop(machine);
        fs::remove_file(&path).unwrap();
        wait_for_state(&caller, number, "unreachable").await;
        let _machine = Imposter::listen(&path, Peer::play_qemu);
        wait_for_state(&caller, number, "running").await;
    }
}
