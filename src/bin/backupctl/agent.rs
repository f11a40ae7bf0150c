//! Starts the polkit agent that asks for a password on the terminal.
//!
//! A desktop session has its own agent; `pkttyagent --fallback` yields to it. Without `pkttyagent` nobody asks, and the
//! service reports that the caller is not authorised.

use std::io::{self, IsTerminal};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// Timeout for the agent to become ready.
const START: Duration = Duration::from_secs(3);

/// A running agent. It ends when this is dropped.
#[derive(Debug)]
pub struct Agent(Child);

impl Agent {
    /// Starts an agent if there is a terminal and the user is not root.
    pub async fn start(ask_password: bool) -> Option<Self> {
        if !ask_password || !io::stdin().is_terminal() || rustix::process::geteuid().is_root() {
            return None;
        }
        // The agent closes its standard output when it is ready. Its dialog uses /dev/tty.
        let mut child = Command::new("pkttyagent")
            .args(["--notify-fd", "1", "--fallback", "--process"])
            .arg(std::process::id().to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let stdout = child.stdout.take();
        let agent = Self(child);
        if let Some(Ok(mut ready)) = stdout.map(|stdout| pipe::Receiver::from_owned_fd(OwnedFd::from(stdout)))
        {
            let mut nothing = [0; 64];
            let closed = async { while matches!(ready.read(&mut nothing).await, Ok(1..)) {} };
            // A slow agent may become ready later.
            let _ = tokio::time::timeout(START, closed).await;
        }
        Some(agent)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // SIGTERM lets the agent restore the terminal. SIGCONT wakes it if the terminal stopped it as a background
        // process. Both fail harmlessly if it has ended.
        let pid = Pid::from_child(&self.0);
        let _ = kill_process(pid, Signal::TERM);
        let _ = kill_process(pid, Signal::CONT);
        let _ = self.0.wait();
    }
}
