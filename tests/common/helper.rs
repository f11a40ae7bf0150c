//! The helper that looks into other processes for the service, started for each connection as systemd does it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::process::{self, Process};
use super::wait;

/// The socket of a system's helper.
pub fn socket(dir: &Path) -> PathBuf {
    dir.join("look")
}

/// Accepts connections, and starts a program for each connection.
const ACTIVATE: &str = "systemd-socket-activate";

/// Serves the service until it is dropped.
pub struct Helper(Process);

impl Helper {
    #[track_caller]
    pub fn start(dir: &Path) -> Self {
        Self::launch(dir, process::bound(ACTIVATE))
    }

    /// Starts a helper without this capability, as from a unit that lost it.
    #[track_caller]
    pub fn start_without(dir: &Path, capability: &str) -> Self {
        Self::launch(dir, process::bound_without(capability, ACTIVATE))
    }

    #[track_caller]
    fn launch(dir: &Path, mut command: Command) -> Self {
        let socket = socket(dir);
        command
            .args(["--accept", "--inetd"])
            .arg(format!("--listen={}", socket.display()))
            .args([env!("CARGO_BIN_EXE_backupd"), "--look"]);
        let helper = Self(Process::start("look", dir, command));
        // The socket has its name before the kernel connects anybody to it (bind(2), listen(2)).
        wait::until("the helper to listen", || {
            helper.log().contains("Listening on").then_some(())
        });
        // The helper itself checks who asks.
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
        helper
    }

    pub fn log(&self) -> String {
        self.0.log()
    }

    /// Returns how many connections it has accepted.
    pub fn connections(&self) -> usize {
        self.log().matches("Spawned ").count()
    }

    pub fn kill(&mut self) {
        self.0.kill();
    }
}
