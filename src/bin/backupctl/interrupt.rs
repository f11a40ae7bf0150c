//! Ctrl-C, SIGTERM and SIGHUP while a job is followed, and the question that Ctrl-C asks.

use std::io::{self, IsTerminal, Write};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// A signal that wants the program to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupt {
    /// Ctrl-C.
    User,
    /// SIGTERM, or SIGHUP: the terminal was closed.
    Terminate,
}

/// Catches these signals from the time it is made.
#[derive(Debug)]
pub struct Interrupts {
    user: Signal,
    terminate: Signal,
    /// Nothing where it was ignored at the start, as by nohup(1): it stays ignored.
    hangup: Option<Signal>,
}

impl Interrupts {
    /// From now on the signals don't end the program by themselves.
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

    /// The next signal. No signal is lost when this is dropped before it is ready.
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

/// Whether SIGHUP is ignored, from the mask `SigIgn` of proc_pid_status(5).
fn ignores_hangup() -> io::Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let bit = 1 << (SignalKind::hangup().as_raw_value() - 1);
    Ok(mask.is_some_and(|mask| mask & bit != 0))
}

/// What the user wants to become of the backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Cancel it.
    Cancel,
    /// Leave it running, and end the program.
    Detach,
    /// Go on waiting.
    Continue,
}

impl Answer {
    /// What isn't clearly one of the others is the one that changes nothing.
    fn read(line: &str) -> Self {
        match line.trim().to_lowercase().as_str() {
            "c" | "cancel" => Self::Cancel,
            "d" | "detach" => Self::Detach,
            _ => Self::Continue,
        }
    }
}

/// Whether there is somebody to ask.
pub fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks what shall become of the backup.
pub async fn ask() -> Answer {
    let mut err = io::stderr();
    // Where the question can't be shown there will be no answer either.
    let _ = write!(err, "\nCancel the backup, detach, or continue? [c/d/N] ");
    let _ = err.flush();
    let (sender, receiver) = oneshot::channel();
    // A thread of its own: a read from a terminal can't be interrupted, and it must not hold up the program's end.
    std::thread::spawn(move || {
        let mut line = String::new();
        let answer = match io::stdin().read_line(&mut line) {
            Ok(_) => Answer::read(&line),
            Err(_) => Answer::Continue,
        };
        // Nobody listens any more if the backup has ended meanwhile.
        let _ = sender.send(answer);
    });
    receiver.await.unwrap_or(Answer::Continue)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clear_answer_changes_something() {
        assert_eq!(Answer::read("c\n"), Answer::Cancel);
        assert_eq!(Answer::read(" Cancel \n"), Answer::Cancel);
        assert_eq!(Answer::read("D\n"), Answer::Detach);
        for line in ["", "\n", "n\n", "y\n", "cd\n"] {
            assert_eq!(Answer::read(line), Answer::Continue, "{line:?}");
        }
    }
}
