//! A freeze of the guest's file systems ends within seconds, even if QEMU, the agent or the service fails.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::common::System;
use crate::common::agent::{Agent, Answer};
use crate::common::caller::{Caller, assert_completed, assert_failed};
use crate::common::disk::Disk;
use crate::common::proxies::{JobProxy, Options};
use crate::common::storage::files_below;
use crate::common::vm::{Residue, Vm};
use crate::common::wait;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const QUIESCE_FAILED: &str = "QuiesceFailed";
const FREEZE: &str = "guest-fsfreeze-freeze";
const THAW: &str = "guest-fsfreeze-thaw";
/// Seconds that the agent may take to freeze, and that the guest may be frozen.
const LONGEST: u64 = 1;

struct Scene {
    system: System,
    vm: Vm,
    caller: Caller,
    before: Residue,
}

impl Scene {
    async fn new() -> Self {
        let system = System::setup()
            .table(&format!(
                "[deadlines]\nfreeze-wait-seconds = {LONGEST}\nfreeze-seconds = {LONGEST}"
            ))
            .start();
        let disk = Disk::new("vda", 16 * MIB).fill(0, 4 * MIB, 0x11);
        let vm = system.vm("web").disk(disk).running().start();
        let (monitor, agent) = (vm.monitor_path(), system.dir().join("qga"));
        let text = format!("monitor = {monitor:?}\nagent = {agent:?}\n");
        system.write_domain_file("web", &text);
        system.wait_for_domain("web");
        Self {
            caller: Caller::new(&system).await,
            before: vm.residue(),
            system,
            vm,
        }
    }

    /// Starts an agent that executes every command, after it has passed the command to `hear`.
    fn agent(&self, mut hear: impl FnMut(&str) + Send + 'static) -> Agent {
        Agent::start(&self.system.dir().join("qga"), move |command| {
            hear(command);
            Answer::Proper
        })
    }

    async fn start(&self, mode: &str) -> JobProxy<'static> {
        self.caller.start("web", &quiesce(mode)).await
    }
}

fn quiesce(mode: &str) -> String {
    format!("<domainbackup><quiesce mode='{mode}'/></domainbackup>")
}

async fn manifest(job: &JobProxy<'_>) -> Value {
    let image = PathBuf::from(&job.disks().await.unwrap()[0].4);
    let manifest = std::fs::read(image.with_file_name("manifest.json")).unwrap();
    serde_json::from_slice(&manifest).unwrap()
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
}

/// Stops a process, and returns when all its threads are stopped.
fn stop(pid: u32) {
    signal(pid, Signal::STOP);
    wait::until("the process to be stopped", || {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let mut states = threads.map(|thread| {
            let stat = std::fs::read_to_string(thread.unwrap().path().join("stat")).unwrap();
            stat.rsplit_once(") ").unwrap().1.starts_with('T')
        });
        states.all(|stopped| stopped).then_some(())
    });
}

/// Returns the only child of a service: the guard of the frozen guest.
fn guard_of(service: u32) -> u32 {
    let threads = std::fs::read_dir(format!("/proc/{service}/task")).unwrap();
    let children: Vec<u32> = threads
        .flat_map(|thread| {
            let children = std::fs::read_to_string(thread.unwrap().path().join("children")).unwrap();
            let children = children.split_whitespace().map(|pid| pid.parse().unwrap());
            children.collect::<Vec<_>>()
        })
        .collect();
    let [guard] = children[..] else {
        panic!("{children:?}")
    };
    guard
}

/// Checks that the guard has the log open, but neither the catalog nor a target, which must be closed with the
/// service.
fn assert_holds_nothing_of(guard: u32, directory: &Path) {
    let descriptors = std::fs::read_dir(format!("/proc/{guard}/fd")).unwrap();
    let files = descriptors.filter_map(|descriptor| std::fs::read_link(descriptor.unwrap().path()).ok());
    let files: Vec<_> = files.filter(|file| file.starts_with(directory)).collect();
    assert!(
        files.iter().all(|file| file.ends_with("backupd.log")),
        "{files:?}"
    );
    let command = std::fs::read_to_string(format!("/proc/{guard}/cmdline")).unwrap();
    assert_eq!(command, "backupd\0--thaw-guard\0", "every user can read it");
    let environment = std::fs::read_to_string(format!("/proc/{guard}/environ")).unwrap();
    assert!(environment.starts_with("RUST_LOG="), "{environment}");
}

