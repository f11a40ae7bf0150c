//! Checkpoints with names and documents, with and without a backup. The bitmaps on the disks are the only record of
//! them, and the service changes no other bitmaps.

use crate::common::System;
use crate::common::caller::{Caller, assert_completed, cancel};
use crate::common::clients::{ROOT, USER};
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::proxies::{DomainProxy, ListedCheckpoint, Options, error_name};
use crate::common::storage::files_below;
use crate::common::vm::Vm;
use serde_json::{Value, json};
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;

fn machine(system: &System) -> Vm {
    system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", 4 * MIB))
            .disk(Disk::new("vdb", 4 * MIB))
            .disk(Disk::new("raw", MIB).raw())
            .running(),
    )
}

async fn domain(caller: &Caller) -> DomainProxy<'static> {
    let path = caller.manager.get_domain("web").await.unwrap();
    DomainProxy::new(&caller.connection, path).await.unwrap()
}

async fn list(domain: &DomainProxy<'_>) -> Vec<ListedCheckpoint> {
    domain.list_checkpoints(Options::new()).await.unwrap()
}

/// Returns name, parent, whether it has a backup, and the disks with their states.
async fn brief(domain: &DomainProxy<'_>) -> Vec<(String, String, bool, Vec<String>)> {
    let listed = list(domain).await;
    listed
        .into_iter()
        .map(|(name, parent, _, backup, store, disks)| {
            assert_eq!(backup.is_empty(), store.is_empty());
            let disks = disks
                .into_iter()
                .map(|(disk, _, state)| format!("{disk} {state}"));
            (name, parent, !backup.is_empty(), disks.collect())
        })
        .collect()
}

fn both(state: &str) -> Vec<String> {
    ["vda", "vdb"].map(|disk| format!("{disk} {state}")).into()
}

fn option<'a>(key: &'a str, text: &'a str) -> Options<'a> {
    Options::from([(key, Variant::from(text))])
}

fn named(name: &str) -> String {
    format!("<domaincheckpoint><name>{name}</name></domaincheckpoint>")
}

/// Only disks that can be backed up with a checkpoint.
const DISKS: &str = "<domainbackup><disks><disk name='vda'/><disk name='vdb'/></disks></domainbackup>";

