//! The domains that the service knows: how they appear and disappear, their properties, and the names of their disks.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;

use crate::common::System;
use crate::common::caller::{Caller, assert_completed, brief};
use crate::common::disk::{Disk, Kind};
use crate::common::peer::{GREETING, Peer};
use crate::common::proxies::{DomainProxy, Options, error_name, slowly};
use crate::common::storage::{holds, identical};
use crate::common::vm::Vm;
use crate::common::wait::{until_async, within};
use serde_json::json;
use zbus::wire::OwnedObjectPath;

const MIB: u64 = 1 << 20;
const UNREACHABLE: &str = "org.example.Backup1.Error.DomainUnreachable";
const NO_SUCH_DOMAIN: &str = "org.example.Backup1.Error.NoSuchDomain";
const INVALID_ARGS: &str = "org.freedesktop.DBus.Error.InvalidArgs";

/// Starts a VM with one small disk that holds `pattern`.
fn machine(system: &System, name: &str, pattern: u8) -> Vm {
    let disk = Disk::new("vda", 8 * MIB).fill(0, MIB, pattern);
    system.vm(name).disk(disk).start()
}

/// Returns the domain of that name.
async fn domain(caller: &Caller, name: &str) -> DomainProxy<'static> {
    let path = caller
        .manager
        .get_domain(name)
        .await
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    DomainProxy::new(&caller.connection, path)
        .await
        .expect("a proxy is made")
}

async fn wait_for_state(domain: &DomainProxy<'_>, state: &str) {
    until_async(&format!("the domain to be {state}"), || async {
        (domain.state().await.unwrap() == state).then_some(())
    })
    .await;
}

/// Waits until the domain of that name is this VM and connected.
async fn wait_for_machine(caller: &Caller, name: &str, vm: &Vm) -> DomainProxy<'static> {
    until_async(&format!("{name} to be connected"), || async {
        let path = caller.manager.get_domain(name).await.ok()?;
        let domain = DomainProxy::new(&caller.connection, path).await.unwrap();
        let known = domain.uuid().await.ok()? == vm.uuid();
        let connected = ["running", "paused"].contains(&domain.state().await.ok()?.as_str());
        (known && connected).then_some(domain)
    })
    .await
}

async fn wait_for_no_domain(caller: &Caller, name: &str) {
    until_async(&format!("{name} to be removed"), || async {
        let gone = caller.manager.get_domain(name).await.err()?;
        assert_eq!(error_name(&gone), NO_SUCH_DOMAIN);
        Some(())
    })
    .await;
}

/// Backs up all disks; returns the images by the disks' names.
async fn back_up(caller: &Caller, domain: &str) -> BTreeMap<String, PathBuf> {
    let job = caller.complete(domain, "").await;
    let disks = job.disks().await.unwrap();
    disks
        .into_iter()
        .map(|disk| (disk.0, PathBuf::from(disk.4)))
        .collect()
}