/// Waits until the agent has received `times` thaw commands; returns all its commands.
fn wait_for_thaw(agent: &Agent, times: usize) -> Vec<String> {
    wait::until("the thaw", || {
        let seen = agent.seen();
        let thaws = seen.iter().filter(|command| *command == THAW).count();
        (thaws >= times).then_some(seen)
    })
}

/// A service that is killed with the guest frozen, and not started again.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_killed_leaves_a_guard_that_thaws() {
    let mut scene = Scene::new().await;
    let times = Arc::new(Mutex::new(Vec::new()));
    let heard = times.clone();
    let agent = scene.agent(move |command| {
        if [FREEZE, THAW].contains(&command) {
            heard.lock().unwrap().push(Instant::now());
        }
    });
    scene.system.stop_daemon();
    scene.system.start_dying_daemon("frozen");
    scene.system.wait_for_domain("web");
    let caller = Caller::new(&scene.system).await;
    // The service may die before it replies.
    let _ = caller
        .try_start("web", &quiesce("require"), &[], Options::new())
        .await;
    scene.system.wait_for_death();
    assert_eq!(wait_for_thaw(&agent, 1), [FREEZE, THAW]);
    let times = times.lock().unwrap();
    let frozen = times[1].duration_since(times[0]).as_secs();
    assert!(frozen < 5, "{frozen} s");
    assert_eq!(backups(&scene.vm), 0, "nothing had begun");
}

