//! A root file system in memory for the Linux guests of tests: a shell, kernel modules, and programs of this host with
//! their libraries. `tests/setup.sh` fetches the kernel, modules and shell from Debian packages.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::bus::project_file;
use super::process;

/// The files that `tests/setup.sh` fetched.
#[track_caller]
pub fn parts() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").filter(|cache| !cache.is_empty());
    let parts = cache
        .map_or("/var/cache".into(), PathBuf::from)
        .join("backupd-test-guest");
    assert!(
        parts.join("vmlinuz").is_file(),
        "there is no Linux guest in {}: run tests/setup.sh as root, with a Debian mirror in reach",
        parts.display()
    );
    parts
}

/// Returns the path of a program of this host. The system's directories are not always in PATH.
#[track_caller]
pub fn find(program: &str) -> PathBuf {
    let mut found = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
        .iter()
        .map(|dir| Path::new(dir).join(program));
    found
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("there is no {program}"))
}

pub struct Initramfs {
    parts: PathBuf,
    root: PathBuf,
}

impl Initramfs {
    /// Creates it in `dir` with a shell, all modules, and this script as the first process, which sources `/boot.sh`.
    #[track_caller]
    pub fn new(dir: &Path, init: &Path) -> Self {
        let new = Self {
            parts: parts(),
            root: dir.join("initramfs"),
        };
        for name in ["bin", "dev", "proc", "sys", "run", "tmp", "var", "modules"] {
            new.directory(name);
        }
        new.put(&new.parts.join("busybox"), "/bin/busybox");
        new.put(init, "/init");
        new.put(&project_file("tests/common/boot.sh"), "/boot.sh");
        for module in fs::read_dir(new.parts.join("modules")).expect("there are modules") {
            let module = module.expect("the modules are readable");
            let name = module.file_name();
            new.put(&module.path(), &format!("/modules/{}", name.display()));
        }
        new
    }

    pub fn directory(&self, name: &str) {
        let path = self.root.join(name.trim_start_matches('/'));
        fs::create_dir_all(path).expect("a directory is made");
    }

    /// Copies a file. Every user can read and execute the copy.
    #[track_caller]
    pub fn put(&self, from: &Path, to: &str) {
        let to = self.place(to);
        fs::copy(from, &to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).expect("its mode is set");
    }

    /// Writes a file with this text.
    pub fn write(&self, text: &str, to: &str) {
        fs::write(self.place(to), text).expect("a file is written");
    }

    /// Copies a program, or a plugin of one, with the libraries that it is linked with. Debugging information is
    /// removed, because it would take more memory than the guest has.
    #[track_caller]
    pub fn program(&self, from: &Path, to: &str) {
        self.put(from, to);
        let mut strip = Command::new("strip");
        strip.arg("--strip-debug").arg(self.place(to));
        process::run(strip).expect_success();
        let mut ldd = Command::new("ldd");
        ldd.arg(from);
        let libraries = process::run(ldd).expect_success();
        assert!(!libraries.contains("not found"), "{libraries}");
        for path in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            if !self.root.join(path.trim_start_matches('/')).exists() {
                self.put(Path::new(path), path);
            }
        }
    }

    /// Packs it for the kernel.
    #[track_caller]
    pub fn pack(self) -> PathBuf {
        let archive = self.root.with_extension("cpio");
        let mut pack = Command::new("sh");
        pack.args(["-euc", r#"cd "$1" && find . | "$2" cpio -o -H newc >"$3""#, "sh"])
            .args([&self.root, &self.parts.join("busybox"), &archive]);
        process::run(pack).expect_success();
        fs::remove_dir_all(&self.root).expect("the unpacked files are removed");
        archive
    }

    fn place(&self, to: &str) -> PathBuf {
        let to = self.root.join(to.trim_start_matches('/'));
        let parent = to.parent().expect("a file is in a directory");
        fs::create_dir_all(parent).expect("a directory is made");
        to
    }
}
