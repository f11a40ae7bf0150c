//! Freezing the guest's file systems around a backup's point in time, with a guest agent that the test plays.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::common::System;
use crate::common::agent::{Agent, Answer};
use crate::common::caller::{Caller, assert_failed};
use crate::common::disk::Disk;
use crate::common::proxies::JobProxy;
use crate::common::storage::{files_below, identical};
use crate::common::vm::{Residue, Vm};
use crate::common::wait::within;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const QEMU_ERROR: &str = "org.example.Backup1.Error.QemuError";
const QUIESCE_FAILED: &str = "org.example.Backup1.Error.QuiesceFailed";
const UNREACHABLE: &str = "org.example.Backup1.Error.DomainUnreachable";
const FREEZE: &str = "guest-fsfreeze-freeze";
const THAW: &str = "guest-fsfreeze-thaw";

/// A system with a running VM `web` that has two disks. The agent's socket is configured, and no agent listens yet.
struct Scene {
    system: System,
    vm: Arc<Vm>,
    caller: Caller,
    before: Residue,
}

impl Scene {
    async fn new() -> Self {
        // The agent of a test replies at once or never.
        Self::with("freeze-wait-seconds = 3").await
    }

    /// Starts a system with these timeouts.
    async fn with(deadlines: &str) -> Self {
        let system = System::setup()
            .table(&format!("[deadlines]\n{deadlines}"))
            .start();
        let vm = system
            .vm("web")
            .disk(Disk::new("vda", 16 * MIB).fill(0, 4 * MIB, 0x11))
            .disk(Disk::new("vdb", 8 * MIB).raw().fill(0, MIB, 0x22))
            .running()
            .start();
        let agent = system.dir().join("qga");
        let (monitor, agent) = (vm.monitor_path(), agent.display().to_string());
        system.write_domain_file(
            "web",
            &format!("monitor = \"{}\"\nagent = \"{agent}\"\n", monitor.display()),
        );
        system.wait_for_domain("web");
        let caller = Caller::new(&system).await;
        Self {
            before: vm.residue(),
            system,
            vm: Arc::new(vm),
            caller,
        }
    }

    fn agent_path(&self) -> PathBuf {
        self.system.dir().join("qga")
    }

    fn agent(&self, behave: impl FnMut(&str) -> Answer + Send + 'static) -> Agent {
        Agent::start(&self.agent_path(), behave)
    }

    async fn start(&self, mode: &str) -> JobProxy<'static> {
        self.caller.start("web", &quiesce(mode)).await
    }

    /// Makes a backup that completes; returns its directory and whether its manifest reports it as quiesced.
    async fn complete(&self, mode: &str) -> (PathBuf, bool) {
        let job = self.caller.complete("web", &quiesce(mode)).await;
        let image = PathBuf::from(&job.disks().await.unwrap()[0].4);
        let backup = image.parent().unwrap().to_owned();
        assert_eq!(self.vm.residue(), self.before);
        let manifest = std::fs::read(backup.join("manifest.json")).unwrap();
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        (backup, manifest["quiesced"].as_bool().unwrap())
    }

    /// Makes a backup that fails with this error, with `word` in its text, and leaves no residue.
    async fn fails(&self, mode: &str, error: &str, word: &str) {
        let job = self.start(mode).await;
        let ended = within("the end of the backup", job.wait()).await.unwrap();
        assert_eq!(
            (ended.0.as_str(), ended.1.as_str()),
            ("failed", error),
            "{}",
            ended.2
        );
        assert!(ended.2.contains(word), "{word:?} in {:?}", ended.2);
        assert_eq!(files_below(&self.system.store()), [""; 0]);
    }

    async fn fails_and_leaves_nothing(&self, mode: &str, error: &str, word: &str) {
        self.fails(mode, error, word).await;
        assert_eq!(self.vm.residue(), self.before);
    }
}

fn quiesce(mode: &str) -> String {
    format!("<domainbackup><quiesce mode='{mode}'/></domainbackup>")
}

/// Returns the ids of the backup jobs that QEMU has now.
fn backups(vm: &Vm) -> Vec<String> {
    let jobs = vm.qmp("query-jobs", json!({}));
    let backups = jobs
        .as_array()
        .unwrap()
        .iter()
        .filter(|job| job["type"] == "backup");
    backups
        .map(|job| job["id"].as_str().unwrap().to_owned())
        .collect()
}

/// The commands that the agent got, each with the number of QEMU's backup jobs at that time.
type Witnessed = Arc<Mutex<Vec<(String, usize)>>>;

