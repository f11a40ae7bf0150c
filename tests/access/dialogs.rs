//! Password dialogs: their text for an ordinary user, and the result of the call for each way in which a dialog ends.

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::calls::{self, asking, create_asking, end_of};
use crate::common::chain::{copy, directories, id, increment};
use crate::common::clients::{OTHER_USER, ROOT, USER};
use crate::common::dialog::{Agent, Dialog};
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::proxies::{Options, error_name};
use crate::common::storage::files_below;
use crate::common::vm::{Residue, Vm};
use crate::common::wait;

const MIB: u64 = 1 << 20;
const BACKUP: &str = "org.example.backup1.domain.backup";
const DENIED: &str = "org.freedesktop.DBus.Error.AccessDenied";

/// A VM `web`, and an authentication agent for its users.
struct Scene {
    system: System,
    vm: Vm,
    before: Residue,
    agent: Agent,
}

impl Scene {
    async fn new(setup: crate::common::Setup) -> Self {
        let system = setup.start();
        let disk = Disk::new("vda", 16 * MIB).fill(0, MIB, 0x11);
        let vm = system.configured(system.vm("web").disk(disk));
        Self {
            before: vm.residue(),
            agent: Agent::start(&system).await,
            system,
            vm,
        }
    }

    /// Sends a user's `CreateBackup`, which waits for its dialog.
    async fn ask(&mut self, name: &str, uid: u32) -> (crate::common::process::Process, Dialog) {
        let call = create_asking(&self.system, &self.agent, name, uid, "web").await;
        let dialog = self.agent.opened().await;
        assert_eq!(dialog.action, BACKUP);
        (call, dialog)
    }

    #[track_caller]
    fn assert_nothing_happened(&self) {
        assert_eq!(files_below(&self.system.store()), [""; 0]);
        assert_eq!(self.vm.residue(), self.before);
        let jobs = calls::call(self.system.clients(), ROOT, "ListJobs", &[]);
        assert_eq!(jobs.as_deref(), Ok("(@a(uoss) [],)"));
    }