/// Between the guard's start and the freeze, only another tool can have frozen the guest.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_killed_before_it_freezes_leaves_a_guard_that_does_not_thaw() {
    let mut scene = Scene::new().await;
    let agent = scene.agent(|_| {});
    scene.system.stop_daemon();
    scene.system.start_dying_daemon("before start");
    scene.system.wait_for_domain("web");
    let caller = Caller::new(&scene.system).await;
    let _ = caller
        .try_start("web", &quiesce("require"), &[], Options::new())
        .await;
    scene.system.wait_for_death();
    // The agent serves one client at a time: when it replies, the guard has disconnected.
    let mut next = UnixStream::connect(agent.path()).unwrap();
    next.write_all(b"{\"execute\": \"guest-fsfreeze-status\"}\n")
        .unwrap();
    let mut answer = String::new();
    BufReader::new(next).read_line(&mut answer).unwrap();
    assert!(answer.contains("thawed"), "{answer}");
    assert_eq!(agent.seen(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_starts_again_does_not_thaw_what_it_did_not_freeze() {
    let mut scene = Scene::new().await;
    let agent = scene.agent(|_| {});
    agent.freeze();
    scene.system.stop_daemon();
    scene.system.start_dying_daemon("after start");
    scene.system.wait_for_domain("web");
    let caller = Caller::new(&scene.system).await;
    let _ = caller
        .try_start("web", &quiesce("try"), &[], Options::new())
        .await;
    scene.system.wait_for_death();
    scene.system.start_daemon();
    let caller = Caller::new(&scene.system).await;
    let job = caller.job(caller.manager.get_job(1).await.unwrap()).await;
    assert_completed(&job).await;
    assert_eq!(agent.seen(), [""; 0]);
    assert!(agent.is_frozen());
}

/// systemd sends the signal to all processes of the service.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_thaws_the_guest_before_it_stops() {
    let mut scene = Scene::new().await;
    let service = scene.system.daemon().pid();
    let agent = scene.agent(move |command| {
        if command == FREEZE {
            let guard = guard_of(service);
            signal(service, Signal::TERM);
            signal(guard, Signal::TERM);
        }
    });
    let _ = scene
        .caller
        .try_start("web", &quiesce("require"), &[], Options::new())
        .await;
    scene.system.wait_for_death();
    assert_eq!(agent.seen(), [FREEZE, THAW]);
    // It was quiesced, and continues.
    scene.system.start_daemon();
    let caller = Caller::new(&scene.system).await;
    let job = caller.job(caller.manager.get_job(1).await.unwrap()).await;
    assert_completed(&job).await;
    assert_eq!(manifest(&job).await["quiesced"], true);
    assert!(job.frozen_time().await.unwrap() > 0);
    assert_eq!(scene.vm.residue(), scene.before);
}

/// Signals the remaining processes of a dead service, as systemd does.
#[tokio::test(flavor = "multi_thread")]
async fn signals_that_stop_the_service_do_not_stop_the_guard() {
    let mut scene = Scene::new().await;
    let service = scene.system.daemon().pid();
    let directory = scene.system.dir().to_owned();
    let agent = scene.agent(move |command| {
        if command == FREEZE {
            let guard = guard_of(service);
            assert_holds_nothing_of(guard, &directory);
            signal(service, Signal::KILL);
            for ended in [Signal::TERM, Signal::ABORT, Signal::INT, Signal::HUP] {
                signal(guard, ended);
            }
        }
    });
    let _ = scene
        .caller
        .try_start("web", &quiesce("try"), &[], Options::new())
        .await;
    scene.system.wait_for_death();
    assert_eq!(wait_for_thaw(&agent, 1), [FREEZE, THAW]);
}

/// The guard is killed too, and QEMU is stopped, so that the next service cannot query the VM.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_service_thaws_first_after_service_and_guard_were_killed() {
    let mut scene = Scene::new().await;
    let (service, qemu) = (scene.system.daemon().pid(), scene.vm.pid());
    let agent = scene.agent(move |command| {
        if command == FREEZE {
            signal(guard_of(service), Signal::KILL);
            signal(service, Signal::KILL);
            stop(qemu);
        }
    });
    let _ = scene
        .caller
        .try_start("web", &quiesce("try"), &[], Options::new())
        .await;
    scene.system.wait_for_death();
    assert_eq!(agent.seen(), [FREEZE]);
    scene.system.start_daemon();
    assert_eq!(wait_for_thaw(&agent, 1), [FREEZE, THAW]);
    signal(qemu, Signal::CONT);
    let caller = Caller::new(&scene.system).await;
    let job = caller.job(caller.manager.get_job(1).await.unwrap()).await;
    let ended = wait::within("the end", job.wait()).await.unwrap();
    assert_eq!(ended.0, "failed");
    assert_eq!(scene.vm.residue(), scene.before);
}

