//! Paths of monitors and agents in directories that other users can change. No user can make the service connect to
//! another user's socket, or to libvirt's.

use std::fs;
use std::os::unix::fs::{chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::common::System;
use crate::common::agent::Agent;
use crate::common::caller::{Caller, as_user, assert_failed};
use crate::common::clients::{OTHER_USER, USER};
use crate::common::disk::Disk;
use crate::common::hanging::{Hanging, Limits, Operation};
use crate::common::peer::{Imposter, Peer};
use crate::common::proxies::Options;
use crate::common::vm::Vm;
use crate::common::wait::{self, until_async};

const MIB: u64 = 1 << 20;

/// Makes a directory that belongs to a user.
fn directory(system: &System, name: &str, uid: u32) -> PathBuf {
    let directory = system.dir().join(name);
    fs::create_dir_all(&directory).unwrap();
    chown(&directory, Some(uid), None).unwrap();
    directory
}

/// Creates a socket as a user and listens on it.
fn listen_as(uid: u32, path: &Path) -> UnixListener {
    let path = path.to_owned();
    as_user(uid, move || UnixListener::bind(path).unwrap())
}

fn configure(system: &System, name: &str, monitor: &Path, further: &str) {
    let text = format!("monitor = \"{}\"\n{further}\n", monitor.display());
    system.write_domain_file(name, &text);
}

/// Checks that the service does not connect to the domain, and that these words explain it to the caller and in the
/// log.
async fn assert_refused(system: &mut System, caller: &Caller, name: &str, words: &[&str]) {
    let told = until_async(&format!("{name}: {words:?}"), || async {
        let refused = caller.try_start(name, "", &[], Options::new()).await;
        let text = refused.expect_err("it is not connected to").to_string();
        words.iter().all(|word| text.contains(word)).then_some(text)
    })
    .await;
    assert!(told.len() < 1000, "{told}");
    let log = std::fs::read_to_string(system.dir().join("backupd.log")).unwrap();
    let lines = log.lines().filter(|line| line.contains("WARN"));
    let told = lines.filter(|line| line.contains(name) && words.iter().all(|word| line.contains(word)));
    assert_eq!(told.count(), 1, "{log}");
}

fn machine(system: &System, name: &str) -> Vm {
    let disk = Disk::new("vda", 4 * MIB).fill(0, MIB, 0x11);
    system.vm(name).disk(disk).running().start()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_symbolic_link_in_a_users_directory_opens_no_foreign_monitor() {
    let mut system = System::start();
    let mail = machine(&system, "mail");
    let theirs = directory(&system, "theirs", USER);
    let link = theirs.join("web.qmp");
    symlink(mail.monitor_path(), &link).unwrap();
    configure(&system, "web", &link, "");
    let caller = Caller::new(&system).await;
    let directory = format!("{} belongs to user {USER}", theirs.display());
    let words = [&*directory, "web.qmp: is a symbolic link", "Name the file"];
    assert_refused(&mut system, &caller, "web", &words).await;
    // A link in place of the directory is refused too.
    let link = theirs.join("run");
    symlink(system.dir().join("mail"), &link).unwrap();
    configure(&system, "other", &link.join("service"), "");
    assert_refused(&mut system, &caller, "other", &["run: is a symbolic link"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_symbolic_link_of_root_is_followed() {
    let system = System::start();
    let web = machine(&system, "web");
    let link = system.dir().join("machines");
    symlink("web", &link).unwrap();
    configure(&system, "web", &link.join("service"), "");
    system.wait_for_domain("web");
    Caller::new(&system).await.complete("web", "").await;
    drop(web);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_listening_process_belongs_to_the_sockets_owner_or_root() {
    let mut system = System::start();
    let theirs = directory(&system, "theirs", USER);
    let caller = Caller::new(&system).await;
    let path = theirs.join("own");
    let _own = Imposter::on(listen_as(USER, &path), Peer::play_qemu);
    configure(&system, "own", &path, "");
    system.wait_for_domain("own");
    // As a service manager creates it.
    let path = theirs.join("roots");
    let _roots = Imposter::listen(&path, Peer::play_qemu);
    chown(&path, Some(USER), None).unwrap();
    configure(&system, "roots", &path, "");
    system.wait_for_domain("roots");
    let path = theirs.join("anothers");
    let _anothers = Imposter::on(listen_as(USER, &path), Peer::play_qemu);
    chown(&path, Some(OTHER_USER), None).unwrap();
    configure(&system, "anothers", &path, "");
    let owner = format!("belongs to user {OTHER_USER}");
    let listener = format!("user {USER} listens there");
    assert_refused(&mut system, &caller, "anothers", &[&owner, &listener]).await;
    // Nobody knows the owner of the other name.
    let path = theirs.join("linked");
    fs::hard_link(theirs.join("own"), &path).unwrap();
    configure(&system, "linked", &path, "");
    assert_refused(&mut system, &caller, "linked", &["hard links"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_file_sets_the_required_owner_of_the_sockets() {
    let mut system = System::start();
    let theirs = directory(&system, "theirs", USER);
    let caller = Caller::new(&system).await;
    let mut imposters = Vec::new();
    let mut add = |system: &System, name: &str, listener: u32, user: &str| {
        let path = theirs.join(name);
        imposters.push(Imposter::on(listen_as(listener, &path), Peer::play_qemu));
        chown(&path, Some(USER), None).unwrap();
        configure(system, name, &path, &format!("user = {user}"));
    };
    add(&system, "name", USER, "\"nobody\"");
    add(&system, "number", USER, &USER.to_string());
    for name in ["name", "number"] {
        system.wait_for_domain(name);
    }
    add(&system, "another", USER, "\"daemon\"");
    let words = [&*format!("belongs to user {USER}"), "names 'daemon'"];
    assert_refused(&mut system, &caller, "another", &words).await;
    add(&system, "unknown", USER, "\"nobody-at-all\"");
    assert_refused(
        &mut system,
        &caller,
        "unknown",
        &["user 'nobody-at-all' does not exist"],
    )
    .await;
    add(&system, "roots", 0, "\"nobody\"");
    assert_refused(&mut system, &caller, "roots", &["user 0 listens there"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_is_reached_as_a_monitor_is() {
    let system = System::start();
    let web = machine(&system, "web");
    let theirs = directory(&system, "theirs", USER);
    let agent = Agent::good(&system.dir().join("mail.qga"));
    let caller = Caller::new(&system).await;
    let quiesced = "<domainbackup><quiesce mode='require'/></domainbackup>";
    let fails = |link: PathBuf, further: &'static str, word: &'static str| {
        let (system, web, caller) = (&system, &web, &caller);
        async move {
            let agent = format!("agent = \"{}\"\n{further}", link.display());
            configure(system, "web", &web.monitor_path(), &agent);
            until_async("the file to be read", || async {
                system.wait_for_domain("web");
                let job = caller
                    .start_job("web", quiesced, &[], Options::new())
                    .await
                    .ok()?;
                let (_, _, text) = job.wait().await.ok()?;
                text.contains(word).then_some(())
            })
            .await;
            let job = caller.start("web", quiesced).await;
            assert_failed(&job, "QuiesceFailed", word).await;
        }
    };
    let link = theirs.join("web.qga");
    symlink(agent.path(), &link).unwrap();
    fails(link, "", "web.qga: is a symbolic link").await;
    let link = theirs.join("own.qga");
    let own = listen_as(USER, &link);
    chown(&link, Some(OTHER_USER), None).unwrap();
    fails(link, "", "a program of user 65534 listens there").await;
    let below = system.dir().join("libvirt/qemu/channel");
    fs::create_dir_all(&below).unwrap();
    let libvirts = Agent::good(&below.join("org.qemu.guest_agent.0"));
    fails(libvirts.path().to_owned(), "", "libvirt's own connection").await;
    assert_eq!(agent.seen_all(), [""; 0]);
    assert_eq!(libvirts.seen_all(), [""; 0]);
    drop(own);
    // Through root's link it is used.
    let link = system.dir().join("link.qga");
    symlink(agent.path(), &link).unwrap();
    let text = format!("agent = \"{}\"", link.display());
    configure(&system, "web", &web.monitor_path(), &text);
    until_async("the file to be read", || async {
        system.wait_for_domain("web");
        let job = caller
            .start_job("web", quiesced, &[], Options::new())
            .await
            .ok()?;
        (job.wait().await.ok()?.0 == "completed").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn libvirts_own_monitor_is_never_connected_to() {
    let mut system = System::start();
    let caller = Caller::new(&system).await;
    let below = system.dir().join("libvirt/qemu/domain-1-web");
    fs::create_dir_all(&below).unwrap();
    let path = below.join("monitor.sock");
    let words = ["is libvirt's own connection", "<qemu:commandline>"];
    // Also before it exists.
    configure(&system, "web", &path, "");
    assert_refused(&mut system, &caller, "web", &words).await;
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let link = system.dir().join("web.qmp");
    symlink(&path, &link).unwrap();
    configure(&system, "link", &link, "");
    assert_refused(&mut system, &caller, "link", &words).await;
    system.remove_domain_file("web");
    configure(&system, "again", &path, "");
    assert_refused(&mut system, &caller, "again", &words).await;
    assert!(listener.accept().is_err(), "a client has connected");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_of_libvirts_is_reached_by_another_monitor_only() {
    let mut system = System::start();
    let caller = Caller::new(&system).await;
    let path = system.dir().join("managed.qmp");
    let socket = format!("socket,id=charmonitor,path={},server=on,wait=off", path.display());
    let libvirts = [
        "-chardev",
        &*socket,
        "-mon",
        "chardev=charmonitor,id=monitor,mode=control",
    ];
    let vm = system.vm("web").running().extra(&libvirts).start();
    configure(&system, "libvirts", &path, "");
    assert_refused(&mut system, &caller, "libvirts", &["is libvirt's own connection"]).await;
    system.domain_file("web", &vm);
    system.wait_for_domain("web");
}

#[tokio::test(flavor = "multi_thread")]
async fn monitors_on_hanging_storage_delay_nobody() {
    let system = System::start();
    let root = Caller::new(&system).await;
    let storage = Hanging::mount(&system.dir().join("storage"), Limits::default());
    storage.hang(Operation::Any);
    for name in ["one", "two", "three"] {
        configure(&system, name, &storage.path().join(name), "");
    }
    storage.affected().await;
    let answers = async || {
        wait::within("an answer", root.manager.list_domains())
            .await
            .unwrap();
    };
    // Connecting fails first, and then the service examines the paths.
    wait::until_async("the first tries to fail", || async {
        answers().await;
        let log = std::fs::read_to_string(system.dir().join("backupd.log")).unwrap();
        let failed = |name: &str| {
            let name = format!("{name:?}");
            log.lines()
                .any(|line| line.contains("monitor is down") && line.contains(&name))
        };
        ["one", "two", "three"].into_iter().all(failed).then_some(())
    })
    .await;
    for _ in 0..20 {
        answers().await;
    }
    let web = machine(&system, "web");
    system.domain_file("web", &web);
    system.wait_for_domain("web");
    wait::within("a backup", root.complete("web", "")).await;
    assert!(storage.is_hanging());
    storage.heal();
}
