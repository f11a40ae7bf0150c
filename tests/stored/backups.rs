//! Stored backups, as the service lists them and `backupctl backups` prints them: real ones, and handmade chains on
//! top of them.

use std::fs;
use std::path::Path;

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::chain::{directories, id, increment, manifest, write_manifest};
use crate::common::clients::{OTHER_USER, ROOT, USER};
use crate::common::disk::Disk;
use crate::common::made::{ALL, Store, run, text};
use crate::common::polkit;
use crate::common::proxies::{ListedBackup, Options, error_name};
use crate::common::vm::Vm;
use serde_json::{Value, json};
use zbus::wire::{OwnedObjectPath, Variant};

const MIB: u64 = 1 << 20;

fn machine(system: &System, name: &str) -> Vm {
    let disk = Disk::new("vda", 4 * MIB).fill(0, MIB, 0x11);
    system.configured(system.vm(name).disk(disk).running())
}

async fn list(caller: &Caller, options: &[(&'static str, &str)]) -> Vec<ListedBackup> {
    let options: Options = options
        .iter()
        .map(|(key, value)| (*key, Variant::from(*value)))
        .collect();
    let (backups, next) = caller.manager.list_backups(options).await.unwrap();
    assert_eq!(next, "");
    backups
}

/// Returns id, kind, parent, state and problem of all backups that `caller` sees.
async fn states(caller: &Caller) -> Vec<[String; 5]> {
    let listed = list(caller, &[]).await;
    listed
        .into_iter()
        .map(|backup| [backup.1, backup.6, backup.7, backup.9, backup.10])
        .collect()
}

async fn rescan(caller: &Caller) {
    let (_, problems) = caller.manager.rescan(Options::new()).await.unwrap();
    assert_eq!(problems, [""; 0]);
}

fn backupctl(system: &System, arguments: &[&str]) -> String {
    system.clients().backupctl(ROOT, arguments).expect_success()
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_and_objects_show_the_manifest_of_a_backup() {
    let mut system = System::start();
    let nightly = system.dir().join("nightly");
    system.stop_daemon();
    fs::create_dir(&nightly).unwrap();
    let config = fs::read_to_string(system.config_path()).unwrap();
    let table = format!("[store.nightly]\npath = \"{}\"\n", nightly.display());
    fs::write(system.config_path(), config + &table).unwrap();
    system.start_daemon();
    let vm = machine(&system, "web");
    let root = Caller::new(&system).await;
    let document = "<domainbackup><name>first</name><description>a b</description></domainbackup>";
    root.complete("web", document).await;
    root.complete("web", "<domainbackup><store name='nightly'/></domainbackup>")
        .await;
    let [first] = directories(&system.store().join("web")).try_into().unwrap();
    let told = manifest(&first);
    let listed = list(&root, &[]).await;
    assert_eq!(listed.len(), 2);
    let ListedBackup(
        path,
        id,
        name,
        domain,
        uuid,
        store,
        kind,
        parent,
        time,
        state,
        problem,
        disks,
        service,
        own,
    ) = listed[0].clone();
    assert_eq!((told["service"].as_str().unwrap(), own), (service.as_str(), true));
    assert_eq!(told["sequence"], 1);
    let texts = [
        &id, &name, &domain, &uuid, &store, &kind, &parent, &state, &problem,
    ];
    let expected = [
        &crate::common::chain::id(&first),
        "first",
        "web",
        vm.uuid(),
        "default",
        "full",
        "",
        "complete",
        "",
    ];
    assert_eq!(texts, expected);
    let instant: jiff::Timestamp = told["instant"].as_str().unwrap().parse().unwrap();
    assert_eq!(time, instant.as_microsecond() as u64);
    let disk = disks[0].clone();
    assert_eq!(
        (disk.0.as_str(), disk.1.as_str(), disk.2.as_str()),
        ("vda", "vda.qcow2", "qcow2")
    );
    assert_eq!(
        (disk.3, disk.4),
        (4 * MIB, told["disks"][0]["length"].as_u64().unwrap_or(0))
    );

    // The object has the same properties, and the prefix of an id finds that object.
    for name in [&id, &id[..id.len() - 2], &format!("default/{id}")] {
        assert_eq!(root.manager.get_backup(name).await.unwrap(), path, "{name}");
    }
    let properties = root.properties(&path, "org.example.Backup1.Backup").await;
    let text = |name: &str| properties[name].try_clone().unwrap().try_into().unwrap();
    for (name, value) in [
        ("Id", id.as_str()),
        ("Name", "first"),
        ("Description", "a b"),
        ("Domain", "web"),
        ("DomainUUID", vm.uuid()),
        ("Store", "default"),
        ("Kind", "full"),
        ("Parent", ""),
        ("State", "complete"),
        ("Problem", ""),
    ] {
        let found: String = text(name);
        assert_eq!(found, value, "{name}");
    }
    assert_eq!(*properties["Time"], Variant::from(time));

    // The list contains exactly the requested backups.
    for (filter, count) in [
        (&[("store", "nightly")][..], 1),
        (&[("domain", "web")], 2),
        (&[("domain", vm.uuid()), ("store", "default")], 1),
        (&[("domain", "db")], 0),
    ] {
        assert_eq!(list(&root, filter).await.len(), count, "{filter:?}");
    }
    for (options, error) in [
        (("store", Variant::from("weekly")), "Backup1.Error.NoSuchStore"),
        (("stores", Variant::from("nightly")), "InvalidArgs"),
        (("limit", Variant::from("1")), "InvalidArgs"),
        (("after", Variant::from("x")), "InvalidArgs"),
    ] {
        let refused = root
            .manager
            .list_backups(Options::from([options]))
            .await
            .unwrap_err();
        assert!(error_name(&refused).ends_with(error), "{refused}");
    }

    // The object path is the same after a restart, and the command prints the present backups.
    system.stop_daemon();
    system.start_daemon();
    let root = Caller::new(&system).await;
    assert_eq!(root.manager.get_backup(&id).await.unwrap(), path);
    let shown: Value = serde_json::from_str(&backupctl(
        &system,
        &["backups", "web", "--store", "default", "--json"],
    ))
    .unwrap();
    let [shown] = shown.as_array().unwrap().as_slice() else {
        panic!("{shown}")
    };
    assert_eq!(
        (&shown["id"], &shown["kind"], &shown["parent"]),
        (&json!(id), &json!("full"), &Value::Null)
    );
    assert_eq!(
        (&shown["disks"][0]["name"], &shown["disks"][0]["virtual-size"]),
        (&json!("vda"), &json!(4 * MIB))
    );
    let text = backupctl(&system, &["backups"]);
    assert!(
        text.contains(&id) && text.contains("nightly") && text.contains("complete"),
        "{text}"
    );
}

/// Makes a full backup of a VM, a chain of two on top of it, and a single dependent. Returns their directories by
/// time.
async fn chain(system: &System, root: &Caller) -> [std::path::PathBuf; 4] {
    root.complete("web", "").await;
    let [full] = directories(&system.store().join("web")).try_into().unwrap();
    let first = increment(&full, 1);
    let second = increment(&first, 1);
    let other = increment(&full, 3);
    rescan(root).await;
    [full, first, second, other]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_is_listed_as_a_tree_and_dependents_of_a_missing_base_as_damaged() {
    let mut system = System::start();
    let _vm = machine(&system, "web");
    let root = Caller::new(&system).await;
    let backups = chain(&system, &root).await;
    let ids = backups.each_ref().map(|backup| id(backup));
    let entry = |index: usize, parent: &str, state: &str, problem: &str| {
        let kind = if parent.is_empty() { "full" } else { "incremental" };
        [&ids[index], kind, parent, state, problem].map(str::to_owned)
    };
    let whole = [
        entry(0, "", "complete", ""),
        entry(1, &ids[0], "complete", ""),
        entry(2, &ids[1], "complete", ""),
        entry(3, &ids[0], "complete", ""),
    ];
    assert_eq!(states(&root).await, whole);
    let text = backupctl(&system, &["backups", "web"]);
    // Independent of the locale of the test.
    let text = [("├─", "|-"), ("└─", "`-"), ("│ ", "| ")]
        .iter()
        .fold(text, |text, (drawn, plain)| text.replace(drawn, plain));
    let drawn: Vec<_> = text
        .lines()
        .skip(1)
        // After the table, the list reports that the handmade ones are from the future.
        .take_while(|line| !line.is_empty())
        .map(|line| {
            line.split_once("default  ")
                .unwrap()
                .1
                .split("  20")
                .next()
                .unwrap()
                .trim_end()
        })
        .collect();
    let expected = [
        ids[0].clone(),
        format!("|-{}", ids[1]),
        format!("| `-{}", ids[2]),
        format!("`-{}", ids[3]),
    ];
    assert_eq!(drawn, expected, "{text}");

    // An image is missing: the backup and its dependents are damaged.
    let (image, aside) = (backups[1].join("vda.qcow2"), system.dir().join("aside"));
    fs::rename(&image, &aside).unwrap();
    let base_is = |id: &str, word: &str| format!("its base {id} is {word}");
    let missing = [
        whole[0].clone(),
        entry(1, &ids[0], "missing", "vda.qcow2 is missing"),
        entry(2, &ids[1], "damaged", &base_is(&ids[1], "missing")),
        whole[3].clone(),
    ];
    assert_eq!(states(&root).await, missing);
    // The damage stays on record where the store cannot be read.
    let store = system.dir().join("store-aside");
    fs::rename(system.store(), &store).unwrap();
    fs::write(system.store(), "").unwrap();
    assert_eq!(states(&root).await, missing);
    fs::remove_file(system.store()).unwrap();
    fs::rename(&store, system.store()).unwrap();
    fs::rename(&aside, &image).unwrap();
    assert_eq!(states(&root).await, whole);

    // So do the good backups.
    fs::rename(system.store(), &store).unwrap();
    fs::write(system.store(), "").unwrap();
    assert_eq!(states(&root).await, whole);
    fs::remove_file(system.store()).unwrap();
    fs::rename(&store, system.store()).unwrap();

    // A file of another length, and a changed manifest.
    fs::OpenOptions::new()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(7)
        .unwrap();
    let length = manifest(&backups[1])["disks"][0]["length"].clone();
    let problem = format!("vda.qcow2 has 7 bytes instead of {length}");
    assert_eq!(states(&root).await[1], entry(1, &ids[0], "damaged", &problem));
    let mut other = manifest(&backups[3]);
    other["description"] = json!("another");
    write_manifest(&backups[3], &other);
    let found = states(&root).await;
    assert_eq!(found[3][3], "damaged");
    assert!(found[3][4].contains("has changed"), "{found:?}");
    let text = backupctl(&system, &["backups"]);
    assert!(
        text.contains(&format!("{}: vda.qcow2 has 7 bytes", ids[1])),
        "{text}"
    );

    // A missing directory stays listed until the stores are scanned.
    fs::remove_dir_all(&backups[0]).unwrap();
    let found = states(&root).await;
    assert_eq!(found[0], entry(0, "", "missing", "its directory is missing"));
    assert_eq!(
        (found[1][3].as_str(), found[2][3].as_str()),
        ("damaged", "damaged")
    );
    let state = root
        .properties(
            &root.manager.get_backup(&ids[0]).await.unwrap(),
            "org.example.Backup1.Backup",
        )
        .await;
    assert_eq!(*state["State"], Variant::from("missing"));
    rescan(&root).await;
    let found = states(&root).await;
    assert_eq!(found.len(), 3);
    assert_eq!(
        found[2],
        entry(3, &ids[0], "damaged", &base_is(&ids[0], "not in the store"))
    );
    let gone = root.manager.get_backup(&ids[0]).await.unwrap_err();
    assert_eq!(error_name(&gone), "org.example.Backup1.Error.NoSuchBackup");
    system.stop_daemon();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_without_the_read_right_sees_no_backup_of_the_domain() {
    let rules = polkit::allow(USER, &["service.register-domain", "domain.backup"])
        + &polkit::deny(OTHER_USER, &["domain.read"]);
    let system = System::setup().rules(&rules).start();
    let vm = machine(&system, "web");
    let mine = system
        .vm("mine")
        .disk(Disk::new("vda", 4 * MIB))
        .running()
        .start();
    let (root, user) = (Caller::new(&system).await, Caller::of_user(&system, USER).await);
    let other = Caller::of_user(&system, OTHER_USER).await;
    root.complete("web", "").await;
    user.register("mine", mine.monitor_stream().into()).await.unwrap();
    user.complete("mine", "").await;
    let names = async |caller: &Caller| -> Vec<String> {
        let listed = list(caller, &[]).await;
        listed.into_iter().map(|backup| backup.3).collect()
    };
    let unique = format!("{USER}:mine");
    assert_eq!(names(&root).await, [&*unique, "web"]);
    assert_eq!(names(&user).await, ["mine", "web"]);
    assert_eq!(names(&other).await, [""; 0]);
    // It still applies when the domains are gone.
    drop((mine, vm));
    fs::remove_file(system.dir().join("etc/domains.d/web.toml")).unwrap();
    system.wait_for_no_domain("web");
    system.wait_for_no_domain(&unique);
    assert_eq!(names(&user).await, ["mine", "web"]);
    assert_eq!(names(&other).await, [""; 0]);

    // The reply equals that for a missing backup, byte for byte.
    let web = list(&root, &[("domain", "web")]).await.remove(0);
    let refused = other.manager.get_backup(&web.1).await.unwrap_err().to_string();
    let never = other.manager.get_backup("20200101T000000Z-00000000").await;
    let never = never.unwrap_err().to_string();
    assert_eq!(
        refused.replace(&web.1, ""),
        never.replace("20200101T000000Z-00000000", "")
    );
    let prefix = other.manager.get_backup("2").await.unwrap_err();
    assert_eq!(error_name(&prefix), "org.example.Backup1.Error.NoSuchBackup");
    // A hidden backup does not make the prefix of a visible one ambiguous.
    let foreign = Caller::of_user(&system, crate::common::clients::THIRD_USER).await;
    assert_eq!(names(&foreign).await, ["web"]);
    assert_eq!(foreign.manager.get_backup("2").await.unwrap(), web.0);
    let several = root.manager.get_backup("2").await.unwrap_err();
    assert_eq!(error_name(&several), "org.freedesktop.DBus.Error.InvalidArgs");
    assert!(several.to_string().contains(&web.1), "{several}");
}

/// Makes so many copies of a backup, each with its own id.
fn multiply(backup: &Path, count: usize) {
    let (domain, original) = (backup.parent().unwrap(), manifest(backup));
    for number in 0..count {
        let copy = domain.join(format!("20200101T000000Z-{number:08x}"));
        fs::create_dir(&copy).unwrap();
        let mut manifest = original.clone();
        manifest["id"] = json!(id(&copy));
        write_manifest(&copy, &manifest);
        fs::write(copy.join("vda.qcow2"), "image").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_are_listed_page_by_page_and_each_once() {
    let system = System::start();
    let _vm = machine(&system, "web");
    let root = Caller::new(&system).await;
    root.complete("web", "").await;
    let [backup] = directories(&system.store().join("web")).try_into().unwrap();
    multiply(&backup, 2500);
    rescan(&root).await;
    let (mut after, mut pages, mut paths) = (String::new(), Vec::new(), Vec::<String>::new());
    loop {
        let options = Options::from([("after", Variant::from(after.as_str()))]);
        let (backups, next) = root.manager.list_backups(options).await.unwrap();
        pages.push(backups.len());
        paths.extend(backups.into_iter().map(|backup| backup.0.to_string()));
        if next.is_empty() {
            break;
        }
        after = next;
    }
    assert_eq!(pages, [1000, 1000, 501]);
    paths.sort();
    paths.dedup();
    assert_eq!(paths.len(), 2501);
    let options = Options::from([("limit", Variant::from(3u64))]);
    let (backups, next) = root.manager.list_backups(options).await.unwrap();
    assert_eq!((backups.len(), next.is_empty()), (3, false));
    let shown: Value = serde_json::from_str(&backupctl(&system, &["backups", "--json"])).unwrap();
    assert_eq!(shown.as_array().unwrap().len(), 2501);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_catalog_of_the_first_version_is_brought_to_this_one() {
    let mut system = System::start();
    let _vm = machine(&system, "web");
    let root = Caller::new(&system).await;
    chain(&system, &root).await;
    let before = list(&root, &[]).await;
    system.stop_daemon();
    let catalog = rusqlite::Connection::open(system.dir().join("state/catalog.sqlite")).unwrap();
    // The schema of the first version.
    let former = "CREATE TABLE former (store TEXT NOT NULL, domain TEXT NOT NULL, id TEXT NOT NULL, manifest TEXT NOT NULL, \
            PRIMARY KEY (store, domain, id)) STRICT;
        INSERT INTO former SELECT store, domain, id, manifest FROM backups;
        DROP TABLE backups; ALTER TABLE former RENAME TO backups;
        ALTER TABLE jobs DROP COLUMN state; ALTER TABLE jobs ADD COLUMN files TEXT;
        ALTER TABLE jobs ADD COLUMN instant INTEGER; ALTER TABLE jobs ADD COLUMN quiesced INTEGER;
        ALTER TABLE jobs ADD COLUMN verdict TEXT; ALTER TABLE jobs ADD COLUMN holds_poweroff INTEGER NOT NULL DEFAULT 0;
        DROP INDEX ended_jobs_by_user; ALTER TABLE jobs DROP COLUMN started_by_name; ALTER TABLE jobs DROP COLUMN bytes;
        DROP TABLE checkpoints; DROP TABLE service; DROP TABLE store_marks; DROP TABLE store_generations;
        DELETE FROM jobs WHERE id = 2; PRAGMA user_version = 1;";
    catalog.execute_batch(former).unwrap();
    drop(catalog);
    system.start_daemon();
    let root = Caller::new(&system).await;
    let told = |listed: Vec<ListedBackup>| -> Vec<String> {
        let told = listed.into_iter().map(|mut backup| {
            backup.0 = OwnedObjectPath::default();
            format!("{backup:?}")
        });
        told.collect()
    };
    assert_eq!(told(list(&root, &[]).await), told(before));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_read_where_no_service_is_and_by_an_ordinary_user() {
    let mut system = System::start();
    let _vm = machine(&system, "web");
    let root = Caller::new(&system).await;
    let backups = chain(&system, &root).await;
    let with_service: Value = serde_json::from_str(&backupctl(&system, &["backups", "--json"])).unwrap();
    system.stop_daemon();
    // The store is copied to another host, where a user without rights reads it.
    let carried = system.dir().join("carried");
    fs::rename(system.store(), &carried).unwrap();
    let mut chown = std::process::Command::new("chown");
    chown.args(["-R", "nobody"]).arg(&carried);
    crate::common::process::run(chown).expect_success();
    let link = system.dir().join("usb");
    std::os::unix::fs::symlink(&carried, &link).unwrap();
    let from = link.to_str().unwrap();
    let read = |arguments: &[&str]| {
        system
            .clients()
            .backupctl(USER, &[&["backups", "--from", from], arguments].concat())
    };
    let mut listed: Value = serde_json::from_str(&read(&["--json"]).expect_success()).unwrap();
    let mut expected = with_service;
    for backup in [&mut listed, &mut expected]
        .into_iter()
        .flat_map(|list| list.as_array_mut().unwrap())
    {
        backup["path"] = Value::Null;
        backup["store"] = Value::Null;
        // Only a service knows which backups its rules apply to.
        backup["own"] = Value::Null;
    }
    assert_eq!(listed, expected);
    assert!(read(&["nothing"]).expect_success().lines().count() == 1);

    let carried = |backup: &Path| carried.join("web").join(id(backup));
    fs::remove_file(carried(&backups[1]).join("vda.qcow2")).unwrap();
    fs::write(carried(&backups[3]).join("manifest.json"), "{").unwrap();
    let output = read(&["web"]);
    assert_eq!(output.status, 1);
    assert!(output.stderr.contains("manifest.json"), "{}", output.stderr);
    let text = output.stdout;
    assert!(
        text.contains("vda.qcow2 is missing") && text.contains("its base "),
        "{text}"
    );
}

#[test]
fn a_store_that_is_read_without_the_service_is_listed_in_the_order_of_making() {
    let store = Store::new();
    // The clock was set back, so the ids are in the opposite order.
    let made: Vec<&str> = ALL.into_iter().rev().collect();
    for (sequence, id) in made.iter().enumerate() {
        store.change_manifest(id, |manifest| manifest["sequence"] = (sequence + 1).into());
    }
    let program = env!("CARGO_BIN_EXE_backupctl");
    let listed = run(program, &["backups", "--json", "--from", text(&store.path())]);
    let listed: Value = serde_json::from_str(&listed.expect_success()).unwrap();
    let ids: Vec<&str> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|backup| backup["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, made);
}
