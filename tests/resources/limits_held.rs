//! Limits of resources that callers pass to the service: monitors of registered domains, and descriptors.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::common::System;
use crate::common::caller::{Caller, assert_failed, cancel};
use crate::common::clients::{OTHER_USER, THIRD_USER, USER};
use crate::common::disk::Disk;
use crate::common::hanging::{Hanging, Limits, Operation};
use crate::common::peer::{Peer, StandIn};
use crate::common::polkit;
use crate::common::proxies::{JobProxy, Options, assert_limit, error_name, slowly};
use crate::common::vm::Vm;
use crate::common::wait;
use zbus::wire::OwnedObjectPath;

const MIB: u64 = 1 << 20;

/// Checks that `RegisterDomain` is refused because of a limit, and that the service closes the monitor without writing
/// to it.
async fn assert_register_limit(key: &str, caller: &Caller, name: &str) {
    let (ours, mut peer) = Peer::pair();
    let ours = ours.into_std().unwrap().into();
    assert_limit(key, caller.register(name, ours).await);
    assert!(peer.try_receive().await.is_none(), "the other end is still open");
}

/// Registers a stand-in for a caller's QEMU.
async fn register(caller: &Caller, name: &str) -> StandIn {
    let (socket, stand_in) = StandIn::start();
    caller.register(name, socket).await.unwrap();
    stand_in
}

/// Registers a domain as soon as the limit allows it.
async fn register_when_possible(caller: &Caller, name: &str) -> StandIn {
    wait::until_async("room for a domain", async || {
        let (socket, stand_in) = StandIn::start();
        caller.register(name, socket).await.ok().map(|_| stand_in)
    })
    .await
}

/// Returns the names of all domains.
async fn names(root: &Caller) -> Vec<String> {
    let domains = root.manager.list_domains().await.unwrap();
    domains.into_iter().map(|(_, name, _, _)| name).collect()
}

