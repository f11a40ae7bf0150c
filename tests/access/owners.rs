//! Domains that users register: their owners, their names, and the users that see them.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use crate::common::System;
use crate::common::authority::{Answer, Authority, Question};
use crate::common::caller::{Caller, assert_completed, brief};
use crate::common::clients::{OTHER_USER, ROOT, USER};
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::proxies::{Options, error_name};
use crate::common::storage::{files_below, holds};
use crate::common::vm::{Builder, Vm};
use crate::common::wait;
use zbus::wire::OwnedObjectPath;

const MIB: u64 = 1 << 20;
const NO_SUCH_DOMAIN: &str = "org.example.Backup1.Error.NoSuchDomain";
const ACCESS_DENIED: &str = "org.freedesktop.DBus.Error.AccessDenied";
const UNREACHABLE: &str = "org.example.Backup1.Error.DomainUnreachable";
const INVALID_ARGS: &str = "org.freedesktop.DBus.Error.InvalidArgs";
const NEEDS_PASSWORD: &str = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired";
const TO_DESCRIPTOR: &str =
    "<domainbackup><disks><disk name='vda' type='fd'><target fd='0'/></disk></disks></domainbackup>";

fn machine(system: &System, name: &str, pattern: u8) -> Vm {
    let disk = Disk::new("vda", 16 * MIB).fill(0, MIB, pattern);
    system.vm(name).disk(disk).start()
}

/// Starts a system whose ordinary users may register domains.
fn system(further_rules: &str) -> System {
    let rules = [USER, OTHER_USER].map(|uid| polkit::allow(uid, &["service.register-domain"]));
    System::setup()
        .rules(further_rules)
        .rules(&rules.concat())
        .start()
}

async fn register(caller: &Caller, name: &str, vm: &Vm) -> zbus::Result<OwnedObjectPath> {
    let socket = OwnedFd::from(vm.monitor_stream());
    let registering = caller
        .manager
        .register_domain(name, socket.as_fd().into(), Options::new());
    wait::within("RegisterDomain", registering).await
}

