//! The system files agree with each other and with the running service. The interface descriptions in `dbus/` are the
//! contract; a member that is missing from another file would fail only on a user's host.

use std::collections::BTreeSet;
use std::fs;

use crate::common::System;
use crate::common::bus::project_file;
use crate::common::caller::assert_completed;
use crate::common::clients::ROOT;
use crate::common::disk::Disk;
use crate::common::proxies::{JobProxy, ManagerProxy, Options};
use backupd::bus::METHODS;
use backupd::names::{
    BACKUP_INTERFACE, BUS_NAME, DOMAIN_INTERFACE, JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH,
};
use zbus_xml::{ArgDirection, Interface, Node};

fn read(path: &str) -> String {
    fs::read_to_string(project_file(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Returns the shipped description of one interface.
fn described(interface: &str) -> Interface<'static> {
    let path = format!("dbus/{interface}.xml");
    let node = Node::from_reader(read(&path).as_bytes()).unwrap_or_else(|e| panic!("{path}: {e}"));
    let [only] = node.interfaces() else {
        panic!("{path} describes one interface");
    };
    assert_eq!(only.name(), interface, "{path}");
    only.to_owned()
}

/// Returns every interface that has a file in `dbus/`.
fn all_described() -> Vec<Interface<'static>> {
    let mut found: Vec<_> = fs::read_dir(project_file("dbus"))
        .unwrap()
        .filter_map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_str()?
                .strip_suffix(".xml")
                .map(described)
        })
        .collect();
    found.sort_by_key(|interface| interface.name().to_string());
    found
}

/// Returns an attribute's value in each element of that name.
fn attributes(text: &str, element: &str, attribute: &str) -> Vec<String> {
    let mut reader = quick_xml::Reader::from_str(text);
    let mut found = Vec::new();
    loop {
        match reader.read_event().expect("well-formed XML") {
            quick_xml::events::Event::Eof => return found,
            quick_xml::events::Event::Start(start) | quick_xml::events::Event::Empty(start)
                if start.name().as_ref() == element =>
            {
                let value = start
                    .try_get_attribute(attribute)
                    .expect("well-formed attributes");
                let value = value.map(|value| value.value.into_owned());
                found.push(value.unwrap_or_default());
            }
            _ => {}
        }
    }
}

/// Returns the value of `KEY=` in a file of systemd's format.
#[track_caller]
fn setting(text: &str, key: &str) -> String {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    line.unwrap_or_else(|| panic!("{key}= is there")).to_owned()
}

/// Members of the standard interfaces that callers may use.
const STANDARD_MEMBERS: [&str; 5] = [
    "org.freedesktop.DBus.Introspectable.Introspect",
    "org.freedesktop.DBus.Peer.GetMachineId",
    "org.freedesktop.DBus.Peer.Ping",
    "org.freedesktop.DBus.Properties.Get",
    "org.freedesktop.DBus.Properties.GetAll",
];

#[test]
fn of_the_standard_interfaces_only_reading_methods_are_in_the_table() {
    let standard = METHODS.iter().filter(|row| !row.interface.starts_with(BUS_NAME));
    let rows = standard.map(|row| format!("{}.{}", row.interface, row.member));
    assert_eq!(
        rows.collect::<BTreeSet<_>>(),
        STANDARD_MEMBERS.map(str::to_owned).into()
    );
}

#[test]
fn the_bus_policy_lets_through_every_method_and_nothing_else() {
    let policy = read("dbus/org.example.Backup1.conf");
    let interfaces = attributes(&policy, "allow", "send_interface");
    let members = attributes(&policy, "allow", "send_member");
    let destinations = attributes(&policy, "allow", "send_destination");
    let mut allowed = BTreeSet::new();
    for ((interface, member), destination) in interfaces.iter().zip(&members).zip(&destinations) {
        // Only the line that lets root own the name lacks these.
        if !interface.is_empty() {
            assert_eq!(destination, BUS_NAME, "{interface}.{member}");
            assert!(
                allowed.insert(format!("{interface}.{member}")),
                "{interface}.{member} is there twice"
            );
        }
    }
    let rows = METHODS
        .iter()
        .map(|row| format!("{}.{}", row.interface, row.member));
    assert_eq!(allowed, rows.collect());
}

