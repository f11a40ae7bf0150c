//! Callers of the service: commands of root or of ordinary users, with the private bus as their system bus.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::bus::Bus;
use super::process::{self, Output, Process};

pub const ROOT: u32 = 0;
/// An ordinary user of every Debian machine (polkit's rules need one with a name): `nobody`.
pub const USER: u32 = 65534;
/// Another ordinary user: `daemon`, which has no special rights on Debian.
pub const OTHER_USER: u32 = 1;
/// A third ordinary user: `bin`.
pub const THIRD_USER: u32 = 2;

/// Runs the clients of one bus.
pub struct Clients {
    address: String,
    dir: PathBuf,
}

impl Clients {
    pub fn new(bus: &Bus, dir: &Path) -> Self {
        Self {
            address: bus.address().to_owned(),
            dir: dir.to_owned(),
        }
    }

    /// Returns a command that runs `program` as a user.
    pub fn command(&self, uid: u32, program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Command {
        let mut command = if uid == ROOT {
            process::bound(program)
        } else {
            process::bound_as(uid, program)
        };
        command
            .args(arguments)
            .env("DBUS_SYSTEM_BUS_ADDRESS", &self.address)
            .current_dir("/");
        command
    }

    /// Runs a program as a user to its end.
    #[track_caller]
    pub fn run(&self, uid: u32, program: &str, arguments: &[&str]) -> Output {
        process::run(self.command(uid, program, arguments))
    }

    #[track_caller]
    pub fn busctl(&self, uid: u32, arguments: &[&str]) -> Output {
        // busctl --system does not read DBUS_SYSTEM_BUS_ADDRESS in every version.
        let address = format!("--address={}", self.address);
        self.run(uid, "busctl", &[&[address.as_str()], arguments].concat())
    }

    /// `gdbus call` on the system bus.
    #[track_caller]
    pub fn gdbus_call(
        &self,
        uid: u32,
        service: &str,
        object: &str,
        method: &str,
        arguments: &[&str],
    ) -> Output {
        let call = [
            "call",
            "--system",
            "--dest",
            service,
            "--object-path",
            object,
            "--method",
            method,
        ];
        self.run(uid, "gdbus", &[&call, arguments].concat())
    }

    /// Runs backupctl to its end.
    #[track_caller]
    pub fn backupctl(&self, uid: u32, arguments: &[&str]) -> Output {
        process::run(self.command(uid, self.backupctl_path(), arguments))
    }

    /// Runs backupctl in parallel with the test. `NAME.out` and `NAME.log` receive its output too.
    #[track_caller]
    pub fn start_backupctl(&self, name: &str, uid: u32, arguments: &[&str]) -> Process {
        Process::start(
            name,
            &self.dir,
            self.command(uid, self.backupctl_path(), arguments),
        )
    }

    /// Copies backupctl into the test's directory, because ordinary users may have no access to the build directory.
    fn backupctl_path(&self) -> PathBuf {
        let copy = self.dir.join("backupctl");
        if !copy.exists() {
            // `cp` copies it in a process of its own. If this process had the file open for writing while another
            // thread forks, the file could not be executed ("text file busy").
            let mut command = Command::new("cp");
            command
                .args(["--reflink=auto", env!("CARGO_BIN_EXE_backupctl")])
                .arg(&copy);
            process::run(command).expect_success();
        }
        copy
    }
}
