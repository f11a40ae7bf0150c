//! The service as a process on the private bus.

use std::path::Path;
use std::process::Command;

use backupd::names::BUS_NAME;
use backupd::targets::LOOK_VARIABLE;
use rustix::process::Signal;

use super::bus::{Bus, project_file};
use super::journal::Journal;
use super::process::{self, Process};

/// Further environment variables of the service.
pub type Environment = Vec<(String, String)>;

pub struct Daemon {
    process: Process,
}

impl Daemon {
    /// Starts backupd with the configuration file `config`, and returns when it owns its name. Its log is
    /// `backupd.log` in `dir`, which is printed when the test fails.
    #[track_caller]
    pub fn start(bus: &Bus, dir: &Path, config: &Path, environment: &Environment) -> Self {
        let mut daemon = Self::start_supervised(bus.address(), dir, config, environment);
        bus.wait_for_owner(BUS_NAME, &mut daemon.process);
        daemon
    }

    /// Like [`Daemon::start`], but the service logs to this journal. It runs in a mount namespace where the test's
    /// socket replaces journald's.
    #[track_caller]
    pub fn start_journaled(bus: &Bus, dir: &Path, config: &Path, journal: &Journal) -> Self {
        let mut command = process::bound("unshare");
        command
            .args(["--mount", "--", "sh"])
            .arg(project_file("tests/common/journal.sh"))
            .arg(journal.dir())
            .arg(env!("CARGO_BIN_EXE_backupd"));
        // The value does not matter: a service manager would name its stream, and the service only checks that the
        // variable exists.
        let journal = vec![("JOURNAL_STREAM".to_owned(), "0:0".to_owned())];
        let mut daemon = Self::launch(bus.address(), dir, config, command, &journal);
        bus.wait_for_owner(BUS_NAME, &mut daemon.process);
        daemon
    }

    /// Like [`Daemon::start`], but the service sees the files in the directory `users` as those of /etc.
    #[track_caller]
    pub fn start_with_users(
        bus: &Bus,
        dir: &Path,
        config: &Path,
        users: &Path,
        environment: &Environment,
    ) -> Self {
        let mut command = process::bound("unshare");
        command
            .args(["--mount", "--", "sh", "-c"])
            .arg("cd \"$0\" && for file in *; do mount --bind $file /etc/$file || exit; done && cd / && exec \"$@\"")
            .arg(users)
            .arg(env!("CARGO_BIN_EXE_backupd"));
        let mut daemon = Self::launch(bus.address(), dir, config, command, environment);
        bus.wait_for_owner(BUS_NAME, &mut daemon.process);
        daemon
    }

    /// Starts the service without waiting: for configurations that it refuses.
    #[track_caller]
    pub fn start_unready(bus: &Bus, dir: &Path, config: &Path) -> Self {
        let command = process::bound(env!("CARGO_BIN_EXE_backupd"));
        Self::launch(bus.address(), dir, config, command, &Environment::new())
    }

    /// Like the function above, with further environment variables.
    #[track_caller]
    pub fn start_supervised(address: &str, dir: &Path, config: &Path, environment: &Environment) -> Self {
        let service = env!("CARGO_BIN_EXE_backupd");
        // As in its unit: with a helper, it has not the capability itself.
        let command = match environment.iter().any(|(name, _)| name == LOOK_VARIABLE) {
            true => process::bound_without("sys_ptrace", service),
            false => process::bound(service),
        };
        Self::launch(address, dir, config, command, environment)
    }

    #[track_caller]
    fn launch(
        address: &str,
        dir: &Path,
        config: &Path,
        mut command: Command,
        environment: &Environment,
    ) -> Self {
        command.arg("--config").arg(config);
        command.env("DBUS_SYSTEM_BUS_ADDRESS", address);
        command.env(
            "RUST_LOG",
            std::env::var("RUST_LOG").unwrap_or_else(|_| "backupd=debug,info".to_owned()),
        );
        command.env("RUST_BACKTRACE", "1");
        // Removes the variables that a service manager has set for the test process.
        for name in ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM"] {
            command.env_remove(name);
        }
        command.envs(environment.iter().cloned());
        Self {
            process: Process::start("backupd", dir, command),
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Returns the log of this service and of its predecessors in the same system.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Sends SIGTERM, and returns the exit status.
    #[track_caller]
    pub fn stop(&mut self) -> i32 {
        self.process.signal(Signal::TERM);
        self.process.wait()
    }

    /// Sends SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