#[test]
fn every_described_method_is_in_the_table_and_no_other() {
    let described = all_described();
    let described = described.iter().flat_map(|interface| {
        let methods = interface.methods();
        methods.map(|method| (interface.name().to_string(), method.name().to_string()))
    });
    let ours = METHODS.iter().filter(|row| row.interface.starts_with(BUS_NAME));
    let rows = ours.map(|row| (row.interface.to_owned(), row.member.to_owned()));
    assert_eq!(described.collect::<BTreeSet<_>>(), rows.collect());
}

/// Returns the comment before a method's description.
#[track_caller]
fn comment_before<'a>(text: &'a str, member: &str) -> &'a str {
    let (before, _) = text
        .split_once(&format!("<method name=\"{member}\""))
        .unwrap_or_else(|| panic!("{member} is described"));
    let start = before.rfind("<!--").expect("a method has a comment");
    let comment = &before[start..];
    assert!(
        comment.trim_end().ends_with("-->"),
        "{member} has a comment of its own"
    );
    comment
}

#[test]
fn the_description_of_a_method_names_the_actions_of_the_table_and_no_other() {
    let mut named = 0;
    for row in METHODS.iter().filter(|row| row.interface.starts_with(BUS_NAME)) {
        let text = read(&format!("dbus/{}.xml", row.interface));
        let comment = comment_before(&text, row.member);
        // A method like another one is described there.
        if comment.contains("As CreateBackup of the root object") || comment.contains("as for Restore") {
            continue;
        }
        let visible = row.visibility.permissions().iter();
        let visible: BTreeSet<&str> = visible.map(|permission| permission.action()).collect();
        let needed: BTreeSet<&str> = row
            .permissions
            .iter()
            .map(|permission| permission.action())
            .collect();
        let found: BTreeSet<&str> = comment
            .split(|letter: char| !(letter.is_alphanumeric() || ".-".contains(letter)))
            .map(|word| word.trim_end_matches('.'))
            .filter(|word| word.starts_with("org.example.backup1."))
            .collect();
        named += found.len();
        assert!(
            found.is_superset(&needed),
            "{}: {found:?}, {needed:?}",
            row.member
        );
        let more: Vec<_> = found
            .difference(&needed)
            // Subscribe itself needs none; its comment is about the signals.
            .filter(|action| !visible.contains(*action) && row.member != "Subscribe")
            .collect();
        assert!(more.is_empty(), "{}: {more:?} is not in the table", row.member);
    }
    assert!(named > 10, "{named} actions are found");
}

#[test]
fn no_property_is_writable_and_each_declares_its_change_signal() {
    for interface in all_described() {
        for property in interface.properties() {
            let what = format!("{}.{}", interface.name(), property.name());
            assert!(
                !property.access().write(),
                "{what}: the bus policy lets no Set through"
            );
            let names: Vec<_> = property
                .annotations()
                .iter()
                .map(|annotation| annotation.name())
                .collect();
            assert_eq!(
                names,
                ["org.freedesktop.DBus.Property.EmitsChangedSignal"],
                "{what}"
            );
        }
    }
}

#[test]
fn names_agree_across_all_system_files() {
    let policy = read("dbus/org.example.Backup1.conf");
    let activation = read("dbus/org.example.Backup1.service");
    let unit = read("systemd/backupd.service");
    let owned: Vec<_> = attributes(&policy, "allow", "own")
        .into_iter()
        .filter(|name| !name.is_empty())
        .collect();
    assert_eq!(owned, [BUS_NAME]);
    assert_eq!(setting(&activation, "Name"), BUS_NAME);
    assert_eq!(setting(&activation, "SystemdService"), "backupd.service");
    assert_eq!(setting(&unit, "BusName"), BUS_NAME);
    // The unit and a bus without systemd start the same program.
    assert_eq!(setting(&activation, "Exec"), setting(&unit, "ExecStart"));
    let described: Vec<_> = all_described()
        .iter()
        .map(|interface| interface.name().to_string())
        .collect();
    assert_eq!(
        described,
        [
            MANAGER_INTERFACE,
            BACKUP_INTERFACE,
            DOMAIN_INTERFACE,
            JOB_INTERFACE
        ]
    );
}

