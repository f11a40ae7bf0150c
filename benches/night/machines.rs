//! Many small VMs: the smallest QEMU with a disk.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::observer::Observer;
use crate::common::process::{self, Process};
use crate::common::proxy::Proxy;
use crate::common::vm::qemu;
use crate::common::{System, wait};

/// The number of VMs whose commands are counted. The proxy that counts them takes processor time.
const COUNTED: usize = 3;
const TOGETHER: usize = 20;

pub struct Machines {
    pub names: Vec<String>,
    pub proxies: Vec<Proxy>,
    _processes: Vec<Process>,
}

/// Starts `count` VMs, and waits until the service has connected to all.
pub fn start(system: &mut System, count: usize) -> Machines {
    let names: Vec<String> = (0..count).map(|number| format!("vm{number:03}")).collect();
    let image = image(system.dir());
    let (mut processes, mut proxies) = (Vec::new(), Vec::new());
    for group in names.chunks(TOGETHER) {
        let started: Vec<_> = group
            .iter()
            .map(|name| launch(system.dir(), &image, name))
            .collect();
        for (name, mut process) in group.iter().zip(started) {
            let directory = system.dir().join(name);
            drop(wait::until("QEMU's monitor", || {
                process.assert_running();
                Observer::connect(&directory.join("observer"))
            }));
            processes.push(process);
            let mut monitor = directory.join("service");
            if proxies.len() < COUNTED {
                let path = directory.join("proxy");
                proxies.push(Proxy::start(&path, &monitor));
                monitor = path;
            }
            system.write_domain_file(name, &format!("monitor = \"{}\"\n", monitor.display()));
        }
    }
    for name in &names {
        system.wait_for_domain(name);
    }
    Machines {
        names,
        proxies,
        _processes: processes,
    }
}

/// Creates the disk that each VM gets.
fn image(directory: &Path) -> PathBuf {
    let image = directory.join("disk.qcow2");
    let mut create = Command::new("qemu-img");
    create
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&image)
        .arg("64M");
    process::run(create).expect_success();
    let mut write = Command::new("qemu-io");
    write
        .args(["-f", "qcow2", "-c", "write -q -P 0x5a 0 4M"])
        .arg(&image);
    process::run(write).expect_success();
    image
}

fn launch(directory: &Path, image: &Path, name: &str) -> Process {
    let directory = directory.join(name);
    std::fs::create_dir(&directory).expect("the machine's directory is made");
    let disk = directory.join("vda.qcow2");
    std::fs::copy(image, &disk).expect("the disk is copied");
    let mut command = process::bound(qemu());
    command.args(["-name", name, "-uuid", &uuid::Uuid::new_v4().to_string()]);
    command.args(["-machine", "microvm,accel=tcg,pit=off,pic=off", "-m", "16", "-S"]);
    command.args(["-display", "none", "-nodefaults", "-no-user-config"]);
    for socket in ["service", "observer"] {
        let path = directory.join(socket);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", path.display())]);
    }
    let node = format!(
        "driver=qcow2,node-name=disk,file.driver=file,file.filename={}",
        disk.display()
    );
    command.args(["-blockdev", &node]);
    command.args(["-device", "virtio-blk-device,drive=disk,id=vda"]);
    Process::start("qemu", &directory, command)
}
