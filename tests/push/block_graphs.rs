//! VMs with deep or wide block graphs: the service connects to them and backs up all data of their disks.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::caller::Caller;
use crate::common::disk::{Disk, Kind};
use crate::common::peer::{Imposter, Peer};
use crate::common::proxies::{DomainProxy, JobProxy, Options, error_name};
use crate::common::recorded::read;
use crate::common::{System, process, wait};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// Creates an image, with a backing file if given, and a pattern at an offset.
fn image(path: &Path, below: Option<&Path>, (offset, pattern): (u64, u8)) {
    if !path.exists() {
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2"]);
        if let Some(below) = below {
            create.args(["-F", "qcow2", "-b"]).arg(below);
        }
        create.arg(path).arg(MIB.to_string());
        process::run(create).expect_success();
    }
    if pattern != 0 {
        let mut write = Command::new("qemu-io");
        write.args(["-f", "qcow2", "-c"]);
        write
            .arg(format!("write -q -P {pattern} {offset} 65536"))
            .arg(path);
        process::run(write).expect_success();
    }
}

/// Creates a chain of so many images and returns the path of the topmost. Some have data of their own, which is added
/// to `content`.
fn chain(dir: &Path, name: &str, images: usize, content: &mut [u8]) -> PathBuf {
    let path = |index: usize| dir.join(format!("{name}-{index}.qcow2"));
    for index in 0..images {
        let below = index.checked_sub(1).map(path);
        let pattern = match index % 20 {
            0 => u8::try_from(1 + index / 20).unwrap(),
            _ => 0,
        };
        let offset = (index as u64 / 20 * 65536) % MIB;
        image(&path(index), below.as_deref(), (offset, pattern));
        if pattern != 0 {
            content[offset as usize..][..65536].fill(pattern);
        }
    }
    path(images - 1)
}

/// Returns the path of the image that a job makes of a disk.
async fn target(job: &JobProxy<'_>, disk: &str) -> PathBuf {
    let disks = job.disks().await.unwrap();
    let found = disks.iter().find(|found| found.0 == disk).unwrap();
    PathBuf::from(&found.4)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_of_two_hundred_images_is_backed_up() {
    let system = System::start();
    let mut content = vec![0; MIB as usize];
    let top = chain(system.dir(), "deep", 200, &mut content);
    let vm = system.configured(system.vm("web").disk(Disk::new("vda", MIB).at(&top)));
    let caller = Caller::new(&system).await;
    let full = caller.complete("web", "").await;
    assert!(read(&target(&full, "vda").await) == content);
    vm.write("vda", 0, 65536, 0x77);
    content[..65536].fill(0x77);
    let next = caller.complete("web", "").await;
    assert_eq!(next.increments().await.unwrap()[0].1, "incremental");
    assert!(read(&target(&next, "vda").await) == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_disks_of_thirty_images_are_backed_up() {
    let system = System::start();
    let mut content = vec![0; MIB as usize];
    // The lower ones are shared, which does not reduce the number of nodes.
    let below = chain(system.dir(), "wide", 29, &mut content);
    let mut machine = system.vm("web");
    let disks: Vec<String> = (0..60).map(|index| format!("sd{index}")).collect();
    for disk in &disks {
        let top = system.dir().join(format!("{disk}.qcow2"));
        image(&top, Some(&below), (0, 0));
        machine = machine.disk(Disk::new(disk, MIB).kind(Kind::Scsi).at(&top));
    }
    let vm = system.configured(machine);
    vm.write("sd59", MIB - 65536, 65536, 0x77);
    let caller = Caller::new(&system).await;
    let job = caller.start_with("web", "", &[], Options::new()).await;
    // Sixty disks take a while on a busy host.
    let ended = tokio::time::timeout(4 * wait::DEADLINE, job.wait()).await;
    let (result, _, message) = ended.expect("the backup ends").unwrap();
    assert_eq!((result.as_str(), message.as_str()), ("completed", ""));
    for disk in ["sd0", "sd31"] {
        assert!(read(&target(&job, disk).await) == content, "{disk}");
    }
    content[(MIB - 65536) as usize..].fill(0x77);
    assert!(read(&target(&job, "sd59").await) == content);
}

/// Plays a QEMU of a version that can list its nodes only with their whole backing chains.
async fn play_old_qemu(mut peer: Peer) {
    peer.greet().await;
    while let Some(command) = peer.try_receive_at_any_time().await {
        let answer = match command.name() {
            "query-qmp-schema" => json!([
                { "name": "query-named-block-nodes", "meta-type": "command", "arg-type": "0" },
                { "name": "0", "meta-type": "object", "members": [] },
            ]),
            "query-version" => json!({ "qemu": { "major": 4, "minor": 2, "micro": 1 }, "package": "" }),
            _ => Value::Null,
        };
        match answer {
            Value::Null => peer.refuse(&command, "this QEMU is too old for that").await,
            answer => peer.answer(&command, answer).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_is_too_old_is_unreachable_and_the_error_says_which_is_not() {
    let system = System::start();
    let path = system.dir().join("old");
    let _old = Imposter::listen(&path, play_old_qemu);
    system.write_domain_file("old", &format!("monitor = \"{}\"\n", path.display()));
    let caller = Caller::new(&system).await;
    let domain = wait::until("the domain", || system.domain_path("old"));
    let domain = DomainProxy::new(&caller.connection, domain).await.unwrap();
    let refused = caller
        .try_start("old", "", &[], Options::new())
        .await
        .unwrap_err();
    assert_eq!(
        error_name(&refused),
        "org.example.Backup1.Error.DomainUnreachable"
    );
    let text = refused.to_string();
    assert!(
        text.contains("QEMU 4.2.1 is too old: version 5.0 or later is needed"),
        "{text}"
    );
    assert_eq!(domain.state().await.unwrap(), "unreachable");
}