/// Returns an interface as lines to compare. Leaves out what has no effect on the wire: the order of members,
/// comments, and defaults (a signal's arguments are `out`; property changes are signalled without an annotation).
fn lines(interface: &Interface<'_>) -> BTreeSet<String> {
    const CHANGES: &str = "org.freedesktop.DBus.Property.EmitsChangedSignal";
    let arguments = |arguments: &[zbus_xml::Arg<'_>], default: ArgDirection| -> String {
        let argument = |arg: &zbus_xml::Arg<'_>| {
            let direction = match arg.direction().unwrap_or(default) {
                ArgDirection::In => "in",
                ArgDirection::Out => "out",
            };
            format!("{direction} {} {}", arg.ty(), arg.name().unwrap_or("(no name)"))
        };
        arguments.iter().map(argument).collect::<Vec<_>>().join(", ")
    };
    let notes = |annotations: &[zbus_xml::Annotation<'_>]| -> BTreeSet<String> {
        annotations
            .iter()
            .map(|note| format!("{}={}", note.name(), note.value()))
            .collect()
    };
    let mut lines = BTreeSet::new();
    for method in interface.methods() {
        let arguments = arguments(method.args(), ArgDirection::In);
        lines.insert(format!(
            "method {}({arguments}) {:?}",
            method.name(),
            notes(method.annotations())
        ));
    }
    for signal in interface.signals() {
        let arguments = arguments(signal.args(), ArgDirection::Out);
        lines.insert(format!(
            "signal {}({arguments}) {:?}",
            signal.name(),
            notes(signal.annotations())
        ));
    }
    for property in interface.properties() {
        let mut notes = notes(property.annotations());
        if !notes.iter().any(|note| note.starts_with(CHANGES)) {
            notes.insert(format!("{CHANGES}=true"));
        }
        let (name, ty, access) = (property.name(), property.ty(), property.access());
        lines.insert(format!("property {name}: {ty}, {access:?} {notes:?}"));
    }
    lines
}

/// Compares an object of the running service with the description of its interface.
#[track_caller]
fn assert_as_described(system: &System, object: &str, interface: &str) {
    let call = [
        "call",
        BUS_NAME,
        object,
        "org.freedesktop.DBus.Introspectable",
        "Introspect",
    ];
    let json = system
        .clients()
        .busctl(ROOT, &[&["--json=short"], &call[..]].concat())
        .expect_success();
    let answer: serde_json::Value = serde_json::from_str(&json).expect("busctl prints JSON");
    let text = answer["data"][0].as_str().expect("Introspect returns a string");
    let node = Node::from_reader(text.as_bytes()).unwrap_or_else(|e| panic!("{e}: {text}"));
    let own = |found: &&Interface<'_>| !found.name().starts_with("org.freedesktop.DBus.");
    let found: Vec<_> = node.interfaces().iter().filter(own).collect();
    let names: Vec<_> = found.iter().map(|found| found.name().to_string()).collect();
    assert_eq!(names, [interface], "{object}");

    let (live, file) = (lines(found[0]), lines(&described(interface)));
    let only = |these: &BTreeSet<String>, those: &BTreeSet<String>| -> String {
        these
            .difference(those)
            .map(|line| format!("    {line}\n"))
            .collect()
    };
    assert!(
        live == file,
        "{interface}\n  only in the service:\n{}  only in dbus/{interface}.xml:\n{}",
        only(&live, &file),
        only(&file, &live)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_running_service_matches_its_description() {
    let system = System::start();
    assert_as_described(&system, ROOT_PATH, MANAGER_INTERFACE);

    let vm = system.vm("web").disk(Disk::new("vda", 1 << 20)).start();
    system.domain_file("web", &vm);
    let domain = system.wait_for_domain("web");
    assert_as_described(&system, &domain, DOMAIN_INTERFACE);

    let connection = system.connect().await;
    let manager = ManagerProxy::new(&connection).await.unwrap();
    let (_, job) = manager
        .create_backup("web", "", Vec::new(), Options::new())
        .await
        .unwrap();
    assert_as_described(&system, &job, JOB_INTERFACE);
    let job = JobProxy::new(&connection, &job).await.unwrap();
    assert_completed(&job).await;
    let (backups, _) = manager.list_backups(Options::new()).await.unwrap();
    assert_as_described(&system, &backups[0].0, BACKUP_INTERFACE);
}