/// Queries QEMU's backup jobs at each freeze and thaw, and records them in `witnessed`.
fn witness(vm: &Arc<Vm>, witnessed: &Witnessed) -> impl FnMut(&str) -> Answer + Send + 'static {
    let (record, vm) = (witnessed.clone(), vm.clone());
    move |command| {
        if [FREEZE, THAW].contains(&command) {
            let entry = (command.to_owned(), backups(&vm).len());
            record.lock().unwrap().push(entry);
        }
        Answer::Proper
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn file_systems_are_frozen_before_the_instant_and_thawed_after_it() {
    for mode in ["try", "require"] {
        let scene = Scene::new().await;
        let witnessed = Witnessed::default();
        let agent = scene.agent(witness(&scene.vm, &witnessed));
        let (backup, quiesced) = scene.complete(mode).await;
        assert!(quiesced, "{mode}");
        // Before each of the two. A required freeze is also checked before any target is touched.
        let greeted = agent
            .seen_all()
            .iter()
            .filter(|command| *command == "guest-sync-delimited")
            .count();
        assert_eq!(greeted, if mode == "require" { 3 } else { 2 });
        assert_eq!(agent.seen(), [FREEZE, THAW]);
        assert_eq!(
            *witnessed.lock().unwrap(),
            [(FREEZE.to_owned(), 0), (THAW.to_owned(), 2)],
            "QEMU has both backups when the guest is thawed, and none when it is frozen"
        );
        let vm = &scene.vm;
        let sources = ["vda", "vdb"].map(|disk| (vm.source_path(disk).to_owned(), vm.source_format(disk)));
        vm.qmp("quit", json!({}));
        for (disk, (source, format)) in ["vda", "vdb"].into_iter().zip(sources) {
            let image = backup.join(format!("{disk}.qcow2"));
            closed(&source);
            assert!(identical(&image, "qcow2", &source, format), "{disk}");
        }
    }
}

/// Waits until QEMU has closed an image, which releases its lock.
fn closed(image: &Path) {
    crate::common::wait::until("QEMU to close its image", || {
        let mut command = std::process::Command::new("qemu-img");
        command.arg("info").arg(image);
        crate::common::process::run(command).success().then_some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_thawed_while_its_data_is_still_copied() {
    let scene = Scene::new().await;
    let agent = Agent::good(&scene.agent_path());
    let text = "<domainbackup><bandwidth>65536</bandwidth><quiesce mode='require'/></domainbackup>";
    let job = scene.caller.start("web", text).await;
    crate::common::wait::until_async("the backup to run", || async {
        (job.state().await.unwrap() == "running").then_some(())
    })
    .await;
    assert_eq!(agent.seen(), [FREEZE, THAW]);
    job.cancel().await.unwrap();
    let ended = within("the end of the backup", job.wait()).await.unwrap();
    assert_eq!(ended.0, "cancelled");
    assert_eq!(agent.seen(), [FREEZE, THAW], "once is enough");
    assert_eq!(scene.vm.residue(), scene.before);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_guest_is_frozen_without_a_request() {
    let scene = Scene::new().await;
    let agent = Agent::good(&scene.agent_path());
    let job = scene.caller.complete("web", "").await;
    let image = PathBuf::from(&job.disks().await.unwrap()[0].4);
    let manifest = std::fs::read_to_string(image.with_file_name("manifest.json")).unwrap();
    assert!(manifest.contains("\"quiesced\": false"), "{manifest}");
    assert_eq!(agent.seen_all(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn unread_replies_to_an_earlier_client_are_discarded() {
    let scene = Scene::new().await;
    let agent = scene.agent(|command| match command {
        // Whole lines, a reply to another synchronisation, and half a line.
        "guest-sync-delimited" => {
            Answer::After(b"{\"return\": 1}\n{\"error\": {}}\n\xff{\"return\": 1}\n{\"retu".to_vec())
        }
        _ => Answer::Proper,
    });
    assert!(scene.complete("require").await.1);
    assert_eq!(agent.seen(), [FREEZE, THAW]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_agent_fails_only_a_required_freeze() {
    let scene = Scene::new().await;
    // Its socket does not exist.
    scene
        .fails_and_leaves_nothing("require", QUIESCE_FAILED, "qga")
        .await;
    assert!(!scene.complete("try").await.1);

    // None is configured.
    let system = System::start();
    let vm = system.configured(system.vm("web").disk(Disk::new("vda", 8 * MIB)).running());
    let caller = Caller::new(&system).await;
    let scene = Scene {
        before: vm.residue(),
        system,
        vm: Arc::new(vm),
        caller,
    };
    scene
        .fails_and_leaves_nothing("require", QUIESCE_FAILED, "no guest agent is configured")
        .await;
    assert!(!scene.complete("try").await.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_paused_is_not_frozen() {
    let scene = Scene::new().await;
    let agent = Agent::good(&scene.agent_path());
    scene.vm.stop();
    scene.fails("require", QUIESCE_FAILED, "paused").await;
    let job = scene.caller.complete("web", &quiesce("try")).await;
    let image = PathBuf::from(&job.disks().await.unwrap()[0].4);
    let manifest = std::fs::read_to_string(image.with_file_name("manifest.json")).unwrap();
    assert!(manifest.contains("\"quiesced\": false"), "{manifest}");
    assert_eq!(
        agent.seen_all(),
        [""; 0],
        "the service called an agent that cannot reply"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_refuses_to_freeze_gets_a_thaw() {
    let scene = Scene::new().await;
    let agent = scene.agent(|command| match command {
        FREEZE => Answer::Refusal("failed to freeze /home: device busy"),
        _ => Answer::Proper,
    });
    scene
        .fails_and_leaves_nothing("require", QUIESCE_FAILED, "failed to freeze /home: device busy")
        .await;
    // Some file systems may be frozen.
    assert_eq!(agent.seen(), [FREEZE, THAW]);
    assert!(!scene.complete("try").await.1);
    assert_eq!(agent.seen(), [FREEZE, THAW, FREEZE, THAW]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_hangs_up_or_sends_garbage_fails_the_freeze() {
    for bad in ["guest-sync-delimited", FREEZE] {
        for nonsense in [
            None,
            Some("nonsense\n"),
            Some("{\"return\": \"frozen\"}\n"),
            Some("{\"return\": -1}\n"),
            Some("[]\n"),
        ] {
            // A reply that does not match the request is skipped.
            if bad != FREEZE && nonsense.is_some_and(|said| said.starts_with(['{', '['])) {
                continue;
            }
            let scene = Scene::new().await;
            let agent = scene.agent(move |command| match nonsense {
                _ if command != bad => Answer::Proper,
                Some(said) => Answer::Raw(said.into()),
                None => Answer::HangUp,
            });
            scene
                .fails_and_leaves_nothing(
                    "require",
                    QUIESCE_FAILED,
                    "cannot freeze the guest's file systems",
                )
                .await;
            assert!(!scene.complete("try").await.1, "{bad} {nonsense:?}");
            let frozen = agent.seen().iter().filter(|command| *command == FREEZE).count();
            assert_eq!(frozen, if bad == FREEZE { 2 } else { 0 }, "{bad} {nonsense:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_never_replies_to_the_freeze_gets_a_thaw() {
    let scene = Scene::new().await;
    let agent = scene.agent(|command| match command {
        FREEZE => Answer::Silence,
        _ => Answer::Proper,
    });
    assert!(!scene.complete("try").await.1);
    assert_eq!(agent.seen(), [FREEZE, THAW]);
}

/// Windows (VSS) needs this.
#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_may_take_longer_than_the_guest_may_be_frozen() {
    let scene = Scene::with("freeze-seconds = 3\nfreeze-wait-seconds = 60").await;
    let agent = scene.agent(|command| {
        if command == FREEZE {
            std::thread::sleep(std::time::Duration::from_secs(5));
        }
        Answer::Proper
    });
    assert!(scene.complete("require").await.1);
    assert_eq!(agent.seen(), [FREEZE, THAW]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_frozen_by_another_tool_stays_frozen_and_the_backup_reports_the_reason() {
    let scene = Scene::new().await;
    let agent = Agent::good(&scene.agent_path());
    agent.freeze();
    scene
        .fails_and_leaves_nothing("require", QUIESCE_FAILED, "another tool has frozen them")
        .await;
    let (backup, quiesced) = scene.complete("try").await;
    assert!(!quiesced);
    assert!(agent.is_frozen());
    assert_eq!(agent.seen(), [""; 0]);
    let manifest = std::fs::read(backup.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let why = manifest["quiesce-problem"].as_str().unwrap();
    assert!(why.contains("another tool has frozen them"), "{why}");
    // The job reports the same to programs and in text.
    let job = scene.caller.manager.get_job(2).await.unwrap();
    let job = scene.caller.job(job).await;
    assert_eq!(job.quiesce_problem().await.unwrap(), why);
    let clients = scene.system.clients();
    let create = clients.backupctl(0, &["create", "web", "--quiesce", "try"]);
    assert!(
        create.stdout.contains(&format!("quiesced  no: {why}\n")),
        "{}",
        create.stdout
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_cancelled_while_the_agent_freezes_is_thawed() {
    let scene = Scene::with("freeze-wait-seconds = 600").await;
    let agent = scene.agent(|command| match command {
        FREEZE => Answer::Silence,
        _ => Answer::Proper,
    });
    let document = quiesce("require");
    let started = scene.caller.start("web", &document);
    let cancelled = async {
        let freezing = || async { agent.seen().contains(&FREEZE.to_owned()).then_some(()) };
        crate::common::wait::until_async("the freeze", freezing).await;
        let other = Caller::new(&scene.system).await;
        let job = other.job(other.manager.get_job(1).await.unwrap()).await;
        job.cancel().await.unwrap();
    };
    let (job, ()) = tokio::join!(started, cancelled);
    let ended = within("the end of the backup", job.wait()).await.unwrap();
    assert_eq!(ended.0, "cancelled", "{}", ended.2);
    assert_eq!(agent.seen(), [FREEZE, THAW]);
    assert_eq!(scene.vm.residue(), scene.before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_whose_guest_is_gone_is_given_up() {
    let scene = Scene::new().await;
    // QEMU accepts the bytes, and the guest does not read them.
    let agent = scene.agent(|_| Answer::Silence);
    scene
        .fails_and_leaves_nothing("require", QUIESCE_FAILED, "guest-sync-delimited")
        .await;
    assert_eq!(agent.seen(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thaw_that_is_refused_or_late_is_logged_and_leaves_the_backup_unquiesced() {
    let mut scene = Scene::new().await;
    let agent = scene.agent(|command| match command {
        THAW => Answer::Refusal("thaw refused"),
        _ => Answer::Proper,
    });
    // An optional freeze leaves a backup that is not quiesced; a required one leaves no backup. The file systems are
    // still frozen.
    let (_, quiesced) = scene.complete("try").await;
    assert!(
        !quiesced,
        "the file systems may not have been frozen at the point in time"
    );
    assert_eq!(agent.seen(), [FREEZE, THAW]);
    agent.thaw();
    let job = scene.start("require").await;
    assert_failed(&job, "QuiesceFailed", "thaw refused").await;
    assert_eq!(agent.seen(), [FREEZE, THAW, FREEZE, THAW]);
    let log = scene.system.daemon().log();
    assert!(
        log.contains("may still be frozen") && log.contains("thaw refused"),
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_qemu_refuses_still_thaws() {
    let scene = Scene::new().await;
    let vm = scene.vm.clone();
    let mut taken = false;
    // Between the freeze and the transaction, another job takes the second disk: the first disk's backup is rolled
    // back.
    let agent = scene.agent(move |command| {
        if command == FREEZE && !std::mem::replace(&mut taken, true) {
            let size = 8 * MIB;
            vm.qmp("blockdev-add", json!({ "driver": "null-co", "node-name": "theirs", "size": size }));
            vm.qmp(
                "blockdev-mirror",
                json!({ "job-id": "theirs", "device": "vdb-format", "target": "theirs", "sync": "full", "speed": 1 }),
            );
        }
        Answer::Proper
    });
    scene
        .fails("require", QEMU_ERROR, "QEMU refused transaction")
        .await;
    assert_eq!(agent.seen(), [FREEZE, THAW]);
    // The other job continues, and this backup left no residue.
    assert_eq!(scene.vm.residue().jobs, ["theirs"]);
    scene
        .vm
        .qmp("block-job-cancel", json!({ "device": "theirs", "force": true }));
    scene.vm.wait_event("JOB_STATUS_CHANGE", |data| {
        data["id"] == "theirs" && data["status"] == "null"
    });
    scene.vm.qmp("blockdev-del", json!({ "node-name": "theirs" }));
    assert_eq!(scene.vm.residue(), scene.before);
    assert!(scene.complete("require").await.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_ends_while_the_guest_is_frozen_is_thawed_all_the_same() {
    let scene = Scene::new().await;
    let pid = rustix::process::Pid::from_raw(scene.vm.pid().cast_signed()).unwrap();
    // The agent of this test outlives its VM.
    let agent = scene.agent(move |command| {
        if command == FREEZE {
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
        Answer::Proper
    });
    scene.fails("try", UNREACHABLE, "").await;
    assert_eq!(agent.seen(), [FREEZE, THAW]);
}