fn may_register(users: &[u32]) -> String {
    let rules = users
        .iter()
        .map(|uid| polkit::allow(*uid, &["service.register-domain"]));
    rules.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn registered_domains_count_until_their_qemu_or_connection_ends() {
    let system = System::setup()
        .rules(&may_register(&[USER, OTHER_USER, THIRD_USER]))
        .table("[limits]\nregistered-domains-per-user = 1\nregistered-domains = 4")
        .start();
    let root = Caller::new(&system).await;
    let (one, two) = (
        Caller::of_user(&system, USER).await,
        Caller::of_user(&system, USER).await,
    );
    let other = Caller::of_user(&system, OTHER_USER).await;
    let third = Caller::of_user(&system, THIRD_USER).await;

    let users = register(&one, "users").await;
    assert_register_limit("registered-domains-per-user", &one, "more").await;
    assert_register_limit("registered-domains-per-user", &two, "more").await;
    let _others = register(&other, "others").await;
    let _roots = [register(&root, "root1").await, register(&root, "root2").await];
    assert_register_limit("registered-domains", &root, "more").await;
    assert_register_limit("registered-domains", &third, "more").await;
    let others = format!("{OTHER_USER}:others");
    let of_user = |name| format!("{USER}:{name}");
    assert_eq!(names(&root).await, [&others, "root1", "root2", &of_user("users")]);
    // Configured domains are not counted.
    system.write_domain_file("configured", "monitor = \"/nowhere\"\n");
    wait::until("the configured domain", || system.domain_path("configured"));

    drop(users);
    let _again = register_when_possible(&two, "again").await;
    assert_register_limit("registered-domains-per-user", &one, "more").await;
    two.connection.close().await.unwrap();
    let _last = register_when_possible(&one, "last").await;
    assert_eq!(
        names(&root).await,
        ["configured", &of_user("last"), &others, "root1", "root2"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_that_fails_is_not_counted() {
    let system = System::setup()
        .rules(&may_register(&[USER]))
        .table("[limits]\nregistered-domains-per-user = 1\ndescriptors-per-user = 1")
        .start();
    let user = Caller::of_user(&system, USER).await;
    for _ in 0..3 {
        let (ours, theirs) = Peer::pair();
        drop(theirs);
        let refused = user.register("mine", ours.into_std().unwrap().into()).await;
        let unreachable = "org.example.Backup1.Error.DomainUnreachable";
        assert_eq!(error_name(&refused.unwrap_err()), unreachable);
        let denied = user.register(".", File::open("/dev/null").unwrap().into()).await;
        let invalid = "org.freedesktop.DBus.Error.InvalidArgs";
        assert_eq!(error_name(&denied.unwrap_err()), invalid);
    }
    register(&user, "mine").await;
}

/// Open empty files of a caller.
struct Files {
    paths: Vec<PathBuf>,
    descriptors: Vec<OwnedFd>,
}

impl Files {
    fn new(system: &System, name: &str, count: usize) -> Self {
        let paths: Vec<_> = (0..count)
            .map(|index| system.dir().join(format!("{name}-{index}")))
            .collect();
        let open = |path| File::options().read(true).write(true).create_new(true).open(path);
        let descriptors = paths.iter().map(|path| open(path).unwrap().into());
        Self {
            descriptors: descriptors.collect(),
            paths,
        }
    }

    /// Returns a document with as many disks.
    fn document(&self) -> String {
        let disk = |index| format!("<disk name='vd{index}' type='fd'><target fd='{index}'/></disk>");
        let disks: String = (0..self.descriptors.len()).map(disk).collect();
        format!("<domainbackup><disks>{disks}</disks></domainbackup>")
    }

    /// Starts a backup into them that takes longer than any test.
    async fn try_start(&self, caller: &Caller, domain: &str) -> zbus::Result<OwnedObjectPath> {
        let options = slowly(MIB);
        let document = self.document();
        caller
            .try_start(domain, &document, &self.descriptors, options)
            .await
    }

    async fn start(&self, caller: &Caller, domain: &str) -> JobProxy<'static> {
        let path = self.try_start(caller, domain).await.unwrap();
        caller.job(path).await
    }

    fn assert_untouched(&self) {
        for path in &self.paths {
            assert_eq!(path.metadata().unwrap().len(), 0, "{}", path.display());
        }
    }
}

fn machine(system: &System, name: &str) -> Vm {
    let disks = ["vd0", "vd1", "vd2"].map(|disk| Disk::new(disk, 256 * MIB));
    let vm = disks.into_iter().fold(system.vm(name), |vm, disk| vm.disk(disk));
    system.configured(vm.running())
}

#[tokio::test(flavor = "multi_thread")]
async fn descriptors_are_counted_while_a_backup_or_a_registered_domain_holds_them() {
    let rules = may_register(&[USER, OTHER_USER]) + &polkit::allow(USER, &["domain.export"]);
    let system = System::setup()
        .rules(&rules)
        .table("[limits]\ndescriptors-per-user = 2\ndescriptors = 6")
        .start();
    let (a, b) = (machine(&system, "a"), machine(&system, "b"));
    let (before_a, before_b) = (a.residue(), b.residue());
    let root = Caller::new(&system).await;
    let user = Caller::of_user(&system, USER).await;
    let other = Caller::of_user(&system, OTHER_USER).await;

    let three = Files::new(&system, "three", 3);
    assert_limit("descriptors-per-user", three.try_start(&user, "a").await);
    three.assert_untouched();
    assert_eq!(a.residue(), before_a);
    assert_eq!(root.manager.list_jobs().await.unwrap(), []);

    // A call that is refused for another reason holds no descriptor.
    let two = Files::new(&system, "two", 2);
    for (document, error) in [
        ("<domainbackup", "org.example.Backup1.Error.InvalidDefinition"),
        // Into the store, which this user may not use.
        ("", "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"),
    ] {
        let refused = user
            .try_start("a", document, &two.descriptors, Options::new())
            .await;
        assert_eq!(error_name(&refused.unwrap_err()), error);
    }
    let users = two.start(&user, "a").await;
    let one = Files::new(&system, "one", 1);
    assert_limit("descriptors-per-user", one.try_start(&user, "b").await);
    assert_register_limit("descriptors-per-user", &user, "mine").await;
    one.assert_untouched();

    let others = register(&other, "others").await;
    let roots = three.start(&root, "b").await;
    assert_register_limit("descriptors", &other, "more").await;
    assert_register_limit("descriptors", &root, "more").await;
    assert_eq!(names(&root).await, ["a", "b", &format!("{OTHER_USER}:others")]);
    assert_eq!(root.manager.list_jobs().await.unwrap().len(), 2);

    cancel(&users).await;
    let mine = register(&user, "mine").await;
    assert_limit("descriptors-per-user", two.try_start(&user, "a").await);
    drop((mine, others));
    cancel(&roots).await;
    let again = wait::until_async("room for two descriptors", async || {
        two.try_start(&user, "a").await.ok()
    })
    .await;
    cancel(&user.job(again).await).await;
    assert_eq!((a.residue(), b.residue()), (before_a, before_b));
}

/// A thread that waits for storage ends when the storage responds. Until then it counts as its job.
#[tokio::test(flavor = "multi_thread")]
async fn work_that_storage_blocks_counts_for_its_user_until_it_returns() {
    let rights = ["domain.getattr", "domain.read", "domain.backup", "domain.export"];
    let system = System::setup()
        .rules(&polkit::allow(USER, &rights))
        .table("[limits]\njobs-per-user = 1\n[deadlines]\nstall-seconds = 2")
        .start();
    let vm = system
        .vm("web")
        .disk(Disk::new("vda", MIB).fill(0, MIB, 1))
        .running();
    let _vm = system.configured(vm);
    let user = Caller::of_user(&system, USER).await;
    let storage = Hanging::mount(&system.dir().join("fuse"), Limits::default());
    let document =
        "<domainbackup><disks><disk name='vda' type='fd'><target fd='0'/></disk></disks></domainbackup>";
    let open = |name: &str| -> OwnedFd {
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        options.open(storage.path().join(name)).unwrap().into()
    };
    let target = open("a");
    storage.hang(Operation::Fsync);
    let job = user.start_with("web", document, &[target], Options::new()).await;
    assert_failed(&job, "Stalled", "made no progress").await;
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    let again: OwnedFd = options.open(system.dir().join("b")).unwrap().into();
    let start = || user.try_start("web", document, std::slice::from_ref(&again), Options::new());
    assert_limit("jobs-per-user", start().await);
    storage.heal();
    wait::until_async("the blocked work to return", async || start().await.ok()).await;
}
