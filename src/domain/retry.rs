//! The backoff between tries to connect to a monitor.

use std::path::Path;
use std::time::Duration;

use super::presence::{Armed, PathWatch, Presence};

const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(5);
/// The first pause while another client has the monitor. A try that waits in QEMU's queue takes the monitor over if
/// that client loses its connection for a moment, so the service tries seldom.
const FIRST_OF_SILENT: Duration = Duration::from_secs(2);
/// The longest such pause: short enough for a backup that waits for a QEMU that was stopped for a while.
const LAST_OF_SILENT: Duration = Duration::from_secs(30);
/// The longest pause while the administrator must change something first.
const LAST_OF_REFUSED: Duration = Duration::from_secs(120);
/// After a pause of this length without success, the service tries an absent monitor only at an event of its path.
const LAST_BEFORE_REST: Duration = Duration::from_secs(1);
/// The pause between tries without an event. inotify does not report a new target of a symbolic link, or a process
/// that begins to listen at an existing socket.
const RARELY: Duration = Duration::from_secs(600);

/// The result of the last try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// The monitor was connected, or the try failed in another way.
    Failure,
    /// No process listens.
    Absence,
    /// A process listens and does not greet.
    Silence,
    /// The service must not connect to the socket.
    Refusal,
}

/// The tries to connect to one monitor since its last connection.
pub(super) struct Retry {
    watch: PathWatch,
    pause: Duration,
}

impl Retry {
    pub fn new(presence: &Presence, monitor: &Path) -> Self {
        Self {
            watch: presence.path_watch(monitor),
            pause: FIRST,
        }
    }

    /// Waits until the next try.
    pub async fn wait(&mut self, after: After) {
        let rests = match self.watch.rearm().await {
            Armed::Held => after == After::Absence && self.pause > LAST_BEFORE_REST,
            Armed::New => {
                self.pause = FIRST;
                false
            }
            Armed::Blind => false,
        };
        let longest = match after {
            After::Silence => {
                self.pause = self.pause.max(FIRST_OF_SILENT);
                LAST_OF_SILENT
            }
            After::Refusal => LAST_OF_REFUSED,
            After::Failure | After::Absence => LAST,
        };
        let pause = if rests { RARELY } else { self.pause };
        match tokio::time::timeout(pause, self.watch.news()).await {
            Ok(()) => {
                // A socket exists a moment before its process listens. This pause also bounds the tries if a process
                // creates and removes the socket in a loop.
                tokio::time::sleep(FIRST).await;
                self.pause = FIRST;
            }
            Err(_) => self.pause = (self.pause * 2).min(longest),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_service_tries_a_silent_monitor_less_and_less() {
        let (presence, _news) = Presence::open().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut retry = Retry::new(&presence, &directory.path().join("monitor"));
        let began = Instant::now();
        let mut tries = 0;
        while began.elapsed() < Duration::from_secs(3600) {
            retry.wait(After::Silence).await;
            tries += 1;
        }
        assert!((120..125).contains(&tries), "{tries}");
    }
}