async fn back_up(caller: &Caller, options: Options<'_>) -> Vec<String> {
    let job = caller.start_with("web", DISKS, &[], options).await;
    assert_completed(&job).await;
    let increments = job.increments().await.unwrap();
    increments
        .into_iter()
        .map(|(_, mode, since, _)| format!("{mode} {since}"))
        .collect()
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(result: zbus::Result<T>, name: &str, text: &str) {
    let error = result.expect_err(text);
    assert!(error_name(&error).ends_with(name), "{error}");
    assert!(error.to_string().contains(text), "{error}");
}

fn add_foreign(vm: &Vm, name: &str) {
    let node = vm.node_name("vda");
    vm.qmp(
        "block-dirty-bitmap-add",
        json!({ "node": node, "name": name, "persistent": true }),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backups_checkpoint_is_found_by_its_name_and_deleted_without_the_backup() {
    let system = System::start();
    let vm = machine(&system);
    let caller = Caller::new(&system).await;
    let domain = domain(&caller).await;
    let document = "<domaincheckpoint><name>monday</name><description>the &lt;first&gt;</description></domaincheckpoint>";
    back_up(&caller, option("checkpoint", document)).await;
    assert_eq!(
        brief(&domain).await,
        [("monday".into(), String::new(), true, both("good"))]
    );
    let (_, _, time, id, store, disks) = list(&domain).await.remove(0);
    assert_eq!(
        (store.as_str(), disks[1].1.as_str()),
        ("default", format!("backupd-{id}-1").as_str())
    );
    let directory = system.store().join("web").join(&id);
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(directory.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(
        manifest["checkpoint"],
        json!({ "name": "monday", "description": "the <first>" })
    );
    let written = domain.get_checkpoint_definition("monday").await.unwrap();
    for part in [
        "<name>monday</name>",
        "<description>the &lt;first&gt;</description>",
        &format!("<creationTime>{}</creationTime>", time / 1_000_000),
        "<disk name='vdb' checkpoint='bitmap'/>",
        "<disk name='raw' checkpoint='no'/>",
    ] {
        assert!(written.contains(part), "{written}");
    }
    assert_eq!(domain.get_checkpoint_definition(&id).await.unwrap(), written);

    vm.write("vda", 0, MIB, 0x21);
    let since = vec![format!("incremental {id}"); 2];
    assert_eq!(back_up(&caller, option("incremental", "monday")).await, since);
    let second = list(&domain).await.remove(1);
    assert_eq!((&second.0, second.1.as_str()), (&second.3, "monday"));
    // A document finds it too.
    let text = DISKS.replace("<disks>", "<incremental>monday</incremental><disks>");
    let job = caller.complete("web", &text).await;
    assert_eq!(job.increments().await.unwrap()[0].2, id);

    add_foreign(&vm, "libvirt-monday");
    let before = (vm.residue(), files_below(&directory));
    domain.delete_checkpoint("monday", Options::new()).await.unwrap();
    assert_eq!((vm.residue(), files_below(&directory)), before);
    assert_eq!(list(&domain).await.len(), 2);
    assert!(!vm.checkpoints("vda").contains(&format!("backupd-{id}-0")));
    assert_refused(
        domain.delete_checkpoint("monday", Options::new()).await,
        "NoSuchCheckpoint",
        "'monday'",
    );
    let refused = caller
        .try_start("web", DISKS, &[], option("incremental", "monday"))
        .await;
    assert_refused(refused, "CannotIncrement", "'monday'");
    // The name is free again and now means the newest.
    back_up(&caller, option("checkpoint", &named("monday"))).await;
    let newest = list(&domain).await.pop().unwrap();
    assert_eq!(newest.0, "monday");
    assert_eq!(
        back_up(&caller, option("incremental", "monday")).await,
        vec![format!("incremental {}", newest.3); 2]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_chooses_the_disks_and_no_means_none() {
    let system = System::start();
    let vm = machine(&system);
    let caller = Caller::new(&system).await;
    let domain = domain(&caller).await;
    back_up(&caller, option("checkpoint", "no")).await;
    assert_eq!(
        (vm.checkpoints("vda"), list(&domain).await),
        (Vec::new(), Vec::new())
    );
    let document = "<domaincheckpoint><disks><disk name='vda'/><disk name='vdb' checkpoint='no'/></disks></domaincheckpoint>";
    back_up(&caller, option("checkpoint", document)).await;
    let checkpoint = list(&domain).await.remove(0);
    assert_eq!((&checkpoint.0, checkpoint.5.len()), (&checkpoint.3, 1));
    assert_eq!(vm.checkpoints("vdb"), [""; 0]);
    let auto = back_up(&caller, option("incremental", "auto")).await;
    assert_eq!(
        auto,
        [format!("incremental {}", checkpoint.0), "full ".to_owned()]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn impossible_checkpoints_are_refused_before_anything_changes() {
    let system = System::start();
    let vm = machine(&system);
    let caller = Caller::new(&system).await;
    let domain = domain(&caller).await;
    back_up(&caller, option("checkpoint", &named("monday"))).await;
    let state = || (vm.residue(), vm.checkpoints("vda"), files_below(&system.store()));
    let before = state();
    let disks = |disks: &str| format!("<domaincheckpoint><disks>{disks}</disks></domaincheckpoint>");
    let refused = [
        (named("monday"), "InvalidDefinition", "'monday'"),
        (named("full"), "InvalidDefinition", "'full'"),
        (named("20261123T055907Z-10ebf9b0"), "InvalidDefinition", "line 1"),
        (disks("<disk name='vdx'/>"), "NoSuchDisk", "'vdx'"),
        (disks("<disk name='raw'/>"), "", "'raw'"),
        (disks("<disk name='vda' bitmap='mine'/>"), "Unsupported", "bitmap"),
        (
            "<domainbackup/>".to_owned(),
            "InvalidDefinition",
            "<domaincheckpoint>",
        ),
    ];
    for (document, name, text) in &refused {
        let options = option("checkpoint", document);
        assert_refused(caller.try_start("web", DISKS, &[], options).await, name, text);
        assert_refused(
            domain.create_checkpoint(document, Options::new()).await,
            name,
            text,
        );
    }
    // Disks that support no checkpoint, and disks that the backup does not contain.
    let raw = disks("<disk name='raw'/>");
    let all = caller.try_start("web", "", &[], option("checkpoint", &raw)).await;
    assert_refused(all, "Unsupported", "'raw'");
    let without = caller
        .try_start("web", DISKS, &[], option("checkpoint", &raw))
        .await;
    assert_refused(without, "InvalidDefinition", "not backed up");
    let target = system.dir().join("out.qcow2");
    let outside = format!(
        "<domainbackup><disks><disk name='vda' type='file'><target file='{}'/></disk></disks></domainbackup>",
        target.display()
    );
    let refused = caller
        .try_start("web", &outside, &[], option("checkpoint", &named("tuesday")))
        .await;
    assert_refused(refused, "Unsupported", "store");
    let refused = caller
        .try_start("web", DISKS, &[], option("checkpoint", "tuesday"))
        .await;
    assert_refused(refused, "InvalidArgs", "'tuesday'");
    assert_refused(
        domain.create_checkpoint("", option("name", "x")).await,
        "InvalidArgs",
        "'name'",
    );
    assert_refused(
        domain.get_checkpoint_definition("tuesday").await,
        "NoSuchCheckpoint",
        "'tuesday'",
    );
    assert_eq!(state(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_without_a_backup_stays_until_deleted_and_is_no_base() {
    let system = System::start();
    let mut vm = machine(&system);
    let caller = Caller::new(&system).await;
    let domain = domain(&caller).await;
    add_foreign(&vm, "backupd-mine");
    let before = vm.residue();
    let name = domain
        .create_checkpoint(&named("alone"), Options::new())
        .await
        .unwrap();
    assert_eq!(name, "alone");
    let unnamed = domain.create_checkpoint("", Options::new()).await.unwrap();
    vm.write("vda", 0, MIB, 0x31);
    let alone = |state: &str| ("alone".to_owned(), String::new(), false, both(state));
    assert_eq!(
        brief(&domain).await,
        [
            alone("good"),
            (unnamed.clone(), "alone".into(), false, both("good"))
        ]
    );
    assert_refused(
        domain.create_checkpoint(&named("alone"), Options::new()).await,
        "InvalidDefinition",
        "'alone'",
    );
    for checkpoint in ["alone", &unnamed] {
        let refused = caller
            .try_start("web", DISKS, &[], option("incremental", checkpoint))
            .await;
        assert_refused(refused, "CannotIncrement", "without a backup");
    }
    domain.delete_checkpoint(&unnamed, Options::new()).await.unwrap();
    // More backups than there are checkpoints of backups.
    for _ in 0..6 {
        back_up(&caller, Options::new()).await;
    }
    assert_eq!(vm.checkpoints("vda").len(), 5);
    assert_eq!(brief(&domain).await[0], alone("good"));
    assert_eq!(vm.residue(), before);

    // QEMU quits, and then is killed. After the kill the bitmap is inconsistent, and the list shows that.
    vm.quit();
    assert_refused(
        domain.list_checkpoints(Options::new()).await,
        "DomainUnreachable",
        "web",
    );
    let refused = domain.create_checkpoint("", Options::new()).await;
    assert_refused(refused, "DomainUnreachable", "web");
    drop(vm);
    let mut vm = machine(&system);
    assert_eq!(brief(&domain).await[0], alone("good"));
    vm.write("vda", 0, MIB, 0x32);
    vm.kill();
    drop(vm);
    let vm = machine(&system);
    back_up(&caller, Options::new()).await;
    assert_eq!(brief(&domain).await[0], alone("inconsistent"));
    domain.delete_checkpoint("alone", Options::new()).await.unwrap();
    assert_eq!(list(&domain).await.len(), vm.checkpoints("vda").len());
    assert!(brief(&domain).await.iter().all(|(name, ..)| name != "alone"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_backup_blocks_checkpoint_changes_and_shows_no_checkpoint_of_its_own() {
    let system = System::start();
    let vm = machine(&system);
    let caller = Caller::new(&system).await;
    let domain = domain(&caller).await;
    back_up(&caller, option("checkpoint", &named("monday"))).await;
    // More data than QEMU copies at once.
    vm.write("vda", 0, 4 * MIB, 0x41);
    let mut options = option("incremental", "monday");
    options.insert("bandwidth", Variant::from(1u64));
    options.insert("checkpoint", Variant::from(named("tuesday")));
    let job = caller.start_with("web", DISKS, &[], options).await;
    assert_refused(
        domain.delete_checkpoint("monday", Options::new()).await,
        "Busy",
        "web",
    );
    assert_refused(domain.create_checkpoint("", Options::new()).await, "Busy", "web");
    let only = [("monday".to_owned(), String::new(), true, both("good"))];
    assert_eq!(brief(&domain).await.len(), only.len());
    cancel(&job).await;
    assert_eq!(brief(&domain).await, only);
    domain
        .create_checkpoint(&named("tuesday"), Options::new())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_dies_while_it_makes_one_leaves_nothing_that_stays() {
    let mut system = System::start();
    let vm = machine(&system);
    system.stop_daemon();
    system.start_dying_daemon("qmp transaction");
    system.wait_for_domain("web");
    let caller = Caller::new(&system).await;
    let lost = domain(&caller)
        .await
        .create_checkpoint(&named("lost"), Options::new())
        .await;
    lost.expect_err("it died");
    system.wait_for_death();
    assert_eq!(vm.checkpoints("vda").len(), 1);
    system.start_daemon();
    system.wait_for_domain("web");
    let caller = Caller::new(&system).await;
    let domain = domain(&caller).await;
    assert_eq!(list(&domain).await, []);
    domain
        .create_checkpoint(&named("lost"), Options::new())
        .await
        .unwrap();
    assert_eq!(vm.checkpoints("vda").len(), 1);
    assert_eq!(
        brief(&domain).await,
        [("lost".into(), String::new(), false, both("good"))]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_without_a_backup_are_limited_in_number() {
    let system = System::start();
    let vm = machine(&system);
    let caller = Caller::new(&system).await;
    let domain = domain(&caller).await;
    let mut names = Vec::new();
    for _ in 0..64 {
        names.push(domain.create_checkpoint("", Options::new()).await.unwrap());
    }
    assert_refused(
        domain.create_checkpoint("", Options::new()).await,
        "LimitsExceeded",
        "64",
    );
    assert_eq!(vm.checkpoints("vdb").len(), 64);
    domain.delete_checkpoint(&names[0], Options::new()).await.unwrap();
    domain.create_checkpoint("", Options::new()).await.unwrap();
    assert_eq!(list(&domain).await.len(), 64);
}

/// A user's own VM can have bitmaps with the names of another user's. The user learns nothing from them and changes
/// nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_bitmap_with_the_name_of_another_users_checkpoint_reveals_nothing() {
    let rules = polkit::allow(USER, &["service.register-domain", "domain.checkpoint"]);
    let system = System::setup().rules(&rules).start();
    let vm = machine(&system);
    let root = Caller::new(&system).await;
    let web = domain(&root).await;
    back_up(&root, option("checkpoint", &named("secret"))).await;
    let id = list(&web).await[0].3.clone();

    let own = system.vm("own").disk(Disk::new("vda", MIB)).running().start();
    add_foreign(&own, &format!("backupd-{id}-0"));
    let caller = Caller::of_user(&system, USER).await;
    let path = caller.register("own", own.monitor_stream().into()).await.unwrap();
    let mine = DomainProxy::new(&caller.connection, path).await.unwrap();
    let (name, _, time, backup, store, _) = list(&mine).await.remove(0);
    assert_eq!((name, backup, store), (id.clone(), String::new(), String::new()));
    assert_eq!(time % 1_000_000, 0);
    let said = mine.get_checkpoint_definition(&id).await.unwrap();
    assert!(!said.contains("secret"), "{said}");
    assert_refused(
        mine.get_checkpoint_definition("secret").await,
        "NoSuchCheckpoint",
        "'secret'",
    );
    mine.delete_checkpoint(&id, Options::new()).await.unwrap();
    assert_eq!(own.checkpoints("vda"), [""; 0]);
    assert_eq!(brief(&web).await[0].0, "secret");
    assert_eq!(vm.checkpoints("vda").len(), 1);
}

#[test]
fn the_command_line_names_lists_makes_and_deletes() {
    let system = System::start();
    let disks = ["vda", "vdb"].map(|name| Disk::new(name, 4 * MIB));
    let machine = disks
        .into_iter()
        .fold(system.vm("web").running(), |machine, disk| machine.disk(disk));
    let vm = system.configured(machine);
    let run = |arguments: &[&str]| system.clients().backupctl(ROOT, arguments);
    let good = |arguments: &[&str]| run(arguments).expect_success();
    good(&["create", "web", "--checkpoint", "monday"]);
    assert_eq!(
        good(&["checkpoint", "create", "web", "--name", "alone", "--disk", "vda"]),
        "alone\n"
    );
    let table = good(&["checkpoints", "web"]);
    assert!(
        table.contains("monday") && table.contains("default/") && table.contains("vda, vdb"),
        "{table}"
    );
    let listed: Value = serde_json::from_str(&good(&["checkpoints", "web", "--json"])).unwrap();
    assert_eq!(listed[0]["name"], "monday");
    assert_eq!(listed[1]["parent"], "monday");
    assert_eq!(
        (&listed[1]["backup"], listed[1]["disks"].as_array().unwrap().len()),
        (&Value::Null, 1)
    );
    assert!(good(&["checkpoint", "dump", "web", "alone"]).starts_with("<domaincheckpoint>\n"));
    let taken = run(&["create", "web", "--checkpoint", "monday"]);
    assert_eq!(taken.status, 1, "{}", taken.stderr);
    assert!(taken.stderr.contains("'monday'"), "{}", taken.stderr);
    good(&["checkpoint", "delete", "web", "alone"]);
    good(&["create", "web", "--incremental", "monday", "--checkpoint", "no"]);
    assert_eq!(vm.checkpoints("vda").len(), 1);
    let denied = system.clients().backupctl(
        USER,
        &["--no-ask-password", "checkpoint", "delete", "web", "monday"],
    );
    assert_eq!(denied.status, 4, "{}", denied.stderr);
    assert_eq!(vm.checkpoints("vda").len(), 1);
}
