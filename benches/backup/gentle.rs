//! Measures the latency of the guest's writes during a backup into a slow target, with and without `max-latency`.
//!
//! The guest is a Linux with this program as its first process after the shell. It writes 4 KiB, bypassing its cache,
//! at random positions of its disk, one after the other with a pause in between, and prints each latency. The target is
//! a FUSE file system that accepts [`RATE`] bytes a second, in the order of arrival.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::System;
use crate::common::caller::{Caller, assert_completed};
use crate::common::disk::Disk;
use crate::common::hanging::{Hanging, Limits};
use crate::common::initramfs::{Initramfs, parts};
use crate::common::proxies::Options;

/// The first argument of this program inside the guest.
pub const GUEST: &str = "--guest";
/// Throughput of the target, in bytes a second.
pub const RATE: u64 = 20 << 20;
/// The value of `max-latency`, in milliseconds.
pub const MOST: u64 = 10;
const DISK: u64 = 192 << 20;
const NAME: &str = "linux";
const IDLE: Duration = Duration::from_secs(8);
/// The pause between two writes of the guest.
const PAUSE: Duration = Duration::from_millis(4);
const BLOCK: usize = 4096;
/// The number of latencies that the guest prints at a time.
const BATCH: usize = 25;

/// The results of one phase.
#[derive(Debug)]
pub struct Phase {
    pub name: &'static str,
    /// The latency of each write of the guest, in seconds.
    pub writes: Vec<f64>,
    /// The duration of the backup in seconds, and the bytes that the target received; `None` without a backup.
    pub backup: Option<(f64, u64)>,
}

/// The program inside the guest. Never returns.
pub fn guest() -> ! {
    let disk = fs::OpenOptions::new()
        .write(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed())
        .open("/dev/vda")
        .expect("the disk is there");
    let mut port = fs::OpenOptions::new()
        .write(true)
        .open("/dev/ttyS0")
        .expect("the port is there");
    let mut buffer = vec![0x5a_u8; 2 * BLOCK];
    let start = buffer.as_ptr().align_offset(BLOCK);
    let block = &mut buffer[start..start + BLOCK];
    let blocks = DISK / BLOCK as u64;
    // Lehmer's generator, so that each run writes to the same positions.
    let mut random = 1_u64;
    loop {
        let mut line = String::from("took");
        for _ in 0..BATCH {
            random = random * 48271 % 0x7fff_ffff;
            let offset = random % blocks * BLOCK as u64;
            block[..8].copy_from_slice(&random.to_le_bytes());
            let began = Instant::now();
            disk.write_all_at(block, offset).expect("the guest writes");
            line += &format!(" {}", began.elapsed().as_micros());
            std::thread::sleep(PAUSE);
        }
        writeln!(port, "{line}").expect("the guest speaks");
    }
}

const INIT: &str = "#!/bin/busybox sh
. /boot.sh
until [ -b /dev/vda ]; do usleep 10000; done
exec /bin/writer --guest
";

struct Scene {
    system: System,
    caller: Caller,
    serial: PathBuf,
    _vm: crate::common::vm::Vm,
}

impl Scene {
    async fn boot() -> Self {
        let system = System::start();
        let dir = system.dir().to_owned();
        let init = dir.join("init");
        fs::write(&init, INIT).expect("the guest's script is written");
        let initramfs = Initramfs::new(&dir, &init);
        let own = std::env::current_exe().expect("this program has a path");
        initramfs.program(&own, "/bin/writer");
        let archive = initramfs.pack();
        let disk = dir.join("disk.raw");
        fill(&disk);
        let serial = dir.join("serial");
        let vm = system
            .vm(NAME)
            .disk(Disk::new("vda", 0).raw().at(&disk))
            .extra(&[
                "-m",
                "512",
                "-kernel",
                &parts().join("vmlinuz").display().to_string(),
                "-initrd",
                &archive.display().to_string(),
                "-append",
                "console=ttyS0 quiet panic=-1",
                "-serial",
                &format!("file:{}", serial.display()),
            ])
            .running();
        let vm = system.configured(vm);
        let scene = Self {
            caller: Caller::new(&system).await,
            system,
            serial,
            _vm: vm,
        };
        crate::common::wait::until("the guest to write", || {
            (!scene.writes(0).0.is_empty()).then_some(())
        });
        scene
    }

    /// Returns the latencies that the guest printed from that byte on, in seconds, and the offset of the next byte.
    fn writes(&self, from: usize) -> (Vec<f64>, usize) {
        let said = fs::read(&self.serial).unwrap_or_default();
        let end = said
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |last| last + 1);
        let whole = String::from_utf8_lossy(&said[from.min(end)..end]).into_owned();
        let lines = whole.lines().filter_map(|line| line.trim().strip_prefix("took "));
        let numbers = lines.flat_map(str::split_whitespace);
        let writes = numbers.filter_map(|number| number.parse::<f64>().ok());
        (writes.map(|microseconds| microseconds / 1e6).collect(), end)
    }

    async fn back_up(&self, name: &'static str, target: &Path, options: Options<'_>) -> Phase {
        let image = target.join("vda.qcow2");
        let document = format!(
            "<domainbackup><disks><disk name='vda'><target file='{}'/></disk></disks></domainbackup>",
            image.display()
        );
        let (_, from) = self.writes(0);
        let began = Instant::now();
        let job = self.caller.start_with(NAME, &document, &[], options).await;
        assert_completed(&job).await;
        let took = began.elapsed().as_secs_f64();
        let (writes, _) = self.writes(from);
        let bytes = fs::metadata(&image).expect("there is an image").len();
        fs::remove_file(&image).expect("the image is removed");
        Phase {
            name,
            writes,
            backup: Some((took, bytes)),
        }
    }
}

/// Writes data that is not zeroes, so that all of it is copied.
fn fill(path: &Path) {
    let mut file = File::create(path).expect("the disk is made");
    let block = [0xa5_u8; 1 << 20];
    for _ in 0..DISK >> 20 {
        file.write_all(&block).expect("the disk is filled");
    }
}

pub async fn measure() -> Vec<Phase> {
    let scene = Scene::boot().await;
    let (_, from) = scene.writes(0);
    tokio::time::sleep(IDLE).await;
    let idle = Phase {
        name: "no backup",
        writes: scene.writes(from).0,
        backup: None,
    };
    let slow = Hanging::mount(&scene.system.dir().join("slow"), Limits::default());
    slow.limit(RATE);
    let without = scene.back_up("backup", slow.path(), Options::new()).await;
    let most = Options::from([("max-latency", MOST.into())]);
    let with = scene.back_up("backup, max-latency 10", slow.path(), most).await;
    vec![idle, without, with]
}
