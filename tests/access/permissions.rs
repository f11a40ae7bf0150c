//! Every member of every interface, called by every kind of user on every kind of domain, compared with the table of
//! permissions.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use crate::common::System;
use crate::common::bus::project_file;
use crate::common::caller::{Caller, assert_completed};
use crate::common::chain::directories;
use crate::common::clients::{OTHER_USER, ROOT, USER};
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::proxies::{Options, error_name, slowly};
use crate::common::vm::Vm;
use crate::common::wait;
use backupd::access::Permission;
use backupd::bus::{METHODS, visibility_of_properties};
use backupd::names::{
    BACKUP_INTERFACE, BUS_NAME, DOMAIN_INTERFACE, JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH,
};
use zbus::wire::{OwnedObjectPath, Variant};

const MIB: u64 = 1 << 20;
/// Debian's `bin` and `sys`, which have no special rights.
const OWNER: u32 = 2;
const READER: u32 = 3;

const EVERYTHING: [&str; 14] = [
    "service.search-domains",
    "service.register-domain",
    "service.rescan",
    "domain.getattr",
    "domain.see-foreign",
    "domain.read",
    "domain.backup",
    "domain.export",
    "domain.abort",
    "domain.set-speed",
    "domain.checkpoint",
    "backup.delete",
    "backup.restore",
    "backup.verify",
];

/// Backups for the other members end with the first of these, and so do the calls that wait for them.
const LAST: [&str; 2] = ["Job.Cancel", "Job.Wait"];

/// A caller, and its rights under the rules below.
struct Person {
    who: &'static str,
    uid: u32,
    caller: Caller,
}

impl Person {
    /// Returns polkit's reply under the rules below.
    fn has(&self, permission: Permission, domain: &Known) -> bool {
        match permission {
            _ if self.who == "root" => true,
            Permission::ServiceSearchDomains => true,
            Permission::ServiceRegisterDomain => ["allowed", "owner"].contains(&self.who),
            Permission::DomainSeeForeign => false,
            Permission::DomainGetattr => !domain.hidden,
            Permission::DomainCheckpoint => self.who == "allowed",
            Permission::DomainRead => self.who != "denied",
            Permission::ServiceRescan
            | Permission::DomainBackup
            | Permission::DomainExport
            | Permission::DomainAbort
            | Permission::DomainSetSpeed
            | Permission::BackupDelete
            | Permission::BackupRestore
            | Permission::BackupVerify => self.who == "allowed",
        }
    }

    fn sees(&self, domain: &Known) -> bool {
        let own = !domain.registered || self.uid == OWNER || self.uid == ROOT;
        (!domain.hidden || self.uid == ROOT) && own
    }

    fn reads(&self, domain: &Known) -> bool {
        self.sees(domain) && self.has(Permission::DomainRead, domain)
    }
}

struct Known {
    name: &'static str,
    path: OwnedObjectPath,
    job: OwnedObjectPath,
    backup: OwnedObjectPath,
    backup_id: String,
    hidden: bool,
    registered: bool,
}

fn rules() -> String {
    let hide = "polkit.addRule(function(action, subject) {
        if (action.id == 'org.example.backup1.domain.getattr' && action.lookup('domain_name') == 'secret'
            && subject.user != 'root') return polkit.Result.NO;
    });\n";
    let but_foreign: Vec<&str> = EVERYTHING
        .into_iter()
        .filter(|it| !it.ends_with("foreign"))
        .collect();
    let denied: Vec<&str> = but_foreign
        .iter()
        .copied()
        .filter(|it| !it.ends_with("getattr") && !it.ends_with("search-domains"))
        .collect();
    [
        hide,
        &polkit::allow(USER, &but_foreign),
        &polkit::deny(OTHER_USER, &denied),
        &polkit::allow(OWNER, &["service.register-domain"]),
    ]
    .concat()
}

fn slow_machine(system: &System, name: &str) -> Vm {
    // At the bandwidth of `SLOW` its backup takes longer than the test.
    let disk = Disk::new("vda", 256 * MIB).fill(0, 256 * MIB, 0x11);
    system.vm(name).disk(disk).start()
}

/// Bytes a second.
const SLOW: u64 = MIB;