// Disks.

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_disk_has_its_name_and_is_backed_up_by_it() {
    let system = System::start();
    let extra = system.dir().join("extra");
    fs::create_dir(&extra).unwrap();
    let raw = |name: &str| {
        let path = extra.join(name);
        File::create_new(&path).unwrap().set_len(4 * MIB).unwrap();
        path
    };
    let (nameless, lonely, unused) = (raw("nameless"), raw("lonely"), raw("unused"));
    let drive = format!("if=none,id=only-a-drive,format=raw,file={}", nameless.display());
    let node = json!({ "driver": "file", "node-name": "only-a-node", "filename": lonely });
    let idle = format!("if=none,id=nobodys,format=raw,file={}", unused.display());
    let mut vm = system
        .vm("web")
        .disk(
            Disk::new("vda", 16 * MIB)
                .throttle_filter()
                .fill(0, 4 * MIB, 0x11),
        )
        .disk(
            Disk::new("sda", 8 * MIB)
                .raw()
                .kind(Kind::Scsi)
                .fill(0, MIB, 0x22),
        )
        .disk(
            Disk::new("hda", 8 * MIB)
                .kind(Kind::Ide)
                .drive_style()
                .fill(0, MIB, 0x33),
        )
        .disk(Disk::new("vdr", 8 * MIB).raw().read_only().fill(0, MIB, 0x44))
        .disk(Disk::empty_cdrom("cd"))
        .extra(&[
            "-drive",
            &drive,
            "-device",
            "virtio-blk-pci,drive=only-a-drive",
            "-blockdev",
            &node.to_string(),
            "-device",
            "virtio-blk-pci,drive=only-a-node",
            // No device uses it, so it is not a disk of the guest.
            "-drive",
            &idle,
        ])
        .running()
        .start();
    system.domain_file("web", &vm);
    system.wait_for_domain("web");
    let before = vm.residue();
    let caller = Caller::new(&system).await;
    let web = domain(&caller, "web").await;
    let mut disks = web.disks().await.unwrap();
    disks.sort();
    // QEMU generated the names of these nodes.
    for disk in &mut disks {
        if disk.1.starts_with("#block") {
            assert!(["hda", "only-a-drive"].contains(&disk.0.as_str()), "{disk:?}");
            disk.1 = "made up".into();
        }
    }
    let disk = |name: &str, node: &str, size: u64, format: &str, writable| {
        let left_out = match (node, writable) {
            ("", _) => "no-medium",
            (_, false) => "read-only",
            (_, true) => "",
        };
        (
            name.to_owned(),
            node.to_owned(),
            size,
            format.to_owned(),
            writable,
            left_out.to_owned(),
        )
    };
    assert_eq!(
        disks,
        [
            disk("cd", "", 0, "", false),
            disk("hda", "made up", 8 * MIB, "qcow2", true),
            disk("only-a-drive", "made up", 4 * MIB, "raw", true),
            disk("only-a-node", "only-a-node", 4 * MIB, "file", true),
            disk("sda", "sda-format", 8 * MIB, "raw", true),
            disk("vda", "vda-format", 16 * MIB, "qcow2", true),
            disk("vdr", "vdr-format", 8 * MIB, "raw", false),
        ]
    );

    let images = back_up(&caller, "web").await;
    assert_eq!(
        images.keys().map(String::as_str).collect::<Vec<_>>(),
        ["hda", "only-a-drive", "only-a-node", "sda", "vda"]
    );
    // A read-only disk is copied only when it is named. The names of the drive and of the node find a disk too.
    let text =
        "<domainbackup><disks><disk name='vdr'/><disk name='vda-format'/><disk name='drive-hda'/></disks>
        </domainbackup>";
    let job = caller.complete("web", text).await;
    let named: BTreeMap<_, _> = job
        .disks()
        .await
        .unwrap()
        .into_iter()
        .map(|disk| (disk.0, PathBuf::from(disk.4)))
        .collect();
    assert_eq!(
        named.keys().map(String::as_str).collect::<Vec<_>>(),
        ["hda", "vda", "vdr"]
    );
    assert_eq!(vm.residue(), before);
    // A drive without a medium has no data to copy.
    let refused = caller
        .try_start(
            "web",
            "<domainbackup><disks><disk name='cd'/></disks></domainbackup>",
            &[],
            Options::new(),
        )
        .await;
    assert!(refused.unwrap_err().to_string().contains("'cd'"));

    vm.quit();
    for (name, image) in images.iter().chain(&named) {
        let (source, format) = match name.as_str() {
            "only-a-drive" => (nameless.as_path(), "raw"),
            "only-a-node" => (lonely.as_path(), "raw"),
            name => (vm.source_path(name), vm.source_format(name)),
        };
        assert!(identical(image, "qcow2", source, format), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_plugged_in_is_in_the_next_backup_and_one_that_is_pulled_is_not() {
    let system = System::start();
    let vm = system.configured(
        system
            .vm("web")
            .disk(Disk::new("vda", 8 * MIB))
            .disk(Disk::new("sda", 8 * MIB).kind(Kind::Scsi)),
    );
    let caller = Caller::new(&system).await;
    let web = domain(&caller, "web").await;
    assert_eq!(
        back_up(&caller, "web").await.into_keys().collect::<Vec<_>>(),
        ["sda", "vda"]
    );

    let path = system.dir().join("hot.raw");
    fs::write(&path, vec![0x5a; 4 << 20]).unwrap();
    vm.qmp(
        "blockdev-add",
        json!({ "driver": "raw", "node-name": "hot-format", "file": { "driver": "file", "filename": path } }),
    );
    vm.qmp(
        "device_add",
        json!({ "driver": "scsi-hd", "id": "hot", "drive": "hot-format", "bus": "scsi.0" }),
    );
    let images = back_up(&caller, "web").await;
    assert_eq!(images.keys().collect::<Vec<_>>(), ["hot", "sda", "vda"]);
    assert!(holds(&images["hot"], "qcow2", 0, 4 * MIB, 0x5a));
    assert_eq!(web.disks().await.unwrap().len(), 3);

    vm.qmp("device_del", json!({ "id": "hot" }));
    vm.wait_event("DEVICE_DELETED", |data| data["device"] == "hot");
    assert_eq!(
        back_up(&caller, "web").await.into_keys().collect::<Vec<_>>(),
        ["sda", "vda"]
    );
    until_async("the disk to be gone", || async {
        (web.disks().await.unwrap().len() == 2).then_some(())
    })
    .await;
}

// The properties of a domain.

#[tokio::test(flavor = "multi_thread")]
async fn name_uuid_and_state_come_from_qemu() {
    let system = System::start();
    let vm = system
        .vm("web")
        .uuid("6f2c3b1e-0d4a-4c7e-9a43-5d0f3c2b1a00")
        .disk(Disk::new("vda", 8 * MIB))
        .start();
    let path = system.domain_file("other-name", &vm);
    system.wait_for_domain("other-name");
    let caller = Caller::new(&system).await;
    let found = domain(&caller, "other-name").await;
    assert_eq!(found.name().await.unwrap(), "other-name");
    assert_eq!(found.uuid().await.unwrap(), vm.uuid());
    assert_eq!(found.source().await.unwrap(), "configured");
    assert_eq!(found.owner().await.unwrap(), 0);
    assert_eq!(found.state().await.unwrap(), "paused");
    let listed = caller.manager.list_domains().await.unwrap();
    let object: OwnedObjectPath = found.inner().path().to_owned().into();
    assert_eq!(
        listed,
        [(
            object.clone(),
            "other-name".into(),
            vm.uuid().into(),
            "paused".into()
        )]
    );
    // By UUID, in any notation.
    for uuid in [
        vm.uuid().to_owned(),
        vm.uuid().to_uppercase(),
        vm.uuid().replace('-', ""),
    ] {
        assert_eq!(caller.manager.get_domain(&uuid).await.unwrap(), object, "{uuid}");
    }
    for name in ["web", "", "6f2c3b1e-0d4a-4c7e-9a43-5d0f3c2b1a01", "OTHER-NAME"] {
        let error = caller.manager.get_domain(name).await.unwrap_err();
        assert_eq!(error_name(&error), NO_SUCH_DOMAIN, "{name}");
    }
    assert_completed(&caller.start(vm.uuid(), "").await).await;

    vm.cont();
    wait_for_state(&found, "running").await;
    vm.stop();
    wait_for_state(&found, "paused").await;
    vm.cont();
    wait_for_state(&found, "running").await;
    fs::remove_file(path).unwrap();
    wait_for_no_domain(&caller, "other-name").await;
    wait_for_no_domain(&caller, vm.uuid()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ambiguous_uuid_finds_no_domain() {
    let system = System::start();
    let uuid = "6f2c3b1e-0d4a-4c7e-9a43-5d0f3c2b1a00";
    let machines = ["one", "two"].map(|name| system.vm(name).uuid(uuid).start());
    let caller = Caller::new(&system).await;
    system.domain_file("one", &machines[0]);
    wait_for_machine(&caller, "one", &machines[0]).await;
    let one = caller.manager.get_domain("one").await.unwrap();
    assert_eq!(caller.manager.get_domain(uuid).await.unwrap(), one);
    let file = system.domain_file("two", &machines[1]);
    wait_for_machine(&caller, "two", &machines[1]).await;
    let error = caller.manager.get_domain(uuid).await.unwrap_err();
    assert_eq!(error_name(&error), INVALID_ARGS);
    fs::remove_file(file).unwrap();
    wait_for_no_domain(&caller, "two").await;
    assert_eq!(caller.manager.get_domain(uuid).await.unwrap(), one);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_file_is_found_by_its_name_first_even_if_that_is_anothers_uuid() {
    let system = System::start();
    let vm = machine(&system, "web", 1);
    let other = machine(&system, "other", 2);
    let caller = Caller::new(&system).await;
    system.domain_file("web", &vm);
    wait_for_machine(&caller, "web", &vm).await;
    system.domain_file(vm.uuid(), &other);
    wait_for_machine(&caller, vm.uuid(), &other).await;
    let found = domain(&caller, vm.uuid()).await;
    assert_eq!(found.uuid().await.unwrap(), other.uuid());
}

// Files.

#[tokio::test(flavor = "multi_thread")]
async fn an_added_changed_or_removed_domain_file_takes_effect_and_is_signalled() {
    let system = System::start();
    let (mut one, mut two) = (machine(&system, "one", 0x11), machine(&system, "two", 0x22));
    let mut caller = Caller::new(&system).await;
    caller.manager.subscribe().await.unwrap();
    assert_eq!(caller.manager.list_domains().await.unwrap(), []);

    let file = system.domain_file("web", &one);
    let added = caller.signals_until("DomainAdded").await;
    let first = wait_for_machine(&caller, "web", &one).await;
    let first_path = first.inner().path().to_string();
    assert_eq!(brief(&added), [format!("DomainAdded {first_path}")]);
    let image = back_up(&caller, "web").await.remove("vda").unwrap();
    assert!(holds(&image, "qcow2", 0, MIB, 0x11));
    caller.signals_until("JobEnded").await;

    system.domain_file("web", &two);
    let changed = caller.signals_until("DomainAdded").await;
    let second = wait_for_machine(&caller, "web", &two).await;
    let second_path = second.inner().path().to_string();
    assert_eq!(
        brief(&changed),
        [
            format!("DomainRemoved {first_path}"),
            format!("DomainAdded {second_path}")
        ]
    );
    assert_ne!(first_path, second_path, "it is another domain");
    assert!(first.state().await.is_err(), "its object has gone");
    let image = back_up(&caller, "web").await.remove("vda").unwrap();
    assert!(holds(&image, "qcow2", 0, MIB, 0x22));
    caller.signals_until("JobEnded").await;
    // The first QEMU's monitor is free.
    let observer = until_async("the monitor to be released", || async {
        crate::common::observer::Observer::connect(&one.monitor_path())
    });
    drop(observer.await);

    // Writing the same content again is not a change.
    system.domain_file("web", &two);
    fs::remove_file(&file).unwrap();
    let removed = caller.signals_until("DomainRemoved").await;
    assert_eq!(brief(&removed), [format!("DomainRemoved {second_path}")]);
    wait_for_no_domain(&caller, "web").await;
    let refused = caller.try_start("web", "", &[], Options::new()).await;
    assert_eq!(error_name(&refused.unwrap_err()), NO_SUCH_DOMAIN);
    assert_eq!(caller.manager.list_domains().await.unwrap(), []);
    one.quit();
    two.quit();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_without_subscription_hears_of_no_domain() {
    let system = System::start();
    let vm = machine(&system, "web", 1);
    let mut silent = Caller::new(&system).await;
    let mut told = Caller::new(&system).await;
    told.manager.subscribe().await.unwrap();
    let file = system.domain_file("web", &vm);
    told.signals_until("DomainAdded").await;
    told.manager.unsubscribe().await.unwrap();
    fs::remove_file(file).unwrap();
    wait_for_no_domain(&told, "web").await;
    system.domain_file("other", &vm);
    wait_for_machine(&told, "other", &vm).await;
    // Public signals arrive after those for subscribers only.
    told.complete("other", "").await;
    for caller in [&mut silent, &mut told] {
        let heard = caller.signals_until("JobEnded").await;
        let domains = heard.iter().filter(|signal| signal.name.starts_with("Domain"));
        assert_eq!(domains.count(), 0, "{heard:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_file_is_logged_with_its_line_and_the_others_load() {
    let mut system = System::setup().without_daemon().start();
    let vm = machine(&system, "web", 1);
    let late = machine(&system, "late", 2);
    let bad = system.write_domain_file("bad", "monitor = \"/run/bad.qmp\"\n\nmonitro = \"/run/typo\"\n");
    system.write_domain_file("relative", "monitor = \"bad.qmp\"\n");
    system.write_domain_file("broken", "monitor = \"/run/x\nagent = 7\n");
    system.write_domain_file("nothing", "agent = \"/run/x\"\n");
    system.write_domain_file(".hidden", "monitor = \"/run/x\"\n");
    fs::create_dir(system.dir().join("etc/domains.d/directory.toml")).unwrap();
    // Opening it would wait for a writer.
    rustix::fs::mknodat(
        rustix::fs::CWD,
        system.dir().join("etc/domains.d/pipe.toml"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o644),
        0,
    )
    .unwrap();
    std::os::unix::fs::symlink("/nowhere", system.dir().join("etc/domains.d/dangling.toml")).unwrap();
    let open = system.write_domain_file("open", "monitor = \"/run/x\"\n");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o666)).unwrap();
    fs::write(system.dir().join("etc/domains.d/README"), "no domain").unwrap();
    system.domain_file("web", &vm);
    system.start_daemon();
    system.wait_for_domain("web");
    system.domain_file("late", &late);
    system.wait_for_domain("late");

    let log = system.daemon().log();
    // Each error with its path and position.
    let logged = |name: &str, words: &[&str]| {
        let start = log.find(&format!("{name}.toml: "));
        let start = start.unwrap_or_else(|| panic!("{name} is in {log}"));
        let end = log[start..]
            .find("the file is ignored")
            .expect("it says what follows");
        for word in words {
            assert!(
                log[start..start + end].contains(word),
                "{word:?} in {}",
                &log[start..start + end]
            );
        }
        assert_eq!(
            log.matches(&format!("{name}.toml: ")).count(),
            1,
            "{name} once: {log}"
        );
    };
    logged("bad", &["line 3", "monitro"]);
    logged("relative", &["'monitor'", "bad.qmp"]);
    logged("broken", &["line 1"]);
    logged("nothing", &["monitor"]);
    logged(".hidden", &["name"]);
    logged("directory", &[]);
    logged("pipe", &[]);
    logged("dangling", &[]);
    logged("open", &["not trusted"]);
    assert!(!log.contains("README"));
    let caller = Caller::new(&system).await;
    let names = |listed: Vec<(OwnedObjectPath, String, String, String)>| -> Vec<String> {
        listed.into_iter().map(|entry| entry.1).collect()
    };
    assert_eq!(
        names(caller.manager.list_domains().await.unwrap()),
        ["late", "web"]
    );

    // A corrected file takes effect, and a good file that breaks does not any more.
    fs::remove_file(bad).unwrap();
    system.write_domain_file("bad", "monitor = \"/run/bad.qmp\"\n");
    system.write_domain_file("late", "monitor =\n");
    wait_for_no_domain(&caller, "late").await;
    assert_eq!(
        names(caller.manager.list_domains().await.unwrap()),
        ["bad", "web"]
    );
    assert!(system.daemon().log().contains("late.toml: "));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_in_the_first_directory_overrides_one_in_the_second() {
    let system = System::start();
    let (one, two) = (machine(&system, "one", 0x11), machine(&system, "two", 0x22));
    let caller = Caller::new(&system).await;
    let second = system.dir().join("run/domains.d/web.toml");
    // Written in place, piece by piece, as an editor would.
    fs::write(
        &second,
        format!("monitor = \"{}\"\n", two.monitor_path().display()),
    )
    .unwrap();
    wait_for_machine(&caller, "web", &two).await;
    let first = system.domain_file("web", &one);
    wait_for_machine(&caller, "web", &one).await;
    fs::remove_file(first).unwrap();
    wait_for_machine(&caller, "web", &two).await;
    fs::remove_file(second).unwrap();
    wait_for_no_domain(&caller, "web").await;
    // The directory itself may be removed and created again.
    fs::remove_dir(system.dir().join("run/domains.d")).unwrap();
    fs::create_dir(system.dir().join("run/domains.d")).unwrap();
    let again = system.dir().join("run/domains.d/again.toml");
    fs::write(
        &again,
        format!("monitor = \"{}\"\n", two.monitor_path().display()),
    )
    .unwrap();
    wait_for_machine(&caller, "again", &two).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_completes_after_its_domain_is_removed_and_leaves_nothing_in_qemu() {
    let system = System::start();
    let vm = system
        .vm("web")
        .disk(Disk::new("vda", 8 * MIB).fill(0, 4 * MIB, 0x11))
        .running()
        .start();
    let other = machine(&system, "other", 0x22);
    let caller = Caller::new(&system).await;
    let line = |vm: &Vm| format!("monitor = \"{}\"\n", vm.monitor_path().display());
    // The file is removed, names another monitor, and changes another setting of the same one.
    for text in [
        None,
        Some(line(&other)),
        Some(format!("{}agent = \"/nowhere\"\n", line(&vm))),
    ] {
        let file = system.domain_file("web", &vm);
        let web = wait_for_machine(&caller, "web", &vm).await;
        let before = vm.residue();
        let options = slowly(65536);
        let job = caller.start_with("web", "", &[], options).await;
        until_async("the backup to run", || async {
            (job.state().await.unwrap() == "running").then_some(())
        })
        .await;
        match &text {
            None => fs::remove_file(&file).unwrap(),
            Some(text) => drop(system.write_domain_file("web", text)),
        }
        until_async("the domain to be removed", || async { web.state().await.err() }).await;
        job.set_speed(0).await.unwrap();
        assert_completed(&job).await;
        let image = PathBuf::from(&job.disks().await.unwrap()[0].4);
        assert!(holds(&image, "qcow2", 0, 4 * MIB, 0x11));
        assert_eq!(vm.residue(), before, "{text:?}");
        if let Some(text) = &text {
            let now = if *text == line(&other) { &other } else { &vm };
            wait_for_machine(&caller, "web", now).await;
        }
    }
}

// Monitors.

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_comes_later_and_one_that_comes_again_are_connected() {
    let system = System::start();
    let monitor = system.dir().join("web/service");
    system.write_domain_file("web", &format!("monitor = \"{}\"\n", monitor.display()));
    let caller = Caller::new(&system).await;
    until_async("the domain", || async {
        caller.manager.get_domain("web").await.ok()
    })
    .await;
    let web = domain(&caller, "web").await;
    wait_for_state(&web, "unreachable").await;
    let refused = caller
        .try_start("web", "", &[], Options::new())
        .await
        .unwrap_err();
    assert_eq!(error_name(&refused), UNREACHABLE);
    assert!(
        refused.to_string().contains(monitor.to_str().unwrap()),
        "{refused}"
    );
    assert_eq!(web.disks().await.unwrap(), []);

    let mut vm = machine(&system, "web", 0x11);
    wait_for_machine(&caller, "web", &vm).await;
    assert!(holds(
        &back_up(&caller, "web").await["vda"],
        "qcow2",
        0,
        MIB,
        0x11
    ));
    vm.kill();
    wait_for_state(&web, "unreachable").await;
    let refused = caller
        .try_start("web", "", &[], Options::new())
        .await
        .unwrap_err();
    assert_eq!(error_name(&refused), UNREACHABLE);

    // The same image with other data.
    drop(vm);
    let vm = machine(&system, "web", 0x22);
    wait_for_machine(&caller, "web", &vm).await;
    assert_eq!(web.uuid().await.unwrap(), vm.uuid(), "it is the same object");
    assert!(holds(
        &back_up(&caller, "web").await["vda"],
        "qcow2",
        0,
        MIB,
        0x22
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_monitor_that_is_not_a_qemu_is_unreachable_with_a_reason() {
    let system = System::start();
    let path = system.dir().join("strange");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // A client that has left receives nothing.
            let _ = std::io::Write::write_all(&mut stream.unwrap(), b"SSH-2.0-OpenSSH_9.2\r\n");
        }
    });
    system.write_domain_file("strange", &format!("monitor = \"{}\"\n", path.display()));
    let good = machine(&system, "good", 1);
    system.domain_file("good", &good);
    let caller = Caller::new(&system).await;
    wait_for_machine(&caller, "good", &good).await;
    let refused = caller
        .try_start("strange", "", &[], Options::new())
        .await
        .unwrap_err();
    assert_eq!(error_name(&refused), UNREACHABLE);
    assert!(refused.to_string().contains("does not speak QMP"), "{refused}");
    caller.complete("good", "").await;
}

// Registered domains.

async fn register(caller: &Caller, name: &str, socket: impl Into<OwnedFd>) -> zbus::Result<OwnedObjectPath> {
    let socket: OwnedFd = socket.into();
    let registering = caller
        .manager
        .register_domain(name, socket.as_fd().into(), Options::new());
    within("RegisterDomain", registering).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registered_domain_is_backed_up_over_the_passed_socket_and_goes_with_its_qemu() {
    let system = System::start();
    let mut vm = machine(&system, "mine", 0x11);
    let mut caller = Caller::new(&system).await;
    caller.manager.subscribe().await.unwrap();
    let path = register(&caller, "mine", vm.monitor_stream()).await.unwrap();
    assert_eq!(
        brief(&caller.signals_until("DomainAdded").await),
        [format!("DomainAdded {path}")]
    );
    let mine = domain(&caller, "mine").await;
    assert_eq!(mine.inner().path().as_str(), path.as_str());
    // The domain's properties are known when the call returns.
    assert_eq!(mine.state().await.unwrap(), "paused");
    assert_eq!(mine.uuid().await.unwrap(), vm.uuid());
    assert_eq!(mine.source().await.unwrap(), "registered");
    assert_eq!(mine.owner().await.unwrap(), 0);
    assert_eq!(mine.disks().await.unwrap().len(), 1);
    assert_eq!(caller.manager.get_domain(vm.uuid()).await.unwrap(), path);
    assert!(holds(
        &back_up(&caller, "mine").await["vda"],
        "qcow2",
        0,
        MIB,
        0x11
    ));
    caller.signals_until("JobEnded").await;
    vm.cont();
    wait_for_state(&mine, "running").await;

    vm.quit();
    let gone = caller.signals_until("DomainRemoved").await;
    assert_eq!(brief(&gone), [format!("DomainRemoved {path}")]);
    wait_for_no_domain(&caller, "mine").await;
    // The name is free again.
    drop(vm);
    let vm = machine(&system, "mine", 0x22);
    let again = register(&caller, "mine", vm.monitor_stream()).await.unwrap();
    assert_ne!(again, path);
    assert!(holds(
        &back_up(&caller, "mine").await["vda"],
        "qcow2",
        0,
        MIB,
        0x22
    ));
}

/// Checks that the call fails with this error, with `word` in its text, and leaves no residue.
async fn refuses(caller: &Caller, name: &str, socket: impl Into<OwnedFd>, error: &str, word: &str) {
    let before = caller.manager.list_domains().await.unwrap();
    let refused = register(caller, name, socket)
        .await
        .map(drop)
        .expect_err("the call is refused");
    assert_eq!(error_name(&refused), error, "{refused}");
    assert!(refused.to_string().contains(word), "{word:?} in {refused}");
    assert_eq!(caller.manager.list_domains().await.unwrap(), before, "{refused}");
}

/// Waits until the other end of this socket is closed.
async fn assert_released(stream: UnixStream) {
    stream.set_nonblocking(true).unwrap();
    let stream = tokio::net::UnixStream::from_std(stream).unwrap();
    let mut peer = Peer::new(stream);
    while within("the service to close the connection", peer.try_receive())
        .await
        .is_some()
    {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_descriptor_that_is_not_a_connected_stream_socket_is_refused() {
    let system = System::start();
    let caller = Caller::new(&system).await;
    let file = File::create_new(system.dir().join("file")).unwrap();
    refuses(&caller, "mine", file, INVALID_ARGS, "not a connected UNIX stream").await;
    let null = File::open("/dev/null").unwrap();
    refuses(&caller, "mine", null, INVALID_ARGS, "not a connected UNIX stream").await;
    let (reader, writer) = std::io::pipe().unwrap();
    refuses(
        &caller,
        "mine",
        reader,
        INVALID_ARGS,
        "not a connected UNIX stream",
    )
    .await;
    refuses(
        &caller,
        "mine",
        writer,
        INVALID_ARGS,
        "not a connected UNIX stream",
    )
    .await;
    let unconnected = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    refuses(
        &caller,
        "mine",
        unconnected,
        INVALID_ARGS,
        "not a connected UNIX stream",
    )
    .await;
    let listener = UnixListener::bind(system.dir().join("listener")).unwrap();
    refuses(
        &caller,
        "mine",
        listener,
        INVALID_ARGS,
        "not a connected UNIX stream",
    )
    .await;
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    refuses(
        &caller,
        "mine",
        datagram,
        INVALID_ARGS,
        "its type is not UNIX stream",
    )
    .await;
    let (packet, _other) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    refuses(
        &caller,
        "mine",
        packet,
        INVALID_ARGS,
        "its type is not UNIX stream",
    )
    .await;
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = std::net::TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
    refuses(&caller, "mine", tcp, INVALID_ARGS, "its type is not UNIX stream").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_passed_socket_that_does_not_speak_qmp_is_refused_and_closed() {
    let system = System::start();
    let caller = Caller::new(&system).await;
    let (ours, silent) = UnixStream::pair().unwrap();
    refuses(&caller, "mine", ours, UNREACHABLE, "did not greet").await;
    assert_released(silent).await;

    let (ours, garbage) = UnixStream::pair().unwrap();
    std::io::Write::write_all(&mut &garbage, b"hello\n").unwrap();
    refuses(&caller, "mine", ours, UNREACHABLE, "does not speak QMP").await;
    assert_released(garbage).await;

    let (ours, gone) = UnixStream::pair().unwrap();
    drop(gone);
    refuses(&caller, "mine", ours, UNREACHABLE, "closed").await;

    // A peer with a correct greeting and an empty description.
    let (ours, odd) = UnixStream::pair().unwrap();
    odd.set_nonblocking(true).unwrap();
    let mut odd = Peer::new(tokio::net::UnixStream::from_std(odd).unwrap());
    let odd = tokio::spawn(async move {
        odd.say(GREETING).await;
        let command = odd.receive().await;
        odd.answer(&command, json!({})).await;
        let command = odd.receive().await;
        assert_eq!(command.name(), "query-qmp-schema");
        odd.answer(&command, json!("nothing")).await;
        while odd.try_receive().await.is_some() {}
    });
    let refused = register(&caller, "mine", ours).await.unwrap_err();
    assert_eq!(error_name(&refused), UNREACHABLE, "{refused}");
    within("the service to close the connection", odd).await.unwrap();
    wait_for_no_domain(&caller, "mine").await;

    // A monitor that another client uses.
    let vm = machine(&system, "web", 1);
    system.domain_file("web", &vm);
    wait_for_machine(&caller, "web", &vm).await;
    refuses(
        &caller,
        "mine",
        vm.monitor_stream(),
        UNREACHABLE,
        "another client",
    )
    .await;
    caller.complete("web", "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_name_or_one_in_use_is_refused() {
    let system = System::start();
    let (configured, other) = (machine(&system, "web", 1), machine(&system, "other", 2));
    system.domain_file("web", &configured);
    let caller = Caller::new(&system).await;
    wait_for_machine(&caller, "web", &configured).await;
    refuses(
        &caller,
        "web",
        other.monitor_stream(),
        INVALID_ARGS,
        "exists already",
    )
    .await;
    for name in ["", ".", "..", "a/b", "../../etc", "a\nb", &"x".repeat(129)] {
        refuses(&caller, name, other.monitor_stream(), INVALID_ARGS, "name").await;
    }
    register(&caller, "mine", other.monitor_stream()).await.unwrap();
    let third = machine(&system, "third", 3);
    refuses(
        &caller,
        "mine",
        third.monitor_stream(),
        INVALID_ARGS,
        "exists already",
    )
    .await;
    // Unknown options are refused too, before anything else is checked.
    let options = Options::from([("speed", zbus::wire::Variant::from(1u32))]);
    let stream = third.monitor_stream();
    let refused = caller
        .manager
        .register_domain("third", stream.as_fd().into(), options)
        .await;
    assert_eq!(error_name(&refused.unwrap_err()), INVALID_ARGS);
    drop(stream);
    register(&caller, "third", third.monitor_stream()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configured_domain_has_its_name_before_a_registered_one() {
    let system = System::start();
    let (registered, configured) = (machine(&system, "one", 0x11), machine(&system, "two", 0x22));
    let mut caller = Caller::new(&system).await;
    caller.manager.subscribe().await.unwrap();
    let path = register(&caller, "web", registered.monitor_stream())
        .await
        .unwrap();
    caller.signals_until("DomainAdded").await;
    system.domain_file("web", &configured);
    caller.signals_until("DomainAdded").await;
    let web = wait_for_machine(&caller, "web", &configured).await;
    assert_eq!(web.source().await.unwrap(), "configured");
    assert!(holds(
        &back_up(&caller, "web").await["vda"],
        "qcow2",
        0,
        MIB,
        0x22
    ));
    // The registered domain stays as it is for callers that use it.
    assert_eq!(caller.manager.get_domain(registered.uuid()).await.unwrap(), path);
    assert!(holds(
        &back_up(&caller, registered.uuid()).await["vda"],
        "qcow2",
        0,
        MIB,
        0x11
    ));
    let stores: Vec<String> = std::fs::read_dir(system.store())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(
        stores.contains(&"web".to_owned()) && stores.contains(&"0:web".to_owned()),
        "{stores:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registered_domain_goes_with_the_connection_that_registered_it() {
    let system = System::start();
    let vm = machine(&system, "mine", 0x11);
    let mut watcher = Caller::new(&system).await;
    watcher.manager.subscribe().await.unwrap();
    let owner = Caller::new(&system).await;
    let path = register(&owner, "mine", vm.monitor_stream()).await.unwrap();
    watcher.signals_until("DomainAdded").await;
    // A running backup is completed first.
    let options = slowly(16 * MIB);
    let job = watcher.start_with("mine", "", &[], options).await;
    owner.connection.close().await.unwrap();
    let gone = watcher.signals_until("DomainRemoved").await;
    assert!(brief(&gone).contains(&format!("DomainRemoved {path}")));
    crate::common::caller::assert_completed(&job).await;
    wait_for_no_domain(&watcher, "mine").await;
    // Its QEMU accepts another client.
    register(&watcher, "mine", vm.monitor_stream()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_starts_again_knows_configured_domains_and_no_registered_ones() {
    let mut system = System::start();
    let (configured, registered) = (machine(&system, "web", 1), machine(&system, "mine", 2));
    system.domain_file("web", &configured);
    let caller = Caller::new(&system).await;
    wait_for_machine(&caller, "web", &configured).await;
    register(&caller, "mine", registered.monitor_stream())
        .await
        .unwrap();
    system.kill_daemon();
    system.start_daemon();
    wait_for_machine(&caller, "web", &configured).await;
    wait_for_no_domain(&caller, "mine").await;
    register(&caller, "mine", registered.monitor_stream())
        .await
        .unwrap();
    assert!(!system.daemon().log().contains("panicked"));
}
