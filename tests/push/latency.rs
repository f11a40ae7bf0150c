//! A backup that slows down while the guest's writes take longer than allowed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use fuser::Errno;
use serde_json::json;

use crate::common::caller::{Caller, assert_completed, assert_failed, cancel};
use crate::common::disk::Disk;
use crate::common::hanging::{Hanging, Limits, Operation};
use crate::common::peer::{Imposter, Peer, schema_with};
use crate::common::proxies::{JobProxy, Options, error_name, slowly};
use crate::common::vm::Vm;
use crate::common::{System, wait};

const MIB: u64 = 1 << 20;
/// In milliseconds: more than a write takes on a busy host.
const MOST: u64 = 250;
const WRITES: &str = "vda/wr";

/// Returns options of a backup at that bandwidth with a latency limit.
fn gently(bytes_per_second: u64) -> Options<'static> {
    let mut options = slowly(bytes_per_second);
    options.insert("max-latency", MOST.into());
    options
}

fn system() -> (System, Vm) {
    let system = System::start();
    let vm = system.configured(machine(&system));
    (system, vm)
}

fn machine(system: &System) -> crate::common::vm::Builder {
    let disk = |name| Disk::new(name, 256 * MIB).raw();
    // An older QEMU keeps every descriptor of a stopped VM.
    system.vm("web").disk(disk("vda")).disk(disk("vdb")).running()
}

/// Waits until both disks have a histogram; returns the boundaries of each.
async fn counted(vm: &Vm) -> BTreeMap<String, Vec<u64>> {
    wait::until_async("the histograms", || async {
        Some(vm.histograms()).filter(|histograms| histograms.len() == 2)
    })
    .await
}

/// Returns the limit of each block job, in bytes a second.
fn speeds(vm: &Vm) -> Vec<u64> {
    let jobs = vm.qmp("query-block-jobs", json!({}));
    let jobs = jobs.as_array().cloned().unwrap_or_default();
    jobs.iter().filter_map(|job| job["speed"].as_u64()).collect()
}

async fn until_speeds(what: &str, vm: &Vm, fits: impl Fn(&u64) -> bool) {
    wait::until_async(what, || async {
        let speeds = speeds(vm);
        (speeds.len() == 2 && speeds.iter().all(&fits)).then_some(())
    })
    .await;
}

/// Waits until the service has queried the progress of the jobs: it sets the histograms before that.
async fn until_followed(job: &JobProxy<'_>) {
    let copied = || async { (job.bytes_done().await.unwrap() > 0).then_some(()) };
    wait::until_async("progress", copied).await;
}

/// A guest that writes until this is dropped.
struct Guest {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    fn writing(vm: &Arc<Vm>, disk: &str) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        // Through the device, like the guest: the device's statistics include `aio_write`, but not `write`.
        let line = format!("qemu-io -d {} \"aio_write -q 0 4k\"", vm.device_path(disk));
        let (vm, stop) = (vm.clone(), ends.clone());
        let thread = std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                vm.qmp("human-monitor-command", json!({ "command-line": line }));
                std::thread::sleep(wait::STEP);
            }
        });
        Self {
            ends,
            thread: Some(thread),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(ended.is_none_or(|ended| ended.is_ok()) || std::thread::panicking());
    }
}

