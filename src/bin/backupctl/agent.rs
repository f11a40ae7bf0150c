//! The polkit agent that asks for a password on the terminal.
//!
//! A desktop has an agent of its own. `pkttyagent --fallback` steps back where there is one, and is missing where
//! polkit is: then nobody asks, and the service says that the caller isn't authorised.

use std::io::{self, IsTerminal};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// How long the agent may take to announce itself.
const START: Duration = Duration::from_secs(3);

/// A running agent. It ends when this is dropped.
#[derive(Debug)]
pub struct Agent(Child);

impl Agent {
    /// Starts one if it makes sense: there is a terminal, and a user who could be asked for something.
    pub async fn start(ask_password: bool) -> Option<Self> {
        if !ask_password || !io::stdin().is_terminal() || rustix::process::geteuid().is_root() {
            return None;
        }
        // Its standard output is the descriptor that it closes when it is ready: the dialog is on /dev/tty.
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
            // An agent that isn't ready by now may be later.
            let _ = tokio::time::timeout(START, closed).await;
        }
        Some(agent)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // SIGTERM lets it put the terminal right again, and SIGCONT reaches it if it was stopped for reading from
        // the background. All of it may fail because the agent has ended by itself.
        let pid = Pid::from_child(&self.0);
        let _ = kill_process(pid, Signal::TERM);
        let _ = kill_process(pid, Signal::CONT);
        let _ = self.0.wait();
    }
}
