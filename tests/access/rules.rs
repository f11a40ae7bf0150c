//! The shipped example rules in `docs/polkit-rules`, with the real polkitd: what each allows, and what it does not.
//! Only root has a password here, so a request that no rule decides ends in [`PASSWORD`], and a denied one in
//! [`DENIED`].
//!
//! The users and groups of the examples do not exist on the test host, so those of every Debian replace them in the
//! text.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;

use crate::common::bus::project_file;
use crate::common::caller::{Caller, connect_as};
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::proxies::{DomainProxy, JobProxy, ManagerProxy, Options, error_name, slowly};
use crate::common::vm::Vm;
use crate::common::{System, process, storage, test_directory, wait};
use backupd::access::{Implicit, TABLE};
use backupd::config::Limits;
use zbus::wire::OwnedObjectPath;

/// All files in `docs/polkit-rules`.
const EXAMPLES: [&str; 8] = [
    "40-backupd-hidden-domain.rules",
    "40-backupd-operators.rules",
    "50-backupd-anna-export-directory.rules",
    "50-backupd-anna-export-own-files.rules",
    "50-backupd-anna-web.rules",
    "50-backupd-desktop-register.rules",
    "50-backupd-helpdesk-sees-anna.rules",
    "50-backupd-nightly-group.rules",
];
/// The details that rules get of a request (see `src/service`).
const DETAILS: [&str; 10] = [
    "driver",
    "domain_name",
    "domain_uuid",
    "domain_owner",
    "mode",
    "target_kind",
    "target",
    "disks",
    "backup_id",
    "store",
];

const DENIED: &str = "org.freedesktop.DBus.Error.AccessDenied";
const PASSWORD: &str = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired";
const NO_SUCH_DOMAIN: &str = "org.example.Backup1.Error.NoSuchDomain";
const TARGET_INVALID: &str = "org.example.Backup1.Error.TargetInvalid";
const INVALID_DEFINITION: &str = "org.example.Backup1.Error.InvalidDefinition";

const MIB: u64 = 1 << 20;

/// Returns the text of an example, with other names where the tests need them.
fn example(name: &str, substitutes: &[(&str, &str)]) -> String {
    let mut text = fs::read_to_string(project_file("docs/polkit-rules").join(name)).unwrap();
    for (from, to) in substitutes {
        assert!(text.contains(from), "{name} has no {from}");
        text = text.replace(from, to);
    }
    text
}

/// A user of Debian, in the user's own group only.
#[derive(Clone, Copy)]
struct Account {
    name: &'static str,
    uid: u32,
}

const ANNA: Account = account("nobody", 65534);
const BERT: Account = account("daemon", 1);
/// In the group `backup`.
const MEMBER: Account = account("backup", 34);
/// In the group `games`.
const OPERATOR: Account = account("games", 5);

const fn account(name: &'static str, uid: u32) -> Account {
    Account { name, uid }
}

impl Account {
    /// Returns a rule next to the example's.
    fn allowed(self, action: &str) -> String {
        polkit::allow(self.uid, &[action])
    }
}

/// A connection of an ordinary user in this process.
struct User {
    connection: zbus::Connection,
    manager: ManagerProxy<'static>,
}

impl User {
    async fn new(system: &System, account: Account) -> Self {
        assert_eq!(polkit::user_name(account.uid), account.name);
        let connection = connect_as(system, account.uid).await;
        let manager = ManagerProxy::new(&connection).await.expect("a proxy is made");
        Self { connection, manager }
    }

    /// Runs a backup to its end: `Ok` if it completes, else the name of the error.
    async fn back_up(&self, domain: &str, document: &str) -> Result<(), String> {
        let started = self
            .manager
            .create_backup(domain, document, Vec::new(), Options::new())
            .await;
        self.end(started).await
    }

    /// Backs up into an open file.
    async fn copy_into(&self, domain: &str, file: &OwnedFd) -> Result<(), String> {
        let files = vec![file.into()];
        let started = self
            .manager
            .create_backup(domain, OPEN_FILE, files, Options::new())
            .await;
        self.end(started).await
    }

