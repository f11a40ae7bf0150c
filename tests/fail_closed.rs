//! Every error is a no, for root too: whatever becomes of polkit, nothing happens that it did not allow, every call ends,
//! and once polkit is well again so is the service.
//!
//! Who cannot be asked about cannot see the machine either, so a backup is refused as "no such domain" where the looks
//! fail, and as "access denied" where only the backup's own question does. The service may remember for a while that a
//! connection could see the machine; so each call comes from a connection of its own, but where the test says otherwise.

mod common;

use common::System;
use common::authority::{Answer, Authority};
use common::caller::Caller;
use common::calls::{self, create_asking, end_of};
use common::clients::{ROOT, USER};
use common::dialog::Agent;
use common::disk::Disk;
use common::eavesdropper::Eavesdropper;
use common::polkit;
use common::proxies::{Options, error_name};
use common::storage::files_below;
use common::vm::{Residue, Vm};
use common::wait;

const MIB: u64 = 1 << 20;
const BACKUP: &str = "org.example.backup1.domain.backup";
const GETATTR: &str = "org.example.backup1.domain.getattr";
const DENIED: &str = "org.freedesktop.DBus.Error.AccessDenied";
const NO_SUCH_DOMAIN: &str = "org.example.Backup1.Error.NoSuchDomain";

/// A machine `web`, and what was there before anybody asked for a backup of it.
struct Scene {
    system: System,
    vm: Vm,
    before: Residue,
    /// The service's process: it must be the same to the end.
    pid: u32,
}

impl Scene {
    /// With a polkit that lets an ordinary user back up, so that only polkit's failure refuses it.
    fn new() -> Self {
        let rules = polkit::allow(USER, &["domain.backup"]);
        Self::with(System::setup().rules(&rules).start())
    }

    /// With an authority of the test's, which begins by allowing everything.
    async fn with_authority() -> (Self, Authority) {
        let system = System::setup().without_polkit().start();
        let authority = Authority::start(&system, |_| Answer::Yes).await;
        (Self::with(system), authority)
    }

    fn with(mut system: System) -> Self {
        let disk = Disk::new("vda", 16 * MIB).fill(0, MIB, 0x11);
        let vm = system.configured(system.vm("web").disk(disk));
        Self {
            before: vm.residue(),
            pid: system.daemon().pid(),
            system,
            vm,
        }
    }

    /// A backup asked for by root and by an ordinary user; both must be refused. The names of the errors.
    #[track_caller]
    fn refused(&self) -> [String; 2] {
        [ROOT, USER].map(|uid| {
            let answer = calls::create(self.system.clients(), uid, "web", "");
            match answer {
                Ok(job) => panic!("user {uid} has got a backup: {job}"),
                Err(refusal) => {
                    self.assert_nothing_happened();
                    refusal.name
                }
            }
        })
    }

    #[track_caller]
    fn assert_nothing_happened(&self) {
        assert_eq!(files_below(&self.system.store()), [""; 0]);
        assert_eq!(self.vm.residue(), self.before);
    }

    /// A working polkit again: the same service makes a backup, and has made no other.
    async fn recovers(mut self) {
        self.system.set_rules("");
        wait::until("the machine to be seen again", || {
            self.system.domain_path("web").map(drop)
        });
        self.assert_nothing_happened();
        let caller = Caller::new(&self.system).await;
        let job = caller.complete("web", "").await;
        let id = job.id().await.expect("a job has a number");
        assert_eq!(id, 1, "no other job was begun");
        self.system.daemon().process().assert_running();
        assert_eq!(self.system.daemon().pid(), self.pid);
    }
}

#[track_caller]
fn assert_refusal(name: &str) {
    assert!([DENIED, NO_SUCH_DOMAIN].contains(&name), "{name}");
}

/// `CreateBackup` on a connection that is there already, to be waited for.
fn begin(caller: Caller) -> tokio::task::JoinHandle<String> {
    tokio::spawn(async move {
        let answer = caller.try_start("web", "", &[], Options::new()).await;
        error_name(&answer.expect_err("nobody has allowed it"))
    })
}

async fn end(call: tokio::task::JoinHandle<String>) -> String {
    wait::within("the call to end", call)
        .await
        .expect("the call is refused")
}

