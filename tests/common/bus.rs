//! A private system bus: a real dbus-daemon of type "system", with the stock defaults of a system bus, the policy file
//! that the project ships, and polkit's own.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;

use super::process::{self, Process};
use super::wait;

pub struct Bus {
    process: Process,
    address: String,
}

impl Bus {
    /// Starts a bus with its socket in `dir`, which ordinary users must be able to enter.
    #[track_caller]
    pub fn start(dir: &Path) -> Self {
        Self::start_with(dir, &[])
    }

    /// Like [`Bus::start`], with further arguments for dbus-daemon.
    #[track_caller]
    pub fn start_with(dir: &Path, arguments: &[&str]) -> Self {
        let socket = dir.join("bus");
        let config = dir.join("bus.conf");
        let policy = project_file("dbus/org.example.Backup1.conf");
        std::fs::write(&config, configuration(&socket, &policy)).expect("the bus's configuration is written");
        let mut command = process::bound("dbus-daemon");
        command.args(["--nofork", "--nopidfile", "--nosyslog", "--print-address"]);
        command.arg(format!("--config-file={}", config.display()));
        command.args(arguments);
        let mut process = Process::start("dbus-daemon", dir, command);
        // dbus-daemon prints the address when it listens.
        let address = wait::until("the bus to print its address", || {
            process.assert_running();
            process.stdout().split_once('\n').map(|(line, _)| line.to_owned())
        });
        Self { process, address }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns the process that owns a name on the bus.
    pub fn name_owner(&self, name: &str) -> Option<u32> {
        let output = process::run(self.busctl(&[
            "call",
            "org.freedesktop.DBus",
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus",
            "GetConnectionUnixProcessID",
            "s",
            name,
        ]));
        output.stdout.trim().strip_prefix("u ")?.parse().ok()
    }

    /// Waits until `process` owns the name, and fails at once if the process ends instead.
    #[track_caller]
    pub fn wait_for_owner(&self, name: &str, process: &mut Process) {
        wait::until(&format!("{name} to be owned"), || {
            process.assert_running();
            (self.name_owner(name) == Some(process.pid())).then_some(())
        });
    }

    /// Waits until the name has no owner: the bus learns of an ended process a moment after the parent does.
    #[track_caller]
    pub fn wait_for_no_owner(&self, name: &str) {
        wait::until(&format!("{name} to be free"), || {
            self.name_owner(name).is_none().then_some(())
        });
    }

    /// Returns a `busctl` command on this bus, as root.
    pub fn busctl(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("busctl");
        command.arg(format!("--address={}", self.address)).args(arguments);
        command
    }

    /// Connects this process, which is root.
    pub async fn connect(&self) -> zbus::Connection {
        zbus::connection::Builder::address(self.address.as_str())
            .build()
            .await
            .expect("the private bus can be connected to")
    }

    /// Stops the bus (SIGSTOP) until [`Bus::thaw`].
    pub fn freeze(&mut self) {
        self.process.signal(Signal::STOP);
    }

    pub fn thaw(&mut self) {
        self.process.signal(Signal::CONT);
    }

    /// Returns the standard error of the bus and of services that it started.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Kills the bus while clients are connected.
    pub fn kill(&mut self) {
        self.process.kill();
    }
}

/// Returns a file of the project, by its path in the tree.
pub fn project_file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Returns `system-bus.conf` with its paths filled in: the bus's socket, and the policy that the project ships.
pub fn configuration(socket: &Path, policy: &Path) -> String {
    include_str!("system-bus.conf")
        .replace("@socket@", &socket.display().to_string())
        .replace("@policy@", &policy.display().to_string())
}