async fn names(caller: &Caller) -> Vec<String> {
    let domains = caller.manager.list_domains().await.unwrap();
    domains.into_iter().map(|(_, name, ..)| name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registered_domain_is_seen_by_its_owner_and_root_only() {
    let system = system("");
    let vm = machine(&system, "mine", 0x11);
    let root = Caller::new(&system).await;
    let owner = Caller::of_user(&system, USER).await;
    let mut other = Caller::of_user(&system, OTHER_USER).await;
    other.manager.subscribe().await.unwrap();
    let path = register(&owner, "mine", &vm).await.unwrap();
    let unique = format!("{USER}:mine");
    for (caller, name) in [(&owner, "mine"), (&root, &*unique)] {
        assert_eq!(names(caller).await, [name]);
        assert_eq!(caller.manager.get_domain(name).await.unwrap(), path);
        assert_eq!(caller.manager.get_domain(&unique).await.unwrap(), path);
    }
    assert_eq!(names(&other).await, [""; 0]);
    for name in ["mine", vm.uuid(), &unique] {
        let refused = other.manager.get_domain(name).await.unwrap_err();
        assert_eq!(error_name(&refused), NO_SUCH_DOMAIN);
        let refused = other.try_start(name, "", &[], Options::new()).await.unwrap_err();
        assert_eq!(error_name(&refused), NO_SUCH_DOMAIN);
    }
    // Another connection of the owner has the owner's rights too.
    let again = Caller::of_user(&system, USER).await;
    assert_eq!(names(&again).await, ["mine"]);
    // The signals of the other subscriber up to a backup's end do not include it.
    let job = root.complete(&unique, "").await;
    let heard = brief(&other.signals_until("JobEnded").await);
    let job = job.inner().path();
    assert_eq!(
        heard,
        [
            format!("JobStarted 1 {job}"),
            format!("JobEnded 1 {job} completed")
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_can_show_a_users_domains_to_another() {
    let show = format!(
        "polkit.addRule(function(action, subject) {{
            if (action.id == 'org.example.backup1.domain.see-foreign' && subject.user == '{}'
                && action.lookup('domain_owner') == '{}') return polkit.Result.YES;
        }});\n",
        polkit::user_name(OTHER_USER),
        polkit::user_name(USER)
    );
    let system = system(&show);
    let vm = machine(&system, "mine", 0x11);
    let owner = Caller::of_user(&system, USER).await;
    register(&owner, "mine", &vm).await.unwrap();
    let other = Caller::of_user(&system, OTHER_USER).await;
    let unique = format!("{USER}:mine");
    assert_eq!(names(&other).await, [&*unique]);
    // The right to read does not include the right to back up.
    let refused = other
        .try_start(&unique, "", &[], Options::new())
        .await
        .unwrap_err();
    assert_eq!(error_name(&refused), NEEDS_PASSWORD);
    let third = Caller::of_user(&system, 2).await;
    assert_eq!(names(&third).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_exports_to_its_own_files_without_a_password_and_nothing_else() {
    let system = system("");
    let vm = machine(&system, "mine", 0x33);
    let owner = Caller::of_user(&system, USER).await;
    register(&owner, "mine", &vm).await.unwrap();
    let target = system.dir().join("mine.qcow2");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&target)
        .unwrap();
    let job = owner
        .start_with("mine", TO_DESCRIPTOR, &[file.into()], Options::new())
        .await;
    assert_completed(&job).await;
    assert!(holds(&target, "qcow2", 0, MIB, 0x33));
    // Targets that the service opens as root, and the administrator's stores, need the administrator's permission.
    let file =
        "<domainbackup><disks><disk name='vda'><target file='/tmp/x.qcow2'/></disk></disks></domainbackup>";
    for document in ["", file] {
        let refused = owner
            .try_start("mine", document, &[], Options::new())
            .await
            .unwrap_err();
        assert_eq!(error_name(&refused), NEEDS_PASSWORD);
    }
    assert_eq!(files_below(&system.store()), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_name_of_a_hidden_domain_can_be_taken_and_shadows_nothing() {
    let hide = "polkit.addRule(function(action, subject) {
        if (action.id == 'org.example.backup1.domain.getattr' && action.lookup('domain_owner') == 'root'
            && subject.user != 'root') return polkit.Result.NO;
    });\n";
    let system = system(&format!("{hide}{}", polkit::allow(USER, &["domain.backup"])));
    let (configured, mine, others) = (
        machine(&system, "secret", 0x11),
        machine(&system, "mine", 0x22),
        machine(&system, "others", 0x33),
    );
    system.domain_file("secret", &configured);
    system.wait_for_domain("secret");
    let root = Caller::new(&system).await;
    let owner = Caller::of_user(&system, USER).await;
    let other = Caller::of_user(&system, OTHER_USER).await;
    // A free name and a hidden one in use have the same reply.
    let own = register(&owner, "secret", &mine).await.unwrap();
    let theirs = register(&other, "secret", &others).await.unwrap();
    assert_eq!(owner.manager.get_domain("secret").await.unwrap(), own);
    assert_eq!(other.manager.get_domain("secret").await.unwrap(), theirs);
    let real = root.manager.get_domain("secret").await.unwrap();
    assert!(real != own && real != theirs);
    // The caller's own names are in use, though.
    let refused = register(&owner, "secret", &mine).await.unwrap_err();
    assert_eq!(error_name(&refused), INVALID_ARGS);

    // No backup of a user can pass for one of the real domain.
    owner.complete("secret", "").await;
    root.complete("secret", "").await;
    let pattern = |directory: &str| {
        let files = files_below(&system.store().join(directory));
        let image = files.iter().find(|file| file.ends_with("vda.qcow2")).unwrap();
        let image = system.store().join(directory).join(image);
        [0x11, 0x22]
            .into_iter()
            .find(|pattern| holds(&image, "qcow2", 0, MIB, *pattern))
    };
    assert_eq!(pattern("secret"), Some(0x11));
    assert_eq!(pattern(&format!("{USER}:secret")), Some(0x22));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_the_caller_sees_is_taken() {
    let system = system("");
    let (configured, mine) = (machine(&system, "web", 0x11), machine(&system, "mine", 0x22));
    system.domain_file("web", &configured);
    system.wait_for_domain("web");
    let owner = Caller::of_user(&system, USER).await;
    let refused = register(&owner, "web", &mine).await.unwrap_err();
    assert_eq!(error_name(&refused), INVALID_ARGS);
    assert!(refused.to_string().contains("exists already"), "{refused}");
    assert_eq!(names(&owner).await, ["web"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_resolves_to_no_other_domain_while_polkit_does_not_reply() {
    let system = System::setup().without_polkit().start();
    let authority = Authority::start(&system, |_| Answer::Yes).await;
    let (configured, mine) = (machine(&system, "web", 0x11), machine(&system, "mine", 0x22));
    let owner = Caller::of_user(&system, USER).await;
    let own = register(&owner, "web", &mine).await.unwrap();
    assert_eq!(owner.manager.get_domain("web").await.unwrap(), own);
    system.domain_file("web", &configured);
    wait::until_async("the configured one to come first", async || {
        (owner.manager.get_domain("web").await.ok()? != own).then_some(())
    })
    .await;
    let about_configured = |question: &Question| {
        let of = |key: &str| question.details.get(key).map(String::as_str);
        of("domain_name") == Some("web") && of("domain_owner") == Some("root")
    };
    authority
        .decide_by(move |question| match about_configured(question) {
            true => Answer::Error,
            false => Answer::Yes,
        })
        .await;
    // No request for one domain backs up the other.
    wait::until_async("polkit's change to be noticed", async || {
        owner.manager.get_domain("web").await.err().map(drop)
    })
    .await;
    let refused = owner.try_start("web", "", &[], Options::new()).await.unwrap_err();
    assert_eq!(error_name(&refused), ACCESS_DENIED);
    // When polkit denies the read right, the name is free for the caller.
    authority
        .decide_by(move |question| match about_configured(question) {
            true => Answer::No,
            false => Answer::Yes,
        })
        .await;
    wait::until_async("the name to mean the caller's own domain", async || {
        (owner.manager.get_domain("web").await.ok()? == own).then_some(())
    })
    .await;
    authority.stop(&system).await;
}

/// Starts a VM that has the name and the UUID of another one.
fn impostor(system: &System, of: &Vm) -> Vm {
    let builder = Builder::new(&system.dir().join("impostor"), of.name()).uuid(of.uuid());
    builder.disk(Disk::new("vda", 4 * MIB).fill(0, MIB, 0x66)).start()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_never_means_what_a_less_trusted_user_has_registered_under_it() {
    let mut system = system("");
    let web = system.configured(system.vm("web").disk(Disk::new("vda", 4 * MIB)).running());
    let impostor = impostor(&system, &web);
    let root = Caller::new(&system).await;
    root.complete("web", "").await;
    let before = files_below(&system.store());
    let mallory = Caller::of_user(&system, USER).await;
    let unique = format!("{USER}:web");
    system.remove_domain_file("web");
    let path = register(&mallory, "web", &impostor).await.unwrap();
    let ctl = |arguments: &[&str]| system.clients().backupctl(ROOT, arguments);
    for (arguments, reason) in [
        (&["create", "web"][..], "no domain '"),
        (&["create", web.uuid()], "no domain '"),
        (&["create", "--instance", "--", "web"], "no domain '"),
        (&["create", "--instance", "--", &unique], "is not configured"),
    ] {
        let output = ctl(arguments);
        assert_eq!(output.status, 1, "{arguments:?}: {}", output.stderr);
        assert!(output.stderr.contains(reason), "{}", output.stderr);
        assert!(output.stderr.contains(&unique), "{}", output.stderr);
    }
    assert_eq!(files_below(&system.store()), before);
    let refused = ctl(&["--json", "create", "web"]);
    assert!(refused.stderr.contains(NO_SUCH_DOMAIN), "{refused:?}");
    // For her it is her own domain; root sees it under another name.
    assert_eq!(mallory.manager.get_domain("web").await.unwrap(), path);
    ctl(&["create", &unique]).expect_success();
    let new = files_below(&system.store());
    let new: Vec<_> = new.iter().filter(|file| !before.contains(file)).collect();
    assert!(
        !new.is_empty() && new.iter().all(|file| file.starts_with(&unique)),
        "{new:?}"
    );
    // Every list names the owners.
    let owner = polkit::user_name(USER);
    for list in [&["domains"][..], &["jobs", "--all"], &["backups"]] {
        let text = ctl(list).expect_success();
        let line = text.lines().find(|line| line.contains(&unique));
        assert!(line.is_some_and(|line| line.contains(&owner)), "{list:?}: {text}");
        let json = ctl(&[&["--json"], list].concat()).expect_success();
        let json: Vec<serde_json::Value> = match serde_json::from_str(&json).unwrap() {
            serde_json::Value::Array(list) => list,
            other => panic!("{other}"),
        };
        let named = |value: &&serde_json::Value| value["name"] == *unique || value["domain"] == *unique;
        let theirs: Vec<_> = json.iter().filter(named).collect();
        assert!(
            !theirs.is_empty() && theirs.iter().all(|value| value["owner"] == USER),
            "{json:?}"
        );
    }
    let own = ctl(&["backups", "web"]).expect_success();
    assert!(own.contains("web") && !own.contains(&unique), "{own}");
    for by in ["web", web.uuid()] {
        let text = ctl(&["prune", by, "--keep-last", "1", "--dry-run"]).expect_success();
        assert!(text.contains("web") && !text.contains(&unique), "{text}");
    }
    assert_eq!(system.stop_daemon(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_uuid_means_no_other_users_domain_while_the_configured_one_is_down() {
    let mut system = system("");
    let mut web = system.configured(system.vm("web").running());
    let impostor = impostor(&system, &web);
    let uuid = web.uuid().to_owned();
    let root = Caller::new(&system).await;
    let mallory = Caller::of_user(&system, USER).await;
    let configured = root.manager.get_domain("web").await.unwrap();
    register(&mallory, "own", &impostor).await.unwrap();
    assert_eq!(root.manager.get_domain(&uuid).await.unwrap(), configured);
    web.kill();
    system.stop_daemon();
    // The service does not know its UUID now.
    system.start_daemon();
    let root = Caller::new(&system).await;
    let mallory = Caller::of_user(&system, USER).await;
    register(&mallory, "own", &impostor).await.unwrap();
    let refused = root.try_start(&uuid, "", &[], Options::new()).await.unwrap_err();
    assert_eq!(error_name(&refused), NO_SUCH_DOMAIN);
    let refused = root.try_start("web", "", &[], Options::new()).await.unwrap_err();
    assert_eq!(error_name(&refused), UNREACHABLE);
}
