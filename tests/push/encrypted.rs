//! Disks that QEMU decrypts: their backups are plain text, and the service reports that.

use std::path::Path;
use std::process::Command;

use crate::common::System;
use crate::common::caller::{Caller, assert_completed};
use crate::common::clients::ROOT;
use crate::common::disk::Disk;
use crate::common::process;
use crate::common::proxies::DomainProxy;
use crate::common::recorded::backup_id;
use crate::common::storage::holds;
use crate::common::wait;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const SAID: &str = "its image is encrypted (LUKS), but this backup is not";

/// Creates an encrypted image and QEMU's arguments for a disk of it.
fn encrypted(directory: &Path, name: &str, format: &str) -> Vec<String> {
    let (path, secret) = (directory.join(name), format!("{name}-secret"));
    let key = if format == "luks" {
        "key-secret"
    } else {
        "encrypt.key-secret"
    };
    let object = format!("secret,id={secret},data=open-sesame");
    let mut options = format!("{key}={secret}");
    let mut node = json!({
        "driver": format, "node-name": format!("{name}-format"),
        "file": { "driver": "file", "node-name": format!("{name}-file"), "filename": path },
    });
    if format == "luks" {
        // The default is deliberately slow, to make guessing the key expensive.
        options.push_str(",iter-time=10");
        node["key-secret"] = secret.as_str().into();
    } else {
        options.push_str(",encrypt.format=luks,encrypt.iter-time=10");
        node["encrypt"] = json!({ "format": "luks", "key-secret": secret });
    }
    wait::until("qemu-img to make an encrypted image", || {
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", format, "--object", &object, "-o", &options]);
        create.arg(&path).arg("4M");
        let made = process::run(create);
        // It measures the host's speed, and fails on a busy host: "Unable to get accurate CPU usage".
        assert!(
            made.success() || made.stderr.contains("CPU usage"),
            "{}",
            made.stderr
        );
        made.success().then_some(())
    });
    let device = format!("virtio-blk-pci,id={name},drive={name}-format");
    let node = node.to_string();
    ["-object", &object, "-blockdev", &node, "-device", &device]
        .map(str::to_owned)
        .into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_qemu_decrypts_is_reported_as_plain_text_in_its_backup() {
    let system = System::start();
    let mut arguments = encrypted(system.dir(), "vda", "luks");
    arguments.extend(encrypted(system.dir(), "vdb", "qcow2"));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let machine = system.vm("web").disk(Disk::new("vdc", MIB)).extra(&arguments);
    let vm = system.configured(machine);
    for disk in ["vda", "vdb"] {
        let device = format!("/machine/peripheral/{disk}/virtio-backend");
        let write = format!("qemu-io -d {device} \"write -P 0x5e 0 1M\"");
        vm.qmp("human-monitor-command", json!({ "command-line": write }));
    }
    let caller = Caller::new(&system).await;
    let path = caller.manager.get_domain("web").await.unwrap();
    let domain = DomainProxy::new(&caller.connection, path).await.unwrap();
    assert_eq!(domain.encrypted().await.unwrap(), ["vda", "vdb"]);

    let job = caller.start("web", "").await;
    assert_completed(&job).await;
    assert_eq!(job.encrypted().await.unwrap(), ["vda", "vdb"]);
    let backup = system.store().join("web").join(backup_id(&job).await);
    for disk in ["vda", "vdb"] {
        let image = backup.join(format!("{disk}.qcow2"));
        assert!(holds(&image, "qcow2", 0, MIB, 0x5e), "{disk}: without a key");
    }

    let run = |arguments: &[&str]| system.clients().backupctl(ROOT, arguments).expect_success();
    let said = run(&["create", "web"]);
    assert_eq!(said.matches(SAID).count(), 2, "{said}");
    let shown = run(&["--json", "domains", "--disks"]);
    let shown: Value = serde_json::from_str(&shown).unwrap();
    let disks = shown[0]["disks"].as_array().unwrap().iter();
    let encrypted: Vec<_> = disks.map(|disk| (&disk["disk"], &disk["encrypted"])).collect();
    let expected = [
        (&json!("vda"), &json!(true)),
        (&json!("vdb"), &json!(true)),
        (&json!("vdc"), &json!(false)),
    ];
    assert!(expected.iter().all(|disk| encrypted.contains(disk)), "{shown}");
    let events = run(&["--json", "create", "web"]);
    let last: Value = serde_json::from_str(events.lines().last().unwrap()).unwrap();
    assert_eq!(last["encrypted"], json!(["vda", "vdb"]), "{events}");
    let plain = "<domainbackup><disks><disk name='vdc'/></disks></domainbackup>";
    let job = caller.complete("web", plain).await;
    assert_eq!(job.encrypted().await.unwrap(), [""; 0]);
}
