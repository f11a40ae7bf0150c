//! Handles Ctrl-C, SIGTERM and SIGHUP while following a job, and asks the question after Ctrl-C.

use std::io::{self, IsTerminal, Write};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// A signal that requests the program's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupt {
    /// Ctrl-C.
    User,
    /// SIGTERM, or SIGHUP after the terminal was closed.
    Terminate,
}

/// Catches these signals while it exists.
#[derive(Debug)]
pub struct Interrupts {
    user: Signal,
    terminate: Signal,
    /// `None` if SIGHUP was ignored at the start, as by nohup(1). It stays ignored.
    hangup: Option<Signal>,
}

impl Interrupts {
    /// Catches the signals. They do not end the program any more.
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            user: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: match ignores_hangup()? {
                true => None,
                false => Some(signal(SignalKind::hangup())?),
            },
        })
    }

    /// The next signal. Dropping the future loses no signal.
    pub async fn next(&mut self) -> Interrupt {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.user.recv() => Interrupt::User,
            _ = self.terminate.recv() => Interrupt::Terminate,
            _ = hangup => Interrupt::Terminate,
        }
    }
}

/// Whether SIGHUP is ignored, from `SigIgn` of proc_pid_status(5).
fn ignores_hangup() -> io::Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let bit = 1 << (SignalKind::hangup().as_raw_value() - 1);
    Ok(mask.is_some_and(|mask| mask & bit != 0))
}

/// The user's decision about the backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Cancel it.
    Cancel,
    /// Let it run, and end the program.
    Detach,
    /// Continue to wait.
    Continue,
}

impl Answer {
    /// Parses an answer. An unclear one means [`Self::Continue`].
    fn read(line: &str) -> Self {
        match line.trim().to_lowercase().as_str() {
            "c" | "cancel" => Self::Cancel,
            "d" | "detach" => Self::Detach,
            _ => Self::Continue,
        }
    }
}

/// Whether a user can answer a question.
pub fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks for the decision about the backup.
pub async fn ask() -> Answer {
    let mut err = io::stderr();
    // If the question cannot be shown, no answer will come either.
    let _ = write!(err, "\nCancel the backup, detach, or continue? [c/d/N] ");
    let _ = err.flush();
    let (sender, receiver) = oneshot::channel();
    // In its own thread, because a read from a terminal cannot be interrupted and must not delay the program's end.
    std::thread::spawn(move || {
        let mut line = String::new();
        let answer = match io::stdin().read_line(&mut line) {
            Ok(_) => Answer::read(&line),
            Err(_) => Answer::Continue,
        };
        // The receiver is gone if the backup has ended.
        let _ = sender.send(answer);
    });
    receiver.await.unwrap_or(Answer::Continue)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clear_answer_has_an_effect() {
        assert_eq!(Answer::read("c\n"), Answer::Cancel);
        assert_eq!(Answer::read(" Cancel \n"), Answer::Cancel);
        assert_eq!(Answer::read("D\n"), Answer::Detach);
        for line in ["", "\n", "n\n", "y\n", "cd\n"] {
            assert_eq!(Answer::read(line), Answer::Continue, "{line:?}");
        }
    }
}