/// Returns a domain as root sees it, with a backup in the store and a running one that root started.
async fn known(root: &Caller, path: OwnedObjectPath, name: &'static str) -> Known {
    for _ in 0..2 {
        let job = start_on(root, &path, slowly(0)).await;
        assert_completed(&root.job(job).await).await;
    }
    let wanted = Options::from([("domain", Variant::from(name))]);
    let (backups, _) = root.manager.list_backups(wanted).await.unwrap();
    let slow = slowly(SLOW);
    Known {
        name,
        job: start_on(root, &path, slow).await,
        path,
        backup: backups[0].0.clone(),
        backup_id: backups[0].1.clone(),
        hidden: name == "secret",
        registered: name == "2:mine",
    }
}

/// Starts a backup of the domain at that path.
async fn start_on(root: &Caller, path: &OwnedObjectPath, options: Options<'_>) -> OwnedObjectPath {
    let arguments = ("", Vec::<zbus::Fd<'_>>::new(), options);
    let (name, interface) = (Some(BUS_NAME), Some(DOMAIN_INTERFACE));
    let started = root
        .connection
        .call_method(name, path, interface, "CreateBackup", &arguments);
    let (_, job): (u32, OwnedObjectPath) = started.await.unwrap().body().deserialize().unwrap();
    job
}

/// The result of a call: `ok`, or the error's name without its prefix, and its text.
type Outcome = Result<(), (String, String)>;

async fn call<B>(caller: &Caller, path: &str, interface: &str, member: &str, body: &B) -> Outcome
where
    B: serde::Serialize + zbus::wire::DynamicType,
{
    let call = caller
        .connection
        .call_method(Some(BUS_NAME), path, Some(interface), member, body);
    match wait::within(member, call).await {
        Ok(_) => Ok(()),
        Err(error) => {
            let name = error_name(&error);
            Err((
                name.rsplit('.').next().unwrap_or_default().to_owned(),
                error.to_string(),
            ))
        }
    }
}

async fn get(caller: &Caller, path: &str, interface: &str, property: &str) -> Outcome {
    let arguments = (interface, property);
    call(caller, path, "org.freedesktop.DBus.Properties", "Get", &arguments).await
}

/// Calls a member of the table about a domain with valid arguments.
async fn use_member(person: &Person, member: &str, domain: &Known) -> Outcome {
    let caller = &person.caller;
    let (path, job) = (domain.path.as_str(), domain.job.as_str());
    let no_files = Vec::<zbus::Fd<'_>>::new;
    let store = "<domainbackup><store name='default'/></domainbackup>";
    match member {
        "Version" => get(caller, ROOT_PATH, MANAGER_INTERFACE, member).await,
        "CreateBackup" => {
            let body = (domain.name, store, no_files(), Options::new());
            call(caller, ROOT_PATH, MANAGER_INTERFACE, member, &body).await
        }
        "GetDomain" => call(caller, ROOT_PATH, MANAGER_INTERFACE, member, &domain.name).await,
        "GetJob" => {
            let id: u32 = job.rsplit('/').next().unwrap().parse().unwrap();
            call(caller, ROOT_PATH, MANAGER_INTERFACE, member, &id).await
        }
        "RegisterDomain" => {
            let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
            let socket = OwnedFd::from(socket);
            let body = ("new", zbus::Fd::from(socket.as_fd()), Options::new());
            call(caller, ROOT_PATH, MANAGER_INTERFACE, member, &body).await
        }
        "ListDomains" | "ListJobs" | "Subscribe" | "Unsubscribe" => {
            call(caller, ROOT_PATH, MANAGER_INTERFACE, member, &()).await
        }
        "ListBackups" => call(caller, ROOT_PATH, MANAGER_INTERFACE, member, &Options::new()).await,
        "GetBackup" => call(caller, ROOT_PATH, MANAGER_INTERFACE, member, &domain.backup_id).await,
        "Prune" => {
            let options = Options::from([("keep-last", Variant::from(1u64))]);
            call(
                caller,
                ROOT_PATH,
                MANAGER_INTERFACE,
                member,
                &(domain.name, options),
            )
            .await
        }
        "Rescan" => call(caller, ROOT_PATH, MANAGER_INTERFACE, member, &Options::new()).await,
        "Domain.CreateBackup" => {
            let body = (store, no_files(), Options::new());
            call(caller, path, DOMAIN_INTERFACE, "CreateBackup", &body).await
        }
        "Domain.CreateCheckpoint" | "Domain.DeleteCheckpoint" => {
            let body = ("", Options::new());
            call(caller, path, DOMAIN_INTERFACE, &member[7..], &body).await
        }
        "Domain.ListCheckpoints" => call(caller, path, DOMAIN_INTERFACE, &member[7..], &Options::new()).await,
        "Domain.GetCheckpointDefinition" => call(caller, path, DOMAIN_INTERFACE, &member[7..], &"none").await,
        "Job.Cancel" | "Job.GetDefinition" => call(caller, job, JOB_INTERFACE, &member[4..], &()).await,
        "Job.CancelDisk" => call(caller, job, JOB_INTERFACE, "CancelDisk", &"no-such-disk").await,
        "Job.SetSpeed" => call(caller, job, JOB_INTERFACE, "SetSpeed", &SLOW).await,
        "Job.Wait" => call(caller, job, JOB_INTERFACE, "Wait", &()).await,
        member => match member.split_once('.') {
            Some(("Domain", property)) => get(caller, path, DOMAIN_INTERFACE, property).await,
            Some(("Job", property)) => get(caller, job, JOB_INTERFACE, property).await,
            Some(("Backup", "Delete")) => {
                call(
                    caller,
                    &domain.backup,
                    BACKUP_INTERFACE,
                    "Delete",
                    &Options::new(),
                )
                .await
            }
            Some(("Backup", "Protect")) => {
                let body = (false, Options::new());
                call(caller, &domain.backup, BACKUP_INTERFACE, "Protect", &body).await
            }
            Some(("Backup", "Restore")) => {
                let body = (Vec::<(String, zbus::Fd<'_>)>::new(), Options::new());
                call(caller, &domain.backup, BACKUP_INTERFACE, "Restore", &body).await
            }
            Some(("Backup", "Export")) => {
                let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
                let body = ("", zbus::Fd::from(&socket), Options::new());
                call(caller, &domain.backup, BACKUP_INTERFACE, "Export", &body).await
            }
            Some(("Backup", "Verify")) => {
                call(
                    caller,
                    &domain.backup,
                    BACKUP_INTERFACE,
                    "Verify",
                    &Options::new(),
                )
                .await
            }
            Some(("Backup", property)) => get(caller, &domain.backup, BACKUP_INTERFACE, property).await,
            _ => panic!("{member} is not called by any test"),
        },
    }
}

/// Returns the methods and properties of the service's interfaces, as `INTERFACE.MEMBER`; members of the root interface
/// without `INTERFACE`. Each has the permissions that it can need.
fn members() -> BTreeMap<String, Vec<Permission>> {
    let name = |interface: &str, member: &str| {
        let below = interface.strip_prefix(MANAGER_INTERFACE).unwrap();
        format!("{below}.{member}").trim_start_matches('.').to_owned()
    };
    let ours = METHODS
        .iter()
        .filter(|row| row.interface.starts_with(MANAGER_INTERFACE));
    let mut members: BTreeMap<_, _> = ours
        .map(|row| {
            let needed = [row.visibility.permissions(), row.permissions].concat();
            (name(row.interface, row.member), needed)
        })
        .collect();
    for interface in [
        MANAGER_INTERFACE,
        DOMAIN_INTERFACE,
        JOB_INTERFACE,
        BACKUP_INTERFACE,
    ] {
        let text = std::fs::read(project_file(&format!("dbus/{interface}.xml"))).unwrap();
        let node = zbus_xml::Node::from_reader(text.as_slice()).unwrap();
        let needed = visibility_of_properties(interface).permissions();
        for property in node.interfaces()[0].properties() {
            members.insert(name(interface, property.name().as_str()), needed.to_vec());
        }
    }
    members
}

/// Returns the result that the table defines. `needed` are the member's permissions.
fn expected(person: &Person, member: &str, needed: &[Permission], domain: &Known) -> &'static str {
    let needs = |permission| needed.contains(&permission);
    let lacks = |permission| needs(permission) && !person.has(permission, domain);
    if needed.is_empty() {
        return "ok";
    }
    // An object that the caller may not know of does not exist for it.
    let about_job = member.starts_with("Job.") || member.starts_with("Backup.");
    let about_domain = member.starts_with("Domain.");
    if about_job && !person.reads(domain) || about_domain && !person.sees(domain) {
        return "UnknownObject";
    }
    match member {
        "GetJob" if !person.reads(domain) => return "NoSuchJob",
        "GetBackup" if !person.reads(domain) => return "NoSuchBackup",
        "GetDomain" | "CreateBackup" if !person.sees(domain) => return "NoSuchDomain",
        // Filtered, not refused.
        "ListJobs" | "ListBackups" => return "ok",
        "Prune" if !person.reads(domain) => return "ok",
        "ListDomains" if !lacks(Permission::ServiceSearchDomains) => return "ok",
        _ => {}
    }
    let challenged = |permission| {
        let forbidden = person.who == "denied";
        if forbidden || permission == Permission::DomainRead {
            "AccessDenied"
        } else {
            "InteractiveAuthorizationRequired"
        }
    };
    for permission in [
        Permission::ServiceSearchDomains,
        Permission::ServiceRescan,
        Permission::DomainRead,
        Permission::DomainAbort,
        Permission::DomainSetSpeed,
        Permission::DomainCheckpoint,
        Permission::BackupDelete,
        Permission::BackupRestore,
        Permission::BackupVerify,
    ] {
        if lacks(permission) {
            return challenged(permission);
        }
    }
    // The document decides which of the two is needed: here, a store.
    if needs(Permission::DomainBackup) {
        return if lacks(Permission::DomainBackup) {
            challenged(Permission::DomainBackup)
        } else {
            // One exists already.
            "Busy"
        };
    }
    match member {
        "RegisterDomain" if lacks(Permission::ServiceRegisterDomain) => {
            challenged(Permission::ServiceRegisterDomain)
        }
        // The peer of the passed socket sends no greeting.
        "RegisterDomain" => "DomainUnreachable",
        "Job.CancelDisk" => "NoSuchDisk",
        // Its directory contains a file that does not belong to the backup.
        "Backup.Delete" => "TargetInvalid",
        // The document names no disk, and the socket does not listen.
        "Backup.Restore" | "Backup.Export" => "InvalidArgs",
        // A backup exists already.
        "Domain.CreateCheckpoint" | "Domain.DeleteCheckpoint" => "Busy",
        "Domain.GetCheckpointDefinition" => "NoSuchCheckpoint",
        _ => "ok",
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_member_follows_the_permission_table_for_every_kind_of_caller() {
    let system = System::setup().rules(&rules()).start();
    let (web, secret, mine) = (
        slow_machine(&system, "web"),
        slow_machine(&system, "secret"),
        slow_machine(&system, "mine"),
    );
    for (name, vm) in [("web", &web), ("secret", &secret)] {
        system.domain_file(name, vm);
        system.wait_for_domain(name);
    }
    let mut people = Vec::new();
    for (who, uid) in [
        ("root", ROOT),
        ("allowed", USER),
        ("denied", OTHER_USER),
        ("owner", OWNER),
        ("reader", READER),
    ] {
        let caller = match uid {
            ROOT => Caller::new(&system).await,
            uid => Caller::of_user(&system, uid).await,
        };
        people.push(Person { who, uid, caller });
    }
    let root = &people[0].caller;
    let owner = &people[3].caller;
    let socket = OwnedFd::from(mine.monitor_stream());
    let registered = owner
        .manager
        .register_domain("mine", socket.as_fd().into(), Options::new())
        .await
        .unwrap();
    let domains = [
        known(root, root.manager.get_domain("web").await.unwrap(), "web").await,
        known(root, root.manager.get_domain("secret").await.unwrap(), "secret").await,
        known(root, registered, "2:mine").await,
    ];
    for backup in ["web", "secret", "2:mine"] {
        for directory in directories(&system.store().join(backup)) {
            std::fs::write(directory.join("notes"), "mine").unwrap();
        }
    }
    let members = members();
    let first = members.keys().map(String::as_str);
    let first = first.filter(|member| !LAST.contains(member));
    let mut wrong = Vec::new();
    let mut tried = 0;
    for member in first.chain(LAST) {
        for domain in &domains {
            // Root last, because it may do everything.
            for person in people.iter().rev() {
                let outcome = use_member(person, member, domain).await;
                let (found, text) = outcome.err().unwrap_or_else(|| ("ok".into(), String::new()));
                let expected = expected(person, member, &members[member], domain);
                tried += 1;
                if found != expected {
                    let (who, name) = (person.who, domain.name);
                    wrong.push(format!(
                        "{who} {member} {name}: {expected} expected, {found} found: {text}"
                    ));
                }
                if !person.sees(domain) && domain.name != "2:mine" {
                    assert!(
                        !text.contains("secret") || member.contains("Domain") || member == "CreateBackup",
                        "{text}"
                    );
                }
            }
        }
    }
    assert!(wrong.is_empty(), "of {tried}:\n{}", wrong.join("\n"));
    drop((web, secret, mine));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_on_hidden_objects_get_the_reply_of_missing_ones() {
    let system = System::setup().rules(&rules()).start();
    let secret = slow_machine(&system, "secret");
    system.domain_file("secret", &secret);
    system.wait_for_domain("secret");
    let root = Caller::new(&system).await;
    let hidden = known(&root, root.manager.get_domain("secret").await.unwrap(), "secret").await;
    let user = Caller::of_user(&system, USER).await;
    let error = async |path: &str, interface: &str, member: &str, body: Variant<'static>| {
        let arguments = zbus::wire::StructureBuilder::new()
            .append_field(body)
            .build()
            .unwrap();
        let connection = &user.connection;
        let refused = connection.call_method(Some(BUS_NAME), path, Some(interface), member, &arguments);
        // An error consists of the name and the text only.
        refused.await.unwrap_err().to_string().replace(path, "PATH")
    };
    let calls = [
        ("org.freedesktop.DBus.Introspectable", "Introspect"),
        ("org.freedesktop.DBus.Properties", "Get"),
        ("org.freedesktop.DBus.Properties", "GetAll"),
        (DOMAIN_INTERFACE, "CreateBackup"),
        (JOB_INTERFACE, "Cancel"),
        (JOB_INTERFACE, "SetSpeed"),
        (JOB_INTERFACE, "Wait"),
        (MANAGER_INTERFACE, "ListDomains"),
    ];
    for (there, never) in [
        (
            hidden.path.as_str(),
            "/org/example/Backup1/domain/0123456789abcdef",
        ),
        (hidden.job.as_str(), "/org/example/Backup1/job/4000000000"),
        (
            hidden.backup.as_str(),
            "/org/example/Backup1/backup/0123456789abcdef",
        ),
    ] {
        for (interface, member) in calls {
            // Arguments that fit no method: the error must not reveal whether the object exists.
            for body in [
                Variant::from(7u8),
                Variant::from("x"),
                Variant::from(DOMAIN_INTERFACE),
            ] {
                let (found, expected) = (
                    error(there, interface, member, body.try_clone().unwrap()).await,
                    error(never, interface, member, body).await,
                );
                assert_eq!(found, expected, "{interface}.{member}");
                assert!(found.contains("UnknownObject"), "{found}");
            }
        }
    }
    // Introspection from the root does not find it either.
    for path in [
        "/",
        "/org",
        ROOT_PATH,
        "/org/example/Backup1/domain",
        "/org/example/Backup1/job",
        "/org/example/Backup1/backup",
    ] {
        let introspect = user.connection.call_method(
            Some(BUS_NAME),
            path,
            Some("org.freedesktop.DBus.Introspectable"),
            "Introspect",
            &(),
        );
        let text: String = introspect.await.unwrap().body().deserialize().unwrap();
        let last = |path: &str| format!("\"{}\"", path.rsplit('/').next().unwrap());
        assert!(!text.contains("secret"), "{text}");
        assert!(
            [&hidden.path, &hidden.job, &hidden.backup]
                .iter()
                .all(|path| !text.contains(&last(path))),
            "{text}"
        );
    }
    drop(secret);
}

#[tokio::test(flavor = "multi_thread")]
async fn introspection_shows_no_domain_to_callers_without_the_list_right() {
    let system = System::setup()
        .rules(&polkit::deny(USER, &["service.search-domains"]))
        .start();
    let web = slow_machine(&system, "web");
    system.domain_file("web", &web);
    system.wait_for_domain("web");
    let user = Caller::of_user(&system, USER).await;
    for (interface, member, path) in [
        (MANAGER_INTERFACE, "ListDomains", ROOT_PATH),
        (
            "org.freedesktop.DBus.Introspectable",
            "Introspect",
            "/org/example/Backup1/domain",
        ),
    ] {
        let (name, _) = call(&user, path, interface, member, &()).await.unwrap_err();
        assert_eq!(name, "AccessDenied", "{member}");
    }
    // Its name finds it.
    user.manager.get_domain("web").await.unwrap();
}
