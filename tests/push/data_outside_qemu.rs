//! Data of a VM that QEMU does not read. No backup contains it, and every output about a backup reports that.

use std::fs::File;

use crate::common::caller::{Caller, assert_completed};
use crate::common::clients::ROOT;
use crate::common::disk::Disk;
use crate::common::process::{self, Process};
use crate::common::proxies::{DomainProxy, Options, error_name};
use crate::common::recorded::backup_id;
use crate::common::vm::Vm;
use crate::common::{System, wait};
use serde_json::{Value, json};
use zbus::wire::Variant;

const MIB: u64 = 1 << 20;
const NVDIMM: &str = "/machine/peripheral-anon/device[0]";

/// Starts a VM with a vhost-user disk and with persistent memory.
struct Scene {
    _vm: Vm,
    _server: Process,
    system: System,
}

impl Scene {
    fn new() -> Self {
        let system = System::start();
        let file = |name: &str| {
            let path = system.dir().join(name);
            File::create_new(&path).unwrap().set_len(16 * MIB).unwrap();
            path.display().to_string()
        };
        let (disk, memory) = (file("served"), file("memory"));
        let socket = system.dir().join("vhost-user");
        let mut server = process::bound("qemu-storage-daemon");
        server.args(["--blockdev", &format!("driver=file,node-name=f,filename={disk}")]);
        server.arg("--export");
        server.arg(format!(
            "type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        ));
        let server = Process::start("qemu-storage-daemon", system.dir(), server);
        wait::until("the disk to be served", || socket.exists().then_some(()));
        let memory = format!("memory-backend-file,id=nv,share=on,mem-path={memory},size=16M");
        let chardev = format!("socket,id=served,path={}", socket.display());
        let machine = system.vm("web").disk(Disk::new("vda", MIB)).extra(&[
            "-machine",
            "nvdimm=on",
            "-m",
            "64,slots=2,maxmem=1G",
            "-object",
            "memory-backend-memfd,id=ram,size=64M,share=on",
            "-numa",
            "node,memdev=ram",
            "-chardev",
            &chardev,
            "-device",
            "vhost-user-blk-pci,chardev=served,id=vdb",
            "-object",
            &memory,
            "-device",
            "nvdimm,memdev=nv",
        ]);
        Self {
            _vm: system.configured(machine),
            _server: server,
            system,
        }
    }
}

fn both() -> Vec<(String, String)> {
    [(NVDIMM, "nvdimm"), ("vdb", "vhost-user-blk-pci")]
        .map(|(name, kind)| (name.to_owned(), kind.to_owned()))
        .into()
}

#[tokio::test(flavor = "multi_thread")]
async fn data_outside_qemu_is_listed_as_not_in_the_backup() {
    let scene = Scene::new();
    let caller = Caller::new(&scene.system).await;
    let path = caller.manager.get_domain("web").await.unwrap();
    let domain = DomainProxy::new(&caller.connection, path).await.unwrap();
    let disks = domain.disks().await.unwrap();
    let left_out: Vec<(String, String)> = disks
        .iter()
        .map(|disk| (disk.0.clone(), disk.5.clone()))
        .collect();
    let vda = ("vda".to_owned(), String::new());
    assert_eq!(left_out, [vec![vda], both()].concat());

    let job = caller.start("web", "").await;
    assert_completed(&job).await;
    assert_eq!(job.not_in_backup().await.unwrap(), both());
    let id = backup_id(&job).await;
    let manifest = scene.system.store().join("web").join(id).join("manifest.json");
    let manifest: Value = serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap();
    assert_eq!(
        manifest["not-in-backup"],
        json!([
            { "name": NVDIMM, "type": "nvdimm" },
            { "name": "vdb", "type": "vhost-user-blk-pci" },
        ])
    );
    let clients = scene.system.clients();
    let said = clients.backupctl(ROOT, &["create", "web"]).expect_success();
    for line in [
        "not in the backup (vhost-user-blk-pci)",
        "not in the backup (nvdimm)",
    ] {
        assert!(said.contains(line), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_must_be_complete_is_refused_for_a_vm_with_data_outside_qemu() {
    let scene = Scene::new();
    let caller = Caller::new(&scene.system).await;
    let all = Options::from([("require-all-disks", Variant::from(true))]);
    let refused = caller.try_start("web", "", &[], all.clone()).await.unwrap_err();
    assert_eq!(error_name(&refused), "org.example.Backup1.Error.Unsupported");
    let text = refused.to_string();
    assert!(
        text.contains("'vdb' (vhost-user-blk-pci)") && text.contains("(nvdimm)"),
        "{text}"
    );
    let clients = scene.system.clients();
    let said = clients.backupctl(ROOT, &["create", "web", "--require-all-disks"]);
    assert!(!said.success() && said.stderr.contains("'vdb'"), "{said:?}");
    // A VM without such data is backed up.
    let _plain = scene
        .system
        .configured(scene.system.vm("plain").disk(Disk::new("vda", MIB)));
    let job = caller.start_with("plain", "", &[], all).await;
    assert_completed(&job).await;
    assert_eq!(job.not_in_backup().await.unwrap(), []);
}