/// Limits the guest's device to so many writes a second; 0 means unlimited. QEMU includes the waiting time in the
/// latency.
fn throttle(vm: &Vm, disk: &str, writes: u64) {
    let mut arguments = json!({ "id": vm.device_path(disk), "iops_wr": writes });
    for key in ["bps", "bps_rd", "bps_wr", "iops", "iops_rd"] {
        arguments[key] = json!(0);
    }
    vm.qmp("block_set_io_throttle", arguments);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_speed_falls_while_the_guests_writes_are_slow_and_rises_again() {
    let (system, vm) = system();
    let vm = Arc::new(vm);
    let caller = Caller::new(&system).await;
    let own = 2 * MIB;
    let job = caller.start_with("web", "", &[], gently(2 * own)).await;
    until_speeds("the caller's limit", &vm, |speed| *speed == own).await;
    let histograms = counted(&vm).await;
    let keys: Vec<&str> = histograms.keys().map(String::as_str).collect();
    assert_eq!(keys, ["vda/wr", "vdb/wr"]);

    // The writes to one of the disks.
    let guest = Guest::writing(&vm, "vdb");
    throttle(&vm, "vdb", 2);
    until_speeds("both disks to be slower", &vm, |speed| *speed < own).await;
    until_speeds("the lowest speed", &vm, |speed| *speed == MIB).await;
    throttle(&vm, "vdb", 0);
    until_speeds("the caller's limit again", &vm, |speed| *speed == own).await;
    // The caller can still change it.
    job.set_speed(MIB).await.unwrap();
    until_speeds("a lower limit", &vm, |speed| *speed == MIB / 2).await;
    drop(guest);
    cancel(&job).await;
    assert_eq!(vm.histograms(), BTreeMap::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_histograms_are_gone_after_every_end() {
    let (system, vm) = system();
    let before = vm.residue();
    let caller = Caller::new(&system).await;

    let job = caller.start_with("web", "", &[], gently(0)).await;
    assert_completed(&job).await;
    assert_eq!(vm.residue(), before, "completed");

    let job = caller.start_with("web", "", &[], gently(4 * MIB)).await;
    counted(&vm).await;
    cancel(&job).await;
    assert_eq!(vm.residue(), before, "cancelled");

    let faulty = Hanging::mount(&system.dir().join("faulty"), Limits::default());
    let target = |name: &str| {
        let file = faulty.path().join(name);
        format!("<disk name='{name}'><target file='{}'/></disk>", file.display())
    };
    let disks = target("vda") + &target("vdb");
    let document = format!("<domainbackup><disks>{disks}</disks></domainbackup>");
    let mut options = gently(4 * MIB);
    options.remove("incremental");
    vm.write("vda", 0, 64 * MIB, 0x55);
    let job = caller.start_with("web", &document, &[], options).await;
    counted(&vm).await;
    faulty.fail(Operation::Write, Errno::EIO);
    assert_failed(&job, "QemuError", "Input/output error").await;
    assert_eq!(vm.residue(), before, "failed");

    // Without the option no histogram is set.
    let job = caller.start_with("web", "", &[], slowly(4 * MIB)).await;
    until_followed(&job).await;
    assert_eq!(vm.histograms(), BTreeMap::new());
    cancel(&job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn histograms_of_other_clients_stay_unchanged() {
    let (system, vm) = system();
    let vm = Arc::new(vm);
    let caller = Caller::new(&system).await;
    let set = |disk: &str, key: &str, boundaries: &[u64]| {
        vm.qmp(
            "block-latency-histogram-set",
            json!({ "id": vm.device_path(disk), key: boundaries }),
        );
    };
    // This histogram shows slow writes. QEMU can remove the other one only together with all histograms of that disk.
    set("vda", "boundaries-write", &[200_000_000]);
    set("vdb", "boundaries-read", &[1_000_000, 2_000_000]);
    let before = vm.histograms();
    let own = 2 * MIB;
    let job = caller.start_with("web", "", &[], gently(2 * own)).await;
    for disk in ["vda", "vdb"] {
        until_speeds("the caller's limit", &vm, |speed| *speed == own).await;
        let guest = Guest::writing(&vm, disk);
        throttle(&vm, disk, 2);
        until_speeds("the lowest speed", &vm, |speed| *speed == MIB).await;
        throttle(&vm, disk, 0);
        until_speeds("the caller's limit again", &vm, |speed| *speed == own).await;
        assert_eq!(vm.histograms(), before, "{disk}");
        drop(guest);
    }
    cancel(&job).await;
    assert_eq!(vm.histograms(), before);

    // Another client replaces the backup's own histogram.
    set("vda", "boundaries", &[5]);
    vm.qmp(
        "block-latency-histogram-set",
        json!({ "id": vm.device_path("vda") }),
    );
    let job = caller.start_with("web", "", &[], gently(4 * MIB)).await;
    wait::until_async("the histogram", || async {
        vm.histograms().contains_key(WRITES).then_some(())
    })
    .await;
    set("vda", "boundaries-write", &[7]);
    cancel(&job).await;
    assert_eq!(vm.histograms()[WRITES], [7]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_histograms_of_a_dead_service_are_removed_and_the_backup_goes_on_with_the_same_limit() {
    let (mut system, vm) = system();
    let vm = Arc::new(vm);
    let before = vm.residue();
    let points = [
        "qmp block-latency-histogram-set",
        "after follow",
        "before release",
        "after release",
    ];
    for point in points {
        system.stop_daemon();
        system.start_dying_daemon(point);
        system.wait_for_domain("web");
        let caller = Caller::new(&system).await;
        let _ = caller.try_start("web", "", &[], gently(0)).await;
        system.wait_for_death();
        system.start_daemon();
        system.wait_for_domain("web");
        let caller = Caller::new(&system).await;
        let jobs = caller.manager.list_jobs().await.unwrap();
        let (_, path, ..) = jobs.into_iter().max_by_key(|job| job.0).unwrap();
        assert_completed(&caller.job(path).await).await;
        assert_eq!(vm.residue(), before, "after {point:?}");
    }

    let caller = Caller::new(&system).await;
    let own = 2 * MIB;
    let job = caller.start_with("web", "", &[], gently(2 * own)).await;
    let histograms = counted(&vm).await;
    let number = job.id().await.unwrap();
    system.kill_daemon();
    assert_eq!(vm.histograms(), histograms);
    system.start_daemon();
    system.wait_for_domain("web");
    let caller = Caller::new(&system).await;
    let job: JobProxy<'_> = caller.job(caller.manager.get_job(number).await.unwrap()).await;
    until_speeds("the caller's limit", &vm, |speed| *speed == own).await;
    let guest = Guest::writing(&vm, "vda");
    throttle(&vm, "vda", 2);
    until_speeds("the lowest speed", &vm, |speed| *speed == MIB).await;
    assert_eq!(
        vm.histograms(),
        histograms,
        "the histograms belong to the job, not to the service"
    );
    throttle(&vm, "vda", 0);
    drop(guest);
    cancel(&job).await;
    assert_eq!(vm.residue(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_call_overrides_the_domain_file_which_overrides_the_configuration() {
    let system = System::setup().config("max-latency = 1000").start();
    let vm = machine(&system).start();
    let caller = Caller::new(&system).await;
    let monitor = format!("monitor = \"{}\"\n", vm.monitor_path().display());
    let nanoseconds = |milliseconds: u64| milliseconds * 1_000_000 + 1;
    let cases = [
        ("", None, Some(1000)),
        ("max-latency = 20", None, Some(20)),
        ("max-latency = 0", None, None),
        ("max-latency = 20", Some(30u64), Some(30)),
        ("max-latency = 20", Some(0), None),
    ];
    for (line, option, expected) in cases {
        let file = system.write_domain_file("web", &format!("{monitor}{line}\n"));
        system.wait_for_domain("web");
        let mut options = slowly(4 * MIB);
        options.extend(option.map(|most| ("max-latency", most.into())));
        let job = caller.start_with("web", "", &[], options).await;
        until_followed(&job).await;
        match expected {
            None => assert_eq!(vm.histograms(), BTreeMap::new(), "{line:?} {option:?}"),
            Some(most) => assert_eq!(counted(&vm).await[WRITES][1], nanoseconds(most)),
        }
        cancel(&job).await;
        assert!(file.exists());
        system.remove_domain_file("web");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_out_of_bounds_is_refused_before_anything_is_touched() {
    let (system, vm) = system();
    let before = vm.residue();
    let caller = Caller::new(&system).await;
    for (value, text) in [
        (60_001u64.into(), "60001 ms is more than 60000 ms"),
        ("10".into(), "has type 's' instead of 't'"),
    ] {
        let options = Options::from([("max-latency", value)]);
        let refused = caller.try_start("web", "", &[], options).await.unwrap_err();
        assert_eq!(error_name(&refused), "org.freedesktop.DBus.Error.InvalidArgs");
        assert!(refused.to_string().contains(text), "{refused}");
    }
    assert_eq!(vm.residue(), before);
    assert!(caller.manager.list_jobs().await.unwrap().is_empty());
}

/// Plays a QEMU that can make backups, but cannot count latencies.
async fn play(mut peer: Peer) {
    peer.greet().await;
    while let Some(command) = peer.try_receive_at_any_time().await {
        let answer = match command.name() {
            "query-status" => json!({ "status": "running", "running": true }),
            "query-qmp-schema" => schema_with(json!([
                { "name": "blockdev-backup", "meta-type": "command", "arg-type": "backup" },
                { "name": "backup", "meta-type": "object", "members": [] },
                { "name": "transaction", "meta-type": "command", "arg-type": "transaction" },
                { "name": "transaction", "meta-type": "object", "members": [{ "name": "properties" }] },
            ])),
            "query-block" => json!([{
                "device": "", "qdev": "/machine/peripheral/vda/virtio-backend",
                "inserted": { "node-name": "n", "ro": false },
            }]),
            "query-named-block-nodes" => json!([{
                "node-name": "n", "drv": "raw", "file": "/dev/null", "image": { "virtual-size": MIB },
            }]),
            "query-uuid" => json!({ "UUID": "00000000-0000-0000-0000-000000000000" }),
            _ => json!([]),
        };
        peer.answer(&command, answer).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_cannot_count_latencies_is_refused() {
    let system = System::start();
    let path = system.dir().join("qemu");
    let _qemu = Imposter::listen(&path, play);
    system.write_domain_file("web", &format!("monitor = \"{}\"\n", path.display()));
    system.wait_for_domain("web");
    let caller = Caller::new(&system).await;
    let options = Options::from([("max-latency", MOST.into())]);
    let refused = caller.try_start("web", "", &[], options).await.unwrap_err();
    assert_eq!(
        error_name(&refused),
        "org.example.Backup1.Error.Unsupported",
        "{refused}"
    );
    assert!(refused.to_string().contains("'max-latency'"), "{refused}");
    assert!(caller.manager.list_jobs().await.unwrap().is_empty());
}
