//! Invalid requests: each has its own error with the cause and the place, and changes nothing: no file, no node, no
//! job.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::common::System;
use crate::common::caller::{Caller, assert_completed};
use crate::common::disk::Disk;
use crate::common::proxies::{Options, error_name};
use crate::common::storage::{LoopDevice, Tmpfs, files_below};
use crate::common::vm::{Residue, Vm};
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const OURS: &str = "org.example.Backup1.Error.";
const STANDARD: &str = "org.freedesktop.DBus.Error.";

/// A system with a VM `web`: two disks with data, one read-only disk, one empty drive.
struct Scene {
    system: System,
    vm: Vm,
    caller: Caller,
    before: Residue,
    /// A directory for targets.
    targets: PathBuf,
}

impl Scene {
    async fn new() -> Self {
        Self::of(System::start()).await
    }

    async fn of(system: System) -> Self {
        let vm = system.configured(
            system
                .vm("web")
                .disk(Disk::new("vda", 64 * MIB).fill(0, 16 * MIB, 0x11))
                .disk(Disk::new("vdb", 32 * MIB).raw())
                .disk(Disk::empty_cdrom("cd"))
                .running(),
        );
        let caller = Caller::new(&system).await;
        let targets = system.dir().join("targets");
        fs::create_dir(&targets).unwrap();
        Self {
            before: vm.residue(),
            system,
            vm,
            caller,
            targets,
        }
    }

    fn target(&self, name: &str) -> PathBuf {
        self.targets.join(name)
    }

    /// Checks that the call fails with this error, with all these words in its text, and changes nothing.
    async fn refuses(
        &self,
        document: &str,
        files: &[OwnedFd],
        options: Options<'_>,
        error: &str,
        words: &[&str],
    ) {
        let files_before = self.files();
        let refused = self.caller.try_start("web", document, files, options).await;
        let refused = refused.expect_err("the call is refused");
        let text = refused.to_string();
        assert_eq!(error_name(&refused), error, "{text}");
        for word in words {
            assert!(text.contains(word), "{text:?} has {word:?}");
        }
        assert_eq!(self.files(), files_before, "no file was touched: {text}");
        assert_eq!(self.vm.residue(), self.before, "QEMU was not touched: {text}");
        assert_eq!(
            self.caller.manager.list_jobs().await.unwrap(),
            [],
            "no job: {text}"
        );
    }

    /// Returns the error of a call that must fail.
    async fn refused(&self, domain: &str, document: &str) -> zbus::Error {
        let refused = self.caller.try_start(domain, document, &[], Options::new());
        refused.await.expect_err("the call is refused")
    }

    async fn refuses_document(&self, document: &str, error: &str, words: &[&str]) {
        self.refuses(document, &[], Options::new(), &format!("{OURS}{error}"), words)
            .await;
    }

    async fn refuses_target(&self, target: &Path, error: &str, words: &[&str]) {
        self.refuses_document(&file(target), error, words).await;
    }

    async fn refuses_reuse(&self, document: &str, error: &str, words: &[&str]) {
        let options = Options::from([("reuse-external", Variant::from(true))]);
        self.refuses(document, &[], options, &format!("{OURS}{error}"), words)
            .await;
    }

    /// Returns names and contents of all files that a backup could have touched.
    fn files(&self) -> Vec<(String, Vec<u8>)> {
        let mut all = Vec::new();
        for dir in [&self.targets, &self.system.store()] {
            for name in files_below(dir) {
                let path = dir.join(&name);
                let content = if path.is_file() {
                    fs::read(&path).unwrap()
                } else {
                    Vec::new()
                };
                all.push((name, content));
            }
        }
        all
    }
}

fn file(target: &Path) -> String {
    disk(&format!("<target file='{}'/>", target.display()))
}

fn disk(inner: &str) -> String {
    format!("<domainbackup>\n <disks>\n  <disk name='vda'>{inner}</disk>\n </disks>\n</domainbackup>")
}

