//! Storage that a test writes to: small file systems, block devices, and the contents of images.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{process, wait};

/// A tmpfs of a fixed size, to test a full file system. Dropping it unmounts it. The service must see it, so it cannot
/// be in the test's own mount namespace. It is mounted inside the test's directory; `make test` runs all tests in one
/// mount namespace, so the mount ends with them even if the test process is killed.
pub struct Tmpfs {
    path: PathBuf,
}

impl Tmpfs {
    /// Mounts it on `path`, which is created. `size` is in bytes, a multiple of the page size.
    #[track_caller]
    pub fn mount(path: &Path, size: u64) -> Self {
        std::fs::create_dir_all(path).expect("the mount point is made");
        let mut command = Command::new("mount");
        command
            .args(["-t", "tmpfs", "-o", &format!("size={size},mode=0755"), "tmpfs"])
            .arg(path);
        process::run(command).expect_success();
        Self {
            path: path.to_owned(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a service that a failed test left running may still have a file open in it.
        let mut command = Command::new("umount");
        command.arg("--lazy").arg(&self.path);
        let output = process::run(command);
        if !output.success() {
            eprintln!("{}: {}", self.path.display(), output.stderr);
        }
    }
}

/// A loop device over a file. Dropping it detaches the file.
pub struct LoopDevice {
    device: PathBuf,
}

impl LoopDevice {
    /// Attaches `file`. A missing file is created sparse with this size in bytes.
    #[track_caller]
    pub fn attach(file: &Path, size: u64) -> Self {
        if !file.exists() {
            let made = std::fs::File::create(file).expect("the device's file is made");
            made.set_len(size).expect("the device's file has its size");
        }
        let mut command = Command::new("losetup");
        command.args(["--find", "--show"]).arg(file);
        let device = PathBuf::from(process::run(command).expect_success().trim());
        Self { device }
    }

    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Detaches the file and attaches another one: the device keeps its name and number.
    #[track_caller]
    pub fn exchange(&self, file: &Path) {
        let device = self.device.as_os_str();
        let losetup = |arguments: [&OsStr; 2]| {
            let mut command = Command::new("losetup");
            command.args(arguments);
            process::run(command).expect_success();
        };
        losetup(["--detach".as_ref(), device]);
        // A process that has the device open keeps the file attached.
        let name = self.device.file_name().expect("a device has a name");
        let attached = Path::new("/sys/block").join(name).join("loop");
        wait::until("the file to be detached", || (!attached.exists()).then_some(()));
        losetup([device, file.as_os_str()]);
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // The kernel detaches a device that is still open when it is closed.
        let mut command = Command::new("losetup");
        command.arg("--detach").arg(&self.device);
        let output = process::run(command);
        if !output.success() {
            eprintln!("{}: {}", self.device.display(), output.stderr);
        }
    }
}

/// Compares two images with `qemu-img compare`: the content that the guest sees, and the virtual size up to trailing
/// zeroes. QEMU must have closed both. Formats as in `qemu-img -f`.
#[track_caller]
pub fn identical(one: &Path, one_format: &str, other: &Path, other_format: &str) -> bool {
    let mut command = Command::new("qemu-img");
    command
        .args(["compare", "-f", one_format, "-F", other_format])
        .arg(one)
        .arg(other);
    let output = process::run(command);
    match output.status {
        0 => true,
        1 => false,
        _ => panic!("qemu-img compare: {}{}", output.stdout, output.stderr),
    }
}

/// Whether `length` bytes at `offset` of an image are all `pattern`. QEMU must have closed the image.
#[track_caller]
pub fn holds(image: &Path, format: &str, offset: u64, length: u64, pattern: u8) -> bool {
    let mut command = Command::new("qemu-io");
    command
        .args([
            "-r",
            "-f",
            format,
            "-c",
            &format!("read -q -P {pattern} {offset} {length}"),
        ])
        .arg(image);
    let output = process::run(command);
    let said = format!("{}{}", output.stdout, output.stderr);
    if said.contains("Pattern verification failed") {
        return false;
    }
    assert!(output.success(), "qemu-io: {said}");
    true
}

/// Returns every file below a directory, as sorted relative paths, to find residue of a backup. Returns nothing if the
/// directory does not exist. Leaves out the files that the service keeps in a store for itself.
pub fn files_below(dir: &Path) -> Vec<String> {
    fn walk(dir: &Path, base: &Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_name() == ".backupd" {
                continue;
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk(&path, base, found);
            } else {
                found.push(
                    path.strip_prefix(base)
                        .expect("it is below")
                        .display()
                        .to_string(),
                );
            }
        }
    }
    let mut found = Vec::new();
    walk(dir, dir, &mut found);
    found.sort();
    found
}

/// A directory in which no file can be created, renamed or removed, not even by root. Dropping this restores it.
pub struct Immutable {
    path: PathBuf,
}

impl Immutable {
    #[track_caller]
    pub fn make(path: &Path) -> Self {
        let mut command = Command::new("chattr");
        command.arg("+i").arg(path);
        process::run(command).expect_success();
        Self {
            path: path.to_owned(),
        }
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        let mut command = Command::new("chattr");
        command.arg("-i").arg(&self.path);
        let output = process::run(command);
        if !output.success() {
            eprintln!("{}: {}", self.path.display(), output.stderr);
        }
    }
}