#[tokio::test(flavor = "multi_thread")]
async fn without_polkit_there_is_no_backup() {
    let mut scene = Scene::new();
    // This connection has been seen to see the machine.
    let known = Caller::new(&scene.system).await;
    known.manager.get_domain("web").await.unwrap();
    scene.system.stop_polkit();
    for name in scene.refused() {
        assert_eq!(name, NO_SUCH_DOMAIN);
    }
    assert_refusal(&end(begin(known)).await);
    scene.recovers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn polkit_that_crashes_before_it_answers_allows_nothing() {
    let mut scene = Scene::new();
    let known = Caller::new(&scene.system).await;
    known.manager.get_domain("web").await.unwrap();
    let fresh = Caller::new(&scene.system).await;
    for caller in [known, fresh] {
        scene.system.freeze_polkit();
        // The question, or what a client library wants to know of polkit before its first one.
        let mut calls = Eavesdropper::start(&scene.system, "/org/freedesktop/PolicyKit1/Authority").await;
        let call = begin(caller);
        calls.next().await;
        scene.system.stop_polkit();
        assert_refusal(&end(call).await);
        scene.assert_nothing_happened();
        scene.system.set_rules("");
    }
    scene.recovers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn polkit_that_crashes_while_a_password_is_asked_for_allows_nothing() {
    let mut scene = Scene::with(System::start());
    let mut agent = Agent::start(&scene.system).await;
    let mut call = create_asking(&scene.system, &agent, "call", USER, "web").await;
    let dialog = agent.opened().await;
    assert_eq!(dialog.action, BACKUP);
    scene.system.stop_polkit();
    assert_eq!(end_of(&mut call).unwrap_err().name, DENIED);
    scene.assert_nothing_happened();
    scene.recovers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_leaves_before_it_answers_allows_nothing() {
    let (scene, authority) = Scene::with_authority().await;
    authority.decide(all_but_backup(Answer::Silence)).await;
    let call = begin(Caller::new(&scene.system).await);
    authority.wait_for_question(BACKUP).await;
    authority.stop(&scene.system).await;
    assert_eq!(end(call).await, DENIED);
    scene.recovers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_that_polkit_does_not_know_is_allowed_to_nobody() {
    let mut scene = Scene::new();
    scene.system.unregister_actions();
    for name in scene.refused() {
        assert_eq!(name, NO_SUCH_DOMAIN);
    }
    scene.recovers().await;
}

/// Looks are allowed; the backup's question gets this answer.
fn all_but_backup(answer: Answer) -> impl Fn(&str) -> Answer + Send + 'static {
    move |action| if action == BACKUP { answer } else { Answer::Yes }
}

/// Both users are refused with this answer to the backup's question, and with the same answer to every question.
async fn refuses(answer: Answer) {
    let (scene, authority) = Scene::with_authority().await;
    authority.decide(all_but_backup(answer)).await;
    assert_eq!(scene.refused(), [DENIED, DENIED]);
    assert_eq!(authority.count(BACKUP), 2);
    for question in authority.asked() {
        assert!(question.caller.starts_with(':'), "{question:?}");
        assert!(!question.interactive, "{question:?}");
    }
    authority.decide(move |_| answer).await;
    assert_eq!(scene.refused(), [NO_SUCH_DOMAIN, NO_SUCH_DOMAIN]);
    assert_eq!(
        authority.count(BACKUP),
        2,
        "who sees no machine is not asked about"
    );
    authority.stop(&scene.system).await;
    scene.recovers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_fails_allows_nothing() {
    refuses(Answer::Error).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_the_wrong_type_allows_nothing() {
    let (mut scene, authority) = Scene::with_authority().await;
    authority.decide(all_but_backup(Answer::Garbage)).await;
    let caller = Caller::new(&scene.system).await;
    let answer = caller.try_start("web", "", &[], Options::new()).await;
    answer.expect_err("nobody has allowed it");
    scene.assert_nothing_happened();
    authority.stop(&scene.system).await;
    // polkit's own library may not survive it, and takes the service along: which is a no as well. Only who owns polkit's
    // name can answer so.
    scene.system.kill_daemon();
    scene.system.start_daemon();
    scene.pid = scene.system.daemon().pid();
    scene.recovers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_says_no_is_believed_of_root_too() {
    refuses(Answer::No).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_never_answers_allows_nothing_and_is_not_waited_for_for_ever() {
    let (scene, authority) = Scene::with_authority().await;
    authority.decide(all_but_backup(Answer::Silence)).await;
    let call = begin(Caller::new(&scene.system).await);
    authority.wait_for_question(BACKUP).await;
    assert_eq!(end(call).await, DENIED);
    authority.wait_for_withdrawal().await;
    scene.assert_nothing_happened();

    authority
        .decide(|action| match action {
            GETATTR => Answer::Silence,
            _ => Answer::Yes,
        })
        .await;
    assert_eq!(scene.refused(), [NO_SUCH_DOMAIN, NO_SUCH_DOMAIN]);
    assert_eq!(authority.count(BACKUP), 1);
    authority.stop(&scene.system).await;
    scene.recovers().await;
}