    /// Registers a VM and returns its object.
    async fn register(&self, name: &str, vm: &Vm) -> Result<DomainProxy<'static>, String> {
        let socket = OwnedFd::from(vm.monitor_stream());
        let registered = self
            .manager
            .register_domain(name, (&socket).into(), Options::new())
            .await;
        let path = registered.map_err(|error| error_name(&error))?;
        Ok(DomainProxy::new(&self.connection, path)
            .await
            .expect("a proxy is made"))
    }

    /// Backs up a domain by its object.
    async fn back_up_this(&self, domain: &DomainProxy<'_>, document: &str) -> Result<(), String> {
        let started = domain.create_backup(document, Vec::new(), Options::new()).await;
        self.end(started).await
    }

    async fn job(&self, path: OwnedObjectPath) -> JobProxy<'static> {
        JobProxy::new(&self.connection, path)
            .await
            .expect("a proxy is made")
    }

    async fn end(&self, started: zbus::Result<(u32, OwnedObjectPath)>) -> Result<(), String> {
        let (_, path) = started.map_err(|error| error_name(&error))?;
        let ended = wait::within("the end of the backup", self.job(path).await.wait()).await;
        assert_eq!(
            ended.expect("Wait answers"),
            ("completed".to_owned(), String::new(), String::new())
        );
        Ok(())
    }

    /// Returns the names of the listed domains.
    async fn listed(&self) -> Vec<String> {
        let listed = self.manager.list_domains().await.expect("domains are listed");
        listed.into_iter().map(|(_, name, _, _)| name).collect()
    }
}

fn no<T>(name: &str) -> Result<T, String> {
    Err(name.to_owned())
}

const NIGHTLY: &str = "<domainbackup><store name='nightly'/></domainbackup>";
const OPEN_FILE: &str =
    "<domainbackup><disks><disk name='vda' type='fd'><target fd='0'/></disk></disks></domainbackup>";

fn into_file(path: impl AsRef<Path>) -> String {
    format!(
        "<domainbackup><disks><disk name='vda'><target file='{}'/></disk></disks></domainbackup>",
        path.as_ref().display()
    )
}

/// Opens a file as a user.
fn open_file(system: &System, name: &str) -> OwnedFd {
    let path = system.dir().join(name);
    let file = File::options().read(true).write(true).create_new(true).open(path);
    file.expect("a file is made").into()
}

fn machine(system: &System, name: &str) -> Vm {
    system.vm(name).disk(Disk::new("vda", MIB)).start()
}

/// Starts a VM that the administrator configured.
fn configured(system: &System, name: &str) -> Vm {
    let vm = machine(system, name);
    system.domain_file(name, &vm);
    system.wait_for_domain(name);
    vm
}

/// Configures a domain after a user has registered one of that name; afterwards the user could not.
fn configured_after(system: &System, name: &str, own: &DomainProxy<'_>) -> Vm {
    let vm = machine(system, name);
    system.domain_file(name, &vm);
    wait::until(&format!("the domain {name}"), || {
        system
            .domain_path(name)
            .filter(|path| path != own.inner().path().as_str())
    });
    system.wait_for_domain(name);
    vm
}

/// Configures a domain without a QEMU, for requests that are refused before QEMU is asked.
fn configured_in_name_only(system: &System, name: &str) {
    system.write_domain_file(name, "monitor = \"/nowhere\"\n");
    wait::until(&format!("the domain {name}"), || system.domain_path(name));
}

