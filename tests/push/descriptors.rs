//! Targets that are the caller's open files. A backup whose file would vanish with its last descriptor is refused.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use crate::common::System;
use crate::common::caller::{Caller, assert_completed};
use crate::common::disk::Disk;
use crate::common::proxies::{Options, error_name};
use crate::common::storage::holds;
use crate::common::vm::Vm;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const DOCUMENT: &str =
    "<domainbackup><disks><disk name='vda' type='fd'><target fd='0'/></disk></disks></domainbackup>";

fn machine(system: &System) -> Vm {
    let disk = Disk::new("vda", 16 * MIB).fill(0, MIB, 0x11);
    system.configured(system.vm("web").disk(disk).running())
}

/// Checks that the descriptor is refused because its file has no name, with and without `reuse-external`, and that
/// nothing changes.
async fn assert_nameless(caller: &Caller, vm: &Vm, file: &OwnedFd) {
    let before = (vm.residue(), rustix::fs::fstat(file).unwrap().st_size);
    for reuse in [false, true] {
        let options = Options::from([("reuse-external", Variant::from(reuse))]);
        let files = [file.try_clone().unwrap()];
        let refused = caller.try_start("web", DOCUMENT, &files, options).await;
        let error = refused.expect_err("the call is refused");
        assert_eq!(
            error_name(&error),
            "org.example.Backup1.Error.TargetInvalid",
            "{error}"
        );
        for word in ["'vda'", "fd:0", "without a name"] {
            assert!(error.to_string().contains(word), "{word:?} in {error}");
        }
    }
    assert_eq!((vm.residue(), rustix::fs::fstat(file).unwrap().st_size), before);
    assert_eq!(caller.manager.list_jobs().await.unwrap(), []);
}

async fn assert_backed_up(caller: &Caller, file: OwnedFd, path: &Path) {
    let job = caller.start_with("web", DOCUMENT, &[file], Options::new()).await;
    assert_completed(&job).await;
    assert!(holds(path, "qcow2", 0, MIB, 0x11));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_never_had_a_name_is_refused_until_it_gets_one() {
    let system = System::start();
    let vm = machine(&system);
    let caller = Caller::new(&system).await;
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let file = rustix::fs::open(system.dir(), flags, Mode::from_raw_mode(0o600)).unwrap();
    assert_nameless(&caller, &vm, &file).await;
    let path = system.dir().join("named");
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::linkat(CWD, own.as_str(), CWD, &path, AtFlags::SYMLINK_FOLLOW).unwrap();
    assert_backed_up(&caller, file, &path).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_whose_last_name_was_removed_is_refused() {
    let system = System::start();
    let vm = machine(&system);
    let caller = Caller::new(&system).await;
    let (path, other) = (system.dir().join("one"), system.dir().join("other"));
    let create = |path: &Path| -> OwnedFd {
        let file = File::options().read(true).write(true).create_new(true).open(path);
        file.unwrap().into()
    };
    let file = create(&path);
    fs::remove_file(&path).unwrap();
    // A new file of that name does not help: it is another file.
    let _another = create(&path);
    assert_nameless(&caller, &vm, &file).await;

    let file = create(&other);
    fs::hard_link(&other, system.dir().join("further")).unwrap();
    fs::remove_file(&other).unwrap();
    assert_backed_up(&caller, file, &system.dir().join("further")).await;
}
