//! Disks that shrink and grow again between two backups. QEMU drops the dirty bits of the part that it cuts off, so
//! the next backup has to copy the whole disk.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::caller::{Caller, assert_completed, assert_failed};
use crate::common::disk::Disk;
use crate::common::proxies::{JobProxy, Options};
use crate::common::proxy::Proxy;
use crate::common::recorded::{DISKS, Recorded, SIZE, read};
use crate::common::vm::Vm;
use crate::common::{System, process};
use serde_json::json;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

#[track_caller]
fn resize(vm: &Vm, disk: &str, size: u64) {
    vm.qmp(
        "block_resize",
        json!({ "node-name": vm.node_name(disk), "size": size }),
    );
}

#[track_caller]
fn resize_image(image: &Path, size: u64) {
    let mut resize = Command::new("qemu-img");
    resize.args(["resize", "-q", "--shrink", "-f", "qcow2"]);
    resize.arg(image).arg(size.to_string());
    process::run(resize).expect_success();
}

/// The second half of the first disk was cut off and reads as zeroes now. Checks that the next backup shows that and
/// that the one after it is incremental again.
async fn assert_noticed(mut scene: Recorded) {
    scene.now.get_mut("vda").unwrap()[MIB as usize..].fill(0);
    scene.write("vdb", 0, MIB, 0x22);
    let (second, said) = scene.backup(Options::new()).await;
    assert!(
        said[0] == "vda full resized" && said[1].starts_with("vdb incremental"),
        "{said:?}"
    );
    scene.check();
    scene.write("vda", 0, 64 * KIB, 0x23);
    let (_, said) = scene.backup(Options::new()).await;
    assert_eq!(said, DISKS.map(|disk| format!("{disk} incremental {second}")));
    scene.check();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_made_smaller_and_larger_again_is_copied_whole() {
    let mut scene = Recorded::new();
    scene.backup(Options::new()).await;
    resize(scene.vm(), "vda", MIB);
    resize(scene.vm(), "vda", SIZE);
    assert_noticed(scene).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_made_smaller_and_larger_again_is_copied_whole() {
    let mut scene = Recorded::new();
    scene.backup(Options::new()).await;
    let image = scene.vm().source_path("vda").to_owned();
    scene.vm.take().unwrap().quit();
    resize_image(&image, MIB);
    resize_image(&image, SIZE);
    scene.boot();
    assert_noticed(scene).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_made_larger_and_as_it_was_again_goes_on_from_its_base() {
    let mut scene = Recorded::new();
    let (first, _) = scene.backup(Options::new()).await;
    resize(scene.vm(), "vda", 2 * SIZE);
    scene.vm().write("vda", SIZE, MIB, 0x31);
    resize(scene.vm(), "vda", SIZE);
    scene.write("vda", SIZE - 64 * KIB, 64 * KIB, 0x32);
    let (_, said) = scene.backup(Options::new()).await;
    assert_eq!(said, DISKS.map(|disk| format!("{disk} incremental {first}")));
    scene.check();
}

/// Starts a VM with one disk of this size, whose image has clusters of this size.
fn machine(system: &System, size: u64, cluster: u64) -> Vm {
    let image = system.dir().join("odd.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o"]);
    create
        .arg(format!("cluster_size={cluster}"))
        .arg(&image)
        .arg(size.to_string());
    process::run(create).expect_success();
    system.configured(system.vm("web").disk(Disk::new("vda", size).discard().at(&image)))
}

async fn back_up(caller: &Caller) -> (PathBuf, String) {
    let job = caller.start("web", "").await;
    assert_completed(&job).await;
    said(&job).await
}

/// Returns the image of a job, and its kind.
async fn said(job: &JobProxy<'_>) -> (PathBuf, String) {
    let disks = job.disks().await.unwrap();
    let increments = job.increments().await.unwrap();
    (
        PathBuf::from(&disks[0].4),
        format!("{} {}", increments[0].1, increments[0].3),
    )
}

/// Shrinks a disk of `size` bytes to `inside`, which is in its last granule, and then to `outside`, which is not.
async fn cut(size: u64, inside: u64, outside: u64) {
    let system = System::start();
    let mut vm = machine(&system, size, 512);
    vm.write("vda", 0, size, 0x41);
    let caller = Caller::new(&system).await;
    back_up(&caller).await;
    // No bitmap loses a bit by this, and the guest loses its data.
    resize(&vm, "vda", inside);
    resize(&vm, "vda", size);
    let (image, how) = back_up(&caller).await;
    assert_eq!(how, "incremental ");
    // The service notices a granule that is cut off whole.
    vm.write("vda", 0, size, 0x42);
    back_up(&caller).await;
    resize(&vm, "vda", outside);
    resize(&vm, "vda", size);
    let (later, how) = back_up(&caller).await;
    assert_eq!(how, "full resized");
    let source = vm.source_path("vda").to_owned();
    vm.quit();
    let expected = |pattern: u8, kept: u64| {
        let mut content = vec![pattern; kept as usize];
        content.resize(size as usize, 0);
        content
    };
    assert!(read(&image) == expected(0x41, inside));
    assert!(read(&later) == expected(0x42, outside));
    assert!(read(&source) == expected(0x42, outside));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_inside_the_last_granule_of_a_bitmap_is_in_the_next_backup() {
    cut(MIB + 48 * KIB, MIB + 16 * KIB, MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_inside_a_whole_last_granule_is_in_the_next_backup() {
    cut(MIB, MIB - 512, MIB - 64 * KIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_disk_goes_on_from_its_base() {
    let system = System::start();
    let vm = machine(&system, 0, 64 * KIB);
    let caller = Caller::new(&system).await;
    assert_eq!(back_up(&caller).await.1, "full first");
    assert_eq!(back_up(&caller).await.1, "incremental ");
    assert_eq!(vm.sentinels("vda"), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_while_the_backup_is_prepared_fails_it_and_the_next_is_full() {
    let system = System::start();
    let mut vm = system.vm("web").disk(Disk::new("vda", SIZE).discard()).start();
    let proxy = Proxy::start(&system.dir().join("proxy"), &vm.monitor_path());
    system.write_domain_file("web", &format!("monitor = \"{}\"\n", proxy.path().display()));
    system.wait_for_domain("web");
    vm.write("vda", 0, SIZE, 0x51);
    let caller = Caller::new(&system).await;
    back_up(&caller).await;
    let start = proxy.hold("transaction", |arguments| arguments["properties"].is_object());
    let starting = caller.start("web", "");
    let cut = tokio::task::spawn_blocking(move || {
        start.reached();
        resize(&vm, "vda", MIB);
        resize(&vm, "vda", SIZE);
        start.pass();
        vm
    });
    let (job, vm_again) = tokio::join!(starting, cut);
    vm = vm_again.unwrap();
    assert_failed(&job, "Busy", "shrank").await;
    let (image, how) = back_up(&caller).await;
    assert_eq!(how, "full resized");
    let mut content = vec![0x51; MIB as usize];
    content.resize(SIZE as usize, 0);
    vm.quit();
    assert!(read(&image) == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_size_marker_bitmap_is_removed_with_its_checkpoint() {
    let mut scene = Recorded::new();
    let before = scene.vm().residue();
    let mut made = Vec::new();
    for _ in 0..6 {
        made.push(scene.backup(Options::new()).await.0);
    }
    let newest: Vec<&str> = made.iter().skip(2).map(String::as_str).collect();
    scene.assert_checkpoints(&newest);
    assert_eq!(scene.vm().residue(), before);
    // Without its checkpoint, which another client removed, the marker is useless.
    let name = scene.vm().checkpoints("vda").remove(0);
    let node = scene.vm().node_name("vda");
    let remove = json!({ "node": node, "name": name });
    scene.vm().qmp("block-dirty-bitmap-remove", remove);
    scene.backup(Options::new()).await;
    assert_eq!(scene.vm().sentinels("vda"), scene.vm().checkpoints("vda"));
}
