//! The disks of a test VM: QEMU's arguments for each kind and style, and how their images are created.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::process;

/// The device that the guest sees. Each kind is connected to the block layer in its own way, and so has its own names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Virtio,
    Scsi,
    Ide,
    /// An IDE drive without a medium; all other settings of the disk are ignored.
    EmptyCdrom,
}

/// How the disk is passed to QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Named nodes: `ID-file` under `ID-format` (under `ID-throttle`).
    Blockdev,
    /// `-drive if=none,id=drive-ID`, as scripts do it; QEMU generates the node names.
    Drive,
}

/// One disk of a VM that is not started yet.
#[derive(Debug, Clone)]
pub struct Disk {
    pub(super) id: String,
    size: u64,
    pub(super) kind: Kind,
    pub(super) format: &'static str,
    read_only: bool,
    style: Style,
    throttle_filter: bool,
    discard: bool,
    slow: Option<u64>,
    pub(super) path: Option<PathBuf>,
    fills: Vec<(u64, u64, u8)>,
}

impl Disk {
    /// Returns a writable virtio disk: qcow2, empty, `-blockdev` style. `size` is in bytes; `id` is the device's.
    pub fn new(id: &str, size: u64) -> Self {
        Self {
            id: id.to_owned(),
            size,
            kind: Kind::Virtio,
            format: "qcow2",
            read_only: false,
            style: Style::Blockdev,
            throttle_filter: false,
            discard: false,
            slow: None,
            path: None,
            fills: Vec::new(),
        }
    }

    pub fn empty_cdrom(id: &str) -> Self {
        Self::new(id, 0).kind(Kind::EmptyCdrom)
    }

    pub fn kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    pub fn raw(mut self) -> Self {
        self.format = "raw";
        self
    }

    /// Uses another format that `qemu-img` can create.
    pub fn format(mut self, format: &'static str) -> Self {
        self.format = format;
        self
    }

    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    pub fn drive_style(mut self) -> Self {
        self.style = Style::Drive;
        self
    }

    /// Puts a throttle filter between device and format, as managers do; it limits nothing. `-blockdev` style only.
    pub fn throttle_filter(mut self) -> Self {
        self.throttle_filter = true;
        self
    }

    /// Frees the space of data that the guest discards. `-blockdev` style only.
    pub fn discard(mut self) -> Self {
        self.discard = true;
        self
    }

    /// Limits the throughput of the file, independently of the service, so that a backup stays in progress for a
    /// while. Bytes a second; `-blockdev` style only.
    pub fn slow(mut self, bytes_per_second: u64) -> Self {
        self.slow = Some(bytes_per_second);
        self
    }

    /// Puts the image at this path instead of next to the sockets. An existing file or block device is used as it is.
    pub fn at(mut self, path: &Path) -> Self {
        self.path = Some(path.to_owned());
        self
    }

    /// Writes a pattern before QEMU starts. Bytes, multiples of 512.
    pub fn fill(mut self, offset: u64, length: u64, pattern: u8) -> Self {
        self.fills.push((offset, length, pattern));
        self
    }

    /// Returns the path by which `qemu-io` in the monitor finds the device: for virtio the id alone is not enough.
    pub(super) fn qom_path(&self) -> String {
        match self.kind {
            Kind::Virtio => format!("/machine/peripheral/{}/virtio-backend", self.id),
            _ => format!("/machine/peripheral/{}", self.id),
        }
    }

    /// Creates the image and writes its patterns.
    pub(super) fn create(&self, path: &Path) {
        if !path.exists() {
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", self.format]);
            if self.format == "qcow2" && self.fills.is_empty() && (1..=1 << 30).contains(&self.size) {
                // Without data a backup of the disk would end at once, whatever its limit is.
                create.args(["-o", "preallocation=metadata"]);
            }
            create.arg(path).arg(self.size.to_string());
            process::run(create).expect_success();
        }
        if !self.fills.is_empty() {
            let mut write = Command::new("qemu-io");
            write.args(["-f", self.format]);
            for (offset, length, pattern) in &self.fills {
                write.args(["-c", &format!("write -q -P {pattern} {offset} {length}")]);
            }
            process::run({
                write.arg(path);
                write
            })
            .expect_success();
        }
    }

    /// Returns QEMU's arguments for the block nodes and the device; `path` is absolute. `ide` counts IDE ports.
    pub(super) fn arguments(&self, path: &Path, ide: &mut u32) -> Vec<String> {
        let id = &self.id;
        let mut port = || {
            *ide += 1;
            format!("bus=ide.{}", *ide - 1)
        };
        if self.kind == Kind::EmptyCdrom {
            return vec!["-device".into(), format!("ide-cd,id={id},{}", port())];
        }
        let (mut arguments, drive) = match self.style {
            Style::Drive => self.drive_arguments(path),
            Style::Blockdev => self.blockdev_arguments(path),
        };
        let device = match self.kind {
            Kind::Virtio => format!("virtio-blk-pci,id={id},drive={drive}"),
            Kind::Scsi => format!("scsi-hd,id={id},drive={drive},bus=scsi.0"),
            Kind::Ide | Kind::EmptyCdrom => format!("ide-hd,id={id},drive={drive},{}", port()),
        };
        arguments.extend(["-device".into(), device]);
        arguments
    }

    fn drive_arguments(&self, path: &Path) -> (Vec<String>, String) {
        let drive = format!("drive-{}", self.id);
        let mut option = format!(
            "if=none,id={drive},format={},file={}",
            self.format,
            path.display()
        );
        if self.read_only {
            option.push_str(",readonly=on");
        }
        (vec!["-drive".into(), option], drive)
    }

    fn blockdev_arguments(&self, path: &Path) -> (Vec<String>, String) {
        let id = &self.id;
        let mut arguments = Vec::new();
        let mut blockdev = |node: Value| arguments.extend(["-blockdev".to_owned(), node.to_string()]);
        let driver = if is_block_device(path) {
            "host_device"
        } else {
            "file"
        };
        blockdev(json!({
            "driver": driver, "node-name": format!("{id}-file"), "filename": path,
            "read-only": self.read_only, "discard": "unmap",
        }));
        let mut below = format!("{id}-file");
        if self.slow.is_some() {
            let node = format!("{id}-slow");
            blockdev(json!({
                "driver": "throttle", "node-name": node, "throttle-group": format!("{id}-limit"),
                "file": below, "read-only": self.read_only,
            }));
            below = node;
        }
        let mut top = format!("{id}-format");
        blockdev(json!({
            "driver": self.format, "node-name": top, "file": below, "read-only": self.read_only,
            "discard": if self.discard { "unmap" } else { "ignore" },
        }));
        if self.throttle_filter {
            let node = format!("{id}-throttle");
            blockdev(json!({
                "driver": "throttle", "node-name": node, "throttle-group": format!("{id}-group"),
                "file": top, "read-only": self.read_only,
            }));
            top = node;
        }
        // QEMU needs the throttle groups before the nodes that refer to them.
        let mut groups = Vec::new();
        let mut group = |name: String, limits: Value| {
            let object = json!({ "qom-type": "throttle-group", "id": name, "limits": limits });
            groups.extend(["-object".to_owned(), object.to_string()]);
        };
        if let Some(rate) = self.slow {
            group(format!("{id}-limit"), json!({ "bps-total": rate }));
        }
        if self.throttle_filter {
            group(format!("{id}-group"), json!({}));
        }
        groups.append(&mut arguments);
        (groups, top)
    }
}

fn is_block_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}