    #[track_caller]
    fn wait_for_backup(&self) {
        wait::until("the backup", || {
            let files = files_below(&self.system.store().join("web"));
            files
                .iter()
                .any(|file| !file.starts_with('.') && file.ends_with("/manifest.json"))
                .then_some(())
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_sees_the_details_and_allows_the_backup() {
    let mut scene = Scene::new(System::setup()).await;
    let (mut call, dialog) = scene.ask("call", USER).await;
    assert!(dialog.message.contains("web"), "{}", dialog.message);
    let subject = dialog.details.get("polkit.subject-pid").map(String::as_str);
    assert_eq!(
        subject,
        Some(call.pid().to_string().as_str()),
        "the dialog is not the caller's user's"
    );
    // The service creates nothing before the caller is authorised.
    scene.assert_nothing_happened();
    dialog.answer_as_administrator().await;
    let answer = end_of(&mut call).unwrap();
    assert!(answer.contains("/org/example/Backup1/job/1"), "{answer}");
    scene.wait_for_backup();
    assert_eq!(scene.agent.count(), 1, "one request for one target");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dialog_that_is_dismissed_or_failed_denies_the_backup_and_leaves_nothing() {
    let mut scene = Scene::new(System::setup()).await;
    let (mut call, dialog) = scene.ask("dismissed", USER).await;
    dialog.dismiss();
    assert_eq!(end_of(&mut call).unwrap_err().name, DENIED);
    scene.assert_nothing_happened();

    let (mut call, dialog) = scene.ask("wrong", USER).await;
    drop(dialog);
    assert_eq!(end_of(&mut call).unwrap_err().name, DENIED);
    scene.assert_nothing_happened();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_disconnects_closes_its_dialog_and_nothing_starts() {
    let mut scene = Scene::new(System::setup()).await;
    let (mut call, dialog) = scene.ask("gone", USER).await;
    call.kill();
    dialog.cancelled().await;
    // polkit may or may not accept the password; no caller waits for it.
    let _ = dialog.try_answer().await;
    drop(dialog);
    scene.assert_nothing_happened();

    // The user can try again, with a new dialog.
    let (mut call, dialog) = scene.ask("again", USER).await;
    scene.assert_nothing_happened();
    dialog.answer_as_administrator().await;
    end_of(&mut call).unwrap();
    scene.wait_for_backup();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_without_interactive_authorization_opens_no_dialog() {
    let scene = Scene::new(System::setup()).await;
    // Through the agent, so that a dialog could open.
    let arguments = [
        "call",
        "--system",
        "--dest",
        "org.example.Backup1",
        "--object-path",
        "/org/example/Backup1",
        "--method",
        "org.example.Backup1.CreateBackup",
        "'web'",
        "''",
        "@ah []",
        "@a{sv} {}",
    ];
    let mut call = scene
        .agent
        .run(&scene.system, "silent", USER, "gdbus", &arguments)
        .await;
    let refusal = end_of(&mut call).unwrap_err();
    assert_eq!(
        refusal.name,
        "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
    );
    assert_eq!(scene.agent.count(), 0);
    scene.assert_nothing_happened();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configuration_limits_the_concurrent_dialogs_of_a_user() {
    let setup = System::setup().table("[limits]\npassword-dialogs-per-user = 1");
    let mut scene = Scene::new(setup).await;
    let (mut first, open) = scene.ask("first", USER).await;

    let mut second = create_asking(&scene.system, &scene.agent, "second", USER, "web").await;
    let refusal = end_of(&mut second).unwrap_err();
    assert_eq!(refusal.name, "org.freedesktop.DBus.Error.LimitsExceeded");
    assert!(
        refusal.text.contains("password-dialogs-per-user"),
        "{}",
        refusal.text
    );
    assert_eq!(scene.agent.count(), 1);

    // Other users have their own limit.
    let (mut other, theirs) = scene.ask("other", OTHER_USER).await;
    theirs.dismiss();
    assert_eq!(end_of(&mut other).unwrap_err().name, DENIED);

    // A closed dialog makes room, however it ended.
    open.dismiss();
    assert_eq!(end_of(&mut first).unwrap_err().name, DENIED);
    let (mut left, dialog) = scene.ask("left", USER).await;
    left.kill();
    dialog.cancelled().await;
    let (mut third, dialog) = scene.ask("third", USER).await;
    scene.assert_nothing_happened();
    dialog.answer_as_administrator().await;
    end_of(&mut third).unwrap();
    scene.wait_for_backup();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dialog_names_the_owner_of_a_registered_domain() {
    let rules = polkit::allow(USER, &["service.register-domain"]);
    let system = System::setup().rules(&rules).start();
    let vm = system.vm("mine").disk(Disk::new("vda", MIB)).start();
    let owner = Caller::of_user(&system, USER).await;
    for name in ["we\u{200b}b", "w\u{202e}eb", "web\u{e0001}", "\u{feff}web"] {
        let refused = owner
            .register(name, vm.monitor_stream().into())
            .await
            .unwrap_err();
        assert!(error_name(&refused).ends_with("InvalidArgs"), "{refused}");
    }
    owner.register("web", vm.monitor_stream().into()).await.unwrap();
    let mut agent = Agent::start(&system).await;
    let _call = create_asking(&system, &agent, "call", USER, "web").await;
    let dialog = agent.opened().await;
    let name = format!(
        "the virtual machine web of the user {} into",
        polkit::user_name(USER)
    );
    assert!(dialog.message.contains(&name), "{}", dialog.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dialog_names_all_backups_that_would_be_deleted() {
    let mut scene = Scene::new(System::setup()).await;
    let root = Caller::new(&scene.system).await;
    root.complete_full("web", "").await;
    let [newest] = directories(&scene.system.store().join("web")).try_into().unwrap();
    let base = copy(&newest, -48);
    let lower = increment(&base, 1);
    let upper = increment(&lower, 1);
    root.manager.rescan(Options::new()).await.unwrap();
    let ids = [&base, &lower, &upper].map(|path| id(path));

    let prune = ("/org/example/Backup1", "org.example.Backup1.Prune");
    let rules = ["'web'", "{'keep-last': <uint64 1>}"];
    let mut call = asking(&scene.system, &scene.agent, ("prune", USER), prune, &rules).await;
    let dialog = scene.agent.opened().await;
    assert_named(
        &dialog,
        &ids,
        " (3 backups) of the virtual machine web in the store default",
    );
    dialog.dismiss();
    assert_eq!(end_of(&mut call).unwrap_err().name, DENIED);

    // The same directory has backups of another domain.
    scene.system.stop_daemon();
    let catalog = rusqlite::Connection::open(scene.system.dir().join("state/catalog.sqlite")).unwrap();
    let uuid = "7d3c0f3e-52d1-4a4e-9d0c-0f8a3f5a2b10";
    let sql = "UPDATE backups SET domain_name = 'other', domain_uuid = ?1 WHERE id IN (?2, ?3)";
    assert_eq!(catalog.execute(sql, [uuid, &ids[1], &ids[2]]).unwrap(), 2);
    drop(catalog);
    scene.system.start_daemon();
    let root = Caller::new(&scene.system).await;
    let path = root.manager.get_backup(&ids[0]).await.unwrap();
    let delete = (path.as_str(), "org.example.Backup1.Backup.Delete");
    let options = ["{'with-dependents': <true>}"];
    let mut call = asking(&scene.system, &scene.agent, ("delete", USER), delete, &options).await;
    let dialog = scene.agent.opened().await;
    assert_named(
        &dialog,
        &ids[..1],
        " of the virtual machine web in the store default",
    );
    dialog.answer_as_administrator().await;
    let dialog = scene.agent.opened().await;
    assert_named(
        &dialog,
        &ids[1..],
        " (2 backups) of the virtual machine other in the store default",
    );
    dialog.dismiss();
    assert_eq!(end_of(&mut call).unwrap_err().name, DENIED);
    let left = directories(&scene.system.store().join("web"));
    assert_eq!(left.len(), 4);
}

/// Checks that the dialog names these backups, in any order, and continues with this text.
#[track_caller]
fn assert_named(dialog: &Dialog, ids: &[String], further: &str) {
    let message = &dialog.message;
    let (_, named) = message.split_once(" the backup ").expect("it names a backup");
    let (named, _) = named.split_once(further).unwrap_or_else(|| panic!("{message}"));
    let (mut named, mut ids) = (named.split(", ").collect::<Vec<_>>(), ids.to_vec());
    named.sort_unstable();
    ids.sort_unstable();
    assert_eq!(named, ids, "{message}");
}
