//! Every error of polkit denies the call, for root too. The service does nothing that polkit did not allow, every call
//! ends, and the service works again when polkit does.
//!
//! While polkit cannot be asked, every call is refused with that reason, whether its object exists or not. The service
//! may cache for a while that a connection could see the domain. So each call uses a new connection, unless the test
//! says otherwise.

use crate::common::System;
use crate::common::authority::{Answer, Authority};
use crate::common::caller::Caller;
use crate::common::calls::{self, create_asking, end_of};
use crate::common::clients::{ROOT, USER};
use crate::common::dialog::Agent;
use crate::common::disk::Disk;
use crate::common::eavesdropper::Eavesdropper;
use crate::common::polkit;
use crate::common::proxies::{Options, error_name};
use crate::common::storage::files_below;
use crate::common::vm::{Residue, Vm};
use crate::common::wait;
use backupd::names::{
    BACKUP_INTERFACE, BUS_NAME, DOMAIN_INTERFACE, JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH,
};
use serde::Serialize;
use zbus::wire::DynamicType;

const MIB: u64 = 1 << 20;
const BACKUP: &str = "org.example.backup1.domain.backup";
const GETATTR: &str = "org.example.backup1.domain.getattr";
const DENIED: &str = "org.freedesktop.DBus.Error.AccessDenied";
const NO_SUCH_DOMAIN: &str = "org.example.Backup1.Error.NoSuchDomain";

/// A VM `web`, and the state before a backup was requested.
struct Scene {
    system: System,
    vm: Vm,
    before: Residue,
    /// The process of the service, which must stay the same until the end.
    pid: u32,
}

impl Scene {
    /// Starts polkit with a rule that lets an ordinary user back up, so that only a failure of polkit refuses the
    /// call.
    fn new() -> Self {
        let rules = polkit::allow(USER, &["domain.backup"]);
        Self::with(System::setup().rules(&rules).start())
    }

    /// Starts the test's own authority, which allows everything at first.
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

    /// Requests a backup as root and as an ordinary user; both must be refused. Returns the names of the errors.
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

    /// Starts a working polkit: the same service makes a backup, and has made no other.
    async fn recovers(mut self) {
        self.system.set_rules("");
        wait::until("the machine to be seen again", || {
            self.system.domain_path("web").map(drop)
        });
        self.assert_nothing_happened();
        let caller = Caller::new(&self.system).await;
        let job = caller.complete("web", "").await;
        let id = job.id().await.expect("a job has a number");
        assert_eq!(id, 1, "another job was started");
        self.system.daemon().process().assert_running();
        assert_eq!(self.system.daemon().pid(), self.pid);
    }
}

