//! A domain is identified by its UUID. A renamed domain keeps its backups, another one under the same name does not
//! get them, and a service leaves backups of other services alone.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::System;
use crate::common::caller::{Caller, assert_completed};
use crate::common::chain::{directories, directories_if_any, id, manifest, write_manifest};
use crate::common::clients::{ROOT, USER};
use crate::common::disk::Disk;
use crate::common::polkit;
use crate::common::proxies::{ListedBackup, Options, PrunedBackup, error_name, slowly};
use crate::common::vm::{Builder, Vm};
use crate::common::wait;
use backupd::config::Config;
use serde_json::{Value, json};
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const FORMER: &str = "11111111-1111-4111-8111-111111111111";
const LATTER: &str = "22222222-2222-4222-8222-222222222222";
const NONE: &str = "00000000-0000-0000-0000-000000000000";

/// Starts a VM called `name` in a directory of its own.
fn machine(system: &System, directory: &str, name: &str, uuid: &str) -> Vm {
    let builder = Builder::new(&system.dir().join(directory), name)
        .uuid(uuid)
        .running();
    let vm = builder.disk(Disk::new("vda", 4 * MIB).fill(0, MIB, 0x11)).start();
    system.domain_file(name, &vm);
    system.wait_for_domain(name);
    vm
}

fn rename(system: &System, vm: &Vm, from: &str, to: &str) {
    system.remove_domain_file(from);
    system.domain_file(to, vm);
    system.wait_for_domain(to);
}

/// Makes an incremental backup if possible; returns the id of its base, or the reason for a full copy.
async fn backup(root: &Caller, domain: &str) -> String {
    let job = root.start_with(domain, "", &[], Options::new()).await;
    assert_completed(&job).await;
    let (_, _, since, why) = job.increments().await.unwrap().remove(0);
    format!("{since}{why}")
}

async fn list(caller: &Caller, domain: &str) -> Vec<ListedBackup> {
    let mut options = Options::new();
    if !domain.is_empty() {
        options.insert("domain", Variant::from(domain));
    }
    caller.manager.list_backups(options).await.unwrap().0
}

async fn ids(caller: &Caller, domain: &str) -> Vec<String> {
    let listed = list(caller, domain).await.into_iter();
    listed.map(|backup| backup.1).collect()
}

fn ids_in(directory: &Path) -> Vec<String> {
    directories_if_any(directory)
        .iter()
        .map(|path| id(path))
        .collect()
}

/// Returns the preview of a prune with `keep-last`: id, verdict and reason.
async fn preview(caller: &Caller, domain: &str, last: u64) -> Vec<(String, String, String)> {
    let options = Options::from([
        ("keep-last", Variant::from(last)),
        ("dry-run", Variant::from(true)),
    ]);
    let (judged, _) = caller.manager.prune(domain, options).await.unwrap();
    let brief = |(_, _, id, _, verdict, reason): PrunedBackup| (id, verdict, reason);
    judged.into_iter().map(brief).collect()
}

async fn rescan(caller: &Caller, adopt: bool) {
    let options = Options::from([("adopt", Variant::from(adopt))]);
    let (_, problems) = caller.manager.rescan(options).await.unwrap();
    assert_eq!(problems, [""; 0]);
}

/// Starts the service without its catalog.
fn lose_catalog(system: &mut System) {
    system.stop_daemon();
    for entry in fs::read_dir(system.dir().join("state")).unwrap() {
        let path = entry.unwrap().path();
        if path
            .file_name()
            .unwrap()
            .to_string_lossy()
            .starts_with("catalog.")
        {
            fs::remove_file(path).unwrap();
        }
    }
    system.start_daemon();
}

/// Creates a store `nightly` that keeps so many backups.
fn nightly(keep_last: u32) -> (tempfile::TempDir, String, PathBuf) {
    let directory = crate::common::test_directory();
    let path = directory.path().join("nightly");
    fs::create_dir(&path).unwrap();
    let table = format!(
        "[store.nightly]\npath = \"{}\"\nkeep-last = {keep_last}\nkeep-at-least = \"0s\"\n",
        path.display()
    );
    (directory, table, path)
}

const NIGHTLY: &str = "<domainbackup><store name='nightly'/></domainbackup>";