/// Starts a system with a second store, `nightly`.
fn system_with_stores(rules: &str) -> (System, tempfile::TempDir) {
    let store = test_directory();
    let system = System::setup()
        .rules(rules)
        .store("nightly", store.path())
        .start();
    (system, store)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_backs_up_every_configured_machine_into_one_store() {
    let rules = example("50-backupd-nightly-group.rules", &[]) + &MEMBER.allowed("service.register-domain");
    let (system, store) = system_with_stores(&rules);
    let member = User::new(&system, MEMBER).await;
    let own = machine(&system, "own");
    let own = member.register("web", &own).await.unwrap();
    let _machines = [
        configured_after(&system, "web", &own),
        configured(&system, "mail"),
    ];
    for domain in ["web", "mail"] {
        assert_eq!(member.back_up(domain, NIGHTLY).await, Ok(()));
        assert_eq!(
            fs::read_dir(store.path().join(domain)).unwrap().count(),
            1,
            "{domain}"
        );
    }
    // Another store, another action, another user, a domain of a user.
    let file = into_file(system.dir().join("web.qcow2"));
    assert_eq!(member.back_up("web", "").await, no(PASSWORD));
    assert_eq!(member.back_up("web", &file).await, no(PASSWORD));
    let other = User::new(&system, ANNA).await;
    assert_eq!(other.back_up("web", NIGHTLY).await, no(PASSWORD));
    assert_eq!(member.back_up_this(&own, NIGHTLY).await, no(PASSWORD));
    assert_eq!(storage::files_below(&system.store()), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_backs_up_a_single_domain_into_the_default_store() {
    let rules = example("50-backupd-anna-web.rules", &[("anna", ANNA.name)])
        + &ANNA.allowed("service.register-domain");
    let (system, store) = system_with_stores(&rules);
    let anna = User::new(&system, ANNA).await;
    let own = machine(&system, "own");
    let own = anna.register("web", &own).await.unwrap();
    let _web = configured_after(&system, "web", &own);
    configured_in_name_only(&system, "mail");
    assert_eq!(anna.back_up("web", "").await, Ok(()));
    // Another store, domain, action or user, and a domain of the same name that is her own.
    let file = into_file(system.dir().join("web.qcow2"));
    assert_eq!(anna.back_up("web", NIGHTLY).await, no(PASSWORD));
    assert_eq!(anna.back_up("mail", "").await, no(PASSWORD));
    assert_eq!(anna.back_up("web", &file).await, no(PASSWORD));
    let bert = User::new(&system, BERT).await;
    assert_eq!(bert.back_up("web", "").await, no(PASSWORD));
    assert_eq!(anna.back_up_this(&own, "").await, no(PASSWORD));
    assert_eq!(storage::files_below(store.path()), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_cancel_and_slow_down_what_others_started_and_start_nothing() {
    // They could register domains too without a password, so that the test shows the limit of the denial.
    let rules = example("40-backupd-operators.rules", &[("backup-operators", "games")])
        + &OPERATOR.allowed("service.register-domain");
    let system = System::setup().rules(&rules).start();
    let disk = Disk::new("vda", 64 * MIB).fill(0, 64 * MIB, 0x11).slow(16 * MIB);
    let _web = system.configured(system.vm("web").disk(disk));
    let (operator, other) = (User::new(&system, OPERATOR).await, User::new(&system, ANNA).await);
    let root = Caller::new(&system).await;
    let job = root.start("web", "").await;
    let path = OwnedObjectPath::from(job.inner().path().to_owned());
    let refused = other.job(path.clone()).await;
    assert_eq!(error_name(&refused.cancel().await.unwrap_err()), PASSWORD);
    assert_eq!(error_name(&refused.set_speed(MIB).await.unwrap_err()), PASSWORD);
    let allowed = operator.job(path).await;
    allowed.set_speed(8 * MIB).await.unwrap();
    allowed.cancel().await.unwrap();
    assert_eq!(wait::within("the end", job.wait()).await.unwrap().0, "cancelled");
    // Denied, where others would be asked for a password.
    let file = into_file(system.dir().join("web.qcow2"));
    assert_eq!(operator.back_up("web", "").await, no(DENIED));
    assert_eq!(operator.back_up("web", &file).await, no(DENIED));
    assert_eq!(other.back_up("web", "").await, no(PASSWORD));
    // The denial does not affect calls without a polkit check.
    let own = machine(&system, "own");
    let own = operator.register("own", &own).await.unwrap();
    assert_eq!(operator.back_up_this(&own, "").await, no(DENIED));
    assert_eq!(
        operator.copy_into("own", &open_file(&system, "own.qcow2")).await,
        Ok(())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_example_that_denies_overrides_one_that_allows() {
    let mut names = EXAMPLES;
    names.sort_unstable();
    let (no_names, yes_names): (Vec<_>, Vec<_>) = names
        .into_iter()
        .partition(|name| example(name, &[]).contains("polkit.Result.NO;"));
    assert!(
        no_names.iter().all(|name| name.starts_with("40-")),
        "{no_names:?}"
    );
    assert!(
        yes_names.iter().all(|name| name.starts_with("50-")),
        "{yes_names:?}"
    );
    // polkit evaluates the two files in this order.
    let rules = example("40-backupd-operators.rules", &[("backup-operators", "backup")])
        + &example("50-backupd-nightly-group.rules", &[]);
    let (system, _store) = system_with_stores(&rules);
    configured_in_name_only(&system, "web");
    let both = User::new(&system, MEMBER).await;
    assert_eq!(both.back_up("web", NIGHTLY).await, no(DENIED));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_hidden_from_all_but_one_group() {
    let rules = example("40-backupd-hidden-domain.rules", &[("vault-admins", "games")])
        + &ANNA.allowed("service.register-domain")
        + &polkit::allow(
            ANNA.uid,
            &["domain.backup", "domain.export", "domain.see-foreign"],
        );
    let system = System::setup().rules(&rules).start();
    let _vault = configured(&system, "vault");
    configured_in_name_only(&system, "web");
    let (admin, anna) = (User::new(&system, OPERATOR).await, User::new(&system, ANNA).await);
    assert_eq!(admin.listed().await, ["vault", "web"]);
    admin.manager.get_domain("vault").await.unwrap();
    assert_eq!(
        admin.back_up("vault", "").await,
        no(PASSWORD),
        "the right to read allows nothing else"
    );

    assert_eq!(anna.listed().await, ["web"]);
    let hidden = anna.manager.get_domain("vault").await.unwrap_err();
    assert_eq!(error_name(&hidden), NO_SUCH_DOMAIN);
    assert_eq!(anna.back_up("vault", "").await, no(NO_SUCH_DOMAIN));
    // The group sees its jobs, and she does not.
    let root = Caller::new(&system).await;
    root.complete("vault", "").await;
    assert_eq!(admin.manager.list_jobs().await.unwrap().len(), 1);
    assert_eq!(anna.manager.list_jobs().await.unwrap().len(), 0);
    // Her own domain of that name stays hers.
    let own = machine(&system, "own");
    let _own = anna.register("vault", &own).await.unwrap();
    assert_eq!(anna.listed().await, ["vault", "web"]);
    assert_eq!(admin.listed().await, ["vault", "web"]);
    assert_eq!(anna.back_up("vault", "").await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_exports_a_single_domain_into_files_below_a_directory() {
    let place = test_directory();
    let dir = place.path().join("anna");
    let beside = place.path().join("annabel");
    for dir in [dir.join("deep"), beside.clone()] {
        fs::create_dir_all(dir).unwrap();
    }
    std::os::unix::fs::symlink(&beside, dir.join("link")).unwrap();
    let inside = format!("{}/", dir.display());
    let substitutes = [
        // The user's name is a part of the path.
        ("\"/srv/export/anna/\"", format!("{inside:?}")),
        (
            "subject.user == \"anna\"",
            format!("subject.user == {:?}", ANNA.name),
        ),
    ];
    let rules = example(
        "50-backupd-anna-export-directory.rules",
        &substitutes.each_ref().map(|(from, to)| (*from, to.as_str())),
    ) + &ANNA.allowed("service.register-domain");
    let system = System::setup().rules(&rules).start();
    let anna = User::new(&system, ANNA).await;
    let own = machine(&system, "own");
    let own = anna.register("web", &own).await.unwrap();
    let _web = configured_after(&system, "web", &own);
    configured_in_name_only(&system, "mail");
    for file in ["web.qcow2", "deep/web.qcow2"] {
        assert_eq!(anna.back_up("web", &into_file(dir.join(file))).await, Ok(()));
        assert!(dir.join(file).exists());
    }
    // Another directory, under any name, and another kind of target.
    assert_eq!(
        anna.back_up("web", &into_file(beside.join("a"))).await,
        no(PASSWORD)
    );
    assert_eq!(anna.back_up("web", &into_file(&dir)).await, no(PASSWORD));
    let doubled = format!("/{}", dir.join("doubled").display());
    assert_eq!(anna.back_up("web", &into_file(doubled)).await, Ok(()));
    let climbing = into_file(dir.join("../annabel/a"));
    assert_eq!(anna.back_up("web", &climbing).await, no(INVALID_DEFINITION));
    let linked = into_file(dir.join("link/a"));
    assert_eq!(anna.back_up("web", &linked).await, no(TARGET_INVALID));
    let device = into_file(dir.join("device"))
        .replace("name='vda'", "name='vda' type='block'")
        .replace("file=", "dev=");
    assert_eq!(anna.back_up("web", &device).await, no(PASSWORD));
    let open = open_file(&system, "open");
    assert_eq!(anna.copy_into("web", &open).await, no(PASSWORD));
    // Another domain, her own of that name, another user, another action.
    let free = into_file(dir.join("free"));
    assert_eq!(anna.back_up("mail", &free).await, no(PASSWORD));
    assert_eq!(anna.back_up_this(&own, &free).await, no(PASSWORD));
    let bert = User::new(&system, BERT).await;
    assert_eq!(bert.back_up("web", &free).await, no(PASSWORD));
    assert_eq!(anna.back_up("web", "").await, no(PASSWORD));
    assert_eq!(storage::files_below(&beside), [""; 0]);
    assert!(!dir.join("free").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_exports_a_single_domain_into_her_own_files() {
    let rules = example(
        "50-backupd-anna-export-own-files.rules",
        &[("subject.user == \"anna\"", "subject.user == \"nobody\"")],
    ) + &BERT.allowed("service.register-domain")
        + &ANNA.allowed("domain.see-foreign");
    let system = System::setup().rules(&rules).start();
    let (anna, bert) = (User::new(&system, ANNA).await, User::new(&system, BERT).await);
    let berts = machine(&system, "berts");
    let berts = bert.register("web", &berts).await.unwrap();
    let _web = configured_after(&system, "web", &berts);
    configured_in_name_only(&system, "mail");
    let file = open_file(&system, "web.qcow2");
    assert_eq!(bert.copy_into("web", &file).await, no(PASSWORD));
    assert_eq!(anna.copy_into("mail", &file).await, no(PASSWORD));
    let path = into_file(system.dir().join("other.qcow2"));
    assert_eq!(anna.back_up("web", &path).await, no(PASSWORD));
    assert_eq!(anna.back_up("web", "").await, no(PASSWORD));
    // Another user's domain of that name, which she sees.
    let path = berts.inner().path().to_owned();
    let seen = DomainProxy::new(&anna.connection, path).await.unwrap();
    assert_eq!(seen.owner().await.unwrap(), BERT.uid);
    let files = vec![(&file).into()];
    let refused = seen.create_backup(OPEN_FILE, files, Options::new()).await;
    assert_eq!(error_name(&refused.unwrap_err()), PASSWORD);
    assert_eq!(anna.copy_into("web", &file).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn members_of_a_group_register_machines_that_are_then_theirs() {
    let rules = example("50-backupd-desktop-register.rules", &[("vm-users", "games")]);
    let system = System::setup().rules(&rules).start();
    configured_in_name_only(&system, "web");
    let vm = machine(&system, "vm");
    let (user, other) = (User::new(&system, OPERATOR).await, User::new(&system, ANNA).await);
    assert_eq!(other.register("mine", &vm).await.err(), no::<()>(PASSWORD).err());
    let mine = user.register("mine", &vm).await.unwrap();
    assert_eq!(mine.owner().await.unwrap(), OPERATOR.uid);
    assert_eq!(user.listed().await, ["mine", "web"]);
    assert_eq!(other.listed().await, ["web"]);
    assert_eq!(
        user.copy_into("mine", &open_file(&system, "mine.qcow2")).await,
        Ok(())
    );
    // It allows nothing else.
    let other_open = open_file(&system, "web.qcow2");
    assert_eq!(user.back_up("mine", "").await, no(PASSWORD));
    assert_eq!(user.back_up("web", "").await, no(PASSWORD));
    assert_eq!(user.copy_into("web", &other_open).await, no(PASSWORD));
}

#[tokio::test(flavor = "multi_thread")]
async fn members_of_a_group_see_what_one_user_registered() {
    let substitutes = [
        ("\"helpdesk\"", "\"games\""),
        ("\"domain_owner\") == \"anna\"", "\"domain_owner\") == \"nobody\""),
    ];
    let rules = example("50-backupd-helpdesk-sees-anna.rules", &substitutes)
        + &ANNA.allowed("service.register-domain")
        + &BERT.allowed("service.register-domain");
    let system = System::setup().rules(&rules).start();
    let machines = [machine(&system, "one"), machine(&system, "two")];
    let (anna, bert) = (User::new(&system, ANNA).await, User::new(&system, BERT).await);
    let annas = anna.register("annas", &machines[0]).await.unwrap();
    let _berts = bert.register("berts", &machines[1]).await.unwrap();
    let helper = User::new(&system, OPERATOR).await;
    let [shown, hidden] = [(ANNA, "annas"), (BERT, "berts")].map(|(of, name)| format!("{}:{name}", of.uid));
    assert_eq!(helper.listed().await, [&*shown]);
    let path = helper.manager.get_domain(&shown).await.unwrap();
    assert_eq!(path.as_str(), annas.inner().path().as_str());
    let seen = DomainProxy::new(&helper.connection, path).await.unwrap();
    assert_eq!(seen.disks().await.unwrap().len(), 1);
    let hidden = helper.manager.get_domain(&hidden).await.unwrap_err();
    assert_eq!(error_name(&hidden), NO_SUCH_DOMAIN);
    assert_eq!(bert.listed().await, ["berts"], "another user");
    // The right to see it allows nothing else.
    let open = open_file(&system, "open");
    assert_eq!(helper.copy_into(&shown, &open).await, no(PASSWORD));
    assert_eq!(helper.back_up(&shown, "").await, no(PASSWORD));
    let options = slowly(MIB / 4);
    let files = vec![(&open).into()];
    let (_, job) = annas.create_backup(OPEN_FILE, files, options).await.unwrap();
    assert_eq!(helper.manager.list_jobs().await.unwrap().len(), 1);
    let cancelled = helper.job(job).await.cancel().await;
    assert_eq!(error_name(&cancelled.unwrap_err()), PASSWORD);
}

#[test]
fn every_example_has_a_test() {
    let tests = include_str!("rules.rs");
    let calls = tests.split_once("#[tokio::test").expect("tests follow").1;
    let mut shipped: Vec<String> = fs::read_dir(project_file("docs/polkit-rules"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    shipped.sort();
    assert_eq!(shipped, EXAMPLES);
    for name in EXAMPLES {
        assert!(calls.contains(&format!("{name:?}")), "{name}");
    }
}

#[test]
fn every_documented_action_and_detail_exists() {
    let actions: BTreeSet<&str> = TABLE.iter().map(|entry| entry.action).collect();
    let documents = ["README.md", "docs/security.md"].map(str::to_owned);
    let examples = EXAMPLES.map(|name| format!("docs/polkit-rules/{name}"));
    for document in documents.iter().chain(&examples) {
        let text = fs::read_to_string(project_file(document)).unwrap();
        for (at, _) in text.match_indices("org.example.backup1.") {
            let end = text[at..].find(|c: char| !(c.is_ascii_alphanumeric() || ".-".contains(c)));
            let id = text[at..].split_at(end.unwrap_or(text.len() - at)).0;
            let is_the_policy = id == "org.example.backup1.policy";
            assert!(
                is_the_policy || actions.contains(id.trim_end_matches('.')),
                "{document}: {id}"
            );
        }
        for part in text.split("action.lookup(\"").skip(1) {
            let key = part.split('"').next().unwrap();
            assert!(DETAILS.contains(&key), "{document}: {key}");
        }
    }
    for name in EXAMPLES {
        let text = example(name, &[]);
        assert!(actions.iter().any(|action| text.contains(action)), "{name}");
    }
}

#[test]
fn the_readme_names_every_action_example_and_limit() {
    let readme = fs::read_to_string(project_file("README.md")).unwrap();
    let rows: Vec<Vec<&str>> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"))
        .map(|row| row.split('|').map(str::trim).collect())
        .collect();
    let actions: Vec<(String, &str)> = rows
        .iter()
        .filter(|row| ["service", "domain", "backup"].contains(&row[0]) && row.len() == 4)
        .map(|row| {
            let permission = row[1].trim_matches('`');
            (format!("org.example.backup1.{}.{permission}", row[0]), row[3])
        })
        .collect();
    let expected: Vec<(String, &str)> = TABLE
        .iter()
        .map(|entry| {
            let answer = match entry.implicit {
                Implicit::Yes => "yes",
                Implicit::No => "no",
                Implicit::Administrator => "a password, each time",
                Implicit::AdministratorKept => "a password, kept",
            };
            (entry.action.to_owned(), answer)
        })
        .collect();
    assert_eq!(actions, expected);
    let of_rules = |row: &&Vec<&str>| row[1].trim_matches('`').ends_with(".rules");
    let examples = rows.iter().filter(|row| row.len() == 2).filter(of_rules);
    let examples: BTreeSet<&str> = examples.map(|row| row[1].trim_matches('`')).collect();
    assert_eq!(examples, BTreeSet::from(EXAMPLES));
    let limits = Limits::default();
    for (key, per_user, in_all) in [
        ("calls", limits.calls_per_user, limits.calls),
        ("jobs", limits.jobs_per_user, limits.jobs),
        (
            "registered-domains",
            limits.registered_domains_per_user,
            limits.registered_domains,
        ),
        (
            "subscriptions",
            limits.subscriptions_per_user,
            limits.subscriptions,
        ),
        (
            "password-dialogs",
            limits.password_dialogs_per_user,
            limits.password_dialogs,
        ),
        ("descriptors", limits.descriptors_per_user, limits.descriptors),
    ] {
        let row = format!("| `{key}` | {per_user} | {in_all} |");
        assert!(readme.contains(&row), "{row}");
    }
    let row = format!("| `document-bytes` | | {} |", limits.document_bytes);
    assert!(readme.contains(&row), "{row}");
}

/// A rule that matches a domain's name states whose domain it means.
#[test]
fn an_example_that_names_a_domain_names_its_owner() {
    for name in EXAMPLES {
        let text = example(name, &[]);
        if text.contains("lookup(\"domain_name\")") {
            assert!(text.contains("lookup(\"domain_owner\") == \"root\""), "{name}");
        }
    }
}

#[test]
fn no_example_is_installed() {
    let mut command = Command::new("make");
    // make prints the commands and does not execute them.
    command.args(["--no-print-directory", "--dry-run", "--always-make", "install"]);
    command.arg("DESTDIR=/nowhere").arg("CARGO=true");
    command
        .current_dir(project_file(""))
        .env_remove("MAKEFLAGS")
        .env_remove("MAKELEVEL");
    let commands = process::run(command).expect_success();
    assert!(
        commands.contains("/nowhere/usr/share/polkit-1/actions"),
        "{commands}"
    );
    assert!(!commands.contains("rules"), "{commands}");
}