fn open(path: &Path, read: bool, write: bool) -> OwnedFd {
    fs::File::options()
        .read(read)
        .write(write)
        .open(path)
        .unwrap()
        .into()
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_names_are_refused() {
    let scene = Scene::new().await;
    let error = scene.refused("ghost", "").await;
    assert_eq!(error_name(&error), format!("{OURS}NoSuchDomain"));
    assert!(error.to_string().contains("no domain 'ghost'"), "{error}");
    let error = scene.caller.manager.get_job(77).await.unwrap_err();
    assert_eq!(error_name(&error), format!("{OURS}NoSuchJob"));
    let other = "<domainbackup>\n <disks>\n  <disk name='vdz'/>\n </disks>\n</domainbackup>";
    scene
        .refuses_document(other, "NoSuchDisk", &["line 3, column 3", "'vdz'"])
        .await;
    let weekly = "<domainbackup>\n <store name='weekly'/>\n</domainbackup>";
    scene
        .refuses_document(weekly, "NoSuchStore", &["line 2, column 2", "'weekly'"])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unreadable_or_unsupported_documents_are_refused() {
    let scene = Scene::new().await;
    scene
        .refuses_document("<domainbackup>\n <disks>", "InvalidDefinition", &["line 2"])
        .await;
    scene
        .refuses_document(
            "<domain/>",
            "InvalidDefinition",
            &["line 1, column 1", "domainbackup"],
        )
        .await;
    scene
        .refuses_document("<domainbackup mode='pull'/>", "Unsupported", &["pull"])
        .await;
    let incremental = "<domainbackup><incremental>monday</incremental></domainbackup>";
    scene
        .refuses_document(incremental, "NoSuchCheckpoint", &["'monday'", "line 1"])
        .await;
    let network = "<domainbackup><disks><disk name='vda' type='network'/></disks></domainbackup>";
    scene.refuses_document(network, "Unsupported", &["network"]).await;
    let encrypted = "<target file='/x'><encryption format='luks'/></target>";
    scene
        .refuses_document(&disk(encrypted), "Unsupported", &["encryption"])
        .await;
    let large = format!("<domainbackup>{}</domainbackup>", " ".repeat(1 << 20));
    scene
        .refuses(
            &large,
            &[],
            Options::new(),
            "org.freedesktop.DBus.Error.LimitsExceeded",
            &["'document-bytes'", "1048576"],
        )
        .await;
    let empty = "<domainbackup>\n <disks>\n  <disk name='cd'/>\n </disks>\n</domainbackup>";
    scene
        .refuses_document(
            empty,
            "InvalidDefinition",
            &["line 3, column 3", "'cd'", "no medium"],
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_mistyped_or_contradictory_options_are_refused() {
    let scene = Scene::new().await;
    let invalid = format!("{STANDARD}InvalidArgs");
    let options = Options::from([("bandwith", Variant::from(1u64))]);
    scene.refuses("", &[], options, &invalid, &["'bandwith'"]).await;
    let options = Options::from([("bandwidth", Variant::from("fast"))]);
    scene
        .refuses("", &[], options, &invalid, &["'bandwidth'", "'s'", "'t'"])
        .await;
    let options = Options::from([("bandwidth", Variant::from(1u64))]);
    let document = "<domainbackup><bandwidth>2</bandwidth></domainbackup>";
    scene
        .refuses(document, &[], options, &invalid, &["bandwidth"])
        .await;
    let options = Options::from([("reuse-external", Variant::from(true))]);
    scene
        .refuses("", &[], options, &invalid, &["reuse-external", "store"])
        .await;
    let options = Options::from([("incremental", Variant::from("monday"))]);
    scene
        .refuses(
            "",
            &[],
            options,
            &format!("{OURS}NoSuchCheckpoint"),
            &["'monday'"],
        )
        .await;
    let options = Options::from([("checkpoint", Variant::from("monday"))]);
    scene
        .refuses("", &[], options, &invalid, &["'checkpoint'", "'monday'"])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_existing_file_or_a_missing_directory_is_refused() {
    let scene = Scene::new().await;
    let there = scene.target("there");
    fs::write(&there, "precious").unwrap();
    scene
        .refuses_target(
            &there,
            "TargetExists",
            &["'vda'", "there exists", "reuse-external"],
        )
        .await;
    scene
        .refuses_target(
            &scene.target("no/where"),
            "TargetInvalid",
            &["targets/no", "does not exist"],
        )
        .await;
    scene
        .refuses_target(
            &there.join("below"),
            "TargetInvalid",
            &["there", "not a directory"],
        )
        .await;
    // A dangling link counts as an existing file too.
    symlink("nowhere", scene.target("link")).unwrap();
    scene
        .refuses_target(&scene.target("link"), "TargetExists", &["link"])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_behind_a_symbolic_link_is_refused() {
    let scene = Scene::new().await;
    fs::create_dir(scene.target("real")).unwrap();
    symlink("real", scene.target("link")).unwrap();
    let through = scene.target("link/a.qcow2");
    scene
        .refuses_target(&through, "TargetInvalid", &["targets/link", "symbolic link"])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_or_unsuitable_existing_targets_are_refused() {
    let scene = Scene::new().await;
    scene
        .refuses_reuse(&file(&scene.target("none")), "TargetInvalid", &["does not exist"])
        .await;
    let text = scene.target("text");
    fs::write(&text, "precious").unwrap();
    scene
        .refuses_reuse(&file(&text), "TargetInvalid", &["not a qcow2 image"])
        .await;
    let raw = disk(&format!(
        "<driver type='raw'/><target file='{}'/>",
        text.display()
    ));
    scene
        .refuses_reuse(&raw, "TargetInvalid", &["8 bytes", "67108864"])
        .await;
    let small = scene.target("small");
    let mut command = crate::common::process::bound("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", small.to_str().unwrap(), "32M"]);
    crate::common::process::run(command).expect_success();
    scene
        .refuses_reuse(&file(&small), "TargetInvalid", &["33554432 bytes", "67108864"])
        .await;
    scene
        .refuses_reuse(&file(&scene.targets), "TargetInvalid", &["not a regular file"])
        .await;
    let fifo = scene.target("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    scene
        .refuses_reuse(&file(&fifo), "TargetInvalid", &["not a regular file"])
        .await;
    symlink("small", scene.target("link")).unwrap();
    scene
        .refuses_reuse(
            &file(&scene.target("link")),
            "TargetInvalid",
            &["not a regular file"],
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_a_vm_is_refused_as_target_under_any_name() {
    let scene = Scene::new().await;
    let other = scene
        .system
        .vm("other")
        .disk(Disk::new("vda", 64 * MIB))
        .disk(Disk::new("vdb", 64 * MIB).raw())
        .start();
    scene.system.domain_file("other", &other);
    scene.system.wait_for_domain("other");
    let hard = scene.target("hard");
    fs::hard_link(other.source_path("vda"), &hard).unwrap();
    scene
        .refuses_reuse(
            &file(&hard),
            "TargetInvalid",
            &["hard", "a disk of a running domain"],
        )
        .await;
    let own = file(scene.vm.source_path("vda"));
    scene
        .refuses_reuse(&own, "TargetInvalid", &["a disk of a running domain"])
        .await;
    // A descriptor has no name at all.
    let document =
        "<domainbackup><disks><disk name='vda' type='fd'><target fd='0'/></disk></disks></domainbackup>";
    let files = [open(other.source_path("vda"), true, true)];
    let options = Options::from([("reuse-external", Variant::from(true))]);
    let error = format!("{OURS}TargetInvalid");
    scene
        .refuses(
            document,
            &files,
            options,
            &error,
            &["fd:0", "a disk of a running domain"],
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_existing_file_with_a_second_link_is_refused() {
    let scene = Scene::new().await;
    let (named, other) = (scene.target("named"), scene.target("other"));
    fs::write(&other, "").unwrap();
    fs::hard_link(&other, &named).unwrap();
    let document = format!(
        "<domainbackup><disks><disk name='vda'><target file='{}'/></disk></disks></domainbackup>",
        named.display()
    );
    scene
        .refuses_reuse(&document, "TargetInvalid", &["named", "other hard links"])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_named_for_two_disks_is_refused() {
    let scene = Scene::new().await;
    let (a, b) = (scene.target("a"), scene.target("b"));
    fs::write(&a, "").unwrap();
    fs::hard_link(&a, &b).unwrap();
    let both = |first: &Path, second: &Path| {
        format!(
            "<domainbackup>\n<disks>\n<disk name='vda'><target file='{}'/></disk>\n\
             <disk name='vdb'><target file='{}'/></disk></disks></domainbackup>",
            first.display(),
            second.display()
        )
    };
    scene
        .refuses_document(&both(&a, &a), "InvalidDefinition", &["line 4"])
        .await;
    scene
        .refuses_reuse(
            &both(&a, &b),
            "TargetInvalid",
            &["'vda' and 'vdb'", "same target"],
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn block_devices_that_are_in_use_or_too_small_are_refused() {
    let scene = Scene::new().await;
    let block = |path: &Path, format: &str| {
        format!(
            "<domainbackup><disks><disk name='vda' type='block'><driver type='{format}'/>\
             <target dev='{}'/></disk></disks></domainbackup>",
            path.display()
        )
    };
    let text = scene.target("text");
    fs::write(&text, "precious").unwrap();
    scene
        .refuses_document(&block(&text, "qcow2"), "TargetInvalid", &["not a block device"])
        .await;
    scene
        .refuses_document(
            &block(&scene.target("none"), "raw"),
            "TargetInvalid",
            &["does not exist"],
        )
        .await;
    scene
        .refuses_document(
            &block(Path::new("/dev/null"), "raw"),
            "TargetInvalid",
            &["not a block device"],
        )
        .await;
    let small = LoopDevice::attach(&scene.system.dir().join("small.img"), 8 * MIB);
    let raw = block(small.device(), "raw");
    scene
        .refuses_document(&raw, "TargetInvalid", &["8388608 bytes", "67108864"])
        .await;
    scene
        .refuses_document(&block(small.device(), "qcow2"), "NoSpace", &["8388608 bytes"])
        .await;
    // The data would fit, but not with the image's tables: header, refcounts, L1 and L2 table of 1 MiB each.
    let small = LoopDevice::attach(&scene.system.dir().join("tables.img"), 20 * MIB);
    scene
        .refuses_document(&block(small.device(), "qcow2"), "NoSpace", &["22020096"])
        .await;
    let used = LoopDevice::attach(&scene.system.dir().join("used.img"), 128 * MIB);
    let _exclusive: OwnedFd = rustix::fs::open(
        used.device(),
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::EXCL,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    scene
        .refuses_document(&block(used.device(), "raw"), "TargetInvalid", &["in use"])
        .await;
    let enough = LoopDevice::attach(&scene.system.dir().join("enough.img"), 21 * MIB);
    assert_completed(&scene.caller.start("web", &block(enough.device(), "qcow2")).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unwritable_or_unsuitable_descriptors_are_refused() {
    let scene = Scene::new().await;
    let error = format!("{OURS}TargetInvalid");
    let document =
        "<domainbackup>\n<disks>\n<disk name='vda' type='fd'><target fd='0'/></disk></disks></domainbackup>";
    let path = scene.target("own");
    fs::write(&path, "").unwrap();
    let files = [open(&path, true, false)];
    scene
        .refuses(
            document,
            &files,
            Options::new(),
            &error,
            &["fd:0", "reading only"],
        )
        .await;
    let files = [open(&path, false, true)];
    scene
        .refuses(
            document,
            &files,
            Options::new(),
            &error,
            &["fd:0", "writing only"],
        )
        .await;
    let append = fs::File::options().read(true).append(true).open(&path).unwrap();
    scene
        .refuses(document, &[append.into()], Options::new(), &error, &["O_APPEND"])
        .await;
    let by_path = rustix::fs::open(&path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    scene
        .refuses(document, &[by_path], Options::new(), &error, &["O_PATH"])
        .await;
    let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    scene
        .refuses(
            document,
            &[socket.into()],
            Options::new(),
            &error,
            &["not a regular file"],
        )
        .await;
    fs::write(&path, "precious").unwrap();
    let files = [open(&path, true, true)];
    let exists = format!("{OURS}TargetExists");
    scene
        .refuses(document, &files, Options::new(), &exists, &["fd:0"])
        .await;
    let missing = format!("{OURS}InvalidDefinition");
    scene
        .refuses(
            document,
            &[],
            Options::new(),
            &missing,
            &["line 3, column 1", "fd='0'", "0 descriptors"],
        )
        .await;
    let files = [open(&path, true, true)];
    scene
        .refuses(
            "",
            &files,
            Options::new(),
            &format!("{STANDARD}InvalidArgs"),
            &["descriptor 0"],
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_with_too_little_space_is_refused() {
    let scene = Scene::new().await;
    let small = Tmpfs::mount(&scene.target("small"), 8 * MIB);
    let target = small.path().join("a.qcow2");
    scene
        .refuses_target(&target, "NoSpace", &["bytes of free space"])
        .await;
}

/// Reserved space and zeroes of an image need no space in a backup.
#[tokio::test(flavor = "multi_thread")]
async fn space_that_is_reserved_or_zero_is_not_needed_in_the_target() {
    let system = System::start();
    let image = |name: &str, options: &str, format: &str| {
        let path = system.dir().join(name);
        let mut command = crate::common::process::bound("qemu-img");
        command.args(["create", "-q", "-f", format, "-o", options]);
        crate::common::process::run({
            command.arg(&path).arg((300 * MIB).to_string());
            command
        })
        .expect_success();
        path
    };
    let reserved = image("reserved", "preallocation=falloc", "raw");
    let preallocated = image("preallocated", "preallocation=falloc", "qcow2");
    let zeroed = image("zeroed", "preallocation=full", "qcow2");
    let machine = system
        .vm("thick")
        .disk(Disk::new("vda", 300 * MIB).raw().at(&reserved))
        .disk(Disk::new("vdb", 300 * MIB).at(&preallocated))
        .disk(Disk::new("vdc", 300 * MIB).at(&zeroed));
    let vm = system.configured(machine);
    for disk in ["vda", "vdb", "vdc"] {
        vm.write(disk, 100 * MIB, 4 * MIB, 0x22);
    }
    let target = Tmpfs::mount(&system.dir().join("target"), 100 * MIB);
    let caller = Caller::new(&system).await;
    for disk in ["vda", "vdb", "vdc"] {
        let path = target.path().join(format!("{disk}.qcow2"));
        let document = format!(
            "<domainbackup><disks><disk name='{disk}'><target file='{}'/></disk></disks></domainbackup>",
            path.display()
        );
        assert_completed(&caller.start("thick", &document).await).await;
        assert!(crate::common::storage::holds(
            &path,
            "qcow2",
            100 * MIB,
            4 * MIB,
            0x22
        ));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stores_in_directories_of_other_users_are_refused() {
    let outside = crate::common::test_directory();
    let path = |name: &str| outside.path().join(name);
    for name in ["writable", "foreign", "real"] {
        fs::create_dir(path(name)).unwrap();
        fs::create_dir(path(name).join("store")).unwrap();
    }
    fs::set_permissions(path("writable"), fs::Permissions::from_mode(0o777)).unwrap();
    std::os::unix::fs::chown(path("foreign"), Some(65534), None).unwrap();
    symlink("real", path("link")).unwrap();
    symlink("store", path("real/linked")).unwrap();
    fs::create_dir(path("real/open")).unwrap();
    fs::set_permissions(path("real/open"), fs::Permissions::from_mode(0o1777)).unwrap();
    let system = System::setup()
        .store("writable", &path("writable/store"))
        .store("foreign", &path("foreign/store"))
        .store("link", &path("link/store"))
        .store("linked", &path("real/linked"))
        .store("open", &path("real/open"))
        .store("missing", &path("real/missing"))
        .store("good", &path("real/store"))
        .start();
    let scene = Scene::of(system).await;
    let store = |name: &str| format!("<domainbackup><store name='{name}'/></domainbackup>");
    for (name, words) in [
        ("writable", ["/writable:", "can be written"]),
        ("foreign", ["/foreign:", "belongs to user 65534"]),
        ("link", ["/link:", "symbolic link"]),
        ("linked", ["/linked:", "symbolic link"]),
        ("open", ["/open:", "can be written"]),
        ("missing", ["/missing:", "does not exist"]),
    ] {
        scene
            .refuses_document(&store(name), "TargetInvalid", &words)
            .await;
    }
    assert_completed(&scene.caller.start("web", &store("good")).await).await;
    // The domain's own directory counts too.
    fs::remove_dir_all(path("real/store/web")).unwrap();
    symlink(outside.path(), path("real/store/web")).unwrap();
    let error = scene.refused("web", &store("good")).await;
    assert_eq!(error_name(&error), format!("{OURS}TargetInvalid"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_domain_is_refused() {
    let scene = Scene::new().await;
    let gone = scene.target("gone.qmp");
    scene
        .system
        .write_domain_file("gone", &format!("monitor = \"{}\"\n", gone.display()));
    crate::common::wait::until_async("the domain gone", || async {
        scene.caller.manager.get_domain("gone").await.ok()
    })
    .await;
    let error = scene.refused("gone", "").await;
    assert_eq!(error_name(&error), format!("{OURS}DomainUnreachable"));
    assert!(error.to_string().contains("gone.qmp"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_backup_of_the_same_domain_is_refused() {
    let scene = Scene::new().await;
    let options = Options::from([("bandwidth", Variant::from(MIB))]);
    let job = scene.caller.start_with("web", "", &[], options).await;
    let error = scene.refused("web", "").await;
    assert_eq!(error_name(&error), format!("{OURS}Busy"));
    assert!(error.to_string().contains("'web'"), "{error}");
    job.set_speed(0).await.unwrap();
    assert_completed(&job).await;
    assert_completed(&scene.caller.start("web", "").await).await;
}