/// Returns the backup jobs that QEMU has now.
fn backups(vm: &Vm) -> usize {
    let jobs = vm.qmp("query-jobs", serde_json::json!({}));
    let jobs = jobs.as_array().unwrap();
    jobs.iter().filter(|job| job["type"] == "backup").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_qemu_does_not_keep_the_guest_frozen() {
    for mode in ["try", "require"] {
        let scene = Scene::new().await;
        let qemu = scene.vm.pid();
        let agent = scene.agent(move |command| match command {
            FREEZE => stop(qemu),
            THAW => signal(qemu, Signal::CONT),
            _ => {}
        });
        let job = scene.start(mode).await;
        if mode == "require" {
            assert_failed(&job, QUIESCE_FAILED, "freeze-seconds").await;
            assert_eq!(files_below(&scene.system.store()), [""; 0]);
        } else {
            assert_completed(&job).await;
            let manifest = manifest(&job).await;
            assert_eq!(
                manifest["quiesced"], false,
                "the point in time was after the thaw"
            );
        }
        assert_eq!(agent.seen(), [FREEZE, THAW]);
        let frozen = job.frozen_time().await.unwrap();
        assert!((LONGEST * 1_000_000..5_000_000).contains(&frozen), "{frozen} µs");
        assert_eq!(scene.vm.residue(), scene.before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_service_does_not_keep_the_guest_frozen() {
    for mode in ["try", "require"] {
        let mut scene = Scene::new().await;
        let service = scene.system.daemon().pid();
        let thaws = Arc::new(Mutex::new(0));
        let agent = scene.agent(move |command| match command {
            FREEZE => stop(service),
            THAW => {
                let mut thaws = thaws.lock().unwrap();
                *thaws += 1;
                // It resumes after the guard has acted.
                if *thaws == 1 {
                    signal(service, Signal::CONT);
                }
            }
            _ => {}
        });
        let job = wait::within("the start", scene.start(mode)).await;
        match mode {
            "try" => {
                assert_completed(&job).await;
                assert_eq!(manifest(&job).await["quiesced"], false);
            }
            _ => assert_failed(&job, QUIESCE_FAILED, "cannot freeze the guest's file systems").await,
        }
        assert_eq!(wait_for_thaw(&agent, 1)[..2], [FREEZE, THAW]);
        assert_eq!(scene.vm.residue(), scene.before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_hangs_up_gets_the_thaw_after_it_reconnects() {
    let scene = Scene::new().await;
    let agent = Agent::start(&scene.system.dir().join("qga"), |command| match command {
        FREEZE => Answer::HangUp,
        _ => Answer::Proper,
    });
    let job = scene.start("require").await;
    assert_failed(&job, QUIESCE_FAILED, "cannot freeze the guest's file systems").await;
    assert_eq!(wait_for_thaw(&agent, 1), [FREEZE, THAW]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_duration_of_a_freeze_is_reported_and_recorded() {
    let mut scene = Scene::new().await;
    let agent = scene.agent(|_| {});
    let started = Instant::now();
    let job = scene.start("require").await;
    assert_completed(&job).await;
    let most = u64::try_from(started.elapsed().as_micros()).unwrap();
    assert_eq!(agent.seen(), [FREEZE, THAW]);
    let frozen = job.frozen_time().await.unwrap();
    assert!((1..most).contains(&frozen), "{frozen} µs of {most}");
    let manifest = manifest(&job).await;
    assert_eq!(
        (&manifest["quiesced"], &manifest["frozen-us"]),
        (&true.into(), &frozen.into())
    );
    let log = scene.system.daemon().log();
    assert!(log.contains("file systems thawed"), "{log}");
    // From a service that knows it from its catalog, and from one that knows it from the store.
    let path = job.inner().path().clone();
    scene.system.stop_daemon();
    scene.system.start_daemon();
    let caller = Caller::new(&scene.system).await;
    let job = caller.job(path.clone().into()).await;
    assert_eq!(job.frozen_time().await.unwrap(), frozen);
    scene.system.stop_daemon();
    // A cleanly closed catalog consists of this file only.
    std::fs::remove_file(scene.system.dir().join("state/catalog.sqlite")).unwrap();
    scene.system.start_daemon();
    let caller = Caller::new(&scene.system).await;
    let found = caller.manager.rescan(Options::new()).await.unwrap();
    assert_eq!(found, (1, vec![]));
    let job = caller.job(caller.manager.get_job(1).await.unwrap()).await;
    assert_eq!(job.frozen_time().await.unwrap(), frozen);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_explicit_quiesce_no_equals_the_default() {
    let scene = Scene::new().await;
    let agent = scene.agent(|_| {});
    for document in [quiesce("no"), String::new()] {
        let options = Options::from([("quiesce", "no".into())]);
        let job = scene.caller.try_start("web", &document, &[], options).await;
        let job = scene.caller.job(job.unwrap()).await;
        assert_completed(&job).await;
        let manifest = manifest(&job).await;
        assert_eq!(manifest["quiesced"], false);
        assert_eq!(manifest.get("frozen-us"), None);
        assert_eq!(job.frozen_time().await.unwrap(), 0);
    }
    let options = Options::from([("quiesce", "no".into())]);
    let error = scene
        .caller
        .try_start("web", &quiesce("require"), &[], options)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("quiesce"), "{error}");
    assert_eq!(agent.seen_all(), [""; 0]);
}
