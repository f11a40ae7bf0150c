//! A target file can belong to the caller and stay open there during the backup. No header that the caller writes
//! into it makes QEMU write to another file or connect to a server.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::disk::Disk;
use crate::common::proxies::slowly;
use crate::common::vm::Vm;
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
/// The number of attempts. If the race can be won, the caller wins almost every one.
const TRIES: usize = 10;

/// Writes a header into a file again and again, as soon as the file has content.
struct Racer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Racer {
    fn start(path: &Path, header: Vec<u8>) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut written = 0;
            while !stopped.load(Ordering::Relaxed) {
                let mut magic = [0; 4];
                if file.read_at(&mut magic, 0).unwrap() == magic.len() && magic == *b"QFI\xfb" {
                    file.write_at(&header, 0).unwrap();
                    written += 1;
                }
            }
            written
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// Ends the thread and returns how often it wrote.
    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

struct Scene {
    system: System,
    vm: Vm,
    victim: PathBuf,
    /// Returns the header of an image whose data file is `victim`.
    header: Vec<u8>,
}

impl Scene {
    /// `victim` is the disk of a VM that is off. QEMU's user may write to it, and the caller may not even read it.
    fn new() -> Self {
        let system = System::start();
        let disk = Disk::new("vda", SIZE).fill(0, MIB, 0x11);
        let vm = system.configured(system.vm("web").disk(disk).running());
        let victim = system.dir().join("victim");
        let made = system.dir().join("made");
        let mut create = crate::common::process::bound("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o"]);
        create.arg(format!("data_file={}", victim.display()));
        create.arg(&made).arg(SIZE.to_string());
        crate::common::process::run(create).expect_success();
        let header = fs::read(&made).unwrap()[..1024].to_vec();
        fs::write(&victim, vec![0x5e; 4 * SIZE as usize]).unwrap();
        fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
        Self {
            system,
            vm,
            victim,
            header,
        }
    }

    #[track_caller]
    fn assert_victim_unchanged(&self) {
        let found = fs::read(&self.victim).unwrap();
        assert_eq!(found.len() as u64, 4 * SIZE);
        assert!(found.iter().all(|byte| *byte == 0x5e));
    }

    /// Backs up into a file of the caller while a thread of the caller writes the header there.
    async fn race(&self, caller: &Caller, by_path: bool) {
        let target = self.system.dir().join("target");
        let mut create = crate::common::process::bound("qemu-img");
        create.args(["create", "-q", "-f", "qcow2"]).arg(&target);
        create.arg(SIZE.to_string());
        crate::common::process::run(create).expect_success();
        let racer = Racer::start(&target, self.header.clone());
        let (place, files) = if by_path {
            (format!("<target file='{}'/>", target.display()), Vec::new())
        } else {
            let file = File::options().read(true).write(true).open(&target).unwrap();
            ("<target fd='0'/>".to_owned(), vec![OwnedFd::from(file)])
        };
        let kind = if by_path { "file" } else { "fd" };
        let document = format!(
            "<domainbackup><disks><disk name='vda' type='{kind}'>{place}</disk></disks></domainbackup>"
        );
        let mut options = slowly(64 * MIB);
        if by_path {
            options.insert("reuse-external", Variant::from(true));
        }
        // The result does not matter: the caller may spoil its own file.
        if let Ok(path) = caller.try_start("web", &document, &files, options).await {
            let job = caller.job(path).await;
            crate::common::wait::until_async("the backup's end", || async {
                let state = job.state().await.unwrap();
                ["completed", "failed", "cancelled"]
                    .contains(&state.as_str())
                    .then_some(())
            })
            .await;
        }
        racer.end();
        let _ = fs::remove_file(target);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_names_a_data_file_changes_no_other_file() {
    let scene = Scene::new();
    let caller = Caller::new(&scene.system).await;
    let before = scene.vm.residue();
    for by_path in [false, true] {
        for _ in 0..TRIES {
            scene.race(&caller, by_path).await;
            scene.assert_victim_unchanged();
        }
    }
    assert_eq!(scene.vm.residue(), before);
}