#[tokio::test(flavor = "multi_thread")]
async fn another_vm_under_the_same_name_gets_no_access_to_the_former_ones_backups() {
    let (_directory, table, store) = nightly(2);
    // A caller with the read right for "web" can read the domain that has that name now.
    let rules = polkit::deny(USER, &["domain.read"]).replace(
        "return ",
        "return action.lookup('domain_name') == 'web' ? polkit.Result.YES : ",
    );
    let system = System::setup().table(&table).rules(&rules).start();
    let root = Caller::new(&system).await;
    let mut former = machine(&system, "former", "web", FORMER);
    for _ in 0..2 {
        root.complete_full("web", NIGHTLY).await;
    }
    let olds = ids_in(&store.join("web"));
    assert_eq!(olds.len(), 2);
    let user = Caller::of_user(&system, USER).await;
    assert_eq!(ids(&user, "").await, olds);
    former.quit();
    system.remove_domain_file("web");
    // While no domain has its name, the name means its former owner.
    assert_eq!(ids(&root, "web").await, olds);

    let mut latter = machine(&system, "latter", "web", LATTER);
    let mut user = Caller::of_user(&system, USER).await;
    assert_eq!(ids(&root, "web").await, [""; 0]);
    assert_eq!(preview(&root, "web", 1).await, []);
    let mut bases = Vec::new();
    for round in 0..3 {
        latter.write("vda", round * 64 * 1024, 64 * 1024, 0x22);
        let job = root.start("web", NIGHTLY).await;
        assert_completed(&job).await;
        bases.push(job.increments().await.unwrap().remove(0).3);
    }
    // Its own chain begins with a full backup, in another directory.
    assert_eq!(bases, ["first", "", ""]);
    let news = ids_in(&store.join("web-22222222"));
    assert_eq!(news.len(), 3);
    assert_eq!(
        ids_in(&store.join("web")),
        olds,
        "the former domain's backups are complete"
    );
    assert_eq!(ids(&root, "web").await, news);
    assert_eq!(ids(&root, LATTER).await, news);
    assert_eq!(ids(&root, &FORMER.to_uppercase()).await, olds);
    assert_eq!(ids(&root, "").await.len(), 5);
    assert_eq!(ids(&user, "").await, news);
    let judged = preview(&root, "web", 1).await;
    assert_eq!(
        judged.iter().map(|judged| &judged.0).collect::<Vec<_>>(),
        news.iter().collect::<Vec<_>>()
    );

    // The former domain returns and continues its chain.
    latter.quit();
    system.remove_domain_file("web");
    let _former = machine(&system, "former", "web", FORMER);
    user = Caller::of_user(&system, USER).await;
    assert_eq!(ids(&user, "").await, olds);
    root.complete_full("web", NIGHTLY).await;
    // Its own rule counts only its own backups.
    crate::common::wait::until("the pruning", || {
        (ids_in(&store.join("web")).len() == 2).then_some(())
    });
    assert_eq!(ids_in(&store.join("web"))[0], olds[1]);
    assert_eq!(ids_in(&store.join("web-22222222")), news);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_vm_keeps_its_history_and_its_chain() {
    let mut system = System::start();
    let root = Caller::new(&system).await;
    let vm = machine(&system, "one", "web", FORMER);
    assert_eq!(backup(&root, "web").await, "first");
    let checkpoint = ["checkpoint", "create", "web", "--name", "by-hand"];
    system.clients().backupctl(ROOT, &checkpoint).expect_success();
    let [full] = ids(&root, "web").await.try_into().unwrap();
    rename(&system, &vm, "web", "www");
    vm.write("vda", 0, 64 * 1024, 0x22);
    assert_eq!(backup(&root, "www").await, full);
    let [_, second] = ids(&root, "www").await.try_into().unwrap();
    assert_eq!(
        ids_in(&system.store().join("web")),
        [full.clone(), second.clone()]
    );
    assert!(!system.store().join("www").exists());
    // Each backup keeps the domain name of its time.
    let names: Vec<String> = list(&root, FORMER)
        .await
        .into_iter()
        .map(|backup| backup.3)
        .collect();
    assert_eq!(names, ["web", "www"]);
    let text = system
        .clients()
        .backupctl(ROOT, &["backups", "www"])
        .expect_success();
    assert!(text.contains(&full) && text.contains(&second), "{text}");
    let text = system
        .clients()
        .backupctl(ROOT, &["checkpoints", "www"])
        .expect_success();
    assert!(text.contains("by-hand"), "{text}");
    // The rules count both.
    let expected = [
        (full.clone(), "kept".to_owned(), format!("{second} depends on it")),
        (second.clone(), "kept".to_owned(), "last".to_owned()),
    ];
    assert_eq!(preview(&root, "www", 1).await, expected);

    // After a restart, and after the loss of the catalog.
    system.stop_daemon();
    system.start_daemon();
    system.wait_for_domain("www");
    let root = Caller::new(&system).await;
    vm.write("vda", MIB, 64 * 1024, 0x33);
    assert_eq!(backup(&root, "www").await, second);
    let third = ids(&root, "www").await.remove(2);
    lose_catalog(&mut system);
    system.wait_for_domain("www");
    let root = Caller::new(&system).await;
    rescan(&root, false).await;
    vm.write("vda", 2 * MIB, 64 * 1024, 0x44);
    assert_eq!(backup(&root, "www").await, third);
    assert_eq!(ids_in(&system.store().join("web")).len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_without_catalog_gives_no_vm_the_directory_of_another() {
    let mut system = System::start();
    let root = Caller::new(&system).await;
    let mut former = machine(&system, "former", "web", FORMER);
    root.complete("web", "").await;
    former.quit();
    system.remove_domain_file("web");
    lose_catalog(&mut system);
    let mut latter = machine(&system, "latter", "web", LATTER);
    let root = Caller::new(&system).await;
    root.complete("web", "").await;
    assert_eq!(ids_in(&system.store().join("web")).len(), 1);
    assert_eq!(ids_in(&system.store().join("web-22222222")).len(), 1);
    latter.quit();
    system.remove_domain_file("web");
    let _former = machine(&system, "former", "web", FORMER);
    root.complete("web", "").await;
    let made = directories(&system.store().join("web"));
    let numbers: Vec<Value> = made
        .iter()
        .map(|backup| manifest(backup)["sequence"].clone())
        .collect();
    assert_eq!(numbers, [1, 2], "{made:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_without_a_uuid_are_distinguished_by_their_names() {
    let system = System::start();
    let root = Caller::new(&system).await;
    let one = machine(&system, "one", "one", NONE);
    let _two = machine(&system, "two", "two", NONE);
    assert_eq!(backup(&root, "one").await, "first");
    assert_eq!(backup(&root, "two").await, "first");
    let full = ids(&root, "one").await.remove(0);
    assert_eq!(list(&root, "one").await[0].4, "");
    one.write("vda", 0, 64 * 1024, 0x22);
    assert_eq!(backup(&root, "one").await, full);
    for (name, count) in [("one", 2), ("two", 1)] {
        assert_eq!(ids_in(&system.store().join(name)).len(), count, "{name}");
        assert_eq!(ids(&root, name).await.len(), count, "{name}");
    }
    rename(&system, &one, "one", "three");
    assert_eq!(backup(&root, "three").await, "first");
    assert_eq!(ids(&root, "three").await.len(), 1);
    assert_eq!(ids_in(&system.store().join("three")).len(), 1);
    // A domain with a UUID under the name is another one.
    let _other = machine(&system, "other", "one", LATTER);
    assert_eq!(backup(&root, "one").await, "first");
    assert_eq!(ids_in(&system.store().join("one-22222222")).len(), 1);
    assert_eq!(ids(&root, "one").await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_with_the_same_uuid_stays_apart_while_both_are_known() {
    let system = System::start();
    let root = Caller::new(&system).await;
    let _web = machine(&system, "web", "web", FORMER);
    root.complete("web", "").await;
    let _copy = machine(&system, "copy", "copy", FORMER);
    assert_eq!(backup(&root, "copy").await, "first");
    assert_eq!(
        backup(&root, "copy").await,
        ids_in(&system.store().join("copy"))[0]
    );
    assert_eq!(backup(&root, "web").await, ids_in(&system.store().join("web"))[0]);
    assert_eq!(ids_in(&system.store().join("copy")).len(), 2);
    assert_eq!(ids_in(&system.store().join("web")).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn keep_rules_ignore_foreign_backups_until_they_are_adopted() {
    let (_directory, table, store) = nightly(1);
    let mut system = System::setup().table(&table).start();
    let _vm = machine(&system, "one", "web", FORMER);
    let root = Caller::new(&system).await;
    root.complete_full("web", NIGHTLY).await;
    let first = list(&root, "web").await.remove(0);
    assert!(!first.12.is_empty() && first.13);
    // A service without its catalog has a new identity.
    lose_catalog(&mut system);
    system.wait_for_domain("web");
    let root = Caller::new(&system).await;
    rescan(&root, false).await;
    let found = list(&root, "web").await.remove(0);
    assert_eq!((&found.1, &found.12, found.13), (&first.1, &first.12, false));
    root.complete_full("web", NIGHTLY).await;
    root.complete_full("web", NIGHTLY).await;
    crate::common::wait::until("the pruning", || {
        (ids_in(&store.join("web")).len() == 2).then_some(())
    });
    let left = ids_in(&store.join("web"));
    assert_eq!(left[0], first.1, "the other service's backup exists");
    let judged = preview(&root, "web", 1).await;
    assert_eq!(
        judged[0],
        (first.1.clone(), "kept".into(), "made by another service".into())
    );
    let shown = system
        .clients()
        .backupctl(ROOT, &["backups", "web"])
        .expect_success();
    assert!(shown.contains(&first.12) && shown.contains("this one"), "{shown}");
    let json = system
        .clients()
        .backupctl(ROOT, &["backups", "web", "--json"])
        .expect_success();
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&json[0]["service"], &json[0]["own"]),
        (&json!(first.12), &json!(false))
    );
    assert_eq!(json[1]["own"], true);

    let said = system
        .clients()
        .backupctl(ROOT, &["rescan", "--adopt"])
        .expect_success();
    assert!(said.contains("2 backups"), "{said}");
    assert!(list(&root, "web").await[0].13);
    let judged = preview(&root, "web", 1).await;
    assert_eq!(judged[0], (first.1, "removed".into(), String::new()));
    drop(root);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_order_of_creation_counts_and_not_the_clock() {
    let system = System::start();
    let _vm = machine(&system, "one", "web", FORMER);
    let root = Caller::new(&system).await;
    for _ in 0..4 {
        root.complete_full("web", "").await;
    }
    let made = directories(&system.store().join("web"));
    let order: Vec<String> = made.iter().map(|backup| id(backup)).collect();
    let mut wrong = manifest(&made[1]);
    wrong["instant"] = json!("2199-01-01T00:00:00Z");
    write_manifest(&made[1], &wrong);
    rescan(&root, false).await;
    assert_eq!(ids(&root, "web").await, order);
    let verdicts: Vec<String> = preview(&root, "web", 2)
        .await
        .into_iter()
        .map(|judged| judged.1)
        .collect();
    assert_eq!(verdicts, ["removed", "removed", "kept", "kept"]);
    let clients = system.clients();
    for arguments in [
        &["backups", "web"][..],
        &["prune", "web", "--keep-last", "2", "--dry-run"],
    ] {
        let text = clients.backupctl(ROOT, arguments).expect_success();
        assert!(text.contains("1 backup is from the future"), "{text}");
    }
    // The next backup continues from the one that was made last.
    let newest = order[3].clone();
    assert_eq!(backup(&root, "web").await, newest);
    let numbers: Vec<Value> = directories(&system.store().join("web"))
        .iter()
        .map(|backup| manifest(backup)["sequence"].clone())
        .collect();
    assert!(numbers.contains(&json!(5)), "{numbers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_store_that_keeps_no_checkpoints_takes_none_from_the_first() {
    let directory = crate::common::test_directory();
    // The first by its name too.
    let copy = directory.path().join("archive");
    let table = format!(
        "[store.archive]\npath = \"{}\"\ncheckpoints = 0\n",
        copy.display()
    );
    assert!(Config::parse(&table, Path::new("backupd.toml")).is_ok());
    let mut system = System::setup().table(&table).start();
    let vm = machine(&system, "one", "web", FORMER);
    let root = Caller::new(&system).await;
    root.complete("web", "").await;
    let full = ids(&root, "web").await.remove(0);
    let mut command = std::process::Command::new("cp");
    command.arg("-a").arg(system.store()).arg(&copy);
    crate::common::process::run(command).expect_success();
    lose_catalog(&mut system);
    system.wait_for_domain("web");
    let root = Caller::new(&system).await;
    rescan(&root, false).await;
    assert_eq!(ids(&root, "web").await.len(), 2);
    for _ in 0..2 {
        // To both stores: each backup removes bitmaps at its end that no store needs.
        vm.write("vda", 0, 64 * 1024, 0x22);
        root.complete("web", "<domainbackup><store name='archive'/></domainbackup>")
            .await;
    }
    assert_eq!(vm.checkpoints("vda").len(), 1);
    assert_eq!(backup(&root, "web").await, full);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_continues_after_its_vm_was_renamed_without_a_service() {
    let mut system = System::start();
    let vm = Builder::new(&system.dir().join("vm"), "before")
        .uuid(FORMER)
        .running()
        .disk(Disk::new("vda", 64 * MIB).fill(0, 48 * MIB, 0x11))
        .start();
    system.domain_file("before", &vm);
    system.wait_for_domain("before");
    let root = Caller::new(&system).await;
    let job = root.start_with("before", "", &[], slowly(MIB)).await;
    wait::until_async("some progress", || async {
        (job.progress().await.unwrap() > 0.0).then_some(())
    })
    .await;
    system.kill_daemon();
    fs::remove_file(system.dir().join("etc/domains.d/before.toml")).unwrap();
    system.domain_file("after", &vm);
    // Another VM has the name now.
    let other = Builder::new(&system.dir().join("other"), "before")
        .uuid(LATTER)
        .disk(Disk::new("vda", MIB));
    let other = other.start();
    system.domain_file("before", &other);
    system.start_daemon();
    system.wait_for_domain("after");
    let root = Caller::new(&system).await;
    let job = root.job(root.manager.get_job(1).await.unwrap()).await;
    wait::until_async("it to go on", || async {
        (job.state().await.unwrap() == "running").then_some(())
    })
    .await;
    let busy = root
        .try_start("after", "", &[], Options::new())
        .await
        .unwrap_err();
    assert!(error_name(&busy).ends_with("Error.Busy"), "{busy}");
    job.set_speed(0).await.unwrap();
    assert_completed(&job).await;
    let [first] = ids(&root, "after").await.try_into().unwrap();
    assert_eq!(
        backup(&root, "after").await,
        first,
        "its record of what changed is there too"
    );
    assert_eq!(vm.residue().jobs, [""; 0]);
}

/// A user who can read a backup knows its bitmap's name, and can write to a store on removable media.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_manifest_is_never_used_as_a_base() {
    let (_directory, table, nightly) = nightly(9);
    let system = System::setup().table(&table).start();
    let vm = machine(&system, "one", "web", FORMER);
    let root = Caller::new(&system).await;
    root.complete("web", "").await;
    let genuine = directories(&system.store().join("web")).remove(0);
    let forged = nightly.join("web/20991231T000000Z-ffffffff");
    fs::create_dir_all(forged.parent().unwrap()).unwrap();
    let mut copy = std::process::Command::new("cp");
    copy.arg("-a").arg(&genuine).arg(&forged);
    crate::common::process::run(copy).expect_success();
    let mut content = manifest(&forged);
    content["id"] = json!(id(&forged));
    content["instant"] = json!("9999-12-01T00:00:00Z");
    content["sequence"] = json!(1_u64 << 53);
    write_manifest(&forged, &content);
    rescan(&root, false).await;
    assert!(ids(&root, "web").await.contains(&id(&forged)));
    vm.write("vda", 0, 64 * 1024, 0x22);

    let since = Options::from([("incremental", Variant::from("20991231T000000Z-ffffffff"))]);
    let refused = root.try_start("web", NIGHTLY, &[], since).await.unwrap_err();
    assert!(
        refused.to_string().contains("another service created"),
        "{refused}"
    );
    let job = root.start_with("web", NIGHTLY, &[], Options::new()).await;
    assert_completed(&job).await;
    let (disk, mode, base, why) = job.increments().await.unwrap().remove(0);
    assert_eq!((&*disk, &*mode, &*base, &*why), ("vda", "full", "", "not-proven"));
    // The genuine one stays the base in its own store.
    assert_eq!(backup(&root, "web").await, id(&genuine));
}