/// Calls `CreateBackup` on an existing connection, to wait for it later.
fn begin(caller: Caller) -> tokio::task::JoinHandle<String> {
    tokio::spawn(async move {
        let answer = caller.try_start("web", "", &[], Options::new()).await;
        error_name(&answer.expect_err("a call without permission must fail"))
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
    // This connection has been allowed to see the domain.
    let known = Caller::new(&scene.system).await;
    known.manager.get_domain("web").await.unwrap();
    scene.system.stop_polkit();
    for name in scene.refused() {
        assert_eq!(name, DENIED);
    }
    assert_eq!(end(begin(known)).await, DENIED);
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
        // The request, or an earlier query of polkit's client library.
        let mut calls = Eavesdropper::start(&scene.system, "/org/freedesktop/PolicyKit1/Authority").await;
        let call = begin(caller);
        calls.next().await;
        scene.system.stop_polkit();
        assert_eq!(end(call).await, DENIED);
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
async fn an_authority_that_disconnects_before_it_replies_allows_nothing() {
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
        assert_eq!(name, DENIED);
    }
    scene.recovers().await;
}

/// Allows reads, and replies to the request for the backup with this answer.
fn all_but_backup(answer: Answer) -> impl Fn(&str) -> Answer + Send + 'static {
    move |action| if action == BACKUP { answer } else { Answer::Yes }
}

/// Checks that both users are refused with this reply to the backup's request, and with the error named `blind` if
/// every request gets this reply.
async fn refuses(answer: Answer, blind: &str) {
    let (scene, authority) = Scene::with_authority().await;
    authority.decide(all_but_backup(answer)).await;
    assert_eq!(scene.refused(), [DENIED, DENIED]);
    assert_eq!(authority.count(BACKUP), 2);
    for question in authority.asked() {
        assert!(question.caller.starts_with(':'), "{question:?}");
        assert!(!question.interactive, "{question:?}");
    }
    authority.decide(move |_| answer).await;
    assert_eq!(scene.refused(), [blind, blind]);
    assert_eq!(
        authority.count(BACKUP),
        2,
        "polkit was asked about a caller that sees no domain"
    );
    authority.stop(&scene.system).await;
    scene.recovers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_fails_allows_nothing() {
    refuses(Answer::Error, DENIED).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_the_wrong_type_allows_nothing() {
    let (mut scene, authority) = Scene::with_authority().await;
    authority.decide(all_but_backup(Answer::Garbage)).await;
    let caller = Caller::new(&scene.system).await;
    let answer = caller.try_start("web", "", &[], Options::new()).await;
    answer.expect_err("a call without permission must fail");
    scene.assert_nothing_happened();
    authority.stop(&scene.system).await;
    // polkit's own library may crash and take the service with it, which denies the call as well. Only the owner of
    // polkit's name can send such a reply.
    scene.system.kill_daemon();
    scene.system.start_daemon();
    scene.pid = scene.system.daemon().pid();
    scene.recovers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_by_polkit_applies_to_root_too() {
    refuses(Answer::No, NO_SUCH_DOMAIN).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_never_replies_allows_nothing_and_times_out() {
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
    assert_eq!(scene.refused(), [DENIED, DENIED]);
    assert_eq!(authority.count(BACKUP), 1);
    authority.stop(&scene.system).await;
    scene.recovers().await;
}

/// Sends a call that must be refused; returns the error's name and text.
async fn refusal<B: Serialize + DynamicType>(
    caller: &Caller,
    (path, interface, member): (&str, &str, &str),
    body: &B,
) -> (String, String) {
    let call = caller
        .connection
        .call_method(Some(BUS_NAME), path, Some(interface), member, body);
    match wait::within(member, call).await {
        Ok(reply) => panic!("{path} {member} was answered: {reply:?}"),
        Err(error) => (error_name(&error), error.to_string()),
    }
}

/// The names of a domain, a job and a backup, and the paths of their objects.
struct Named {
    domain: String,
    job: u32,
    backup: String,
    paths: [String; 3],
}

/// Returns the errors of every method that asks polkit.
async fn refusals(caller: &Caller, named: &Named) -> Vec<(String, String)> {
    let (none, [domain, job, backup]) = (Options::new, &named.paths);
    let root = |member| (ROOT_PATH, MANAGER_INTERFACE, member);
    let mut refused = vec![
        refusal(caller, root("GetDomain"), &(&named.domain,)).await,
        refusal(caller, root("GetJob"), &(named.job,)).await,
        refusal(caller, root("GetBackup"), &(&named.backup,)).await,
        refusal(caller, root("ListDomains"), &()).await,
        refusal(caller, root("ListJobs"), &()).await,
        refusal(caller, root("ListBackups"), &(none(),)).await,
        refusal(caller, root("Prune"), &(&named.domain, none())).await,
        refusal(caller, root("Rescan"), &(none(),)).await,
    ];
    let created = caller.try_start(&named.domain, "", &[], none()).await;
    let created = created.expect_err("a call without permission must fail");
    refused.push((error_name(&created), created.to_string()));
    for member in ["CreateCheckpoint", "DeleteCheckpoint"] {
        let call = (domain.as_str(), DOMAIN_INTERFACE, member);
        refused.push(refusal(caller, call, &("", none())).await);
    }
    let list = (domain.as_str(), DOMAIN_INTERFACE, "ListCheckpoints");
    refused.push(refusal(caller, list, &(none(),)).await);
    for member in ["Cancel", "Wait", "GetDefinition"] {
        refused.push(refusal(caller, (job, JOB_INTERFACE, member), &()).await);
    }
    refused.push(refusal(caller, (job, JOB_INTERFACE, "SetSpeed"), &(1u64,)).await);
    for member in ["Verify", "Delete"] {
        let call = (backup.as_str(), BACKUP_INTERFACE, member);
        refused.push(refusal(caller, call, &(none(),)).await);
    }
    let interfaces = [DOMAIN_INTERFACE, JOB_INTERFACE, BACKUP_INTERFACE];
    for (path, interface) in named.paths.iter().zip(interfaces) {
        let properties = (path.as_str(), "org.freedesktop.DBus.Properties", "GetAll");
        refused.push(refusal(caller, properties, &(interface,)).await);
        let introspect = (path.as_str(), "org.freedesktop.DBus.Introspectable", "Introspect");
        refused.push(refusal(caller, introspect, &()).await);
    }
    refused
}

/// Checks that every call has the same reply, for existing and for missing objects.
async fn refuses_every_name_alike(scene: &Scene, there: &Named) {
    let missing = Named {
        domain: "never".into(),
        job: 77,
        backup: "20200101T000000Z".into(),
        paths: ["domain/00000000000000aa", "job/77", "backup/00000000000000aa"]
            .map(|path| format!("{ROOT_PATH}/{path}")),
    };
    // The reply is also the same whether the connection saw the domain before or not.
    for named in [there, &missing, there] {
        let caller = Caller::of_user(&scene.system, USER).await;
        for (name, text) in refusals(&caller, named).await {
            assert_eq!(name, DENIED, "{text}");
            let reason = "polkit did not answer, so the service allows nothing";
            assert!(text.contains(reason), "{text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_polkit_cannot_be_asked_every_call_is_refused_for_that_reason() {
    let mut scene = Scene::with(System::start());
    let root = Caller::new(&scene.system).await;
    let job = root.complete("web", "").await;
    let backup = job.backup().await.unwrap();
    let there = Named {
        domain: "web".into(),
        job: job.id().await.unwrap(),
        paths: [
            root.manager.get_domain("web").await.unwrap().to_string(),
            job.inner().path().to_string(),
            root.manager.get_backup(&backup).await.unwrap().to_string(),
        ],
        backup,
    };
    scene.system.unregister_actions();
    refuses_every_name_alike(&scene, &there).await;
    scene.system.stop_polkit();
    refuses_every_name_alike(&scene, &there).await;
    let authority = Authority::start(&scene.system, |_| Answer::Error).await;
    refuses_every_name_alike(&scene, &there).await;
    authority.stop(&scene.system).await;
    scene.system.set_rules("");
    wait::until_async("polkit to be asked again", || async {
        root.manager.get_domain("web").await.ok()
    })
    .await;
    root.complete("web", "").await;
}
